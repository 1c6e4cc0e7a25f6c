"""`release_memory`: what was freed goes back to the system."""

import ctypes
import sys


def release_memory() -> None:
    """The allocators of Arrow and of the C library would keep it beside what comes next needs."""
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's
    if trim is not None:
        trim(0)
