"""What a network looks like, from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from mlx_openelm.config import PUBLISHED, OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.model.shapes import tensor_shapes

_LAYER = re.compile(r"transformer\.layers\.([0-9]+)\.")
_DIVISOR = 256  # of the published models, a power of two


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> OpenELMConfig:
    """The config whose network has these tensors, by the names of a model directory.

    A published model is recognised. What leaves no trace in shapes (RoPE's base, the context, the
    activation) is as in the published ones. With `lm_head.weight` the head counts as untied.

    Raises:
        InputError: when the shapes contradict each other, naming the tensor, or don't say enough.
    """
    vocab_size, dim = _matrix(shapes, "transformer.token_embeddings.weight")
    layers = {int(m.group(1)) for name in shapes if (m := _LAYER.match(name))}
    if not layers or layers != set(range(len(layers))):
        gap = next(i for i in range(len(layers) + 1) if i not in layers)
        raise InputError(f"there is no tensor of layer {gap}; the checkpoint is incomplete")
    q_norm = shapes.get("transformer.layers.0.attn.q_norm.weight")
    if q_norm is None:
        raise InputError(
            "without attn.q_norm the size of a head can't be inferred from the tensors; give the "
            "geometry with --config"
        )
    head_dim = math.prod(q_norm)
    if not head_dim:
        raise InputError("tensor transformer.layers.0.attn.q_norm.weight is empty")
    heads, kv_heads, widths, gates = [], [], [], set()
    for i in range(len(layers)):
        layer = f"transformer.layers.{i}."
        query = _matrix(shapes, layer + "attn.out_proj.weight")[1]
        key_value = _matrix(shapes, layer + "attn.qkv_proj.weight")[0] - query
        width = _matrix(shapes, layer + "ffn.proj_2.weight")[1]
        gates.add(_matrix(shapes, layer + "ffn.proj_1.weight")[0] / width)
        if query % head_dim or key_value % (2 * head_dim) or key_value <= 0:
            raise InputError(
                f"tensor {layer}attn.qkv_proj.weight: {query + key_value} rows are not {query} "
                f"for queries and whole heads of {head_dim} for keys and values"
            )
        heads.append(query // head_dim)
        kv_heads.append(key_value // (2 * head_dim))
        widths.append(width)
    if gates not in ({1}, {2}):
        raise InputError(
            "the rows of ffn.proj_1 must be once the columns of ffn.proj_2, or twice with a gate, "
            "in all layers"
        )
    config = OpenELMConfig(
        vocab_size=vocab_size,
        model_dim=dim,
        head_dim=head_dim,
        num_transformer_layers=len(layers),
        num_query_heads=tuple(heads),
        num_kv_heads=tuple(kv_heads),
        ffn_multipliers=tuple(width / dim for width in widths),
        ffn_dim_divisor=math.gcd(_DIVISOR, *widths),
        ffn_with_glu=gates == {2},
        share_input_output_layers="lm_head.weight" not in shapes,
    )
    config = _published(config) or config
    for name, shape in tensor_shapes(config).items():
        if shapes.get(name) != shape:
            found = list(shapes[name]) if name in shapes else "missing"
            raise InputError(f"tensor {name}: {list(shape)} would fit the others, it is {found}")
    return config


def _published(config: OpenELMConfig) -> OpenELMConfig | None:
    """The published config with the same shapes, if there is one."""
    shapes = tensor_shapes(config)
    for name in PUBLISHED:
        published = replace(
            OpenELMConfig.from_name(name, config.vocab_size),
            share_input_output_layers=config.share_input_output_layers,
        )
        if tensor_shapes(published) == shapes:
            return published
    return None


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    if name not in shapes:
        raise InputError(f"tensor {name} is missing; the checkpoint is incomplete")
    shape = shapes[name]
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"tensor {name} has the shape {list(shape)}, not that of a matrix")
    return shape[0], shape[1]
