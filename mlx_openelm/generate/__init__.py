"""Text from a prompt: `python -m mlx_openelm.generate`, and the function of that name."""

from ..generation.batching import BatchResponse, batch_generate
from ..generation.decoding import generate_step
from ..generation.speculative.loop import speculative_generate_step
from ..generation.stream import GenerationResponse, generate, stream_generate

__all__ = [
    "BatchResponse",
    "GenerationResponse",
    "batch_generate",
    "generate",
    "generate_step",
    "speculative_generate_step",
    "stream_generate",
]
