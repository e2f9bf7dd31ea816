"""A text's keys and values, kept for the next text that begins like it: in memory, or in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from .errors import InputError
from .files import sync
from .model import OpenELM
from .shards import raw

FORMAT = "mlx-openelm prompt cache 1"


class PromptCache:
    """What the model has read, and its keys and values: give it to `stream_generate` every time.

    A prompt then costs only what follows the longest beginning that it shares with the text before
    it, answers included. The result is that of reading it all: what isn't shared is trimmed away.

    Args:
        max_kv_size, kv_bits: as in `OpenELM.make_cache`. A context that has slid can't be trimmed:
            it serves a prompt that goes on with it, and any other is read anew.

    Attributes:
        cache: the keys and values.
        tokens: the text they are of; the last of it may not be in the cache yet.
    """

    def __init__(
        self, model: OpenELM, max_kv_size: int | None = None, kv_bits: int | None = None
    ) -> None:
        self.model = model
        self.cache = model.make_cache(max_kv_size, kv_bits)
        self.tokens: list[int] = []

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values are in the cache."""
        return self.tokens[: self.cache.offset]

    @property
    def kv_bits(self) -> int | None:
        """The bits that keys and values are quantized to, or None."""
        return self.cache.scheme.bits if self.cache.scheme else None

    def begin(self, prompt: Sequence[int]) -> int:
        """Keep of the cache what `prompt` shares with it; returns how many tokens that are.

        At least one of the prompt is left, for the logits after it.
        """
        shared = 0
        for mine, theirs in zip(self.held, prompt[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        beyond = self.cache.offset - shared
        if beyond and self.cache.ring is not None and self.cache.offset > self.cache.ring:
            self.cache = self.model.make_cache(self.cache.max_size, self.kv_bits)
            shared = 0
        elif beyond:
            self.cache.trim(beyond)
        self.tokens = list(prompt)
        return shared

    def save(self, file: str | Path) -> None:
        """Write all of it into a safetensors file, which appears when it is complete.

        Raises:
            InputError: when it can't be written there, or the context slides.
        """
        file = Path(file)
        arrays = self.cache.state()
        values = {
            "format": FORMAT,
            "model": fingerprint(self.model),
            "tokens": json.dumps(self.held),
            "kv_bits": json.dumps(self.kv_bits),
        }
        values["sha256"] = _digest(arrays, values)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            with part.open("xb") as out:
                mx.save_safetensors(cast("Any", out), arrays, values)
                out.flush()
                sync(out.fileno())
            part.replace(file)
        except OSError as error:
            raise InputError(f"{file}: can't be written ({error.strerror})") from None
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path, model: OpenELM) -> PromptCache:
        """Read what `save` has written, for the same model.

        Raises:
            InputError: when the file can't be read, is damaged, or is of another model.
        """
        arrays, values = _read(Path(file))
        if values["model"] != fingerprint(model):
            raise InputError(
                f"{file}: the prompt cache of another model, or of this one computed in another "
                "dtype; name another file, or delete this one"
            )
        made = cls(model, kv_bits=json.loads(values["kv_bits"]))
        made.tokens = json.loads(values["tokens"])
        made.cache.restore(arrays, len(made.tokens))
        return made


def _read(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        with file.open("rb") as opened:
            loaded = mx.load(cast("Any", opened), format="safetensors", return_metadata=True)
            arrays, values = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
            if values.get("format") != FORMAT:
                raise InputError(f"{file}: not a prompt cache that this version has written")
            if values.pop("sha256", None) != _digest(arrays, values):
                raise InputError(f"{file}: a damaged prompt cache; delete it")
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror})") from None
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a prompt cache, or a damaged one; delete it") from None
    return arrays, values


def fingerprint(model: OpenELM) -> str:
    """A hash of the configuration and of all weights as they are in memory.

    Of each matrix the sums of the rows and of the columns are hashed, the bits of its values taken
    as integers: a weight that changes, changes two of them, and rows or columns that change places
    change some. So every weight counts, and finding it costs what a few decoded tokens cost,
    where hashing the bytes would cost seconds a gigabyte.
    """
    arrays = model.parameters()
    sums = {
        f"{name} {axis}": mx.sum(_bits(array), axis=axis) if array.ndim > 1 else array
        for name, array in arrays.items()
        for axis in range(array.ndim)
    }
    return _digest(
        sums,
        {
            "config": model.config.to_dict(),
            "dtypes": {name: str(array.dtype) for name, array in arrays.items()},
        },
    )


def _bits(array: mx.array) -> mx.array:
    """The bits of values of any dtype, as integers."""
    return array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])


def _digest(arrays: Mapping[str, mx.array], values: Mapping[str, Any]) -> str:
    from hashlib import sha256

    whole = sha256(json.dumps(values, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        whole.update(f"{name} {array.dtype} {array.shape}".encode())
        whole.update(raw(mx.contiguous(array)))
    return whole.hexdigest()
