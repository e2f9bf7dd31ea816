"""Which of the published models a network is."""

from __future__ import annotations

from mlx_openelm.config import PUBLISHED, OpenELMConfig
from mlx_openelm.model.shapes import tensor_shapes


def published_name(config: OpenELMConfig) -> str | None:
    """The published model with the same tensors, whatever its vocabulary; None if there is none."""
    for name in PUBLISHED:
        published = OpenELMConfig.from_name(name, config.vocab_size)
        if tensor_shapes(published) == tensor_shapes(config):
            return name
    return None
