"""Text from a prompt: `python -m mlx_openelm.generate`, and the function of that name."""

from ..decoding import generate, stream_generate

__all__ = ["generate", "stream_generate"]
