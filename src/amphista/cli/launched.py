"""What a launcher (`accelerate launch`, `torchrun`) told this process; alone without one."""

from __future__ import annotations

import os


def own_device(asked: str | None) -> str | None:
    """The device asked for, or one accelerator a process where a launcher started several on this machine."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    if asked in (None, "cuda") and rank is not None and torch.cuda.is_available():
        return f"cuda:{rank}"
    return asked


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"
