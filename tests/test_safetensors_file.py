"""Safetensors files: real ones give their values, damaged ones one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm.checkpoint import safetensors as headers
from mlx_openelm.checkpoint.safetensors import MAX_HEADER
from mlx_openelm.convert.sources import open_source, safetensors_file
from mlx_openelm.convert.sources.lazy import DTYPES
from mlx_openelm.convert.sources.safetensors_file import open_safetensors
from mlx_openelm.errors import InputError

from .checkpoints import EDITS, mutated, raw, safetensors


def entry(start: object, end: object, shape: object = (2, 2), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def arrays() -> dict[str, mx.array]:
    """One of every dtype."""
    values = np.arange(1, 7).reshape(2, 3)
    return {
        name: mx.array(values.astype(np.float64 if dtype == mx.float64 else np.int32), dtype=dtype)
        for name, (_, dtype) in DTYPES.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file written by MLX, with every dtype that it writes."""
    path = tmp_path_factory.mktemp("safetensors") / "x.safetensors"
    kept = {name: array for name, array in arrays().items() if name != "float64"}
    mx.save_safetensors(str(path), kept, {"format": "mlx"})
    return path


def test_values_are_those_that_mlx_wrote(written: Path) -> None:
    source = open_source(written)
    assert source.kind == "safetensors file"
    loaded = mx.load(str(written))
    assert isinstance(loaded, dict)
    assert source.tensors.keys() == loaded.keys() == DTYPES.keys() - {"float64"}
    for name, array in loaded.items():
        lazy = source.tensors[name]
        found = lazy.read()
        assert (lazy.name, lazy.dtype, lazy.shape, lazy.nbytes) == (
            name,
            name,
            (2, 3),
            array.nbytes,
        )
        assert found.dtype == array.dtype
        assert found.tolist() == array.tolist()


@pytest.mark.parametrize("start", [b"\x80\x02", b"PK"])
def test_a_header_whose_length_looks_like_another_format(tmp_path: Path, start: bytes) -> None:
    length = int.from_bytes(start, "little")
    header = json.dumps({"x": entry(0, 16)}).encode().ljust(length)
    path = tmp_path / "x"
    path.write_bytes(safetensors(header, bytes(16)))
    assert path.read_bytes().startswith(start)
    assert open_source(path).kind == "safetensors file"


def test_values_are_those_that_safetensors_wrote(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    values = {
        name: np.random.default_rng(0).normal(size=(3, 2)).astype(name)
        for name in ("float64", "float32", "float16")
    }
    numpy.save_file(values, path, {"note": "é"})
    for name, lazy in open_safetensors(path).items():
        assert raw(lazy.read()) == values[name].tobytes()


def test_nothing_is_read_but_the_header(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []

    def spy(path: Path, offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return read_range(path, offset, size)

    read_range = safetensors_file.read_range
    for module in (headers, safetensors_file):
        monkeypatch.setattr(module, "read_range", spy)
    tensors = open_safetensors(written)
    length = struct.unpack("<Q", written.read_bytes()[:8])[0]
    assert reads == [(0, 8), (8, length)]
    tensors["int16"].read()
    assert [size for _, size in reads[2:]] == [12]


BAD = {
    "nothing": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "a header past the end": (safetensors({}, length=3), "truncated"),
    "a header of 8 GB": (safetensors({}, length=8 << 30), f"claims a header of {8 << 30} bytes"),
    "a header of 2**64 - 1 bytes": (safetensors({}, length=2**64 - 1), "truncated or not"),
    "a large header": (safetensors(b"{" + b" " * MAX_HEADER), "more than any model needs"),
    "no JSON": (safetensors(b"{nonsense"), "not a JSON file"),
    "no object": (safetensors(b"[]"), "doesn't begin with {"),
    "a byte order mark": (safetensors(b"\xef\xbb\xbf{}"), "doesn't begin with {"),
    "UTF-16": (safetensors("{}".encode("utf-16")), "doesn't begin with {"),
    "metadata of nothing": (safetensors({"__metadata__": 0}), "__metadata__"),
    "invalid UTF-8": (safetensors(b'{"\xff": 1}'), "not UTF-8"),
    "deep nesting": (safetensors(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "a key twice": (
        safetensors(b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
        "'dtype' is there twice",
    ),
    "a tensor twice": (safetensors(b'{"a": 1, "a": 2}'), "'a' is there twice"),
    "a number of many digits": (safetensors(b'{"a": ' + b"9" * 300 + b"}"), "300 digits"),
    "no entry": (safetensors({"a": None}), "'a': its entry needs"),
    "a missing field": (safetensors({"a": {"dtype": "F32", "shape": []}}), "its entry needs"),
    "a field too many": (safetensors({"a": entry(0, 16) | {"x": 1}}, bytes(16)), "no more"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata of text": (safetensors({"__metadata__": "a"}), "__metadata__"),
    "an unknown dtype": (safetensors({"a": entry(0, 4, dtype="F7_E4M2")}, bytes(4)), "'F7_E4M2'"),
    "a dtype of a list": (safetensors({"a": entry(0, 4, dtype=["F32"])}, bytes(4)), "dtype"),
    "a shape of text": (safetensors({"a": entry(0, 16, "22")}, bytes(16)), "impossible shape"),
    "no shape": (safetensors({"a": entry(0, 16, None)}, bytes(16)), "impossible shape"),
    "no offsets": (
        safetensors({"a": {"dtype": "F32", "shape": [], "data_offsets": None}}),
        "not two integers",
    ),
    "a negative size": (safetensors({"a": entry(0, 16, (-2, -2))}, bytes(16)), "impossible shape"),
    "a size of a flag": (safetensors({"a": entry(0, 4, (True,))}, bytes(4)), "impossible shape"),
    "a fractional size": (safetensors({"a": entry(0, 8, (2.0,))}, bytes(8)), "impossible shape"),
    "a size that overflows": (safetensors({"a": entry(0, 0, (2**32,) * 2)}), "impossible shape"),
    "many dimensions": (safetensors({"a": entry(0, 4, (1,) * 9)}, bytes(4)), "9 dimensions"),
    "another size": (safetensors({"a": entry(0, 12)}, bytes(12)), "12 bytes are not float32"),
    "another dtype": (
        safetensors({"a": entry(0, 16, dtype="F16")}, bytes(16)),
        "16 bytes are not float16 [2, 2]",
    ),
    "an offset past the end": (safetensors({"a": entry(0, 16)}, bytes(15)), "byte 16 of 15"),
    "a huge offset": (safetensors({"a": entry(2**62, 2**62 + 16)}, bytes(16)), "truncated"),
    "a negative offset": (safetensors({"a": entry(-16, 0)}, bytes(16)), "out of order"),
    "offsets reversed": (safetensors({"a": entry(16, 0)}, bytes(16)), "out of order"),
    "offsets of text": (safetensors({"a": entry("0", "16")}, bytes(16)), "not two integers"),
    "an overlap": (
        safetensors({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
        "'b' overlaps the one before",
    ),
    "the same place twice": (
        safetensors({"a": entry(0, 16), "b": entry(0, 16)}, bytes(16)),
        "'b' overlaps the one before",
    ),
    "a gap": (safetensors({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)), "'b' has a gap"),
    "a gap at the start": (safetensors({"a": entry(4, 20)}, bytes(20)), "'a' has a gap"),
    "bytes at the end": (safetensors({"a": entry(0, 16)}, bytes(17)), "1 bytes at the end"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused(name: str, tmp_path: Path) -> None:
    data, reason = BAD[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_safetensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_padding_and_order_are_as_the_format_allows(tmp_path: Path) -> None:
    header = b'{"b": {"dtype":"U8","shape":[3],"data_offsets":[1,4]}, '
    header += b'"a": {"dtype":"BOOL","shape":[],"data_offsets":[0,1]}}    '
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(header, b"\1\2\3\4"))
    tensors = open_safetensors(path)
    assert tensors["a"].read().tolist() is True
    assert tensors["b"].read().tolist() == [2, 3, 4]


def test_an_empty_tensor_opens_and_refuses_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"a": entry(0, 0, (0, 2**31 - 1, 2**31 - 1))}))
    with pytest.raises(InputError, match="'a' has no elements"):
        open_safetensors(path)["a"].read()


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"a": entry(0, 16)}, bytes(16)))
    lazy = open_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="it is truncated"):
        lazy.read()


def test_every_truncation_is_refused(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    path = tmp_path / "x.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            open_safetensors(path)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(EDITS),
            st.integers(0, 2**20),
            st.integers(0, 64),
            st.integers(0, 2**20),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_file_gives_what_it_says_or_is_refused(
    written: Path, tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, int, int, int]]
) -> None:
    data = mutated(written.read_bytes(), edits)
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    message = ""
    try:
        tensors = open_safetensors(path)
        for lazy in tensors.values():
            array = lazy.read()
            assert array.shape == lazy.shape
            assert raw(array) in data
        assert sum(lazy.nbytes for lazy in tensors.values()) <= len(data)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
