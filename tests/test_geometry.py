"""The geometry of a network, inferred from its shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm.checkpoint.names import map_names
from mlx_openelm.config import PUBLISHED, OpenELMConfig
from mlx_openelm.convert.geometry import infer_config
from mlx_openelm.convert.sources import open_source
from mlx_openelm.errors import InputError
from mlx_openelm.model.shapes import tensor_shapes

from .checkpoints import FIXTURES

SMALL = OpenELMConfig.scaled(
    vocab_size=11, model_dim=64, head_dim=8, num_transformer_layers=3, ffn_dim_divisor=16
)


@pytest.mark.parametrize("vocab_size", [32000, 32128])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_recognised(name: str, vocab_size: int) -> None:
    config = OpenELMConfig.from_name(name, vocab_size)
    assert infer_config(tensor_shapes(config)) == config
    untied = replace(config, share_input_output_layers=False)
    assert infer_config(tensor_shapes(untied)) == untied


@pytest.mark.parametrize("field", ["ffn_with_glu", "share_input_output_layers"])
def test_variants_are_told_apart(field: str) -> None:
    config = replace(SMALL, **{field: False})
    assert not getattr(infer_config(tensor_shapes(config)), field)
    assert getattr(infer_config(tensor_shapes(SMALL)), field)


def test_a_real_checkpoint() -> None:
    tensors, _ = map_names(open_source(FIXTURES / "float32.pt").tensors)
    config = infer_config({name: tensor.shape for name, tensor in tensors.items()})
    assert config == OpenELMConfig.scaled(
        vocab_size=10,
        model_dim=8,
        head_dim=2,
        num_transformer_layers=2,
        num_gqa_groups=2,
        ffn_multipliers=(0.5, 1.0),
        ffn_dim_divisor=4,
    )


@st.composite
def configs(draw: st.DrawFn) -> OpenELMConfig:
    layers = draw(st.integers(1, 5))
    sizes = st.integers(1, 2000)
    per_layer = {"min_size": layers, "max_size": layers}
    kv_heads = draw(st.lists(st.integers(1, 8), **per_layer))
    groups = draw(st.lists(st.integers(1, 8), **per_layer))
    return OpenELMConfig(
        vocab_size=draw(sizes),
        model_dim=draw(sizes),
        head_dim=2 * draw(st.integers(1, 64)),
        num_transformer_layers=layers,
        num_query_heads=tuple(k * g for k, g in zip(kv_heads, groups, strict=True)),
        num_kv_heads=tuple(kv_heads),
        ffn_multipliers=tuple(draw(st.lists(st.floats(0.01, 9.0), **per_layer))),
        ffn_dim_divisor=draw(st.sampled_from([1, 3, 8, 64, 100, 256, 512])),
        ffn_with_glu=draw(st.booleans()),
        share_input_output_layers=draw(st.booleans()),
    )


@settings(deadline=None, derandomize=True, max_examples=100)
@given(configs())
def test_shapes_of_the_inferred_config_are_the_given_ones(config: OpenELMConfig) -> None:
    shapes = tensor_shapes(config)
    inferred = infer_config(shapes)
    assert tensor_shapes(inferred) == shapes
    for field in ("model_dim", "head_dim", "num_query_heads", "num_kv_heads", "ffn_dims"):
        assert getattr(inferred, field) == getattr(config, field)


LAYER = "transformer.layers.1."
BROKEN = {
    "no embedding": ({"transformer.token_embeddings.weight": None}, "token_embeddings.weight is"),
    "a flat embedding": ({"transformer.token_embeddings.weight": (704,)}, "not that of a matrix"),
    "an empty embedding": ({"transformer.token_embeddings.weight": (0, 64)}, "a matrix"),
    "no q_norm": ({"transformer.layers.0.attn.q_norm.weight": None}, "--config"),
    "an empty q_norm": ({"transformer.layers.0.attn.q_norm.weight": (0,)}, "is empty"),
    "an odd head": ({"transformer.layers.0.attn.q_norm.weight": (1,)}, "head_dim must be"),
    "another q_norm": ({LAYER + "attn.q_norm.weight": (4,)}, "[8] would fit the others, it is [4]"),
    "no k_norm": ({LAYER + "attn.k_norm.weight": None}, "k_norm.weight: [8] would fit"),
    "no proj_1": ({LAYER + "ffn.proj_1.weight": None}, "ffn.proj_1.weight is missing"),
    "a proj_1 of three": ({LAYER + "ffn.proj_1.weight": (480, 64)}, "once the columns"),
    "half a head": ({LAYER + "attn.qkv_proj.weight": (84, 64)}, "whole heads of 8"),
    "part of a head": ({LAYER + "attn.out_proj.weight": (64, 60)}, "whole heads of 8"),
    "no keys": ({LAYER + "attn.qkv_proj.weight": (64, 64)}, "whole heads"),
    "fewer rows than queries": ({LAYER + "attn.qkv_proj.weight": (8, 64)}, "whole heads"),
    "kv heads that don't divide": ({LAYER + "attn.qkv_proj.weight": (112, 64)}, "num_kv_heads"),
    "another model_dim": ({LAYER + "attn.qkv_proj.weight": (96, 63)}, "would fit the others"),
    "another norm": ({"transformer.norm.weight": (63,)}, "norm.weight: [64] would fit"),
    "another head": ({"lm_head.weight": (12, 64)}, "lm_head.weight: [11, 64] would fit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_contradictions_name_the_tensor(name: str) -> None:
    changes, reason = BROKEN[name]
    shapes = {**tensor_shapes(SMALL), **changes}
    with pytest.raises(InputError) as caught:
        infer_config({name: shape for name, shape in shapes.items() if shape is not None})
    assert reason in str(caught.value)


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_missing_layer_is_named(gap: int) -> None:
    shapes = {k: v for k, v in tensor_shapes(SMALL).items() if f".layers.{gap}." not in k}
    if gap == 2:  # the last one: the network is simply shorter
        assert infer_config(shapes).num_transformer_layers == 2
    else:
        with pytest.raises(InputError, match=f"no tensor of layer {gap}"):
            infer_config(shapes)


def test_no_layers_at_all() -> None:
    with pytest.raises(InputError, match="no tensor of layer 0"):
        infer_config({"transformer.token_embeddings.weight": (11, 64)})
