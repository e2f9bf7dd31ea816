"""The models to measure: a directory, a bundled one, or random weights of a given shape."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_openelm import __version__, device
from mlx_openelm.backends.cpu import PACKED_BITS
from mlx_openelm.checkpoint.directory import read_config, read_entries
from mlx_openelm.checkpoint.hub import BUNDLED, DEMO, resolve
from mlx_openelm.checkpoint.stored_quantization import foreign_method, stored_quantization
from mlx_openelm.config import PUBLISHED, OpenELMConfig
from mlx_openelm.convert.checkpoint import open_directory
from mlx_openelm.convert.recipe import Recipe, make_scheme, plan
from mlx_openelm.convert.writer import Options, convert, output_layout
from mlx_openelm.errors import InputError
from mlx_openelm.model.quantization import MODES
from mlx_openelm.model.shapes import tensor_shapes

from .checkpoints import random_checkpoint, widened
from .peers import OURS
from .results import Model

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
RANDOM = "random:"
# The bundled demo with zeros to 65 M parameters, so that reading them is what a step takes
WIDE, TIMES = "wide-demo", 32
SHARE_OF_MEMORY = 0.9  # that models may fill


@dataclass(frozen=True)
class Target:
    """A model to measure, before it is made or loaded."""

    model: Model
    config: OpenELMConfig


def target(name: str) -> Target:
    """What is known of a model from its name, or from its files' headers.

    Args:
        name: `random:SHAPE[:STORED]`, a bundled model's `NAME[:STORED]`, a directory, or a
            Hugging Face id.

    Raises:
        InputError: for an unknown name; lists those there are.
    """
    base, stored = _parse(name)
    if stored is None:
        return _of_directory(name, resolve(base))
    config = _config(base)
    options = _options(stored)
    quantization = plan(config, options.recipe)[0]
    layout = output_layout(config, getattr(mx, str(options.dtype)), quantization)
    size = sum(spec.nbytes for parts in layout.values() for spec in parts.values())
    random = base.startswith(RANDOM)
    shape = base.removeprefix(RANDOM)
    return Target(Model(name, shape, stored, parameters(config), size, random), config)


def model_directory(name: str) -> Path:
    """The directory of a model, made if it is one to be made and isn't in the cache.

    Raises:
        InputError: for an unknown name; lists those there are.
    """
    base, stored = _parse(name)
    if stored is None:
        return resolve(base)
    shape = base.removeprefix(RANDOM)
    directory = cache_directory() / f"{shape}-{stored}-{__version__}-with-tokenizer"
    if directory.is_dir():
        return directory
    tokenizer: Path | None = DEMO / "demo/tokenizer.model"
    if base.startswith(RANDOM):
        config = _config(base)
        tensors = random_checkpoint(config).tensors
        # llama.cpp takes no model without a tokenizer, nor do command lines: the demo's will do
        if config.vocab_size < _config("demo").vocab_size:
            tokenizer = None
    else:
        bundled = open_directory(_bundled(base))
        tensors, config = bundled.tensors, bundled.config
        if base == WIDE:
            tensors, config = widened(tensors, config, TIMES)
    convert(tensors, config, directory, _options(stored), tokenizer=tokenizer)
    return directory


def parameters(config: OpenELMConfig) -> int:
    """How many a network has."""
    return sum(map(math.prod, tensor_shapes(config).values()))


def check_memory(targets: Sequence[Target], peers: Sequence[str], memory: int | None) -> None:
    """Refuse models that the runtimes, which stay up together, can't hold; from the sizes alone.

    Raises:
        InputError: with the sizes.
    """
    for one in targets:
        needed = sum(held_bytes(one, peer) for peer in peers)
        if memory is not None and needed > SHARE_OF_MEMORY * memory:
            raise InputError(
                f"{one.model.name}: {needed / 1e9:.1f} GB for {' and '.join(peers)}, which stay "
                f"loaded together, and this machine has {memory / 1e9:.1f} GB; measure fewer "
                "peers, a smaller model, or one in fewer bits"
            )


def held_bytes(one: Target, peer: str) -> int:
    """Bytes that a runtime holds of a model's weights, roughly."""
    model, policy = one.model, device.policy()
    if peer == "torch":
        return 4 * model.parameters
    if peer != OURS:
        return model.bytes
    if model.stored in DTYPES and not policy.native:
        return (policy.dtype or getattr(mx, model.stored)).size * model.parameters
    if model.stored in DTYPES:
        return model.bytes
    packed = policy.native and model.stored in [f"{bits}bit" for bits in PACKED_BITS]
    return (
        model.bytes if packed or not policy.dequantize(model.parameters) else 4 * model.parameters
    )


def cache_directory() -> Path:
    """Where models that were made are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mlx-openelm" / "benchmarks"


def _parse(name: str) -> tuple[str, str | None]:
    """(name, how it is to be stored); (name, None) for a directory that is as it is."""
    if name.startswith(RANDOM):
        shape, _, stored = name.removeprefix(RANDOM).partition(":")
        if shape not in PUBLISHED and shape not in SHAPES:
            raise InputError(f"no shape {shape!r}; known are {', '.join((*PUBLISHED, *SHAPES))}")
        base, stored = RANDOM + shape, stored or "bfloat16"
    else:
        base, _, stored = name.partition(":")
        if base not in (*BUNDLED, WIDE) or not stored:
            return name, None
    if stored not in STORED:
        raise InputError(f"{name}: stored as {stored!r}? Known are {', '.join(STORED)}")
    return base, stored


def _config(base: str) -> OpenELMConfig:
    shape = base.removeprefix(RANDOM)
    if base in (*BUNDLED, WIDE):
        config = OpenELMConfig.from_json(_bundled(base) / "config.json")
        return widened({}, config, TIMES)[1] if base == WIDE else config
    if shape in PUBLISHED:
        return OpenELMConfig.from_name(shape, VOCAB_SIZE)
    return SHAPES[shape]


def _bundled(base: str) -> Path:
    return BUNDLED["demo" if base == WIDE else base]


def _of_directory(name: str, directory: Path) -> Target:
    values = read_config(directory)
    where = str(directory / "config.json")
    config = OpenELMConfig.from_dict(values, where)
    entries = read_entries(directory, foreign_method(values))
    size = sum(entry.nbytes for entry in entries.values())
    quantization = stored_quantization(values, where)
    if quantization is not None:
        default = quantization.default
        stored = f"{default.bits}bit" if default.mode == "affine" else default.mode
    else:
        norm = entries.get("transformer.norm.weight")
        stored = norm.dtype if norm is not None else "float32"
    shape = next((s for s in PUBLISHED if _same_shape(s, config)), directory.name)
    return Target(Model(name, shape, stored, parameters(config), size), config)


def _same_shape(published: str, config: OpenELMConfig) -> bool:
    other = OpenELMConfig.from_name(published, config.vocab_size)
    return tensor_shapes(other) == tensor_shapes(config)


def _options(stored: str) -> Options:
    if stored in DTYPES:
        return Options(dtype=stored, allow_nonfinite=True, hashes=False)
    bits = stored.removesuffix("bit")
    scheme = make_scheme(bits=int(bits)) if bits.isdigit() else make_scheme(stored)
    return Options(dtype="float16", recipe=Recipe(scheme), allow_nonfinite=True, hashes=False)
