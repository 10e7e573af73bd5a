"""Texts beside the weights: Modelfile, commands to type, and the model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strixft.data.ends import Ends
from strixft.export.result import check_table
from strixft.prepare.stage import Prepared
from strixft.recipe.load import dump_recipe
from strixft.run.folder import Result, Run
from strixft.support.files import write_text
from strixft.support.units import format_number

_SYSTEM, _QUESTION = "zsystem", "zquestion"
"""Placeholders that no chat template writes itself."""


def _go_template(tokenizer: Any) -> str:
    """Return the chat template of one turn in Ollama's language, found by rendering it.

    The text around a system message and a question is copied as it is.
    """
    asked = [{"role": "user", "content": _QUESTION}]
    with_system = [{"role": "system", "content": _SYSTEM}, *asked]
    render = tokenizer.apply_chat_template
    try:
        text = render(with_system, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise anything if they do not support system messages
        text = render(asked, tokenize=False, add_generation_prompt=True)
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:  # the server adds it, too
        text = text.removeprefix(tokenizer.bos_token or "")
    text = text.replace(_SYSTEM, "{{ .System }}").replace(_QUESTION, "{{ .Prompt }}")
    return f"{text}{{{{ .Response }}}}"


def _default_system(tokenizer: Any) -> str:
    """Return the system message that the template writes when none is given, if any."""
    asked = [{"role": "user", "content": _QUESTION}]
    plain = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    before, place, after = _go_template(tokenizer).partition("{{ .System }}")
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
    """Write every end token into a merged model's settings, so that `generate` and vLLM stop."""
    path = merged / "generation_config.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    ids = list(ends.token_ids)
    if ids:
        write_text(path, json.dumps({**found, "eos_token_id": ids}, indent=2) + "\n")


def lemonade_command(folder: Path) -> str:
    """Return the command that registers a folder of GGUF files with Lemonade; not tried on one.

    Source: lemonade-sdk/lemonade, docs/guide/configuration/custom-models.md; `pull` accepts
    hub checkpoints only.
    """
    return f"lemonade config set extra_models_dir={shlex.quote(str(folder))} && lemonade list"


def vllm_command(name: str, merged: Path) -> str:
    """Return the command that serves the merged folder."""
    return f"vllm serve {merged} --served-model-name {name}"


def _markdown(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(evaluated: Result | None, made: Mapping[str, Any], parity: Mapping[str, Any]) -> str:
    """Return the tables of evaluation, merged model and GGUF files."""
    metrics, compared = "Not evaluated.\n", "Not compared with the trained model.\n"
    if evaluated is not None:
        rows = [
            [name, format_number(values["base"]), format_number(values["tuned"])]
            for name, values in evaluated.figures["metrics"].items()
        ]
        metrics = _markdown(rows, ["held-out rows", "base", "tuned"])
    if parity:
        rows = [
            [
                name,
                f"{row['top1']:.3f}",
                f"{row['greedy']:.3f}",
                "yes" if row["passes"] else "**no**",
            ]
            for name, row in parity.items()
        ]
        header = ["file", "same next token", "same answer", "answers like the trained model"]
        compared = _markdown(rows, header)
    checked, header = check_table(made)
    merged = [_markdown(checked, header)] if checked else []
    return "\n".join([metrics, *merged, compared])


def model_card(
    run: Run,
    tokenizer: Any,
    licence: str | None,
    made: Mapping[str, Any],
    parity: Mapping[str, Any],
) -> str:
    """Return the README of an exported model: data, figures, recipe, licence of the base."""
    prepared = run.require(Prepared)
    evaluated = Result.load(run.stage_folder("evaluate"))
    recipe, data = run.recipe, prepared.figures
    return f"""---
base_model: {recipe.model}
license: {licence or "other"}
tags: [{recipe.method}, strixft]
---
# {run.name}

{recipe.method} on `{recipe.model}`. The licence of the base model applies to this model, too\
{"" if licence else "; its folder names none: look it up before you share this model"}.

## Data

{data["rows_read"]} rows were read ({data["format"]}); {data["rows_left_out"]} were left out and
{data["rows_validation"]} held out. SHA-256 of the source: `{prepared.inputs["source_sha256"]}`.

An answer ends with {" or ".join(f"`{text}`" for text in prepared.ends(tokenizer).texts)}.

## Figures

{_figures(evaluated, made, parity)}
## Recipe

```yaml
{dump_recipe(recipe)}```
"""
