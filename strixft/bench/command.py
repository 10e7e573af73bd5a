"""The command of a bench, made when it is typed: its settings become options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from strixft.bench.options import settings_of
from strixft.bench.run import BENCHES

FLAGS = {
    "save": (True, typer.Option(help="Append the result to the local store.")),
    "host_row": (False, typer.Option("--host-row", help="Plans for this machine use the rates.")),
    "as_json": (False, typer.Option("--json", help="Print one JSON document.")),
}
"""Options of every bench: default and option."""


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, only, default=default, annotation=kind)


def bench_command(name: str, finish: Callable[..., None], **more: Any) -> Any:
    """A command that gives its options to `finish`.

    Args:
        name: A row of `BENCHES`.
        finish: Takes the bench's name, its settings, and the flags of every bench.
        **more: Annotations of further flags, off if not given.

    Raises:
        RecipeError: There is no such bench.
    """
    bench = BENCHES[name]
    settings = settings_of(bench.measure)
    flags = {key: row for key, row in FLAGS.items() if key != "host_row" or bench.rates}
    parameters = [
        *(
            _parameter(s.name, Annotated[s.kind, typer.Option(help=s.help)], s.default)
            for s in settings
        ),
        *(_parameter(key, Annotated[bool, row[1]], row[0]) for key, row in flags.items()),
        *(_parameter(key, kind, False) for key, kind in more.items()),
    ]

    def command(**given: Any) -> None:
        own = {setting.name: given[setting.name] for setting in settings}
        finish(name, own, **{key: given[key] for key in flags})

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    says = (inspect.getdoc(bench.measure) or "").split("\n\n")[0]
    single.command(name, help=says)(command)
    return typer.main.get_command(single)
