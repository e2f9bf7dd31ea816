"""Where a model is: a local directory, a bundled one, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import InputError, OpenELMError
from .weight_files import find_weights

DEMO = Path(__file__).parent / "demo"
BUNDLED = {"demo": DEMO / "demo", "demo-draft": DEMO / "demo-draft"}

MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
PICKLED_FILES = ("*.json", "*.bin", "tokenizer.model")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "*.jinja")


def resolve(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: local, bundled, or downloaded from the Hugging Face hub.

    Raises:
        InputError: when there is no such directory or repository.
        OpenELMError: when the hub can't be reached.
    """
    found = _local(Path(path_or_hf_repo).expanduser())
    if found and found.is_file():
        raise InputError(f"{found} is a file, not a model directory (convert it: openelm-convert)")
    return found or _download(str(path_or_hf_repo), MODEL_FILES, revision)


def resolve_source(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The file or directory of a checkpoint to convert; as `resolve`, pickled weights included.

    Raises:
        InputError, OpenELMError: as `resolve`.
    """
    found = _local(Path(path_or_hf_repo).expanduser())
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
    found = _local(Path(path_or_hf_repo).expanduser())
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
        OpenELMError: when the hub can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in files.items()
    ]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.create_commit(repo, operations, commit_message="Upload with mlx-openelm")
    except errors.HFValidationError:
        raise InputError(f"{repo}: not the name of a repository (NAME/MODEL)") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(
                f"{repo}: the Hugging Face hub doesn't let you write there; log in with a token "
                "that may: hf auth login"
            ) from None
        raise OpenELMError(f"{repo}: uploading failed ({_first_line(error)})") from error
    except Exception as error:  # whatever the hub's HTTP client raises without a network
        raise OpenELMError(f"{repo}: uploading failed ({_first_line(error)})") from error
    return str(made.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _download(repo: str, patterns: Iterable[str], revision: str | None) -> Path:
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")) or repo.endswith("/"):
        raise InputError(f"{repo}: no such file or directory")
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.HFValidationError:
        raise InputError(f"{repo}: no such file or directory, nor a Hugging Face id") from None
    except errors.GatedRepoError:
        raise InputError(
            f"{repo}: access to this Hugging Face repository has to be asked for on its page; "
            "then log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo}: has no revision {revision!r} on the Hugging Face hub") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repo}: no such file or directory, nor a repository on the Hugging Face hub that is "
            "public or that you may see (hf auth login)"
        ) from None
    except Exception as error:  # whatever the hub's HTTP client raises without a network
        raise OpenELMError(
            f"{repo}: no such directory here, and the Hugging Face hub can't be reached "
            f"({_first_line(error)}); with a copy of the model on this machine, give the path of "
            "its directory"
        ) from error
