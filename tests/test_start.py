"""What happens before a command's `main` can run: no MLX, the wrong one, an old Python, Ctrl-C."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_openelm import start

COMMANDS = ("mlx_openelm", "mlx_openelm.generate", "mlx_openelm.convert", "mlx_openelm.benchmarks")
NO_BACKEND = "libmlx.so: cannot open shared object file: No such file or directory"


def with_mlx(folder: Path, source: str) -> dict[str, str]:
    """The environment in which `mlx.core` is this."""
    package = folder / "mlx"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "core.py").write_text(source)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise ModuleNotFoundError('No module named mlx')", "needs MLX with a backend: pip"),
        (f"raise ImportError({NO_BACKEND!r})", "needs MLX with a backend: pip"),
        ("raise ImportError('mlx.so: undefined symbol: _Znwm')", "MLX can't be loaded (mlx.so:"),
        ("__version__ = '0.31.2'", "needs MLX 0.32 or later; this is MLX 0.31.2: pip install"),
        ("__version__ = '0.9.0.dev2+gabc'", "needs MLX 0.32 or later"),
    ],
)
def test_an_mlx_that_cannot_be_used_is_one_line(tmp_path: Path, source: str, says: str) -> None:
    environment = with_mlx(tmp_path, source)
    for module in COMMANDS:
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert says in done.stderr
        assert "mlx-openelm[" not in done.stderr  # it is on no index
    command = [sys.executable, "-c", "import mlx_openelm"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("system", "machine", "macos", "translated", "says"),
    [
        ("Darwin", "x86_64", "14.5", False, "this Mac has an Intel processor"),
        ("Darwin", "x86_64", "15.1", True, "under Rosetta: install an arm64 one"),
        ("Darwin", "arm64", "13.6", False, "this is macOS 13.6"),
        ("Windows", "AMD64", "", False, "this is Windows"),
    ],
)
def test_a_machine_that_cannot_run_mlx_is_named(
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    machine: str,
    macos: str,
    translated: bool,
    says: str,
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    monkeypatch.setattr(start, "_is_translated", lambda: translated)
    message = start._why_not(ModuleNotFoundError("No module named 'mlx'"))
    assert says in message
    assert "Macs with Apple silicon and macOS 14 or later" in message


@pytest.mark.parametrize("macos", ["14.0", "26.1"])
def test_on_a_mac_that_can_it_says_how_to_install(
    monkeypatch: pytest.MonkeyPatch, macos: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    message = start._why_not(ModuleNotFoundError("No module named 'mlx'"))
    assert "needs MLX with a backend: pip install 'mlx>=0.32'" in message


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start.check_python()
    monkeypatch.setattr(sys, "version_info", (3, 9, 6, "final", 0))
    with pytest.raises(ImportError, match=r"needs Python 3\.10 or later; this is Python 3\.9\.6"):
        start.check_python()


@pytest.mark.parametrize("command", [("-m", "mlx_openelm.generate"), ("openelm-convert",)])
def test_ctrl_c_during_the_imports_is_quiet(tmp_path: Path, command: tuple[str, ...]) -> None:
    environment = with_mlx(tmp_path, "import time; print('here', flush=True); time.sleep(60)")
    if command[0] == "-m":
        arguments = list(command)
    else:  # as an installed script is
        script = tmp_path / command[0]
        script.write_text("import sys\nfrom mlx_openelm.convert.__main__ import main\nmain()\n")
        arguments = [str(script)]
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


def test_a_program_that_imports_the_package_keeps_its_ctrl_c() -> None:
    code = "import signal, mlx_openelm; print(signal.getsignal(2) is signal.default_int_handler)"
    command = [
        sys.executable,
        "-c",
        f"import signal; signal.signal(2, signal.default_int_handler); {code}",
    ]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"
