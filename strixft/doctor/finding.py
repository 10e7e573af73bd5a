"""What a check finds: status, what was seen and where, why it matters, the fix, its source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from strixft.support import html

if TYPE_CHECKING:
    from strixft.doctor.view import HostView

Status = Literal["fail", "warn", "unknown", "ok"]

STATUSES: tuple[Status, ...] = ("fail", "warn", "unknown", "ok")
"""Worst first. `fail`: training does not work, or can freeze or crash this machine. `warn`: it
works, with less speed, less memory or a risk. `unknown`: this could not be checked."""


@dataclass(frozen=True, slots=True)
class Fix:
    """What to do, and what to type for it.

    Args:
        say: One sentence.
        commands: Shell lines in their order; none where hands are needed, as in the BIOS.
        restart: What has to start again before it counts: `reboot`, `log in again`.
    """

    say: str
    commands: tuple[str, ...] = ()
    restart: str = ""

    @property
    def text(self) -> str:
        """Sentence, commands and restart, a line each."""
        restart = (f"then: {self.restart}",) if self.restart else ()
        return "\n".join((self.say, *self.commands, *restart))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a check found."""

    status: Status
    saw: str
    """What was seen, and where."""
    why: str
    """Why it matters for training."""
    fix: Fix | None = None
    source: str
    """Who says so: a document, an issue, or the kernel's own interface."""
    check: str = ""
    """Name of the check; filled in by the table."""

    def to_dict(self) -> dict[str, str]:
        """The six keys of `strixft doctor --json`, all text."""
        return {
            "check": self.check,
            "status": self.status,
            "saw": self.saw,
            "why": self.why,
            "fix": self.fix.text if self.fix else "",
            "source": self.source,
        }


Findings = Iterable[Finding]


@dataclass(frozen=True, slots=True)
class Check:
    """A row of `CHECKS`: its name, and the function that looks."""

    name: str
    look: Callable[[HostView], Findings]
    needs_torch: bool = False
    """Starts a child process that imports torch."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, the worst first."""

    findings: tuple[Finding, ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """1 only if something failed."""
        return int(any(finding.status == "fail" for finding in self.findings))

    @property
    def to_fix(self) -> tuple[Finding, ...]:
        """The findings that are not ok."""
        return tuple(finding for finding in self.findings if finding.status != "ok")

    def to_dict(self) -> dict[str, Any]:
        """What `strixft doctor --json` prints."""
        return {"findings": [finding.to_dict() for finding in self.findings]}

    def counted(self) -> str:
        """How many of each status, as a sentence.

        >>> Diagnosis().counted()
        'nothing was checked'
        """
        statuses = [finding.status for finding in self.findings]
        parts = [f"{statuses.count(s)} {s}" for s in STATUSES if s in statuses]
        return ", ".join(parts) or "nothing was checked"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("", "check", "seen", "why", "fix", "source"))
        rows = "".join(_html_row(finding) for finding in self.findings)
        return f'{html.note(self.counted())}<table class="sx"><tr>{head}</tr>{rows}</table>'


def _html_row(finding: Finding) -> str:
    fix = finding.fix.text if finding.fix and finding.status != "ok" else ""
    cells = (finding.check, finding.saw, finding.why, fix, finding.source)
    body = "".join(f"<td>{escape(cell).replace(chr(10), '<br>')}</td>" for cell in cells)
    return f"<tr><td><strong>{finding.status}</strong></td>{body}</tr>"


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sorted by status; within a status as the table has them, causes before consequences."""
    return tuple(sorted(findings, key=lambda finding: STATUSES.index(finding.status)))
