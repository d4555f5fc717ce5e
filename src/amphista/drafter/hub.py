"""The Hugging Face hub: fetch a folder, upload files. Network and token live here; every failure is one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amphista.errors import DrafterError


@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """How to reach the hub: by which token (default: the environment's or the login's), into which cache, or only what
    is in that already."""

    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_only: bool = False


def fetch(name: str, patterns: Sequence[str], access: HubAccess | None = None) -> Path:
    """A local copy of a repository's files that match the patterns; raises DrafterError.

    name: owner/name, or owner/name@revision.
    """
    from huggingface_hub import snapshot_download

    repo_id, _, revision = name.partition("@")
    access = access or HubAccess()
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision or None,
                allow_patterns=list(patterns),
                token=access.token,
                cache_dir=access.cache_dir,
                local_files_only=access.local_only,
            )
        )
    except Exception as error:  # the hub client raises its own dozen kinds
        raise DrafterError(f"cannot fetch drafter {repo_id!r} from the hub: {first_line(error)}") from error


def check_repo_id(repo_id: str) -> None:
    """Raise DrafterError unless the id reads owner/name, in the hub's characters."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DrafterError(f"{repo_id!r} is no repository id of the hub: {first_line(error)}") from error
    if repo_id.count("/") != 1:
        raise DrafterError(f"{repo_id!r} is no repository id of the hub: expected owner/name")


def upload(files: Sequence[Path], repo_id: str, *, private: bool) -> str:
    """Put files into a model repository in one commit, making it if need be; returns its address.

    The token is the hub client's own (`hf auth login`, or HF_TOKEN). Raises DrafterError, also before anything is sent
    when `private` is asked for and the repository is public: the hub would ignore the wish.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_repo_id(repo_id)
    if get_token() is None:
        raise DrafterError("uploading needs a token of the hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise DrafterError(f"{repo_id} is there already, and public: choose another name, or leave out --private")
        api.create_commit(repo_id, operations, commit_message="Upload drafter")
    except DrafterError:
        raise
    except Exception as error:  # the hub client raises its own dozen kinds
        raise DrafterError(f"cannot upload to {repo_id!r}: {first_line(error)}") from error
    return address


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
