"""Stage `prepare`: from the recipe's sources to token rows whose trained tokens are known."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pyarrow.compute as pc

from strixft.data.encode import Encoder
from strixft.data.ends import Ends, eos_of_files, find_ends
from strixft.data.load import HubSet, Input, open_inputs
from strixft.data.pack import PackedRows, Packing, origins
from strixft.data.row_report import RowReport, example, spread
from strixft.data.rows import RowWriter, TokenRows
from strixft.data.template import written_ends
from strixft.data.words import Words, WordsDifferError
from strixft.formats.sources import fingerprint, ignored_files
from strixft.model.load import load_config, load_tokenizer
from strixft.prepare import show
from strixft.prepare.augment import FILE, AugmentedRows, augment_rows
from strixft.prepare.build import Build
from strixft.prepare.select import Selection
from strixft.recipe.schema import Dataset, Recipe
from strixft.run.folder import Result, Run
from strixft.support.disk import cache_folder
from strixft.support.errors import DataError, RecipeError
from strixft.support.files import digest
from strixft.support.progress import progress_bar

ROWS_FILE = "rows.arrow"

ORDER_FILE = "order.npz"

PROBLEMS_FILE = "problems.jsonl"

TRAINED_AS = {"pairs": "chosen", "thumbs": "thumbs-up"}
"""Kind of preference data → the format that reads them as chats."""

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
            )
        order = self._order()
        return TokenRows.load(self.folder / ROWS_FILE, order["train"], order["validation"])

    def packed_rows(self, dataset: Dataset) -> PackedRows:
        """Open the training rows packed; `strixft.data.batches.collate` makes batches of them.

        Raises:
            DataError: They are preference data.
        """
        order = self._order()
        rows = self.token_rows(dataset).train
        packing = Packing(order["packed_rows"], order["packed_starts"], int(order["max_length"]))
        return PackedRows(rows, packing)

    def ends(self, tokenizer: Any) -> Ends:
        """Return the ends of the model's answers; find them again for a run of an older version.

        Args:
            tokenizer: The model's.
        """
        found = self.figures.get("answer_ends")
        if found is not None:
            return Ends.of(found)
        return find_ends(tokenizer, written_ends(tokenizer), eos_of_files(tokenizer, offline=True))

    def names_of(self, rows: Any, numbers: Iterable[int]) -> list[str]:
        """Name rows by file and number, as a person finds them.

        Args:
            rows: Token rows, packed or not.
            numbers: Indices of some of them.
        """
        files = [] if self.inputs["hub"] else self.inputs["files"]
        by_file: dict[int, list[str]] = {}
        for file, row in dict.fromkeys(one for number in numbers for one in origins(rows, number)):
            by_file.setdefault(file, []).append(str(row))
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
    return run.once(
        Prepared,
        lambda folder: prepare_data(run.recipe, folder, load_tokenizer(run.recipe), run),
    )


def prepare_data(
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    run: Run | None = None,
    words: Words | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load, check, format, mask, split and pack; write the rows to files in a folder.

    Args:
        recipe: Names the data and says how to prepare them.
        folder: Place of the files.
        tokenizer: The model's.
        run: Gets the progress.
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
    encoder = Encoder(tokenizer, loss_on, dataset.max_length, words, eos)
    build, selection, seconds = _build_rows(recipe, inputs, folder, encoder, run)
    augmented: dict[str, Any] = {}
    (folder / FILE).unlink(missing_ok=True)  # of a run that was killed
    if dataset.augment is not None and dataset.augment.enabled:
        more, augmented = augment_rows(recipe, inputs, selection, folder, cache_folder(), run)
        before, inputs = len(inputs), [*inputs, *more]
        if more:
            build, selection, seconds = _build_rows(recipe, inputs, folder, build.encoder, run)
        files = selection.columns["file"][selection.split.train]
        augmented["rows_trained"] = int(np.count_nonzero(files >= before))
    selection.save(folder / ORDER_FILE)
    figures = _figures(recipe, kind, build, selection, seconds)
    figures["notes"] = _notes(figures, build)
    figures |= {"augment": augmented} if augmented else {}
    rows = TokenRows.load(folder / ROWS_FILE, selection.split.train, selection.split.validation)
    shown = [rows.train[index] for index in spread(selection.lengths)]
    figures["examples"] = [example(row, tokenizer, inputs[row["file"]].name) for row in shown]
    return _inputs(recipe, inputs, folder, tokenizer), figures


def _build_rows(
    recipe: Recipe, inputs: Sequence[Input], folder: Path, encoder: Encoder, run: Run | None
) -> tuple[Build, Selection, float]:
    """Write the row file and select from it; with the seconds that the rows took."""
    try:
        with RowReport(folder / PROBLEMS_FILE, recipe.dataset) as report:
            with RowWriter(folder / ROWS_FILE) as writer:
                build = Build(recipe.dataset, inputs, encoder, report, writer)
                seconds = _run(build, run)
            report.check(writer.num_rows, inputs)
            selection = Selection(recipe, inputs, report, folder / ROWS_FILE, build.sketches)
            return build, selection, seconds
    except WordsDifferError:  # so ask the tokenizer for whole texts, from the start
        words, length = encoder.words.distrusted(), recipe.dataset.max_length
        encoder = Encoder(encoder.tokenizer, encoder.loss_on, length, words, encoder.eos)
        return _build_rows(recipe, inputs, folder, encoder, run)


def _run(build: Build, run: Run | None) -> float:
    """Run with a progress bar; return the seconds it took."""
    began = told = time.monotonic()
    process = psutil.Process()
    with progress_bar(unit=" rows", desc="prepare", mininterval=0.5) as bar:
        for count in build.run():
            now = time.monotonic()
            bar.total = build.rows_expected()
            bar.update(count - bar.n)
            if run is not None and now - told > 1:
                told, rate = now, round(build.counts["tokens"] / (now - began))
                resident = process.memory_info().rss
                bar.set_postfix(tok_per_s=rate, gib=f"{resident / 2**30:.2f}")
                run.report_progress(
                    done=count, total=bar.total, tok_per_s=rate, resident_bytes=resident
                )
        bar.total = build.report.rows_read
        bar.refresh()
    return time.monotonic() - began


def _figures(
    recipe: Recipe, kind: str, build: Build, selection: Selection, seconds: float
) -> dict[str, Any]:
    report, encoder, counts = build.report, build.encoder, build.counts
    written = [] if kind == "text" else written_ends(encoder.tokenizer)
    figures: dict[str, Any] = {
        "format": ", ".join(dict.fromkeys(one.form.name for one in build.inputs)),
        "kind": kind,
        "loss_on": encoder.loss_on,
        "rows_read": report.rows_read,
        "rows_bad": report.rows_bad,
        "rows_too_long": report.rows_too_long,
        "rows_left_out": report.rows_left_out,
        "keys_unused": dict(build.unused.most_common()),
        "tokens_read": counts["tokens"] + sum(report.long_lengths),
        **selection.figures(),
        "answer_ends": find_ends(encoder.tokenizer, written, encoder.eos).to_dict(),
        "mask_checked": {"rows": counts["mask_checked"], "equal": counts["mask_equal"]},
        "rows_per_s": round(report.rows_read / seconds, 1),
        "tok_per_s": round(counts["tokens"] / seconds, 1),
        "problems": report.kinds,
    }
    figures["packing"]["asked"] = recipe.dataset.packing
    return figures


def _notes(figures: dict[str, Any], build: Build) -> list[str]:
    """Tell the facts to know before training."""
    kind, checked, encoder = figures["kind"], figures["mask_checked"], build.encoder
    template = None if kind == "text" else encoder.masker.template
    notes: list[tuple[object, str]] = [
        (
            checked["equal"] < checked["rows"],
            f"In {checked['rows'] - checked['equal']} of {checked['rows']} rows that were checked,"
            " the trained tokens do not decode to the text that should be trained.",
        ),
        (
            template is not None and not template.end_token,
            "The chat template ends an answer with nothing; the tokenizer's end token"
            f" {encoder.tokenizer.eos_token!r} is put after the last answer of each chat.",
        ),
        (
            template is not None and build.counts["tools_as_text"],
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
            divided := build.counts["chats_divided"],
            f"{divided} chats became several rows each: the chat template leaves out the reasoning"
            " of answers, and each of them is trained whole, in its own row.",
        ),
    ]
    return [text for holds, text in notes if holds]


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
