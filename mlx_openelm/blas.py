"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel brings the reference BLAS, some 30 times slower than an optimised one. Symbols of
a library that is loaded globally before MLX go before those of the library that MLX brings, so a
system's OpenBLAS or MKL only has to be loaded in time. Before that goes a kernel of our own
(cpu/sgemm.c) for products with few rows, which is what decoding consists of; it passes on the rest.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "MLX_OPENELM_BLAS"  # "0": load nothing; "own": the kernel alone; else a library's name
SONAMES = (
    "libopenblas.so.0",
    "libopenblasp.so.0",
    "libopenblaso.so.0",
    "libmkl_rt.so.3",
    "libmkl_rt.so.2",
)
_PTHREADS, _OPENMP = 1, 2  # what openblas_get_parallel returns
# Not there if no compiler was at installation
KERNEL = next(Path(__file__).parent.glob("_sgemm.*so"), None)

in_use: str | None = None
"""What MLX multiplies float32 matrices with, in words; None: its own BLAS."""


def load() -> None:
    """Load the system's fast BLAS, or what `VARIABLE` names, and the kernel, unless MLX is there.

    On other systems than Linux nothing is done: there MLX uses the system's BLAS as it is.
    """
    wanted = os.environ.get(VARIABLE)
    if sys.platform == "linux" and wanted != "0" and in_use is None:
        _load(wanted)


def _load(wanted: str | None) -> None:
    global in_use
    name = None if wanted == "own" else _find(wanted)
    if name is None and (KERNEL is None or wanted not in (None, "", "own")):
        return
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before mlx_openelm and so computes with its own slow BLAS; "
            f"import mlx_openelm first to use {name or 'the kernel for few rows'} "
            f"({VARIABLE}=0 silences this)",
            RuntimeWarning,
            stacklevel=4,
        )
        return
    kernel = _load_kernel(name)
    in_use = _describe(name, kernel)
    # The kernel hands on to the BLAS by a pointer. Global, the BLAS would also go before that of
    # other packages: PyTorch decodes a third as fast with OpenBLAS as with its own MKL.
    if name is not None and not kernel:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def _find(wanted: str | None) -> str | None:
    """A BLAS by the name or path that loads it: the one that is wanted, else the first there is."""
    installed = [str(Path(sys.prefix, "lib", name)) for name in SONAMES if "mkl" in name]
    for name in (wanted,) if wanted else (*SONAMES, *installed):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_LOCAL)
        except OSError as error:
            if wanted:
                warnings.warn(f"{VARIABLE}={wanted}: {error}", RuntimeWarning, stacklevel=5)
            continue
        if hasattr(library, "cblas_sgemm"):
            return name
    return None


def _load_kernel(name: str | None) -> bool:
    """Whether products go to the kernel now, and what it leaves to `name` or else to MLX's BLAS."""
    if KERNEL is None or not ctypes.CDLL(str(KERNEL), mode=os.RTLD_LOCAL).sgemm_set(None, 0, 0, 0):
        return False
    kernel = ctypes.CDLL(str(KERNEL), mode=ctypes.RTLD_GLOBAL)
    if _sgemm(kernel).value != _sgemm(ctypes.CDLL(None)).value:  # preloaded
        return False
    following = name or _libmlx()
    most = 0 if name else 2**31 - 1  # rows and columns: at any size it is faster than MLX's
    library = ctypes.CDLL(following) if following else None
    kernel.sgemm_set(library and _sgemm(library), most, most, _threads())
    if library is not None and name is not None:
        _share(kernel, library)
    return True


def _share(kernel: ctypes.CDLL, library: ctypes.CDLL) -> None:
    """Let the kernel's threads, not its own, share what the BLAS computes, if it can be told so.

    With its own, it lets no other caller compute at the same time. An OpenBLAS that was built
    without threads may even be wrong when called by several: the kernel calls it one at a time.
    """
    setting = None
    if hasattr(library, "openblas_get_parallel"):
        kind = library.openblas_get_parallel()
        if kind == _PTHREADS:
            library.openblas_set_num_threads(1)
        elif kind == _OPENMP:
            setting = library.omp_set_num_threads
        else:
            return
    elif hasattr(library, "MKL_Set_Num_Threads_Local"):
        setting = library.MKL_Set_Num_Threads_Local
    else:
        return
    kernel.sgemm_share(setting and ctypes.cast(setting, ctypes.c_void_p))


def _sgemm(library: ctypes.CDLL) -> ctypes.c_void_p:
    return ctypes.cast(library.cblas_sgemm, ctypes.c_void_p)


def _libmlx() -> str | None:
    """MLX's library: a symbol looked up in it is found in the BLAS that it is linked to."""
    mlx = find_spec("mlx")
    for folder in (mlx and mlx.submodule_search_locations) or ():
        path = Path(folder, "lib", "libmlx.so")
        if path.exists():
            return str(path)
    return None


def _threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdecimal():
        return max(1, int(wanted))
    available = getattr(os, "sched_getaffinity", None)  # which macOS lacks
    return len(available(0)) if available else os.cpu_count() or 1


def _describe(name: str | None, kernel: bool) -> str | None:
    parts = [Path(name).name] if name else []
    if kernel:
        parts.append("few rows: own kernel" if name else "own kernel")
    return ", ".join(parts) or None
