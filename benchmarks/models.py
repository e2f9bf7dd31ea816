"""The models to measure: a directory, or random weights of a given shape."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_openelm import __version__
from mlx_openelm.config import PUBLISHED, OpenELMConfig
from mlx_openelm.convert.recipe import Recipe, make_scheme
from mlx_openelm.convert.writer import Options, convert
from mlx_openelm.errors import InputError
from mlx_openelm.hub import resolve
from mlx_openelm.quantization import MODES

from .checkpoints import random_checkpoint

VOCAB_SIZE = 32000  # of the published models
# Shapes beside the published ones: so small that only dispatching counts
SHAPES: dict[str, OpenELMConfig] = {
    "28x64": OpenELMConfig.scaled(
        vocab_size=1000,
        model_dim=64,
        head_dim=16,
        num_transformer_layers=28,
        ffn_dim_divisor=64,
    ),
}
DTYPES = ("float32", "float16", "bfloat16")
STORED = (
    *DTYPES,
    *(f"{bits}bit" for bits in MODES["affine"][1]),
    *(m for m in MODES if m != "affine"),
)


def model_directory(name: str) -> Path:
    """The directory of `random:SHAPE[:STORED]`, made if it isn't in the cache, or of any model.

    Raises:
        InputError: for an unknown name; lists those there are.
    """
    if not name.startswith("random:"):
        return resolve(name)
    shape, _, stored = name.removeprefix("random:").partition(":")
    stored = stored or "bfloat16"
    if shape in PUBLISHED:
        config = OpenELMConfig.from_name(shape, VOCAB_SIZE)
    elif shape in SHAPES:
        config = SHAPES[shape]
    else:
        raise InputError(f"no shape {shape!r}; known are {', '.join((*PUBLISHED, *SHAPES))}")
    if stored not in STORED:
        raise InputError(f"{name}: stored as {stored!r}? Known are {', '.join(STORED)}")
    directory = cache_directory() / f"{shape}-{stored}-{__version__}"
    if not directory.is_dir():
        tensors = random_checkpoint(config).tensors
        convert(tensors, config, directory, _options(stored))
    return directory


def _options(stored: str) -> Options:
    if stored in DTYPES:
        return Options(dtype=stored, allow_nonfinite=True, hashes=False)
    bits = stored.removesuffix("bit")
    scheme = make_scheme(bits=int(bits)) if bits.isdigit() else make_scheme(stored)
    return Options(dtype="float16", recipe=Recipe(scheme), allow_nonfinite=True, hashes=False)


def cache_directory() -> Path:
    """Where random models are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mlx-openelm" / "benchmarks"
