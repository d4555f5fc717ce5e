"""Lines of data files that could not be used: counted, the first ones named, never a reason to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMED = 3  # the first so many lines are named


@dataclass
class LeftOut:
    """How many lines were left out, and the first ones with file, line and reason."""

    count: int = 0
    first: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, path: Path, reason: object) -> None:
        """reason: a sentence that begins with the path and the line."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append((path, str(reason)))

    def sentence(self) -> str:
        """For people; empty where nothing was left out."""
        if not self.count:
            return ""
        more = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"{self.count} lines left out: {'; '.join(reason for _, reason in self.first)}{more}"

    def record(self) -> dict[str, Any]:
        """For provenance, without anyone's folders."""
        return {"lines": self.count, "first": [reason.replace(str(path), path.name) for path, reason in self.first]}
