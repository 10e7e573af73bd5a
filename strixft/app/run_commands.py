"""Commands on runs: list, compare, watch, talk, stop, resume, rename, note, delete, report."""

from __future__ import annotations

import contextlib
import io
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strixft.app.options import AsJson, Debug, RunArgument
from strixft.app.printing import print_json, print_note, print_table, print_tables
from strixft.support.text import typed

if TYPE_CHECKING:
    from strixft.run.folder import Run


def runs(
    names: Annotated[list[str] | None, typer.Argument(help="Two or more runs to compare.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the comparison as HTML.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the runs, or compare those that are named."""
    from strixft.run.manage import RUN_HEADER, list_runs, run_row
    from strixft.run.open import find_run

    if names:
        _compare([find_run(name) for name in names], page, as_json)
        return
    found = list_runs()
    if as_json:
        print_json(found)
        return
    print_table(map(run_row, found), RUN_HEADER, least=("run", "state", "done", "updated"))


def _compare(found: list[Run], page: Path | None, as_json: bool) -> None:
    from strixft.app.compare import Comparison
    from strixft.support import html

    compared, names = Comparison(found), [run.name for run in found]
    if page is not None:
        text = html.page(" against ".join(names), "", compared._repr_html_())
        print_note(f"page: {html.write_page(page, text)}")
    if as_json:
        print_json(compared.to_dict())
        return
    tables = {"setting": compared.differences(), "figure": compared.results()}
    print_tables((rows, [header, *names]) for header, rows in tables.items())


def watch(run: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show a run until it ends. Ctrl-C leaves it running."""
    from strixft.app import watch as watching
    from strixft.run.open import find_run

    found = find_run(run)
    if as_json:
        print_json(found.observer().look().to_dict())
        return
    with contextlib.suppress(KeyboardInterrupt):
        watching.show_in_terminal(found)


def chat(
    run: RunArgument,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Let base and tuned answer.")] = False,
    debug: Debug = False,
) -> None:
    """Talk to the trained model. /help shows the commands, Ctrl-D ends."""
    from strixft.run.open import find_run

    found = find_run(run)
    from strixft.app.chat import Chat
    from strixft.app.chat_terminal import converse

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid bytes do not end a conversation
    variants = ("base", "tuned") if both else ("base",) if base else ("tuned",)
    converse(Chat(found), found.name, variants, partial(print, end="", flush=True))


def stop(run: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Stop a run cleanly. Its last finished update is saved; `strixft resume` continues it."""
    _end(run, "stopped", as_json)


def pause(run: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Stop a run as `strixft stop` does, and list it as paused."""
    _end(run, "paused", as_json)


def _end(name: str, state: str, as_json: bool) -> None:
    from strixft.run.open import find_run, stop_run

    found = find_run(name)
    status = stop_run(
        found,
        lambda pid: print_note(f"process {pid} is ending; training ends after its batch"),
        state=state,
    )
    _print_result(found.folder, f"{found.name}: {status['state']}", as_json, **status)


def _print_result(folder: Path, told: str, as_json: bool, **more: Any) -> None:
    """Print what became of a run."""
    print_json({"run": folder.name, "folder": str(folder), **more}) if as_json else print(told)


def rename(
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="New name of its folder.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Rename the folder of a run that no process works on."""
    from strixft.run.manage import rename_run
    from strixft.run.open import find_run

    found = find_run(run)
    target = rename_run(found, name)
    _print_result(target, f"{found.name} is now {target.name}", as_json, before=found.name)


def note(
    run: RunArgument,
    text: Annotated[str | None, typer.Argument(help="The note; '' removes it.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a note on a run, or show it."""
    from strixft.run.manage import note_run, read_note
    from strixft.run.open import find_run

    found = find_run(run)
    if text is not None:
        note_run(found, text)
    kept = read_note(found.folder)
    _print_result(found.folder, kept or "no note", as_json, note=kept)


def delete(run: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Move a run that no process works on into the bin; `strixft restore` brings it back."""
    from strixft.run.manage import delete_run, run_bytes
    from strixft.run.open import find_folder
    from strixft.support.units import format_size

    folder = find_folder(run)
    size = run_bytes(folder)
    target = delete_run(folder)
    told = (
        f"{folder.name} ({size:,} bytes, {format_size(size)}) is in the bin\n"
        f"back: strixft restore {typed(target.name)}\n"
        f"free its space for good: rm -r {typed(target)}"
    )
    _print_result(folder, told, as_json, bytes=size, bin=str(target))


def restore(
    name: Annotated[str | None, typer.Argument(help="Run in the bin; none: list them.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring a run back from the bin, or list what is there."""
    from strixft.run.manage import binned, restore_run, run_bytes

    if name is not None:
        target = restore_run(name)
        _print_result(target, f"{target.name} is back", as_json)
        return
    found = {path.name: run_bytes(path) for path in binned()}
    rows = [[name, f"{size:,}"] for name, size in found.items()]
    print_json(found) if as_json else print_table(rows, ["in the bin", "bytes"])


def report(run: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Write one HTML page from a run folder."""
    from strixft.app.report import write_report
    from strixft.run.open import find_run

    path = write_report(find_run(run))
    print_json({"report": str(path)}) if as_json else print(path)


RUN_COMMANDS = (
    *(runs, watch, chat, stop, pause),
    *(rename, note, delete, restore, report),
)
"""Functions that become commands of their names."""
