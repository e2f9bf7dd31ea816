"""A source's tensors -> a model directory, complete or not there at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_openelm.checkpoint import check_vocabulary, save_model
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError, OpenELMError
from mlx_openelm.quantization import Quantization, Scheme, quantize
from mlx_openelm.shapes import tensor_shapes
from mlx_openelm.tokenizer import load_tokenizer
from mlx_openelm.tokenizer_files import write_tokenizer_files

from .sources import LazyTensor

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
EMBEDDINGS, HEAD = "transformer.token_embeddings.weight", "lm_head.weight"


@dataclass
class Conversion:
    """What was done, for the closing lines."""

    parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, scales and biases included."""
        return 8 * self.bytes_after / self.parameters


def convert(
    tensors: dict[str, LazyTensor],
    config: OpenELMConfig,
    out: Path,
    *,
    tokenizer: Path | None = None,
    chat: bool = False,
    dtype: str | None = None,
    scheme: Scheme | None = None,
    force: bool = False,
) -> Conversion:
    """Write a model directory.

    Args:
        tensors: by the names of a model directory.
        config: the geometry.
        out: the directory to make.
        tokenizer: a SentencePiece file to put beside the weights.
        chat: write the Instruct models' chat format for other runtimes.
        dtype: of the weights; None keeps 16-bit ones as they are and makes others bfloat16.
        scheme: quantize every matrix whose columns the group size divides.
        force: replace `out` if it exists.

    Raises:
        InputError: when the tensors aren't those of `config`, when a value doesn't fit into
            `dtype`, when the tokenizer has too many pieces, or when `out` isn't empty.
    """
    done = Conversion(bytes_before=sum(t.nbytes for t in tensors.values()))
    tensors = _without_redundant_head(tensors, config, done)
    check_shapes(tensors, config)
    if tokenizer is not None:
        pieces = load_tokenizer(tokenizer).vocab_size
        check_vocabulary(pieces, config.vocab_size, str(tokenizer))
    quantization = Quantization(scheme) if scheme else None
    with new_directory(out, force) as directory:
        converted = _converted(tensors, config, dtype, quantization, done)
        save_model(directory, config, converted, quantization)
        if tokenizer is not None:
            write_tokenizer_files(tokenizer, directory, chat=chat)
    return done


def check_shapes(tensors: dict[str, LazyTensor], config: OpenELMConfig) -> None:
    """Refuse tensors that are missing, too many, or of the wrong shape.

    Raises:
        InputError: naming one of them, with the shape expected and found.
    """
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"tensor {name} {list(shape)} is missing")
        found = tensors[name].shape
        if found != shape:
            raise InputError(
                f"tensor {tensors[name].name} has the shape {list(found)}; the config says "
                f"{list(shape)}"
            )
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise InputError(f"tensor {tensors[extra[0]].name} is not part of a model of this config")


def _without_redundant_head(
    tensors: dict[str, LazyTensor], config: OpenELMConfig, done: Conversion
) -> dict[str, LazyTensor]:
    if not config.share_input_output_layers or HEAD not in tensors or EMBEDDINGS not in tensors:
        return tensors
    head, embeddings = tensors[HEAD], tensors[EMBEDDINGS]
    same = head.shape == embeddings.shape and mx.array_equal(head.read(), embeddings.read()).item()
    if not same:
        raise InputError(
            f"tensor {head.name} differs from {embeddings.name}, but the config says that they "
            "are shared (share_input_output_layers)"
        )
    done.notes.append(f"{head.name} repeats the embeddings: left out")
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _converted(
    tensors: dict[str, LazyTensor],
    config: OpenELMConfig,
    dtype: str | None,
    quantization: Quantization | None,
    done: Conversion,
) -> Iterator[tuple[str, mx.array]]:
    for name, shape in tensor_shapes(config).items():
        array = _cast(tensors[name].read(), dtype, tensors[name].name)
        done.parameters += array.size
        module = name.removesuffix(".weight")
        scheme = quantization.scheme(module) if quantization and len(shape) == 2 else None
        if scheme and shape[1] % scheme.group_size:
            assert quantization is not None
            quantization.exceptions[module] = scheme = None
            done.notes.append(f"{module}: {shape[1]} columns don't divide into groups; kept")
        if scheme:
            parts = [(f"{module}.{part}", a) for part, a in quantize(array, scheme).arrays()]
        else:
            parts = [(name, array)]
        for part, a in parts:
            mx.eval(a)
            done.bytes_after += a.nbytes
            yield part, a


def _cast(array: mx.array, dtype: str | None, name: str) -> mx.array:
    """In `dtype`, evaluated.

    Raises:
        InputError: when the tensor isn't floating point, or the dtype can't hold its values.
    """
    if not mx.issubdtype(array.dtype, mx.floating):
        raise InputError(f"tensor {name} is of {array.dtype}, not a floating-point type")
    if dtype is None:
        dtype = "float16" if array.dtype == mx.float16 else "bfloat16"
    cast = array.astype(DTYPES[dtype])
    if not mx.all(mx.isfinite(cast)).item():
        if not mx.all(mx.isfinite(array)).item():
            raise InputError(f"tensor {name} holds a value that is not finite (NaN or infinity)")
        largest = mx.max(mx.abs(array)).item()
        raise InputError(
            f"tensor {name} holds {largest:.4g}, more than {dtype} can; use --dtype bfloat16"
        )
    return cast


@contextmanager
def new_directory(out: Path, force: bool) -> Iterator[Path]:
    """A directory beside `out` to write to, which takes `out`'s place at the end.

    After an error nothing is left of it, and `out` is as it was.

    Raises:
        InputError: when `out` is a file, or isn't empty and `force` isn't given.
        OpenELMError: when it can't be written.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is not a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out} exists and is not empty (--force replaces it)")
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        partial.chmod(0o777 & ~_umask())
    except OSError as error:
        raise OpenELMError(f"{out}: can't be written ({error.strerror})") from None
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if out.is_dir():
            old = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except OSError as error:
        raise OpenELMError(f"{out}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
