"""What stands beside the weights: Modelfile, commands to type, and the model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strixft.data.ends import Ends
from strixft.export.result import check_table
from strixft.prepare.stage import Prepared
from strixft.recipe.load import dump_recipe
from strixft.run.folder import Result, Run
from strixft.support.files import write_text
from strixft.support.units import format_number

_PLACES = ("zsystem", "zquestion")
"""Words that the template is tried with; no template writes them itself."""


def _go_template(tokenizer: Any) -> str:
    """The chat template of one turn in Ollama's language, found by rendering it.

    What stands around the words of a system message and a question is copied as it is.
    """
    system, question = _PLACES
    asked = [{"role": "user", "content": question}]
    with_system = [{"role": "system", "content": system}, *asked]
    render = tokenizer.apply_chat_template
    try:
        text = render(with_system, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise what they like where they know no system message
        text = render(asked, tokenize=False, add_generation_prompt=True)
    text = text.removeprefix(tokenizer.bos_token or "") if _adds_bos(tokenizer) else text
    text = text.replace(system, "{{ .System }}").replace(question, "{{ .Prompt }}")
    return f"{text}{{{{ .Response }}}}"


def _adds_bos(tokenizer: Any) -> bool:
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _default_system(tokenizer: Any) -> str:
    """The system message that the template writes when nobody gives one; empty if none."""
    question = _PLACES[1]
    asked = [{"role": "user", "content": question}]
    plain = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    around = _go_template(tokenizer)
    before, place, after = around.partition("{{ .System }}")
    rest = after.partition("{{ .Prompt }}")[0]
    start = plain.find(before) + len(before)
    found = plain.find(rest, start) if place and before in plain else -1
    return plain[start:found] if found > start else ""


def modelfile(gguf: str, tokenizer: Any, ends: Ends) -> str:
    """Return Ollama's Modelfile for a GGUF file beside it."""
    system = _default_system(tokenizer)
    lines = [f"FROM ./{gguf}"]
    if tokenizer.chat_template:
        lines.append(f'TEMPLATE """{_go_template(tokenizer)}"""')
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in ends.texts]
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def write_generation_config(merged: Path, ends: Ends) -> None:
    """Write every end token into a merged model's settings, where `generate` and vLLM stop."""
    path = merged / "generation_config.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    ids = list(ends.token_ids)
    if ids:
        write_text(path, json.dumps({**found, "eos_token_id": ids}, indent=2) + "\n")


def lemonade_command(folder: Path) -> str:
    """Registers the GGUF files of a folder with a Lemonade server; not tried on one.

    Source: lemonade-sdk/lemonade, docs/guide/configuration/custom-models.md; `pull` knows
    checkpoints of hubs only.
    """
    return f"lemonade config set extra_models_dir={shlex.quote(str(folder))} && lemonade list"


def vllm_command(name: str, merged: Path) -> str:
    """Serves the merged folder."""
    return f"vllm serve {merged} --served-model-name {name}"


def _metrics(evaluated: Result | None) -> str:
    if evaluated is None:
        return "Not evaluated."
    rows = "".join(
        f"| {name} | {format_number(sides['base'])} | {format_number(sides['tuned'])} |\n"
        for name, sides in evaluated.figures["metrics"].items()
    )
    return f"| held-out rows | base | tuned |\n| --- | --- | --- |\n{rows}"


def _check(made: Mapping[str, Any]) -> str:
    rows, header = check_table(made)
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _parity(parity: Mapping[str, Any]) -> str:
    if not parity:
        return "Not compared with the trained model."
    rows = "".join(
        f"| {name} | {row['top1']:.3f} | {row['greedy']:.3f} | {_yes(row['passes'])} |\n"
        for name, row in parity.items()
    )
    return (
        "| file | same next token | same answer | answers like the trained model |\n"
        f"| --- | --- | --- | --- |\n{rows}"
    )


def _yes(passes: bool) -> str:
    return "yes" if passes else "**no**"


def model_card(
    run: Run,
    tokenizer: Any,
    licence: str | None,
    made: Mapping[str, Any],
    parity: Mapping[str, Any],
) -> str:
    """The README of an exported model: data, recipe, figures, licence of the base."""
    prepared = run.require(Prepared)
    evaluated = Result.load(run.stage_folder("evaluate"))
    recipe, data = run.recipe, prepared.figures
    return f"""---
base_model: {recipe.model}
license: {licence or "other"}
tags: [{recipe.method}, strixft]
---
# {run.name}

{recipe.method} on `{recipe.model}`. The base model's licence holds for this model too\
{"" if licence else "; its folder names none: look it up before you pass this on"}.

## Data

{data["rows_read"]} rows were read ({data["format"]}); {data["rows_left_out"]} were left out,
{data["rows_validation"]} held out. SHA-256 of the source: `{prepared.inputs["source_sha256"]}`.

An answer ends with {" or ".join(f"`{text}`" for text in prepared.ends(tokenizer).texts)}.

## Figures

{_metrics(evaluated)}
{_check(made)}{_parity(parity)}
## Recipe

```yaml
{dump_recipe(recipe)}```
"""
