"""The Makefile as macOS runs it: GNU make 3.81, BSD's commands, Apple's Python.

A stand-in `uname` says Darwin. Commands that only macOS has are stand-ins too, and write down how
they were called.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MAKEFILE = ROOT / "Makefile"
SCRIPTS = [MAKEFILE, ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
TARGETS = {"demo": "", "test": "[test]", "check": "[dev]", "check-mac": "[dev]"}
TARGETS |= {"bench": "[bench,peers]", "format": "[dev]"}

# What GNU make 3.81 doesn't know, and the version that brought it
NEWER_THAN_3_81 = {
    r"^\s*(override\s+)?undefine\s": "3.82",
    r"^\s*private\s": "3.82",
    r"^\s*define\s+\S+\s*[:?+!]?=": "3.82",
    r"^\.(ONESHELL|SHELLFLAGS|RECIPEPREFIX)\b": "3.82",
    r"^[^\t#]*\S\s*!=\s": "4.0",
    r"^[^\t#]*::=": "4.0",
    r"\$[({]file\s": "4.0",
    r"\$[({]guile\s": "4.0",
    r"^\s*-?load\s": "4.0",
    r"--output-sync|\$\(MAKE\)\s+-O": "4.0",
    r"^\.EXTRA_PREREQS\b": "4.3",
    r"^[^\t#]*&:": "4.3",
    r"\$[({](let|intcmp)\s": "4.4",
    r"\.(WAIT|NOTINTERMEDIATE)\b": "4.4",
}

# What the commands of macOS refuse or understand differently
GNU_ONLY = {
    r"\bsed\s+(-\S+\s+)*(-i\s+['\"s/-]|-r\b|--)": "sed -i needs a suffix, and -r is -E",
    r"\bfind\s.*-(printf|regextype|readable|executable|quit|delete-empty)\b": "find",
    r"\bfind\s+-": "find needs a folder",
    r"\btouch\s+(-\S+\s+)*(-d\s+['\"]?@|--)": "touch",
    r"\bcp\s+(-\S+\s+)*(-\w*[tuT]|--)": "cp -t, -u, -T",
    r"\bmv\s+(-\S+\s+)*(-\w*[tuT]|--)": "mv -t, -u, -T",
    r"\bln\s+(-\S+\s+)*(-\w*[rtT]|--)": "ln -r, -t, -T",
    r"\bmktemp\s+.*(-p\b|--)": "mktemp -p",
    r"\bdate\s+.*(-d\b|-I|--|\+\S*%N)": "date -d, -I, %N",
    r"\breadlink\s+-[em]": "readlink -e, -m",
    r"\bxargs\s+.*(-r\b|-d\b|--)": "xargs -r, -d",
    r"\bgrep\s+.*(-\w*P|--perl)": "grep -P",
    r"\bstat\s+.*(-c\b|--)": "stat -c",
    r"\b(sort|head|wc|ls|du|rm|mkdir|tail|base64)\s+(\S+\s+)*--": "long options",
    r"\b(realpath|timeout|nproc|sha256sum|md5sum|tac|seq\s+-w|shuf|getent|ldd|setsid)\s": "absent",
    r"\bhead\s+(-\S+\s+)*-n\s*-": "head -n -N",
    r"\becho\s+-[en]": "echo -e, -n in sh",
    r"\b(mapfile|readarray|coproc)\b|declare\s+-A|\|&|&>>|\$\{\w+(\^|,,)": "bash 4, macOS has 3.2",
}


def found(table: dict[str, str], text: str) -> list[str]:
    """What of a table is in a text, comments aside."""
    return [
        f"{line.strip()} ({why})"
        for line in re.sub(r"\\\n", " ", text).splitlines()
        if not line.lstrip().startswith("#")
        for pattern, why in table.items()
        if re.search(pattern, line)
    ]


def test_the_makefile_is_one_of_make_3_81() -> None:
    assert found(NEWER_THAN_3_81, MAKEFILE.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "undefine X",
        "define X =",
        ".ONESHELL:",
        "NOW != date",
        "X ::= 1",
        "a b &: c",
        "X := $(file < y)",
        "X := $(let a,b,c)",
        "a: .WAIT b",
    ],
)
def test_newer_syntax_is_found(line: str) -> None:
    assert found(NEWER_THAN_3_81, line)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_command_needs_gnu(script: Path) -> None:
    assert found(GNU_ONLY, script.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "sed -i 's/a/b/' x",
        "sed -r x",
        "find . -printf %p",
        "find -name x",
        "touch -d @0 x",
        "cp -t a b",
        "cp --parents a b",
        "mktemp -p x",
        "date -d tomorrow",
        "date +%s%N",
        "readlink -e x",
        "ls | xargs -r rm",
        "grep -oP x",
        "stat -c %s x",
        "sort --version-sort",
        "x=$(realpath y)",
        "head -n -1",
        "mapfile -t x",
        "echo ${x^^}",
    ],
)
def test_gnu_only_is_found(line: str) -> None:
    assert found(GNU_ONLY, line)


@pytest.fixture
def mac(tmp_path: Path) -> dict[str, str]:
    """The environment of a Mac: `uname` says so, `chflags` writes down its arguments."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_in(commands / "uname", "echo Darwin")
    stand_in(commands / "chflags", f'echo "$@" >> "{tmp_path}/chflags"')
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS", "BACKEND")}
    return {**clean, "PATH": f"{commands}:{os.environ['PATH']}"}


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(environment: dict[str, str], *arguments: str, cwd: Path = ROOT) -> str:
    """What `make` printed."""
    result = subprocess.run(
        ["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_installed_on_a_mac(mac: dict[str, str], tmp_path: Path, target: str) -> None:
    printed = make(mac, "-n", target, f"VENV={tmp_path}/venv")
    assert f"--editable '.{TARGETS[target]}'\n" in printed
    assert f"chflags -R nohidden {tmp_path}/venv" in printed


def test_another_backend_is_for_linux(tmp_path: Path) -> None:
    linux = {**os.environ}
    assert "--editable '.[cpu,dev]'" in make(linux, "-n", "check", f"VENV={tmp_path}/venv")
    chosen = make(linux, "-n", "demo", "BACKEND=cuda12", f"VENV={tmp_path}/venv")
    assert "--editable '.[cuda12]'" in chosen
    assert "chflags" not in chosen


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files under version control, in a folder with a space in its name."""
    target = tmp_path_factory.mktemp("a copy")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.is_file():
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


def test_pip_takes_what_is_asked_for_on_a_mac(
    mac: dict[str, str], tmp_path: Path, copy: Path
) -> None:
    """From nothing to an installed package: a virtual environment, pip, the stamp."""
    without = {"PIP_NO_DEPS": "1", "CC": "false", "CXX": "false"}  # what only MLX or Linux has
    arguments = (".venv/installed-", f"PYTHON={sys.executable}")
    make({**mac, **without}, *arguments, cwd=copy)
    assert (tmp_path / "chflags").read_text() == "-R nohidden .venv\n"
    assert "is up to date" in make(mac, *arguments, cwd=copy)
    installed = subprocess.run(
        [copy / ".venv/bin/python", "-m", "pip", "show", "mlx-openelm"],
        env=mac,
        capture_output=True,
        text=True,
    )
    assert f"Editable project location: {copy}" in installed.stdout
    assert (copy / ".venv/bin/openelm-generate").exists()


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_the_package_is_found_without_a_pth_file(
    mac: dict[str, str], tmp_path: Path, target: str
) -> None:
    """macOS may hide files of a virtual environment, and Python skips a hidden .pth file."""
    printed = make(mac, "-n", target, f"VENV={tmp_path}/venv").splitlines()
    [command] = [line for line in printed if "python -m" in line and "pip" not in line]
    prefix = command.partition(f" {tmp_path}/venv/bin/python")[0]
    found = subprocess.run(
        ["sh", "-c", f'{prefix} "{sys.executable}" -S -c "{WHERE}"'],
        cwd=tmp_path,
        env=mac,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(ROOT / "mlx_openelm"), found.stderr


WHERE = (
    "from importlib.util import find_spec as f; print(*f('mlx_openelm').submodule_search_locations)"
)


def test_apples_python_is_passed_over(mac: dict[str, str], tmp_path: Path) -> None:
    """Its 3.9 is named python3; what else is there may be newer than all that were known once."""
    commands = tmp_path / "bin"
    for version in range(10, 15):
        stand_in(commands / f"python3.{version}", "exit 1")
    stand_in(commands / "python3", "echo 'mlx-openelm: too old' >&2; exit 1")
    venv = f"{tmp_path}/venv"
    refused = subprocess.run(
        ["make", "demo", f"VENV={venv}"], cwd=ROOT, env=mac, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "mlx-openelm: too old\nOr name another: make PYTHON=" in refused.stderr
    stand_in(commands / "python3.14", f'exec "{sys.executable}" "$@"')
    assert f"python3.14 -m venv {venv}\n" in make(mac, "-n", "demo", f"VENV={venv}")


def test_clean_leaves_nothing_that_was_built(mac: dict[str, str], copy: Path) -> None:
    shutil.rmtree(copy / ".venv", ignore_errors=True)
    built = [copy / "mlx_openelm" / "backends" / "cpu" / "libopenelm.so", copy / "build" / "x"]
    for path in built:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    make(mac, "clean", cwd=copy)
    assert not any(path.exists() for path in built)
    assert (copy / "mlx_openelm" / "py.typed").exists()
