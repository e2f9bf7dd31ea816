"""What depends on the device is decided here."""

from __future__ import annotations

import mlx.core as mx

from . import blas


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """What to compute in, for weights stored in `stored`.

    A GPU computes in the stored dtype. MLX's CPU backend has no vector instructions for half
    precision (docs/performance.md), so there it is float32.
    """
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else stored


def describe() -> str:
    """What is computed on, and with what, in words."""
    device = mx.default_device()
    if device.type != mx.DeviceType.cpu:
        return f"{device.type.name.upper()} ({mx.device_info().get('device_name', 'unknown')})"
    return f"CPU, in float32, BLAS: {blas.in_use or 'that of MLX'}"
