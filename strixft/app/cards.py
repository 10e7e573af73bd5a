"""Errors of ours in a notebook as cards: the problem, the fix as a cell has it, details folded."""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Sequence
from html import escape
from typing import Any

from strixft.recipe.load import parse_override
from strixft.support.errors import StrixftError
from strixft.support.text import redact, visible

STYLE = """
.sx-card { border-left: 4px solid #c2410c; padding: .4rem 1rem; margin: .4rem 0;
  font: 15px/1.5 system-ui, sans-serif; max-width: 60rem }
.sx-card.sx-calm { border-color: #64748b }
.sx-card p { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
.sx-card .sx-what { font-weight: 600 }
.sx-card pre { overflow-x: auto; font-size: .8rem; line-height: 1.3 }
.sx-card summary { cursor: pointer; opacity: .75 }
"""

_WORD = r"(?:'[^']*'|[^\s;,']|,(?=\S))+"
_COMMAND = re.compile(rf"strixft (\w+)((?: {_WORD})*)")
"""A command in a fix; what it does follows after three spaces, or a comma."""

_OPTIONS = re.compile(rf"(?:--(?:run-dir|set|from) {_WORD}(?: (?=--))?)+")

SHOWN = ("watch", "chat", "runs")
"""Commands that have a function of the same name for a notebook."""


def _options(words: Sequence[str]) -> tuple[list[str], dict[str, str], dict[str, Any]]:
    """Return arguments, options that have a value, and settings."""
    plain, options, settings = [], {}, {}
    rest = iter(words)
    for word in rest:
        if word == "--set":
            key, value = parse_override(next(rest, ""))
            settings[key] = value
        elif word.startswith("--"):
            options[word] = next(rest, "")
        else:
            plain.append(word)
    return plain, options, settings


def _call(found: re.Match[str]) -> str:
    name, words = found[1], shlex.split(found[2])
    if name == "recipe" and not words:
        return "sx.list_recipes()"
    if name in SHOWN:
        return f"sx.{name}({', '.join(map(repr, words))})"
    if name == "stop":
        return "its Stop button, or sx.runs()"
    if name in ("run", "resume", "train", "evaluate", "prepare"):
        plain, options, settings = _options(words)
        if name == "resume":
            return f"sx.runs()   and Resume beside {plain[0]}"
        given = [repr(word) for word in plain]
        given += [repr(options["--run-dir"])] if "--run-dir" in options else []
        given += [f"overrides={settings!r}"] if settings else []
        given += [f"first={options['--from']!r}"] if "--from" in options else []
        return f"sx.run_recipe({', '.join(given)})"
    return f"in a terminal: {found[0]}"


def _parameters(found: re.Match[str]) -> str:
    """Return options as they are typed into the cell of parameters."""
    _, options, settings = _options(shlex.split(found[0]))
    parts = [f"run_dir = {options['--run-dir']!r}"] if "--run-dir" in options else []
    parts += [f"overrides = {settings!r}"] if settings else []
    parts += [f"first={options['--from']!r} in sx.run_recipe(…)"] if "--from" in options else []
    return "  and  ".join(parts)


def cell_fix(fix: str) -> str:
    """Return a fix as a notebook's cell has it.

    >>> cell_fix("--run-dir runs/mine-2   for a new run")
    "run_dir = 'runs/mine-2'   for a new run"
    >>> cell_fix("strixft run r.yaml --run-dir runs/r   resumes it")
    "sx.run_recipe('r.yaml', 'runs/r')   resumes it"
    """
    try:
        return _OPTIONS.sub(_parameters, _COMMAND.sub(_call, fix))
    except (ValueError, StrixftError, IndexError):  # not a command after all
        return fix


def settings_in(fix: str) -> dict[str, Any]:
    """Return the settings that a fix proposes first, by dotted key.

    >>> settings_in("correct these rows, or leave them out: --set dataset.max_bad_fraction=0.05")
    {'dataset.max_bad_fraction': 0.05}
    >>> settings_in("--set dataset.columns.prompt=…   names the column")
    {}
    """
    try:
        found = next((one[0] for one in _OPTIONS.finditer(fix)), "")
        return {} if "…" in found else _options(shlex.split(found))[2]  # … is to be filled in
    except (ValueError, StrixftError, IndexError):  # not an option after all
        return {}


def card(error: StrixftError, details: str = "") -> str:
    """Build the card of an error.

    Args:
        error: The error.
        details: Text to fold below it, such as a traceback.
    """
    fix = cell_fix(error.fix)
    shell = f"In a terminal: {error.fix}\n\n" if fix != error.fix else ""
    more = visible(redact(shell + details))
    folded = f"<details><summary>Details</summary><pre>{escape(more)}</pre></details>"
    calm = "" if error.exit_code else " sx-calm"
    return (
        f'<div class="sx-card{calm}"><style>{STYLE}</style>'
        f'<p class="sx-what">{escape(error.problem)}</p>'
        f"<p>{escape(fix)}</p>{folded if more.strip() else ''}</div>"
    )


def shown_error(error: Exception) -> str:
    """Return an error as a card; one that is not ours says that it should be reported."""
    if isinstance(error, StrixftError):
        return card(error)
    return card(StrixftError(f"{type(error).__name__}: {error}"[:1000], fix="please report this"))


def show_cards_here() -> None:
    """Let this notebook's shell, if it is one, show errors of ours as cards."""
    import IPython
    from IPython.display import HTML, display

    shell: Any = IPython.get_ipython()

    def show(_: Any, kind: type, error: StrixftError, trace: Any, tb_offset: Any = None) -> None:
        details = "".join(traceback.format_exception(kind, error, trace))
        display(HTML(card(error, details)))

    if hasattr(shell, "kernel"):
        shell.set_custom_exc((StrixftError,), show)
