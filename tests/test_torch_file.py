"""Files of torch.save: real ones give their values, damaged ones one line."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm.convert.sources import LazyTensor, open_source, zip_directory
from mlx_openelm.convert.sources import torch_file as reader
from mlx_openelm.convert.sources.torch_file import open_torch
from mlx_openelm.errors import InputError
from mlx_openelm.files import read_range

from .checkpoints import (
    DEFLATED,
    EDITS,
    ENCRYPTED,
    FIXTURES,
    Call,
    Global,
    Member,
    mutated,
    pickled,
    raw,
    tensor,
    torch_file,
    torch_members,
    unzipped,
    zipped,
)

SIX = np.arange(6, dtype="<f4").tobytes()
CHECKPOINT = FIXTURES / "training_checkpoint_last.pt"


def expected(name: str) -> dict[str, tuple[str, np.ndarray]]:
    """Name → dtype and float32 values, as PyTorch had them."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        dtypes = dict(entry.split("=") for entry in file["dtypes"])
        return {key: (dtype, file[key]) for key, dtype in dtypes.items()}


def check(tensors: dict[str, LazyTensor], values: dict[str, tuple[str, np.ndarray]]) -> None:
    assert list(tensors) == list(values)
    for name, (dtype, value) in values.items():
        lazy = tensors[name]
        array = lazy.read()
        assert (lazy.name, lazy.dtype, lazy.shape) == (name, dtype, value.shape)
        assert str(array.dtype) == f"mlx.core.{dtype}"
        assert array.shape == value.shape
        assert array.nbytes == lazy.nbytes
        if array.dtype == mx.bfloat16:
            array = array.astype(mx.float32)
        np.testing.assert_array_equal(np.array(array).astype(np.float32), value)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "layouts"])
def test_values_are_those_of_pytorch(name: str) -> None:
    source = open_source(FIXTURES / f"{name}.pt")
    assert source.kind == "PyTorch state dict"
    assert source.config is source.tokenizer is None
    check(source.tensors, expected(name))


@pytest.mark.parametrize("ema", [False, True])
def test_a_training_checkpoint_gives_the_model_or_its_average(ema: bool) -> None:
    key = "ema_state_dict" if ema else "model_state_dict"
    source = open_source(CHECKPOINT, ema=ema)
    assert source.kind == f"CoreNet training checkpoint ({key})"
    values = expected("training_checkpoint_last")
    wanted = {n.partition("/")[2]: v for n, v in values.items() if n.startswith(f"{key}/")}
    assert len(wanted) == 18
    check(source.tensors, wanted)


def test_nothing_is_read_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []

    def spy(path: Path, offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return read_range(path, offset, size)

    read_range = reader.read_range
    monkeypatch.setattr(reader, "read_range", spy)
    monkeypatch.setattr(zip_directory, "read_range", spy)
    data = {
        member.offset: member.size
        for name, member in open_torch(CHECKPOINT).members.items()
        if name.startswith("data/")
    }
    reads.clear()
    # the zip's end is looked for in the last 65,557 bytes, which here is the whole file
    monkeypatch.setattr(zip_directory, "_MAX_COMMENT", 0)
    source = open_source(CHECKPOINT)
    opening = [r for r in reads if any(o < r[0] + r[1] and r[0] < o + n for o, n in data.items())]
    assert opening == []
    reads.clear()
    for lazy in source.tensors.values():
        lazy.read()
    assert len(reads) == len(source.tensors) < len(data) // 3
    assert all(data[offset] == size for offset, size in reads)


def test_a_shared_storage_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"a": tensor(shape=(3,), stride=(1,)), "b": tensor(shape=(3,), stride=(2,))}
    tensors = open_source(torch_file(tmp_path / "x.pt", both)).tensors
    first = tensors["a"].read()
    monkeypatch.setattr(reader, "zlib", None)
    assert first.tolist() == [0, 1, 2]
    assert tensors["b"].read().tolist() == [0, 2, 4]


LAYOUTS = [((6,), (1,)), ((2, 3), (3, 1)), ((3, 2), (1, 3)), ((3, 1, 2), (2, 9, 1)), ((), ())]


@pytest.mark.parametrize(("shape", "stride"), LAYOUTS)
def test_blocks_of_rows_are_the_tensor(
    shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": tensor(shape=shape, stride=stride)})
    lazy = open_source(path).tensors["w"]
    whole, blocks = lazy.read(), list(lazy.blocks(8))
    assert len(blocks) == {(6,): 3, (): 1}.get(shape, shape[0] if shape else 1)
    assert mx.array_equal(mx.concatenate(blocks).reshape(shape), whole).item()
    assert whole.shape == shape


def test_damage_shows_by_the_last_block_at_the_latest(tmp_path: Path) -> None:
    members = [
        Member("model/data.pkl", pickled({"w": tensor()})),
        Member("model/data/0", SIX, crc=1),
    ]
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(members))
    blocks = open_source(path).tensors["w"].blocks(12)
    next(blocks)
    with pytest.raises(InputError, match="checksum is wrong"):
        next(blocks)
    with pytest.raises(InputError, match="checksum is wrong"):
        open_source(path).tensors["w"].rows(1, 2)


@pytest.mark.parametrize("zip64", [False, True])
def test_both_kinds_of_zip_are_read(zip64: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(torch_members({"w": tensor()}, {"0": SIX}), zip64=zip64))
    assert open_source(path).tensors["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_zip_with_folders_and_a_comment_is_read(tmp_path: Path) -> None:
    """As people make them who unpack a checkpoint and zip it again."""
    folders = [Member("model/", b""), Member("model/data/", b"")]
    data = zipped([*folders, *torch_members({"w": tensor()}, {"0": SIX})])
    path = tmp_path / "x.pt"
    path.write_bytes(data[:-2] + b"\x05\x00hello")
    assert open_source(path).tensors["w"].shape == (2, 3)


def test_a_file_without_checksums_is_read() -> None:
    assert open_source(FIXTURES / "no_crc.pt").tensors["ones"].read().tolist() == [1, 1, 1]


WRAPPED = {
    "state_dict": (
        {"state_dict": {"w": tensor()}, "epoch": 3},
        "PyTorch checkpoint ('state_dict')",
    ),
    "model": (
        {"model": {"w": tensor()}, "optimizer": {"state": {0: {"m": tensor()}}}},
        "PyTorch checkpoint ('model')",
    ),
    "model_state_dict": (
        {"model_state_dict": {"w": tensor()}, "gradients": {"g": tensor()}},
        "CoreNet training checkpoint (model_state_dict)",
    ),
    "ema only": ({"ema_state_dict": {"w": tensor()}}, "CoreNet training checkpoint"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_state_dict_is_found(name: str, tmp_path: Path) -> None:
    content, kind = WRAPPED[name]
    source = open_source(torch_file(tmp_path / "x.pt", content))
    assert source.kind.startswith(kind)
    assert list(source.tensors) == ["w"]


CONTENTS = {
    "two state dicts": ({"a": {"w": tensor()}, "b": {"w": tensor()}}, "found 'a', 'b'"),
    "no state dict": ({"epoch": 3}, "found none"),
    "nothing": ({}, "found none"),
    "a tensor": (tensor(), "holds a StoredTensor, not a state dict"),
    "a list": ([tensor()], "holds a list"),
    "something beside the tensors": ({"w": tensor(), "epoch": 3}, "'epoch': is a int"),
    "a number as name": ({"model": {3: tensor()}}, "'3': its name is not text"),
    "a storage that is missing": ({"w": tensor("9")}, "'w': its storage '9' is not in the file"),
    "a storage elsewhere": ({"w": tensor("../data.pkl")}, "is not in the file"),
    "a storage too short": (
        {"w": tensor(size=7)},
        "'w': its storage '0' should have 7 elements but has 24 bytes",
    ),
    "a storage of other elements": (
        {"w": tensor(kind="torch DoubleStorage")},
        "should have 6 elements",
    ),
    "a storage of negative size": ({"w": tensor(size=-6)}, "should have -6 elements"),
    "a storage of huge size": ({"w": tensor(size=2**62)}, f"should have {2**62} elements"),
    "a negative offset": ({"w": tensor(offset=-1)}, "negative offset"),
    "an offset past the end": ({"w": tensor(offset=1)}, "to element 7 of a storage of 6"),
    "an offset that overflows": ({"w": tensor(offset=2**63)}, "of a storage of 6"),
    "a negative stride": ({"w": tensor(offset=5, stride=(-3, -1))}, "negative offset or stride"),
    "a stride past the end": ({"w": tensor(stride=(4, 1))}, "to element 7 of a storage of 6"),
    "a stride that overflows": ({"w": tensor(stride=(2**63, 1))}, "of a storage of 6"),
    "a negative size": ({"w": tensor(shape=(-2, 3))}, "impossible shape '[-2, 3]'"),
    "a size past the end": ({"w": tensor(shape=(3, 3))}, "to element 9 of a storage of 6"),
    "a size that overflows": ({"w": tensor(shape=(2**32, 2**32))}, "impossible shape"),
    "a size beyond int32": ({"w": tensor(shape=(2**31,), stride=(0,))}, "impossible shape"),
    "an expanded tensor": (
        {"w": tensor(shape=(2**20, 2**20), stride=(0, 0))},
        "elements in a storage of 6 (an expanded tensor)",
    ),
    "a callable beside": (
        {"model_state_dict": {"w": tensor()}, "x": Call(Global("os system"), ("true",))},
        "'os.system'",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_bad_content_is_refused(name: str, tmp_path: Path) -> None:
    content, reason = CONTENTS[name]
    path = torch_file(tmp_path / "x.pt", content)
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_averaged_weights_that_are_not_there() -> None:
    with pytest.raises(InputError, match=r"no averaged weights \(ema_state_dict\)"):
        open_source(FIXTURES / "float32.pt", ema=True)


def typed(shape: tuple[int, ...], dtype: str, size: int, kind: str) -> Call:
    """A tensor as torch.save writes one whose dtype is not that of its storage."""
    stride = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    call = tensor(size=size, shape=shape, stride=stride, kind=kind)
    assert isinstance(call.arguments, tuple)
    rebuild = Global("torch._utils _rebuild_tensor_v3")
    return Call(rebuild, (*call.arguments, Global(f"torch {dtype}")))


def test_a_tensor_of_bytes_counts_its_elements(tmp_path: Path) -> None:
    content = {"w": typed((2, 6), "uint16", 24, "torch.storage UntypedStorage")}
    array = open_source(torch_file(tmp_path / "x.pt", content)).tensors["w"].read()
    assert raw(array) == SIX
    assert array.shape == (2, 6)


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "kind"),
    [
        ((13,), "uint16", 24, "torch.storage UntypedStorage"),
        ((13,), "uint16", 6, "torch FloatStorage"),
        ((4,), "int64", 6, "torch FloatStorage"),
    ],
)
def test_elements_of_another_size_are_counted_in_bytes(
    shape: tuple[int, ...], dtype: str, size: int, kind: str, tmp_path: Path
) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": typed(shape, dtype, size, kind)})
    with pytest.raises(InputError, match=f"to element {shape[0]} of a storage of {shape[0] - 1}"):
        open_source(path)


@pytest.mark.parametrize("shape", [(0, 3), (5, 0)])
def test_an_empty_tensor_opens_and_refuses_to_be_read(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": tensor(size=0, shape=shape)}, {"0": b""})
    lazy = open_source(path).tensors["w"]
    with pytest.raises(InputError, match="tensor 'w' has no elements"):
        lazy.read()


def test_a_size_of_one_may_have_any_stride(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": tensor(shape=(1, 3), stride=(2**62, 2))})
    assert open_source(path).tensors["w"].read().tolist() == [[0, 2, 4]]


def test_what_is_contiguous_is_read_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": tensor(shape=(2, 1, 3), stride=(3, 2**62, 1))})
    monkeypatch.setattr(reader, "_gather", None)
    assert open_source(path).tensors["w"].read().tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


def test_a_checksum_is_computed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": tensor(shape=(2,), stride=(4,))})
    monkeypatch.setattr(reader, "_CHUNK", 10)
    assert open_source(path).tensors["w"].read().tolist() == [0, 4]


GOOD = torch_members({"w": tensor()}, {"0": SIX})
PICKLE, ORDER, DATA = GOOD
BAD_ZIPS = {
    "a member twice": ([*GOOD, DATA], "'model/data/0' is there twice"),
    "two folders": ([*GOOD, Member("other/x", b"")], "2 folders"),
    "a member outside": ([*GOOD, Member("data.pkl", b"N.")], "2 folders"),
    "a path upwards": ([*GOOD, Member("model/../../x", b"")], "leads out"),
    "an absolute path": ([*GOOD, Member("/etc/passwd", b"")], "leads out"),
    "a path of Windows": ([*GOOD, Member("model\\..\\x", b"")], "leads out"),
    "a deflated member": (
        [PICKLE, Member("model/data/0", b"\x03\x00", DEFLATED, size=2**31)],
        "'data/0' is compressed",
    ),
    "an encrypted member": ([PICKLE, Member("model/data/0", SIX, flags=ENCRYPTED)], "compressed"),
    "sizes that differ": ([PICKLE, Member("model/data/0", SIX, size=48)], "compressed"),
    "a size past the end": (
        [PICKLE, Member("model/data/0", SIX, size=48, packed=48)],
        "'model/data/0' lies beyond its end",
    ),
    "members that overlap": (
        [Member("model/a", b"", offset=0, local_name="model/data.pkl"), *GOOD],
        "not where the directory says",
    ),
    "another name in place": (
        [PICKLE, Member("model/data/0", SIX, local_name="model/data/1")],
        "'model/data/0' is not where the directory says",
    ),
    "an offset past the end": ([PICKLE, Member("model/data/0", SIX, offset=10**6)], "beyond"),
    "an offset of 2**63": ([PICKLE, Member("model/data/0", SIX, offset=2**63)], "beyond"),
    "no pickle": ([DATA], "no data.pkl"),
    "a large pickle": ([Member("model/data.pkl", b"\0" * (8 << 20) + b"!")], "more than any"),
    "a wrong checksum of the pickle": (
        [Member("model/data.pkl", PICKLE.data, crc=1), DATA],
        "data.pkl is damaged",
    ),
    "big-endian": ([PICKLE, Member("model/byteorder", b"big"), DATA], "big-endian"),
    "TorchScript's code": ([*GOOD, Member("model/code/x.py", b"")], "TorchScript"),
    "TorchScript": ([*GOOD, Member("model/constants.pkl", b"N.")], "TorchScript"),
}


@pytest.mark.parametrize("name", BAD_ZIPS)
def test_a_bad_zip_is_refused(name: str, tmp_path: Path) -> None:
    members, reason = BAD_ZIPS[name]
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(members, zip64=True))
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    inner = zipped([Member("model/b", b"x")])[: 30 + 7 + 1]
    members = [PICKLE, Member("model/a", inner), Member("model/b", b"x", offset=0)]
    start = zipped([PICKLE]).index(b"PK\1\2") + 30 + 7
    members[2].offset = start
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(members))
    with pytest.raises(InputError, match="'model/a' and 'model/b' overlap"):
        open_source(path)


def test_a_wrong_number_of_members_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(GOOD, count=2))
    with pytest.raises(InputError, match="has 3 entries and claims 2"):
        open_source(path)


@pytest.mark.parametrize("shape", [(2, 3), (2, 2)])
def test_a_wrong_checksum_is_found_when_read(shape: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    content = pickled({"w": tensor(shape=shape)})
    path.write_bytes(zipped(torch_members(content, {"0": SIX})).replace(SIX, SIX[:-1] + b"!"))
    lazy = open_source(path).tensors["w"]
    with pytest.raises(InputError, match="data/0 is damaged"):
        lazy.read()


ENTRY, LOCAL, END_64 = b"PK\1\2", b"PK\3\4", b"PK\6\6"
END, LOCATOR = b"PK\5\6", b"PK\6\7"
# name → what is changed: the last header of that kind, from which byte on, and to what
PATCHES = {
    "another disk": (END, 4, b"\1\0", "split over several files"),
    "a directory on another disk": (END, 6, b"\1\0", "split over several files"),
    "entries on another disk": (END, 8, b"\1\0", "split over several files"),
    "a comment that isn't there": (END, 20, b"\1\0", "something follows"),
    "a large directory": (END_64, 40, b"\0\0\0\1", "has 16777"),
    "a directory beyond": (END_64, 48, b"\0\0\0\1", "directory lies beyond"),
    "an end beyond": (LOCATOR, 8, b"\xff" * 8, "end is missing"),
    "an end elsewhere": (LOCATOR, 8, b"\0" * 8, "end is missing"),
    "an entry of another kind": (ENTRY, 3, b"\3", "directory is damaged"),
    "a long extra field": (ENTRY, 30, b"\xff\xff", "directory is damaged"),
    "a member of another kind": (LOCAL, 3, b"\5", "not where the directory says"),
    "another length of a name": (LOCAL, 26, b"\1\0", "not where the directory says"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_zip_is_refused(name: str, tmp_path: Path) -> None:
    header, skip, patch, reason = PATCHES[name]
    data = bytearray(zipped(GOOD, zip64=True))
    at = data.rindex(header) + skip
    data[at : at + len(patch)] = patch
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert reason in str(caught.value)


def test_something_after_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(GOOD) + b"!")
    with pytest.raises(InputError, match="something follows its end"):
        open_source(path)


def test_a_file_without_checksums_cut_after_it_was_opened(tmp_path: Path) -> None:
    members = [PICKLE, Member("model/data/0", SIX, crc=0)]
    members[0] = Member("model/data.pkl", pickled({"w": tensor(shape=(3,), stride=(2,))}))
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(members))
    lazy = open_source(path).tensors["w"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="it is truncated"):
        lazy.read()


CUT = """
import sys
from pathlib import Path
import numpy as np
from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import InputError
path = Path(sys.argv[1])
real = np.lib.stride_tricks.as_strided
def cut(*args, **kwargs):  # when the file's bytes are about to be picked
    path.write_bytes(path.read_bytes()[:100])
    return real(*args, **kwargs)
np.lib.stride_tricks.as_strided = cut
for rows in open_source(path).tensors["w"].blocks():
    pass
"""


def test_a_file_cut_while_it_is_read_does_not_kill_the_process(tmp_path: Path) -> None:
    """Mapped memory would end it with SIGBUS."""
    size = 1 << 20
    content = pickled({"w": tensor(size=size, shape=(size // 2,), stride=(2,))})
    members = [Member("model/data.pkl", content), Member("model/data/0", b"\0" * 4 * size, crc=0)]
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(members))
    done = subprocess.run([sys.executable, "-c", CUT, str(path)], capture_output=True, check=False)
    assert done.returncode in (0, 1), done.returncode
    assert b"InputError" in done.stderr or done.returncode == 0


@given(st.data())
@settings(max_examples=60)
def test_any_strides(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """With no gap bridged and with all, the elements that NumPy finds at these strides."""
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    stride = data.draw(st.lists(st.integers(0, 12), min_size=len(shape), max_size=len(shape)))
    offset = data.draw(st.integers(0, 9))
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    size = max(last + 1, math.prod(shape))
    values = np.arange(size, dtype="<f4")
    described = tensor("0", size, offset, tuple(shape), tuple(stride))
    path = torch_file(
        tmp_path_factory.mktemp("x") / "x.pt", {"w": described}, {"0": values.tobytes()}
    )
    strides = [step * 4 for step in stride]
    wanted = np.lib.stride_tricks.as_strided(values[offset:], shape, strides)
    for gap in (0, 40, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "_GAP", gap)
            lazy = open_source(path).tensors["w"]
            np.testing.assert_array_equal(np.array(lazy.read()), wanted)
            start = data.draw(st.integers(0, shape[0] - 1))
            np.testing.assert_array_equal(np.array(lazy.rows(start, shape[0])), wanted[start:])


def test_a_block_of_a_transposed_matrix_reads_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = 100_000, 20
    described = tensor("0", rows * columns, 0, (rows, columns), (1, rows))
    storage = np.zeros(rows * columns, "<f4").tobytes()
    members = [Member("m/data.pkl", pickled({"w": described})), Member("m/data/0", storage, crc=0)]
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(members))
    lazy = open_source(path).tensors["w"]
    sizes = []

    def counted(path: Path, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read_range(path, offset, size)

    monkeypatch.setattr(reader, "read_range", counted)
    assert lazy.rows(5, 1005).shape == (1000, columns)
    assert sum(sizes) <= 2 * 1000 * columns * 4


def test_tensors_that_share_a_storage_do_not_fill_the_disk(tmp_path: Path) -> None:
    size = 1 << 20
    content = {f"w{i}": tensor(size=size, shape=(size,), stride=(1,)) for i in range(40)}
    members = [
        Member("m/data.pkl", pickled(content)),
        Member("m/data/0", b"\0" * 4 * size, crc=0),
    ]
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(members))
    with pytest.raises(InputError, match="many share a storage"):
        open_source(path)


def test_a_state_dict_repeated_through_the_memo_takes_little_time(tmp_path: Path) -> None:
    state = pickled({f"{i}": tensor() for i in range(500)})[2:-1]
    again = b"".join(b"J" + struct.pack("<i", i) + b"h\xffs" for i in range(50_000))
    pickle = b"\x80\x02}q\x00" + state + b"q\xff0h\x00" + again + b"."
    path = tmp_path / "x.pt"
    members = [Member("m/data.pkl", pickle), Member("m/data/0", SIX)]
    path.write_bytes(zipped(members))
    start = time.process_time()
    with pytest.raises(InputError, match="or one inside; found '0', '1'") as error:
        open_source(path)
    assert time.process_time() - start < 3
    assert len(str(error.value)) < 1000


def test_many_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(GOOD, count=30_000))
    with pytest.raises(InputError, match="30000 members, more than any"):
        open_source(path)


def test_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": tensor()})
    lazy = open_source(path).tensors["w"]
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        lazy.read()


@pytest.mark.parametrize("shape", [(2, 3), (2, 2)])
def test_a_file_cut_after_it_was_opened(shape: tuple[int, int], tmp_path: Path) -> None:
    path = torch_file(tmp_path / "x.pt", {"w": tensor(shape=shape)})
    lazy = open_source(path).tensors["w"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="truncated"):
        lazy.read()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = zipped(GOOD)
    path = tmp_path / "x.pt"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            open_source(path)


REFUSED = {
    "legacy.pt": "PyTorch's format from before 1.6",
    "torchscript.pt": "a TorchScript archive",
    "expanded.pt": "'expanded': has 1000 elements in a storage of 1",
    "float32.npz": "no data.pkl",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_of_pytorch_are_told_apart(name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        open_source(FIXTURES / name)


edits = st.lists(
    st.tuples(
        st.sampled_from(EDITS),
        st.integers(0, 2**20),
        st.integers(0, 64),
        st.integers(0, 2**20),
    ),
    min_size=1,
    max_size=4,
)
LAYOUTS = (FIXTURES / "layouts.pt").read_bytes()


@pytest.fixture(scope="module")
def layouts() -> dict[str, bytes]:
    """Name → bytes of every tensor."""
    return {n: raw(t.read()) for n, t in open_source(FIXTURES / "layouts.pt").tensors.items()}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(edits=edits)
def test_a_mutated_file_gives_the_same_tensors_or_is_refused(
    layouts: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[str, int, int, int]],
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.pt"
    path.write_bytes(mutated(LAYOUTS, edits))
    message, found = "", layouts
    try:
        found = {name: raw(lazy.read()) for name, lazy in open_source(path).tensors.items()}
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert found == layouts


@settings(deadline=None, derandomize=True, max_examples=150)
@given(edits=edits)
def test_a_mutated_pickle_describes_what_is_there_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, int, int, int]]
) -> None:
    """The pickle alone is changed, and its checksum put right: the machine itself is tried."""
    members = unzipped(LAYOUTS)
    members["layouts/data.pkl"] = mutated(members["layouts/data.pkl"], edits)
    path = tmp_path_factory.getbasetemp() / "mutated.pt"
    path.write_bytes(zipped([Member(name, data) for name, data in members.items()]))
    message = ""
    try:
        for lazy in open_source(path).tensors.values():
            array = lazy.read()
            assert (array.shape, array.nbytes) == (lazy.shape, lazy.nbytes)
            assert array.nbytes <= len(LAYOUTS)
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def test_fresh_files_of_pytorch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    tensors = {}
    for i in range(60):
        dtype = (torch.float32, torch.float16, torch.bfloat16, torch.int64)[i % 4]
        value = (torch.randn(5, 4, 6) * 9).to(dtype)
        if i % 3 == 1:
            value = value.permute(*generator.permutation(3).tolist())
        if i % 2 == 1:
            start, step = generator.integers(0, 2), generator.integers(1, 3)
            value = value[start::step, :, start:]
        tensors[f"t{i}"] = value
    tensors |= {"tied": tensors["t0"], "view": tensors["t0"].view(-1)[7:9]}
    torch.save({"state_dict": tensors, "lr": 0.1}, tmp_path / "x.pt")
    found = open_source(tmp_path / "x.pt").tensors
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        assert raw(found[name].read()) == bits.numpy().tobytes(), name


def test_a_checkpoint_of_many_tensors_opens_quickly(tmp_path: Path) -> None:
    names = {f"layers.{i}.w": tensor(str(i)) for i in range(1200)}
    path = torch_file(tmp_path / "x.pt", names, {str(i): SIX for i in range(1200)})
    start = time.process_time()
    assert len(open_source(path).tensors) == 1200
    assert time.process_time() - start < 5


def test_a_pickle_that_is_too_large_names_the_file_once(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "x.pt", bytes((8 << 20) + 1))
    with pytest.raises(InputError) as error:
        open_source(path)
    assert str(error.value).count(str(path)) == 1
