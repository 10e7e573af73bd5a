"""Which faults of a server pass, and how long to wait for that."""

from __future__ import annotations

import urllib.error
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException

from tenacity import RetryCallState

from strixft.errors import HostError, StrixftError

TRIES = 3
FIRST_WAIT_S = 2.0
"""Before the second try; twice as long before each further one."""
LONGEST_WAIT_S = 120.0
"""A server that asks for more is not waited for."""
BUSY = (408, 429, 500, 502, 503, 504)
"""Answers that may be another one a little later (RFC 9110)."""
REFUSED = (400, 413, 422)
"""Answers that blame this request, and say nothing of the next."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of `strixft.servers`; None if no answer came."""
    cause = error.__cause__
    return cause.code if isinstance(cause, urllib.error.HTTPError) else None


def is_refusal(error: StrixftError) -> bool:
    """The server refuses this request, such as one that is too long, and may answer others."""
    return status_of(error) in REFUSED


def _asked_wait_s(error: BaseException) -> float | None:
    """What a server asks for with `Retry-After`: seconds, or a date."""
    cause = error.__cause__
    text = cause.headers.get("Retry-After") if isinstance(cause, urllib.error.HTTPError) else None
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def may_pass(error: BaseException) -> bool:
    """The same request may be answered a little later."""
    if not isinstance(error, HostError):
        return False
    if (status := status_of(error)) is not None:
        return status in BUSY and (_asked_wait_s(error) or 0) <= LONGEST_WAIT_S
    half = "no JSON that ends" in error.problem
    return half or isinstance(error.__cause__, OSError | HTTPException)


def wait_s(state: RetryCallState) -> float:
    """Seconds before the next try."""
    error = state.outcome.exception() if state.outcome else None
    asked = None if error is None else _asked_wait_s(error)
    growing = FIRST_WAIT_S * 2 ** (state.attempt_number - 1)
    return growing if asked is None else asked
