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
from strixft.prepare.augment import FILE, augment_rows
from strixft.prepare.build import Work
from strixft.prepare.select import Chosen, choose, figures_of
from strixft.prepare.show import AugmentedRows
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


@dataclass(frozen=True, kw_only=True)
class Prepared(Result):
    """What was read, what is left out and why, and what is trained."""

    name: ClassVar[str] = "prepare"
    artefacts: ClassVar[tuple[str, ...]] = (ROWS_FILE, ORDER_FILE)

    def _order(self) -> dict[str, Any]:
        with np.load(self.folder / ORDER_FILE, allow_pickle=False) as order:
            return dict(order)

    def _require_chats(self, dataset: Dataset) -> None:
        form = TRAINED_AS.get(self.figures["kind"])
        if form is not None:
            raise DataError(
                f"{', '.join(dataset.sources())} holds preferences ({self.figures['format']}),"
                " and this training learns from answers",
                fix=f"--set dataset.format={form} --run-dir …   trains the preferred answers",
            )

    def token_rows(self, dataset: Dataset) -> TokenRows:
        """The token rows on disk, each chat in a row of its own.

        Raises:
            DataError: They are preference data.
        """
        self._require_chats(dataset)
        order = self._order()
        return TokenRows.load(self.folder / ROWS_FILE, order["train"], order["validation"])

    def packed_rows(self, dataset: Dataset) -> PackedRows:
        """The training rows packed; `strixft.data.collate` makes batches of them.

        Raises:
            DataError: They are preference data.
        """
        order = self._order()
        rows = self.token_rows(dataset).train
        packing = Packing(order["packed_rows"], order["packed_starts"], int(order["max_length"]))
        return PackedRows(rows, packing)

    def ends(self, tokenizer: Any) -> Ends:
        """Return where the model's answers end; found anew for a run of an older version.

        Args:
            tokenizer: The model's.
        """
        found = self.figures.get("answer_ends")
        if found is not None:
            return Ends.of(found)
        return find_ends(tokenizer, written_ends(tokenizer), eos_of_files(tokenizer, offline=True))

    def names_of(self, rows: Any, numbers: Iterable[int]) -> list[str]:
        """Rows by file and number, as a person finds them.

        Args:
            rows: Token rows, packed or not.
            numbers: Which of them.
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
        """Rows that a server wrote; None where the recipe asks for none."""
        return AugmentedRows(self.folder / FILE) if "augment" in self.figures else None

    def _repr_html_(self) -> str:
        return show.page(self.figures)


def _kind(inputs: Sequence[Input]) -> str:
    kinds = {one.form.kind for one in inputs}
    return "chat" if len(kinds) > 1 else kinds.pop()


def _loss_on(dataset: Dataset, kind: str) -> str:
    """Plain text is trained whole; of a pair the two answers are."""
    fixed = {"text": "all", "pairs": "completion", "thumbs": "completion"}
    return fixed.get(kind, dataset.loss_on)


def _formats(inputs: Sequence[Input]) -> str:
    return ", ".join(dict.fromkeys(one.form.name for one in inputs))


def _encoding_figures(encoder: Encoder, kind: str, work: Work) -> dict[str, Any]:
    written = [] if kind == "text" else written_ends(encoder.tokenizer)
    return {
        "answer_ends": find_ends(encoder.tokenizer, written, encoder.eos).to_dict(),
        "mask_checked": dict(zip(("rows", "equal"), work.total.checked, strict=True)),
    }


def _notes(figures: dict[str, Any], encoder: Encoder, work: Work) -> list[str]:
    notes = []
    kind, checked = figures["kind"], figures["mask_checked"]
    template = None if kind == "text" else encoder.masker.template
    if checked["equal"] < checked["rows"]:
        notes.append(
            f"In {checked['rows'] - checked['equal']} of {checked['rows']} rows that were checked,"
            " the trained tokens do not decode to the text that should be trained."
        )
    if template is not None and not template.end_token:
        notes.append(
            "The chat template ends an answer with nothing; the tokenizer's end token"
            f" {encoder.tokenizer.eos_token!r} is put after the last answer of each chat."
        )
    if template is not None and work.total.tools_as_text:
        notes.append(
            "The chat template has no place for tools: functions stand in the system message, and"
            " calls and results in the turns, as <tool_call> and <tool_response>."
        )
    if kind in TRAINED_AS:
        notes.append(
            f"These are preferences. To train the preferred answers: --set dataset.format="
            f"{TRAINED_AS[kind]}"
        )
    if figures["leaks"]:
        notes.append(
            f"{figures['leaks']} of {figures['rows_validation']} held-out rows ask what a training"
            " row asks, so the evaluation is too good. To keep them together:"
            " --set dataset.group_by=question"
        )
    if work.total.chats_divided:
        notes.append(
            f"{work.total.chats_divided} chats became several rows each: the chat template leaves"
            " out the reasoning of answers, and each of them is trained whole, in its own row."
        )
    return notes


def _examples(
    path: Path, chosen: Chosen, inputs: Sequence[Input], tokenizer: Any
) -> list[dict[str, Any]]:
    rows = TokenRows.load(path, chosen.split.train, chosen.split.validation).train
    shown = [rows[index] for index in spread(chosen.lengths)]
    return [example(row, tokenizer, inputs[row["file"]].name) for row in shown]


def _inputs(
    recipe: Recipe, inputs: Sequence[Input], folder: Path, tokenizer: Any
) -> dict[str, Any]:
    sources = recipe.dataset.sources()
    source_sha256, files = fingerprint(sources)
    hub = [one.source for one in inputs if isinstance(one.source, HubSet)]
    ignored = [name for source in sources for name in ignored_files(source)]
    if (written := folder / FILE).is_file():
        size = written.stat().st_size
        files.append({"path": str(written), "bytes": size, "sha256": digest(written)})
    return {
        "source": ", ".join(sources),
        "source_sha256": source_sha256,
        "files": files,
        "hub": [{"name": one.name, "fingerprint": one.fingerprint} for one in hub],
        "files_ignored": ignored,
        "chat_template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "rows_sha256": digest(folder / ROWS_FILE),
    }


def _stream(run: Run | None, work: Work) -> float:
    """Run the work with a progress bar; returns the seconds it took."""
    began = told = time.monotonic()
    process = psutil.Process()
    with progress_bar(unit=" rows", desc="prepare", mininterval=0.5) as bar:
        for count in work.run():
            now = time.monotonic()
            bar.total = work.rows_expected()
            bar.update(count - bar.n)
            if run is not None and now - told > 1:
                told, rate = now, round(work.total.num_tokens / (now - began))
                resident = process.memory_info().rss
                bar.set_postfix(tok_per_s=rate, gib=f"{resident / 2**30:.2f}")
                run.report_progress(
                    done=count, total=bar.total, tok_per_s=rate, resident_bytes=resident
                )
        bar.total = work.account.rows_read
        bar.refresh()
    return time.monotonic() - began


def _write_once(
    recipe: Recipe, inputs: Sequence[Input], folder: Path, encoder: Encoder, run: Run | None
) -> tuple[Work, Chosen, float]:
    """One pass over the rows: what was done, what is used of it, and the seconds it took."""
    rows_path = folder / ROWS_FILE
    with RowReport(folder / PROBLEMS_FILE, recipe.dataset) as account:
        with RowWriter(rows_path) as writer:
            work = Work(recipe.dataset, inputs, encoder, account, writer)
            seconds = _stream(run, work)
        account.check(writer.num_rows, inputs)
        return work, choose(recipe, inputs, account, rows_path, work.sketches), seconds


def _write(
    recipe: Recipe, inputs: Sequence[Input], folder: Path, encoder: Encoder, run: Run | None
) -> tuple[Work, Chosen, float]:
    try:
        return _write_once(recipe, inputs, folder, encoder, run)
    except WordsDifferError:  # so ask the tokenizer for whole texts, from the start
        words = encoder.words.distrusted()
        length = recipe.dataset.max_length
        encoder = Encoder(encoder.tokenizer, encoder.loss_on, length, words, encoder.eos)
        return _write_once(recipe, inputs, folder, encoder, run)


def _figures(
    recipe: Recipe, inputs: Sequence[Input], work: Work, chosen: Chosen, seconds: float
) -> dict[str, Any]:
    account, encoder, kind = work.account, work.encoder, _kind(inputs)
    figures: dict[str, Any] = {
        "format": _formats(inputs),
        "kind": kind,
        "loss_on": encoder.loss_on,
        "rows_read": account.rows_read,
        "rows_bad": account.rows_bad,
        "rows_too_long": account.rows_too_long,
        "rows_left_out": account.rows_left_out,
        "keys_unused": dict(work.total.unused.most_common()),
        "tokens_read": work.total.num_tokens + sum(account.long_lengths),
        **figures_of(chosen, recipe.dataset.max_length, account),
        **_encoding_figures(encoder, kind, work),
        "rows_per_s": round(account.rows_read / seconds, 1),
        "tok_per_s": round(work.total.num_tokens / seconds, 1),
        "problems": account.kinds,
    }
    figures["packing"]["asked"] = recipe.dataset.packing
    return {**figures, "notes": _notes(figures, encoder, work)}


def prepare_data(
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    run: Run | None = None,
    words: Words | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load, check, format, mask, split and pack; the rows go to files in a folder.

    Args:
        recipe: Whose data to prepare.
        folder: Where the files go.
        tokenizer: The model's.
        run: Told of the progress.
        words: Words of the tokenizer that are known already.

    Returns:
        Inputs and figures of the stage.

    Raises:
        DataError: The files, or more rows than allowed, are not what the format says.
    """
    dataset = recipe.dataset
    inputs = open_inputs(dataset, offline=recipe.offline)
    loss_on = _loss_on(dataset, _kind(inputs))
    eos = eos_of_files(tokenizer, offline=recipe.offline)
    encoder = Encoder(tokenizer, loss_on, dataset.max_length, words, eos)
    work, chosen, seconds = _write(recipe, inputs, folder, encoder, run)
    written: dict[str, Any] = {}
    (folder / FILE).unlink(missing_ok=True)  # of a run that was killed
    if dataset.augment is not None and dataset.augment.enabled:
        prepared = (chosen.counts, chosen.split)
        more, written = augment_rows(recipe, inputs, prepared, folder, cache_folder(), run)
        before, inputs = len(inputs), [*inputs, *more]
        if more:
            work, chosen, seconds = _write(recipe, inputs, folder, work.encoder, run)
        files = chosen.counts["file"][chosen.split.train]
        written["rows_trained"] = int(np.count_nonzero(files >= before))
    chosen.save(folder / ORDER_FILE)
    figures = _figures(recipe, inputs, work, chosen, seconds)
    figures |= {"augment": written} if written else {}
    figures["examples"] = _examples(folder / ROWS_FILE, chosen, inputs, tokenizer)
    return _inputs(recipe, inputs, folder, tokenizer), figures


def prepare_recipe(run: Run) -> Prepared:
    """Load, check, format, mask and pack the recipe's data; written to the run folder.

    Raises:
        DataError: The files, or more rows than allowed, are not what the format says.
    """
    return run.once(
        Prepared,
        lambda folder: prepare_data(run.recipe, folder, load_tokenizer(run.recipe), run),
    )


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
