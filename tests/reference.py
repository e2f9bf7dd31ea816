"""OpenELM in float64 NumPy: what every faster implementation is compared with.

Written from the paper (arXiv 2404.14619) and Apple's published code, not from this project's
model. It recomputes the whole sequence, has no cache, and is meant to be read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlx_openelm.config import OpenELMConfig

Array = NDArray[np.float64]


def logits(
    config: OpenELMConfig,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    visible: np.ndarray | None = None,
) -> NDArray[np.float64]:
    """Next-token logits [B, L, vocab] of `tokens` [B, L], from the tensors of `shapes(config)`.

    `visible` [L, L]: which positions each one attends to; by default itself and all before it.
    """
    if visible is None:
        visible = np.tri(tokens.shape[1], dtype=bool)
    tensors = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    embedding = tensors["transformer.token_embeddings.weight"]
    x = embedding[tokens]
    for i in range(config.num_transformer_layers):
        prefix = f"transformer.layers.{i}."
        layer = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        x = x + attention(config, i, layer, rms_norm(x, layer["attn_norm.weight"], config), visible)
        x = x + feed_forward(config, layer, rms_norm(x, layer["ffn_norm.weight"], config))
    x = rms_norm(x, tensors["transformer.norm.weight"], config)
    head = embedding if config.share_input_output_layers else tensors["lm_head.weight"]
    return x @ head.T


def rms_norm(x: Array, weight: Array, config: OpenELMConfig) -> Array:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def attention(
    config: OpenELMConfig, i: int, layer: dict[str, Array], x: Array, visible: np.ndarray
) -> Array:
    """Grouped-query attention of layer `i`, [B, L, model_dim] -> the same."""
    batch, length, _ = x.shape
    heads, kv_heads = config.num_query_heads[i], config.num_kv_heads[i]

    # Rows of qkv_proj: all query heads, all key heads, all value heads.
    qkv = x @ layer["attn.qkv_proj.weight"].T
    qkv = qkv.reshape(batch, length, heads + 2 * kv_heads, config.head_dim).swapaxes(1, 2)
    q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)

    # Normalised first, rotated second.
    if config.normalize_qk_projections:
        q = rms_norm(q, layer["attn.q_norm.weight"], config)
        k = rms_norm(k, layer["attn.k_norm.weight"], config)
    q, k = rope(q, config), rope(k, config)

    # Query heads 0..g-1 share key/value head 0, the next g share head 1, and so on.
    k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
    scores = q @ k.swapaxes(-1, -2) * config.head_dim**-0.5
    scores = np.where(visible, scores, -np.inf)
    out = softmax(scores) @ v
    return out.swapaxes(1, 2).reshape(batch, length, -1) @ layer["attn.out_proj.weight"].T


def rope(x: Array, config: OpenELMConfig) -> Array:
    """Rotary embedding of [..., L, head_dim]: element i turns with element i + head_dim / 2."""
    length, dim = x.shape[-2:]
    frequency = config.rope_freq_constant ** (-np.arange(0, dim, 2) / dim)
    angle = np.arange(length)[:, None] * frequency
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def feed_forward(config: OpenELMConfig, layer: dict[str, Array], x: Array) -> Array:
    """The gated feed-forward network, or the plain one without GLU."""
    y = x @ layer["ffn.proj_1.weight"].T
    if config.ffn_with_glu:
        y1, y2 = np.split(y, 2, axis=-1)
        y = silu(y1) * y2
    else:
        y = silu(y)
    return y @ layer["ffn.proj_2.weight"].T


def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def shapes(config: OpenELMConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network by name, in the order of the computation."""
    dim, head = config.model_dim, config.head_dim
    result: dict[str, tuple[int, ...]] = {
        "transformer.token_embeddings.weight": (config.vocab_size, dim)
    }
    per_layer = zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True)
    for i, (heads, kv_heads, width) in enumerate(per_layer):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (dim,),
            "attn.qkv_proj": ((heads + 2 * kv_heads) * head, dim),
            "attn.q_norm": (head,),
            "attn.k_norm": (head,),
            "attn.out_proj": (dim, heads * head),
            "ffn_norm": (dim,),
            "ffn.proj_1": (2 * width if config.ffn_with_glu else width, dim),
            "ffn.proj_2": (dim, width),
        }
        if not config.normalize_qk_projections:
            del layer["attn.q_norm"], layer["attn.k_norm"]
        result |= {f"transformer.layers.{i}.{name}.weight": s for name, s in layer.items()}
    result["transformer.norm.weight"] = (dim,)
    if not config.share_input_output_layers:
        result["lm_head.weight"] = (config.vocab_size, dim)
    return result


def random_weights(config: OpenELMConfig, seed: int) -> dict[str, np.ndarray]:
    """Float32 tensors that keep activations near 1, norm weights in [0.5, 1.5).

    No tensor can be left out, transposed or taken for another without the logits showing it.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, shape[-1] ** -0.5, shape)
        weights[name] = value.astype(np.float32)
    return weights
