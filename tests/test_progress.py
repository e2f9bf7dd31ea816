"""How far a conversion is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_openelm.convert.commands.progress import progress, watched
from mlx_openelm.convert.sources import LazyTensor

from .conftest import Run

MODULE = "mlx_openelm.convert"


def test_a_terminal_sees_a_bar_with_bytes_and_tensors(tmp_path: Path) -> None:
    """The demo has 7.5 MB; the last tensor is the last norm."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", MODULE, "demo", "-o", str(tmp_path / "out")]
    terminal = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=terminal) as done:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
    os.close(ours)
    assert done.returncode == 0
    assert "7.5/7.5 MB" in shown.decode()
    assert "norm" in shown.decode()
    assert "━━━" in shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux, when nobody has the other end open
        return b""


def test_elsewhere_there_are_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(200_000_000) as report:
        for i in range(100):
            report(f"transformer.layers.{i}.attn_norm.weight", 2_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == " 10 % of 200 MB (layers.9.attn_norm)"
    assert lines[-1] == "100 % of 200 MB (layers.99.attn_norm)"


def test_a_tensor_s_name_is_no_markup_and_moves_no_cursor(tmp_path: Path) -> None:
    code = (
        "from mlx_openelm.convert.commands.progress import _bar\n"
        "with _bar(100) as report:\n"
        "    report('[/red]\\x1b[2J[bold]', 50)\n"
    )
    ours, theirs = pty.openpty()
    terminal = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=terminal) as done:
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
    os.close(ours)
    assert done.returncode == 0
    assert b"[/red]\\x1b[2J[bold]" in seen
    assert b"\x1b[2J" not in seen


def test_a_narrow_terminal_sees_whole_figures() -> None:
    code = (
        "from mlx_openelm.convert.commands.progress import _bar\n"
        "with _bar(123_456_789_000) as report:\n"
        "    report('transformer.layers.12.attn.qkv_proj.weight', 60_000_000_000)\n"
    )
    ours, theirs = pty.openpty()
    terminal = {**os.environ, "TERM": "xterm", "COLUMNS": "40", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=terminal) as done:
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
    os.close(ours)
    assert done.returncode == 0
    assert "60.0/123.5 GB" in seen.decode()
    assert "…" not in seen.decode()


def test_what_takes_no_time_has_no_lines(run: Run, tmp_path: Path) -> None:
    result = run(MODULE, "demo", "-o", tmp_path / "out")
    assert "%" not in result.stderr
    assert "\x1b" not in result.stderr


def test_every_row_that_is_read_counts() -> None:
    tensor = LazyTensor("theirs", (4, 2), "float32", lambda a, b: mx.zeros((b - a, 2)))
    seen: list[tuple[str, int]] = []
    tensors = watched({"ours": tensor}, lambda name, nbytes: seen.append((name, nbytes)))
    for _ in tensors["ours"].blocks(16):
        pass
    assert seen == [("ours", 16), ("ours", 16)]
