"""Output takes its place whole, and nothing that this program hasn't written is ever lost."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import pytest

from mlx_openelm import files
from mlx_openelm.checkpoint import shards
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.convert import atomic, rename
from mlx_openelm.convert.atomic import new_directory, new_files
from mlx_openelm.convert.export import export
from mlx_openelm.convert.outputs import FILES, MARK, RECORD, files_in, starts_like, why_not_ours
from mlx_openelm.convert.targets import check_directory
from mlx_openelm.errors import InputError, OpenELMError

from .conftest import Run

MODULE = "mlx_openelm.convert"
DEMO = BUNDLED["demo"]
WHY_NOT = starts_like("a test's file", lambda start: start.startswith(b"test "))


def write_model(directory: Path, text: str, *, marked: bool = True) -> None:
    """What looks like our output: weights with the mark, and a config that says `text`."""
    specs = {"a": shards.Spec(mx.uint8, (1,))}
    with shards.new_shards(directory, specs, MARK if marked else {"format": "pt"}) as write:
        write("a", memoryview(b"1"))
    (directory / "config.json").write_text(text)


def make_directory(out: Path, text: str, force: bool = True) -> None:
    with new_directory(out, force) as directory:
        write_model(directory, text)


def make_file(out: Path, text: str, force: bool = True) -> None:
    with new_files({out: WHY_NOT}, force) as [file]:
        file.write_text(f"test {text}")


def make_pair(out: Path, text: str, force: bool = True) -> None:
    with new_files({out: WHY_NOT, out.with_name("beside"): WHY_NOT}, force) as pair:
        for file in pair:
            file.write_text(f"test {text}")


Make = Callable[..., None]
MAKES: list[Make] = [make_directory, make_file, make_pair]


def found(out: Path) -> str | None:
    """The text of a complete output; None when nothing is there."""
    if not out.exists():
        return None
    if out.is_dir():
        assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
        return (out / "config.json").read_text()
    return out.read_text().removeprefix("test ")


def texts_below(directory: Path) -> set[str]:
    """All texts of outputs that are anywhere in it, hidden or not."""
    paths = (path for path in directory.rglob("*") if path.name != "model.safetensors")
    read = (path.read_text() for path in paths if path.is_file())
    return {text.removeprefix("test ") for text in read if text}


@pytest.fixture(params=["exchange", "no exchange", "no links either"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This system, one whose file system knows plain renames, one without hard links."""

    def unsupported(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param != "exchange":
        monkeypatch.setitem(rename._CALLS, sys.platform, unsupported)
    if request.param == "no links either":
        monkeypatch.setattr(os, "link", no_links)
    return str(request.param)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.usefixtures("system")
def test_made_kept_and_replaced(tmp_path: Path, make: Make) -> None:
    out = tmp_path / "out"
    make(out, "old", force=False)
    assert found(out) == "old"
    with pytest.raises(InputError, match="--force replaces it"):
        make(out, "new", force=False)
    assert found(out) == "old"
    make(out, "new")
    assert found(out) == "new"
    assert texts_below(tmp_path) == {"new"}
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


# ---------------------------------------------------------------------------------------------
# Killed

NAME_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "open"}


def killed_before(change: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that is killed before its change number `change` of a name.

    Returns whether it was killed. Every state between two changes is one before the second.
    """
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            made = event != "open" or bool(arguments[2] & os.O_CREAT)
            if event in NAME_CHANGES and made and next(count) == change:
                os.kill(os.getpid(), signal.SIGKILL)

        def call(*arguments: Any) -> int:
            hook("os.rename", ())
            return real(*arguments)

        real = rename._CALLS[sys.platform]
        rename._CALLS[sys.platform] = call
        sys.addaudithook(hook)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is flushed, which only takes time here."""
    for module in (atomic, shards):
        monkeypatch.setattr(module, "sync", lambda descriptor: None)


def fail(out: Path, make: Make) -> None:
    """A later run that fails."""
    new: AbstractContextManager[Any]
    new = new_directory(out, True) if make is make_directory else new_files({out: WHY_NOT}, True)

    def run() -> None:
        with new as made:
            for path in made if isinstance(made, list) else [made / "config.json"]:
                path.write_text("half")
            raise InputError("on the way")

    with pytest.raises(InputError, match="on the way"):
        run()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.usefixtures("unsynced")
def test_killed_at_any_change_of_a_name_old_or_new_is_there(
    tmp_path: Path, system: str, make: Make, replaces: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    seen, out = set(), tmp_path / "out"
    for change in itertools.count():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if replaces:
            make(out, "old")
        killed = killed_before(change, partial(make, out, "new", force=replaces))
        seen.add(found(out) if out.exists() and out.stat().st_size else None)
        left = texts_below(tmp_path)
        if replaces:
            if system == "exchange":
                assert found(out) in ("old", "new")
            assert "old" in left or found(out) == "new"
        fail(out, make)
        later = texts_below(tmp_path)
        if replaces:
            assert "old" in later or found(out) == "new"
        make(out, "newer")
        assert found(out) == "newer"
        remains = [path for path in tmp_path.iterdir() if "partial" in path.name]
        if remains:  # killed while it replaced: kept for the person, who is told
            assert replaces
            assert "left by a run that was killed" in capfd.readouterr().err
            assert {"old", "new"} & texts_below(remains[0])
        if not killed:
            break
    assert change > 7
    assert "new" in seen
    assert ("old" in seen) is replaces


STRACED = """
import shutil, sys
from pathlib import Path
from mlx_openelm.convert.atomic import new_directory, new_files
kind, out, source = sys.argv[1], *map(Path, sys.argv[2:])
if kind == "directory":
    with new_directory(out, True) as made:
        for file in source.iterdir():
            shutil.copyfile(file, made / file.name)
else:
    with new_files({out: lambda file: None}, True) as [made]:
        shutil.copyfile(source, made)
"""
CALLS = {
    "directory": ("rename", "renameat2", "unlink", "rmdir", "mkdir"),
    "file": ("renameat2", "unlink"),
}


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("kind", CALLS)
def test_killed_at_a_real_system_call(tmp_path: Path, kind: str) -> None:
    """The same with the kernel's own calls: strace kills at the first, the second, and so on."""
    out, make = tmp_path / "out", make_directory if kind == "directory" else make_file
    make(tmp_path / "source", "new")
    seen = []
    for call in CALLS[kind]:
        for when in itertools.count(1):
            make(out, "old")
            inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}"]
            strace = ["strace", "-f", "-qq", "-o", os.devnull, *inject]
            program = [sys.executable, "-B", "-c", STRACED, kind, out, tmp_path / "source"]
            done = subprocess.run([*strace, *program], capture_output=True, text=True)
            if "ptrace" in done.stderr.lower():
                pytest.skip("strace may not trace here")
            seen.append((call, found(out)))
            if done.returncode == 0:
                break
            assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    assert ("renameat2", "old") in seen
    assert ("unlink", "old") in seen
    assert ("unlink", "new") in seen
    assert {text for _, text in seen} == {"old", "new"}
    make(out, "newer")
    assert found(out) == "newer"


# ---------------------------------------------------------------------------------------------
# What is never replaced


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An output of this program."""
    make_directory(tmp_path / "model", "old")
    return tmp_path / "model"


def add_file(model: Path) -> None:
    (model / "notes.txt").write_text("mine")


def add_directory(model: Path) -> None:
    (model / "model.safetensors.d").mkdir()


def add_link(model: Path) -> None:
    (model / "tokenizer.json").symlink_to("config.json")


def add_templates(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "thesis.txt").write_text("mine")


def train_further(model: Path) -> None:
    """Weights that another program saved under the same name."""
    write_model(model, "mine", marked=False)


@pytest.mark.parametrize(
    "change", [add_file, add_directory, add_link, add_templates, train_further]
)
@pytest.mark.parametrize("force", [False, True])
def test_a_directory_with_anything_else_is_never_replaced(
    model: Path, change: Callable[[Path], None], force: bool
) -> None:
    change(model)
    before = {path: path.lstat().st_mtime_ns for path in model.rglob("*")}
    with pytest.raises(InputError, match="it is never replaced: choose another name"):
        make_directory(model, "new", force)
    assert {path: path.lstat().st_mtime_ns for path in model.rglob("*")} == before


def test_what_appears_in_the_old_output_meanwhile_stays(model: Path) -> None:
    def write() -> None:
        with new_directory(model, True) as directory:
            write_model(directory, "new")
            (model / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match="holds 'notes.txt'"):
        write()
    assert (model / "notes.txt").read_text() == "mine"
    assert os.listdir(model.parent) == ["model"]


@pytest.mark.usefixtures("system")
def test_what_appears_between_check_and_exchange_stays(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(a: Path, b: Path, aside: Path) -> None:
        if not (b / "notes.txt").exists() and not (a / "notes.txt").exists():
            (b / "notes.txt").write_text("mine")
        rename.exchange(a, b, aside)

    monkeypatch.setattr(atomic, "exchange", late)
    with pytest.raises(InputError, match="holds 'notes.txt'"):
        make_directory(model, "new")
    assert (model / "notes.txt").read_text() == "mine"
    assert (model / "config.json").read_text() == "old"
    assert os.listdir(model.parent) == ["model"]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.usefixtures("system")
def test_what_appears_at_the_target_meanwhile_stays(tmp_path: Path, make: Make) -> None:
    out = tmp_path / "out"

    def write() -> None:
        if make is make_directory:
            with new_directory(out, False) as directory:
                write_model(directory, "new")
                out.mkdir()
                (out / "thesis.txt").write_text("mine")
        else:
            beside = tmp_path / "beside"
            with new_files({beside: WHY_NOT, out: WHY_NOT}, False) as pair:
                for file in pair:
                    file.write_text("test new")
                out.write_text("mine")

    with pytest.raises(InputError, match="something appeared there meanwhile, which stays"):
        write()
    assert (out / "thesis.txt" if out.is_dir() else out).read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("text", ["mine", "PK\x03\x04"])
def test_a_file_of_another_kind_is_never_replaced(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.write_text(text)
    with pytest.raises(InputError, match="isn't a test's file; it is never replaced"):
        make_file(out, "new")
    assert out.read_text() == text
    out.write_text("")
    make_file(out, "new")
    assert found(out) == "new"


def test_the_places_that_are_never_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inside = model / "inside"
    for place, current in (
        (Path("/"), tmp_path),
        (tmp_path / "home", tmp_path),
        (Path("../home"), model),
        (model, model),
        (Path(), model),
        (Path(".."), model),
        (Path("../model"), model),
        (model / "inside" / "..", tmp_path),
    ):
        monkeypatch.chdir(current)
        inside.mkdir(exist_ok=True)
        with pytest.raises(InputError, match="choose another name"):
            make_directory(place, "new")
        inside.rmdir()
        assert found(model) == "old"


def test_a_mount_point_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can't be renamed, which would show when everything is written."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(InputError, match="a mount point; name a directory in it"):
        check_directory(tmp_path, False)
    check_directory(tmp_path / "in", False)


def test_a_link_is_not_followed_nor_replaced(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    for target in (model, model / "config.json", Path("nowhere")):
        link.symlink_to(target)
        for make in MAKES:
            with pytest.raises(InputError, match="a symbolic link"):
                make(link, "new")
        assert link.is_symlink()
        link.unlink()
    assert found(model) == "old"


@contextmanager
def bind_mount(source: Path, place: Path) -> Iterator[None]:
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "--bind", source, place]).returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_target_that_holds_what_is_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "weights").symlink_to(model / "model.safetensors")
    for reads in (model, model / "config.json", tmp_path / "link" / "model", tmp_path / "weights"):
        for out in (model, tmp_path / "link" / "model", model / ".." / "model"):
            with (
                pytest.raises(InputError, match=r"holds, what is being read .*choose another"),
                new_directory(out, True, [reads]),
            ):
                pass
    for reads in (model, model / "config.json", tmp_path / "link" / "model" / "config.json"):
        with (
            pytest.raises(InputError, match="is being read"),
            new_files({tmp_path / "link" / "model" / "config.json": WHY_NOT}, True, [reads]),
        ):
            pass
    with bind_mount(model, tmp_path / "mounted"), pytest.raises(InputError, match="being read"):
        make_reading(tmp_path / "mounted", model)
    assert found(model) == "old"


def make_reading(out: Path, reads: Path) -> None:
    with new_directory(out, True, [reads]) as directory:
        write_model(directory, "new")


def test_every_option_that_is_read_is_protected(run: Run, tmp_path: Path) -> None:
    out = Path(shutil.copytree(DEMO, tmp_path / "out"))
    for path in (out, *out.iterdir()):
        path.chmod(0o755)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    pt = tmp_path / "demo.pt"
    export(DEMO, pt, "corenet")
    for arguments in (
        (out,),
        (DEMO, "--tokenizer", out),
        (DEMO, "--tokenizer", out / "tokenizer.model"),
        (pt, "--config", out / "config.json"),
        (DEMO, "--recipe", out / "config.json"),
    ):
        result = run(MODULE, *arguments, "-o", tmp_path / "x" / ".." / "out", "--force")
        assert result.returncode == 2, arguments
        if "--recipe" not in arguments:
            assert "being read" in result.stderr.splitlines()[-1], arguments
    result = run(MODULE, "export", out, "-o", out, "--format", "hf", "--force")
    assert "being read" in result.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_persons_directories_that_look_like_remains_stay(tmp_path: Path) -> None:
    mine = tmp_path / ".out.partial-abcd1234"
    (mine / "new").mkdir(parents=True)
    (mine / "new" / "config.json").write_text("mine")
    make_directory(tmp_path / "out", "new")
    assert (mine / "new" / "config.json").read_text() == "mine"


# ---------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize("make", MAKES)
def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, make: Make) -> None:
    fail(tmp_path / "a" / "b" / "out", make)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", MAKES)
def test_what_was_there_stays_when_it_cannot_be_replaced(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", "old")
    before = sorted(tmp_path.iterdir())

    def broken(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setitem(rename._CALLS, sys.platform, broken)
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "EIO")))
    with pytest.raises(OpenELMError, match="out: can't be written"):
        make(tmp_path / "out", "new")
    assert found(tmp_path / "out") == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_of_two_files_neither_is_replaced_when_one_cannot_be(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del system
    make_file(tmp_path / "a", "old")

    def write() -> None:
        with new_files({tmp_path / "a": WHY_NOT, tmp_path / "b": WHY_NOT}, True) as pair:
            for file in pair:
                file.write_text("test new")
            (tmp_path / "b").mkdir()

    with pytest.raises(InputError, match="isn't a regular file"):
        write()
    assert found(tmp_path / "a") == "old"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("make", MAKES)
def test_targets_that_cannot_be(tmp_path: Path, make: Make) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300), Path("/proc/out")):
        with pytest.raises(OpenELMError) as error:
            make(out, "new")
        assert "\n" not in str(error.value)
    with pytest.raises(OpenELMError) as error:
        make(tmp_path / "file" / "a\nb", "new")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x" * 255, "a\nb", os.fsdecode(b"\xff\xfe"), "é" * 120, "-o"])
@pytest.mark.parametrize("make", MAKES)
def test_strange_names(tmp_path: Path, make: Make, name: str) -> None:
    for text in ("old", "new"):
        make(tmp_path / name, text)
        assert found(tmp_path / name) == text
    fail(tmp_path / name, make)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_runs_that_start_together_do_not_take_each_others_work_for_remains(tmp_path: Path) -> None:
    out, failures = tmp_path / "model", []

    def write(number: int) -> None:
        try:
            for _ in range(50):
                make_file(out, str(number))
        except Exception as error:
            failures.append(error)

    threads = [Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("make", [make_directory, make_file])
def test_of_runs_without_force_one_makes_it(tmp_path: Path, make: Make) -> None:
    refused: list[InputError] = []

    def write(number: int) -> None:
        try:
            make(tmp_path / "out", str(number), force=False)
        except InputError as error:
            refused.append(error)

    threads = [Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------------------------------------
# macOS


def test_the_renames_of_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`renamex_np` with the flags of macOS's <sys/stdio.h>, here in Linux's words."""
    flags = {0x2: 2, 0x4: 1}  # RENAME_SWAP, RENAME_EXCL
    linux, library = rename._CALLS["linux"], rename._library()
    used = []

    class Fake:
        def renamex_np(self, a: bytes, b: bytes, flag: int) -> int:
            used.append(flag)
            return linux(library, a, b, flags[flag])

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(rename, "_library", Fake)
    for make in MAKES:
        out = tmp_path / make.__name__ / "out"
        make(out, "old", force=False)
        make(out, "new")
        assert found(out) == "new"
    assert set(used) == set(flags)


def test_on_macos_the_drives_cache_is_flushed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def full(descriptor: int, command: int) -> int:
        assert command == 51
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("only fsync"))
    make_directory(tmp_path / "out", "new")
    assert {"config.json", "model.safetensors", "out", tmp_path.name} <= set(flushed)


def test_where_the_drives_cache_cannot_be_flushed_fsync_is_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, command: int) -> int:
        raise OSError(errno.ENOTSUP, "not here")

    flushed: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", unsupported)
    monkeypatch.setattr(os, "fsync", flushed.append)
    with (tmp_path / "x").open("wb") as file:
        files.sync(file.fileno())
        assert flushed == [file.fileno()]


# ---------------------------------------------------------------------------------------------
# What is ours


@pytest.mark.parametrize("format", ["mlx", "mlx quantized", "hf"])
def test_what_is_written_is_known_again(run: Run, tmp_path: Path, format: str) -> None:
    source, out = Path(shutil.copytree(DEMO, tmp_path / "source")), tmp_path / "out"
    for name in ("chat_template.json", "added_tokens.json", "special_tokens_map.json"):
        (source / name).write_text("{}")
    command: tuple[object, ...] = {
        "mlx": (source, "-o", out),
        "mlx quantized": (source, "-o", out, "-q", "--chat"),
        "hf": ("export", source, "-o", out, "--format", "hf"),
    }[format]
    for extra in ((), ("--force",)):
        result = run(MODULE, *command, *extra)
        assert result.returncode == 0, result.stderr
        assert sorted(os.listdir(out)) == files_in(out)
        assert "chat_template.json" in files_in(out)
        assert why_not_ours(out) is None
    (out / "notes.txt").touch()
    assert why_not_ours(out) == "holds 'notes.txt', which mlx-openelm doesn't write"


def test_a_model_that_another_program_wrote_is_not_ours(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    assert why_not_ours(tmp_path / "demo") is None
    (tmp_path / "demo" / RECORD).unlink()
    assert why_not_ours(tmp_path / "demo") == "holds files that mlx-openelm hasn't written"
    assert RECORD in FILES
