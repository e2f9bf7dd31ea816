"""Whether this package's primitives for MLX's CPU backend (cpu/primitives.cpp) can be used.

They are compiled at installation, against the MLX of that moment. MLX's C++ interface has no
stable ABI: with any other version they are left alone.
"""

from __future__ import annotations

import os
import warnings

import mlx.core as mx

VARIABLE = "MLX_OPENELM_KERNELS"  # "0": do without

PACKED_BITS = (4, 8)  # of matrices that they multiply as they are stored

missing: str | None = None
"""Why there are none, in words; None: they are there."""


class _Unfit(Exception):
    """They are installed, and don't fit; its text says why."""


def load() -> None:
    """Look for them, once; warn if an installation has become unfit for a CPU."""
    global missing
    try:
        missing = _why_absent()
    except _Unfit as error:
        missing = str(error)
        if mx.default_device().type == mx.DeviceType.cpu:
            warnings.warn(
                f"mlx-openelm computes without its kernels, several times slower: {error}; "
                "install it again (pip install --force-reinstall --no-deps --no-cache-dir)",
                RuntimeWarning,
                stacklevel=3,
            )


def _why_absent() -> str | None:
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    try:
        from . import _kernels
    except ImportError as error:
        if error.name == __package__:  # which has no such name; else the file can't be loaded
            return "not compiled at installation"
        raise _Unfit(f"they can't be loaded ({error})") from None
    version: str = mx.__version__  # type: ignore[attr-defined]  # MLX's stubs lack it
    if version.split(".dev")[0] != _kernels.MLX_VERSION:
        raise _Unfit(f"they are for MLX {_kernels.MLX_VERSION}, and {version} is installed")
    try:
        _kernels.rms_norm(mx.zeros(8), mx.zeros(8), 1.0)
    except TypeError:
        raise _Unfit("they were compiled with another nanobind than MLX") from None
    return None
