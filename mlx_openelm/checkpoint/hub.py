"""Where a model is: a local directory, a bundled one, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import InputError
from ..files import user_path
from .hub_errors import explained
from .weight_files import find_weights

DEMO = Path(__file__).parents[1] / "demo"
BUNDLED = {"demo": DEMO / "demo", "demo-draft": DEMO / "demo-draft"}

MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
PICKLED_FILES = ("*.json", "*.bin", "tokenizer.model", "*.jinja")
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "*.jinja"),
)


def resolve(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: local, bundled, or downloaded from the Hugging Face hub.

    Raises:
        InputError: when there is no such directory or repository, or it can't be accessed.
        OpenELMError: when downloading fails: the network, the hub, the disk.
    """
    found = _local(user_path(path_or_hf_repo))
    if found and found.is_file():
        raise InputError(f"{found} is a file, not a model directory (convert it: openelm-convert)")
    return found or _download(str(path_or_hf_repo), MODEL_FILES, revision)


def resolve_source(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The file or directory of a checkpoint to convert; as `resolve`, pickled weights included.

    Raises:
        InputError, OpenELMError: as `resolve`.
    """
    found = _local(user_path(path_or_hf_repo))
    if found:
        return found
    directory = _download(str(path_or_hf_repo), MODEL_FILES, revision)
    if any(directory.glob("adapter*.safetensors")):
        return directory
    try:
        find_weights(directory)
        return directory
    except InputError:
        return _download(str(path_or_hf_repo), PICKLED_FILES, revision)


def resolve_tokenizer(path_or_hf_repo: str | Path) -> Path:
    """The file or directory of a tokenizer: local, or downloaded from the Hugging Face hub.

    Raises:
        InputError, OpenELMError: as `resolve`.
    """
    found = _local(user_path(path_or_hf_repo))
    return found or _download(str(path_or_hf_repo), TOKENIZER_FILES, None)


def _local(path: Path) -> Path | None:
    try:
        return path if path.exists() else BUNDLED.get(str(path))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None


def origin(directory: Path) -> tuple[str, str] | None:
    """Repository and commit that a directory of the hub's cache holds; None for any other.

    The cache has `models--OWNER--NAME/snapshots/COMMIT`.
    """
    parts = directory.absolute().parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or parts[0].count("--") != 2:
        return None
    _, owner, name = parts[0].split("--")
    return f"{owner}/{name}", parts[2]


def upload(repo: str, files: Mapping[str, Path | bytes], private: bool) -> str:
    """Put files on the Hugging Face hub in one commit; the repository is made if there is none.

    Returns:
        The commit's address.

    Raises:
        InputError: when the name is no repository's, or nobody is logged in who may write there.
        OpenELMError: when uploading fails.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi

        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in files.items()
        ]
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.create_commit(repo, operations, commit_message="Upload with mlx-openelm")
    except Exception as error:  # whatever the client and its HTTP library raise
        raise explained(error, repo, uploading=True) from error
    return str(made.commit_url)


def _download(repo: str, patterns: Iterable[str], revision: str | None) -> Path:
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")) or repo.endswith("/"):
        raise InputError(f"{repo}: no such file or directory")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # whatever the client and its HTTP library raise
        raise explained(error, repo, revision) from error
