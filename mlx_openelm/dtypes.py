"""Names of MLX's dtypes."""

from __future__ import annotations

import mlx.core as mx


def dtype_name(dtype: mx.Dtype | mx.DtypeCategory) -> str:
    """The name of an MLX dtype, such as "bfloat16"; PyTorch's, for those that it has too."""
    return str(dtype).removeprefix("mlx.core.")
