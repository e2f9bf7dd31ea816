"""Which tensors a network has, by the names of a model directory."""

from __future__ import annotations

import math

from ..config import OpenELMConfig


def tensor_shapes(config: OpenELMConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, unquantized, in the order of the network."""
    dim, head_dim = config.model_dim, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.token_embeddings.weight": (config.vocab_size, dim)
    }
    for i, (heads, kv_heads, width) in enumerate(
        zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True)
    ):
        layer = f"transformer.layers.{i}."
        shapes[layer + "attn_norm.weight"] = (dim,)
        shapes[layer + "attn.qkv_proj.weight"] = ((heads + 2 * kv_heads) * head_dim, dim)
        if config.normalize_qk_projections:
            shapes[layer + "attn.q_norm.weight"] = (head_dim,)
            shapes[layer + "attn.k_norm.weight"] = (head_dim,)
        shapes[layer + "attn.out_proj.weight"] = (dim, heads * head_dim)
        shapes[layer + "ffn_norm.weight"] = (dim,)
        shapes[layer + "ffn.proj_1.weight"] = ((1 + config.ffn_with_glu) * width, dim)
        shapes[layer + "ffn.proj_2.weight"] = (dim, width)
    shapes["transformer.norm.weight"] = (dim,)
    if not config.share_input_output_layers:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    return shapes


def parameter_count(config: OpenELMConfig) -> int:
    """The number of weights of a network."""
    return sum(map(math.prod, tensor_shapes(config).values()))
