"""Results as a run would have found them, with the noise of a shared machine; nothing is measured.

A machine's speed wanders by tens of percent within a run, and everything that runs on it wanders
along: `Drift`. On top, every trial and every calibration has noise of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from mlx_openelm.benchmarks.results import (
    Calibration,
    Graph,
    Limit,
    Machine,
    Measurement,
    Model,
    Results,
    Trial,
    Work,
)

DEMO = Model("demo", "demo", "float32", 3_700_000, 14_800_000)
SMALL = Model(
    "random:OpenELM-270M:4bit", "OpenELM-270M", "4bit", 271_527_168, 152_900_000, random=True
)
LARGE = Model(
    "random:OpenELM-1_1B:bfloat16", "OpenELM-1_1B", "bfloat16", 1_079_891_456, 2_159_782_912, True
)
DECODE = Work("decode", prompt_tokens=128, gen_tokens=64)
SPEED = {"mlx-openelm": 1.0, "mlx-lm": 0.47, "llama.cpp": 1.01, "torch": 0.72}
LAPTOP = Machine(
    chip="Apple M3 Max",
    cores=16,
    gpu_cores=40,
    memory_bytes=48 << 30,
    os="macOS 15.5",
    power_source="AC",
    low_power_mode="off",
    thermal_pressure="nominal",
    mlx_device="gpu (Apple M3 Max)",
    blas="Accelerate",
    nominal_bandwidth=400e9,
    versions={"mlx": "0.32.4", "mlx-openelm": "0.1.0", "mlx-lm": "0.32.2"},
)
BANDWIDTH, MATMUL = 18e9, {"float32": 82e9, "bfloat16": 2.1e9}


class Machinery:
    """A machine that drifts: `step` moves it on, `trial` and `calibration` say how fast it is.

    `drift` is the standard deviation of a step of the logarithm of its speed, `noise` that of one
    measurement.
    """

    def __init__(self, seed: int, drift: float = 0.06, noise: float = 0.02) -> None:
        self.random = random.Random(seed)
        self.drift, self.noise = drift, noise
        self.level = self.random.gauss(0, 0.15)

    def step(self) -> None:
        """A turn later. It wanders within about a third of its usual speed."""
        self.level = 0.93 * self.level + self.random.gauss(0, self.drift)

    def trial(self, value: float, sensitivity: float = 1.0) -> float:
        """What is measured of something that takes `value` on the machine at its usual speed."""
        noise = abs(self.random.gauss(0, self.noise))  # something is always slower, never faster
        return value * math.exp(sensitivity * self.level - noise)

    def calibration(self) -> Calibration:
        """What the machine can do now."""
        matmul = {dtype: self.trial(rate) for dtype, rate in MATMUL.items()}
        return Calibration(self.trial(BANDWIDTH), matmul)


def measure(
    machinery: Machinery,
    model: Model,
    work: Work,
    speeds: Mapping[str, float],
    trials: int = 5,
    unit: str = "tokens/s",
) -> list[Measurement]:
    """Trials in turns of every runtime at `speeds`, tokens/s (or seconds) on an idle machine."""
    taken: dict[str, list[Trial]] = {name: [] for name in speeds}
    for turn in range(trials):
        machinery.step()
        calibration = machinery.calibration()
        for i, (name, speed) in enumerate(speeds.items()):
            value = machinery.trial(speed)
            if unit == "s":
                value = speed**2 / value
            taken[name].append(
                Trial(
                    turn,
                    value,
                    seconds=work.gen_tokens / value if work.gen_tokens else value,
                    peak_bytes=round(model.bytes * (1.3 + 0.4 * i)) + 80_000_000,
                    mlx_peak_bytes=round(model.bytes * 1.1) if name.startswith("mlx") else None,
                    calibration=calibration,
                    series=[value * (1 - 0.01 * k) for k in range(10)]
                    if work.kind == "long"
                    else [],
                )
            )
    counts = unit == "tokens/s"
    per_token = 2.0 * model.parameters
    reads = 1 if work.kind == "decode" else max(1, work.prompt_tokens, work.batch)
    needed = max(model.bytes / reads / BANDWIDTH, per_token / MATMUL["float32"])
    limit = Limit(model.bytes / reads, per_token, 1 / needed) if counts else None
    return [
        Measurement(
            model.name,
            name,
            work,
            unit,
            some,
            limit,
            Graph(1362 if name == "mlx-openelm" else 4023, 3.1e-4)
            if name.startswith("mlx") and work.kind == "decode"
            else None,
            note="weights dequantized to float32" if (name, model) == ("torch", SMALL) else "",
        )
        for name, some in taken.items()
    ]


def idle_speeds(model: Model, work: Work) -> dict[str, float]:
    """Tokens/s by runtime."""
    speed = 0.7 * BANDWIDTH / model.bytes
    if work.kind == "prefill":
        speed = 0.8 * MATMUL["float32"] / (2 * model.parameters + 2000 * work.prompt_tokens)
    if work.kind == "batch":
        speed *= 0.6 * work.batch
    speed *= 1 - work.prompt_tokens / 10_000
    return {name: factor * speed for name, factor in SPEED.items()}


def results(
    seed: int = 1,
    models: Sequence[Model] = (DEMO, SMALL),
    works: Sequence[Work] = (
        *(Work("prefill", prompt_tokens=n) for n in (32, 128, 512)),
        DECODE,
        Work("decode", prompt_tokens=1024, gen_tokens=64),
        Work("batch", prompt_tokens=32, gen_tokens=64, batch=4),
    ),
    trials: int = 5,
    slowdown: float = 1.0,
    machine: Machine | None = None,
    machinery: Machinery | None = None,
    runtimes: Sequence[str] = tuple(SPEED),
) -> Results:
    """A run. `slowdown` is what this project's generation takes longer."""
    machinery = machinery or Machinery(seed)
    found: list[Measurement] = []
    for model in models:
        for work in works:
            speeds = {name: idle_speeds(model, work)[name] for name in runtimes}
            if work.kind == "decode":
                speeds["mlx-openelm"] /= slowdown
            found += measure(machinery, model, work, speeds, trials)
    return Results(
        created="2026-11-24T12:00:00Z",
        command=["run", "--model", "demo"],
        machine=machine or Machine(chip="AMD EPYC", cores=2, os="Linux 6.1", mlx_device="cpu"),
        models=list(models),
        measurements=found,
        calibration=[machinery.calibration() for _ in range(5)],
    )
