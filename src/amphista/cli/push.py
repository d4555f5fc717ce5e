"""amphista dev push: upload a drafter's folder to the Hugging Face hub.

amphista dev push runs/amphista/best owner/name --dry-run
amphista dev push runs/amphista/best owner/name --private
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="A drafter's folder: OUT/best of train, or --out of convert.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: owner/name on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and list what would be uploaded; ask nobody.")
    ] = False,
) -> None:
    """Check a drafter's folder and its card, then upload them; needs a token (hf auth login, or HF_TOKEN)."""
    from amphista.drafter.hub import check_repo_id
    from amphista.drafter.publish import publishable_files
    from amphista.drafter.publish import push as upload

    if not dry_run:
        print(upload(folder, repo_id, private=private))
        return
    check_repo_id(repo_id)
    files = publishable_files(folder)
    for file in files:
        print(f"{file.stat().st_size:>14,}  {file.name}")
    total = sum(file.stat().st_size for file in files)
    print(f"{total:>14,}  bytes in {len(files)} files would go to {repo_id}{' (private)' if private else ''}")
