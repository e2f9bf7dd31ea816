"""What the converter writes: the same bytes each time, by recipe, in bounded memory, or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.checkpoint import shards
from mlx_openelm.checkpoint.directory import load_model, read_arrays, save_model
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.convert import writer
from mlx_openelm.convert.behind import behind
from mlx_openelm.convert.floats import largest
from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import OpenELMError

from .conftest import Run
from .models import CONFIGS, random_model

MODULE = "mlx_openelm.convert"
DEMO = BUNDLED["demo"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model of three uneven layers."""
    directory = tmp_path_factory.mktemp("source")
    model = random_model(CONFIGS["uneven"])
    save_model(directory, model.config, model.parameters())
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_the_same_input_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        result = run(MODULE, DEMO, "-o", tmp_path / name, "-q", "--bits", "6")
        assert result.returncode == 0, result.stderr
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_record_has_the_hashes_of_what_was_read_and_written(
    run: Run, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(MODULE, source, "-o", out, "-q", "--group-size", "32", "--keep-embeddings")
    record = json.loads((out / "conversion.json").read_text())
    before, after = read_arrays(source)[0], read_arrays(out)[0]
    hashed: dict[str, str] = {}
    for name, entry in record["tensors"].items():
        assert entry["source_sha256"] == sha256(before[entry["source"]]), name
        hashed |= entry["sha256"]
    assert hashed == {name: sha256(array) for name, array in after.items()}
    assert record["options"]["dtype"] == "bfloat16"
    assert record["options"]["quantization"]["transformer.token_embeddings"] is False
    assert str(tmp_path) not in (out / "conversion.json").read_text()


def sha256(array: mx.array) -> str:
    return hashlib.sha256(shards.raw(array)).hexdigest()


def test_shards_are_what_safetensors_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {
        "odd": mx.arange(3, dtype=mx.float16),
        "four": mx.arange(6).astype(mx.uint32).reshape(2, 3),
        "one": mx.array([1, 2, 3], dtype=mx.uint8),
        "float": mx.arange(4, dtype=mx.float32).reshape(2, 2).T,
    }
    specs = {name: shards.Spec(a.dtype, a.shape) for name, a in arrays.items()}
    with shards.new_shards(tmp_path, specs, {"format": "mlx"}) as write:
        for name, array in arrays.items():
            write(name, shards.raw(array))
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], np.array(array)), name
        assert found[name].ctypes.data % found[name].itemsize == 0


def test_a_tensor_that_stays_incomplete_is_an_error(tmp_path: Path) -> None:
    specs = {"a": shards.Spec(mx.float32, (4, 2))}
    with (
        pytest.raises(ValueError, match="tensor a is not complete"),
        shards.new_shards(tmp_path, specs, {}) as write,
    ):
        write("a", shards.raw(mx.zeros((3, 2))))
    with (
        pytest.raises(ValueError, match="more than the 32 expected"),
        shards.new_shards(tmp_path, specs, {}) as write,
    ):
        write("a", shards.raw(mx.zeros((5, 2))))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_largest_magnitude(dtype: mx.Dtype) -> None:
    values = [0.0, 3.0, -7.5, 1e-4]
    assert largest(mx.array(values, dtype)) == 7.5
    assert largest(-mx.array(values, dtype)) == 7.5
    assert largest(-mx.abs(mx.array(values[1:], dtype))) == 7.5
    assert largest(mx.zeros(3, dtype)) == largest(-mx.zeros(3, dtype)) == 0
    assert largest(mx.array([*values, float("-inf")], dtype)) == float("inf")
    assert np.isnan(largest(mx.array([*values, float("inf"), float("nan")], dtype)))


RECIPE = {
    "attn.out_proj": "keep",
    "layers.0.*": {"bits": 8, "group_size": 32},
    "ffn.proj_?": {"mode": "mxfp4"},
    "nothing.like.it": "keep",
}


@pytest.mark.parametrize("default", [True, False])
def test_a_recipe_chooses_module_by_module(
    run: Run, source: Path, tmp_path: Path, default: bool
) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out"
    recipe.write_text(json.dumps(RECIPE))
    options = ["-q", "--bits", "5", "--group-size", "32"] if default else []
    result = run(MODULE, source, "-o", out, "--recipe", recipe, *options)
    assert result.returncode == 0, result.stderr
    assert "the recipe's 'nothing.like.it' fits no module" in result.stderr
    model, arrays = load_model(out), read_arrays(out)[0]
    assert model.quantization is not None
    found = {}
    for module in ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2"):
        for i in (0, 2):
            name = f"transformer.layers.{i}.{module}"
            stored = f"{name}.scales" in arrays
            scheme = model.quantization.scheme(name)
            assert stored == (scheme is not None)
            found[f"{i}.{module}"] = (scheme.mode, scheme.bits) if scheme else None
    rest = ("affine", 5) if default else None
    kept = {"0.attn.out_proj": None, "2.attn.out_proj": None}
    first = dict.fromkeys(("0.attn.qkv_proj", "0.ffn.proj_1"), ("affine", 8))
    last = {"2.attn.qkv_proj": rest, "2.ffn.proj_1": ("mxfp4", 4)}
    narrow = {"0.ffn.proj_2": None, "2.ffn.proj_2": None}  # 16 and 48 columns
    assert found == {**kept, **first, **last, **narrow}
    config = json.loads((out / "config.json").read_text())["quantization"]
    assert config["transformer.layers.0.attn.out_proj"] is False


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"a": {"bits": 7}}, "'a': bits of mode affine must be"),
        ({"a": {"bit": 4}}, "'a' needs bits, group_size and mode"),
        ({"a": "drop"}, "'a' needs bits"),
        ([], "holds a JSON list"),
    ],
)
def test_a_recipe_that_makes_no_sense(
    run: Run, source: Path, tmp_path: Path, recipe: object, message: str
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    result = run(MODULE, source, "-o", tmp_path / "out", "--recipe", file)
    assert result.returncode == 2
    assert "recipe.json" in result.stderr
    assert message in result.stderr.splitlines()[-1]


def test_the_vocabulary_is_trimmed_to_the_tokenizers(run: Run, tmp_path: Path) -> None:
    wide, out = tmp_path / "wide", tmp_path / "out"
    arrays = read_arrays(DEMO)[0]
    name = "transformer.token_embeddings.weight"
    arrays[name] = mx.concatenate([arrays[name], mx.ones((32, 192), mx.float16)])
    config = load_model(DEMO).config.to_dict() | {"vocab_size": 4096 + 32}
    wide.mkdir()
    mx.save_safetensors(str(wide / "model.safetensors"), arrays)
    (wide / "config.json").write_text(json.dumps(config))
    options = (wide, "-o", out, "--trim-vocab")
    refused = run(MODULE, *options)
    assert refused.returncode == 2
    assert "--trim-vocab needs the tokenizer" in refused.stderr
    result = run(MODULE, *options, "--tokenizer", DEMO, "--verify")
    assert result.returncode == 0, result.stderr
    assert "trimmed from 4128 to 4096 rows" in result.stderr
    trimmed, demo = read_arrays(out)[0], read_arrays(DEMO)[0]
    assert trimmed.keys() == demo.keys()
    assert all(mx.array_equal(trimmed[key], demo[key]).item() for key in demo)


def test_a_model_that_overflows_float16_is_not_stored_in_it(
    run: Run, source: Path, tmp_path: Path
) -> None:
    arrays = read_arrays(source)[0]
    norm = "transformer.layers.1.attn_norm.weight"
    arrays[norm] = mx.full(arrays[norm].shape, 3e4)  # itself fits
    config = load_model(source).config
    for dtype in (mx.float32, mx.float16):
        save_model(tmp_path, config, {n: a.astype(dtype) for n, a in arrays.items()})
        out = tmp_path / "out"
        result = run(MODULE, tmp_path, "-o", out, "--dtype", "float16")
        assert result.returncode == 2
        assert "layer 1 reaches" in result.stderr
        assert "more than float16's 65504" in result.stderr.splitlines()[-1]
        options = ("-o", out, "--dtype", "float16", "--allow-nonfinite")
        assert run(MODULE, tmp_path, *options).returncode == 0
        shutil.rmtree(out)
    result = run(MODULE, tmp_path, "-o", out)
    assert "bfloat16, not float16 as it was: layer 1 reaches" in result.stderr
    assert read_arrays(out)[0][norm].dtype == mx.bfloat16


def test_values_that_are_not_finite_can_be_allowed(run: Run, source: Path, tmp_path: Path) -> None:
    arrays = read_arrays(source)[0]
    arrays["transformer.norm.weight"] = mx.full((32,), np.nan)
    save_model(tmp_path, load_model(source).config, arrays)
    result = run(MODULE, tmp_path, "-o", tmp_path / "out")
    assert result.returncode == 2
    assert "transformer.norm.weight holds a value that is not finite" in result.stderr
    assert run(MODULE, tmp_path, "-o", tmp_path / "out", "--allow-nonfinite").returncode == 0


KILLED = """
import sys, os, signal
from pathlib import Path
from mlx_openelm.convert import writer
from mlx_openelm.convert.__main__ import main
def stop(*_):
    print("ready", flush=True)
    signal.pause()
writer.save_config = stop
main(sys.argv[1:])
"""


def test_what_a_killed_run_left_is_removed_by_the_next(
    run: Run, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, source, "-o", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        [partial] = tmp_path.iterdir()
        assert partial.name.startswith(".out.partial-")
        # another run with the same target leaves the living one alone
        assert run(MODULE, source, "-o", out).returncode == 0
        assert {partial, out} == set(tmp_path.iterdir())
        process.send_signal(signal.SIGKILL)
    assert partial.exists()
    assert run(MODULE, source, "-o", out, "--force").returncode == 0
    assert [out] == list(tmp_path.iterdir())


def test_killed_at_any_moment_the_target_is_complete_or_not_there(
    source: Path, tmp_path: Path
) -> None:
    out, complete = tmp_path / "out", set()
    command = [sys.executable, "-m", MODULE, source, "-o", out, "--force"]
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    took, wanted = time.monotonic() - start, content(out)
    for share in np.linspace(0.5, 1.0, 6):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as p:
            time.sleep(took * share)
            p.send_signal(signal.SIGKILL)
        complete.add(out.exists())
        assert not out.exists() or content(out) == wanted
    assert True in complete


def test_a_full_disk_says_so_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    opened = open_source(source)
    assert opened.config is not None
    with pytest.raises(OpenELMError, match="out: can't be written .No space left on device"):
        writer.convert(opened.tensors, opened.config, tmp_path / "out", writer.Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["convert", "hf", "corenet", "gguf"])
def test_a_file_that_the_system_cuts_short(tmp_path: Path, command: str) -> None:
    """A limit on the size of a file stands for the full disk; this time it is the real thing."""
    out = tmp_path / "out"
    arguments = ["demo", "-o", str(out)]
    if command != "convert":
        arguments = ["export", *arguments, "--format", command]
    code = "import resource, sys; from mlx_openelm.convert.__main__ import main;"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert f"error: {out}: can't be written (File too large)" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_error_behind_is_raised_and_nothing_runs_after_it() -> None:
    ran: list[int] = []

    def fail() -> None:
        raise ValueError("behind")

    def work() -> None:
        with behind(2) as later:
            later(fail)
            for i in range(100):
                later(partial(ran.append, i))

    with pytest.raises(ValueError, match="behind"):
        work()
    assert ran == []
