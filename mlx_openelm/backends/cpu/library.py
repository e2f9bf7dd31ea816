"""The C library: where it is, its functions, its structures (src/openelm.h)."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_void_p
from functools import cache
from pathlib import Path

ABI = 2
VARIABLE = "MLX_OPENELM_CPU"  # "0": compute with MLX's own operations
BAD_TOKEN, NO_MEMORY = 1, 2  # what a function returns; 0: done
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, 4: 3, 8: 4}
"""Of a matrix: the dtype of its values, or the bits of packed ones."""


class Matrix(ctypes.Structure):
    """`openelm_matrix`."""

    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("kind", c_int32),
        ("group", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
    )


class Layer(ctypes.Structure):
    """`openelm_layer`."""

    _fields_ = (
        ("attn_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv_proj", Matrix),
        ("out_proj", Matrix),
        ("proj_1", Matrix),
        ("proj_2", Matrix),
        ("query_heads", c_int32),
        ("kv_heads", c_int32),
    )


class NetworkStruct(ctypes.Structure):
    """`openelm_network`."""

    _fields_ = (
        ("token_embeddings", Matrix),
        ("lm_head", Matrix),
        ("norm", c_void_p),
        ("layers", POINTER(Layer)),
        ("num_layers", c_int32),
        ("model_dim", c_int32),
        ("head_dim", c_int32),
        ("glu", c_int32),
        ("eps", c_float),
        ("rope_base", c_double),
    )


class Cache(ctypes.Structure):
    """`openelm_cache`."""

    _fields_ = (("values", c_void_p), ("scales", c_void_p), ("biases", c_void_p))


class StepStruct(ctypes.Structure):
    """`openelm_step`."""

    _fields_ = (
        ("tokens", c_void_p),
        ("starts", c_void_p),
        ("mask", c_void_p),
        ("caches", POINTER(Cache)),
        ("logits", c_void_p),
        ("batch", c_int32),
        ("length", c_int32),
        ("offset", c_int32),
        ("slot", c_int32),
        ("capacity", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("last", c_int32),
    )


@cache
def missing() -> str | None:
    """Why the library can't be used, in words; None: it can."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    file = _file()
    if file is None:
        return "not compiled at installation"
    try:
        found = load().openelm_abi()
    except (OSError, AttributeError) as error:
        return f"{file.name} can't be loaded ({error})"
    return None if found == ABI else f"{file.name} is of another version of mlx-openelm"


@cache
def load() -> ctypes.CDLL:
    """The library, loaded privately: it adds no symbol to the process.

    Raises:
        OSError: when it can't be loaded.
    """
    library = ctypes.CDLL(str(_file()), mode=ctypes.RTLD_LOCAL)
    library.openelm_compute.argtypes = [POINTER(NetworkStruct), POINTER(StepStruct)]
    library.openelm_multiply.argtypes = [c_void_p, c_int, POINTER(Matrix), c_void_p, c_int]
    library.openelm_set_threads.restype = None
    library.openelm_set_threads(threads())
    return library


def threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS, or one for each core of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if given.isdecimal() and 0 < len(given) < 6 and int(given) > 0:
        return int(given)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _file() -> Path | None:
    return next(Path(__file__).parent.glob("libopenelm*.so"), None)
