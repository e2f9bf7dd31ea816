"""The network, and only the network.

OpenELM (arXiv 2404.14619, section 2), as published in CoreNet's `general_gpt.py`: pre-norm
decoder layers, each with its own number of heads and its own FFN width; RMSNorm on queries and
keys, rotary positions, grouped-query attention, a gated FFN, tied embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import mlx.core as mx

from .cache import KVCache, View, write
from .config import OpenELMConfig
from .errors import InputError
from .quantization import Matrix, Quantization
from .shapes import tensor_shapes


@dataclass(frozen=True)
class Layer:
    """The weights of one layer. The field names are those of the tensors on disk."""

    attn_norm: mx.array  # [model_dim]
    qkv_proj: Matrix  # rows: all query heads, all key heads, all value heads
    q_norm: mx.array | None  # [head_dim]
    k_norm: mx.array | None
    out_proj: Matrix
    ffn_norm: mx.array
    proj_1: Matrix  # rows: gate, then up (with GLU)
    proj_2: Matrix


@dataclass(frozen=True)
class Weights:
    """All weights of a network, in the dtype it computes in."""

    token_embeddings: Matrix
    layers: tuple[Layer, ...]
    norm: mx.array
    lm_head: Matrix  # the embeddings again, when they are tied


def attention(
    config: OpenELMConfig,
    layer: Layer,
    x: mx.array,
    keys: mx.array,
    values: mx.array,
    view: View,
) -> tuple[mx.array, mx.array, mx.array]:
    """`x` [B, L, model_dim] → ([B, L, model_dim], the buffers with the new keys and values)."""
    B, L, _ = x.shape
    kv_heads, head_dim = keys.shape[1], config.head_dim
    qkv = layer.qkv_proj(x).reshape(B, L, -1, head_dim).transpose(0, 2, 1, 3)
    q, k, v = mx.split(qkv, (-2 * kv_heads, -kv_heads), axis=1)
    if layer.q_norm is not None:
        q = mx.fast.rms_norm(q, layer.q_norm, config.rms_norm_eps)
        k = mx.fast.rms_norm(k, layer.k_norm, config.rms_norm_eps)
    q, k = (_rotate(heads, config, view.offset) for heads in (q, k))
    keys, values = write(keys, k, view), write(values, v, view)
    y = mx.fast.scaled_dot_product_attention(q, keys, values, scale=head_dim**-0.5, mask=view.mask)
    return layer.out_proj(y.transpose(0, 2, 1, 3).reshape(B, L, -1)), keys, values


def _rotate(heads: mx.array, config: OpenELMConfig, offset: mx.array) -> mx.array:
    return mx.fast.rope(
        heads,
        config.head_dim,
        traditional=False,
        base=config.rope_freq_constant,
        scale=1.0,
        offset=offset,
    )


def feed_forward(config: OpenELMConfig, layer: Layer, x: mx.array) -> mx.array:
    """`x` [B, L, model_dim] → the same shape."""
    h = layer.proj_1(x)
    if not config.ffn_with_glu:
        return layer.proj_2(_silu(h))
    gate, up = mx.split(h, 2, axis=-1)
    return layer.proj_2(_silu(gate) * up)


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def step(
    config: OpenELMConfig,
    weights: Weights,
    tokens: mx.array,
    keys: list[mx.array],
    values: list[mx.array],
    view: View,
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """One pass over `tokens` [B, L] int32: pure, from cache buffers to cache buffers.

    Returns:
        Hidden states [B, L, model_dim] after the final norm, and the new keys and values.
    """
    eps = config.rms_norm_eps
    x = weights.token_embeddings.take(tokens, weights.norm.dtype)
    new_keys, new_values = [], []
    for layer, k, v in zip(weights.layers, keys, values, strict=True):
        h = mx.fast.rms_norm(x, layer.attn_norm, eps)
        h, k, v = attention(config, layer, h, k, v, view)
        x = x + h
        x = x + feed_forward(config, layer, mx.fast.rms_norm(x, layer.ffn_norm, eps))
        new_keys.append(k)
        new_values.append(v)
    return mx.fast.rms_norm(x, weights.norm, eps), new_keys, new_values


class OpenELM:
    """A network with its weights: `model(tokens, cache) -> logits`.

    Args:
        config: the geometry.
        arrays: tensors by their name on disk (`transformer.layers.0.attn.qkv_proj.weight`, …; a
            quantized matrix has `.scales` and perhaps `.biases` beside its `.weight`). Without
            it the weights are random.
        quantization: the schemes of the quantized matrices.
        dtype: what to compute in; floating-point tensors are cast to it.

    Raises:
        InputError: when a tensor is missing, too many, or of the wrong shape; names it.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        arrays: Mapping[str, mx.array] | None = None,
        quantization: Quantization | None = None,
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        self.config = config
        self.quantization = quantization
        self.dtype = dtype
        if arrays is None:
            arrays = random_arrays(config)
        self.weights = _weights(config, arrays, quantization, dtype)

    def __call__(
        self, tokens: mx.array, cache: KVCache | None = None, last_only: bool = False
    ) -> mx.array:
        """Logits of the tokens that follow.

        Args:
            tokens: [B, L] integers.
            cache: of the B sequences; the tokens continue what it holds and are added to it.
            last_only: only the last position's logits, so that no [L, vocab_size] matrix is made.

        Returns:
            [B, L, vocab_size], or [B, 1, vocab_size], in `dtype`.

        Raises:
            InputError: when the tokens don't fit into the model's context.
        """
        if cache is None:
            cache = self.make_cache()
        batch, length = tokens.shape
        cache.reserve(batch, length)
        hidden, cache.keys, cache.values = step(
            self.config, self.weights, tokens, cache.keys, cache.values, cache.view(length)
        )
        cache.offset += length
        return self.weights.lm_head(hidden[:, -1:] if last_only else hidden)

    def make_cache(self, max_size: int | None = None) -> KVCache:
        """An empty cache for this model; with `max_size` the context slides (see `KVCache`)."""
        return KVCache(self.config, max_size, self.dtype)

    def parameters(self) -> dict[str, mx.array]:
        """All tensors by their name on disk, as they are held in memory."""
        return dict(_named(self.config, self.weights))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as held in memory."""
        return sum(array.nbytes for array in self.parameters().values())


def random_arrays(config: OpenELMConfig) -> dict[str, mx.array]:
    """Weights of standard deviation 0.02 and norms of 1, from MLX's global random state."""
    return {
        name: mx.random.normal(shape, scale=0.02) if len(shape) == 2 else mx.ones(shape)
        for name, shape in tensor_shapes(config).items()
    }


_MATRICES = {"qkv_proj": "attn.", "out_proj": "attn.", "proj_1": "ffn.", "proj_2": "ffn."}
_VECTORS = {"attn_norm": "", "ffn_norm": "", "q_norm": "attn.", "k_norm": "attn."}


def _weights(
    config: OpenELMConfig,
    arrays: Mapping[str, mx.array],
    quantization: Quantization | None,
    dtype: mx.Dtype,
) -> Weights:
    left = dict(arrays)
    shapes = tensor_shapes(config)

    def take(name: str, shape: tuple[int, ...]) -> mx.array:
        if name not in left:
            raise InputError(f"tensor {name} is missing; {list(shape)} is expected")
        array = left.pop(name)
        if array.shape != shape:
            raise InputError(
                f"tensor {name} has the shape {list(array.shape)}; {list(shape)} is expected"
            )
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floating else array

    def vector(name: str) -> mx.array:
        return take(name + ".weight", shapes[name + ".weight"])

    def matrix(module: str) -> Matrix:
        rows, columns = shapes[module + ".weight"]
        if module + ".scales" not in left:
            return Matrix(take(module + ".weight", (rows, columns)))
        scheme = quantization.scheme(module) if quantization else None
        if scheme is None:
            raise InputError(f"tensor {module} is quantized, but the config doesn't say how")
        groups = (rows, columns // scheme.group_size)
        return Matrix(
            take(module + ".weight", (rows, columns * scheme.bits // 32)),
            take(module + ".scales", groups),
            take(module + ".biases", groups) if scheme.mode == "affine" else None,
            scheme,
        )

    embeddings = matrix("transformer.token_embeddings")
    layers = []
    for i in range(config.num_transformer_layers):
        prefix = f"transformer.layers.{i}."
        parts: dict[str, Matrix | mx.array | None] = {
            name: matrix(prefix + block + name) for name, block in _MATRICES.items()
        }
        for name, block in _VECTORS.items():
            wanted = prefix + block + name + ".weight" in shapes
            parts[name] = vector(prefix + block + name) if wanted else None
        layers.append(Layer(**parts))  # type: ignore[arg-type]
    weights = Weights(
        token_embeddings=embeddings,
        layers=tuple(layers),
        norm=vector("transformer.norm"),
        lm_head=embeddings if config.share_input_output_layers else matrix("lm_head"),
    )
    if left:
        raise InputError(f"tensor {min(left)} is not part of the model")
    return weights


def _named(config: OpenELMConfig, weights: Weights) -> Iterator[tuple[str, mx.array]]:
    """The inverse of `_weights`."""

    def named(module: str, value: Matrix | mx.array) -> Iterator[tuple[str, mx.array]]:
        if isinstance(value, Matrix):
            yield from ((f"{module}.{part}", array) for part, array in value.arrays())
        else:
            yield f"{module}.weight", value

    yield from named("transformer.token_embeddings", weights.token_embeddings)
    for i, layer in enumerate(weights.layers):
        for field in fields(layer):
            value = getattr(layer, field.name)
            block = _MATRICES.get(field.name, _VECTORS.get(field.name, ""))
            if value is not None:
                yield from named(f"transformer.layers.{i}.{block}{field.name}", value)
    yield from named("transformer.norm", weights.norm)
    if not config.share_input_output_layers:
        yield from named("lm_head", weights.lm_head)
