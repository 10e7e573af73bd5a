"""Stage `prepare`: from the recipe's sources to token rows whose trained tokens are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset as RowsOnDisk

from strixft.data.batches import PackedRows, Packing
from strixft.data.encode import Encoder, TokenRows
from strixft.data.end_tokens import Ends, eos_of_files, find_ends
from strixft.data.load import HubSet, Input, open_inputs
from strixft.data.row_report import RowReport, example, spread
from strixft.data.template import ChatTemplate
from strixft.data.word_cache import Words, WordsDifferError
from strixft.formats.sources import find_sources, fingerprint, ignored_files
from strixft.model.source import load_config, load_tokenizer
from strixft.prepare import show
from strixft.prepare.augment import FILE, AugmentedRows, augment_rows
from strixft.prepare.build import BatchMaker, build_rows
from strixft.prepare.select import KEEPING, Selection
from strixft.recipe.schema import Dataset, Recipe
from strixft.run.folder import Result, Run
from strixft.support.errors import DataError, RecipeError
from strixft.support.files import cache_folder, digest

ROWS_FILE = "rows.arrow"

ORDER_FILE = "order.npz"

PROBLEMS_FILE = "problems.jsonl"

TRAINED_AS = {"pairs": "chosen", "thumbs": "thumbs-up"}
"""Kind of preference data → the format that reads them as chats."""

ENOUGH_THINKING = 0.75
"""Fraction of rows with reasoning that lets a model go on reasoning, Unsloth's advice for Qwen 3.
Source: https://unsloth.ai/docs/models/qwen3-how-to-run-and-fine-tune"""

MOST_TOO_LONG = 0.05
"""Fraction of rows that may be left out for their length before a warning."""

LOSS_ON = {"text": "all", "pairs": "completion", "thumbs": "completion"}
"""Kind of data → `loss_on` that it always has; of a pair both answers are trained."""


@dataclass(frozen=True, kw_only=True)
class Prepared(Result):
    """Prepared data: rows read, rows left out and why, rows to train."""

    name: ClassVar[str] = "prepare"
    artefacts: ClassVar[tuple[str, ...]] = (ROWS_FILE, ORDER_FILE)

    def _order(self) -> dict[str, Any]:
        with np.load(self.folder / ORDER_FILE, allow_pickle=False) as order:
            return dict(order)

    def token_rows(self, dataset: Dataset) -> TokenRows:
        """Open the token rows on disk, each chat in a row of its own.

        Raises:
            DataError: They are preference data.
        """
        form = TRAINED_AS.get(self.figures["kind"])
        if form is not None:
            raise DataError(
                f"{', '.join(dataset.sources())} holds preferences ({self.figures['format']}),"
                " and this training learns from answers",
                fix=f"--set dataset.format={form} --run-dir …   trains the preferred answers",
                settings={"dataset.format": form},
            )
        rows, order = RowsOnDisk.from_file(str(self.folder / ROWS_FILE)), self._order()
        return TokenRows(rows.select(order["train"]), rows.select(order["validation"]))

    def packed_rows(self, dataset: Dataset) -> PackedRows:
        """Open the training rows packed; `strixft.data.batches.collate` makes batches of them.

        Raises:
            DataError: They are preference data.
        """
        order = self._order()
        packing = Packing(order["packed_rows"], order["packed_starts"], int(order["max_length"]))
        return PackedRows(self.token_rows(dataset).train, packing)

    def ends(self, tokenizer: Any) -> Ends:
        """Return the ends of the model's answers; find them again for a run of an older version."""
        if (found := self.figures.get("answer_ends")) is not None:
            return Ends(tuple(found["token_ids"]), tuple(found["texts"]))
        return find_ends(tokenizer, eos_of_files(tokenizer, offline=True))

    def names_of(self, rows: Any, numbers: Iterable[int]) -> list[str]:
        """Name rows by file and number, as a person finds them."""
        files = [] if self.inputs["hub"] else self.inputs["files"]
        by_file: dict[int, dict[str, None]] = {}
        for number in numbers:
            found = (
                rows.origins(number) if isinstance(rows, PackedRows) else rows[[number % len(rows)]]
            )
            for file, row in zip(found["file"], found["row"], strict=True):
                by_file.setdefault(file, {})[str(row)] = None
        return [
            f"{files[file]['path'] if files else f'source {file + 1}'}, row {', '.join(listed)}"
            for file, listed in by_file.items()
        ]

    @property
    def augmented(self) -> AugmentedRows | None:
        """Rows that a server wrote; None if the recipe asks for none."""
        return AugmentedRows(self.folder / FILE) if "augment" in self.figures else None

    def _repr_html_(self) -> str:
        return show.page(self.figures)


def prepare_recipe(run: Run) -> Prepared:
    """Load, check, format, mask and pack the recipe's data; write them to the run folder.

    Raises:
        DataError: The files, or more rows than allowed, are not what the format says.
    """
    return run.once(Prepared, lambda folder: _prepare(run.recipe, folder))


def _prepare(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    find_sources(recipe.dataset.sources())  # before the tokenizer, which may be a download
    return prepare_data(recipe, folder, load_tokenizer(recipe))


def prepare_data(
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    words: Words | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load, check, format, mask, split and pack; write the rows to files in a folder.

    Args:
        recipe: Names the data and says how to prepare them.
        folder: Place of the files.
        tokenizer: The model's.
        words: Words of the tokenizer that are known already.

    Returns:
        Inputs and figures of the stage.

    Raises:
        DataError: The files, or more rows than allowed, are not what the format says.
    """
    dataset = recipe.dataset
    inputs = open_inputs(dataset, offline=recipe.offline)
    kinds = {one.form.kind for one in inputs}
    kind = "chat" if len(kinds) > 1 else kinds.pop()
    eos = eos_of_files(tokenizer, offline=recipe.offline)
    loss_on = LOSS_ON.get(kind, dataset.loss_on)
    encoder = Encoder(
        tokenizer,
        loss_on,
        dataset.max_length,
        words,
        eos,
        keep_thinking=recipe.thinking == "keep",
        template_kwargs=dataset.chat_template_kwargs,
    )
    report, selection, seconds = _build_rows(recipe, inputs, folder, encoder)
    augmented: dict[str, Any] = {}
    (folder / FILE).unlink(missing_ok=True)  # of a run that was killed
    if dataset.augment is not None and dataset.augment.enabled:
        more, augmented = augment_rows(recipe, inputs, selection, folder, cache_folder())
        before, inputs = len(inputs), [*inputs, *more]
        if more:
            report, selection, seconds = _build_rows(recipe, inputs, folder, encoder)
        files = selection.columns["file"][selection.split.train]
        augmented["rows_trained"] = int(np.count_nonzero(files >= before))
    selection.save(folder / ORDER_FILE)
    counts, ends = report.counts, find_ends(tokenizer, eos, chats=kind != "text")
    figures: dict[str, Any] = {
        "format": ", ".join(dict.fromkeys(one.form.name for one in inputs)),
        "kind": kind,
        "loss_on": loss_on,
        **{
            f"rows_{name}": counts[f"rows_{name}"]
            for name in ("read", "bad", "too_long", "left_out")
        },
        "thinking": {
            "rows": counts["rows_thinking"],
            "of": counts["rows_chats"],
            "as": recipe.thinking,
        },
        "keys_unused": dict(report.unused.most_common()),
        "tokens_read": counts["tokens"] + sum(report.long_lengths),
        **selection.figures(),
        "answer_ends": {"token_ids": list(ends.token_ids), "texts": list(ends.texts)},
        "mask_checked": {"rows": counts["mask_checked"], "equal": counts["mask_equal"]},
        "rows_per_s": round(counts["rows_read"] / seconds, 1),
        "tok_per_s": round(counts["tokens"] / seconds, 1),
        "problems": report.kinds,
    }
    figures["notes"] = _notes(figures, report, encoder)
    figures |= {"augment": augmented} if augmented else {}
    rows = RowsOnDisk.from_file(str(folder / ROWS_FILE)).select(selection.split.train)
    shown = [rows[index] for index in spread(selection.lengths)]
    figures["examples"] = [example(row, tokenizer, inputs[row["file"]].name) for row in shown]
    return _inputs(recipe, inputs, folder, tokenizer), figures


def _build_rows(
    recipe: Recipe, inputs: Sequence[Input], folder: Path, encoder: Encoder
) -> tuple[RowReport, Selection, float]:
    """Write the row file and select from it; with the seconds that the rows took."""
    path = folder / ROWS_FILE
    try:
        with RowReport(folder / PROBLEMS_FILE, recipe.dataset) as report:
            maker = BatchMaker(recipe.dataset, inputs, encoder, recipe.thinking)
            seconds = build_rows(maker, report, path)
            report.check(inputs)
            return report, Selection(recipe, inputs, report, path), seconds
    except WordsDifferError:  # so ask the tokenizer for whole texts, from the start
        encoder.words.usable = False
        return _build_rows(recipe, inputs, folder, encoder)


def _notes(figures: dict[str, Any], report: RowReport, encoder: Encoder) -> list[str]:
    """Tell the facts to know before training."""
    kind, checked, counts = figures["kind"], figures["mask_checked"], report.counts
    template = None if kind == "text" else encoder.masker().template
    long = counts["rows_too_long"]
    notes: list[tuple[object, str]] = [
        (
            checked["equal"] < checked["rows"],
            f"In {checked['rows'] - checked['equal']} of {checked['rows']} rows that were checked,"
            " the trained tokens do not decode to the text that should be trained.",
        ),
        (
            long > MOST_TOO_LONG * counts["rows_read"],
            f"{long:,} of {counts['rows_read']:,} rows are longer than max_length"
            f" {report.dataset.max_length} and left out; {KEEPING:.0%} are kept by"
            f" --set dataset.max_length={figures['keeping_length']}",
        ),
        (
            template is not None and not template.end_token,
            "The chat template ends an answer with nothing; the tokenizer's end token"
            f" {encoder.tokenizer.eos_token!r} is put after the last answer of each chat.",
        ),
        (
            template is not None and counts["tools_as_text"],
            "The chat template has no place for tools: functions stand in the system message, and"
            " calls and results in the turns, as <tool_call> and <tool_response>.",
        ),
        (
            kind in TRAINED_AS,
            "These are preferences. To train the preferred answers:"
            f" --set dataset.format={TRAINED_AS.get(kind)}",
        ),
        (
            figures["leaks"],
            f"{figures['leaks']} of {figures['rows_validation']} held-out rows ask what a training"
            " row asks, so the evaluation is too good. To keep them together:"
            " --set dataset.group_by=question",
        ),
        (
            divided := counts["chats_divided"],
            f"{divided} chats became several rows each: the chat template leaves out the reasoning"
            " of answers, and each of them is trained whole, in its own row.",
        ),
        *_thinking_notes(figures["thinking"], encoder, template),
    ]
    return [text for holds, text in notes if holds]


def _thinking_notes(
    thinking: dict[str, Any], encoder: Encoder, template: ChatTemplate | None
) -> list[tuple[object, str]]:
    """Tell how many rows have reasoning, where the model reasons."""
    rows, of = thinking["rows"], thinking["of"]
    share, trains = f"{rows} of {of} rows have reasoning before an answer", thinking["as"] != "drop"
    is_off = encoder.template_kwargs.get("enable_thinking") is False
    return [
        (
            trains and is_off and rows,
            f"{share}, and enable_thinking is false. To leave it out: --set thinking=drop",
        ),
        (
            trains
            and not is_off
            and template is not None
            and template.shows_reasoning
            and rows < ENOUGH_THINKING * of,
            f"{share}, and the chat template is that of a model that reasons. So that it goes on"
            f" reasoning, Unsloth advises {ENOUGH_THINKING:.0%} or more for Qwen 3"
            " (unsloth.ai/docs, fine-tuning Qwen 3). --set thinking=keep   leaves the empty"
            " reasoning, which the template may write for the others, out of the loss",
        ),
    ]


def _inputs(
    recipe: Recipe, inputs: Sequence[Input], folder: Path, tokenizer: Any
) -> dict[str, Any]:
    sources = recipe.dataset.sources()
    source_sha256, files = fingerprint(sources)
    hub = [one.source for one in inputs if isinstance(one.source, HubSet)]
    if (written := folder / FILE).is_file():
        size = written.stat().st_size
        files.append({"path": str(written), "bytes": size, "sha256": digest(written)})
    return {
        "source": ", ".join(sources),
        "source_sha256": source_sha256,
        "files": files,
        "hub": [{"name": one.name, "fingerprint": one.fingerprint} for one in hub],
        "files_ignored": [name for source in sources for name in ignored_files(source)],
        "chat_template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "rows_sha256": digest(folder / ROWS_FILE),
    }


_RESIZE = (
    """python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; """
    """t = T.from_pretrained('{0}'); m = M.from_pretrained('{0}', dtype='auto'); """
    """m.resize_token_embeddings(len(t)); """
    """m.save_pretrained('resized'); t.save_pretrained('resized')", then model: resized"""
)


def require_known_tokens(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse data with tokens that were added to the tokenizer and not to the model.

    Raises:
        RecipeError: With a command that makes room for them.
    """
    rows = prepared.token_rows(recipe.dataset).train.data.column("input_ids")
    largest = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in rows.chunks), default=0)
    known = load_config(recipe).get_text_config().vocab_size
    if largest >= known:
        token = load_tokenizer(recipe).convert_ids_to_tokens(largest)
        raise RecipeError(
            f"the data have the token {token!r}, number {largest}, and {recipe.model} has"
            f" embeddings for {known}: the token was added to the tokenizer alone",
            fix=_RESIZE.format(recipe.model),
        )
