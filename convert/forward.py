"""The network in float32 on weights that are read as they are needed, one layer in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from mlx_openelm.backends import cpu
from mlx_openelm.checkpoint.names import EMBEDDINGS, HEAD
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.buffers import view
from mlx_openelm.model.network import attention, feed_forward
from mlx_openelm.model.quantization import Matrix
from mlx_openelm.model.weights import Layer

from .sources import LazyTensor

_ATTENTION = ("attn_norm", "attn.qkv_proj", "attn.q_norm", "attn.k_norm", "attn.out_proj")
_FEED_FORWARD = ("ffn_norm", "ffn.proj_1", "ffn.proj_2")


class Stage(NamedTuple):
    """What the network has at one place: after the embeddings, after a layer, or at its end."""

    name: str  # "embeddings", "layer 0", …, "logits"
    hidden: mx.array  # [1, L, model_dim] float32, evaluated; logits [1, L, vocab_size]
    largest: float  # magnitude of any value on the way here from the stage before


def stages(
    tensors: Mapping[str, LazyTensor], config: OpenELMConfig, tokens: list[int]
) -> Iterator[Stage]:
    """Run the network on one sequence, stage by stage.

    Args:
        tensors: by the names of a model directory; those that `config` says there are.
        config: the geometry.
        tokens: ids below `config.vocab_size`.
    """
    length, eps = len(tokens), config.rms_norm_eps
    table = tensors[EMBEDDINGS]
    x = mx.concatenate([_float32(table.rows(i, i + 1)) for i in tokens])[None]
    yield _stage("embeddings", x, [_largest(x)])
    seen = view(mx.array(0), length, length)
    for i, kv_heads in enumerate(config.num_kv_heads):
        largest: list[mx.array] = []
        layer = _layer(tensors, f"transformer.layers.{i}.", largest)
        room = (mx.zeros((1, 2 * kv_heads, length, config.head_dim)),)
        h = mx.fast.rms_norm(x, layer.attn_norm, eps)
        x = x + attention(config, layer, h, room, seen)[0]
        x = x + feed_forward(config, layer, mx.fast.rms_norm(x, layer.ffn_norm, eps))
        yield _stage(f"layer {i}", x, [*largest, _largest(x)])
    x = mx.fast.rms_norm(x, _float32(tensors["transformer.norm.weight"].read()), eps)
    head = table if config.share_input_output_layers else tensors[HEAD]
    parts = []
    for rows in head.blocks():
        parts.append(_product(x, Matrix(_float32(rows))))
        mx.eval(parts)
    logits = mx.concatenate(parts, axis=-1)
    yield _stage("logits", logits, [_largest(x), _largest(logits)])


@dataclass(frozen=True)
class _Watched(Matrix):
    """A matrix that notes the largest magnitude of what goes in and of what comes out."""

    largest: list[mx.array] = field(default_factory=list)

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(x, self)
        self.largest.extend((_largest(x), _largest(y)))
        return y


def _product(x: mx.array, matrix: Matrix) -> mx.array:
    if mx.default_device().type == mx.DeviceType.cpu and cpu.missing() is None:
        return cpu.multiply(x, matrix)
    return Matrix.__call__(matrix, x)


def _layer(tensors: Mapping[str, LazyTensor], prefix: str, largest: list[mx.array]) -> Layer:
    parts: dict[str, Matrix | mx.array | None] = {}
    for name in (*_ATTENTION, *_FEED_FORWARD):
        tensor = tensors.get(f"{prefix}{name}.weight")
        array = _float32(tensor.read()) if tensor else None
        if array is not None and array.ndim == 2:
            parts[name.rpartition(".")[2]] = _Watched(array, largest=largest)
        else:
            parts[name.rpartition(".")[2]] = array
    return Layer(**parts)  # type: ignore[arg-type]


def _stage(name: str, hidden: mx.array, largest: list[mx.array]) -> Stage:
    most = mx.max(mx.stack(largest))
    mx.eval(hidden, most)
    return Stage(name, hidden, most.item())  # type: ignore[arg-type]


def _largest(x: mx.array) -> mx.array:
    return mx.max(mx.abs(x))


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32, stream=mx.cpu)
