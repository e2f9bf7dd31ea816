"""What is needed to install on a Mac, and who is told what is missing."""

from __future__ import annotations

import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
EXTRAS = ["gguf", "bench", "peers", "test", "dev"]
OLDEST_MACOS = "14.0"


def test_ci_runs_every_python_that_is_named() -> None:
    assert PYTHONS == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    [matrix] = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r'"(3\.\d+)"', matrix) == PYTHONS
    named = (ROOT / "Makefile").read_text().partition("PYTHONS := ")[2].splitlines()[0]
    assert sorted(named.split()) == sorted(["python3", *(f"python{v}" for v in PYTHONS)])


@pytest.fixture(scope="module")
def resolving() -> dict[str, subprocess.Popen[str]]:
    """uv at work, for each Python: which versions go together, with wheels, on a Mac."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate"]
    command += ["--only-binary", ":all:", "--python-platform", "aarch64-apple-darwin"]
    command += [word for extra in EXTRAS for word in ("--extra", extra)]
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": OLDEST_MACOS}
    # The system's certificates, as pip takes them: an older and a newer name of uv's for that
    environment |= {"UV_NATIVE_TLS": "1", "UV_SYSTEM_CERTS": "1"}
    return {
        python: subprocess.Popen(
            [*command, "--python-version", python, "pyproject.toml"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for python in PYTHONS
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_all_extras_have_wheels_for_macs(
    resolving: dict[str, subprocess.Popen[str]], python: str
) -> None:
    printed, error = resolving[python].communicate(timeout=300)
    assert resolving[python].returncode == 0, error
    names = {line.partition("==")[0] for line in printed.splitlines()}
    wanted = {"mlx", "mlx-metal", "numpy", "sentencepiece", "tokenizers", "xllamacpp", "gguf"}
    wanted |= {"torch", "matplotlib", "pytest", "ruff", "mypy"}
    if python != "3.10":  # of which the last mlx-lm is older; its tests are skipped there
        wanted.add("mlx-lm")
    assert wanted <= names


UNSUPPORTED = {
    "Python 3.9": {"version": (3, 9, 6), "says": "Python 3.10 or newer is needed"},
    "Intel": {"machine": "x86_64", "says": "a Mac with Apple silicon is needed"},
    "Rosetta": {"machine": "x86_64", "translated": b"1\n", "says": "install a Python for arm64"},
    "macOS 13": {"macos": "13.6.1", "says": "macOS 14 or newer is needed, and this is 13.6.1"},
}


def reason(monkeypatch: pytest.MonkeyPatch, mac: dict[str, object]) -> str | None:
    """What scripts/supported.py says of a Mac."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "version_info", mac.get("version", (3, 14, 0)))
    monkeypatch.setattr(platform, "machine", lambda: mac.get("machine", "arm64"))
    monkeypatch.setattr(platform, "mac_ver", lambda: (mac.get("macos", "15.1"), ("", "", ""), ""))
    answer = mac.get("translated", b"0\n")
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: answer)
    found: str | None = runpy.run_path(str(ROOT / "scripts" / "supported.py"))["unsupported"]()
    return found


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mac = UNSUPPORTED[name]
    said = reason(monkeypatch, mac)
    assert said is not None
    assert str(mac["says"]) in said
    assert "\n" not in said


@pytest.mark.parametrize("macos", ["14.0", "15.7.2", "26.1", ""])
def test_a_mac_that_is_supported(monkeypatch: pytest.MonkeyPatch, macos: str) -> None:
    assert reason(monkeypatch, {"macos": macos}) is None


MAC = """
import platform, runpy, sys
sys.modules["mlx"] = sys.modules["nanobind"] = None
import setuptools, setuptools.command.bdist_wheel
sys.platform, machine, macos = "darwin", "{machine}", "15.0"
platform.machine = lambda: machine
platform.mac_ver = lambda: (macos, ("", "", ""), "")
sys.argv = ["setup.py", *{arguments!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(*arguments: str, machine: str = "arm64") -> subprocess.CompletedProcess[str]:
    code = MAC.format(machine=machine, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_wheel_for_macs_is_pure_and_needs_no_compiler(tmp_path: Path) -> None:
    base = ["egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "b")]
    wheel = ["bdist_wheel", "--bdist-dir", str(tmp_path / "w"), "-d", str(tmp_path / "dist")]
    result = setup("-q", *base, *wheel)
    assert result.returncode == 0, result.stderr
    [file] = (tmp_path / "dist").iterdir()
    assert file.name.endswith("-py3-none-any.whl")
    names = ZipFile(file).namelist()
    assert "mlx_openelm/model/network.py" in names
    assert not [name for name in names if name.endswith((".so", ".c", ".cpp", ".h"))]


def test_an_intel_mac_is_told_while_installing() -> None:
    result = setup("--version", machine="x86_64")
    assert result.returncode == 1
    assert "mlx-openelm: a Mac with Apple silicon is needed" in result.stderr
    assert len(result.stderr.splitlines()) == 1
