"""The memory that is left, by made-up /proc and /sys."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_openelm.backends.memory import available_memory

MB = 1 << 20


def system(root: Path, files: dict[str, object]) -> Path:
    for name, content in {"proc/meminfo": "MemAvailable: 1024000 kB", **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
CASES = {
    "no groups": ({}, 1000),
    "version 2": (
        {f"{V2}/memory.max": 300 * MB, f"{V2}/memory.current": 100 * MB},
        200,
    ),
    "no limit": ({f"{V2}/memory.max": "max", f"{V2}/memory.current": 100 * MB}, 1000),
    "the page cache is given back": (
        {
            f"{V2}/memory.max": 300 * MB,
            f"{V2}/memory.current": 290 * MB,
            f"{V2}/memory.stat": f"anon 1\ninactive_file {250 * MB}",
        },
        260,
    ),
    "nested: the least counts": (
        {
            "proc/self/cgroup": "0::/a.slice/b.scope",
            f"{V2}/a.slice/memory.max": 400 * MB,
            f"{V2}/a.slice/memory.current": 350 * MB,
            f"{V2}/a.slice/b.scope/memory.max": 300 * MB,
            f"{V2}/a.slice/b.scope/memory.current": 10 * MB,
        },
        50,
    ),
    "memory.high throttles": (
        {f"{V2}/memory.max": "max", f"{V2}/memory.high": 80 * MB, f"{V2}/memory.current": MB},
        79,
    ),
    "used up": ({f"{V2}/memory.max": 10 * MB, f"{V2}/memory.current": 20 * MB}, 0),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/",
            f"{V1}/docker/1/memory.limit_in_bytes": 500 * MB,
            f"{V1}/docker/1/memory.usage_in_bytes": 100 * MB,
        },
        400,
    ),
    "version 1, in a container that sees its group as the root": (
        {
            "proc/self/cgroup": "4:memory:/docker/1",
            f"{V1}/memory.limit_in_bytes": 500 * MB,
            f"{V1}/memory.usage_in_bytes": 450 * MB,
            f"{V1}/memory.stat": f"total_inactive_file {30 * MB}",
        },
        80,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "4:memory:/",
            f"{V1}/memory.limit_in_bytes": 9223372036854771712,
            f"{V1}/memory.usage_in_bytes": 100 * MB,
        },
        1000,
    ),
    "a path out of the groups, and nonsense": (
        {"proc/self/cgroup": "0::/../../etc\nx\n\n::::", f"{V2}/memory.max": "?"},
        1000,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_least_of_what_is_left(name: str, tmp_path: Path) -> None:
    files, left = CASES[name]
    root = system(tmp_path, {"proc/self/cgroup": "0::/", **files})
    assert available_memory(root) == left * MB


@pytest.mark.parametrize(
    ("limit", "used"), [(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")]
)
def test_the_process_may_have_limits(limit: int, used: str, tmp_path: Path) -> None:
    root = system(tmp_path, {"proc/self/status": f"{used}:\t  102400 kB"})
    code = (
        f"import resource, sys; from pathlib import Path; from mlx_openelm.backends import memory\n"
        f"resource.setrlimit({limit}, ({8 << 30}, {8 << 30}))\n"
        f"print(memory.available_memory(Path({str(root)!r})))"
    )
    (root / "proc/meminfo").write_text("MemAvailable: 99999999 kB\n")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == str((8 << 30) - 100 * MB), found.stderr


def test_this_machine_has_some() -> None:
    assert available_memory() > 0
