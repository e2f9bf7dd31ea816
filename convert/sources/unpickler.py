"""The pickle in a PyTorch checkpoint, read as data: nothing in it is imported, called or run.

`pickletools` takes the pickle apart into opcodes; a small machine of our own puts together what
they say, from plain containers and the stand-ins in `GLOBALS`. Everything else a pickle can name
is refused by name, so a pickle can do nothing here but describe tensors, or be refused.

Opcodes: `pickletools` in Python's library, protocols 0 to 5. What PyTorch writes with them:
`torch/serialization.py` and `torch/_utils.py`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from mlx_openelm.checkpoint.safetensors import MAX_DIMENSIONS
from mlx_openelm.errors import InputError
from mlx_openelm.files import shown

from .lazy import DTYPES

# No checkpoint has more, and what is repeated through the memo must stay cheap. An opcode makes
# about 100 bytes of objects at most; the full training checkpoint of OpenELM-3B has 50,000.
MAX_OPCODES = 250_000
MAX_KEY = 1000  # characters of a dictionary's key
MAX_BITS = 256  # of an integer: the states of random generators have 128
MAX_ARGUMENTS = 8


@dataclass(frozen=True)
class Storage:
    """A run of `size` elements of `dtype` (None: of bytes) in the archive's member `data/key`."""

    key: str
    dtype: str | None
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it; nothing about it has been checked but the types.

    `offset` and `stride` count elements of `dtype` in `storage`.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Opaque:
    """Plain data that no model needs: a set, a NumPy scalar, a device. Its value is not kept."""


@dataclass(frozen=True)
class _Callable:
    """Stands for something that a pickle may call; `build` is ours, and gets the arguments."""

    build: Callable[..., object]


@dataclass(frozen=True)
class _StorageType:
    dtype: str | None


@dataclass(frozen=True)
class _Dtype:
    name: str


OPAQUE = Opaque()
_MARK = object()  # what pickles put on the stack below a group of items


def unpickle(data: bytes) -> object:
    """What a pickle describes: dicts, lists, tuples, scalars, `StoredTensor`s and `Opaque`s.

    Raises:
        InputError: when it names anything outside `GLOBALS`, or is damaged.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    position = 0
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(data)):
            position = at or 0
            if count == MAX_OPCODES:
                raise InputError(
                    f"the pickle has more than {MAX_OPCODES} opcodes, which no checkpoint needs"
                )
            if type(argument) is int and argument.bit_length() > MAX_BITS:
                bits = argument.bit_length()
                raise InputError(f"the pickle has an integer of {bits} bits: refused")
            if opcode.name == "STOP":
                return stack.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                _refuse_opcode(opcode.name, argument)
            step(stack, memo, argument)
    except InputError:
        raise
    except Exception:
        pass  # whatever pickletools or a step stumbled over, the bytes make no sense
    raise InputError(f"the pickle makes no sense at byte {position}; the file is damaged")


# ---------------------------------------------------------------------------------------------
# Globals


def _tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    metadata: object = None,
    *,
    dtype: str | None = None,
) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v2`."""
    dtype = dtype or storage.dtype
    if dtype is None or not isinstance(storage, Storage):
        raise TypeError
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride):
        raise TypeError
    if len(shape) > MAX_DIMENSIONS:
        raise InputError(f"a tensor has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if any(type(n) is not int for n in (offset, *shape, *stride)):
        raise TypeError
    if metadata:
        raise InputError("a tensor is stored conjugated or negated; save it resolved (clone it)")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _typed_tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    dtype: _Dtype,
    metadata: object = None,
) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v3`: a storage of bytes, and the dtype apart."""
    if not isinstance(dtype, _Dtype):
        raise TypeError
    common = (storage, offset, shape, stride, requires_grad, hooks, metadata)
    return _tensor(*common, dtype=dtype.name)


def _parameter(tensor: StoredTensor, *_: object) -> StoredTensor:
    """`torch._utils._rebuild_parameter` and `_rebuild_parameter_with_state`."""
    if not isinstance(tensor, StoredTensor):
        raise TypeError
    return tensor


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _size(shape: tuple[int, ...]) -> tuple[int, ...]:
    if type(shape) is not tuple:
        raise TypeError
    return shape


def _opaque(*_: object) -> Opaque:
    return OPAQUE


# Everything that a pickle may name. The last rows are the scalars and sets of a full training
# checkpoint (a best metric, a scheduler's milestones): known to be harmless, and not kept.
GLOBALS: dict[str, _Callable | _StorageType | _Dtype] = {
    "collections.OrderedDict": _Callable(_ordered_dict),
    "torch.Size": _Callable(_size),
    "torch._utils._rebuild_tensor_v2": _Callable(_tensor),
    "torch._utils._rebuild_tensor_v3": _Callable(_typed_tensor),
    "torch._utils._rebuild_parameter": _Callable(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Callable(_parameter),
    "torch.DoubleStorage": _StorageType("float64"),
    "torch.FloatStorage": _StorageType("float32"),
    "torch.HalfStorage": _StorageType("float16"),
    "torch.BFloat16Storage": _StorageType("bfloat16"),
    "torch.LongStorage": _StorageType("int64"),
    "torch.IntStorage": _StorageType("int32"),
    "torch.ShortStorage": _StorageType("int16"),
    "torch.CharStorage": _StorageType("int8"),
    "torch.ByteStorage": _StorageType("uint8"),
    "torch.BoolStorage": _StorageType("bool"),
    "torch.ComplexFloatStorage": _StorageType("complex64"),
    "torch.storage.UntypedStorage": _StorageType(None),
    **{f"torch.{name}": _Dtype(name) for name in DTYPES},
    "torch.device": _Callable(_opaque),
    "collections.Counter": _Callable(_opaque),
    "_codecs.encode": _Callable(_opaque),
    "builtins.set": _Callable(_opaque),
    "__builtin__.set": _Callable(_opaque),
    "builtins.complex": _Callable(_opaque),
    "__builtin__.complex": _Callable(_opaque),
    "numpy.dtype": _Callable(_opaque),
    "numpy.core.multiarray.scalar": _Callable(_opaque),
    "numpy._core.multiarray.scalar": _Callable(_opaque),
}


def _find(name: str) -> _Callable | _StorageType | _Dtype:
    if name not in GLOBALS:
        raise InputError(
            f"the pickle names {shown(name)}, which no checkpoint needs: refused, and nothing in "
            "the file was run; if you trust it, open it with PyTorch and save only its tensors"
        )
    return GLOBALS[name]


def _refuse_opcode(name: str, argument: object) -> NoReturn:
    if name == "INST":
        _find(str(argument).replace(" ", "."))
    what = name if argument is None else f"{name} {shown(argument)}"
    raise InputError(f"the pickle uses the opcode {what}, which torch.save never writes: refused")


# ---------------------------------------------------------------------------------------------
# Opcodes: each a function of the stack, the memo and the opcode's argument


def _items(stack: list[Any]) -> list[Any]:
    """What is above the last mark, taken from the stack with the mark."""
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    items.reverse()
    return items


def _top(stack: list[Any], count: int) -> tuple[Any, ...]:
    if len(stack) < count:
        raise IndexError
    items = tuple(stack[len(stack) - count :])
    del stack[len(stack) - count :]
    return items


def _append(stack: list[Any], items: list[Any]) -> None:
    if stack[-1] is not OPAQUE:
        if type(stack[-1]) is not list:
            raise TypeError
        stack[-1].extend(items)


def _set(stack: list[Any], items: list[Any]) -> None:
    keys = items[::2]
    for key in keys:
        if type(key) not in (str, int, float, bool, type(None)):
            raise InputError(f"a dictionary in the pickle has a {type(key).__name__} as key")
        if (type(key) is str and len(key) > MAX_KEY) or (type(key) is int and abs(key) >> 64):
            raise InputError(f"a dictionary in the pickle has the key {shown(key)}")
    if stack[-1] is not OPAQUE:
        if type(stack[-1]) is not dict:
            raise TypeError
        stack[-1].update(zip(keys, items[1::2], strict=True))


def _dict(stack: list[Any]) -> None:
    items = _items(stack)
    stack.append({})
    _set(stack, items)


def _global(stack: list[Any]) -> None:
    module, name = _top(stack, 2)
    if type(module) is not str or type(name) is not str:
        raise TypeError
    stack.append(_find(f"{module}.{name}"))


def _reduce(stack: list[Any]) -> None:
    called, arguments = _top(stack, 2)
    if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
        raise TypeError
    if not isinstance(called, _Callable):
        raise InputError(f"the pickle calls a {type(called).__name__.lstrip('_')}: refused")
    stack.append(called.build(*arguments))


def _build(stack: list[Any]) -> None:
    """State of an object is let go: an OrderedDict's `_metadata` is all that torch.save has."""
    owner, _ = _top(stack, 2)
    if type(owner) not in (dict, Opaque):
        kind = type(owner).__name__.lstrip("_")
        raise InputError(f"the pickle sets the state of a {kind} (BUILD, __setstate__): refused")
    stack.append(owner)


def _storage(stack: list[Any]) -> None:
    """A persistent id: torch.save's are ("storage", type, key, device, number of elements)."""
    identity = stack.pop()
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
        raise InputError("the pickle has a persistent id that is not a storage: refused")
    _, kind, key, _, size = identity
    if not isinstance(kind, _StorageType) or type(key) is not str or type(size) is not int:
        raise TypeError
    stack.append(Storage(key, kind.dtype, size))


_Step = Callable[[list[Any], dict[int, Any], Any], object]
_ARGUMENT_IS_VALUE = (
    "NONE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
    "SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8"
)
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(_ARGUMENT_IS_VALUE.split(), lambda stack, memo, value: stack.append(value)),
    **dict.fromkeys(("PROTO", "FRAME"), lambda stack, memo, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda s, m, i: m.update({i: s[-1]})),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda s, m, i: s.append(m[i])),
    "MEMOIZE": lambda stack, memo, _: memo.update({len(memo): stack[-1]}),
    "MARK": lambda stack, memo, _: stack.append(_MARK),
    "POP": lambda stack, memo, _: stack.pop(),
    "POP_MARK": lambda stack, memo, _: _items(stack),
    "DUP": lambda stack, memo, _: stack.append(stack[-1]),
    "NEWTRUE": lambda stack, memo, _: stack.append(True),
    "NEWFALSE": lambda stack, memo, _: stack.append(False),
    "EMPTY_TUPLE": lambda stack, memo, _: stack.append(()),
    "TUPLE1": lambda stack, memo, _: stack.append(_top(stack, 1)),
    "TUPLE2": lambda stack, memo, _: stack.append(_top(stack, 2)),
    "TUPLE3": lambda stack, memo, _: stack.append(_top(stack, 3)),
    "TUPLE": lambda stack, memo, _: stack.append(tuple(_items(stack))),
    "EMPTY_LIST": lambda stack, memo, _: stack.append([]),
    "LIST": lambda stack, memo, _: stack.append(_items(stack)),
    "APPEND": lambda stack, memo, _: _append(stack, [stack.pop()]),
    "APPENDS": lambda stack, memo, _: _append(stack, _items(stack)),
    "EMPTY_DICT": lambda stack, memo, _: stack.append({}),
    "DICT": lambda stack, memo, _: _dict(stack),
    "SETITEM": lambda stack, memo, _: _set(stack, list(_top(stack, 2))),
    "SETITEMS": lambda stack, memo, _: _set(stack, _items(stack)),
    "EMPTY_SET": lambda stack, memo, _: stack.append(OPAQUE),
    "ADDITEMS": lambda stack, memo, _: _append(stack, _items(stack)),
    "FROZENSET": lambda stack, memo, _: stack.append(_opaque(_items(stack))),
    "GLOBAL": lambda stack, memo, name: stack.append(_find(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda stack, memo, _: _global(stack),
    "REDUCE": lambda stack, memo, _: _reduce(stack),
    "BUILD": lambda stack, memo, _: _build(stack),
    "BINPERSID": lambda stack, memo, _: _storage(stack),
}
