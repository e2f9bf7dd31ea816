"""A model directory on disk: read, write, check. The format is mlx-lm's."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import mlx.core as mx

from .. import device
from ..config import OpenELMConfig
from ..errors import InputError, OpenELMError
from ..files import find_in, read_json
from ..model.openelm import OpenELM
from ..model.quantization import PARTS, Quantization
from .adapter_files import is_adapter, open_adapter, read_safetensors
from .adapters import apply_adapter
from .hub import resolve, resolve_source, resolve_tokenizer
from .names import EMBEDDINGS, HEAD, map_names, with_embeddings
from .safetensors import Entry, check_float, load_arrays, read_header
from .shards import SHARD_BYTES, Spec, new_shards, raw, write_json
from .stored_quantization import check_unpacked, foreign_method, packed_scheme, stored_quantization
from .weight_files import PYTORCH, find_weights, join_tensors

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

METADATA = {"format": "mlx"}


@overload
def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: Mapping[str, Any] | None = ...,
    model_config: Mapping[str, Any] | None = ...,
    adapter_path: str | Path | None = ...,
    lazy: bool = ...,
    return_config: Literal[False] = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    *,
    tokenizer: str | Path | None = ...,
    seconds: dict[str, float] | None = ...,
) -> tuple[OpenELM, Tokenizer]: ...
@overload
def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: Mapping[str, Any] | None = ...,
    model_config: Mapping[str, Any] | None = ...,
    adapter_path: str | Path | None = ...,
    lazy: bool = ...,
    *,
    return_config: Literal[True],
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    tokenizer: str | Path | None = ...,
    seconds: dict[str, float] | None = ...,
) -> tuple[OpenELM, Tokenizer, dict[str, Any]]: ...
def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    tokenizer: str | Path | None = None,
    seconds: dict[str, float] | None = None,
) -> tuple[OpenELM, Tokenizer] | tuple[OpenELM, Tokenizer, dict[str, Any]]:
    """A model and its tokenizer.

    Args:
        path_or_hf_repo: a model directory, a Hugging Face id, or the name of a bundled model.
        tokenizer_config: values that override those of `tokenizer_config.json`.
        model_config: values that override those of `config.json`.
        adapter_path: directory (or Hugging Face id) of an adapter, mlx-lm's or PEFT's, which is
            merged into the weights (see `adapters.apply_adapter`). A tokenizer, a chat template
            and a `generation_config.json` in it take the place of the model's.
        lazy: leave the weights on disk until they are first used.
        return_config: return `config.json`, with the `model_config`, as a third value.
        revision: branch, tag or commit of the Hugging Face repository.
        trust_remote_code: of mlx-lm; no code of a repository is ever run.
        tokenizer: a SentencePiece file, a directory or a Hugging Face id, where the model has no
            tokenizer of its own, or in place of it.
        seconds: filled with the seconds that the "weights" and the "tokenizer" took; they are read
            at the same time.

    Raises:
        InputError: when something is missing or wrong; says which file, which tensor.
        OpenELMError: when the hub can't be reached.
    """
    from concurrent.futures import ThreadPoolExecutor

    from ..tokenizer.files import tokenizer_file
    from ..tokenizer.tokenizer import load_tokenizer

    directory = resolve(path_or_hf_repo, revision)
    if is_adapter(directory):
        raise InputError(
            f"{directory}: an adapter, not a model; load the model that it was trained on, with "
            "this as its adapter_path"
        )
    adapter = None if adapter_path is None else resolve_source(adapter_path)
    source = adapter if adapter is not None and tokenizer_file(adapter) else directory
    if tokenizer is not None:
        source = resolve_tokenizer(tokenizer)
    seconds = {} if seconds is None else seconds

    def read_tokenizer() -> Tokenizer:
        with _timed("tokenizer", seconds):
            return load_tokenizer(
                source, model=directory, adapter=adapter, tokenizer_config=tokenizer_config
            )

    # Leaving the block waits for the thread, even after an error: a thread that is still in C++
    # code when the interpreter ends aborts the process.
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_tokenizer)
        with _timed("weights", seconds):
            model = load_model(directory, lazy=lazy, model_config=model_config, adapter=adapter)
    loaded = reading.result()
    check_vocabulary(loaded.vocab_size, model.config.vocab_size, str(source))
    if return_config:
        return model, loaded, read_config(directory, model_config)
    return model, loaded


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def load_draft(
    path_or_hf_repo: str | Path,
    tokenizer: Tokenizer,
    *,
    revision: str | None = None,
) -> OpenELM:
    """A draft model for a model that has this tokenizer.

    A draft model without a tokenizer isn't checked: Apple's repositories have none.

    Raises:
        InputError: as `load`; and when its tokenizer is another one.
    """
    from ..tokenizer.tokenizer import find_tokenizer, load_tokenizer

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


def read_config(directory: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `config.json` of a directory, with some values changed.

    Raises:
        InputError: when there is none, it can't be read, or has no such values to change.
    """
    file = find_in(directory, "config.json") or directory / "config.json"
    values = read_json(file)
    known = values.keys() | {field.name for field in fields(OpenELMConfig)}
    strange = sorted((changes or {}).keys() - known)
    if strange:
        raise InputError(f"model_config: {file} has no {strange[0]!r}")
    return {**values, **(changes or {})}


def load_model(
    directory: Path,
    *,
    lazy: bool = False,
    model_config: Mapping[str, Any] | None = None,
    adapter: Path | None = None,
) -> OpenELM:
    """The model in a directory, in the dtype that suits the device.

    `model_config` overrides values of `config.json`; `adapter` is the directory of an adapter to
    merge into the weights.

    Raises:
        InputError: when a file or tensor is missing, damaged or of the wrong shape.
    """
    values = read_config(directory, model_config)
    where = str(directory / "config.json")
    config = OpenELMConfig.from_dict(values, where)
    quantization = stored_quantization(values, where)
    tied = config.share_input_output_layers
    entries = with_embeddings(read_entries(directory, foreign_method(values)), tied)
    _check_dtypes(entries, quantization)
    arrays = _arrays(entries)
    with _naming_files(directory, entries):
        if tied:
            _drop_redundant_head(arrays)
    norm = arrays.get("transformer.norm.weight")
    dtype = device.compute_dtype(mx.float32 if norm is None else norm.dtype)
    if adapter is not None:
        stored = arrays
        opened = open_adapter(adapter, {".safetensors": read_safetensors})
        arrays, config, quantization = apply_adapter(opened, stored, config, quantization)
        entries = {n: e for n, e in entries.items() if arrays.get(n) is stored.get(n)}
        del stored, opened
    with _naming_files(adapter or directory, entries):
        model = OpenELM(config, arrays, quantization, dtype)
        del arrays
        if not lazy:
            model.prepare()
    return model


@contextmanager
def _naming_files(directory: Path, entries: Mapping[str, Entry]) -> Iterator[None]:
    """Let errors about tensors begin with the tensor's file, or else with `directory`."""
    try:
        yield
    except InputError as error:
        named = [entry.path for name, entry in entries.items() if name in str(error).split()]
        raise InputError(f"{named[0] if named else directory}: {error}") from None
    except RuntimeError as error:
        for file in {entry.path for entry in entries.values()}:
            read_header(file)  # says so if the file has become shorter
        raise OpenELMError(f"{directory}: its weights couldn't be loaded ({error})") from error


def read_entries(directory: Path, method: str | None = None) -> dict[str, Entry]:
    """What the headers of a directory's weights say, by the names of a model directory.

    What is computed and not stored (RoPE's tables, a causal mask) is left out. When mlx-lm would
    read other files too, a line says so on the logger "mlx_openelm".

    Args:
        directory: with weights in safetensors.
        method: how another program quantized them, if one did (see `foreign_method`).

    Raises:
        InputError: when there are none, a file is missing or damaged, a name is unknown, or
            tensors are packed by `method`.
    """
    found = find_weights(directory)
    if found.form == PYTORCH:
        raise InputError(
            f"{directory}: has its weights in {PYTORCH}; convert it: openelm-convert {directory} "
            "-o DIR"
        )
    for note in found.notes:
        logging.getLogger("mlx_openelm").warning(note)
    tensors = join_tensors(found, read_header)
    check_unpacked(tensors.values(), method, str(directory))
    try:
        return map_names(tensors, quantized=True)[0]
    except InputError as error:
        where = found.files[0] if len(found.files) == 1 else directory
        raise InputError(f"{where}: {error}") from None


def read_arrays(directory: Path) -> tuple[dict[str, mx.array], dict[str, Path]]:
    """The tensors of a directory's weights, not yet read, and the file of each.

    Raises:
        InputError: as `read_entries`.
    """
    entries = read_entries(directory)
    return _arrays(entries), {name: entry.path for name, entry in entries.items()}


def _arrays(entries: Mapping[str, Entry]) -> dict[str, mx.array]:
    """The tensors themselves, read when they are used."""
    files: dict[Path, dict[str, mx.array]] = {}
    arrays = {}
    for name, entry in entries.items():
        if entry.path not in files:
            files[entry.path] = load_arrays(entry.path)
        arrays[name] = files[entry.path][entry.name]
    return arrays


def _check_dtypes(entries: Mapping[str, Entry], quantization: Quantization | None) -> None:
    """Refuse tensors that are neither floats nor the parts of a quantized matrix.

    Raises:
        InputError: starting with the file.
    """
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        try:
            if f"{module}.scales" not in entries:
                check_float(entry)
                if entry.dtype == "float64":
                    raise InputError(f"tensor {name} is of float64; convert it: openelm-convert")
            elif part == "scales":
                parts = {p: entries[f"{module}.{p}"] for p in PARTS if f"{module}.{p}" in entries}
                packed_scheme(module, parts, quantization)
        except InputError as error:
            raise InputError(f"{entry.path}: {error}") from None


def _drop_redundant_head(arrays: dict[str, mx.array]) -> None:
    """Remove an `lm_head` that repeats the tied embeddings, as some fine-tunes carry.

    Raises:
        InputError: when it isn't the same matrix.
    """
    for part in PARTS:
        head, embeddings = (name.removesuffix("weight") + part for name in (HEAD, EMBEDDINGS))
        if head not in arrays:
            continue
        a, b = arrays.pop(head), arrays.get(embeddings)
        if b is None or a.shape != b.shape or not mx.array_equal(a, b).item():
            raise InputError(
                f"{head} differs from {embeddings}, but config.json says that they are "
                "shared (share_input_output_layers)"
            )


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
