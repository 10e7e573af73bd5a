"""Texts beside the weights: Ollama's Modelfile, generation settings, and the model card."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strixft.data.end_tokens import Ends
from strixft.export.result import CellTable, check_table, parity_table
from strixft.prepare.stage import Prepared
from strixft.recipe.load import dump_recipe
from strixft.run.folder import Result, Run
from strixft.support.files import write_text
from strixft.support.units import format_number

_SYSTEM, _QUESTION = "zsystem", "zquestion"
"""Placeholders that no chat template writes itself."""


def _go_template(tokenizer: Any) -> tuple[str, str]:
    """Return the chat template of one turn in Ollama's language, found by rendering it.

    The text around a system message and a question is copied as it is.

    Returns:
        The template, and the system message that is written when none is given, if any.
    """
    asked = [{"role": "user", "content": _QUESTION}]
    with_system = [{"role": "system", "content": _SYSTEM}, *asked]
    render = tokenizer.apply_chat_template
    plain = text = render(asked, tokenize=False, add_generation_prompt=True)
    with contextlib.suppress(Exception):  # templates raise anything that refuse system messages
        text = render(with_system, tokenize=False, add_generation_prompt=True)
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:  # the server adds it, too
        text = text.removeprefix(tokenizer.bos_token or "")
    before, place, after = text.partition(_SYSTEM)
    rest = after.partition(_QUESTION)[0]
    start = plain.find(before) + len(before)
    found = plain.find(rest, start) if place and before in plain else -1
    text = text.replace(_SYSTEM, "{{ .System }}").replace(_QUESTION, "{{ .Prompt }}")
    return f"{text}{{{{ .Response }}}}", plain[start:found] if found > start else ""


def modelfile(gguf: str, tokenizer: Any, ends: Ends) -> str:
    """Return Ollama's Modelfile for a GGUF file beside it."""
    lines = [f"FROM ./{gguf}"]
    if tokenizer.chat_template:
        template, system = _go_template(tokenizer)
        lines.append(f'TEMPLATE """{template}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in ends.texts]
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def write_generation_config(merged: Path, ends: Ends) -> None:
    """Write every end token into a merged model's settings, so that `generate` and vLLM stop."""
    path = merged / "generation_config.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if ends.token_ids:
        found["eos_token_id"] = list(ends.token_ids)
        write_text(path, json.dumps(found, indent=2) + "\n")


def _markdown(table: CellTable) -> str:
    rows, header = table
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *rows])


def model_card(
    run: Run,
    base_folder: Path,
    tokenizer: Any,
    made: Mapping[str, Any],
    parity: Mapping[str, Any],
) -> str:
    """Return the README of an exported model: data, figures, recipe, licence of the base.

    Args:
        run: The trained run.
        base_folder: Folder of the base, whose README names the licence.
        tokenizer: The model's.
        made: Figures of the exports, by kind.
        parity: Figures of the comparison of GGUF files, by file.
    """
    prepared, evaluated = run.require(Prepared), Result.load(run.stage_folder("evaluate"))
    recipe, data, readme = run.recipe, prepared.figures, base_folder / "README.md"
    licence = re.search(r"^license: *(\S+)", readme.read_text(), re.M) if readme.is_file() else None
    metrics = "Not evaluated.\n"
    if evaluated is not None:
        rows = [
            [name, format_number(values["base"]), format_number(values["tuned"])]
            for name, values in evaluated.figures["metrics"].items()
        ]
        metrics = _markdown((rows, ["held-out rows", "base", "tuned"]))
    checked = check_table(made)
    merged = [_markdown(checked)] if checked[0] else []
    not_compared = "Not compared with the trained model.\n"
    compared = _markdown(parity_table(parity)) if parity else not_compared
    figures = "\n".join([metrics, *merged, compared])
    return f"""---
base_model: {recipe.model}
license: {licence[1] if licence else "other"}
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

{figures}
## Recipe

```yaml
{dump_recipe(recipe)}```
"""
