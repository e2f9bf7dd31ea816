"""Memory for MLX's CPU backend on Linux: cpu/allocator.cpp and malloc's limits.

The operators new and delete there go before the C++ library's own in whatever is loaded afterwards,
as the standard allows a program to replace them. That can't harm code that doesn't see them: every
block is one of malloc's.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

VARIABLE = "MLX_OPENELM_ALLOCATOR"  # "0": leave the C++ library's
# Not there if no compiler was at installation
LIBRARY = next(Path(__file__).parent.glob("_allocator.*so"), None)

# glibc's parameters (mallopt(3)). By default it returns memory to the system whenever some ten
# megabytes are free, and MLX's buffers come and go at every step.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 128 << 20  # bytes that may be free
LARGEST = 32 << 20  # bytes of a buffer that can be kept: the most that glibc allows

in_use = False
"""Whether MLX allocates its objects with it."""


def load() -> None:
    """Let MLX, which must not have been loaded yet, allocate so, unless `VARIABLE` is 0."""
    global in_use
    if in_use or os.environ.get(VARIABLE) == "0" or "mlx.core" in sys.modules:
        return
    _keep_what_is_free(ctypes.CDLL(None))
    if LIBRARY is not None:
        library = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
        in_use = _new(library).value == _new(ctypes.CDLL(None)).value  # else one is preloaded


def _keep_what_is_free(libc: ctypes.CDLL) -> None:
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def _new(library: ctypes.CDLL) -> ctypes.c_void_p:
    return ctypes.cast(library._Znwm, ctypes.c_void_p)
