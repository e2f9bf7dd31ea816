"""The shape of an OpenELM network: layer-wise scaling and the published family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import brief, read_json, read_yaml, shown, user_path

ACTIVATIONS = ("swish", "silu")

# As a `config.json` has it: one id, several, or none (None, or negative)
TokenIds = int | tuple[int, ...] | None

# OpenELM paper (arXiv 2404.14619), table 9, and CoreNet's `general_gpt.py`.
# What the members share is in the defaults of `OpenELMConfig.scaled`.
PUBLISHED: dict[str, dict[str, Any]] = {
    "OpenELM-270M": {"num_transformer_layers": 16, "model_dim": 1280, "head_dim": 64},
    "OpenELM-450M": {"num_transformer_layers": 20, "model_dim": 1536, "head_dim": 64},
    "OpenELM-1_1B": {"num_transformer_layers": 28, "model_dim": 2048, "head_dim": 64},
    "OpenELM-3B": {"num_transformer_layers": 36, "model_dim": 3072, "head_dim": 128},
}


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least `divisor` and 0.9 × `value`.

    Source: CoreNet, `corenet/utils/math_utils.py`.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _spread(ends: Sequence[float], layers: int) -> tuple[float, ...]:
    """`layers` multipliers from the first to the last of `ends`, rounded to two decimals.

    CoreNet rounds what `numpy.linspace` gives, and NumPy rounds 100 × value, where Python's
    `round(value, 2)` takes the exact decimal expansion: they differ where 100 × value is a tie.
    """
    if len(ends) != 2:
        return tuple(ends)
    first, last = ends
    step = (last - first) / max(layers - 1, 1)
    inner = [first + i * step for i in range(max(layers - 1, 1))]
    return tuple(round(100 * v) / 100 for v in [*inner, last][:layers])


@dataclass(frozen=True)
class OpenELMConfig:
    """Geometry and constants of one network. The names are those of Hugging Face's `config.json`.

    `num_query_heads`, `num_kv_heads` and `ffn_multipliers` have one entry per layer.
    `bos_token_id` and `eos_token_id` are None where the tokenizer decides.

    Raises:
        InputError: when the values contradict each other; the message names the field.
    """

    vocab_size: int
    model_dim: int
    head_dim: int
    num_transformer_layers: int
    num_query_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    ffn_multipliers: tuple[float, ...]
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    activation_fn_name: str = "swish"
    rms_norm_eps: float = 1e-6
    rope_freq_constant: float = 10000.0
    rope_max_length: int = 4096
    max_context_length: int = 2048
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            _check_integer(name, getattr(self, name), allowed)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, f"must be true or false, not {brief(getattr(self, name))}")
        for name in ("rms_norm_eps", "rope_freq_constant"):
            _check_positive(name, getattr(self, name))
        for name in _PER_LAYER:
            values = _check_list(name, getattr(self, name))
            if len(values) != self.num_transformer_layers:
                layers = self.num_transformer_layers
                raise _bad(name, f"has {len(values)} entries for {layers} layers")
            object.__setattr__(self, name, values)
        for name in ("num_query_heads", "num_kv_heads"):
            for i, heads in enumerate(getattr(self, name)):
                _check_integer(f"{name}[{i}]", heads)
        for i, (heads, kv_heads) in enumerate(
            zip(self.num_query_heads, self.num_kv_heads, strict=True)
        ):
            if heads % kv_heads:
                raise _bad("num_kv_heads", f"layer {i}: {kv_heads} does not divide {heads} heads")
        for name in ("bos_token_id", "eos_token_id"):
            object.__setattr__(self, name, check_token_ids(name, getattr(self, name)))
        if self.head_dim % 2:
            raise _bad("head_dim", f"must be even for rotary embeddings, not {self.head_dim}")
        if self.activation_fn_name not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise _bad(
                "activation_fn_name", f"must be {known}, not {brief(self.activation_fn_name)}"
            )

    @property
    def ffn_dims(self) -> tuple[int, ...]:
        """Width of each layer's feed-forward network (after the gate, with GLU)."""
        return tuple(
            make_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in self.ffn_multipliers
        )

    @classmethod
    def scaled(
        cls,
        *,
        vocab_size: int,
        model_dim: int,
        head_dim: int,
        num_transformer_layers: int,
        qkv_multipliers: Sequence[float] = (0.5, 1.0),
        ffn_multipliers: Sequence[float] = (0.5, 4.0),
        num_gqa_groups: int = 4,
        **constants: Any,
    ) -> OpenELMConfig:
        """Layer-wise scaling: heads and FFN widths that grow from the first to the last layer.

        `qkv_multipliers` and `ffn_multipliers` are the first and last layer's share of
        `model_dim`, or one value for each of three or more layers; `constants` are further
        fields.

        Source: OpenELM paper, section 2.1, equation 1; CoreNet, `general_gpt.py`.
        """
        layers = num_transformer_layers
        for name, value in (
            ("model_dim", model_dim),
            ("head_dim", head_dim),
            ("num_transformer_layers", layers),
            ("num_gqa_groups", num_gqa_groups),
        ):
            _check_integer(name, value, _RANGES.get(name, _COUNT))
        for name, ends in (
            ("qkv_multipliers", qkv_multipliers),
            ("ffn_multipliers", ffn_multipliers),
        ):
            if len(_check_list(name, ends)) not in (2, layers):
                raise _bad(name, f"needs 2 or {layers} entries, not {len(ends)}")
        unit = head_dim * num_gqa_groups
        heads = [
            make_divisible(model_dim * m, unit) // head_dim
            for m in _spread(qkv_multipliers, layers)
        ]
        return cls(
            vocab_size=vocab_size,
            model_dim=model_dim,
            head_dim=head_dim,
            num_transformer_layers=layers,
            num_query_heads=tuple(heads),
            num_kv_heads=tuple(h // num_gqa_groups for h in heads),
            ffn_multipliers=_spread(ffn_multipliers, layers),
            **constants,
        )

    @classmethod
    def from_name(cls, name: str, vocab_size: int = 32000, **constants: Any) -> OpenELMConfig:
        """A published model: one of `PUBLISHED`, with or without `apple/` and `-Instruct`.

        Raises:
            InputError: when no model of the family has that name.
        """
        key = name.removeprefix("apple/").removesuffix("-Instruct").replace("1.1B", "1_1B")
        if key not in PUBLISHED:
            raise _bad("model_name", f"{brief(name)} is unknown; known are {', '.join(PUBLISHED)}")
        return cls.scaled(vocab_size=vocab_size, **PUBLISHED[key], **constants)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> OpenELMConfig:
        """A parsed `config.json` of Hugging Face or mlx-lm, or of Apple's 2024 MLX example.

        `where` is named in error messages. Keys that are not fields are ignored.

        Raises:
            InputError: when a field is missing, of the wrong type, or contradicts another.
        """
        try:
            if "model_name" in values and "model_dim" not in values:
                return _from_published(values)
            if values.get("model_type", "openelm") != "openelm":
                raise _bad(
                    "model_type", f"is {brief(values['model_type'])}; only 'openelm' is known"
                )
            if values.get("normalization_layer_name", "rms_norm") != "rms_norm":
                found = values["normalization_layer_name"]
                raise _bad(
                    "normalization_layer_name", f"is {brief(found)}; only 'rms_norm' is known"
                )
            known = {f.name for f in fields(cls)}
            given = {k: v for k, v in values.items() if k in known and v is not None}
            required = [f.name for f in fields(cls) if f.default is MISSING]
            heads = ("num_query_heads", "num_kv_heads")
            by_multipliers = "qkv_multipliers" in values and not any(h in given for h in heads)
            if by_multipliers:
                required = [name for name in required if name not in heads]
            if missing := [name for name in required if name not in given]:
                raise InputError(f"missing {', '.join(missing)}")
            if by_multipliers:
                return cls.scaled(
                    qkv_multipliers=values["qkv_multipliers"],
                    num_gqa_groups=values.get("num_gqa_groups", 1),
                    **given,
                )
            return cls(**given)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> OpenELMConfig:
        """Read a `config.json` (see `from_dict`).

        Raises:
            InputError: when the file can't be read, isn't a JSON object, or is inconsistent.
        """
        return cls.from_dict(read_json(user_path(path)), where=str(path))

    @classmethod
    def from_corenet_yaml(cls, path: str | Path) -> OpenELMConfig:
        """Read a CoreNet training YAML: `model.language_modeling.general_gpt`.

        Dotted keys (`model.language_modeling.general_gpt.vocab_size: …`) are read too.

        Raises:
            InputError: when the file can't be read or names no published model.
        """
        section = descend(read_yaml(user_path(path)), ("model", "language_modeling", "general_gpt"))
        if "model_name" not in section:
            raise InputError(f"{path}: no model.language_modeling.general_gpt.model_name")
        return cls.from_dict(section, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` holds them: lists, and `model_type`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"model_type": "openelm", **lists}


_COUNT = range(1, 2**31)
_RANGES = {
    "vocab_size": _COUNT,
    "model_dim": _COUNT,
    "head_dim": range(2, 2**31),
    "num_transformer_layers": range(1, 10_001),
    "ffn_dim_divisor": _COUNT,
    "rope_max_length": _COUNT,
    "max_context_length": _COUNT,
}
_PER_LAYER = ("num_query_heads", "num_kv_heads", "ffn_multipliers")
_SWITCHES = ("ffn_with_glu", "normalize_qk_projections", "share_input_output_layers")


def _from_published(values: Mapping[str, Any]) -> OpenELMConfig:
    given = {
        field: values[field]
        for field in ("vocab_size", "max_context_length")
        if values.get(field) is not None
    }
    return OpenELMConfig.from_name(str(values["model_name"]), **given)


def descend(tree: Any, keys: Sequence[str]) -> dict[str, Any]:
    """What stands under a path of keys in nested mappings, whether nested or dotted."""
    if not isinstance(tree, dict):
        return {}
    if not keys:
        return tree
    found: dict[str, Any] = {}
    for length in range(1, len(keys) + 1):
        found |= descend(tree.get(".".join(keys[:length])), keys[length:])
    prefix = ".".join(keys) + "."
    dotted = {k.removeprefix(prefix): v for k, v in tree.items() if str(k).startswith(prefix)}
    return found | dotted


def check_token_ids(field: str, value: object) -> TokenIds:
    """`bos_token_id` or `eos_token_id` as a configuration has it, a list as a tuple.

    Raises:
        InputError: naming `field`, when it is anything else.
    """
    if value is None:
        return None
    several = isinstance(value, (list, tuple))
    ids: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(type(i) is int and -(2**31) <= i < 2**31 for i in ids):
        raise _bad(field, f"must be a token's id or a list of ids, not {shown(value)}")
    return tuple(ids) if several else int(ids[0])


def token_ids(value: TokenIds) -> list[int]:
    """The ids that `bos_token_id` or `eos_token_id` stands for; negative ones stand for none."""
    if value is None:
        return []
    return [i for i in (value if isinstance(value, tuple) else (value,)) if i >= 0]


def _bad(field: str, reason: str) -> InputError:
    return InputError(f"{field} {reason}")


def _check_integer(field: str, value: object, allowed: range = _COUNT) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise _bad(
            field, f"must be an integer from {allowed[0]} to {allowed[-1]}, not {brief(value)}"
        )


def _check_positive(field: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2**31:
        raise _bad(field, f"must be a positive number below 2**31, not {brief(value)}")


def _check_list(field: str, values: object) -> tuple[Any, ...]:
    """The values as a tuple, each a positive number."""
    if not isinstance(values, (list, tuple)):
        raise _bad(field, f"must be a list with one number per layer, not {brief(values)}")
    for i, value in enumerate(values):
        _check_positive(f"{field}[{i}]", value)
    return tuple(values)
