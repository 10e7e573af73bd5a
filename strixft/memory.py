"""Errors that mean that memory is used up, whoever raises them."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """An allocation failed: in Python, in torch, or in a driver that only says so in words.

    >>> is_out_of_memory(RuntimeError("HIP error: out of memory")), is_out_of_memory(ValueError())
    (True, False)
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch's, which this module does not import
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
