"""Whether mlx-openelm can be installed into this Python on this machine.

    python3 scripts/supported.py

Exits 0 if so; else prints the reason and what to do, in one line, and exits 1. The Makefile chooses
a Python with it, and setup.py refuses to build. It runs in any Python from 2.7 on.
"""

import platform
import subprocess
import sys

OLDEST_PYTHON = (3, 10)
OLDEST_MACOS = 14  # of MLX's wheels


def unsupported():
    """The reason why not; None if there is none."""
    if sys.version_info < OLDEST_PYTHON:
        return "Python %d.%d or newer is needed, and %s is %s: install one from python.org" % (
            OLDEST_PYTHON[0],
            OLDEST_PYTHON[1],
            sys.executable,
            platform.python_version(),
        )
    if sys.platform != "darwin":
        return None
    if platform.machine() != "arm64":
        if _translated():
            return (
                "%s is for Intel and runs in Rosetta: install a Python for arm64" % sys.executable
            )
        return "a Mac with Apple silicon is needed: MLX doesn't run on an Intel Mac"
    macos = platform.mac_ver()[0]
    if int(macos.split(".")[0] or OLDEST_MACOS) < OLDEST_MACOS:
        return "macOS %d or newer is needed, and this is %s" % (OLDEST_MACOS, macos)
    return None


def _translated():
    """Whether this process, for Intel, is run by Rosetta on Apple silicon."""
    try:
        answer = subprocess.check_output(
            ["sysctl", "-n", "sysctl.proc_translated"], stderr=subprocess.STDOUT
        )
    except (OSError, subprocess.CalledProcessError):  # an Intel Mac doesn't know the name
        return False
    return answer.strip() == b"1"


if __name__ == "__main__":
    reason = unsupported()
    if reason:
        sys.exit("mlx-openelm: " + reason)
