"""LoRA and DoRA adapters, merged into the weights that they were trained on.

LoRA (arXiv 2106.09685): W + s · B·A, with s = alpha / rank. DoRA (arXiv 2402.09353): the rows of
that sum, rescaled to learned lengths. CoreNet saves an adapted model with the base weights in the
same file; Hugging Face's PEFT saves a directory with the adapter alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig, descend
from mlx_openelm.errors import InputError
from mlx_openelm.files import read_yaml, shown
from mlx_openelm.names import canonical_name

from .sources import LazyTensor
from .sources.lazy import DTYPES

EMBEDDINGS, HEAD = "transformer.token_embeddings.weight", "lm_head.weight"

# A tensor's name, cut into its module and its part: CoreNet and PEFT in memory put the adapter's
# name behind the part, PEFT's files don't
_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_BASE = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_OURS = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}

# The parts of one module's adapter: lora_A, lora_B and perhaps lora_magnitude_vector
Parts = dict[str, LazyTensor]
# (a module's name in the adapter, its rank) -> what B·A is multiplied with
Scale = Callable[[str, int], float]


def split(
    tensors: Mapping[str, LazyTensor],
) -> tuple[dict[str, LazyTensor], dict[str, Parts]]:
    """The plain tensors (`.base_layer` taken out of their names), and each module's adapter.

    Raises:
        InputError: when there are two adapters.
    """
    plain: dict[str, LazyTensor] = {}
    adapters: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        if found := _PART.fullmatch(name):
            parts = adapters.setdefault(found["module"], {})
            part = found["part"]
            if part in parts:
                raise InputError(
                    f"tensors {shown(parts[part].name)} and {shown(name)}: there are several "
                    "adapters; one can be merged"
                )
            parts[part] = tensor
        elif found := _BASE.fullmatch(name):
            plain[f"{found['module']}.weight"] = tensor
        else:
            plain[name] = tensor
    return plain, adapters


def merge(
    base: Mapping[str, LazyTensor],
    adapters: Mapping[str, Parts],
    scale: Scale,
    config: OpenELMConfig,
) -> tuple[dict[str, LazyTensor], OpenELMConfig, list[str]]:
    """The base with the adapters in it, computed in float32 as rows are read, in the base's dtype.

    Where tied embeddings are adapted, the network's output still uses them as they were: so it
    is with CoreNet and PEFT while they train, and so the merged model is untied.

    Args:
        base: tensors by the names of a model directory.
        adapters: by module, as `split` gives them.
        scale: see `Scale`.
        config: the base's geometry.

    Returns:
        Tensors, geometry, and notes.

    Raises:
        InputError: when an adapter has no matrix to go to, or doesn't fit it; names it.
    """
    merged, notes = dict(base), []
    for module, parts in adapters.items():
        name = canonical_name(f"{module}.weight")
        if name is None or name not in base:
            raise InputError(f"the adapter of {shown(module)} has no matrix to be merged into")
        merged[name] = _merged(base[name], module, parts, scale)
        if name == EMBEDDINGS and config.share_input_output_layers:
            merged[HEAD] = base[HEAD] if HEAD in base else base[name]
            config = replace(config, share_input_output_layers=False)
            notes.append(
                "the adapter changes the embeddings but not the output matrix, so the merged "
                "model has both"
            )
    return merged, config, [f"merged the adapters of {len(adapters)} matrices", *notes]


def _merged(base: LazyTensor, module: str, parts: Parts, scale: Scale) -> LazyTensor:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    by_name = {_OURS.get(name, name) if embedding else name: t for name, t in parts.items()}
    for part in ("lora_A", "lora_B"):
        if part not in by_name:
            raise InputError(f"the adapter of {shown(module)} has no {part}")
    a, b = by_name["lora_A"], by_name["lora_B"]
    magnitude = by_name.get("lora_magnitude_vector")
    if len(by_name) != len(parts) or (embedding and magnitude is not None):
        raise InputError(f"the adapter of {shown(module)} has parts that don't go together")
    rows, columns = base.shape if len(base.shape) == 2 else (0, 0)
    rank = a.shape[0] if a.shape else 0
    # of an embedding, A has a column for each row of the matrix, and B a row for each column
    wanted = ((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))
    if not rank or (a.shape, b.shape) != wanted:
        raise InputError(
            f"the adapter of {shown(module)} has the shapes {list(a.shape)} and {list(b.shape)}, "
            f"which don't fit a matrix of {list(base.shape)}"
        )
    if magnitude is not None and magnitude.shape not in ((rows,), (rows, 1), (1, rows)):
        raise InputError(
            f"the magnitudes of {shown(module)} have the shape {list(magnitude.shape)}; the "
            f"matrix has {rows} rows"
        )
    compute = partial(_rows, base, a, b, magnitude, scale(module, rank), embedding)
    return LazyTensor(base.name, base.shape, base.dtype, compute)


def _rows(
    base: LazyTensor,
    a: LazyTensor,
    b: LazyTensor,
    magnitude: LazyTensor | None,
    scale: float,
    embedding: bool,
    start: int,
    stop: int,
) -> mx.array:
    if embedding:
        update = _float32(a.read())[:, start:stop].T @ _float32(b.read()).T
    else:
        update = _float32(b.rows(start, stop)) @ _float32(a.read())
    rows = _float32(base.rows(start, stop)) + scale * update
    if magnitude is not None:
        wanted = _float32(magnitude.read()).reshape(-1, 1)[start:stop]
        rows = rows * (wanted / mx.linalg.norm(rows, axis=1, keepdims=True))
    rows = rows.astype(DTYPES[base.dtype][1])
    mx.eval(rows)
    return rows


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32, stream=mx.cpu)


def alpha_over_rank(alpha: float) -> Scale:
    """LoRA's own scale, with one alpha for all modules."""
    return lambda module, rank: alpha / rank


def corenet_scale(yaml: Path) -> Scale | None:
    """The scale that a CoreNet training YAML tells of, in `model.lora.config`; None if it doesn't.

    There, the first entry whose `regex` fits a module's name decides.

    Raises:
        InputError: when the file can't be read, or the scale of a module isn't there or makes no
            sense.
    """
    entries = descend(read_yaml(yaml), ("model", "lora")).get("config")
    if not isinstance(entries, list):
        return None

    def scale(module: str, rank: int) -> float:
        for entry in entries:
            try:
                if re.match(entry["regex"], module):
                    parameters = entry["params"]
                    alpha, stable = parameters["lora_alpha"], parameters.get("use_rslora")
                    return float(alpha) / (math.sqrt(rank) if stable else rank)
            except (KeyError, TypeError, ValueError, AttributeError, re.error):
                break
        raise InputError(f"{yaml}: model.lora.config doesn't say the lora_alpha of {shown(module)}")

    return scale
