"""A model directory on disk: read, write, check. The format is mlx-lm's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from . import device
from .adapter_files import is_adapter, open_adapter, own_tokenizer, read_safetensors
from .adapters import apply_adapter
from .config import OpenELMConfig
from .errors import InputError
from .files import read_json
from .hub import resolve, resolve_source, resolve_tokenizer
from .model import OpenELM
from .quantization import Quantization
from .shards import SHARD_BYTES, Spec, new_shards, raw, write_json

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

METADATA = {"format": "mlx"}


def load(
    path_or_hf_repo: str | Path,
    *,
    tokenizer: str | Path | None = None,
    adapter_path: str | Path | None = None,
    revision: str | None = None,
    lazy: bool = False,
    seconds: dict[str, float] | None = None,
) -> tuple[OpenELM, Tokenizer]:
    """A model and its tokenizer.

    Args:
        path_or_hf_repo: a model directory, a Hugging Face id, or the name of a bundled model.
        tokenizer: a SentencePiece file, a directory or a Hugging Face id, where the model has no
            tokenizer of its own, or in place of it.
        adapter_path: directory (or Hugging Face id) of an adapter, mlx-lm's or PEFT's, which is
            merged into the weights (see `adapters.apply_adapter`). A tokenizer in it takes the
            place of the model's.
        revision: branch, tag or commit of the Hugging Face repository.
        lazy: leave the weights on disk until they are first used.
        seconds: is told what the "weights" took, and the "tokenizer", which is read beside them.

    Raises:
        InputError: when something is missing or wrong; says which file, which tensor.
        OpenELMError: when the hub can't be reached.
    """
    from .tokenizer import load_tokenizer

    directory = resolve(path_or_hf_repo, revision)
    if is_adapter(directory):
        raise InputError(
            f"{directory}: an adapter, not a model; load the model that it was trained on, with "
            "this as its adapter_path"
        )
    adapter = None if adapter_path is None else resolve_source(adapter_path)
    source = adapter if adapter is not None and own_tokenizer(adapter) else directory
    if tokenizer is not None:
        source = resolve_tokenizer(tokenizer)
    seconds = {} if seconds is None else seconds
    reading = beside(lambda: _timed("tokenizer", seconds, lambda: load_tokenizer(source)))
    model = _timed("weights", seconds, lambda: load_model(directory, lazy=lazy, adapter=adapter))
    loaded = reading()
    check_vocabulary(loaded.vocab_size, model.config.vocab_size, str(source))
    return model, loaded


_T = TypeVar("_T")


def _timed(name: str, seconds: dict[str, float], work: Callable[[], _T]) -> _T:
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result


def beside(work: Callable[[], _T]) -> Callable[[], _T]:
    """Begin `work` on a thread; the function returned waits for its result, or its error."""
    outcome: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> _T:
        thread.join()
        if errors:
            raise errors[0]
        return outcome[0]

    return wait


def load_draft(
    path_or_hf_repo: str | Path,
    tokenizer: Tokenizer,
    *,
    revision: str | None = None,
) -> OpenELM:
    """A draft model for a model that has this tokenizer.

    One without a tokenizer of its own is taken at its word, as Apple's repositories have none.

    Raises:
        InputError: as `load`; and when its tokenizer is another one.
    """
    from .tokenizer import find_tokenizer, load_tokenizer

    directory = resolve(path_or_hf_repo, revision)
    try:
        find_tokenizer(directory)
    except InputError:
        pass
    else:
        difference = tokenizer.difference(load_tokenizer(directory))
        if difference:
            raise InputError(
                f"{path_or_hf_repo}: its tokenizer is not the model's ({difference}), so it can't "
                "draft for it"
            )
    model = load_model(directory)
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_size, str(path_or_hf_repo))
    return model


def check_vocabulary(pieces: int, rows: int, where: str) -> None:
    """Refuse a tokenizer with more pieces than the model has embedding rows.

    Raises:
        InputError: with both numbers.
    """
    if pieces > rows:
        raise InputError(
            f"{where}: the tokenizer has {pieces} pieces, the model only {rows} embedding rows; "
            "this is not the model's tokenizer"
        )


def load_model(directory: Path, *, lazy: bool = False, adapter: Path | None = None) -> OpenELM:
    """The model in a directory, in the dtype that suits the device.

    `adapter` is the directory of one that is merged into it.

    Raises:
        InputError: when a file or tensor is missing, damaged or of the wrong shape.
    """
    values = read_json(directory / "config.json")
    where = str(directory / "config.json")
    config = OpenELMConfig.from_dict(values, where)
    stored = values.get("quantization") or values.get("quantization_config")
    quantization = Quantization.from_dict(stored, where) if isinstance(stored, Mapping) else None
    arrays, files = read_arrays(directory)
    if config.share_input_output_layers:
        drop_redundant_head(arrays, str(files.get("lm_head.weight")))
    norm = arrays.get("transformer.norm.weight")
    dtype = device.compute_dtype(mx.float32 if norm is None else norm.dtype)
    if adapter is not None:
        opened = open_adapter(adapter, {".safetensors": read_safetensors})
        arrays, config, quantization = apply_adapter(opened, arrays, config, quantization)
    try:
        model = OpenELM(config, arrays, quantization, dtype)
    except InputError as error:
        named = [file for name, file in files.items() if name in str(error).split()]
        raise InputError(f"{named[0] if named else directory}: {error}") from None
    del arrays
    if not lazy:
        mx.eval(model.parameters())
    return model


def drop_redundant_head(arrays: dict[str, mx.array], where: str) -> None:
    """Remove an `lm_head.weight` that repeats the tied embeddings, as some fine-tunes carry.

    Raises:
        InputError: when it isn't the same matrix.
    """
    head = arrays.pop("lm_head.weight", None)
    embeddings = arrays.get("transformer.token_embeddings.weight")
    if head is None or embeddings is None:
        return
    if head.shape != embeddings.shape or not mx.array_equal(head, embeddings).item():
        raise InputError(
            f"{where}: lm_head.weight differs from transformer.token_embeddings.weight, but "
            "config.json says that they are shared (share_input_output_layers)"
        )


def read_arrays(directory: Path) -> tuple[dict[str, mx.array], dict[str, Path]]:
    """The tensors of a directory's safetensors files, not yet read, and the file of each.

    Raises:
        InputError: when there are none, or one is missing or damaged.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: no weight_map")
        names = sorted(set(map(str, shards.values())))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise InputError(
            f"{directory}: no model.safetensors in it (other formats have to be converted: "
            "openelm-convert)"
        )
    arrays: dict[str, mx.array] = {}
    files: dict[str, Path] = {}
    for name in names:
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise InputError(f"{file}: missing, though {index.name} names it")
        try:
            found = mx.load(str(file))
        except RuntimeError as error:
            raise InputError(f"{file}: not a readable safetensors file ({error})") from None
        assert isinstance(found, dict)
        twice = arrays.keys() & found.keys()
        if twice:
            raise InputError(f"{file}: tensor {min(twice)} is in {files[min(twice)].name} too")
        arrays |= found
        files |= dict.fromkeys(found, file)
    return arrays, files


def save_model(
    directory: Path,
    config: OpenELMConfig,
    arrays: Mapping[str, mx.array],
    quantization: Quantization | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights, in shards of at most `shard_bytes`."""
    specs = {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}
    with new_shards(directory, specs, METADATA, shard_bytes) as write:
        for name, array in arrays.items():
            write(name, raw(array))
    save_config(directory, config, quantization)


def save_config(
    directory: Path, config: OpenELMConfig, quantization: Quantization | None = None
) -> None:
    """Write `config.json`, the way mlx-lm reads it."""
    values: dict[str, Any] = {"architectures": ["OpenELMForCausalLM"], **config.to_dict()}
    if quantization is not None:
        values["quantization"] = values["quantization_config"] = quantization.to_dict()
    write_json(directory / "config.json", values)
