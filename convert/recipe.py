"""Which module gets how many bits: the command's choice, and a recipe file's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.files import read_json, shown
from mlx_openelm.model.quantization import MODES, Quantization, Scheme
from mlx_openelm.model.shapes import tensor_shapes

KEEP = "keep"
KEEP_EMBEDDINGS: tuple[tuple[str, Scheme | None], ...] = (
    ("token_embeddings", None),
    ("lm_head", None),
)


@dataclass(frozen=True)
class Recipe:
    """A scheme for all matrices (None: they are kept), and rules that go before it.

    A rule is a pattern and a scheme, or None for "keep". The first whose pattern fits decides.
    """

    default: Scheme | None = None
    rules: tuple[tuple[str, Scheme | None], ...] = ()

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of one module, such as `transformer.layers.0.attn.qkv_proj`."""
        for pattern, scheme in self.rules:
            if fits(pattern, module):
                return scheme
        return self.default


KEEP_ALL = Recipe()


def fits(pattern: str, module: str) -> bool:
    """Whether a module's name, or its end from a dot on, is like the pattern (`*`, `?`, `[…]`)."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, "*." + pattern)


def make_scheme(mode: str = "affine", bits: int | None = None, group: int | None = None) -> Scheme:
    """A scheme; what is None is 4 bits and groups of 64, or the only ones that the mode has.

    Raises:
        InputError: when MLX has no such scheme.
    """
    default_group, default_bits = 64, 4
    if mode in MODES and mode != "affine":
        (default_group,), (default_bits,) = MODES[mode]
    return Scheme(
        default_group if group is None else group, default_bits if bits is None else bits, mode
    )


def read_recipe(path: Path, default: Scheme | None) -> Recipe:
    """A recipe file: a JSON object from pattern to `{"bits", "group_size", "mode"}` or `"keep"`.

    Raises:
        InputError: when it can't be read; names the pattern.
    """
    rules: list[tuple[str, Scheme | None]] = []
    for pattern, value in read_json(path).items():
        where = f"{path}: {shown(pattern)}"
        if value == KEEP:
            rules.append((pattern, None))
        elif isinstance(value, Mapping) and value.keys() <= {"bits", "group_size", "mode"}:
            try:
                scheme = make_scheme(
                    value.get("mode", "affine"), value.get("bits"), value.get("group_size")
                )
            except (InputError, TypeError) as error:
                raise InputError(f"{where}: {error}") from None
            rules.append((pattern, scheme))
        else:
            raise InputError(f'{where} needs bits, group_size and mode, or "{KEEP}"')
    return Recipe(default, tuple(rules))


def plan(config: OpenELMConfig, recipe: Recipe) -> tuple[Quantization | None, list[str]]:
    """The scheme of every matrix of a model, as its `config.json` will say, and notes.

    A matrix whose columns the group size doesn't divide is kept, with a note; so is a rule that
    fits no module.
    """
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2
    }
    schemes: dict[str, Scheme | None] = {}
    notes = []
    for module, (_, columns) in modules.items():
        scheme = recipe.scheme(module)
        if scheme and columns % scheme.group_size:
            notes.append(f"{module}: {columns} columns don't divide into groups; kept")
            scheme = None
        schemes[module] = scheme
    for rule in recipe.rules:
        pattern = rule[0]
        # A tied model has no lm_head to keep
        if rule not in KEEP_EMBEDDINGS and not any(fits(pattern, module) for module in modules):
            notes.append(f"the recipe's {shown(pattern)} fits no module")
    used = [scheme for scheme in schemes.values() if scheme]
    if not used:
        return None, notes
    default = recipe.default or max(used, key=used.count)
    exceptions = {module: scheme for module, scheme in schemes.items() if scheme != default}
    return Quantization(default, exceptions), notes
