"""Hugging Face ids, with a small server on this machine in the hub's place."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_openelm.convert.card import model_card
from mlx_openelm.hub import BUNDLED

from .conftest import Run

DEMO = BUNDLED["demo"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GENERATE = "mlx_openelm.generate"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as `snapshot_download` asks for."""

    repositories: dict[str, dict[str, Path]]
    asked: list[str]
    uploaded: dict[str, bytes]

    def do_GET(self) -> None:
        self.asked.append(self.path)
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


def test_without_a_network_it_says_how_to_use_a_local_directory(
    run: Run, hub: dict[str, str]
) -> None:
    for change in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        status, out, err = generate(run, "--model", "someone/tales", **{**hub, **change})
        assert (status, out) == (1, "")
        assert "hub can't be reached" in err.splitlines()[-1]
        assert "give the path of its directory" in err.splitlines()[-1]
        assert "Traceback" not in err


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
        (DEMO, "a name/with spaces/three", "not the name of a repository"),
    ],
)
def test_what_cannot_be_uploaded(
    run: Run, hub: dict[str, str], directory: Path, repo: str, message: str
) -> None:
    result = run("mlx_openelm.convert", "upload", directory, repo, **hub)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def test_uploading_without_a_network(run: Run, hub: dict[str, str]) -> None:
    away = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_may_write"}
    result = run("mlx_openelm.convert", "upload", DEMO, "someone/new", **away)
    assert result.returncode == 1
    assert "someone/new: uploading failed (" in result.stderr.splitlines()[-1]
