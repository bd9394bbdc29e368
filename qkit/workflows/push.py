"""A result on the Hugging Face Hub: what of it is uploaded, and the upload.

Uploaded are the files that its record lists, the record and the card: what qkit wrote and what it copied from the source, and
nothing else that lies there. What arrived is compared with the record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.errors import BadInput, IOFailure, QkitError, UsageError, VerifyFailure
from qkit.files.card import CARD, read_card
from qkit.files.card_head import head_fields
from qkit.files.output import REJECTED, result_files
from qkit.files.owned import files_below
from qkit.files.safefile import sha256_file
from qkit.system.version import __version__
from qkit.verification.verify import summary, verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BRANCH = "main"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")


@dataclass(frozen=True)
class Upload:
    """A file of the result. sha256: of its content as it was when the folder was verified"""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Push:
    """What goes where. left_out: files of the folder that do not go; notes: what a reader of the repository will miss"""

    repository: str
    revision: str
    private: bool
    message: str
    files: tuple[Upload, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-able dictionary."""
        return {**asdict(self), "bytes": self.bytes}


def plan_push(
    out: Path, repository: str, revision: str | None = None, private: bool = False, message: str | None = None
) -> Push:
    """What would be uploaded, with no word to the hub. Raises VerifyFailure for a folder that is not sound, UsageError for a
    name that no repository can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        said = str(e).splitlines()[0].rstrip(".")
        raise UsageError(f"{repository}: {said}: write OWNER/NAME, for instance me/model-w4a16") from None
    report = verify(out)
    if not report.ok:
        raise VerifyFailure(f"{out}: nothing is uploaded, because the folder is not sound: {summary(report)}")
    present, listed = files_below(out), result_files(out) | {CARD}
    names = [name for name in present if name in listed and Path(name).name != REJECTED]
    return Push(
        repository=repository,
        revision=revision or BRANCH,
        private=private,
        message=message or f"Quantized with qkit {__version__}",
        files=tuple(Upload(n, (out / n).stat().st_size, sha256_file(out / n)) for n in names),
        left_out=tuple(name for name in present if name not in names),
        notes=(*report.notes, *_card_notes(out)),
    )


def _card_notes(out: Path) -> Iterator[str]:
    fields = head_fields(read_card(out)) or {}
    if not fields.get("base_model"):
        yield (
            f"the head of {CARD} names no base_model, so that the hub does not list this under its model: add "
            "'base_model: OWNER/NAME' and 'base_model_relation: quantized'"
        )
    if not fields.get("license"):
        yield f"the head of {CARD} names no license: add that of the model"


def push(out: Path, planned: Push) -> str:
    """Upload, in one commit, and compare what is there with what was sent; gives the address of the commit.

    Raises UsageError without a token or where a public repository was to be private, IOFailure for what the hub or the network
    refuses, BadInput for a card that the hub cannot read.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    with _told(planned.repository):
        if get_token() is None:
            raise UsageError(
                f"{planned.repository}: there is no token for the hub: run 'hf auth login', or set HF_TOKEN"
            )
        api = HfApi(library_name="qkit", library_version=__version__)
        api.create_repo(planned.repository, private=planned.private or None, exist_ok=True)
        if planned.private and not api.model_info(planned.repository).private:
            raise UsageError(
                f"{planned.repository}: this repository is there and is public: make it private on the hub, use another "
                "name, or leave --private out"
            )
        if planned.revision != BRANCH:
            api.create_branch(planned.repository, branch=planned.revision, exist_ok=True)
        added = [CommitOperationAdd(path_in_repo=f.name, path_or_fileobj=str(out / f.name)) for f in planned.files]
        commit = api.create_commit(planned.repository, added, commit_message=planned.message, revision=planned.revision)
        _compare(api, planned, out, commit.oid)
    return str(commit.commit_url)


def strangers(planned: Push) -> list[str]:
    """Weights in the repository that are not of this result: loaders may take them for a part of it."""
    from huggingface_hub import HfApi

    names = {file.name for file in planned.files}
    with _told(planned.repository):
        there = HfApi().list_repo_files(planned.repository, revision=planned.revision)
    return sorted(name for name in there if name not in names and name.endswith(_WEIGHTS))


def _compare(api: HfApi, planned: Push, out: Path, commit: str) -> None:
    """Raises IOFailure for a file that did not arrive, or not as it was sent."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(planned.repository, recursive=True, revision=commit)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    for file in planned.files:
        entry = there.get(file.name)
        if entry is None:
            arrived = False
        elif entry.lfs is not None:
            arrived = entry.lfs.sha256 == file.sha256
        else:
            arrived = entry.blob_id == _blob_id((out / file.name).read_bytes())
        if not arrived:
            what = "is not there" if entry is None else "is not as it was sent"
            raise IOFailure(f"{planned.repository}: {file.name} {what} after the upload: run the same command again")


def _blob_id(content: bytes) -> str:
    """The name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Raises in one sentence what the hub and the network refuse."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        yield
    except QkitError:
        raise
    except HfHubHTTPError as e:
        raise IOFailure(_refusal(repository, e.response.status_code, e.server_message)) from e
    except OfflineModeIsEnabled as e:
        raise IOFailure(f"{repository}: HF_HUB_OFFLINE forbids the network: unset it") from e
    except ValueError as e:  # of the check of the card, and of files that the hub does not take
        first, *others = [line.strip(" -") for line in str(e).splitlines() if line.strip(" -")] or [
            "no reason is given"
        ]
        said = f"{first.rstrip('.')} {others[0] if others else ''}".strip()
        if "README.md" in first:
            raise BadInput(f"{repository}: the hub cannot read the head of {CARD}: {said}: correct it") from e
        raise IOFailure(f"{repository}: the hub refuses a file: {said}") from e
    except (HTTPError, RuntimeError, OSError) as e:
        cause = e.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise IOFailure(_refusal(repository, cause.response.status_code, cause.server_message)) from e
        said = (str(cause or e).splitlines() or [type(e).__name__])[0]
        raise IOFailure(
            f"{repository}: the hub cannot be reached ({said}): check the network, then run the command again"
        ) from e


def _refusal(repository: str, status: int, said: str | None) -> str:
    """A sentence for a refusal of the hub. said: its own words"""
    words = " ".join((said or "").split()).rstrip(".")
    reason = f", {words}" if words else ""
    advice = {
        401: "log in with a token that is valid ('hf auth login', or HF_TOKEN)",
        402: "free or buy storage there",
        403: "use a token that may write to it, or free storage there if that is the reason",
        404: "check the name of its owner",
        413: "free or buy storage there",
        429: "wait, then run the same command again",
        507: "free or buy storage there",
    }.get(status, "run the same command again later")
    return f"{repository}: the hub refuses the upload (HTTP {status}{reason}): {advice}"
