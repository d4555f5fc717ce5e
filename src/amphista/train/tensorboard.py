"""The log a second time, as scalars for TensorBoard: what is a number, with lists numbered and names joined by '/'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from amphista.errors import ConfigError


class Writer(Protocol):
    """What is used of torch's SummaryWriter."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...
    def flush(self) -> None: ...


def open_writer(folder: Path, step: int) -> Writer:
    """Events go to `folder`; those of an earlier process behind `step` are dropped, since they come again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard = true needs the package tensorboard: pip install 'amphista[train]'") from error
    writer: Writer = SummaryWriter(str(folder), purge_step=step + 1)
    return writer


def write_record(writer: Writer, record: dict[str, Any]) -> None:
    """One record of log.jsonl."""
    for name, value in scalars(record):
        if name != "step":
            writer.add_scalar(name, value, record["step"])


def scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(joined name, number) of every number in nested records; lists are numbered from 1."""
    if isinstance(value, int | float):
        yield name, float(value)
        return
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value, start=1)
        for key, below in items:
            yield from scalars(below, f"{name}/{key}" if name else str(key))
