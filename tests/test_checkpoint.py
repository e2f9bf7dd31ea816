"""Model directories: what is written and read here, mlx-lm reads and writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_openelm import InputError, OpenELM, device, load, stream_generate
from mlx_openelm.checkpoint.directory import load_model, read_arrays, save_model
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.model.quantization import Quantization, Scheme, quantize

from .models import CONFIGS, random_model

DEMO = BUNDLED["demo"]
PROMPT = "Once upon a time"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the demo's directory, to damage."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def edit_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(directory: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    file = str(directory / "model.safetensors")
    arrays = mx.load(file)
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(file, arrays, {"format": "mlx"})


@pytest.fixture(scope="session")
def float32_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in float32, in which mlx-lm computes as stored."""
    directory = Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("float32") / "model"))
    model, _ = load(DEMO)
    arrays = {name: array.astype(mx.float32) for name, array in model.parameters().items()}
    save_model(directory, model.config, arrays)
    return directory


def our_tokens(directory: Path, count: int) -> list[int]:
    model, tokenizer = load(directory)
    return [r.token for r in stream_generate(model, tokenizer, PROMPT, max_tokens=count)]


def their_tokens(directory: Path, count: int) -> list[int]:
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(directory))
    return [r.token for r in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=count)]


def test_mlx_lm_gives_the_same_hundred_tokens(float32_demo: Path) -> None:
    assert our_tokens(float32_demo, 100) == their_tokens(float32_demo, 100)


@pytest.mark.parametrize(
    "scheme", [Scheme(64, 4), Scheme(32, 8), Scheme(32, 4, "mxfp4")], ids=lambda s: s.mode
)
def test_mlx_lm_reads_what_is_quantized_here(
    float32_demo: Path, tmp_path: Path, scheme: Scheme
) -> None:
    model = load_model(float32_demo)
    quantization = Quantization(
        scheme,
        {"transformer.layers.0.ffn.proj_1": None, "transformer.layers.1.ffn.proj_1": Scheme()},
    )
    arrays: dict[str, mx.array] = {}
    for name, array in model.parameters().items():
        module = name.removesuffix(".weight")
        chosen = quantization.scheme(module) if array.ndim == 2 else None
        if chosen:
            arrays |= {f"{module}.{part}": a for part, a in quantize(array, chosen).arrays()}
        else:
            arrays[name] = array
    directory = Path(shutil.copytree(float32_demo, tmp_path / "quantized"))
    save_model(directory, model.config, arrays, quantization)
    assert our_tokens(directory, 30) == their_tokens(directory, 30)


@pytest.mark.parametrize("options", [{}, {"quantize": True}, {"quantize": True, "q_bits": 8}])
def test_what_mlx_lm_converts_loads_here(
    float32_demo: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    convert = pytest.importorskip("mlx_lm").convert
    directory = tmp_path / "theirs"
    convert(str(float32_demo), str(directory), dtype="float32", **options)
    assert not (directory / "tokenizer.model").exists()  # hence tokenizer.json is read
    assert our_tokens(directory, 30) == their_tokens(directory, 30)


def test_writing_and_reading_is_the_identity(tmp_path: Path) -> None:
    model = random_model(CONFIGS["untied"])
    save_model(tmp_path, model.config, model.parameters())
    again = load_model(tmp_path)
    assert again.config == model.config
    assert again.parameters().keys() == model.parameters().keys()
    for name, array in model.parameters().items():
        assert mx.array_equal(again.parameters()[name], array).item()


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    model = random_model(CONFIGS["uneven"])
    save_model(tmp_path, model.config, model.parameters(), shard_bytes=30_000)
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert all((tmp_path / shard).stat().st_size < 33_000 for shard in shards)
    assert load_model(tmp_path).parameters().keys() == model.parameters().keys()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == model.nbytes
    (tmp_path / shards[1]).unlink()
    with pytest.raises(InputError, match=f"'{shards[1]}' is missing"):
        load_model(tmp_path)


def test_a_head_that_repeats_the_embeddings_is_accepted(copy: Path) -> None:
    embeddings = "transformer.token_embeddings.weight"
    edit_weights(copy, lambda w: w.update({"lm_head.weight": w[embeddings]}))
    assert our_tokens(copy, 5) == our_tokens(DEMO, 5)
    edit_weights(copy, lambda w: w.update({"lm_head.weight": w[embeddings] + 1}))
    with pytest.raises(InputError, match=r"model.safetensors: lm_head.weight differs from"):
        load_model(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"config.json: No such file or directory"),
        (lambda d: (d / "config.json").write_text("{"), r"config.json: not a JSON file"),
        (lambda d: (d / "config.json").write_text("[]"), r"config.json: holds a JSON list"),
        (lambda d: edit_config(d, model_type="llama"), r"config.json: model_type is 'llama'"),
        (lambda d: edit_config(d, num_kv_heads=[1]), r"num_kv_heads has 1 entries for 8 layers"),
        (lambda d: edit_config(d, activation_fn_name="tanh"), r"activation_fn_name must be swish"),
        (lambda d: (d / "model.safetensors").unlink(), r"no model.safetensors in it"),
        (
            lambda d: edit_weights(d, lambda w: w.pop("transformer.norm.weight")),
            r"tensor transformer.norm.weight is missing; \[192\] is expected",
        ),
        (
            lambda d: edit_weights(d, lambda w: w.update({"transformer.norm.weight": mx.ones(7)})),
            r"model.safetensors: tensor transformer.norm.weight has the shape \[7\]; \[192\] is",
        ),
        (
            lambda d: edit_weights(d, lambda w: w.update(more=mx.ones(7))),
            r"model.safetensors: unknown tensors: 'more'",
        ),
        (
            lambda d: edit_config(d, quantization={"group_size": 64, "bits": 7}),
            r"config.json: quantization: bits of mode affine must be 2, 3, 4, 5, 6, 8, not 7",
        ),
        (lambda d: truncate(d / "model.safetensors", 1000), r"model.safetensors: "),
        (lambda d: truncate(d / "model.safetensors", -1000), r"model.safetensors: "),
        (lambda d: (d / "model.safetensors").write_bytes(b"no"), r"model.safetensors: "),
        (lambda d: truncate(d / "tokenizer.json", 1000), r"tokenizer.json: "),
        (lambda d: remove_tokenizer(d), r"name one with --tokenizer PATH_OR_REPO"),
    ],
)
def test_damage_is_told_in_one_line(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def remove_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def test_a_tokenizer_from_elsewhere(copy: Path) -> None:
    wanted = our_tokens(copy, 5)
    remove_tokenizer(copy)
    for source in (DEMO, DEMO / "tokenizer.model", DEMO / "tokenizer.json", "demo"):
        model, tokenizer = load(copy, tokenizer=source)
        responses = stream_generate(model, tokenizer, PROMPT, max_tokens=5)
        assert [r.token for r in responses] == wanted


def test_a_tokenizer_with_too_many_pieces_is_refused(copy: Path) -> None:
    model = load_model(copy)
    arrays = model.parameters()
    arrays["transformer.token_embeddings.weight"] = arrays["transformer.token_embeddings.weight"][
        :4000
    ]
    config = model.config.__class__.from_dict({**model.config.to_dict(), "vocab_size": 4000})
    save_model(copy, config, arrays)
    with pytest.raises(InputError, match="tokenizer has 4096 pieces, the model only 4000"):
        load(copy)


def test_weights_stay_on_disk_when_lazy() -> None:
    before = mx.get_active_memory()
    model = load_model(DEMO, lazy=True)
    assert mx.get_active_memory() - before < model.nbytes / 10


def test_a_bundled_model_computes_in_float32_on_a_cpu() -> None:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu and not os.environ.get(device.VARIABLE)
    assert load_model(DEMO).dtype == (mx.float32 if on_cpu else mx.float16)
    stored, _ = read_arrays(DEMO)
    assert {a.dtype for a in stored.values()} == {mx.float16}


def test_the_demo_is_small_and_can_be_quantized() -> None:
    files = [f for directory in BUNDLED.values() for f in directory.iterdir()]
    assert sum(f.stat().st_size for f in files) < 10_000_000
    demo, draft = (load_model(directory) for directory in BUNDLED.values())
    assert 3e6 < sum(a.size for a in demo.parameters().values()) < 4.5e6
    assert sum(a.size for a in draft.parameters().values()) < 1e6
    assert len(draft.weights.layers) * 4 <= len(demo.weights.layers)
    for model in (demo, draft):
        assert all(n % 64 == 0 for a in model.parameters().values() for n in a.shape)
        assert isinstance(model, OpenELM)


SLOW = """
import sys, time
from mlx_openelm.checkpoint import directory
from mlx_openelm.tokenizer import tokenizer
from mlx_openelm.errors import InputError

def slow(*_, **__):
    time.sleep(0.3)
    print("the tokenizer was read", flush=True)

def fails(*_, **__):
    raise InputError("bad weights")

tokenizer.load_tokenizer, directory.load_model = slow, fails
try:
    directory.load("demo")
except InputError as error:
    print(error, flush=True)
    sys.exit(2)
"""


def test_an_error_does_not_end_the_process_under_the_tokenizer_thread() -> None:
    """A thread that is still in C++ when the interpreter goes ends the process by abort()."""
    result = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, encoding="utf-8")
    assert result.returncode == 2
    assert sorted(result.stdout.splitlines()) == ["bad weights", "the tokenizer was read"]
