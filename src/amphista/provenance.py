"""What made an artifact: versions, machine, git state and command, stored beside every checkpoint and record."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("amphista", "torch", "transformers", "tokenizers", "safetensors", "numpy", "accelerate")


def versions() -> dict[str, str]:
    """Installed versions of what decides results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and threads torch may use, accelerator if any."""
    import torch

    record: dict[str, Any] = {
        "processor": _processor(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        record["accelerator"] = torch.cuda.get_device_name()
    return record


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state() -> str | None:
    """Commit of the checkout this package runs from, with '+' when it has local changes; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed inside somebody's checkout: not that one
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def shortened(word: str) -> str:
    """`/a/b/c` -> `c`, `--data=/a/b/c` -> `--data=c`."""
    name, equals, value = word.rpartition("=")
    return name + equals + Path(value).name if value.startswith("/") else word


def record() -> dict[str, Any]:
    """All of it, as one JSON object. Arguments that are absolute paths are shortened to their last part."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": " ".join(shortened(word) for word in sys.argv),
        "git": git_state(),
        "versions": versions(),
        "machine": machine(),
    }
