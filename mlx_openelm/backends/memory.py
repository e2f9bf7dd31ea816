"""How much memory this process can still use: the machine's, a container's, its own limits."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be used without swapping, and within every limit; at least 0.

    The least of what the machine has available, what each control group on the way to this
    process's leaves (version 1 and 2), and what RLIMIT_AS and RLIMIT_DATA leave.

    Args:
        root: where `proc` and `sys` are.
    """
    left = [_of_machine(root), *_of_cgroups(root), *_of_rlimits(root)]
    return max(min(left), 0)


def _of_machine(root: Path) -> int:
    """What the system calls available; half of the memory where it doesn't say."""
    available = _fields(root / "proc/meminfo").get("MemAvailable")
    if available is not None:
        return available
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


# version -> (where it is mounted, files of the limits, file of what is used, what the page cache
# holds of that and gives back, by its name in memory.stat). cgroups(7), and the kernel's
# admin-guide/cgroup-v1/memory and cgroup-v2.
_CGROUPS = {
    2: ("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: (
        "sys/fs/cgroup/memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def _of_cgroups(root: Path) -> Iterator[int]:
    """What each group from this process's up to the root leaves."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        mount, limits, usage, cached = _CGROUPS[version]
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        # In a container the path may be the host's, and the container's own group the mount.
        for depth in range(len(parts) + 1):
            group = (root / mount).joinpath(*parts[:depth])
            known = [limit for name in limits if (limit := _number(group / name)) is not None]
            if known:
                used = _number(group / usage) or 0
                yield min(known) - used + _statistics(group / "memory.stat").get(cached, 0)


def _of_rlimits(root: Path) -> Iterator[int]:
    """What this process's own limits leave."""
    status = _fields(root / "proc/self/status")
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - status.get(used, 0)


def _fields(file: Path) -> dict[str, int]:
    """Bytes by name, of lines such as `MemAvailable:   123 kB`."""
    words = (line.replace(":", " ").split() for line in _lines(file))
    return {w[0]: 1024 * int(w[1]) for w in words if len(w) == 3 and w[2] == "kB"}


def _statistics(file: Path) -> dict[str, int]:
    words = (line.split() for line in _lines(file))
    return {w[0]: int(w[1]) for w in words if len(w) == 2 and w[1].isdecimal()}


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or it says `max`."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
