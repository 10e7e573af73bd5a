"""Another processor, where a variable asks for one; the tests and all their children load this.

STRIXFT_TEST_CORES=64      so many processors
STRIXFT_TEST_AVX512BF16=0  what bitsandbytes' own library says of this processor: 0 or 1
"""

import ctypes
import os

if cores := int(os.environ.get("STRIXFT_TEST_CORES", 0)):
    os.cpu_count = lambda: cores
    os.sched_getaffinity = lambda pid: set(range(cores))

has = os.environ.get("STRIXFT_TEST_AVX512BF16", "")
if has:
    _look_up = ctypes.CDLL.__getattr__

    def _answer(library: ctypes.CDLL, name: str) -> object:
        return (lambda: has == "1") if name == "has_avx512bf16_cpu" else _look_up(library, name)

    ctypes.CDLL.__getattr__ = _answer  # type: ignore[assignment, method-assign]
