"""The C library for CPUs compiles for macOS on ARM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_openelm.backends.cpu import library

SOURCES = Path(library.__file__).parent / "src"
FLAGS = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-fPIC", "-shared", f"-I{SOURCES}"]


def test_it_compiles_for_a_mac(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    built = tmp_path / "libopenelm.dylib"
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0"]
    done = subprocess.run(
        [*command, *FLAGS, *map(str, SOURCES.glob("*.cpp")), "-o", str(built)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert built.read_bytes()[:4] == b"\xcf\xfa\xed\xfe"  # a 64-bit Mach-O file
