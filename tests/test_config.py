"""`OpenELMConfig` against the published family and the files it is read from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm.config import PUBLISHED, OpenELMConfig, make_divisible
from mlx_openelm.errors import InputError

from .reference import shapes

SETTINGS = settings(deadline=None, derandomize=True, max_examples=200)

SMALL = OpenELMConfig(
    vocab_size=64,
    model_dim=32,
    head_dim=8,
    num_transformer_layers=2,
    num_query_heads=(4, 6),
    num_kv_heads=(2, 3),
    ffn_multipliers=(0.5, 2.0),
    ffn_dim_divisor=16,
)

# As published with apple/OpenELM-270M.
HUGGING_FACE = """
{
  "activation_fn_name": "swish",
  "architectures": ["OpenELMForCausalLM"],
  "auto_map": {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"
  },
  "bos_token_id": 1,
  "eos_token_id": 2,
  "ffn_dim_divisor": 256,
  "ffn_multipliers": [
    0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0
  ],
  "ffn_with_glu": true,
  "head_dim": 64,
  "initializer_range": 0.02,
  "max_context_length": 2048,
  "model_dim": 1280,
  "model_type": "openelm",
  "normalization_layer_name": "rms_norm",
  "normalize_qk_projections": true,
  "num_gqa_groups": 4,
  "num_kv_heads": [3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5],
  "num_query_heads": [12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20],
  "num_transformer_layers": 16,
  "qkv_multipliers": [0.5, 1.0],
  "rope_freq_constant": 10000,
  "rope_max_length": 4096,
  "share_input_output_layers": true,
  "torch_dtype": "float32",
  "transformers_version": "4.39.3",
  "use_cache": true,
  "vocab_size": 32000
}
"""

NESTED_YAML = """
taskname: '270M pretraining'
dataset:
  language_modeling:
    sequence_length: &CONTEXT_LENGTH 2048
model:
  language_modeling:
    name: "general_gpt"
    general_gpt:
      model_name: "OpenELM-270M"
      vocab_size: 32128
      max_context_length: *CONTEXT_LENGTH
      padding_index: 32000
"""
DOTTED_YAML = """
taskname: '270M pretraining'
model.language_modeling.name: "general_gpt"
model.language_modeling.general_gpt.model_name: "OpenELM-270M"
model.language_modeling.general_gpt.vocab_size: 32128
model.language_modeling.general_gpt.max_context_length: 2048
"""
MIXED_YAML = """
model:
  language_modeling.general_gpt:
    model_name: "OpenELM-270M"
  language_modeling:
    general_gpt.vocab_size: 32128
"""


@pytest.mark.parametrize(
    ("name", "parameters", "first", "last"),
    [
        ("OpenELM-270M", 271_527_168, (12, 3), (20, 5)),
        ("OpenELM-450M", 457_179_136, (12, 3), (24, 6)),
        ("OpenELM-1_1B", 1_079_891_456, (16, 4), (32, 8)),
        ("OpenELM-3B", 3_036_647_424, (12, 3), (24, 6)),
    ],
)
def test_published_sizes(
    name: str, parameters: int, first: tuple[int, int], last: tuple[int, int]
) -> None:
    config = OpenELMConfig.from_name(name)
    heads = list(zip(config.num_query_heads, config.num_kv_heads, strict=True))
    assert sum(prod(shape) for shape in shapes(config).values()) == parameters
    assert (heads[0], heads[-1]) == (first, last)
    assert (config.ffn_multipliers[0], config.ffn_multipliers[-1]) == (0.5, 4.0)
    assert (config.vocab_size, config.max_context_length, config.rope_max_length) == (
        32000,
        2048,
        4096,
    )


def test_published_head_list() -> None:
    config = OpenELMConfig.from_name("OpenELM-270M")
    assert config.num_query_heads == (12,) * 5 + (16,) * 7 + (20,) * 4


@pytest.mark.parametrize("size", ["270M", "450M", "1_1B", "1.1B", "3B"])
@pytest.mark.parametrize("pattern", ["OpenELM-{}-Instruct", "apple/OpenELM-{}"])
def test_other_spellings_of_a_name(size: str, pattern: str) -> None:
    plain = OpenELMConfig.from_name(f"OpenELM-{size.replace('.', '_')}")
    assert OpenELMConfig.from_name(pattern.format(size)) == plain


def test_name_with_other_constants() -> None:
    config = OpenELMConfig.from_name("OpenELM-3B", 32128, max_context_length=4096)
    assert (config.vocab_size, config.max_context_length) == (32128, 4096)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"model_name 'OpenELM-7B' is unknown") as caught:
        OpenELMConfig.from_name("OpenELM-7B")
    assert all(name in str(caught.value) for name in PUBLISHED)


@SETTINGS
@given(value=st.floats(1e-3, 1e6), divisor=st.integers(1, 4096))
def test_make_divisible(value: float, divisor: int) -> None:
    result = make_divisible(value, divisor)
    assert result % divisor == 0
    assert result >= divisor
    assert result >= 0.9 * value
    nearest = abs(result - value) <= divisor / 2
    assert nearest or result == divisor or result - divisor < 0.9 * value


@pytest.mark.parametrize(
    ("value", "divisor", "expected"),
    [(1, 256, 256), (640, 256, 768), (800, 256, 768), (895, 256, 1024), (896, 256, 1024)],
)
def test_make_divisible_by_hand(value: float, divisor: int, expected: int) -> None:
    assert make_divisible(value, divisor) == expected


hundredths = st.integers(10, 800).map(lambda n: n / 100)
multipliers = st.one_of(hundredths, st.floats(0.1, 8.0))


@SETTINGS
@given(first=multipliers, last=multipliers, layers=st.integers(1, 200))
def test_multipliers_are_numpys_linspace_rounded(first: float, last: float, layers: int) -> None:
    config = OpenELMConfig.scaled(
        vocab_size=8,
        model_dim=64,
        head_dim=8,
        num_transformer_layers=layers,
        ffn_multipliers=(first, last),
    )
    expected = [round(v, 2) for v in np.linspace(first, last, layers)]
    assert list(config.ffn_multipliers) == expected


@pytest.mark.parametrize(
    ("first", "middle", "last", "rounded"),
    [
        (0.75, 0.925, 1.1, (0.75, 0.92, 1.1)),  # Python: round(0.925, 2) == 0.93
        (0.2, 0.4575, 0.715, (0.2, 0.46, 0.72)),  # 0.2 + 2 * 0.2575 == 0.7149999999999999
    ],
)
def test_rounding_is_numpys_on_ties(
    first: float, middle: float, last: float, rounded: tuple[float, ...]
) -> None:
    config = OpenELMConfig.scaled(
        vocab_size=8,
        model_dim=64,
        head_dim=8,
        num_transformer_layers=3,
        ffn_multipliers=(first, last),
    )
    assert tuple(round(v, 2) for v in np.array([first, middle, last])) == rounded
    assert config.ffn_multipliers == rounded


@SETTINGS
@given(
    layers=st.integers(1, 40),
    head_dim=st.integers(1, 64).map(lambda n: 2 * n),
    groups=st.integers(1, 8),
    model_dim=st.integers(16, 4096),
    qkv=st.tuples(multipliers, multipliers),
    ffn=st.tuples(multipliers, multipliers),
    divisor=st.sampled_from([16, 64, 256]),
)
def test_scaled(
    layers: int,
    head_dim: int,
    groups: int,
    model_dim: int,
    qkv: tuple[float, float],
    ffn: tuple[float, float],
    divisor: int,
) -> None:
    config = OpenELMConfig.scaled(
        vocab_size=100,
        model_dim=model_dim,
        head_dim=head_dim,
        num_transformer_layers=layers,
        qkv_multipliers=qkv,
        ffn_multipliers=ffn,
        num_gqa_groups=groups,
        ffn_dim_divisor=divisor,
    )
    shares = [float(round(v, 2)) for v in np.linspace(*qkv, layers)]
    for i, share in enumerate(shares):
        dims = make_divisible(share * model_dim, head_dim * groups)
        assert config.num_query_heads[i] * head_dim == dims
        assert config.num_query_heads[i] == config.num_kv_heads[i] * groups
        assert config.ffn_dims[i] == make_divisible(config.ffn_multipliers[i] * model_dim, divisor)
    assert OpenELMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_scaled_with_a_multiplier_per_layer() -> None:
    config = OpenELMConfig.scaled(
        vocab_size=8,
        model_dim=64,
        head_dim=8,
        num_transformer_layers=3,
        qkv_multipliers=(1.0, 0.5, 2.0),
        ffn_multipliers=(1.125, 0.5, 2.0),
    )
    assert config.num_query_heads == (8, 4, 16)
    assert config.ffn_multipliers == (1.125, 0.5, 2.0)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_transformer_layers": 0}, "num_transformer_layers"),
        ({"num_transformer_layers": 10**9}, "num_transformer_layers"),
        ({"num_gqa_groups": 0}, "num_gqa_groups"),
        ({"num_gqa_groups": 1.5}, "num_gqa_groups"),
        ({"model_dim": "64"}, "model_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"qkv_multipliers": (0.5, 1.0, 1.5)}, "qkv_multipliers"),
        ({"qkv_multipliers": 0.5}, "qkv_multipliers"),
        ({"ffn_multipliers": (0.5, "4")}, "ffn_multipliers[1]"),
        ({"ffn_multipliers": (0.001, 4.0)}, "ffn_multipliers[0]"),
    ],
)
def test_scaled_refuses(values: dict[str, Any], field: str) -> None:
    good = {"vocab_size": 8, "model_dim": 64, "head_dim": 8, "num_transformer_layers": 4}
    with pytest.raises(InputError) as caught:
        OpenELMConfig.scaled(**{**good, **values})
    assert str(caught.value).startswith(field)


def test_hugging_face_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(HUGGING_FACE)
    assert OpenELMConfig.from_json(path) == OpenELMConfig.from_name(
        "OpenELM-270M", bos_token_id=1, eos_token_id=2
    )


def test_hugging_face_config_from_its_multipliers() -> None:
    values = json.loads(HUGGING_FACE)
    del values["num_query_heads"], values["num_kv_heads"]
    values["ffn_multipliers"] = [0.5, 4.0]
    assert OpenELMConfig.from_dict(values) == OpenELMConfig.from_name(
        "OpenELM-270M", bos_token_id=1, eos_token_id=2
    )


def test_config_of_apples_mlx_example() -> None:
    values = {
        "model_name": "OpenELM-270M-Instruct",
        "vocab_size": 32128,
        "max_context_length": 1024,
        "quantization": {"group_size": 64, "bits": 4},
    }
    expected = OpenELMConfig.from_name("OpenELM-270M", 32128, max_context_length=1024)
    assert OpenELMConfig.from_dict(values) == expected


@pytest.mark.parametrize("text", [NESTED_YAML, DOTTED_YAML, MIXED_YAML])
def test_corenet_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    expected = OpenELMConfig.from_name("OpenELM-270M", 32128)
    assert OpenELMConfig.from_corenet_yaml(path) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"model: [", "not a YAML file"),
        (b"\xff\xfe\xfa", "not UTF-16-LE at byte 0"),
        (b"when: 2024-99-99", "not a YAML file"),
        (b"[" * 500, "not a YAML file"),
        (b"- model", "no model.language_modeling.general_gpt.model_name"),
        (b"", "no model.language_modeling.general_gpt.model_name"),
        (b"model: {language_modeling: {name: gpt}}", "general_gpt.model_name"),
        (NESTED_YAML.replace("270M", "7B").encode(), "model_name 'OpenELM-7B' is unknown"),
        (NESTED_YAML.replace("32128", "many").encode(), "vocab_size must be an integer"),
    ],
)
def test_corenet_yaml_refuses(tmp_path: Path, text: bytes, reason: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        OpenELMConfig.from_corenet_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "not a JSON file"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "not a JSON file"),
        (b"[]", "holds a JSON list"),
        (b"{}", "missing vocab_size, model_dim"),
    ],
)
def test_json_refuses(tmp_path: Path, text: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        OpenELMConfig.from_json(path)
    assert str(caught.value).startswith(f"{path}: {reason}")


@pytest.mark.parametrize("read", [OpenELMConfig.from_json, OpenELMConfig.from_corenet_yaml])
def test_no_such_file(tmp_path: Path, read: Callable[[Path], OpenELMConfig]) -> None:
    with pytest.raises(InputError, match=r"nowhere: No such file"):
        read(tmp_path / "nowhere")


BAD_VALUES = [
    ("vocab_size", 0),
    ("vocab_size", True),
    ("vocab_size", 2**31),
    ("model_dim", 32.0),
    ("model_dim", 10**400),
    ("head_dim", 7),
    ("head_dim", "8"),
    ("num_transformer_layers", 3),
    ("num_transformer_layers", []),
    ("num_transformer_layers", 10**9),
    ("num_query_heads", (4, 6, 6)),
    ("num_query_heads", 4),
    ("num_query_heads", (4, 6.0)),
    ("num_query_heads", (4, True)),
    ("num_kv_heads", (2,)),
    ("num_kv_heads", (2, 0)),
    ("num_kv_heads", (2, 4)),
    ("num_kv_heads", "23"),
    ("ffn_multipliers", ()),
    ("ffn_multipliers", (0.5, -1.0)),
    ("ffn_multipliers", (0.5, float("nan"))),
    ("ffn_multipliers", (0.5, float("inf"))),
    ("ffn_multipliers", (0.5, None)),
    ("ffn_dim_divisor", 0),
    ("ffn_with_glu", "false"),
    ("normalize_qk_projections", 1),
    ("share_input_output_layers", [True]),
    ("activation_fn_name", "gelu"),
    ("activation_fn_name", ["swish"]),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", 0.0),
    ("rope_freq_constant", -1),
    ("rope_freq_constant", float("inf")),
    ("rope_max_length", 0),
    ("max_context_length", -1),
    ("bos_token_id", -(2**31) - 1),
    ("eos_token_id", [2.0]),
    ("eos_token_id", "2"),
    ("eos_token_id", [True]),
    ("eos_token_id", 2**31),
]


def test_every_field_has_a_bad_value() -> None:
    assert {field for field, _ in BAD_VALUES} == {f.name for f in fields(OpenELMConfig)}


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_refusal_names_the_field(field: str, value: Any) -> None:
    lists_disagree = (field, value) == ("num_transformer_layers", 3)
    named = "num_query_heads has 2 entries for 3 layers" if lists_disagree else field
    with pytest.raises(InputError) as caught:
        replace(SMALL, **{field: value})
    assert str(caught.value).startswith(named)
    with pytest.raises(InputError) as caught:
        OpenELMConfig.from_dict({**SMALL.to_dict(), field: value}, where="x/config.json")
    assert str(caught.value).startswith(f"x/config.json: {named}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("normalization_layer_name", "layer_norm"),
    ],
)
def test_other_networks_are_refused(key: str, value: str) -> None:
    with pytest.raises(InputError, match=f"config: {key} is '{value}'"):
        OpenELMConfig.from_dict({**SMALL.to_dict(), key: value})


@pytest.mark.parametrize(
    "field", ["vocab_size", "model_dim", "num_query_heads", "num_kv_heads", "ffn_multipliers"]
)
@pytest.mark.parametrize("with_multipliers", [False, True])
def test_missing_field_is_named(field: str, with_multipliers: bool) -> None:
    values = SMALL.to_dict() | ({"qkv_multipliers": [0.5, 1.0]} if with_multipliers else {})
    del values[field]
    with pytest.raises(InputError, match=f"config: missing {field}$"):
        OpenELMConfig.from_dict(values)


def test_null_stands_for_the_default() -> None:
    assert OpenELMConfig.from_dict({**SMALL.to_dict(), "rms_norm_eps": None}) == SMALL


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "1", "swish"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = [*SMALL.to_dict(), "model_name", "qkv_multipliers", "num_gqa_groups"]


@SETTINGS
@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3))
def test_any_json_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        config = OpenELMConfig.from_dict({**SMALL.to_dict(), **changes})
    except InputError:
        return
    assert OpenELMConfig.from_dict(config.to_dict()) == config


def test_to_dict_is_a_config_json() -> None:
    values = SMALL.to_dict()
    assert values["model_type"] == "openelm"
    assert values["num_query_heads"] == [4, 6]
    assert json.loads(json.dumps(values)) == values


def test_config_is_hashable_and_accepts_lists() -> None:
    config = replace(SMALL, num_query_heads=[4, 6], ffn_multipliers=[0.5, 2.0])
    assert config == SMALL
    assert hash(config) == hash(SMALL)
