"""What a benchmark run found: the schema of `results.json`, reading and writing it.

A `Results` is one run on one machine. It holds every single trial; medians, intervals and ratios
are computed from them by whoever shows them (`statistics`). The version goes up whenever a field
changes its meaning or goes away; a file of another version is refused.
"""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mlx_openelm.errors import InputError
from mlx_openelm.files import read_json, replacing

SCHEMA = 1
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Machine:
    """Where it ran. What can't be read is "unknown", or None for a number."""

    chip: str = UNKNOWN
    cores: int | None = None
    gpu_cores: int | None = None
    memory_bytes: int | None = None
    os: str = UNKNOWN
    power_source: str = UNKNOWN
    low_power_mode: str = UNKNOWN
    thermal_pressure: str = UNKNOWN
    mlx_device: str = UNKNOWN  # "gpu (Apple M3 Max)", "cpu", "gpu (NVIDIA H100)"
    blas: str = UNKNOWN
    nominal_bandwidth: float | None = None  # bytes a second, as the maker says
    versions: dict[str, str] = field(default_factory=dict)  # package -> version


@dataclass(frozen=True)
class Calibration:
    """What the machine could do at one moment, through MLX.

    `bandwidth` in bytes a second (read + written), `matmul` in operations a second by dtype
    ("float32", "float16", "bfloat16", "4bit").
    """

    bandwidth: float
    matmul: dict[str, float]


@dataclass(frozen=True)
class Model:
    """What was measured on."""

    name: str  # a directory's name, "demo", or "random:OpenELM-270M:4bit"
    shape: str  # "OpenELM-270M", or "demo"
    stored: str  # "float32", "bfloat16", "4bit", "mxfp4", …
    parameters: int
    bytes: int  # of the weights as stored
    random: bool = False  # random weights: speed only


@dataclass(frozen=True)
class Work:
    """One workload.

    `kind`: "prefill" (prompt processing), "decode" (generation), "load" (seconds until a model is
    ready), "cold" (process start to first token), "long" (a long generation), "speculative",
    "lookup", "batch".
    """

    kind: str
    prompt_tokens: int = 0
    gen_tokens: int = 0
    batch: int = 1
    text: str = "random tokens"  # or the name of a bundled prompt

    @property
    def label(self) -> str:
        """A few words for a table."""
        words = [self.kind]
        if self.prompt_tokens:
            words.append(f"{self.prompt_tokens} prompt")
        if self.gen_tokens:
            words.append(f"{self.gen_tokens} tokens")
        if self.batch > 1:
            words.append(f"batch {self.batch}")
        return ", ".join(words)


@dataclass(frozen=True)
class Trial:
    """One measurement.

    `turn` counts the rounds of a run: trials of two runtimes with the same turn were taken one
    after the other. `value` is in the unit of the measurement. `peak_bytes` is resident memory of
    the process so far, `mlx_peak_bytes` what MLX held at most.
    """

    turn: int
    value: float
    seconds: float
    peak_bytes: int | None = None
    mlx_peak_bytes: int | None = None
    calibration: Calibration | None = None  # taken just before this turn
    series: list[float] = field(default_factory=list)  # tokens/s by tenth of a long generation


@dataclass(frozen=True)
class Limit:
    """The roofline of a workload, with the calibration of the run (medians).

    Bytes that have to move and operations that have to be done for one token, and the tokens per
    second that would be if only the slower of the two counted.
    """

    bytes_per_token: float
    operations_per_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Graph:
    """What a decoded token costs beside arithmetic: exact on any machine."""

    primitives: int  # nodes of MLX's graph
    host_seconds: float  # spent building it


@dataclass(frozen=True)
class Measurement:
    """One workload on one model by one runtime.

    `unit`: "tokens/s" (more is better) or "s" (less is better). `note` is for the reader ("weights
    dequantized to float32"). `differs` says where greedy tokens part from this project's in
    float32, None when they don't or weren't compared. `error`: why there are no (more) trials.
    """

    model: str
    runtime: str  # "mlx-openelm", "mlx-lm", "llama.cpp", "torch"
    work: Work
    unit: str
    trials: list[Trial] = field(default_factory=list)
    limit: Limit | None = None
    graph: Graph | None = None
    statistics: dict[str, float] = field(default_factory=dict)  # acceptance, tokens per step, …
    note: str = ""
    differs: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Results:
    """One run on one machine."""

    created: str  # ISO 8601, UTC
    command: list[str]
    machine: Machine
    models: list[Model]
    measurements: list[Measurement]
    calibration: list[Calibration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # noisy, throttled, on battery, left out
    partial: bool = False  # ended before it was done
    schema: int = SCHEMA


def write(results: Results, file: Path) -> None:
    """Write `results.json`; complete or not at all."""
    with replacing(file) as out:
        out.write(json.dumps(asdict(results), indent=1).encode() + b"\n")


def read(file: Path) -> Results:
    """The results in a file.

    Raises:
        InputError: when it isn't a results file, is of another schema version, or a field is
            missing or of the wrong type; names the file and the field.
    """
    values = read_json(file)
    if "schema" not in values:
        raise InputError(f"{file}: not a results file of the benchmarks (no schema in it)")
    if values["schema"] != SCHEMA or values["schema"] is True:
        raise InputError(
            f"{file}: schema version {values['schema']!r}; this version of mlx-openelm reads "
            f"{SCHEMA}"
        )
    try:
        return _build(Results, values, "")
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


T = TypeVar("T")


def _build(wanted: type[T], value: Any, where: str) -> T:
    """`value`, out of JSON, as a `wanted`; unknown fields are left out."""
    result: Any
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None  # type: ignore[return-value]
        return _build(next(a for a in arguments if a is not type(None)), value, where)  # type: ignore[no-any-return]
    if is_dataclass(wanted):
        if not isinstance(value, dict):
            raise InputError(f"{where or 'the file'} should be an object")
        hints = get_type_hints(wanted)
        given = {
            f.name: _build(hints[f.name], value[f.name], f"{where}.{f.name}".lstrip("."))
            for f in fields(wanted)
            if f.name in value
        }
        try:
            result = wanted(**given)
        except TypeError:  # fields that have no default
            missing = next(f.name for f in fields(wanted) if f.name not in given and _needed(f))
            raise InputError(f"{where}.{missing} is missing".lstrip(".")) from None
    elif origin is list and isinstance(value, list):
        result = [_build(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        result = {k: _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    elif wanted is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        result = float(value)  # neither infinite nor NaN
    elif wanted is not float and isinstance(wanted, type) and type(value) is wanted:
        result = value
    else:
        kind = getattr(wanted, "__name__", wanted)
        raise InputError(f"{where} should be of type {kind}, not {value!r:.40}")
    return result  # type: ignore[no-any-return]


def _needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
