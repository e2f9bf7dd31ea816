"""Standard input, output and error: encodings, closed and full ones, readers that leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_openelm.streams import MAX_LINE, printable

from .conftest import Run

GENERATE = "mlx_openelm.generate"
TEXT = "Once upon a time\nthere was"
# A command that says what the demo would hardly: letters that few encodings have
SAYS = """
import sys
from mlx_openelm.command import run
from mlx_openelm.streams import print_json
def command(words):
    print_json(words) if "--json" in words else print(*words)
    if "--fail" in words:
        raise ValueError("after the output")
sys.exit(run(command))
"""
WORDS = "Märchen → сказки 🙂"


def ask(data: bytes, *options: str) -> tuple[int, bytes, str]:
    command = [sys.executable, "-m", GENERATE, "-p", "-", "-m", "4", "-q", *options]
    done = subprocess.run(command, input=data, capture_output=True)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode() + b"\n",
        TEXT.replace("\n", "\r\n").encode() + b"\r\n",
        TEXT.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.replace("\n", "\r\n").encode("utf-16-be"),
    ],
)
def test_a_prompt_on_stdin_is_the_same_text_in_any_encoding(data: bytes) -> None:
    status, out, err = ask(data)
    assert (status, err) == (0, "")
    assert out == ask(TEXT.encode())[1]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "standard input is empty"),
        (b"\r\n", "standard input is empty"),
        ("Märchen".encode("cp1252"), "standard input: not UTF-8 at byte 1; save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "standard input: holds null characters"),
        (TEXT.encode("utf-32"), "standard input: holds null characters"),
        (b"\xff\xfeO", "standard input: not UTF-16"),
        (b"a" * (64 << 20) + b"aa", "standard input: more than 64 MiB of text"),
    ],
)
def test_what_is_no_text_on_stdin_is_bad_input(data: bytes, says: str) -> None:
    status, out, err = ask(data)
    assert (status, out) == (2, b"")
    assert says in err
    assert err.count("\n") == 1


def test_a_locale_s_own_encoding_is_read(run: Run) -> None:
    code = "from mlx_openelm.streams import read_stdin; print(ascii(read_stdin()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="Märchen\r\n".encode("latin-1"),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert done.stdout.decode().strip() == ascii("Märchen")


def test_an_argument_is_utf_8_in_any_locale() -> None:
    command = [sys.executable, "-m", GENERATE, "-m", "4", "-q", "--json", "-p"]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    utf_8, ascii_only = (
        json.loads(subprocess.run([*command, "Märchen →"], capture_output=True, env=env).stdout)
        for env in (dict(os.environ), plain)
    )
    assert utf_8["tokens"] == ascii_only["tokens"]
    wrong = subprocess.run([*command, b"M\xe4rchen"], capture_output=True)
    assert wrong.returncode == 2
    assert b"argument --prompt/-p: not valid UTF-8" in wrong.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8", "utf-16"])
def test_no_text_is_lost_in_an_encoding_that_lacks_it(encoding: str) -> None:
    def say(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", SAYS, *words],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode(encoding)

    assert say(WORDS) == WORDS.encode(encoding, "backslashreplace").decode(encoding) + "\n"
    assert json.loads(say(WORDS, "--json")) == [WORDS, "--json"]


def test_the_output_comes_before_the_error() -> None:
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", SAYS, "--fail", *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first, second = done.stdout.splitlines()
        assert "--fail" in first
        assert second == "error: ValueError: after the output (--debug shows where)"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_cache_that_cannot_be_saved_costs_no_text(run: Run, options: list[str]) -> None:
    folder = "/proc" if Path("/proc").exists() else "/dev"  # nobody can make a file there
    file = f"{folder}/cache.safetensors"
    done = run(GENERATE, "-p", "The", "-m", "3", "-q", "--prompt-cache-file", file, *options)
    assert done.returncode == 2
    assert done.stdout == "" or done.stdout.endswith("\n")  # found before, or after the text
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        [GENERATE, "-p", "The", "-m", "3", "-q"],
        [GENERATE, "-p", "The", "-m", "3", "-q", "--json"],
        [GENERATE, "--help"],
        ["mlx_openelm"],
        ["mlx_openelm.convert", "inspect", "demo"],
    ],
)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: standard output can't be written (No space left on device)\n"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_closed_output_is_an_error(closed: str) -> None:
    command = f"{sys.executable} -m {GENERATE} -p The -m 3 -q {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 1
    said = "error: standard output is closed; send it to a file, or to /dev/null\n"
    assert done.stderr == ("" if "2>" in closed else said)


def test_closed_stderr_and_stdin_are_not_missed() -> None:
    command = f"{sys.executable} -m {GENERATE} -p The -m 3 -v 2>&- <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens-per-sec" not in done.stdout  # what belongs to stderr
    asked = f"{sys.executable} -m {GENERATE} -p - -q <&-"
    done = subprocess.run(asked, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard input is closed\n")


@pytest.mark.parametrize(
    "words", [f"{GENERATE} --help", "mlx_openelm", "mlx_openelm.convert inspect demo"]
)
def test_a_reader_that_leaves_is_no_error(words: str) -> None:
    command = f"bash -c '{sys.executable} -m {words} | true; echo ${{PIPESTATUS[0]}}'"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_errors_have_no_control_characters_and_an_end(run: Run) -> None:
    done = run(GENERATE, "-q", "-p", "x", "--model", "a\x1b[31m\u202eb\nc/d/e")
    assert done.stderr == "error: a\\x1b[31m\\u202eb c/d/e: no such file or directory\n"
    done = run(GENERATE, "-q", "-p", "x", "--model", "/".join(["long" * 30] * 50))
    assert done.returncode == 2
    assert len(done.stderr) < MAX_LINE + 20
    assert done.stderr.endswith("can't be read (File name too long)\n")


def test_printable_keeps_every_script() -> None:
    assert printable("Märchen сказки 童話 🙂") == "Märchen сказки 童話 🙂"
    assert printable("a\tb\r\x9b\u2028\udce4") == "a\\tb\\r\\x9b\\u2028\\udce4"


def test_tilde_in_every_path(run: Run, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    options = ("-p", "The", "-m", "1", "-q", "--prompt-cache-file=~/cache.safetensors")
    assert run(GENERATE, *options, **home).returncode == 0
    assert (tmp_path / "cache.safetensors").exists()
    for words in (["report", "~/none.json", "-o", "~/out"], ["compare", "~/none.json", "~/b.json"]):
        done = run("mlx_openelm.benchmarks", *words, **home)
        assert done.returncode == 2
        assert str(tmp_path / "none.json") in done.stderr
    done = run(GENERATE, "-p", "The", "-q", "--model", "~nobody-of-this-name/model")
    assert "no such user's home directory" in done.stderr
    done = run(GENERATE, "-p", "The", "-q", "--prompt-cache-file", "")
    assert done.returncode == 2
    assert "an empty path was given" in done.stderr


@pytest.mark.parametrize("columns", ["1", "2", "5"])
def test_terminals_too_narrow_for_text(run: Run, columns: str) -> None:
    for module in ("mlx_openelm.convert", "mlx_openelm.generate"):
        result = run(module, "--help", COLUMNS=columns)
        assert result.returncode == 0, result.stderr
        assert "--help" in result.stdout
