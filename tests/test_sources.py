"""Sources are recognised by their content; Hugging Face directories agree with their index."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_openelm.checkpoint.hub import resolve, resolve_source, resolve_tokenizer
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert.atomic import new_directory, new_files
from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import InputError, OpenELMError

from .checkpoints import tensor, torch_file

CONFIG = OpenELMConfig.scaled(vocab_size=8, model_dim=8, head_dim=2, num_transformer_layers=1)


def write_index(directory: Path, places: object, name: str = "model.safetensors") -> None:
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))


def write_shards(directory: Path, **shards: dict[str, int]) -> None:
    for file, values in shards.items():
        arrays = {name: mx.array([value]) for name, value in values.items()}
        mx.save_safetensors(str(directory / f"{file}.safetensors"), arrays)


def read(directory: Path) -> dict[str, object]:
    return {n: t.read().tolist() for n, t in open_source(directory).tensors.items()}


def test_a_directory_with_all_its_parts(tmp_path: Path) -> None:
    write_shards(tmp_path, model={"a": 1})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    source = open_source(tmp_path)
    assert source.kind == "Hugging Face directory (model.safetensors)"
    assert (source.path, source.config) == (tmp_path, CONFIG)
    assert source.tokenizer == tmp_path / "tokenizer.model"
    assert read(tmp_path) == {"a": [1]}


def test_weights_alone_are_enough(tmp_path: Path) -> None:
    write_shards(tmp_path, model={"a": 1})
    source = open_source(tmp_path)
    assert source.config is source.tokenizer is None


def test_shards_are_joined(tmp_path: Path) -> None:
    write_shards(tmp_path, one={"a": 1, "b": 2}, two={"c": 3})
    places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    write_index(tmp_path, places)
    assert read(tmp_path) == {"a": [1], "b": [2], "c": [3]}


def test_files_of_pytorch_are_read(tmp_path: Path) -> None:
    torch_file(tmp_path / "pytorch_model.bin", {"w": tensor()})
    assert open_source(tmp_path).kind == "Hugging Face directory (pytorch_model.bin)"
    assert read(tmp_path) == {"w": [[0, 1, 2], [3, 4, 5]]}


def test_shards_of_pytorch_are_joined(tmp_path: Path) -> None:
    for name in "ab":
        torch_file(tmp_path / f"{name}.bin", {name: tensor(shape=(1,), stride=(1,))})
    write_index(tmp_path, {"a": "a.bin", "b": "b.bin"}, "pytorch_model.bin")
    assert read(tmp_path) == {"a": [0], "b": [0]}


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """As huggingface_hub lays out its downloads."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs, abc={"a": 1})
    (snapshot / "model.safetensors").symlink_to(blobs / "abc.safetensors")
    assert read(snapshot) == {"a": [1]}


INDEXES = {
    "no map": (None, "weight_map is missing"),
    "a list": (["one.safetensors"], "weight_map is missing"),
    "a number as file": ({"a": 1}, "weight_map is missing"),
    "a missing shard": (
        {"a": "one.safetensors", "b": "two.safetensors"},
        "'two.safetensors' is missing",
    ),
    "a path upwards": ({"a": "../one.safetensors"}, "not a file beside it"),
    "an absolute path": ({"a": "/etc/passwd"}, "not a file beside it"),
    "a subdirectory": ({"a": "sub/one.safetensors"}, "not a file beside it"),
    "the parent": ({"a": ".."}, "not a file beside it"),
    "nothing": ({"a": ""}, "not a file beside it"),
    "a zero byte": ({"a": "one\0"}, "'one\\x00' is missing"),
    "a long name": ({"a": "x" * 300}, "is missing"),
    "a tensor that isn't there": (
        {"a": "one.safetensors", "b": "one.safetensors"},
        "'b' is not in 'one.safetensors'",
    ),
    "a tensor that isn't named": ({"b": "one.safetensors"}, "'a' is in 'one.safetensors', but the"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_must_agree_with_its_shards(name: str, tmp_path: Path) -> None:
    places, reason = INDEXES[name]
    write_shards(tmp_path, one={"a": 1})
    write_index(tmp_path, places)
    with pytest.raises(InputError) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'model.safetensors.index.json'}: ")
    assert reason in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, one={"a": 1}, two={"a": 2, "b": 3})
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(InputError, match=r"'a' is in 'two.*', but .* 'one.safe"):
        open_source(tmp_path)


def test_a_damaged_index_says_so(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one", "a": "two"}}')
    with pytest.raises(InputError, match="'a' is there twice"):
        open_source(tmp_path)
    index.write_bytes(b" " * (9 << 20))
    with pytest.raises(InputError, match="no such file needs more"):
        open_source(tmp_path)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, model={"a": 1})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"config.json: model_type is 'llama'"):
        open_source(tmp_path)


def test_a_pickled_list_is_no_state_dict(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "pytorch_model.bin", [tensor()])
    with pytest.raises(InputError, match=r"pytorch_model\.bin: holds a list"):
        open_source(path.parent)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model.safetensors in it"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        open_source(tmp_path / "nothing")
    with pytest.raises(InputError, match="can't be read"):
        open_source(tmp_path / ("x" * 300))
    (tmp_path / "text").write_text("a checkpoint")
    with pytest.raises(InputError, match="neither a checkpoint of PyTorch"):
        open_source(tmp_path / "text")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InputError, match="neither a checkpoint of PyTorch"):
        open_source(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        open_source(tmp_path / "pipe")


def test_averaged_weights_are_in_training_checkpoints_only(tmp_path: Path) -> None:
    write_shards(tmp_path, model={"a": 1})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match="only a full training checkpoint"):
            open_source(path, ema=True)


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of one's own, and no rights beyond: a superuser becomes nobody meanwhile."""
    directory = Path(tempfile.mkdtemp())
    user = os.geteuid()
    if user == 0:
        os.chown(directory, 65534, -1)
        os.seteuid(65534)
    yield directory
    os.seteuid(user)
    for path in directory.iterdir():
        path.chmod(0o700)
    shutil.rmtree(directory)


def test_no_permission_says_so(nobody: Path) -> None:
    path = torch_file(nobody / "x.pt", {"w": tensor()})
    open_source(path)
    path.chmod(0)
    with pytest.raises(InputError, match="x.pt: can't be read .Permission denied"):
        open_source(path)


def new_file(out: Path, force: bool) -> AbstractContextManager[list[Path]]:
    return new_files({out: lambda file: None}, force)


def test_a_directory_that_may_not_be_entered(nobody: Path) -> None:
    (nobody / "closed").mkdir(mode=0)
    for find in (resolve, resolve_source, resolve_tokenizer):
        with pytest.raises(InputError, match="x: can't be read .Permission denied"):
            find(nobody / "closed" / "x")
    for check in (new_directory, new_file):
        for out, words in (("closed/x", "can't be looked into"), ("closed", "closed")):
            with pytest.raises(OpenELMError, match=words), check(nobody / out, False):
                pass


def test_a_directory_that_may_not_be_written_to(nobody: Path) -> None:
    (nobody / "readonly").mkdir(mode=0o555)
    for make in (new_directory, new_file):
        with (
            pytest.raises(OpenELMError, match="can't be written .Permission denied"),
            make(nobody / "readonly" / "x", False),
        ):
            pass
    assert list((nobody / "readonly").iterdir()) == []


def test_the_fuzzer_runs(tmp_path: Path) -> None:
    """Some inputs of each run; it has to allow what conversion itself does."""
    script = Path(__file__).parent.parent / "scripts" / "fuzz_readers.py"
    command = [sys.executable, str(script), "40", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
