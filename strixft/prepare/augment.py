"""Training rows that a server writes from training rows. Held-out rows are never sent to it.

The rows go into a file of their own with the row that each comes from; the originals stay as they
are. Without `dataset.augment.enabled` the data are the same as without the section.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data import checks
from strixft.data.checks import texts_of
from strixft.data.duplicates import SIMILAR, content_hash, question_hash, similarity, sketch
from strixft.data.load import Input, read_row, value_at
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message
from strixft.formats.sources import SourceFile
from strixft.formats.table import FORMATS
from strixft.prepare.build import QUESTION
from strixft.prepare.select import Selection
from strixft.prepare.tasks import (
    TASKS,
    is_copied,
    last_exchange,
    loses_json,
    lost_numbers,
    prompt_for,
)
from strixft.recipe.schema import Augment, Recipe
from strixft.run.folder import Run
from strixft.servers.client import Client, find_object, is_refusal
from strixft.servers.models import is_local
from strixft.support import html
from strixft.support.errors import DataError, HostError, StrixftError
from strixft.support.files import write_text
from strixft.support.progress import progress_bar

FILE = "augmented.jsonl"

SECTION = "dataset.augment"

PROVENANCE = "provenance"
"""Key of a written row: task, source and row, server and model, digest of the prompt, date."""

SEEDS = 1000
"""Seeds that a recipe's seed stands for: one for each row that is written of one row."""

SHOWN_ROWS = 10


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A training row from which rows are written."""

    file: str
    row: int
    chat: Chat
    group: Mapping[str, Any]
    """The column that decides its part of the split, which its new rows share."""


def augment_rows(
    recipe: Recipe,
    inputs: Sequence[Input],
    selection: Selection,
    folder: Path,
    cache: Path,
    run: Run | None = None,
) -> tuple[list[Input], dict[str, Any]]:
    """Let a server write new rows from training rows, into a file of a folder.

    Args:
        recipe: With `dataset.augment`.
        inputs: Sources of the rows.
        selection: The rows without these, and their split.
        folder: Of the stage.
        cache: Folder under which answers are kept, so that no request is sent twice.
        run: Gets the progress.

    Returns:
        The new rows as an input, or no input if no row is usable; and figures.

    Raises:
        DataError: The rows are not chats.
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
    source_rows, sketches = _read_source_rows(recipe, augment, inputs, selection)
    writer = _RowWriter(augment, recipe.train.seed, client, selection, sketches)
    for done, one in enumerate(progress_bar(source_rows, desc="augment")):
        try:
            writer.add(one)
        except HostError as error:
            kept = f"{done} of {len(source_rows)} rows are done and kept"
            raise HostError(
                f"{error.problem}; {kept}", fix=f"{error.fix}; the same command goes on from there"
            ) from error
        if run is not None:
            run.report_progress(done=done + 1, total=len(source_rows))
    lines = (json.dumps(row, ensure_ascii=False) for row in writer.rows)
    write_text(folder / FILE, "".join(f"{line}\n" for line in lines))
    figures = {
        **client.to_dict(),
        "task": augment.task,
        "rows_sent": len(source_rows),
        "rows_asked": writer.num_asked,
        "rows_kept": len(writer.rows),
        "refused": writer.refused,
        "warnings": client.warnings,
    }
    return [_input(folder / FILE)] if writer.rows else [], figures


def _input(path: Path) -> Input:
    source = SourceFile(path, "jsonl")
    ignored = frozenset({PROVENANCE})
    return Input(source, FORMATS["messages"], {}, train_only=True, ignored=ignored)


def _read_source_rows(
    recipe: Recipe, augment: Augment, inputs: Sequence[Input], selection: Selection
) -> tuple[list[SourceRow], bytes]:
    """Read at most `max_rows` training rows, drawn by the seed, and sketch the held-out ones."""

    def places(rows: npt.NDArray[np.int64]) -> set[tuple[int, int]]:
        """Return index of the input, and number of the row there."""
        file, row = (selection.columns[name][rows].tolist() for name in ("file", "row"))
        return set(zip(file, row, strict=True))

    held_out = places(selection.split.validation)
    chosen = sorted(places(selection.split.train) - held_out)
    if len(chosen) > augment.max_rows:
        generator = np.random.default_rng(recipe.train.seed)
        picked = generator.choice(len(chosen), augment.max_rows, replace=False)
        chosen = [chosen[index] for index in picked]
    wanted = held_out.union(chosen)
    column, masks = recipe.dataset.group_by, recipe.dataset.personal_data == "mask"
    source_rows, sketches = [], bytearray()
    for file, one in enumerate(inputs):
        for number, raw, _ in one.raw_rows():
            if (file, number) not in wanted:
                continue
            assert not isinstance(raw, RowFault)  # it became a token row
            chat = read_row(one, raw)
            chat = checks.mask_chat(chat) if masks else chat
            if (file, number) in held_out:
                sketches += sketch(" ".join(texts_of(chat)))
                continue
            group = {column: value_at(raw, column)} if column not in (None, QUESTION) else {}
            source_rows.append(SourceRow(one.name, number, chat, group))
    return source_rows, bytes(sketches)


def require_sendable(chat: Chat, *, leaves: bool) -> list[Message]:
    """Return the messages of a row that may be sent.

    Args:
        chat: The row.
        leaves: The server is another machine.

    Raises:
        RowFault: Its shape is not for this, or it must not leave the machine.
    """
    messages = last_exchange(chat)
    if messages is None:
        raise RowFault("no_exchange", "uses tools, or does not end with a request and an answer")
    if leaves and any(checks.find(message["content"]) for message in messages):
        raise RowFault("personal", "has personal data, and the server is another machine")
    return messages


class _RowWriter:
    """Writer of new rows; it refuses rows that are not usable or that the data have already."""

    def __init__(
        self, augment: Augment, seed: int, client: Client, selection: Selection, sketches: bytes
    ) -> None:
        self.augment, self.seed, self.client = augment, seed, client
        self.task, self.leaves = TASKS[augment.task], not is_local(client.url)
        columns, held_out = selection.columns, selection.split.validation
        self._contents = set(columns["content"].tolist())
        self._questions = set(columns["question"].tolist())
        self._held_out_questions = set(columns["question"][held_out].tolist())
        self._held_out_sketches = sketches
        self.rows: list[dict[str, Any]] = []
        self.refused: dict[str, dict[str, Any]] = {}
        self.num_asked = 0

    def add(self, of: SourceRow) -> None:
        """Ask for the new rows of a row."""
        try:
            messages = require_sendable(of.chat, leaves=self.leaves)
        except RowFault as fault:
            self._refuse(of, fault)
            return
        for number in range(self.augment.per_row):
            self.num_asked += 1
            try:
                self.rows.append(self._row(of, messages, number))
            except RowFault as fault:
                self._refuse(of, fault)

    def _refuse(self, of: SourceRow, fault: RowFault) -> None:
        first = f"{Path(of.file).name}, row {of.row}: {fault.problem}"
        self.refused.setdefault(fault.kind, {"rows": 0, "first": first})["rows"] += 1

    def _row(self, of: SourceRow, messages: list[Message], number: int) -> dict[str, Any]:
        prompt = prompt_for(self.task, messages, self.augment.instruction)
        try:
            answer = self.client.answer(
                prompt,
                self.task.schema,
                temperature=self.augment.temperature,
                seed=self.seed * SEEDS + number,
            )
        except StrixftError as error:
            if not is_refusal(error):
                raise
            raise RowFault("server_refuses", error.problem) from error
        row = {
            "messages": self.task.make(messages, self._texts(answer.text, answer.is_cut, messages)),
            **of.group,
            PROVENANCE: {
                "task": self.task.name,
                "source": of.file,
                "row": of.row,
                "server": self.client.url,
                "model": self.client.model.name,
                "prompt_sha256": hashlib.sha256(json.dumps(prompt).encode()).hexdigest(),
                "date": answer.date,
            },
        }
        self._require_new(read_row(_input(Path(of.file)), row))
        return row

    def _texts(self, text: str, is_cut: bool, messages: list[Message]) -> dict[str, str]:
        found = find_object(text, self.task.texts)
        if found is None:
            kind = "cut" if is_cut else "no_json"
            raise RowFault(kind, f"the reply is not what was asked for: {text[:100]!r}")
        if any(map(is_copied, found.values())):
            raise RowFault("copied", f"the reply copies the prompt: {text[:100]!r}")
        if self.task.keeps_numbers:
            lost = lost_numbers(messages[-2]["content"], found["request"])
            if lost:
                raise RowFault("numbers", f"the new request lacks {', '.join(lost)}")
        if loses_json(messages[-1]["content"], found.get("answer", "{}")):
            raise RowFault("no_json_answer", "the new answer is not JSON, and the row's is")
        return {name: text.strip() for name, text in found.items()}

    def _require_new(self, chat: Chat) -> None:
        content, question = content_hash(chat), question_hash(chat)
        if question in self._held_out_questions:
            raise RowFault("held_out", "asks what a held-out row asks")
        known = self.task.is_new_question and question in self._questions
        if known or content in self._contents:
            raise RowFault("duplicate", "says or asks what another row does")
        if similarity(sketch(" ".join(texts_of(chat))), self._held_out_sketches) >= SIMILAR:
            raise RowFault("near_held_out", "says nearly what a held-out row says")
        self._contents.add(content)
        self._questions.add(question)


@dataclass(frozen=True)
class AugmentedRows:
    """The first written rows with their source, for a notebook.

    Args:
        path: The file that `augment_rows` writes.
    """

    path: Path

    def rows(self) -> list[list[object]]:
        """Return source, request and answer of each row."""
        with self.path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(SHOWN_ROWS), strict=False)]
        return [
            [
                f"{Path(row[PROVENANCE]['source']).name}, row {row[PROVENANCE]['row']}",
                *(message["content"] for message in row["messages"][-2:]),
            ]
            for row in rows
        ]

    def _repr_html_(self) -> str:
        return html.table(self.rows(), ["made of", "request", "answer"])
