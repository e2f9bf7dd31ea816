"""What the Hugging Face hub's client raises, as one line that says what to do."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

from ..errors import InputError, OpenELMError

LOG_IN = "hf auth login"
HUB = "the Hugging Face hub"
NOT_HERE = "no such file or directory, nor a"
NO_WRITING = (
    f"{HUB} doesn't let you write there; log in with a token that may write to this account or "
    f"organization: {LOG_IN}"
)
REFUSED = (
    f"{HUB} refuses your access token: it is invalid or has expired; log in again ({LOG_IN}), or "
    "do without a token (unset HF_TOKEN; hf auth logout)"
)

# What is wrong with what was given, by the name of the client's exception: when downloading, when
# uploading. A subclass comes before its base.
WRONG = {
    "HFValidationError": (
        f"{NOT_HERE} Hugging Face id",
        "not the name of a repository (NAME/MODEL)",
    ),
    "GatedRepoError": (
        "access to this Hugging Face repository has to be asked for on its page, "
        f"https://huggingface.co/{{repo}}; then log in with: {LOG_IN}",
        NO_WRITING,
    ),
    "DisabledRepoError": (f"{HUB} has disabled this repository",) * 2,
    "RevisionNotFoundError": (f"has no revision {{revision!r}} on {HUB}",) * 2,
    "RemoteEntryNotFoundError": (
        f"a file of the repository is missing on {HUB}; try again, it may just be changing",
    )
    * 2,
    "RepositoryNotFoundError": (
        f"{NOT_HERE} repository on {HUB} that is public or that you may see ({LOG_IN})",
        NO_WRITING,
    ),
    "LocalTokenNotFoundError": (f"needs a token: {LOG_IN}",) * 2,
}
# The same by HTTP status.
WRONG_STATUS = {
    401: (REFUSED, NO_WRITING),  # where no token was sent: see `_wrong`
    403: (
        f"{HUB} doesn't permit this with your access token; check the token's permissions, or log "
        f"in with another one: {LOG_IN}",
        NO_WRITING,
    ),
    404: (f"{HUB} has no such page; check HF_ENDPOINT",) * 2,
}
# What may pass by itself, or is wrong with the network.
FAILED_STATUS = {
    407: "the proxy wants a name and a password (HTTPS_PROXY=http://NAME:PASSWORD@HOST)",
    429: f"too many requests to {HUB}; try again in some minutes, or log in for more: {LOG_IN}",
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# What reading an answer raises that isn't the hub's
_MALFORMED = (json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError)


def explained(
    error: Exception, repo: str, revision: str | None = None, uploading: bool = False
) -> OpenELMError:
    """The error to raise in place of `error`, which the hub's client raised on `repo`."""
    causes = list(_chain(error))
    for cause in causes:
        wrong = _wrong(cause)
        if wrong:
            message = wrong[uploading].format(repo=repo, revision=revision)
            return InputError(f"{repo}: {message}")
    failed = next(filter(None, (_failed(cause, uploading) for cause in causes)), None)
    if failed is None:
        reason = next(filter(None, map(_first_line, reversed(causes))), type(error).__name__)
        failed = f"{HUB} can't be reached ({reason})"
        if not uploading:
            failed += "; with a copy of the model on this machine, give the path of its directory"
    what = "uploading" if uploading else "no such directory here, and downloading"
    return OpenELMError(f"{repo}: {what} failed: {failed}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _wrong(cause: BaseException) -> tuple[str, str] | None:
    names = [kind.__name__ for kind in type(cause).__mro__]
    found = next((messages for name, messages in WRONG.items() if name in names), None)
    said = getattr(getattr(cause, "response", None), "headers", {}).get("X-Error-Message", "")
    if "Invalid credentials" in said or "Invalid username or password" in said:
        return REFUSED, REFUSED
    if found is None and _status(cause) == 401 and not _sent_token(cause):
        return WRONG["RepositoryNotFoundError"]
    return found or WRONG_STATUS.get(_status(cause))


def _failed(cause: BaseException, uploading: bool) -> str | None:
    status = _status(cause)
    if status:
        sort = "has a failure" if status >= 500 else "refuses this"
        advice = "; try again later" if status >= 500 else ""
        return FAILED_STATUS.get(status, f"{HUB} {sort} (HTTP {status}){advice}")
    if isinstance(cause, OSError) and (cause.filename or cause.errno in _DISK):
        where = f"{cause.filename}: " if cause.filename else ""
        if uploading:
            return f"{where}{cause.strerror}"
        return (
            f"{HUB}'s cache can't be used ({where}{cause.strerror}); "
            "set HF_HOME to a directory that can be written and has room"
        )
    if type(cause).__name__ == "OfflineModeIsEnabled":
        if uploading:
            return "HF_HUB_OFFLINE is set; unset it"
        return (
            "it isn't in the cache, and HF_HUB_OFFLINE keeps this machine from asking the Hugging "
            "Face hub; unset it, or give the path of a directory"
        )
    if type(cause).__name__ == "ProxyError":
        return f"the proxy doesn't answer ({_first_line(cause)}); check HTTPS_PROXY"
    if "Consistency check failed" in str(cause):
        return "a file came incomplete; run the command again"
    if isinstance(cause, _MALFORMED) or type(cause).__name__ == "FileMetadataError":
        return (
            f"what answers isn't {HUB} ({type(cause).__name__}: {_first_line(cause)}); check "
            "HF_ENDPOINT, the proxy, and whether the network wants a login"
        )
    return None


def _status(cause: BaseException) -> int:
    """The HTTP status of a refused request; 0 for anything else."""
    status = getattr(getattr(cause, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else 0


def _sent_token(cause: BaseException) -> bool:
    request = getattr(getattr(cause, "response", None), "request", None)
    return "authorization" in getattr(request, "headers", {})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
