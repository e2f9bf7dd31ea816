"""Which machine this is: chip, memory, system, power, versions.

The parsers are functions of a tool's text, so that they can be tested without the machine. What
can't be read is "unknown" (or None), never a guess.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from mlx_openelm.backends import cpu

from .results import UNKNOWN, Machine

# Apple's nominal memory bandwidth in GB/s, where it comes in two by the number of GPU cores.
NOMINAL: dict[str, float | dict[int, float]] = {
    "Apple M1": 68,
    "Apple M1 Pro": 200,
    "Apple M1 Max": 400,
    "Apple M1 Ultra": 800,
    "Apple M2": 100,
    "Apple M2 Pro": 200,
    "Apple M2 Max": 400,
    "Apple M2 Ultra": 800,
    "Apple M3": 100,
    "Apple M3 Pro": 150,
    "Apple M3 Max": {30: 300, 40: 400},
    "Apple M3 Ultra": 819,
    "Apple M4": 120,
    "Apple M4 Pro": 273,
    "Apple M4 Max": {32: 410, 40: 546},
    "Apple M5": 153,
    "Apple M5 Pro": 307,
    "Apple M5 Max": {40: 614},
}
PACKAGES = ("mlx-openelm", "mlx", "numpy", "mlx-lm", "xllamacpp", "torch")
_SYSCTL = ("machdep.cpu.brand_string", "hw.physicalcpu", "hw.memsize", "kern.osproductversion")


def describe() -> Machine:
    """The machine that this runs on."""
    on_mac = _on_mac()
    chip, cores, memory, system = _macos() if on_mac else _linux()
    gpu_cores = (
        parse_gpu_cores(_output("system_profiler", "-json", "SPDisplaysDataType"))
        if on_mac
        else None
    )
    return Machine(
        chip=chip,
        cores=cores,
        gpu_cores=gpu_cores,
        memory_bytes=memory,
        os=system,
        power_source=parse_power_source(_output("pmset", "-g", "batt")) if on_mac else UNKNOWN,
        low_power_mode=parse_low_power_mode(_output("pmset", "-g")) if on_mac else UNKNOWN,
        thermal_pressure=thermal_pressure(),
        mlx_device=mlx_device(),
        blas=blas_name(),
        nominal_bandwidth=nominal_bandwidth(chip, gpu_cores),
        versions=versions(),
    )


def thermal_pressure() -> str:
    """ "none", "warning", "limited to N %", or "unknown", now."""
    if not _on_mac():
        return UNKNOWN
    return parse_thermal_pressure(_output("pmset", "-g", "therm"))


def mlx_device() -> str:
    """What MLX computes on: "cpu", or "gpu (NAME)"."""
    kind = mx.default_device().type
    if kind == mx.DeviceType.cpu:
        return "cpu"
    return f"{kind.name} ({mx.device_info().get('device_name', UNKNOWN)})"


def blas_name() -> str:
    """What multiplies matrices on the CPU."""
    if _on_mac():
        return "Accelerate"
    return "MLX's own (reference)" if cpu.missing() else "C library of mlx-openelm"


def versions() -> dict[str, str]:
    """Python's, and those of the `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def nominal_bandwidth(chip: str, gpu_cores: int | None) -> float | None:
    """Bytes a second, as Apple says; None where it isn't known which variant this is."""
    found = NOMINAL.get(chip)
    if isinstance(found, dict):
        found = found.get(gpu_cores or 0)
    return None if found is None else found * 1e9


# ---------------------------------------------------------------------------------------------
# The tools' texts


def parse_sysctl(text: str) -> dict[str, str]:
    """`sysctl NAME…`: name → value."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {name.strip(): value.strip() for name, found, value in pairs if found}


def parse_gpu_cores(text: str) -> int | None:
    """`system_profiler SPDisplaysDataType`, with or without `-json`: the GPU's cores."""
    found = re.search(r'"sppci_cores"\s*:\s*"(\d+)"|Total Number of Cores:\s*(\d+)', text)
    return int(found[1] or found[2]) if found else None


def parse_power_source(text: str) -> str:
    """`pmset -g batt`: "AC power", "battery" or "unknown"."""
    found = re.search(r"Now drawing from '(\w+) Power'", text)
    names = {"AC": "AC power", "Battery": "battery", "UPS": "UPS"}
    return names.get(found[1], UNKNOWN) if found else UNKNOWN


def parse_low_power_mode(text: str) -> str:
    """`pmset -g`: "on", "off" or "unknown".

    Macs with a high-power mode have `powermode` in its place: 0 automatic, 1 low, 2 high.
    """
    found = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)\b", text, re.MULTILINE)
    return {"0": "off", "1": "on", "2": "off"}.get(found[1], UNKNOWN) if found else UNKNOWN


def parse_thermal_pressure(text: str) -> str:
    """`pmset -g therm`: "none", "warning", "limited to N %" of the CPU's speed, or "unknown"."""
    limits = re.findall(r"CPU_(?:Speed|Scheduler)_Limit\s*=\s*(\d+)", text)
    lowest = min(map(int, limits), default=100)
    if lowest < 100:
        return f"limited to {lowest} %"
    if re.search(r"(?:Thermal|Performance) Warning Level\s*=\s*[1-9]", text, re.IGNORECASE):
        return "warning"
    fine = "No thermal warning level has been recorded" in text or bool(limits)
    return "none" if fine else UNKNOWN


def parse_cpuinfo(text: str) -> str:
    """`/proc/cpuinfo`: the processor's name. On ARM there is none."""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else UNKNOWN


def parse_meminfo(text: str) -> int | None:
    """`/proc/meminfo`: bytes of memory."""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


# ---------------------------------------------------------------------------------------------
# Asking the system


def _on_mac() -> bool:
    return platform.system() == "Darwin"


def _macos() -> tuple[str, int | None, int | None, str]:
    values = parse_sysctl(_output("sysctl", *_SYSCTL))

    def number(name: str) -> int | None:
        return int(values[name]) if values.get(name, "").isdigit() else None

    version = values.get("kern.osproductversion")
    return (
        values.get("machdep.cpu.brand_string", UNKNOWN),
        number("hw.physicalcpu"),
        number("hw.memsize"),
        f"macOS {version}" if version else UNKNOWN,
    )


def _linux() -> tuple[str, int | None, int | None, str]:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", UNKNOWN)
    except OSError:
        name = UNKNOWN
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        parse_cpuinfo(_text("/proc/cpuinfo")),
        cores,
        parse_meminfo(_text("/proc/meminfo")),
        f"{name}, {platform.system()} {platform.release()}",
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
