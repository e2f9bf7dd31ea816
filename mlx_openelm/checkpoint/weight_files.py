"""Which files of a directory hold a model's weights: one answer for all who read them.

transformers takes `model.safetensors`, else the shards that `model.safetensors.index.json` names,
else the same of `pytorch_model.bin`. mlx-lm takes all of `model*.safetensors`. Here it is
transformers' choice, then mlx-lm's where that has one reading; what else matches mlx-lm's pattern
is left unread, with a note. Other `.safetensors` (adapters, an optimizer's state, prompt caches)
don't matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from ..errors import InputError
from ..files import find_in, read_json, shown
from .safetensors import MAX_HEADER, Stored

SAFETENSORS, PYTORCH, APPLE_MLX = "model.safetensors", "pytorch_model.bin", "weights.safetensors"
# In the order in which transformers looks for them; the last one is of Apple's MLX example
FORMS = (SAFETENSORS, PYTORCH, APPLE_MLX)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,6})-of-(?P<count>[0-9]{1,6})\.[a-z]+")

T = TypeVar("T", bound=Stored)


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a directory's weights.

    Attributes:
        form: one of `FORMS`: the name of the file, or of the one that was cut into shards.
        files: in order.
        index: the file that says which tensor is where, if there is one.
        places: what it says: a tensor's name -> its file's.
        unread: names of files that mlx-lm would read too.
    """

    form: str
    files: list[Path]
    index: Path | None = None
    places: Mapping[str, str] | None = None
    unread: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """A line for the person, when other programs would read other weights."""
        if not self.unread:
            return []
        directory = self.files[0].parent
        read = self.files[0].name if self.index is None else f"what {self.index.name} names"
        return [
            f"{directory}: {read} is used, as in transformers, and {_listed(self.unread)} is not; "
            "mlx-lm would mix them: move away what doesn't belong to the model"
        ]


def find_weights(directory: Path) -> WeightFiles:
    """The files that hold a directory's weights.

    Raises:
        InputError: when there are none, a shard is missing, or several sets have an equal claim.
    """
    names = _names(directory)
    for form in FORMS:
        index = f"{form}.index.json"
        if form in names:
            found = WeightFiles(form, [_find(directory, form)])
        elif index in names:
            found = _indexed(directory, form, _find(directory, index), names)
        elif group := _group(directory, form, names):
            found = WeightFiles(form, [_find(directory, name) for name in group])
        else:
            continue
        read = {file.name for file in found.files}
        unread = [n for n in names if fnmatchcase(n, "model*.safetensors") and n not in read]
        return replace(found, unread=tuple(unread))
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f"; if {_listed(others)} is the model, rename it" if others else ""
    raise InputError(
        f"{directory}: no {SAFETENSORS} in it, no {PYTORCH} or {APPLE_MLX}, nor shards of them"
        f"{hint} (for a CoreNet checkpoint, convert the .pt file itself)"
    )


def has_weights(directory: Path) -> bool:
    """Whether a directory has files that a model's weights are looked for in, complete or not.

    Raises:
        InputError: when it can't be read.
    """
    names = _names(directory)
    return any(f"{form}.index.json" in names or _fitting(form, names) for form in FORMS)


def join_tensors(found: WeightFiles, read: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    """The tensors of all the files, each read by `read`; an index must agree with them exactly.

    Raises:
        InputError: when a tensor is missing, in two files, or not in the index.
    """
    tensors: dict[str, T] = {}
    origin: dict[str, Path] = {}
    for file in found.files:
        for name, tensor in read(file).items():
            if found.places is not None and tensor.name == name:
                place = found.places.get(name)
                if place != file.name:
                    says = shown(place) if place is not None else "nothing of it"
                    raise InputError(
                        f"{found.index}: tensor {shown(name)} is in {shown(file.name)}, but the "
                        f"index says {says}"
                    )
            if name in origin:
                raise InputError(f"{file}: tensor {shown(name)} is in {origin[name].name} too")
            tensors[name], origin[name] = tensor, file
    missing = sorted((found.places or {}).keys() - tensors.keys())
    if found.places and missing:
        raise InputError(
            f"{found.index}: tensor {shown(missing[0])} is not in "
            f"{shown(found.places[missing[0]])}, though the index says so"
        )
    return tensors


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{directory}: can't be read ({error.strerror})") from None


def _fitting(form: str, names: Iterable[str]) -> list[str]:
    """The names that begin and end as `form` does."""
    return [name for name in names if fnmatchcase(name, "*".join(os.path.splitext(form)))]


def _indexed(directory: Path, form: str, index: Path, names: list[str]) -> WeightFiles:
    places = read_json(index, MAX_HEADER).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(v, str) for v in places.values())
    ):
        raise InputError(f"{index}: its weight_map is missing or is no map from text to text")
    files = sorted(set(places.values()))
    for name in files:
        if name in ("", ".", "..") or Path(name).name != name:
            raise InputError(f"{index}: names {shown(name)}, which is not a file beside it")
        if name not in names:
            raise InputError(f"{index}: the shard {shown(name)} is missing; download it too")
    return WeightFiles(form, [_find(directory, name) for name in files], index, places)


def _group(directory: Path, form: str, names: list[str]) -> list[str]:
    """The one file, or the one complete set of shards, whose name begins and ends as `form` does.

    `model.fp16.safetensors`, for example, or `model-00001-of-00002.safetensors` and its like.
    """
    groups: dict[str, list[str]] = {}
    for name in _fitting(form, names):
        shard = _SHARD.fullmatch(name)
        key = f"{shard['stem']}-of-{shard['count']}" if shard else name
        groups.setdefault(key, []).append(name)
    if len(groups) > 1:
        listed = _listed([group[0] for group in groups.values()])
        raise InputError(
            f"{directory}: {listed} could all be its weights; keep one, or name it {form}"
        )
    for group in groups.values():
        if shard := _SHARD.fullmatch(group[0]):
            suffix = os.path.splitext(form)[1]
            _check_complete(directory, shard["stem"], shard["count"], suffix, group)
        return group
    return []


def _check_complete(directory: Path, stem: str, count: str, suffix: str, group: list[str]) -> None:
    for number in range(1, int(count) + 1):
        name = f"{stem}-{number:0{len(count)}}-of-{count}{suffix}"
        if name not in group:
            raise InputError(f"{directory}: the shard {shown(name)} is missing; download it too")
    if len(group) != int(count):
        raise InputError(f"{directory}: {_listed(group)} are not {count} shards")


def _find(directory: Path, name: str) -> Path:
    path = find_in(directory, name)
    if path is None:
        raise InputError(f"{directory / name}: No such file or directory")
    return path


def _listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
