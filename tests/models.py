"""Small models for the tests, each with one thing out of the ordinary."""

from __future__ import annotations

import mlx.core as mx

from mlx_openelm import OpenELM, OpenELMConfig
from mlx_openelm.device import Policy

from . import reference

EVEN = {"vocab_size": 96, "model_dim": 32, "head_dim": 8, "ffn_dim_divisor": 16}
UNEVEN = {
    **EVEN,
    "num_transformer_layers": 3,
    "num_query_heads": (2, 6, 4),
    "num_kv_heads": (1, 2, 4),
    "ffn_multipliers": (0.5, 3.0, 1.5),
    "max_context_length": 600,
}

CONFIGS = {
    "scaled": OpenELMConfig.scaled(num_transformer_layers=4, **EVEN),
    "uneven": OpenELMConfig(**UNEVEN),
    "untied": OpenELMConfig(**UNEVEN, share_input_output_layers=False),
    "no q/k norm": OpenELMConfig(**UNEVEN, normalize_qk_projections=False),
    "no GLU": OpenELMConfig(**UNEVEN, ffn_with_glu=False),
    "other constants": OpenELMConfig(**UNEVEN, rope_freq_constant=500.0, rms_norm_eps=1e-2),
}


def random_model(config: OpenELMConfig, policy: Policy | None = None, seed: int = 0) -> OpenELM:
    """A float32 model with the reference's random weights."""
    weights = reference.random_weights(config, seed)
    arrays = {name: mx.array(value) for name, value in weights.items()}
    return OpenELM(config, arrays, policy=policy)
