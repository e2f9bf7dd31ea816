"""Numbers, names and lengths as people read them: the same words in every kind of report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..results import UNKNOWN, Machine, Model, Work
from ..statistics import Ratio

OURS = "mlx-openelm"
RANDOM_TOKENS = "random tokens"
ENOUGH = 3  # turns, for an interval
SOME = 60  # characters of a name that a chart or a table has room for

# Kind of work -> what a row of it is called, and the heading over several. {made} is "64 after 128"
KINDS = {
    "prefill": ("prompt of {prompt}", "Prompt processing"),
    "decode": ("generate {made}", "Generation"),
    "batch": ("generate {made}", "Several sequences at once"),
    "long": ("long run, {made}", "A long generation"),
    "speculative": ("draft model, {made}", "Speculative decoding"),
    "lookup": ("prompt lookup, {made}", "Prompt lookup"),
    "load": ("load the model", "Loading"),
    "cold": ("cold start", "Process start to first token"),
}


def printable(text: str) -> str:
    """Text from a file without what could move a cursor, hide, or run backwards."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(text: str, length: int = SOME) -> str:
    """The beginning of a long text."""
    return text if len(text) <= length else text[: length - 1] + "…"


def number(value: float) -> str:
    """Three digits that count, thousands apart: 1,234, 12.3, 0.0123."""
    if not math.isfinite(value):
        return "?"
    if value == 0 or not 1e-4 <= abs(value) < 1e12:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:,.{digits}f}"


def prefixed(value: float) -> tuple[float, str]:
    """What to divide by, and the prefix of the unit that says so."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return factor, prefix
    return 1, ""


def scaled(value: float, unit: str) -> str:
    """With a prefix: 543 MB, 18.3 GB/s, 82.1 GFLOP/s."""
    factor, prefix = prefixed(value)
    return f"{number(value / factor)} {prefix}{unit}"


def span(low: str, high: str) -> str:
    """A range, or the one value that both ends are."""
    return low if low == high else f"{low}–{high}"


def percent(fraction: float) -> str:
    """62 %; of little, one decimal more."""
    return f"{100 * fraction:.{0 if fraction >= 0.0995 else 1}f} %"


def times(ratio: Ratio, turns: int) -> str:
    """2.13× (2.05–2.21), a tie (0.97–1.02), or 2.13× (1 trial)."""
    return f"{'a tie' if is_tie(ratio, turns) else factor(ratio)} ({interval(ratio, turns)})"


def is_tie(ratio: Ratio, turns: int) -> bool:
    """Whether nobody is faster, as far as so many turns can tell."""
    return turns >= ENOUGH and ratio.tie


def factor(ratio: Ratio) -> str:
    """2.13×."""
    return f"{ratio.value:.{_decimals(ratio)}f}×"


def interval(ratio: Ratio, turns: int = ENOUGH) -> str:
    """2.05–2.21; of fewer turns than make one, their number."""
    if turns < ENOUGH:
        return "1 trial" if turns == 1 else f"{turns} trials"
    return span(*(f"{end:.{_decimals(ratio)}f}" for end in (ratio.low, ratio.high)))


def _decimals(ratio: Ratio) -> int:
    """As many as it takes to see that an interval ends short of 1."""
    return 3 if not ratio.tie and "1.00" in (f"{ratio.low:.2f}", f"{ratio.high:.2f}") else 2


def enumerated(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def superscript(i: int) -> str:
    """The mark of a remark."""
    return str(i).translate(_SUPERSCRIPT)


def work_label(work: Work) -> str:
    """A row's name: "prompt of 512", "generate 64 after 128", "generate 8 × 64 after 32"."""
    many = f"{work.batch} × " if work.batch > 1 else ""
    prompt, made = f"{many}{work.prompt_tokens:,}", f"{many}{work.gen_tokens:,}"
    if work.prompt_tokens:
        made += f" after {work.prompt_tokens:,}"
    if work.kind in KINDS:
        label = KINDS[work.kind][0].format(prompt=prompt, made=made)
    else:
        label = f"{short(printable(work.kind), 20)} {made}"
    return label if work.text == RANDOM_TOKENS else f"{label}, {short(printable(work.text), 30)}"


def command_line(command: Sequence[str]) -> str:
    """What was typed."""
    return " ".join(map(printable, command))


def model_label(model: Model) -> str:
    """OpenELM-270M, 4bit."""
    return short(printable(f"{model.shape}, {model.stored}"))


def model_facts(model: Model) -> str:
    """What the model is, beside its name."""
    facts = [
        f"{number(model.parameters / 1e6)} M parameters",
        f"{scaled(model.bytes, 'B')} of weights",
    ]
    if model.random:
        facts.append("random weights, for speed only")
    return ", ".join(facts)


def machine_label(machine: Machine) -> str:
    """The chip, or the little that is known of it."""
    chip = printable(machine.chip)
    if chip == UNKNOWN:
        chip = "unknown chip"
    return short(f"{chip}, {machine.cores} cores" if machine.cores else chip, 80)


def machine_facts(machine: Machine) -> dict[str, str]:
    """All that is known of a machine; what can't be read says so."""

    def known(value: object) -> str:
        return UNKNOWN if value is None else str(value)

    memory, nominal = machine.memory_bytes, machine.nominal_bandwidth
    facts = {
        "Chip": machine.chip,
        "CPU cores": known(machine.cores),
        "GPU cores": known(machine.gpu_cores),
        "Memory": known(memory and scaled(memory, "B")),
        "System": machine.os,
        "Power": machine.power_source,
        "Low-power mode": machine.low_power_mode,
        "Thermal pressure": machine.thermal_pressure,
        "MLX computes on": machine.mlx_device,
        "BLAS": machine.blas,
        "Bandwidth, nominal": scaled(nominal, "B/s") if nominal else "unknown, only measured",
        "Versions": ", ".join(f"{k} {v}" for k, v in machine.versions.items()) or UNKNOWN,
    }
    return {name: printable(value) for name, value in facts.items()}
