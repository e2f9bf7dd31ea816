"""What depends on the device: one policy, decided here, printable and overridable."""

from __future__ import annotations

import os
from dataclasses import dataclass

import mlx.core as mx

from .backends import cpu
from .backends.memory import available_memory
from .dtypes import dtype_name
from .errors import InputError

VARIABLE = "MLX_OPENELM_POLICY"  # "gpu": a GPU's policy on any device
COMPILE_AFTER = 2  # a length that has come twice will come again


@dataclass(frozen=True)
class Policy:
    """How a network is computed.

    Attributes:
        name: the device, in words.
        dtype: what to compute in; None: in what the weights are stored in.
        native: by the C library of `backends.cpu`, not by MLX's operations (`network`).
        compiled: steps are compiled.
        compile_after: how many short steps of a length aren't: tracing takes longer than they do.
        prefill_step: tokens of a prompt that one step takes.
        memory: bytes that quantized weights may take when they are dequantized once, at load,
            unless the kernels multiply them fast as they are; 0: all are multiplied so.
    """

    name: str
    dtype: mx.Dtype | None = None
    native: bool = False
    compiled: bool = True
    compile_after: int = 0
    prefill_step: int = 512
    memory: int = 0

    @property
    def overlapped(self) -> bool:
        """Whether the device computes a step while the next one is built."""
        return not self.native

    def dequantize(self, parameters: int) -> bool:
        """Whether so many quantized weights are dequantized at load, into float32."""
        return 4 * parameters <= self.memory

    def __str__(self) -> str:
        parts = [
            self.name,
            f"computing in {dtype_name(self.dtype) if self.dtype else 'the dtype of the weights'}",
            "own C library" if self.native else "MLX's kernels",
            "compiled" if self.compiled else "not compiled",
        ]
        if self.memory:
            which = "but for 4 and 8 bits " if self.native else ""
            parts.append(f"quantized weights {which}dequantized once where memory allows")
        return ", ".join(parts)


def policy() -> Policy:
    """What suits MLX's default device, or what `MLX_OPENELM_POLICY` names.

    `MLX_OPENELM_POLICY=gpu` computes on a CPU as on a GPU: the same dtypes, operations and compiled
    steps, so that what a GPU runs can be tested without one. It is slow.

    Metal and CUDA have kernels for half precision, quantized matrices, norms, RoPE and attention.
    MLX's CPU backend has no vector instructions for half precision, and multiplies a quantized
    matrix slower than its values; compiling a step would have it run a C++ compiler. So on a CPU
    a step is computed in float32, by a C library of this package (docs/performance.md).

    Raises:
        InputError: when the variable names no policy.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "gpu"):
        raise InputError(f"{VARIABLE}={wanted}: the only value is gpu; unset it for the default")
    on_gpu = mx.default_device().type != mx.DeviceType.cpu
    if on_gpu or wanted:
        name = mx.device_info().get("device_name", "GPU") if on_gpu else f"CPU, {VARIABLE}=gpu"
        return Policy(str(name), compile_after=COMPILE_AFTER)
    return Policy(
        _cpu(),
        mx.float32,
        native=cpu.missing() is None,
        compiled=False,
        memory=available_memory() // 2,
    )


def _cpu() -> str:
    missing = cpu.missing()
    return "CPU" if missing is None else f"CPU, many times slower than it could be: {missing}"


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """What to compute in, for weights stored in `stored`."""
    return policy().dtype or stored
