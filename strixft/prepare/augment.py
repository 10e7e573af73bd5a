"""Training rows that a server writes from training rows. Held-out rows are never sent to it.

The rows go into a file of their own with where each comes from; the originals stay as they are.
Without `dataset.augment.enabled` the data are those of before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strixft.data.duplicates import Split
from strixft.data.load import Input, read_row
from strixft.formats.faults import RowFault
from strixft.formats.messages import Message
from strixft.formats.sources import SourceFile
from strixft.formats.table import FORMATS
from strixft.prepare.originals import Counts, Known, Original, read_originals, require_sendable
from strixft.prepare.tasks import TASKS, is_copied, loses_json, lost_numbers, prompt_for
from strixft.recipe.schema import Augment, Recipe
from strixft.run.folder import Run
from strixft.servers.client import Answer, Client, find_object, is_refusal
from strixft.servers.models import is_local
from strixft.support.errors import DataError, HostError, StrixftError
from strixft.support.files import write_text
from strixft.support.progress import progress_bar

FILE = "augmented.jsonl"

SECTION = "dataset.augment"

PROVENANCE = "provenance"

SEEDS = 1000
"""Seeds that a recipe's seed stands for: one for each row that is written of one row."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a written row comes from."""

    task: str
    source: str
    row: int
    server: str
    model: str
    prompt_sha256: str
    date: str


@dataclass(slots=True)
class Augmented:
    """What was written, and what was not."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_asked: int = 0

    def refuse(self, original: Original, fault: RowFault) -> None:
        """Count a row that is not used."""
        first = f"{Path(original.file).name}, row {original.row}: {fault.problem}"
        self.refused.setdefault(fault.kind, {"rows": 0, "first": first})["rows"] += 1


class _Writer:
    def __init__(self, recipe: Recipe, augment: Augment, client: Client, known: Known) -> None:
        self.augment, self.client, self.known = augment, client, known
        self.task, self.seed = TASKS[augment.task], recipe.train.seed
        self.leaves, self.found = not is_local(client.url), Augmented()

    def add(self, original: Original) -> None:
        """Ask for the new rows of a row."""
        try:
            messages = require_sendable(original, leaves=self.leaves)
        except RowFault as fault:
            self.found.refuse(original, fault)
            return
        for number in range(self.augment.per_row):
            self.found.num_asked += 1
            try:
                self.found.rows.append(self._row(original, messages, number))
            except RowFault as fault:
                self.found.refuse(original, fault)

    def _row(self, original: Original, messages: list[Message], number: int) -> dict[str, Any]:
        prompt = prompt_for(self.task, messages, self.augment.instruction)
        answer = self._answer(prompt, number)
        row = {
            "messages": self.task.make(messages, self._texts(answer, messages)),
            **original.group,
            PROVENANCE: asdict(
                Provenance(
                    task=self.task.name,
                    source=original.file,
                    row=original.row,
                    server=self.client.url,
                    model=self.client.model.name,
                    prompt_sha256=hashlib.sha256(json.dumps(prompt).encode()).hexdigest(),
                    date=answer.date,
                )
            ),
        }
        chat = read_row(_input(Path(original.file)), row)
        self.known.refuse(chat, is_new_question=self.task.is_new_question)
        return row

    def _answer(self, prompt: list[Message], number: int) -> Answer:
        seed = self.seed * SEEDS + number
        temperature = self.augment.temperature
        try:
            return self.client.answer(prompt, self.task.schema, temperature=temperature, seed=seed)
        except StrixftError as error:
            if not is_refusal(error):
                raise
            raise RowFault("server_refuses", error.problem) from error

    def _texts(self, answer: Answer, messages: list[Message]) -> dict[str, str]:
        found = find_object(answer.text, self.task.texts)
        if found is None:
            kind = "cut" if answer.is_cut else "no_json"
            raise RowFault(kind, f"the reply is not what was asked for: {answer.text[:100]!r}")
        if any(map(is_copied, found.values())):
            raise RowFault("copied", f"the reply copies the prompt: {answer.text[:100]!r}")
        if self.task.keeps_numbers:
            lost = lost_numbers(messages[-2]["content"], found["request"])
            if lost:
                raise RowFault("numbers", f"the new request lacks {', '.join(lost)}")
        if loses_json(messages[-1]["content"], found.get("answer", "{}")):
            raise RowFault("no_json_answer", "the new answer is no JSON, and the row's is")
        return {name: text.strip() for name, text in found.items()}


def _input(path: Path) -> Input:
    source = SourceFile(path, "jsonl")
    ignored = frozenset({PROVENANCE})
    return Input(source, FORMATS["messages"], {}, train_only=True, ignored=ignored)


def _all(originals: Sequence[Original], writer: _Writer, run: Run | None) -> Iterator[int]:
    for done, original in enumerate(originals):
        try:
            writer.add(original)
        except HostError as error:
            kept = f"{done} of {len(originals)} rows are done and kept"
            raise HostError(
                f"{error.problem}; {kept}", fix=f"{error.fix}; the same command goes on from there"
            ) from error
        if run is not None:
            run.report_progress(done=done + 1, total=len(originals))
        yield done


def augment_rows(
    recipe: Recipe,
    inputs: Sequence[Input],
    prepared: tuple[Counts, Split],
    folder: Path,
    cache: Path,
    run: Run | None = None,
) -> tuple[list[Input], dict[str, Any]]:
    """Have rows written of training rows, into a file of a folder.

    Args:
        recipe: With `dataset.augment`.
        inputs: Where the rows come from.
        prepared: Columns of numbers of the rows without these, and their split.
        folder: Of the stage.
        cache: Folder under which replies are kept, so that what was asked is not asked again.
        run: Told of the progress.

    Returns:
        The new rows as an input, none where no row is usable; and figures.

    Raises:
        DataError: The rows are no chats.
        HostError: The server does not answer.
    """
    augment = recipe.dataset.augment
    assert augment is not None
    other = [one for one in inputs if one.form.kind != "chat"]
    if other:
        raise DataError(
            f"{other[0].name} holds no chats ({other[0].form.name}), and only those are augmented",
            fix=f"--set {SECTION}.enabled=false   or without --augment",
        )
    client = Client(augment, SECTION, cache, offline=recipe.offline)
    originals, sketches = read_originals(recipe, inputs, *prepared)
    known = Known.of(*prepared)
    known.sketches = sketches
    writer = _Writer(recipe, augment, client, known)
    for _ in progress_bar(_all(originals, writer, run), total=len(originals), desc="augment"):
        pass
    found, path = writer.found, folder / FILE
    lines = (json.dumps(row, ensure_ascii=False) for row in found.rows)
    write_text(path, "".join(f"{line}\n" for line in lines))
    figures = {
        **client.to_dict(),
        "task": augment.task,
        "rows_sent": len(originals),
        "rows_asked": found.num_asked,
        "rows_kept": len(found.rows),
        "refused": found.refused,
        "warnings": client.warnings,
    }
    return [_input(path)] if found.rows else [], figures


def read_augmented(path: Path, most: int) -> list[dict[str, Any]]:
    """The first rows of the file that `augment_rows` writes."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(most), strict=False)]
