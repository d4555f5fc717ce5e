"""RowStore: one process's place in a distillation folder; what is finished stays, whatever kills the process.

A finished conversation is in the journal before the next one ends: a kill loses none (a power cut: at most the last 5
seconds). A full journal becomes a shard; a kill between the two leaves both, and what stands in a shard is not taken
from the journal again. So after a resume nothing is lost and nothing is double.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from amphista.errors import ConfigError
from amphista.train.shards import (
    RUN,
    Answered,
    journal_line,
    read_journal,
    read_run,
    shard_ids,
    sync_folder,
    write_shard,
)

SYNC_SECONDS = 5.0
SHOWN = 40  # characters of a setting in an error


class RowStore:
    """Use as a context manager; `done` are the ids of this process's finished conversations."""

    def __init__(self, folder: Path, process: int, run: dict[str, Any], *, rows_per_shard: int) -> None:
        """Open or resume. run: what `run.json` is to hold; its `identity` must be that of a run already there.

        raises ConfigError when it is another run's folder, or when the same process runs twice.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, run)
        self._folder, self._process, self._rows_per_shard = folder, process, rows_per_shard
        self._vocab_size = run["identity"]["target"]["vocab_size"]
        path = folder / f"journal-{process}.jsonl"
        self._journal = path.open("ab")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._journal.close()
            raise ConfigError(
                f"another process is distilling into {path}: wait for its end or give another --out"
            ) from error
        shards = sorted(folder.glob(f"rows-{process}-*.safetensors"))
        numbers = [int(found[1]) for shard in shards if (found := re.search(r"-(\d+)\.safetensors$", shard.name))]
        self._next_shard = max(numbers, default=-1) + 1
        self.done = {name for shard in shards for name in shard_ids(shard)}
        lines, length = read_journal(path)
        self._journal.truncate(length)  # a torn last line
        self._pending = [answered for answered in lines if answered.id not in self.done]
        self.done.update(answered.id for answered in self._pending)
        self._synced = time.monotonic()

    def __enter__(self) -> RowStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

    def add(self, answered: Answered) -> None:
        """Keep a finished conversation."""
        assert answered.id not in self.done
        self._journal.write(journal_line(answered))
        self._journal.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._journal.fileno())
            self._synced = time.monotonic()
        self._pending.append(answered)
        self.done.add(answered.id)
        if sum(len(one.rows) for one in self._pending) >= self._rows_per_shard:
            self._write_shard()

    def finish(self) -> None:
        """Turn what is left of the journal into a last shard."""
        if self._pending:
            self._write_shard()
        (self._folder / f"journal-{self._process}.jsonl").unlink()

    def _write_shard(self) -> None:
        path = self._folder / f"rows-{self._process}-{self._next_shard:05d}.safetensors"
        write_shard(path, self._pending, self._vocab_size)
        self._journal.truncate(0)
        os.fsync(self._journal.fileno())
        self._next_shard += 1
        self._pending = []


def _claim(folder: Path, run: dict[str, Any]) -> None:
    """Write `run.json`, or make sure that the one there is of the same run."""
    path = folder / RUN
    if not path.exists():
        partial = folder / f"{RUN}.{os.getpid()}"
        partial.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(partial, path)  # unlike a rename it never replaces what another process has just written
        except FileExistsError:
            pass
        finally:
            partial.unlink()
        sync_folder(folder)
    here, there = _flat(json.loads(json.dumps(run["identity"]))), _flat(read_run(folder)["identity"])
    names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if names:
        listed = "; ".join(f"{n} is {_short(here.get(n))}, there it is {_short(there.get(n))}" for n in names[:5])
        raise ConfigError(f"{folder} holds another distillation: {listed}. Give the same settings or another --out")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
