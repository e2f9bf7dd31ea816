"""What an installation puts where."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("mlx-openelm")
    except metadata.PackageNotFoundError:
        pytest.skip("mlx-openelm is not installed here")


def test_nothing_lands_beside_the_package(installed: metadata.Distribution) -> None:
    assert (installed.read_text("top_level.txt") or "").split() == ["mlx_openelm"]


def test_commands_exist(installed: metadata.Distribution) -> None:
    scripts = {e.name: e for e in installed.entry_points if e.group == "console_scripts"}
    assert set(scripts) == {"openelm-generate", "openelm-convert"}
    assert all(callable(script.load()) for script in scripts.values())


@pytest.mark.parametrize("name", ["convert", "benchmarks"])
def test_top_folders_are_in_the_package(name: str) -> None:
    assert (ROOT / "mlx_openelm" / name).resolve() == ROOT / name


def test_the_kernel_is_in_a_source_distribution(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools and (ROOT / "setup.py").exists()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [listed] = tmp_path.glob("*/SOURCES.txt")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mlx_openelm" / "cpu").iterdir()}
    assert {"setup.py", "scripts/supported.py", *sources} <= set(listed.read_text().split())
