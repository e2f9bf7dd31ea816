"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel brings the reference BLAS, some 30 times slower than an optimised one. Symbols of
a library that is loaded globally before MLX go before those of the library that MLX brings, so a
system's OpenBLAS only has to be loaded in time.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

VARIABLE = "MLX_OPENELM_BLAS"  # "0": load none; anything else: load this library
SONAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblaso.so.0")

in_use: str | None = None
"""The library that was loaded; None: MLX uses its own."""


def load() -> None:
    """Load the system's OpenBLAS, or what `VARIABLE` names, unless MLX is there already.

    On other systems than Linux nothing is done: there MLX uses the system's BLAS as it is.
    """
    global in_use
    wanted = os.environ.get(VARIABLE)
    if sys.platform != "linux" or wanted == "0" or in_use is not None:
        return
    for name in (wanted,) if wanted else SONAMES:
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_LOCAL)
        except OSError as error:
            if wanted:
                warnings.warn(f"{VARIABLE}={wanted}: {error}", RuntimeWarning, stacklevel=3)
            continue
        if not hasattr(library, "cblas_sgemm"):
            continue
        if "mlx.core" in sys.modules:
            warnings.warn(
                "mlx was imported before mlx_openelm and so computes with its own slow BLAS; "
                f"import mlx_openelm first to use {name} ({VARIABLE}=0 silences this)",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        in_use = name
        return
