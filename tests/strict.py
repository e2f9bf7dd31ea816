"""MLX's operations as Metal takes them: what its kernels would misread is refused.

MLX's CPU backend broadcasts, converts and computes what its Metal backend reads past, leaves out or
doesn't have. With `install`, this package's calls are checked before they are made; calls of other
packages are left alone. Read in MLX 0.32's `backend/metal` (rope.cpp, slicing.cpp, indexing.cpp,
scaled_dot_product_attention.cpp, kernels/indexing/*.h), and in its issues 3494, 3795 and 3949.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

OURS = ("mlx_openelm", "convert", "benchmarks")


class Misread(AssertionError):
    """A call that Metal would get wrong."""


def install() -> None:
    """Check the calls of this package from now on."""
    for owner, name, check in CHECKS:
        setattr(owner, name, _checked(getattr(owner, name), check))
    at = mx.array.at
    mx.array.at = property(lambda array: _At(array, at.__get__(array)))  # type: ignore[method-assign,misc]


class _At:
    """`array.at`, whose indices are checked as those of `array[…]`."""

    def __init__(self, array: mx.array, at: Any) -> None:
        self._array, self._at = array, at

    def __getitem__(self, index: Any) -> Any:
        if complaint := scatter(self._array, index):
            raise Misread(f"array.at: {complaint}")
        return self._at[index]


def _checked(call: Callable[..., Any], check: Callable[..., str | None]) -> Callable[..., Any]:
    @functools.wraps(call)
    def checked(*args: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] in OURS:
            complaint = check(*args, **options)
            if complaint:
                raise Misread(f"mx.{call.__name__}: {complaint}")
        return call(*args, **options)

    return checked


def rope(x: mx.array, *_: Any, offset: Any, **__: Any) -> str | None:
    """Of one offset and several rows, the kernels read beyond it, or compute the first row only."""
    if x.shape[0] == 1 or (isinstance(offset, mx.array) and offset.shape == (x.shape[0],)):
        return None
    shape = offset.shape if isinstance(offset, mx.array) else "int"
    return f"{x.shape[0]} rows and an offset of shape {shape}"


def rms_norm(x: mx.array, weight: mx.array, *_: Any, **__: Any) -> str | None:
    """A weight of another dtype promotes the result, and all that follows, to float32."""
    if weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        return f"x {x.dtype} {x.shape}, weight {weight.dtype} {weight.shape}"
    return None


def attention(
    q: mx.array, k: mx.array, v: mx.array, *_: Any, mask: Any = None, **__: Any
) -> str | None:
    """The kernels are instantiated for one dtype, and for a mask of booleans or of that dtype."""
    if not q.dtype == k.dtype == v.dtype:
        return f"queries {q.dtype}, keys {k.dtype}, values {v.dtype}"
    if isinstance(mask, mx.array) and mask.dtype not in (mx.bool_, q.dtype):
        return f"a mask of {mask.dtype} for {q.dtype}"
    return None


def take(array: mx.array, indices: Any, axis: int | None = None, **_: Any) -> str | None:
    """No kernel looks whether an index is there."""
    return _outside(indices, array.size if axis is None else array.shape[axis])


def along_axis(array: mx.array, indices: mx.array, *_: Any, axis: int, **__: Any) -> str | None:
    """As `take`."""
    return _outside(indices, array.shape[axis])


def item(array: mx.array, index: Any, *_: Any) -> str | None:
    """As `take`, for indices that are arrays or lists, one for each axis."""
    parts = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [p for p in parts if p is Ellipsis] or any(p is None for p in parts):
        return None
    for axis, part in enumerate(parts):
        if isinstance(part, mx.array) and part.dtype == mx.bool_:
            return None
        if isinstance(part, (mx.array, list)):
            complaint = _outside(part, array.shape[axis])
            if complaint:
                return complaint
    return None


def scatter(array: mx.array, index: Any, *_: Any) -> str | None:
    """As `item`; and Metal has no atomic operations on eight bytes."""
    parts = index if isinstance(index, tuple) else (index,)
    if array.dtype.size == 8 and any(isinstance(part, (mx.array, list)) for part in parts):
        return f"scattering into {array.dtype}"
    return item(array, index)


def slice_update(
    array: mx.array, update: mx.array, start: mx.array, axes: Any, **_: Any
) -> str | None:
    """The kernel writes where the start says, in the buffer or beyond it."""
    for at, axis in zip(_values(start) or [], axes, strict=False):
        if not 0 <= at <= array.shape[axis] - update.shape[axis]:
            return f"{update.shape[axis]} slots from {at} on, of {array.shape[axis]}"
    return None


def astype(array: mx.array, dtype: mx.Dtype, stream: Any = None) -> str | None:
    """Metal has no float64."""
    if mx.float64 in (array.dtype, dtype) and (stream is None or stream != mx.cpu):
        return f"from {array.dtype} to {dtype} on the default device"
    return None


CHECKS: list[tuple[Any, str, Callable[..., str | None]]] = [
    (mx.fast, "rope", rope),
    (mx.fast, "rms_norm", rms_norm),
    (mx.fast, "scaled_dot_product_attention", attention),
    (mx, "take", take),
    (mx, "take_along_axis", along_axis),
    (mx, "put_along_axis", along_axis),
    (mx, "slice_update", slice_update),
    (mx.array, "__getitem__", item),
    (mx.array, "__setitem__", scatter),
    (mx.array, "astype", astype),
]


def _outside(indices: Any, size: int) -> str | None:
    values = _values(indices if isinstance(indices, mx.array) else mx.array(indices))
    wrong = [i for i in values or [] if not -size <= i < size]
    return f"index {wrong[0]} of {size}" if wrong else None


def _values(indices: mx.array) -> list[int] | None:
    """The integers in an array; None while it is traced and has none."""
    try:
        return [int(i) for i in mx.reshape(indices, (-1,)).tolist()]  # type: ignore[union-attr]
    except ValueError:  # [eval] … during function transformations
        return None
