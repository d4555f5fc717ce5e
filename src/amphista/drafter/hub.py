"""The Hugging Face hub: fetch a folder. Network and token live here; every failure is one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amphista.errors import DrafterError, first_line


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
