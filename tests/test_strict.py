"""What `strict` refuses, and what it lets through."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_openelm.checkpoint.adapters import Update
from mlx_openelm.convert import adapters
from mlx_openelm.convert.sources import LazyTensor

from . import strict

HEADS = mx.zeros((2, 3, 1, 8), mx.float16)


@pytest.mark.parametrize("offset", [3, mx.array(3), mx.array([3])])
def test_one_offset_for_several_rows(offset: Any) -> None:
    assert strict.rope(HEADS, 8, offset=offset)
    assert strict.rope(HEADS[:1], 8, offset=offset) is None
    assert strict.rope(HEADS, 8, offset=mx.broadcast_to(mx.array([3]), (2,))) is None


def test_dtypes_that_part() -> None:
    assert strict.rms_norm(HEADS, mx.ones(8), 1e-6)
    assert strict.rms_norm(HEADS, mx.ones(8, mx.float16), 1e-6) is None
    assert strict.attention(HEADS, HEADS, HEADS.astype(mx.float32), scale=1.0)
    assert strict.attention(HEADS, HEADS, HEADS, scale=1.0, mask=mx.zeros((1, 1), mx.float32))
    assert strict.attention(HEADS, HEADS, HEADS, scale=1.0, mask=mx.ones((1, 1), mx.bool_)) is None
    assert strict.astype(mx.ones(1), mx.float64)
    assert strict.astype(mx.ones(1), mx.float64, stream=mx.cpu) is None


@pytest.mark.parametrize(("index", "there"), [(3, True), (-4, True), (4, False), (-5, False)])
def test_indices(index: int, there: bool) -> None:
    array, indices = mx.zeros((2, 4)), mx.array([0, index])
    assert (strict.take(array, indices, axis=1) is None) is there
    assert (strict.along_axis(array, indices[None], axis=1) is None) is there
    assert (strict.item(array, (slice(None), indices)) is None) is there
    assert (strict.item(array[0], [0, index]) is None) is there


def test_adapters_merge_into_float64_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor(name: str, value: mx.array, dtype: str) -> LazyTensor:
        return LazyTensor(name, value.shape, dtype, lambda start, stop: value[start:stop])

    base = tensor("proj_1.weight", mx.array([[1.0, 2.0]], mx.float64), "float64")
    a, b = tensor("A", mx.ones((1, 2)), "float32"), tensor("B", mx.ones((1, 1)), "float32")
    monkeypatch.setattr(mx.array, "astype", strict._checked(mx.array.astype, strict.astype))
    rows = adapters._add(base, Update(b, a, False, 0.5)).rows(0, 1)
    assert rows.dtype == mx.float64
    assert rows.tolist() == [[1.5, 2.5]]


def test_eight_bytes_are_not_scattered() -> None:
    assert strict.scatter(mx.zeros(4, mx.int64), mx.array([1]))
    assert strict.scatter(mx.zeros(4, mx.int64), slice(1)) is None
    assert strict.scatter(mx.zeros(4, mx.int32), mx.array([1])) is None


@pytest.mark.parametrize(("start", "there"), [(0, True), (2, True), (3, False), (-1, False)])
def test_slots(start: int, there: bool) -> None:
    found = strict.slice_update(mx.zeros((1, 4)), mx.zeros((1, 2)), mx.array([start]), (1,))
    assert (found is None) is there


def test_a_traced_index_has_no_values() -> None:
    def lookup(index: mx.array) -> mx.array:
        assert strict.take(mx.zeros(4), index) is None
        return index

    mx.eval(mx.compile(lookup)(mx.array([9])))
