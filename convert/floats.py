"""What floating-point formats can hold: casting that loses no value, and the choice of a dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_openelm.config import OpenELMConfig, token_ids
from mlx_openelm.dtypes import dtype_name
from mlx_openelm.errors import InputError

from .forward import stages
from .sources import LazyTensor

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FLOAT16_MAX = 65504.0
_UNSIGNED = {2: (mx.uint16, np.int16, 0x7FFF), 4: (mx.uint32, np.int32, 0x7FFF_FFFF)}
_TRIAL_TOKENS = 16


def largest(array: mx.array) -> float:
    """The largest magnitude of an evaluated array of 16 or 32-bit floats; inf or NaN if it has one.

    IEEE 754: without their signs, values are ordered as their bits are, with infinity and then
    NaN at the end. As signed integers the largest is the largest positive value; as unsigned ones
    it is the largest negative value, if there is any.
    """
    unsigned, signed, mask = _UNSIGNED[array.dtype.size]
    bits = np.asarray(array.view(unsigned))
    most = max(int(bits.view(signed).max()), int(bits.max()) & mask)
    return mx.array(most, unsigned).view(array.dtype).item()  # type: ignore[return-value]


def cast(array: mx.array, dtype: mx.Dtype, name: str, allow_nonfinite: bool = False) -> mx.array:
    """`array` in `dtype`, evaluated.

    Raises:
        InputError: when it holds NaN or an infinity, or a value that is one in `dtype`, unless
            `allow_nonfinite`; names the tensor.
    """
    result = array.astype(dtype, stream=mx.cpu)
    mx.eval(result)
    if not allow_nonfinite and not math.isfinite(largest(result)):
        value = mx.max(mx.abs(array.astype(mx.float32, stream=mx.cpu))).item()
        if not math.isfinite(value):  # type: ignore[arg-type]
            raise InputError(
                f"tensor {name} holds a value that is not finite (NaN or infinity); "
                "converting with --allow-nonfinite takes it as it is"
            )
        raise InputError(
            f"tensor {name} holds {value:.4g}, more than {dtype_name(dtype)} can; use "
            "--dtype bfloat16"
        )
    return result


def choose_dtype(
    tensors: Mapping[str, LazyTensor],
    config: OpenELMConfig,
    wanted: str | None,
    allow_nonfinite: bool,
) -> tuple[mx.Dtype, list[str]]:
    """The dtype to store in, and notes.

    Without a wish: float16 if all tensors are float16 already, else bfloat16. float16 has to
    pass a trial: a forward pass in float32 none of whose values is too large for it.

    Raises:
        InputError: when float16 is wished for and doesn't pass.
    """
    stored = {tensor.dtype for tensor in tensors.values()}
    chosen = wanted or ("float16" if stored == {"float16"} else "bfloat16")
    if chosen == "float16" and not allow_nonfinite:
        problem = _overflow(tensors, config)
        if problem and wanted:
            raise InputError(
                f"{problem}: the model would overflow; use --dtype bfloat16 (or, if it will only "
                "ever be computed in float32, --allow-nonfinite)"
            )
        if problem:
            return mx.bfloat16, [f"bfloat16, not float16 as it was: {problem}"]
    return DTYPES[chosen], []


def _overflow(tensors: Mapping[str, LazyTensor], config: OpenELMConfig) -> str | None:
    """Where a value gets too large for float16, in words; None if nowhere.

    Values that aren't finite in float32 are not reported here: `cast` names their tensor.
    """
    for stage in stages(tensors, config, trial_tokens(config, _TRIAL_TOKENS)):
        if not math.isfinite(stage.largest):
            return None
        if stage.largest > FLOAT16_MAX:
            return (
                f"{stage.name} reaches {stage.largest:.3g} in a trial run, more than float16's "
                f"{FLOAT16_MAX:.0f}"
            )
    return None


def trial_tokens(config: OpenELMConfig, count: int) -> list[int]:
    """`<s>`, then `count - 1` ids from all over the vocabulary, always the same."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, count - 1).tolist()
    bos = [*token_ids(config.bos_token_id), 1][0]
    first = min(bos, config.vocab_size - 1)
    return [first, *ids][: config.max_context_length]
