"""Hugging Face ids, with a small server on this machine in the hub's place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.convert.card import model_card
from mlx_openelm.convert.commands.upload import upload_directory
from mlx_openelm.errors import InputError

from .conftest import Run

DEMO = BUNDLED["demo"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GENERATE = "mlx_openelm.generate"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as `snapshot_download` asks for."""

    repositories: dict[str, dict[str, Path]]
    asked: list[str]
    uploaded: dict[str, bytes]
    # Repository → (part of the path, status, headers, body): what is answered there instead
    refusals: dict[str, tuple[str, int, dict[str, str], bytes]]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self._refuse(self.path):
            return None
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            return self._describe(path.removeprefix("api/models/"))
        repo, _, rest = path.partition("/resolve/")
        name = rest.partition("/")[2]
        file = self.repositories.get(repo, {}).get(name)
        if file is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """As much as `create_repo` and `create_commit` ask for: all files come in the commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        named = json.loads(body) if self.path.endswith("/create") else {}
        if self._refuse(f"{named.get('organization')}/{named.get('name')}"):
            return None
        path = self.path.split("?")[0].strip("/")
        if self.headers.get("Authorization") != "Bearer hf_may_write":
            return self._answer(401, b"{}", {})
        host = f"http://{self.headers['Host']}"
        if path == "api/repos/create":
            answer: object = {"url": f"{host}/someone/{json.loads(body)['name']}", "id": "1"}
        elif "/preupload/" in path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": f["path"], **modes} for f in json.loads(body)["files"]]}
        elif path == "api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            Hub.uploaded = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            answer = {"commitUrl": f"{host}/someone/new/commit/{COMMIT}", "commitOid": COMMIT}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, asked: str) -> bool:
        for repo, (part, status, headers, body) in self.refusals.items():
            if re.search(rf"{repo}\b", asked) and part in asked:
                self._answer(status, body, headers)
                return True
        return False

    def _describe(self, path: str) -> None:
        repo, _, revision = path.replace("/tree/", "/revision/").partition("/revision/")
        if repo not in self.repositories:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", COMMIT):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.repositories[repo].items()
        body: object = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
            for name, file in files
        ]
        if "/tree/" not in path:
            siblings = [{"rfilename": name} for name, _ in files]
            body = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which the hub is a server with two repositories."""
    files = {file.name: file for file in DEMO.iterdir()}
    bare = {name: file for name, file in files.items() if "tokenizer" not in name}
    Hub.repositories = {"someone/tales": files, "apple/OpenELM-Tiny": bare}
    Hub.asked = []
    Hub.refusals = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()


def generate(run: Run, *options: str | Path, **environment: str) -> tuple[int, str, str]:
    result = run(GENERATE, "-p", "Once upon a time", "-m", "8", *options, **environment)
    return result.returncode, result.stdout, result.stderr


def test_a_repository_is_downloaded_once_and_then_works_offline(
    run: Run, hub: dict[str, str]
) -> None:
    local = generate(run, "--model", DEMO)
    status, text, _ = generate(run, "--model", "someone/tales", **hub)
    assert (status, text) == local[:2]
    assert any("model.safetensors" in path for path in Hub.asked)
    Hub.asked.clear()
    offline = generate(run, "--model", "someone/tales", **{**hub, "HF_HUB_OFFLINE": "1"})
    assert offline[:2] == local[:2]
    assert Hub.asked == []


def test_a_revision_is_asked_for(run: Run, hub: dict[str, str]) -> None:
    assert generate(run, "--model", "someone/tales", "--revision", COMMIT, **hub)[0] == 0
    status, _, err = generate(run, "--model", "someone/tales", "--revision", "v2", **hub)
    assert status == 2
    assert "has no revision 'v2'" in err.splitlines()[-1]


def test_a_repository_without_a_tokenizer_says_what_to_do(run: Run, hub: dict[str, str]) -> None:
    status, out, err = generate(run, "--model", "apple/OpenELM-Tiny", **hub)
    assert (status, out) == (2, "")
    assert "--tokenizer PATH_OR_REPO" in err.splitlines()[-1]
    with_tokenizer = ("--model", "apple/OpenELM-Tiny", "--tokenizer", "someone/tales")
    assert generate(run, *with_tokenizer, **hub)[0] == 0


def test_an_unknown_repository(run: Run, hub: dict[str, str]) -> None:
    status, _, err = generate(run, "--model", "someone/nothing", **hub)
    assert status == 2
    assert "someone/nothing: no such file or directory, nor a repository" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "hub can't be reached"),
        ({"HF_ENDPOINT": "http://nowhere.invalid", "NO_PROXY": "*"}, "hub can't be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps"),
        ({"NO_PROXY": "", "HTTP_PROXY": "http://127.0.0.1:9"}, "can't be reached"),
    ],
)
def test_without_a_network_it_says_why_and_how_to_use_a_local_directory(
    run: Run, hub: dict[str, str], change: dict[str, str], says: str
) -> None:
    status, out, err = generate(run, "--model", "someone/tales", **{**hub, **change})
    assert (status, out) == (1, "")
    assert says in err.splitlines()[-1]
    assert "path of" in err.splitlines()[-1]
    assert "Traceback" not in err


INVALID = {"X-Error-Message": "Invalid credentials in Authorization header"}


GATED = {"X-Error-Code": "GatedRepo"}
DISABLED = {"X-Error-Message": "Access to this resource is disabled."}
SHORT = {"ETag": '"abc"', "X-Repo-Commit": COMMIT, "X-Linked-Size": "999"}
# Part of the path, status and headers and body of the answer; exit status, words of the error
DOWNLOADS = [
    ("", 401, INVALID, b"{}", 2, "refuses your access token: it is invalid or has expired"),
    ("", 401, {}, b"{}", 2, "refuses your access token"),
    ("", 401, {"X-Error-Code": "RepoNotFound"}, b"{}", 2, "nor a repository on the Hugging Face"),
    ("", 401, GATED, b"{}", 2, "on its page, https://huggingface.co/cases/"),
    ("", 403, GATED, b"{}", 2, "then log in with: hf auth login"),
    ("", 403, {}, b"{}", 2, "doesn't permit this with your access token"),
    ("", 403, DISABLED, b"", 2, "has disabled this repository"),
    ("", 404, {}, b"{}", 2, "has no such page; check HF_ENDPOINT"),
    ("", 429, {}, b"{}", 1, "too many requests"),
    ("", 500, {}, b"", 1, "has a failure (HTTP 500); try again later"),
    ("", 200, {}, b"<html>log in</html>", 1, "what answers isn't the Hugging Face hub"),
    ("", 200, {}, b"[]", 1, "what answers isn't the Hugging Face hub"),
    ("/resolve/", 404, {"X-Error-Code": "EntryNotFound"}, b"", 2, "a file of the repository"),
    ("/resolve/", 200, {}, b"<html>log in</html>", 1, "what answers isn't the Hugging Face hub"),
    ("/resolve/", 200, SHORT, b"short", 1, "a file came incomplete; run the command again"),
    ("/resolve/", 403, {}, b"", 2, "doesn't permit this with your access token"),
]
UPLOADS = [
    ("", 401, INVALID, b"{}", 2, "refuses your access token"),
    ("", 401, {}, b"{}", 2, "doesn't let you write there"),
    ("", 403, {}, b"{}", 2, "doesn't let you write there"),
    ("", 404, {"X-Error-Code": "RepoNotFound"}, b"{}", 2, "doesn't let you write there"),
    ("", 413, {}, b"{}", 1, "uploading failed: the Hugging Face hub refuses this (HTTP 413)"),
    ("", 500, {}, b"{}", 1, "uploading failed: the Hugging Face hub has a failure (HTTP 500)"),
]
ASK = """
import sys
from mlx_openelm.errors import OpenELMError
from mlx_openelm.checkpoint.hub import resolve, upload
for i in range(int(sys.argv[2])):
    try:
        upload(f"cases/n{i}", {}, False) if sys.argv[1] == "upload" else resolve(f"cases/n{i}")
    except OpenELMError as error:
        print(error.exit_code, error)
"""


@pytest.mark.parametrize("action", ["download", "upload"])
def test_what_the_hub_refuses_is_explained(hub: dict[str, str], action: str) -> None:
    cases = UPLOADS if action == "upload" else DOWNLOADS
    Hub.refusals = {f"cases/n{i}": case[:4] for i, case in enumerate(cases)}
    Hub.repositories |= dict.fromkeys(Hub.refusals, Hub.repositories["someone/tales"])
    done = subprocess.run(
        [sys.executable, "-c", ASK, action, str(len(cases))],
        capture_output=True,
        text=True,
        env={**os.environ, **hub, "HF_TOKEN": "hf_may_write"},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr
    for i, (line, (*_, status, says)) in enumerate(zip(lines, cases, strict=True)):
        assert line.startswith(f"{status} cases/n{i}: ")
        assert says in line


def test_a_cache_that_cannot_be_used_is_named(
    run: Run, hub: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", Path("/proc/nowhere")):
        status, _, err = generate(run, "--model", "someone/tales", **{**hub, "HF_HOME": str(home)})
        assert status == 1
        assert "cache can't be used" in err.splitlines()[-1]
        assert "set HF_HOME" in err.splitlines()[-1]


def test_a_repository_is_converted_and_keeps_the_tokenizer(
    run: Run, hub: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "converted"
    options = ("apple/OpenELM-Tiny", "--tokenizer", "someone/tales", "-o", out)
    result = run("mlx_openelm.convert", *options, **hub)
    assert result.returncode == 0, result.stderr
    assert generate(run, "--model", out)[:2] == generate(run, "--model", DEMO)[:2]
    source = json.loads((out / "conversion.json").read_text())["source"]
    assert (source["repo"], source["commit"]) == ("apple/OpenELM-Tiny", COMMIT)
    assert "base_model: apple/OpenELM-Tiny\n" in model_card(out, "someone/tiny", None, None)


def test_a_directory_is_uploaded_with_a_model_card(
    run: Run, hub: dict[str, str], tmp_path: Path
) -> None:
    directory = tmp_path / "made"
    assert run("mlx_openelm.convert", DEMO, "-o", directory, "-q").returncode == 0
    private = {"notes.txt", "cache.safetensors", "model.safetensors.index.json"}
    for name in private:
        (directory / name).write_text("mine alone")
    arguments = ("upload", directory, "someone/new", "--base-model", "someone/tales")
    refused = run("mlx_openelm.convert", *arguments, **hub, HF_TOKEN="hf_other")
    assert refused.returncode == 2
    assert "doesn't let you write there" in refused.stderr.splitlines()[-1]
    result = run("mlx_openelm.convert", *arguments, **hub, HF_TOKEN="hf_may_write")
    assert result.returncode == 0, result.stderr
    assert COMMIT in result.stdout
    card = Hub.uploaded.pop("README.md").decode()
    assert "base_model: someone/tales\n" in card
    assert "quantized to 4 bits (affine, groups of 64)" in card
    assert Hub.uploaded.keys() == {f.name for f in directory.iterdir()} - private
    for name, content in Hub.uploaded.items():
        assert content == (directory / name).read_bytes()


@pytest.mark.parametrize(
    ("directory", "repo", "message"),
    [
        ("nowhere", "someone/new", "nowhere: no such directory"),
        ("demo", "someone/new", "demo: comes with mlx-openelm and is not uploaded"),
        (DEMO, "a name/with spaces/three", "not the name of a repository"),
    ],
)
def test_what_cannot_be_uploaded(
    run: Run, hub: dict[str, str], directory: Path, repo: str, message: str
) -> None:
    result = run("mlx_openelm.convert", "upload", directory, repo, **hub)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def test_only_what_belongs_to_a_model_is_uploaded(
    run: Run, hub: dict[str, str], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(DEMO, tmp_path / "made"))
    templates = directory / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    for name in ("notes.json", "secret.jinja", "additional_chat_templates/x"):
        (directory / name).write_bytes(b"mine alone")
    command = ("mlx_openelm.convert", "upload", directory, "someone/new")
    result = run(*command, **hub, HF_TOKEN="hf_may_write")
    assert result.returncode == 0, result.stderr
    expected = {f.name for f in DEMO.iterdir()} | {
        "README.md",
        "additional_chat_templates/rag.jinja",
    }
    assert Hub.uploaded.keys() == expected


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "README.md",
        "conversion.json",
        "model-00001-of-00002.safetensors",
        "additional_chat_templates",
        "additional_chat_templates/x.jinja",
    ],
)
def test_a_link_out_of_the_directory_is_not_uploaded(
    run: Run, hub: dict[str, str], tmp_path: Path, name: str
) -> None:
    directory = Path(shutil.copytree(DEMO, tmp_path / "stranger"))
    (tmp_path / "secret" / "x.jinja").mkdir(parents=True)
    target = tmp_path / "secret"
    if "." in name:
        target = tmp_path / "id_rsa"
        target.write_text("PRIVATE KEY")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(target)
    Hub.uploaded = {}
    command = ("mlx_openelm.convert", "upload", directory, "someone/new")
    result = run(*command, **hub, HF_TOKEN="hf_may_write")
    assert result.returncode == 2, result.stdout
    assert "a link to a file outside its directory" in result.stderr.splitlines()[-1]
    assert Hub.uploaded == {}


def test_uploading_offline(run: Run, hub: dict[str, str]) -> None:
    result = run(
        "mlx_openelm.convert", "upload", DEMO, "someone/new", **{**hub, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line == "error: someone/new: uploading failed: HF_HUB_OFFLINE is set; unset it"


def test_uploading_without_a_network(run: Run, hub: dict[str, str]) -> None:
    away = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_may_write"}
    result = run("mlx_openelm.convert", "upload", DEMO, "someone/new", **away)
    assert result.returncode == 1
    assert (
        "someone/new: uploading failed: the Hugging Face hub can't be reached ("
        in result.stderr.splitlines()[-1]
    )


def test_a_text_file_of_gigabytes_is_not_uploaded(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DEMO, tmp_path / "made"))
    os.truncate(directory / "tokenizer.json", 20 << 30)  # sparse
    with pytest.raises(InputError, match="no such file needs more than"):
        upload_directory(directory, "someone/new")
