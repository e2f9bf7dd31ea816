"""What an installation puts where."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "mlx_openelm/backends/cpu/src").iterdir()
    }
    assert {"setup.py", "scripts/supported.py", *sources} <= set(listed.read_text().split())


def test_the_map_has_every_file_and_no_other() -> None:
    """Of docs/architecture.md: it names a file, or one of the folders that hold it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+(?:\.py|/))`", text))
    tops = [ROOT / name for name in ("mlx_openelm", "convert", "benchmarks")]
    files = {
        file.relative_to(top)
        for top in tops
        for file in top.glob("**/*.py")
        if file.resolve() == file and file.name not in ("__init__.py", "__main__.py")
    }
    unnamed = {
        str(file)
        for file in files
        if str(file) not in named and named.isdisjoint(f"{folder}/" for folder in file.parents)
    }
    assert not unnamed
    folders = {file.parent for top in tops for file in top.glob("**/*.py")}
    places = [ROOT, *tops, *folders]
    planned = {"backends/metal/", "server/"}
    assert {n for n in named if not any((place / n).exists() for place in places)} == planned
