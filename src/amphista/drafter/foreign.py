"""Folders and files that are no drafters of ours: what each is, and the way on where there is one.

Judged by file names, config.json and the names of tensors; no tensor is read, nothing is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

OTHER_KIND = "another kind of drafter, not supported: train one for this target (`amphista train`), or use lookup"
NAMING_KEYS = ("model_type", "speculators_model_type", "architectures")
MEDUSA_TENSOR = re.compile(r"medusa_heads?\.|\d+\.\d+\.linear\.weight$|blocks\.\d+\.layers\.\d+\.")
EAGLE_TENSOR = re.compile(r"fc\.weight$|d2t$|midlayer\.")
MAX_FILES, MAX_INDEX_BYTES = 3, 1 << 26


@dataclass(frozen=True)
class Found:
    """What a folder shows of itself, in lower case."""

    path: Path
    config: Mapping[str, Any]

    @cached_property
    def names(self) -> str:
        """Architectures and model types that config.json names."""
        values = [self.config.get(key) for key in NAMING_KEYS]
        words = [word for value in values for word in (value if isinstance(value, list) else [value])]
        return " ".join(word.lower() for word in words if isinstance(word, str))

    @cached_property
    def files(self) -> list[str]:
        try:
            return sorted(file.name.lower() for file in self.path.iterdir())
        except OSError:
            return []

    @cached_property
    def tensors(self) -> list[str]:
        """Names of the tensors in its safetensors files, or in their index."""
        found: list[str] = []
        files = [*self.path.glob("*.safetensors.index.json"), *self.path.glob("*.safetensors")]
        for file in sorted(files)[:MAX_FILES]:
            found += _names_in(file)
        return found

    def mentions(self, word: str) -> bool:
        """Whether configuration, files or tensors have this word in their names."""
        return any(word in name for name in (self.names, *self.config, *self.files, *self.tensors))

    def has_tensor(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.match(name) for name in self.tensors)

    @property
    def is_one_layer(self) -> bool:
        """Whether it is called a model, but has one layer and no embedding to be seen, as EAGLE heads are published."""
        return self.config.get("num_hidden_layers") == 1 and not any("embed" in name for name in self.tensors)

    @property
    def shown_names(self) -> str:
        return f" ({self.names[:60]})" if self.names else ""


def _names_in(file: Path) -> Iterable[str]:
    try:
        if file.suffix == ".json":
            if file.stat().st_size > MAX_INDEX_BYTES:
                return []
            return list(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        with safe_open(file, framework="pt") as stored:
            return list(stored.keys())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return []


Rule = tuple[Callable[[Found], bool], str]
RULES: tuple[Rule, ...] = (
    (
        lambda f: "best" in f.files and "log.jsonl" in f.files,
        "the folder of a training run: give its drafter, {source}/best",
    ),
    (
        lambda f: f.mentions("hydra"),
        "a published Hydra checkpoint: convert it first, `amphista convert hydra {source} --target TARGET --out DIR`",
    ),
    (
        lambda f: f.mentions("medusa") or f.has_tensor(MEDUSA_TENSOR),
        "a published Medusa checkpoint: convert it first, `amphista convert medusa {source} --target TARGET --out DIR`",
    ),
    (
        lambda f: f.mentions("eagle") or f.has_tensor(EAGLE_TENSOR) or f.is_one_layer,
        "an EAGLE head{names} or one of its kin, " + OTHER_KIND,
    ),
    (
        lambda f: f.mentions("speculator") or "speculators_config" in f.config,
        "a speculator of another project{names}, " + OTHER_KIND,
    ),
    (
        lambda f: "adapter_config.json" in f.files or "peft_type" in f.config,
        "a PEFT adapter, which changes a target: merge it into its model and give that as --target",
    ),
    (
        lambda f: any(file.endswith(".gguf") for file in [f.path.name.lower(), *f.files]),
        "a GGUF file or holds one: that is a target, give the file as --target",
    ),
    (
        lambda f: bool(f.names),
        "a whole model{names}, not a drafter of ours: give it as --target. A second model as the drafter is not "
        "supported",
    ),
)


def what_it_is(path: Path, config: Mapping[str, Any], source: str) -> str:
    """One sentence on what was given as a drafter, under the name that the user gave it."""
    found = Found(path, config)
    for applies, sentence in RULES:
        if applies(found):
            return f"{source} is {sentence.format(source=source, names=found.shown_names)}"
    if not path.is_dir():
        return f"{source} is a file: expected a drafter's folder, with config.json and model.safetensors"
    if not config:
        return f"{source} holds no config.json: expected a drafter checkpoint"
    return f"{source} is no drafter of ours: its config.json names neither a format nor a drafter"
