"""Names of tensors: known, droppable with a reason, or listed in the refusal."""

from __future__ import annotations

import time

import pytest

from mlx_openelm.checkpoint.names import CANONICAL, canonical_name, map_names
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import InputError
from mlx_openelm.model.shapes import tensor_shapes

from .checkpoints import FIXTURES

UNTIED = OpenELMConfig.from_name("OpenELM-3B", share_input_output_layers=False)
NAMES = list(tensor_shapes(UNTIED))


def corenet(name: str) -> str:
    return "classifier.weight" if name == "lm_head.weight" else name.removeprefix("transformer.")


def test_the_table_has_the_names_of_the_network() -> None:
    templates = {name.replace(".35.", ".{i}.") for name in NAMES}
    assert set(CANONICAL) == {name for name in templates if "layers" not in name or "{i}" in name}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_name_of_both_layouts_is_mapped(wrapper: str) -> None:
    for layout in (corenet, str):
        tensors = {wrapper + layout(name): i for i, name in enumerate(NAMES)}
        assert map_names(tensors) == ({name: i for i, name in enumerate(NAMES)}, [])


def test_a_real_state_dict_is_mapped() -> None:
    tensors, notes = map_names(open_source(FIXTURES / "float32.pt").tensors)
    assert notes == []
    assert tensors["transformer.layers.1.attn.q_norm.weight"].name == "layers.1.attn.q_norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.attn.pos_embedding.inv_freq",
        "transformer.layers.3.attn.pos_embedding._cached_cos",
        "module.layers.0.attn.pos_embedding._sin",
        "causal_mask",
        "transformer.causal_mask",
    ],
)
def test_what_is_computed_is_left_out_with_a_reason(name: str) -> None:
    mapped, notes = map_names({"norm.weight": 1, name: 2})
    assert mapped == {"transformer.norm.weight": 1}
    assert len(notes) == 1
    assert notes[0].startswith(f"{name!r} is left out: computed")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        "layers.0",
        "layers.{i}.attn_norm.weight",
        "layers.x.attn_norm.weight",
        "layers.-1.attn_norm.weight",
        "layers.01.attn_norm.weight",
        "layers.99999.attn_norm.weight",
        "layers.٣.attn_norm.weight",
        "layers.0.layers.0.attn_norm.weight",
        "xlayers.0.attn_norm.weight",
        "layers.0.attn.qkv_proj.bias",
        "layers.0.ffn.proj_3.weight",
        "transformer.transformer.norm.weight",
        "transformer.lm_head.weight",
        "transformer.classifier.weight",
        "net.norm.weight",
        "norm.weight ",
        "norm.weight\n",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    assert canonical_name(name) is None
    with pytest.raises(InputError, match="unknown tensors: ") as caught:
        map_names({"norm.weight": 1, name: 2})
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_listed_but_not_endlessly() -> None:
    with pytest.raises(InputError, match=r"'x0', 'x1', .*'x7' and 92 more; this is not"):
        map_names({f"x{i}": i for i in range(100)})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layers.0.attn.qkv_proj.lora_C.lora.weight", "an adapter of a kind that isn't known"),
        ("layers.0.attn.qkv_proj.base_layer.bias", "an adapter of a kind that isn't known"),
        ("transformer.layers.0.attn.qkv_proj.scales", "it is quantized"),
    ],
)
def test_other_kinds_of_checkpoint_are_told_apart(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        map_names({"norm.weight": 1, name: 2})


@pytest.mark.parametrize(
    "names",
    [("norm.weight", "transformer.norm.weight"), ("classifier.weight", "module.lm_head.weight")],
)
def test_two_names_of_one_tensor_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=f"'{names[0]}' and '{names[1]}' are the same"):
        map_names(dict.fromkeys(names, 1))


def test_a_name_of_a_million_wrappers_takes_no_time() -> None:
    start = time.perf_counter()
    assert canonical_name("module." * 1_000_000 + "x") is None
    assert time.perf_counter() - start < 5
