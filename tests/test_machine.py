"""What the machine is, read from texts in the format that macOS's and Linux's tools print."""

from __future__ import annotations

import json
import platform

import pytest

from mlx_openelm.benchmarks import machine
from mlx_openelm.benchmarks.results import UNKNOWN, Machine


def sysctl(chip: str, cores: int, memory: int, version: str) -> str:
    return (
        f"machdep.cpu.brand_string: {chip}\nhw.physicalcpu: {cores}\n"
        f"hw.memsize: {memory}\nkern.osproductversion: {version}\n"
    )


def displays(chip: str, cores: int) -> str:
    gpu = {
        "_name": chip,
        "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
        "spdisplays_ndrvs": [{"_name": "Color LCD", "spdisplays_main": "spdisplays_yes"}],
        "spdisplays_vendor": "sppci_vendor_Apple",
        "sppci_bus": "spdisplays_builtin",
        "sppci_cores": str(cores),
        "sppci_device_type": "spdisplays_gpu",
        "sppci_model": chip,
    }
    return json.dumps({"SPDisplaysDataType": [gpu]}, indent=2)


DISPLAYS_TEXT = """Graphics/Displays:

    Apple M2:

      Chipset Model: Apple M2
      Type: GPU
      Bus: Built-In
      Total Number of Cores: 10
      Vendor: Apple (0x106b)
      Metal Support: Metal 3
"""

# chip, cores, GPU cores, GB, macOS, nominal GB/s
MACS = [
    ("Apple M1", 8, 7, 8, "12.6", 68),
    ("Apple M1 Pro", 10, 16, 16, "13.5", 200),
    ("Apple M1 Max", 10, 32, 64, "14.4.1", 400),
    ("Apple M1 Ultra", 20, 64, 128, "14.5", 800),
    ("Apple M2", 8, 10, 24, "14.0", 100),
    ("Apple M2 Pro", 12, 19, 32, "15.1", 200),
    ("Apple M2 Max", 12, 38, 96, "15.1", 400),
    ("Apple M2 Ultra", 24, 76, 192, "15.1", 800),
    ("Apple M3", 8, 10, 16, "15.2", 100),
    ("Apple M3 Pro", 12, 18, 36, "15.2", 150),
    ("Apple M3 Max", 14, 30, 36, "15.2", 300),
    ("Apple M3 Max", 16, 40, 128, "15.2", 400),
    ("Apple M3 Ultra", 32, 80, 512, "15.4", 819),
    ("Apple M4", 10, 10, 16, "15.4", 120),
    ("Apple M4 Pro", 14, 20, 48, "15.4", 273),
    ("Apple M4 Max", 14, 32, 36, "15.4", 410),
    ("Apple M4 Max", 16, 40, 128, "15.4", 546),
    ("Apple M5", 10, 10, 32, "26.1", 153),
    ("Apple M5 Pro", 18, 20, 64, "26.3", 307),
    ("Apple M5 Max", 18, 40, 128, "26.3", 614),
]


@pytest.mark.parametrize(("chip", "cores", "gpu_cores", "gigabytes", "version", "nominal"), MACS)
def test_a_mac_is_recognised(
    monkeypatch: pytest.MonkeyPatch,
    chip: str,
    cores: int,
    gpu_cores: int,
    gigabytes: int,
    version: str,
    nominal: float,
) -> None:
    texts = {
        "sysctl": sysctl(chip, cores, gigabytes << 30, version),
        "system_profiler": displays(chip, gpu_cores),
        "pmset -g batt": BATTERY,
        "pmset -g": LOW_POWER,
        "pmset -g therm": HOT,
    }

    def answer(*command: str) -> str:
        return texts.get(" ".join(command)) or texts[command[0]]

    monkeypatch.setattr(machine, "_output", answer)
    monkeypatch.setattr(machine, "_on_mac", lambda: True)
    found = machine.describe()
    assert (found.chip, found.cores, found.gpu_cores) == (chip, cores, gpu_cores)
    assert found.memory_bytes == gigabytes << 30
    assert found.os == f"macOS {version}"
    assert found.nominal_bandwidth == nominal * 1e9
    assert (found.power_source, found.low_power_mode) == ("battery", "on")
    assert found.thermal_pressure == "limited to 62 %"
    assert found.blas == "Accelerate"


def test_a_mac_whose_tools_are_silent_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    monkeypatch.setattr(machine, "_on_mac", lambda: True)
    found = machine.describe()
    assert (found.chip, found.os, found.power_source) == (UNKNOWN, UNKNOWN, UNKNOWN)
    assert (found.low_power_mode, found.thermal_pressure) == (UNKNOWN, UNKNOWN)
    assert found.cores is found.gpu_cores is found.memory_bytes is found.nominal_bandwidth is None


@pytest.mark.parametrize(
    ("chip", "gpu_cores"),
    [("Apple M3 Max", None), ("Apple M3 Max", 38), ("Apple M5 Max", 32), ("Apple M9", 10)],
)
def test_no_bandwidth_is_guessed(chip: str, gpu_cores: int | None) -> None:
    assert machine.nominal_bandwidth(chip, gpu_cores) is None


def test_displays_as_text() -> None:
    assert machine.parse_gpu_cores(DISPLAYS_TEXT) == 10
    assert machine.parse_gpu_cores("Graphics/Displays:\n") is None


BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=24313955)\t27%; discharging; 3:32 remaining present: true
"""
PLUGGED = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=24313955)\t85%; charging; 1:05 remaining present: true
"""
DESKTOP = "Now drawing from 'AC Power'\nNo batteries available.\n"


@pytest.mark.parametrize(
    ("text", "source"),
    [(BATTERY, "battery"), (PLUGGED, "AC power"), (DESKTOP, "AC power"), ("", UNKNOWN)],
)
def test_power_source(text: str, source: str) -> None:
    assert machine.parse_power_source(text) == source


SETTINGS = """System-wide power settings:
 SleepDisabled\t\t0
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 sleep                1 (sleep prevented by powerd)
 lowpowermode         0
 womp                 0
"""
LOW_POWER = SETTINGS.replace("lowpowermode         0", "lowpowermode         1")


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (SETTINGS, "off"),
        (LOW_POWER, "on"),
        (SETTINGS.replace("lowpowermode         0", "powermode            2"), "off"),
        (SETTINGS.replace("lowpowermode         0", "powermode            1"), "on"),
        (SETTINGS.replace(" lowpowermode         0\n", ""), UNKNOWN),
    ],
)
def test_low_power_mode(text: str, mode: str) -> None:
    assert machine.parse_low_power_mode(text) == mode


COOL = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
HOT = """2026-08-20 05:08:37 -0700 CPU Power notify
\tCPU_Scheduler_Limit \t= 80
\tCPU_Available_CPUs \t= 12
\tCPU_Speed_Limit \t= 62
"""


@pytest.mark.parametrize(
    ("text", "pressure"),
    [
        (COOL, "none"),
        (COOL + HOT, "limited to 62 %"),
        (HOT.replace("80", "100").replace("62", "100"), "none"),
        ("Thermal Warning Level = 1\n", "warning"),
        ("Usage: pmset <options>\n", UNKNOWN),
    ],
)
def test_thermal_pressure(text: str, pressure: str) -> None:
    assert machine.parse_thermal_pressure(text) == pressure


CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7763 64-Core Processor
cpu MHz\t\t: 2445.426

processor\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
"""
CPUINFO_ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n"
MEMINFO = "MemTotal:       24689764 kB\nMemFree:        23012345 kB\n"


def test_linux() -> None:
    assert machine.parse_cpuinfo(CPUINFO) == "AMD EPYC 7763 64-Core Processor"
    assert machine.parse_cpuinfo(CPUINFO_ARM) == UNKNOWN
    assert machine.parse_meminfo(MEMINFO) == 24689764 * 1024
    assert machine.parse_meminfo("") is None


def test_this_machine() -> None:
    found = machine.describe()
    assert isinstance(found, Machine)
    assert found.cores
    assert found.memory_bytes
    assert found.versions["python"] == platform.python_version()
    assert {"mlx", "mlx-openelm"} <= found.versions.keys()
    assert found.mlx_device.startswith(("cpu", "gpu ("))


def test_a_tool_that_is_not_there_says_nothing() -> None:
    assert machine._output("no-such-tool-anywhere", "-g") == ""
