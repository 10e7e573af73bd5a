"""Format numbers for people: GiB (2**30 bytes), seconds. Values stay in bytes and seconds."""

from __future__ import annotations

MIB = 2**20

GIB = 2**30


def format_gib(num_bytes: int | float | None) -> str:
    """Format bytes as GiB; unknown is a dash.

    >>> format_gib(3 * GIB // 2), format_gib(None)
    ('1.50 GiB', '–')
    """
    return "–" if num_bytes is None else f"{num_bytes / GIB:.2f} GiB"


def format_size(num_bytes: int | float | None) -> str:
    """Format a size on disk as GiB, a small one as MiB; unknown is a dash.

    >>> format_size(3 * GIB // 2), format_size(3 * MIB // 2), format_size(0)
    ('1.50 GiB', '1.5 MiB', '0.0 MiB')
    """
    if num_bytes is None or num_bytes >= GIB:
        return format_gib(num_bytes)
    return f"{num_bytes / MIB:.1f} MiB"


def format_seconds(seconds: float | None) -> str:
    """Format a duration in its two largest units; unknown is a dash.

    >>> format_seconds(5.25), format_seconds(61), format_seconds(7260), format_seconds(None)
    ('5.2 s', '1 min 1 s', '2 h 1 min', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_number(value: float | int | None, digits: int = 3) -> str:
    """Format a count or a measurement; unknown is a dash.

    >>> format_number(12345), format_number(0.12345), format_number(None)
    ('12,345', '0.123', '–')
    """
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def format_figure(value: object) -> str:
    """Format a value for a table: four significant digits; unknown is a dash.

    >>> [format_figure(value) for value in (1234567.8, 0.012346, 3, "pp512", None, 212.64)]
    ['1,234,568', '0.01235', '3', 'pp512', '–', '212.6']
    """
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
