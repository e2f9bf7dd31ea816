"""Hostile pickles: each is refused by name, and nothing in it runs."""

from __future__ import annotations

import pickle
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mlx_openelm.convert.sources.unpickler import GLOBALS, OPAQUE, StoredTensor, unpickle
from mlx_openelm.errors import InputError

from .checkpoints import Call, Global, Persistent, pickled, tensor

CALLABLES = (
    "os system",
    "posix system",
    "builtins eval",
    "builtins exec",
    "builtins getattr",
    "builtins __import__",
    "__builtin__ eval",
    "functools partial",
    "operator attrgetter",
    "importlib import_module",
    "subprocess Popen",
    "torch.hub load",
    "torch load",
    "torch.storage _load_from_bytes",
    "torch._utils _rebuild_sparse_tensor",
    "torch.jit._pickle restore_type_tag",
    "numpy load",
    "collections namedtuple",
    "stranger run",
)


def call(function: str, argument: str, protocol: int) -> bytes:
    """A pickle that calls a global with one text, as Python's pickler writes it."""
    module, name = (part.encode() for part in function.split(" "))
    text = argument.encode()
    start = b"" if protocol < 2 else bytes([0x80, protocol])
    if protocol == 0:
        return b"c%s\n%s\n(V%s\ntR." % (module, name, text)
    if protocol < 4:
        long_text = b"X" + struct.pack("<I", len(text)) + text
        return start + b"c%s\n%s\n(%stR." % (module, name, long_text)
    texts = b"".join(b"\x8c%c%s\x94" % (len(t), t) for t in (module, name))
    return start + texts + b"\x93\x94\x8c%c%s\x85R." % (len(text), text)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that every payload here would make; a module `stranger` makes it when imported."""
    path = tmp_path / "it-ran"
    (tmp_path / "stranger.py").write_text(f"open({str(path)!r}, 'w')\nrun = Thing = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    assert not path.exists()
    assert "stranger" not in sys.modules


def payload(function: str, marker: Path) -> str:
    return f"touch {marker}" if "system" in function else f"open({str(marker)!r}, 'w')"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", CALLABLES)
def test_a_callable_is_refused_by_name(function: str, protocol: int, marker: Path) -> None:
    data = call(function, payload(function, marker), protocol)
    with pytest.raises(InputError, match=repr(function.replace(" ", "."))):
        unpickle(data)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", ["os system", "builtins exec"])
def test_the_payloads_are_live(function: str, protocol: int, marker: Path) -> None:
    """What the test above refuses does run in Python's own unpickler."""
    pickle.loads(call(function, payload(function, marker), protocol))
    assert marker.exists()
    marker.unlink()


HOSTILE = {
    "INST": (b"(S'touch x'\nios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nS'touch x'\no.", "os.system"),
    "NEWOBJ": (b"\x80\x02cstranger\nThing\n)\x81.", "stranger.Thing"),
    "NEWOBJ_EX": (b"\x80\x04\x8c\x08stranger\x8c\x05Thing\x93)}\x92.", "stranger.Thing"),
    "BUILD calling __setstate__": (b"\x80\x02cstranger\nThing\n)\x81}b.", "stranger.Thing"),
    "INST of a known global": (b"(icollections\nOrderedDict\n.", "INST"),
    "OBJ of a known global": (b"(ccollections\nOrderedDict\no.", "OBJ"),
    "NEWOBJ of a known global": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ, which"),
    "an extension code": (b"\x80\x02\x82\x01.", "EXT1"),
    "a large extension code": (b"\x80\x02\x84\x01\x02\x03\x04.", "EXT4"),
    "an out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "a textual persistent id": (b"Pos.system\n.", "PERSID"),
    "a persistent id of text": (pickled(Persistent("os.system")), "persistent id"),
    "a persistent id of a module": (pickled(Persistent(("module", "os"))), "persistent id"),
    "a persistent id with another word": (
        pickled(Persistent(("module", Global("torch FloatStorage"), "0", "cpu", 1))),
        "persistent id",
    ),
    "a persistent id with a part too many": (
        pickled(Persistent(("storage", Global("torch FloatStorage"), "0", "cpu", 1, None))),
        "persistent id",
    ),
    "a persistent id in a list": (
        pickled(Persistent(["storage", Global("torch FloatStorage"), "0", "cpu", 1])),
        "persistent id",
    ),
    "an unknown storage": (pickled(tensor(kind="torch QInt8Storage")), "torch.QInt8Storage"),
    "a dotted name": (b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93.", "os.path.system"),
    "a class of a known global": (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "collections.OrderedDict.__init__",
    ),
    "names from the memo": (
        b"\x80\x04\x8c\x06system\x94\x8c\x02os\x9400h\x01h\x00\x93.",
        "os.system",
    ),
    "a nested reduction": (
        pickled(Call(Call(Global("functools partial"), (Global("os system"),)), ())),
        "functools.partial",
    ),
    "a reduction in a tensor's arguments": (
        pickled(Call(Global("torch._utils _rebuild_parameter"), (Call(Global("os system"), ()),))),
        "os.system",
    ),
    "a reduction as a persistent id": (
        pickled(Persistent(Call(Global("builtins eval"), ("1",)))),
        "builtins.eval",
    ),
    "a reduction as a key": (
        b"\x80\x02}cos\nsystem\n)RK\x01s.",
        "os.system",
    ),
    "a call of a storage type": (pickled(Call(Global("torch FloatStorage"), (1,))), "StorageType"),
    "a call of a dtype": (pickled(Call(Global("torch float32"), ())), "Dtype"),
    "a call of text": (pickled(Call("os.system", ())), "calls a str"),
    "a call from the memo": (b"\x80\x02X\x01\x00\x00\x00aq\x00h\x00)R.", "calls a str"),
    "BUILD of a tensor": (pickled(tensor())[:-1] + b"}b.", "state of a StoredTensor"),
    "BUILD of a global": (b"\x80\x02ctorch\nFloatStorage\n}b.", "state of a StorageType"),
    "BUILD of a function": (b"\x80\x02ctorch\nSize\n}b.", "state of a Callable"),
    "BUILD of a list": (b"\x80\x02]}b.", "state of a list"),
    "a tuple as key": (b"\x80\x02})K\x01s.", "a tuple as key"),
    "a global as key": (b"\x80\x02}ctorch\nSize\nK\x01s.", "a _Callable as key"),
    "a long key": (b"\x80\x02}X\xe9\x03\x00\x00" + b"k" * 1001 + b"K\x01s.", "has the key"),
    "a huge integer as key": (b"\x80\x02}\x8a\x0a" + b"\x01" * 10 + b"K\x01s.", "has the key"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_trick_is_refused(name: str, marker: Path) -> None:
    data, reason = HOSTILE[name]
    with pytest.raises(InputError) as caught:
        unpickle(data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


DAMAGED = {
    "empty": b"",
    "no STOP": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "POP of nothing": b"0.",
    "TUPLE3 of two": b"\x80\x02NN\x87.",
    "no mark": b"\x80\x02Nt.",
    "an unset memo": b"\x80\x02h\x07.",
    "PUT of nothing": b"q\x00.",
    "APPEND to a tuple": b"\x80\x02)Na.",
    "SETITEM of a list": b"\x80\x02]NNs.",
    "SETITEMS of an odd number": b"\x80\x02}(NNNu.",
    "an unknown opcode": b"\xff.",
    "STACK_GLOBAL of a number and text": b"\x80\x04K\x01\x8c\x01a\x93.",
    "STACK_GLOBAL of text and a number": b"\x80\x04\x8c\x01aK\x01\x93.",
    "APPEND to a byte array": b"\x80\x05\x96" + bytes(8) + b"K\x01a.",
    "bytes longer than the file": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x.",
    "a byte array longer than the file": b"\x80\x05\x96" + b"\xff" * 4 + b"\0" * 4 + b"x.",
    "text longer than the file": b"\x80\x02X\xff\xff\xff\xffx.",
    "a long of negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a long longer than the file": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "text that is not UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "too many arguments": pickled(Call(Global("numpy dtype"), tuple(range(9)))),
    "OrderedDict with arguments": pickled(Call(Global("collections OrderedDict"), ([],))),
    "arguments in a list": pickled(Call(Global("torch Size"), [(1,)])),
    "a size of a list": pickled(Call(Global("torch Size"), ([1],))),
    "a storage without a type": pickled(Persistent(("storage", "FloatStorage", "0", "cpu", 1))),
    "a tensor as a storage's type": pickled(Persistent(("storage", tensor(), "0", "cpu", 1))),
    "a storage with a number as key": pickled(
        Persistent(("storage", Global("torch FloatStorage"), 0, "cpu", 1))
    ),
    "a storage of a flag": pickled(tensor(size=True)),
    "a tensor without its storage": pickled(
        Call(Global("torch._utils _rebuild_tensor_v2"), ("0", 0, (), (), False, None))
    ),
    "a tensor of bytes without a dtype": pickled(tensor(kind="torch.storage UntypedStorage")),
    "a dtype where none belongs": pickled(
        Call(tensor().function, (*tensor().arguments, None, "float16"))  # type: ignore[misc]
    ),
    "a shape of text": pickled(tensor(shape="23")),
    "a shape in a list": pickled(tensor(shape=[2, 3])),
    "strides in a list": pickled(tensor(stride=[3, 1])),
    "a tensor as storage": pickled(
        Call(Global("torch._utils _rebuild_tensor_v2"), (tensor(), 0, (), (), False, None))
    ),
    "a shape of flags": pickled(tensor(shape=(True, True))),
    "fewer strides than dimensions": pickled(tensor(stride=(1,))),
    "an offset of text": pickled(tensor(offset="0")),
    "a parameter of nothing": pickled(Call(Global("torch._utils _rebuild_parameter"), (None,))),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pickle_says_so(name: str) -> None:
    with pytest.raises(InputError, match="makes no sense"):
        unpickle(DAMAGED[name])


def test_too_many_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="9 dimensions"):
        unpickle(pickled(tensor(shape=(1,) * 9, stride=(1,) * 9)))


def test_as_much_as_is_allowed_is_read() -> None:
    shape = (1,) * 8
    found = unpickle(pickled({"k" * 1000: tensor(shape=shape, stride=shape)}))
    assert isinstance(found, dict)
    assert found["k" * 1000].shape == shape
    *common, hooks = tensor(size=24, kind="torch.storage UntypedStorage").arguments  # type: ignore[misc]
    arguments = (*common, hooks, Global("torch uint16"), {})
    found = unpickle(pickled(Call(Global("torch._utils _rebuild_tensor_v3"), arguments)))
    assert isinstance(found, StoredTensor)
    assert found.dtype == "uint16"


def test_a_conjugated_tensor_is_refused() -> None:
    call = tensor()
    assert isinstance(call.arguments, tuple)
    with pytest.raises(InputError, match="conjugated"):
        unpickle(pickled(Call(call.function, (*call.arguments, {"conj": True}))))


BOMBS = {
    "a memo index of 2**32 - 1": b"\x80\x02Nr\xff\xff\xff\xff.",
    "deep tuples": b"\x80\x02N" + b"\x85" * 50_000 + b".",
    "deep lists": b"\x80\x02" + b"](" * 30_000 + b"N" + b"e" * 30_000 + b".",
    "deep dictionaries": b"\x80\x02" + b"}(N" * 30_000 + b"N" + b"u" * 30_000 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "lists that double": b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 1000 + b".",
    "marks without end": b"\x80\x02" + b"(" * 50_000 + b".",
    "a call repeated through the memo": (
        b"\x80\x02c_codecs\nencode\nq\x00(" + b"N" * 50_000 + b"tq\x01" + b"h\x00h\x01R" * 50_000
    ),
    # a byte each that makes an object: what a file may have at most (MAX_HEADER)
    "dictionaries": b"}" * (4 << 20) + b".",
    "dictionaries with an entry": b"}NNs" * (1 << 20) + b".",
    "tuples": b"N" + b"\x85" * (4 << 20) + b".",
    "a large memo": b"N" + b"\x94" * (4 << 20) + b".",
    "short strings": b"\x8c\x01\xc3\xa9" * (1 << 20) + b".",
    "calls": b"\x80\x02ccollections\nOrderedDict\nq\x000" + b"h\x00)R" * (1 << 20) + b".",
    "a long integer": b"\x80\x02\x8b" + struct.pack("<i", 4 << 20) + b"\x7f" * (4 << 20) + b".",
    "a string of wide characters": b"X"
    + struct.pack("<I", (4 << 20) + 4)
    + b"a" * (4 << 20)
    + "\U0001f600".encode()
    + b".",
    "one key again and again": (
        b"\x80\x02}X\xe8\x03\x00\x00" + b"k" * 1000 + b"q\x000" + b"h\x00Ns" * 20_000 + b"."
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_little_time_and_memory(name: str) -> None:
    start = time.process_time()
    tracemalloc.start()
    try:
        unpickle(BOMBS[name])
    except InputError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 << 20
    assert time.process_time() - start < 10


@pytest.mark.parametrize("where", ["size", "offset", "shape", "stride"])
def test_an_integer_that_cannot_be_printed_is_refused(where: str) -> None:
    long = b"\x8b" + struct.pack("<i", 2000) + b"\x7f" * 2000
    values: dict[str, Any] = {"size": 77, "offset": 77, "shape": (77, 1), "stride": (77, 1)}
    data = pickled(tensor(**{where: values[where]}))
    assert data.count(b"L77L\n") == 1
    with pytest.raises(InputError, match="an integer of 15999 bits"):
        unpickle(data.replace(b"L77L\n", long))


def test_state_of_an_ordered_dict_is_let_go() -> None:
    data = (
        b"\x80\x02ccollections\nOrderedDict\n)R"
        b"}(X\x09\x00\x00\x00__class__cnumpy\ndtype\nX\x06\x00\x00\x00updateNub."
    )
    content = unpickle(data)
    assert type(content) is dict
    assert content == {}


def test_plain_data_of_a_training_checkpoint_is_read_or_let_go() -> None:
    for protocol in range(6):
        plain = {"epoch": 3, "best": 0.5, "names": ["a", ("b", None)], "done": True, 7: -(2**40)}
        assert unpickle(pickle.dumps(plain, protocol)) == plain
        content = unpickle(pickle.dumps({"set": {1, 2}, "z": 1j, "b": b"x"}, protocol))
        assert isinstance(content, dict)
        assert content["set"] is OPAQUE
        assert content["z"] is OPAQUE
        assert content["b"] in (OPAQUE, b"x")
    scalar = Call(Global("numpy._core.multiarray scalar"), (Global("numpy dtype"), "x"))
    assert unpickle(pickled({"best": scalar})) == {"best": OPAQUE}


def test_a_tensor_is_what_the_pickle_says() -> None:
    found = unpickle(pickled({"w": tensor("7", 9, 1, (2, 2), (4, 2), "torch HalfStorage")}))
    assert isinstance(found, dict)
    stored = found["w"]
    assert isinstance(stored, StoredTensor)
    assert (stored.storage.key, stored.storage.size, stored.dtype) == ("7", 9, "float16")
    assert (stored.offset, stored.shape, stored.stride) == (1, (2, 2), (4, 2))


def test_no_known_global_is_the_real_thing() -> None:
    modules = {type(value).__module__ for value in GLOBALS.values()}
    assert modules == {"mlx_openelm.convert.sources.unpickler"}
