"""Findings: status, observation, reason, fix and source; and the checks that return them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from strixft.support import html

Status = Literal["fail", "warn", "unknown", "ok"]

STATUSES: tuple[Status, ...] = ("fail", "warn", "unknown", "ok")
"""Worst first. `fail`: training does not work, or can freeze or crash this machine. `warn`: it
works, but with less speed, less memory or a risk. `unknown`: this could not be checked."""


@dataclass(frozen=True, slots=True)
class Fix:
    """A fix and its commands.

    Args:
        say: One sentence.
        commands: Shell lines in order; empty for work by hand, as in the BIOS.
        restart: What must restart before the fix takes effect: `reboot`, `log in again`.
    """

    say: str
    commands: tuple[str, ...] = ()
    restart: str = ""

    @property
    def text(self) -> str:
        """Sentence, commands and restart, one per line."""
        restart = (f"then: {self.restart}",) if self.restart else ()
        return "\n".join((self.say, *self.commands, *restart))


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check.

    Args:
        status: One of `STATUSES`.
        saw: The observation and its place.
        fix: Required unless the status is `ok`.
        why: Why it matters for training; the check's own unless given, as is the source.
        source: Origin of `why`: a document, an issue, or the kernel's own interface.
        check: Name of the check; filled in.
    """

    status: Status
    saw: str
    fix: Fix | None = None
    why: str = ""
    source: str = ""
    check: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the six keys of `strixft doctor --json`, all text."""
        return {
            "check": self.check,
            "status": self.status,
            "saw": self.saw,
            "why": self.why,
            "fix": self.fix.text if self.fix else "",
            "source": self.source,
        }


Look = Callable[[Any], Finding | Iterable[Finding] | None]
"""Takes a `HostView`, which imports this file."""


@dataclass(frozen=True, slots=True)
class Check:
    """A row of `CHECKS`.

    Args:
        name: Name in the output.
        look: Returns its finding or findings.
        why: Reason of findings that give no other.
        source: Source of findings that give no other.
        strix_halo: Run only on a Strix Halo.
        outside: Do not run inside these: `container`, `wsl`.
        needs_torch: Use the child process that imports torch.
    """

    name: str
    look: Look
    why: str = ""
    source: str = ""
    strix_halo: bool = False
    outside: tuple[Literal["container", "wsl"], ...] = ()
    needs_torch: bool = False


def check(name: str, **parts: Any) -> Callable[[Look], Check]:
    """Turn a function into a check; the parts are those of `Check`."""
    return lambda look: Check(name, look, **parts)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, worst first."""

    findings: tuple[Finding, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 only if something failed."""
        return int(any(finding.status == "fail" for finding in self.findings))

    @property
    def to_fix(self) -> tuple[Finding, ...]:
        """The findings that are not ok."""
        return tuple(finding for finding in self.findings if finding.status != "ok")

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `strixft doctor --json` prints."""
        return {"findings": [finding.to_dict() for finding in self.findings]}

    def counted(self) -> str:
        """Return the number of findings by status.

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
