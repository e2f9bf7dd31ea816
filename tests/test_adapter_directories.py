"""PEFT's and mlx-lm's adapters, merged, against what those make of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import InputError, OpenELM, OpenELMError, generate, load
from mlx_openelm.checkpoint.adapter_files import open_adapter, read_safetensors
from mlx_openelm.checkpoint.adapters import apply_adapter
from mlx_openelm.checkpoint.directory import load_model, read_arrays, save_model
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.checkpoint.names import map_names
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert import checkpoint as checkpoint_module
from mlx_openelm.convert.adapters import product
from mlx_openelm.convert.checkpoint import READERS, Checkpoint, open_checkpoint
from mlx_openelm.convert.geometry import infer_config
from mlx_openelm.convert.sources import open_source
from mlx_openelm.model.quantization import Quantization, Scheme, quantize

from .conftest import Run
from .models import CONFIGS, random_model

FIXTURES = Path(__file__).parent / "fixtures"
BASE = FIXTURES / "float32.pt"
DEMO = BUNDLED["demo"]
MODULE = "mlx_openelm.convert"
CONFIG = "adapter_config.json"


def edit(directory: Path, **values: object) -> None:
    file = directory / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def copied(name: str, parent: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, parent / name))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory of the fixtures' base."""
    directory = tmp_path_factory.mktemp("base")
    tensors = map_names(open_source(BASE).tensors)[0]
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    save_model(directory, infer_config({n: a.shape for n, a in arrays.items()}), arrays)
    return directory


def merged_arrays(checkpoint: Checkpoint) -> dict[str, mx.array]:
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


# ---------------------------------------------------------------------------------------------
# PEFT


PEFT = [
    *("peft_lora", "peft_dora", "peft_embedding_dora", "peft_parameters"),
    *("peft_resized", "peft_resized_lora", "peft_tokens", "peft_tokens_resized"),
]


@pytest.mark.parametrize("how", ["converted", "loaded"])
@pytest.mark.parametrize("name", PEFT)
def test_pefts_own_merge(base: Path, name: str, how: str) -> None:
    if how == "converted":
        checkpoint = open_checkpoint(FIXTURES / name, base=base)
        found, config = merged_arrays(checkpoint), checkpoint.config
    else:
        model = load_model(base, adapter=FIXTURES / name)
        found, config = model.parameters(), model.config
    with np.load(FIXTURES / f"{name}.npz") as file:
        wanted = {f"transformer.{key}": file[key] for key in file.files}
    head = found.pop("lm_head.weight", None)
    # with LoRA, but not with what replaces rows, the network uses the embeddings as they were
    assert (head is not None) is (name in ("peft_lora", "peft_embedding_dora", "peft_resized_lora"))
    assert config.share_input_output_layers is (head is None)
    assert found.keys() == wanted.keys()
    for key, array in found.items():
        assert np.abs(np.array(array) - wanted[key]).max() < 1e-6, key
    assert config.vocab_size == len(wanted["transformer.token_embeddings.weight"])
    if head is not None:
        stored = open_source(FIXTURES / name / "adapter_model.safetensors").tensors
        key = "base_model.model.token_embeddings.base_layer.weight"
        before = stored.get(key) or open_source(BASE).tensors["token_embeddings.weight"]
        assert mx.array_equal(head, before.read())


def test_an_output_matrix_of_the_adapters_own(base: Path, tmp_path: Path) -> None:
    adapter = copied("peft_dora", tmp_path)
    file = str(adapter / "adapter_model.safetensors")
    arrays = mx.load(file)
    assert isinstance(arrays, dict)
    arrays["base_model.model.lm_head.weight"] = mx.ones((10, 8))
    mx.eval(arrays)
    mx.save_safetensors(file, arrays)
    checkpoint = open_checkpoint(adapter, base=base)
    model = load_model(base, adapter=adapter)
    for head in (checkpoint.tensors["lm_head.weight"].read(), model.parameters()["lm_head.weight"]):
        assert mx.array_equal(head, mx.ones((10, 8)))
    assert not checkpoint.config.share_input_output_layers
    assert not model.config.share_input_output_layers


def test_lora_on_an_output_matrix_that_was_tied(base: Path, tmp_path: Path) -> None:
    adapter = copied("peft_dora", tmp_path)
    a, b = mx.random.normal((3, 8)), mx.random.normal((10, 3))
    parts = {"lora_A": a, "lora_B": b}
    mx.save_safetensors(
        str(adapter / "adapter_model.safetensors"),
        {f"base_model.model.lm_head.{part}.weight": array for part, array in parts.items()},
    )
    edit(adapter, lora_alpha=6, use_dora=False)
    embeddings = open_source(BASE).tensors["token_embeddings.weight"].read()
    for found in (
        merged_arrays(open_checkpoint(adapter, base=base)),
        load_model(base, adapter=adapter).parameters(),
    ):
        assert mx.allclose(found["lm_head.weight"], embeddings + 2 * b @ a, atol=1e-5)
        assert mx.array_equal(found["transformer.token_embeddings.weight"], embeddings)


def test_names_as_in_memory(base: Path, tmp_path: Path) -> None:
    """What a training loop saves itself has PEFT's and others' wrappers in its names."""
    adapter = copied("peft_parameters", tmp_path)
    file = str(adapter / "adapter_model.safetensors")
    arrays = mx.load(file)
    assert isinstance(arrays, dict)
    renamed = {}
    for name, array in arrays.items():
        if "lora_" in name:
            renamed[name.replace(".weight", ".default.weight")] = array
        else:
            module = name.removesuffix(".weight")
            renamed[f"{module}.modules_to_save.default.weight"] = array
            renamed[f"{module}.original_module.weight"] = mx.zeros_like(array)
    mx.eval(renamed)
    mx.save_safetensors(file, {f"module.{name}": array for name, array in renamed.items()})
    wanted = merged_arrays(open_checkpoint(FIXTURES / "peft_parameters", base=base))
    loaded = load_model(base, adapter=adapter).parameters()
    for key, array in merged_arrays(open_checkpoint(adapter, base=base)).items():
        assert mx.array_equal(array, wanted[key])
        assert mx.abs(loaded[key] - wanted[key]).max().item() < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [9]}, "have the shape [2, 8], but 1 rows"),
        ({"trainable_token_indices": [9, 10]}, "lie beyond its 10 rows"),
        ({"trainable_token_indices": [9, -1]}, "lie beyond its 10 rows"),
        ({"trainable_token_indices": [9, 9]}, "name a row twice"),
        ({"trainable_token_indices": None}, "is 'None', not a list of tokens"),
        ({"trainable_token_indices": {"norm": [1, 2]}}, "is 'None', not a list of tokens"),
        ({"alpha_pattern": {"(a|aa)+b": 1}}, "too involved to be read here"),
        ({"alpha_pattern": {"(.|.)" * 20: 1}}, "too involved to be read here"),
        ({"alpha_pattern": {"[": 1}}, "no regular expression"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "which doesn't go with the tensors of"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"lora_alpha": True, "alpha_pattern": None}, "is 'True', not a number"),
    ],
)
def test_settings_that_make_no_sense(
    base: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    adapter = copied("peft_tokens", tmp_path)
    edit(adapter, **settings)
    for read in (
        lambda: open_checkpoint(adapter, base=base),
        lambda: load_model(base, adapter=adapter),
    ):
        with pytest.raises(InputError) as error:
            read()
        assert message in str(error.value)
        assert str(adapter) in str(error.value)


# ---------------------------------------------------------------------------------------------
# mlx-lm


def mlx_adapter(
    path: Path, config: OpenELMConfig, kind: str, keys: list[str] | None = None, norms: bool = False
) -> Path:
    """What mlx-lm's training writes, with random factors."""
    from mlx.utils import tree_flatten

    model = mlx_model(config)
    parameters: dict[str, Any] = {"rank": 4, "scale": 5.0, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    settings = {"fine_tune_type": kind, "num_layers": 3, "lora_parameters": parameters}
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(settings))
    mx.random.seed(0)
    if kind == "full":
        arrays = {
            name: array + 0.1 * mx.random.normal(array.shape)
            for name, array in tree_flatten(model.parameters())
            if (".layers.2." in name and not norms) or array.ndim == 1
        }
    else:
        from mlx_lm.tuner.utils import linear_to_lora_layers

        linear_to_lora_layers(model, 3, parameters, use_dora=kind == "dora")
        arrays = {
            name: 0.3 * mx.random.normal(array.shape) + (name[-2:] == ".m")
            for name, array in tree_flatten(model.parameters())
            if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")
        }
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    return path


def mlx_model(config: OpenELMConfig) -> Any:
    from mlx_lm.models import openelm

    return openelm.Model(openelm.ModelArgs.from_dict({"model_type": "openelm", **config.to_dict()}))


def directory(path: Path, name: str, scheme: Scheme | None) -> tuple[Path, OpenELM]:
    """A model directory of random weights, with what can be quantized in that scheme."""
    model = random_model(CONFIGS[name])
    arrays = model.parameters()
    path.mkdir()
    if scheme is None:
        save_model(path, model.config, arrays)
        return path, model
    plain: dict[str, Scheme | None] = {}
    stored = {}
    for key, array in arrays.items():
        module = key.removesuffix(".weight")
        if array.ndim == 2 and array.shape[1] % scheme.group_size == 0:
            stored |= {f"{module}.{part}": a for part, a in quantize(array, scheme).arrays()}
        else:
            stored[key], plain[module] = array, None
    save_model(path, model.config, stored, Quantization(scheme, plain))
    return path, model


TOKENS = [[5, 17, 3, 80, 2, 41]]
EVERYTHING = ["attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "transformer.token_embeddings"]


@pytest.mark.parametrize("scheme", [None, Scheme(32, 4)], ids=["float", "quantized"])
@pytest.mark.parametrize("name", ["uneven", "untied"])
@pytest.mark.parametrize(
    ("kind", "keys"),
    [("lora", None), ("lora", EVERYTHING), ("dora", None), ("full", None)],
)
def test_the_logits_of_mlx_lms_load(
    tmp_path: Path, kind: str, keys: list[str] | None, name: str, scheme: Scheme | None
) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    where, model = directory(tmp_path / "base", name, scheme)
    if keys is not None and name == "untied":
        keys = [*keys, "lm_head"]
    # of a quantized model, mlx-lm trains the norms alone in full
    adapter = mlx_adapter(tmp_path / "adapter", model.config, kind, keys, norms=bool(scheme))
    theirs, _ = utils.load_model(where)
    theirs = utils.load_adapters(theirs, str(adapter))
    theirs.eval()
    wanted = theirs(mx.array(TOKENS))
    found = load_model(where, adapter=adapter)(mx.array(TOKENS))
    converted = open_checkpoint(adapter, base=where)
    ours = OpenELM(converted.config, merged_arrays(converted))(mx.array(TOKENS))
    assert mx.abs(wanted - model(mx.array(TOKENS))).max().item() > 0.1
    for logits in (found, ours):
        assert mx.abs(logits - wanted).max().item() < 2e-3 * mx.abs(wanted).max().item()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_weights_of_mlx_lms_fuse(tmp_path: Path, kind: str) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    from mlx.utils import tree_flatten, tree_unflatten

    where, model = directory(tmp_path / "base", "uneven", None)
    adapter = mlx_adapter(tmp_path / "adapter", model.config, kind, EVERYTHING)
    theirs = utils.load_adapters(utils.load_model(where)[0], str(adapter))
    fused = [(n, m.fuse()) for n, m in theirs.named_modules() if hasattr(m, "fuse")]
    theirs.update_modules(tree_unflatten(fused))
    wanted = dict(tree_flatten(theirs.parameters()))
    for found in (
        merged_arrays(open_checkpoint(adapter, base=where)),
        load_model(where, adapter=adapter).parameters(),
    ):
        assert found.keys() == wanted.keys()
        for key, array in found.items():
            assert mx.abs(array - wanted[key]).max().item() < 2e-6, key


def test_a_quantized_matrix_without_an_adapter_stays_quantized(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    where, model = directory(tmp_path / "base", "uneven", Scheme(32, 4))
    adapter = mlx_adapter(tmp_path / "adapter", model.config, "lora", ["attn.qkv_proj"])
    before = load_model(where).parameters()
    after = load_model(where, adapter=adapter).parameters()
    assert before.keys() - after.keys() == {
        f"transformer.layers.{i}.attn.qkv_proj.{part}"
        for i in range(3)
        for part in ("scales", "biases")
        if f"transformer.layers.{i}.attn.qkv_proj.scales" in before
    }


def test_the_scale_of_old_adapters(tmp_path: Path) -> None:
    """Before num_layers there was lora_layers, and the scale was multiplied with alpha / rank."""
    pytest.importorskip("mlx_lm")
    model = random_model(CONFIGS["uneven"])
    adapter = mlx_adapter(tmp_path / "adapter", model.config, "lora")
    parameters = {"rank": 4, "scale": 10.0, "alpha": 16.0, "dropout": 0.0}
    name = "transformer.layers.0.attn.qkv_proj.weight"
    edit(adapter, lora_parameters=parameters)
    assert open_adapter(adapter, READERS).updates[name].scale == 10
    edit(adapter, lora_layers=16)
    assert open_adapter(adapter, READERS).updates[name].scale == 40
    assert open_adapter(adapter, READERS, alpha=8).updates[name].scale == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fine_tune_type": "prefix"}, "fine_tune_type is 'prefix'"),
        ({"fine_tune_type": "dora"}, "has lora_a, lora_b; lora_a, lora_b, m are needed"),
        ({"lora_parameters": None}, "lora_parameters is 'None'"),
        ({"lora_parameters": {"rank": 4}}, "scale in lora_parameters is 'None', not a number"),
        ({"lora_parameters": {"rank": 8, "scale": 1}}, "has rank 4; adapter_config.json says '8'"),
        ({"fine_tune_type": "full"}, "lora_"),
    ],
)
def test_mlx_settings_that_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    pytest.importorskip("mlx_lm")
    where, model = directory(tmp_path / "base", "uneven", None)
    adapter = mlx_adapter(tmp_path / "adapter", model.config, "lora")
    edit(adapter, **settings)
    for read in (
        lambda: open_checkpoint(adapter, base=where),
        lambda: load_model(where, adapter=adapter),
    ):
        with pytest.raises(InputError) as error:
            read()
        assert message in str(error.value)


def test_tied_quantized_embeddings_stay_the_output_matrix(tmp_path: Path) -> None:
    """PEFT's LoRA of the embeddings leaves the output alone: that stays quantized."""
    where, model = directory(tmp_path / "base", "uneven", Scheme(32, 4))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    a, b = mx.random.normal((2, 96)), mx.random.normal((32, 2))
    module = "base_model.model.transformer.token_embeddings"
    parts = {"lora_embedding_A": a, "lora_embedding_B": b}
    mx.save_safetensors(
        str(adapter / "adapter_model.safetensors"), {f"{module}.{k}": v for k, v in parts.items()}
    )
    stored, _ = read_arrays(where)
    opened = open_adapter(adapter, {".safetensors": read_safetensors})
    quantization = Quantization(Scheme(32, 4), {"transformer.norm": None})
    arrays, _, changed = apply_adapter(opened, stored, model.config, quantization)
    assert changed is not None and changed.scheme("lm_head") == Scheme(32, 4)
    for part in ("weight", "scales", "biases"):
        assert arrays[f"lm_head.{part}"] is stored[f"transformer.token_embeddings.{part}"]
    loaded = load_model(where, adapter=adapter)
    converted = open_checkpoint(adapter, base=where)
    ours = OpenELM(converted.config, merged_arrays(converted))
    difference = loaded(mx.array(TOKENS)) - ours(mx.array(TOKENS))
    assert mx.abs(difference).max().item() < 2e-3
    assert mx.abs(loaded(mx.array(TOKENS)) - load_model(where)(mx.array(TOKENS))).max().item() > 0.1


# ---------------------------------------------------------------------------------------------
# Directories


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an adapter, not a model"):
        load(FIXTURES / "peft_lora")
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        load("demo", adapter_path=DEMO)


def test_the_base_that_the_settings_name(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id, at the revision that the adapter was trained on; --base has its own."""
    asked = []

    def resolve(name: str | Path, revision: str | None = None) -> Path:
        asked.append((str(name), revision))
        return base if str(name) == "someone/base" else Path(name)

    monkeypatch.setattr(checkpoint_module, "resolve_source", resolve)
    adapter = copied("peft_lora", tmp_path)
    edit(adapter, base_model_name_or_path="someone/base", revision="v2")
    open_checkpoint(adapter, revision="main")
    assert asked == [(str(adapter), "main"), ("someone/base", "v2")]
    asked.clear()
    open_checkpoint(adapter, base=base)
    assert asked == [(str(adapter), None), (str(base), None)]
    asked.clear()
    (adapter / CONFIG).write_text('{"fine_tune_type": "full", "model": "someone/base"}')
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"), {"transformer.norm.weight": mx.ones(8)}
    )
    open_checkpoint(adapter)
    assert asked == [(str(adapter), None), ("someone/base", None)]


@pytest.mark.parametrize("name", ["peft_lora", None])
def test_a_model_with_an_adapter_beside_it_is_a_model(
    tmp_path: Path, base: Path, name: str | None
) -> None:
    """As an adapter it can still be named."""
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for file in (FIXTURES / "peft_lora").iterdir():
        if name or file.name == CONFIG:
            shutil.copy(file, both)
    wanted = load_model(base).parameters()
    opened = [merged_arrays(open_checkpoint(both))]
    if name is None:
        opened.append(load_model(both).parameters())
    for found in opened:
        assert found.keys() == wanted.keys()
        assert all(mx.array_equal(array, wanted[key]) for key, array in found.items())
    if name:
        assert "lm_head.weight" in load_model(base, adapter=both).parameters()


def test_a_home_directory_in_each_path(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    copied("peft_lora", tmp_path)
    shutil.copy(base / "config.json", tmp_path / "c.json")
    shutil.copy(BASE, tmp_path)
    found = open_checkpoint("~/peft_lora", base="~/float32.pt", config=Path("~/c.json"))
    assert found.source.kind == "PEFT adapter, merged into its base"
    load_model(base, adapter=tmp_path / "peft_lora")


def test_load_takes_the_adapter_and_its_tokenizer(tmp_path: Path) -> None:
    adapter = copied("peft_lora", tmp_path)
    config = load("demo")[0].config
    shape = config.vocab_size, config.model_dim
    embeddings = mx.random.normal((shape[0] + 2, shape[1]))
    mx.save_safetensors(
        str(adapter / "adapter_model.safetensors"),
        {"base_model.model.transformer.token_embeddings.weight": embeddings},
    )
    model, tokenizer = load("demo", adapter_path=adapter)
    assert model.config.vocab_size == shape[0] + 2
    found = model.parameters()["transformer.token_embeddings.weight"]
    assert mx.allclose(found, embeddings.astype(found.dtype))
    shutil.copy(BUNDLED["demo-draft"] / "tokenizer.model", adapter)
    shutil.copy(BUNDLED["demo-draft"] / "config.json", adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    model, tokenizer = load("demo", adapter_path=str(adapter))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi!"


def test_the_adapters_files_win_in_conversion(run: Run, tmp_path: Path, base: Path) -> None:
    parent = tmp_path / "base"
    shutil.copytree(DEMO, parent)
    os.chmod(parent, 0o755)
    (parent / "chat_template.jinja").write_text("base")
    (parent / "generation_config.json").write_text('{"eos_token_id": 1}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.transformer.norm.weight"
    norm = mx.ones((load("demo")[0].config.model_dim,))
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), {name: norm})
    (adapter / CONFIG).write_text('{"peft_type": "LORA", "base_model_name_or_path": "~/base"}')
    (adapter / "chat_template.jinja").write_text("adapter")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    out = tmp_path / "out"
    result = run(MODULE, adapter, "-o", out, HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (out / "chat_template.jinja").read_text() == "adapter"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert (out / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()


def adapted_demo(tmp_path: Path) -> tuple[Path, Path]:
    """The demo, with a chat template and ends of its own, and an adapter of it."""
    parent, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(DEMO, parent)
    os.chmod(parent, 0o755)
    (parent / "chat_template.jinja").write_text("base")
    (parent / "generation_config.json").write_text('{"eos_token_id": 13}')
    adapter.mkdir()
    norm = mx.ones((load_model(DEMO, lazy=True).config.model_dim,))
    name = "base_model.model.transformer.norm.weight"
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), {name: norm})
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(parent)}
    (adapter / CONFIG).write_text(json.dumps(settings))
    return parent, adapter


ONLY: dict[str, tuple[dict[str, str], str | dict[str, str], set[int]]] = {
    "nothing": ({}, "base", {2, 13}),
    "chat_template.jinja": ({"chat_template.jinja": "adapter"}, "adapter", {2, 13}),
    "a template in tokenizer_config.json": (
        {"tokenizer_config.json": '{"chat_template": "adapter"}'},
        "adapter",
        {2, 13},
    ),
    "named templates": (
        {"chat_template.jinja": "a", "additional_chat_templates/rag.jinja": "b"},
        {"default": "a", "rag": "b"},
        {2, 13},
    ),
    "generation_config.json": ({"generation_config.json": '{"eos_token_id": [7]}'}, "base", {2, 7}),
    "generation_config.json without ends": (
        {"generation_config.json": '{"temperature": 1.0}'},
        "base",
        {2},
    ),
    "a tokenizer": (
        {"tokenizer.model": "", "tokenizer_config.json": '{"eos_token": "<0x0B>"}'},
        "base",
        {13, 14},
    ),
    "a tokenizer with a template": (
        {"tokenizer.model": "", "tokenizer_config.json": '{"chat_template": "adapter"}'},
        "adapter",
        {2, 13},
    ),
}


@pytest.mark.parametrize("only", ONLY)
def test_what_lies_beside_an_adapter_counts_alone(only: str, tmp_path: Path, run: Run) -> None:
    files, template, ends = ONLY[only]
    parent, adapter = adapted_demo(tmp_path)
    for name, text in files.items():
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text(text)
    if "tokenizer.model" in files:
        shutil.copy(DEMO / "tokenizer.model", adapter)
    loaded = load(parent, adapter_path=adapter)[1]
    out = tmp_path / "out"
    result = run(MODULE, adapter, "-o", out, "--dtype", "float16")
    assert result.returncode == 0, result.stderr
    for tokenizer in (loaded, load(out)[1]):
        assert tokenizer.chat_template == template
        assert tokenizer.eos_token_ids == ends
    again = run(MODULE, adapter, "--tokenizer", DEMO, "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    given = load(parent, adapter_path=adapter, tokenizer=DEMO)[1].chat_template
    assert given == load(tmp_path / "again")[1].chat_template
    assert (given == template) is (template != "base")


def test_what_an_adapter_is_read_from_is_not_replaced(tmp_path: Path, run: Run) -> None:
    parent, adapter = adapted_demo(tmp_path)
    ours = tmp_path / "ours"
    assert run(MODULE, parent, "-o", ours).returncode == 0
    edit(adapter, base_model_name_or_path=str(ours))
    before = {file.name: file.read_bytes() for file in ours.iterdir()}
    result = run(MODULE, adapter, "-o", ours, "--force")
    assert result.returncode == 2 and "what is being read" in result.stderr
    assert {file.name: file.read_bytes() for file in ours.iterdir()} == before


@pytest.mark.parametrize("dtype", [mx.int8, mx.int32, mx.bool_])
@pytest.mark.parametrize("part", ["lora_A", "norm"])
def test_integers(tmp_path: Path, base: Path, run: Run, dtype: mx.Dtype, part: str) -> None:
    adapter = copied("peft_lora", tmp_path)
    file = str(adapter / "adapter_model.safetensors")
    arrays = mx.load(file)
    assert isinstance(arrays, dict)
    arrays["base_model.model.norm.weight"] = mx.ones((8,))
    name = next(name for name in arrays if part in name)
    mx.eval(arrays)
    mx.save_safetensors(file, {**arrays, name: arrays[name].astype(dtype)})
    with pytest.raises(InputError, match=r"weights have to be") as error:
        load_model(base, adapter=adapter)
    assert str(error.value).startswith(file) and name in str(error.value)
    result = run(MODULE, adapter, "--base", base, "-o", tmp_path / "out")
    assert result.returncode == 2 and "weights have to be" in result.stderr


def test_a_saved_tensor_of_another_shape_is_the_adapters(tmp_path: Path) -> None:
    parent, adapter = adapted_demo(tmp_path)
    name = "base_model.model.transformer.norm.weight"
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), {name: mx.ones((3,))})
    with pytest.raises(InputError, match=r"transformer.norm.weight has the shape \[3\]") as error:
        load_model(parent, adapter=adapter)
    assert str(error.value).startswith(str(adapter))


@pytest.mark.parametrize("kind", ["updates", "tensors"])
def test_not_a_number(tmp_path: Path, run: Run, kind: str) -> None:
    parent, adapter = adapted_demo(tmp_path)
    width = load_model(DEMO, lazy=True).config.model_dim
    names = {"tensors": {"norm.weight": mx.full((width,), mx.nan)}}
    rows = load_model(DEMO).parameters()["transformer.layers.0.ffn.proj_1.weight"].shape[0]
    names["updates"] = {
        "layers.0.ffn.proj_1.lora_A.weight": mx.full((2, width), mx.nan),
        "layers.0.ffn.proj_1.lora_B.weight": mx.ones((rows, 2)),
    }
    found = {f"base_model.model.transformer.{name}": a for name, a in names[kind].items()}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), found)
    edit(adapter, r=2, lora_alpha=2)
    model, tokenizer = load(parent, adapter_path=adapter)
    with pytest.raises(OpenELMError, match="NaN or infinite|not finite"):
        generate(model, tokenizer, "Hi", max_tokens=2)
    result = run(MODULE, adapter, "-o", tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_merged_matrix_keeps_its_dtype(tmp_path: Path) -> None:
    _, adapter = adapted_demo(tmp_path)
    config = load_model(DEMO, lazy=True).config
    arrays = {n: a.astype(mx.bfloat16) for n, a in load_model(DEMO).parameters().items()}
    half = tmp_path / "half"
    half.mkdir()
    save_model(half, config, arrays)
    name = "transformer.layers.0.ffn.proj_1"
    rows, columns = arrays[f"{name}.weight"].shape
    parts = {"A": mx.random.normal((2, columns)), "B": mx.random.normal((rows, 2))}
    found = {f"base_model.model.{name}.lora_{part}.weight": a for part, a in parts.items()}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), found)
    edit(adapter, r=2, lora_alpha=2)
    adapted = apply_adapter(
        open_adapter(adapter, {".safetensors": read_safetensors}), arrays, config, None
    )[0]
    assert {array.dtype for array in adapted.values()} == {mx.bfloat16}
    converted = open_checkpoint(adapter, base=half).tensors[f"{name}.weight"].read()
    assert mx.allclose(adapted[f"{name}.weight"], converted, rtol=0.01, atol=1e-4)


def test_a_model_with_an_adapter_beside_it_is_the_model(tmp_path: Path) -> None:
    parent, adapter = adapted_demo(tmp_path)
    shutil.copy(adapter / "adapter_model.safetensors", parent)
    shutil.copy(adapter / CONFIG, parent)
    found = load(parent)[0].parameters()["transformer.norm.weight"]
    assert mx.array_equal(found, load("demo")[0].parameters()["transformer.norm.weight"])
    assert not open_checkpoint(parent).source.adapters
    file = next(parent.glob("model*.safetensors"))
    file.rename(parent / "model-00001-of-00002.safetensors")
    for read in (load, open_checkpoint):
        with pytest.raises(InputError, match="model-00002-of-00002"):
            read(parent)


def test_adapters_of_adapters(tmp_path: Path, base: Path) -> None:
    first, second = copied("peft_lora", tmp_path), copied("peft_dora", tmp_path)
    edit(first, base_model_name_or_path=str(base))
    edit(second, base_model_name_or_path=str(first))
    name = "transformer.layers.0.attn.out_proj.weight"
    once = open_checkpoint(first).tensors[name].read()
    twice = open_checkpoint(second).tensors[name].read()
    assert not mx.allclose(once, twice)
    edit(first, base_model_name_or_path=str(second))
    for start in (first, second):
        with pytest.raises(InputError, match=r"its base leads back to an adapter \(.* -> "):
            open_checkpoint(start)
    link = tmp_path / "link"
    link.symlink_to(first)
    edit(first, base_model_name_or_path=str(link))
    with pytest.raises(InputError, match="its base leads back to an adapter"):
        open_checkpoint(first)
    chain = [Path(shutil.copytree(first, tmp_path / str(i))) for i in range(12)]
    for adapter, parent in zip(chain, [*chain[1:], base], strict=True):
        edit(adapter, base_model_name_or_path=str(parent))
    with pytest.raises(InputError, match="more than 8 adapters"):
        open_checkpoint(chain[0])


@pytest.mark.parametrize("name", [CONFIG, "adapter_model.safetensors", "tokenizer.model"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "dangling"])
def test_strange_entries(tmp_path: Path, base: Path, name: str, kind: str) -> None:
    adapter = copied("peft_lora", tmp_path)
    file = adapter / name
    outside = tmp_path / "secret"
    if file.exists():
        file.rename(outside)
    else:
        shutil.copy(DEMO / "tokenizer.model", outside)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(outside if kind == "link" else tmp_path / "nothing")
    for read in (
        lambda: open_checkpoint(adapter, base=base),
        lambda: load(base, adapter_path=adapter),
    ):
        with alarm(10), pytest.raises(InputError) as error:
            read()
        assert str(file) in str(error.value)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Let what waits for ever fail."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------
# The product


def test_the_product_is_exact() -> None:
    rng = np.random.default_rng(0)
    scales = 2.0 ** rng.integers(-60, 60, size=(40, 1))
    left = rng.normal(size=(40, 16)) * scales
    right = rng.normal(size=(16, 30)).astype(np.float32).astype(np.float64)
    left = left.astype(np.float32).astype(np.float64)
    wanted = (left.astype(np.longdouble) @ right.astype(np.longdouble)).astype(np.float64)
    error = np.abs(product(left, right) - wanted) / scales
    assert error.max() < 1e-11
    assert not product(np.zeros((3, 2)), np.zeros((2, 4))).any()


SAME = """
import hashlib, sys
from mlx_openelm.convert.checkpoint import open_checkpoint
import mlx.core as mx, numpy as np
digest = hashlib.sha256()
for name, tensor in open_checkpoint(sys.argv[1], base=sys.argv[2]).tensors.items():
    digest.update(np.array(tensor.read().view(mx.uint16)))
print(digest.hexdigest())
"""


def test_the_bytes_do_not_depend_on_the_blas(tmp_path: Path) -> None:
    """OpenBLAS has kernels for each processor, which add in other orders; so do other libraries."""
    config = OpenELMConfig.scaled(
        vocab_size=64, model_dim=256, head_dim=64, num_transformer_layers=1, ffn_dim_divisor=64
    )
    model = OpenELM(config)
    where, adapter = tmp_path / "base", tmp_path / "adapter"
    arrays = {name: array.astype(mx.bfloat16) for name, array in model.parameters().items()}
    where.mkdir()
    save_model(where, config, arrays)
    adapter.mkdir()
    shape = arrays["transformer.layers.0.ffn.proj_1.weight"].shape
    parts = {"lora_a": mx.random.normal((shape[1], 64)), "lora_b": mx.random.normal((64, shape[0]))}
    module = "transformer.layers.0.ffn.proj_1"
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"), {f"{module}.{k}": v for k, v in parts.items()}
    )
    (adapter / CONFIG).write_text('{"lora_parameters": {"rank": 64, "scale": 0.01}}')
    found = set()
    for environment in (
        {"OPENBLAS_NUM_THREADS": "1"},
        {"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "3"},
        {"OPENBLAS_CORETYPE": "Prescott"},
        {"OPENBLAS_CORETYPE": "Nehalem"},
    ):
        command = [sys.executable, "-c", SAME, str(adapter), str(where)]
        environment = {**os.environ, **environment}
        found.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert len(found) == 1
