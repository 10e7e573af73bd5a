"""All fixes as one shell script, to be read before it is run."""

from __future__ import annotations

import shlex
import textwrap

from strixft.doctor.finding import Diagnosis, Finding

HEAD = """\
#!/bin/sh
# Fixes that strixft doctor proposes for this machine. Nothing has been changed yet.
# Read every block; delete what you do not want; then run it: sh fixes.sh
set -eu
"""


_WRAPPER = textwrap.TextWrapper(96, break_long_words=False, break_on_hyphens=False)


def _comment(text: str) -> str:
    lines = [part for line in text.splitlines() for part in _WRAPPER.wrap(line) or [""]]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _is_shell_state(command: str) -> bool:
    """`export` and `unset` in a script change nothing for the shell that starts it."""
    return command.startswith(("export ", "unset "))


def _block(finding: Finding) -> str:
    assert finding.fix is not None
    text = "\n" + _comment(f"[{finding.status}] {finding.check}: {finding.saw}")
    text += _comment(f"why: {finding.why}") + _comment(f"source: {finding.source}")
    text += _comment(f"fix: {finding.fix.say}")
    for command in finding.fix.commands:
        by_hand = _is_shell_state(command)
        text += f"# in your own shell: {command}\n" if by_hand else f"{command}\n"
    return text


def fix_script(diagnosis: Diagnosis) -> str:
    """The fixes of every finding that is not ok, worst first, each with its reason."""
    findings = [finding for finding in diagnosis.to_fix if finding.fix]
    body = "".join(_block(finding) for finding in findings)
    restarts = dict.fromkeys(f.fix.restart for f in findings if f.fix and f.fix.restart)
    ends = "".join(f"echo {shlex.quote(f'then: {restart}')}\n" for restart in restarts)
    return HEAD + (body or "\n# nothing to fix\n") + ("\n" + ends if ends else "")
