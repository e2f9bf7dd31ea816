"""What has to be right before MLX is imported: Ctrl-C, the Python version, an MLX that loads.

Importing this package loads MLX, which takes most of a command's first 0.15 s. So a command's
`main` is too late to handle what goes wrong until then. This module imports as little as it can:
before `guard_imports` Ctrl-C still ends in a traceback.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

BAD_INPUT = 2  # the exit status
PYTHON, MLX = (3, 10), (0, 32)  # the oldest versions that work
SUPPORTED = (
    "mlx-openelm runs on Macs with Apple silicon and macOS 14 or later (with an arm64 Python "
    "3.10 to 3.14), and on Linux (x86-64, aarch64)"
)
INSTALL = {
    "Darwin": "pip install 'mlx>=0.32'",
    "Linux": "pip install 'mlx[cpu]>=0.32' (or with an NVIDIA GPU mlx[cuda12] or mlx[cuda13])",
}


def is_command() -> bool:
    """Whether this process is one of the package's commands, not a program that imports it."""
    if sys.argv[:1] == ["-m"]:  # while `python -m` looks for the module
        if not hasattr(sys, "orig_argv"):  # before Python 3.10
            return True
        module = sys.orig_argv[-len(sys.argv)]  # the module's name, perhaps after "-m"
        return module.partition(".")[0].endswith("mlx_openelm")
    return bool(sys.argv) and os.path.basename(sys.argv[0]).startswith("openelm-")


def check_python() -> None:
    """Refuse a Python that is too old; an old pip installs the package there all the same.

    Raises:
        ImportError: as `import_mlx`.
    """
    if sys.version_info < PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        _refuse(f"mlx-openelm needs Python 3.10 or later; this is Python {version}", None)


def guard_imports() -> None:
    """In a command: let Ctrl-C end the imports with exit status 130 and without a traceback."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def import_mlx() -> None:
    """Import MLX.

    Raises:
        ImportError: when it isn't there, is too old, or can't be loaded; says what to do. A
            command ends instead, with that line and exit status 2.
    """
    try:
        import mlx.core as mx
    except ImportError as error:
        _refuse(_why_not(error), error)
    version: str = mx.__version__  # type: ignore[attr-defined]  # MLX's stubs lack it
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < MLX:
        install = INSTALL["Darwin" if sys.platform == "darwin" else "Linux"]
        _refuse(f"mlx-openelm needs MLX 0.32 or later; this is MLX {version}: {install}", None)


def _refuse(reason: str, cause: ImportError | None) -> NoReturn:
    if is_command():
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    raise ImportError(reason) from cause


def _why_not(error: ImportError) -> str:
    import platform

    system, machine = platform.system(), platform.machine()
    if system not in INSTALL:
        return f"{SUPPORTED}; this is {system or 'an unknown system'}"
    if system == "Darwin" and machine != "arm64":
        if _is_translated():
            return f"{SUPPORTED}; this Python is an Intel one under Rosetta: install an arm64 one"
        return f"{SUPPORTED}; this Mac has an Intel processor"
    macos = platform.mac_ver()[0]
    if system == "Darwin" and int(macos.partition(".")[0] or 14) < 14:
        return f"{SUPPORTED}; this is macOS {macos}"
    # The package of Python files is there without a backend, too: then libmlx is missing.
    missing = isinstance(error, ModuleNotFoundError) or "libmlx" in str(error)
    if missing:
        return f"mlx-openelm needs MLX with a backend: {INSTALL[system]} ({error})"
    return f"MLX can't be loaded ({error}); install it again: {INSTALL[system]}; {SUPPORTED}"


def _is_translated() -> bool:
    """Whether an arm64 Mac runs this process as an Intel one."""
    import subprocess

    asked = ("sysctl", "-n", "sysctl.proc_translated")
    try:
        return subprocess.run(asked, capture_output=True, timeout=5).stdout.strip() == b"1"
    except (OSError, subprocess.TimeoutExpired):
        return False


def end(number: int, frame: FrameType | None) -> None:
    """A signal's handler: end at once, with the exit status that shells give a signal."""
    os._exit(128 + number)
