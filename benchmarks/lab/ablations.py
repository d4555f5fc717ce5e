"""Many training runs that differ in one thing each, from one plan: what is missing is run, what is there is kept.

    python -m benchmarks.lab ablate recipes/ablations.toml --data answers.jsonl.gz --out runs/ablations

A plan holds `[base]` (a training recipe), `[runs.NAME]` (what differs) and `seeds`; runs that `[search.rates]` names
first find their learning rate on a few steps of the first seed, for themselves and for the others of their drafter.
Every run sees the same rows, batches and steps. OUT/<run>-seed<n>/ is a training folder; result.json in it says that
it is finished.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amphista.config import build, read_recipe
from amphista.drafter.checkpoint import DRAFTERS, read_checkpoint
from amphista.errors import ConfigError
from amphista.files import check_same_run, read_json, write_json
from amphista.target.target import Target
from amphista.train.config import TrainConfig
from amphista.train.trainer import OnStep, Report, Trainer

CHOSEN_AT_NODES = "16"
RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Learning rates to try by run, `max_steps` each. Other runs take that found for the first run of their drafter."""

    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    max_steps: int = 250


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A file of ablations."""

    base: dict[str, Any]
    runs: dict[str, Any]
    seeds: tuple[int, ...] = (0, 1)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds:
            raise ConfigError("a plan of ablations needs [runs.NAME] sections and seeds")
        unknown = [name for name in self.search.rates if name not in self.runs]
        if unknown:
            raise ConfigError(f"[search.rates] names {unknown[0]!r}: expected some of the runs {', '.join(self.runs)}")
        for name in self.runs:
            config = self.config(name, 0, None, ())  # unknown settings are found before anything runs
            if config.drafter not in DRAFTERS:
                raise ConfigError(
                    f"runs.{name}: unknown drafter {config.drafter!r}: expected one of {', '.join(DRAFTERS)}"
                )
            build(DRAFTERS[config.drafter][0], config.model, f"runs.{name}.model")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """From a TOML file."""
        return build(cls, read_recipe(path))

    def config(self, name: str, seed: int, rate: float | None, files: Sequence[str], **steps: int) -> TrainConfig:
        """The training run of that name."""
        values = merged(self.base, self.runs[name])
        optimizer = {**values.get("optimizer", {}), **({} if rate is None else {"learning_rate": rate}), **steps}
        data = {**values.get("data", {}), "files": list(files)}
        return build(TrainConfig, {**values, "optimizer": optimizer, "data": data, "seed": seed}, f"runs.{name}")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` on top of `base`, section by section."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


class Ablations:
    """A plan on its way in one folder."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        files: Sequence[Path],
        out: Path,
        report: Report,
        on_step: OnStep | None = None,
    ) -> None:
        self.target, self.plan, self.out, self.report, self.on_step = target, plan, out, report, on_step
        self._files = [str(path) for path in files]
        self._digest = _digest(files)

    def run(self, only: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Do all that is missing, first seeds first; returns every finished result of the plan.

        only: names of runs; results of the others are kept and returned, but nothing of them is run.
        """
        unknown = [name for name in only if name not in self.plan.runs]
        if unknown:
            raise ConfigError(f"the plan has no run {unknown[0]!r}: expected some of {', '.join(self.plan.runs)}")
        rates = self._search(only)
        for seed in self.plan.seeds:
            for name in self.plan.runs:
                if not only or name in only:
                    config = self.plan.config(name, seed, rates.get(name), self._files)
                    self._finished(self._folder(name, seed), name, config)
        return self.results()

    def results(self) -> list[dict[str, Any]]:
        """Results that are there, in the order of the plan."""
        places = (self._folder(name, seed) / RESULT for name in self.plan.runs for seed in self.plan.seeds)
        return [read_json(path) for path in places if path.is_file()]

    def drafters(self) -> dict[str, Path]:
        """The trained drafter of each run that is finished with its first seed there."""
        folders = {}
        for name in self.plan.runs:
            there = [self._folder(name, s) for s in self.plan.seeds if (self._folder(name, s) / RESULT).is_file()]
            if there:
                folders[name] = there[0] / "last"
        return folders

    def _search(self, only: Sequence[str]) -> dict[str, float]:
        """The learning rate of each run."""
        found: dict[str, float] = {}
        wanted = {self._searched(name) for name in only or self.plan.runs}
        for name, rates in self.plan.search.rates.items():
            if name not in wanted:
                continue
            taus: dict[float, float] = {}
            for rate in rates:
                steps = self.plan.search.max_steps
                config = self.plan.config(name, self.plan.seeds[0], rate, self._files, max_steps=steps)
                folder = self.out / f"search-{name}-{rate:g}"
                taus[rate] = _tau(self._finished(folder, name, config), CHOSEN_AT_NODES)
            found[name] = max(taus, key=lambda rate: taus[rate])
            tried = ", ".join(f"{rate:g}: {tau:.3f}" for rate, tau in taus.items())
            self.report(f"{name}: learning rate {found[name]:g} (tau at {CHOSEN_AT_NODES} nodes by rate: {tried})")
        return {name: found[run] for name in self.plan.runs if (run := self._searched(name)) in found}

    def _searched(self, name: str) -> str | None:
        """The run whose search decides the learning rate of this one."""
        if name in self.plan.search.rates:
            return name
        kinds = {run: self.plan.config(run, 0, None, ()).drafter for run in self.plan.runs}
        return next((run for run in self.plan.search.rates if kinds[run] == kinds[name]), None)

    def _finished(self, folder: Path, name: str, config: TrainConfig) -> dict[str, Any]:
        """The result in a folder, trained now where it is missing; refuses one of other settings or data."""
        settings = asdict(config)
        del settings["data"]["files"]
        identity = {"config": settings, "data_sha256": self._digest, "target": self.target.identity}
        place = folder / RESULT
        if place.is_file():
            result = read_json(place)
            check_same_run(f"{folder} holds another run", result["identity"], identity)
            return result
        self.report(f"{folder.name} ...")
        checkpoint = read_checkpoint(Trainer(self.target, config, folder, self.report, self.on_step).run())
        result = {"run": name, "seed": config.seed, "identity": identity, **checkpoint.training}
        result["parameters"] = _num_parameters(checkpoint.folder)
        write_json(place, result)
        shutil.rmtree(folder / "state", ignore_errors=True)  # three times the weights, and no longer needed
        return result

    def _folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-seed{seed}"


# -- the table --------------------------------------------------------------------------------------------------------


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per run: means over its seeds, and half the range of tau as the spread."""
    rows = []
    for name in dict.fromkeys(result["run"] for result in results):
        mine = [result for result in results if result["run"] == name]
        rows.append(
            {
                "run": name,
                "seeds": len(mine),
                "parameters": mine[0]["parameters"],
                "learning_rate": mine[0]["identity"]["config"]["optimizer"]["learning_rate"],
                "positions": mine[0]["progress"]["positions"],
                "tau": {
                    size: statistics.fmean(_tau(result, size) for result in mine) for size in ("4", "8", "16", "64")
                },
                "spread": _spread([_tau(result, CHOSEN_AT_NODES) for result in mine]),
                "tau_loop_free": statistics.fmean(_tau(r, CHOSEN_AT_NODES, "tau_loop_free") for r in mine),
                "acceptance": [statistics.fmean(shares) for shares in zip(*map(_acceptance, mine), strict=True)],
            }
        )
    return rows


def table_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown; `draft_ms`, where rows have it, is one draft for a tree of 16 nodes."""
    headers = ["run", "seeds", "weights", "lr", "draft ms", "tau at 4", "at 8", "at 16", "spread", "loop-free", "at 64"]
    yield "| " + " | ".join([*headers, "accepted at depth 1, 2, ..."]) + " |"
    yield "|---" * (len(headers) + 1) + "|"
    for row in rows:
        accepted = " ".join(f"{share:.3f}" for share in row["acceptance"])
        tau = row["tau"]
        cells = [
            row["run"],
            str(row["seeds"]),
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['learning_rate']:g}",
            f"{row['draft_ms']:.1f}" if "draft_ms" in row else "",
            f"{tau['4']:.3f}",
            f"{tau['8']:.3f}",
            f"{tau['16']:.3f}",
            f"±{row['spread']:.3f}",
            f"{row['tau_loop_free']:.3f}",
            f"{tau['64']:.3f}",
            accepted,
        ]
        yield "| " + " | ".join(cells) + " |"


def _tau(result: dict[str, Any], nodes: str, kind: str = "tau") -> float:
    """Greedy and sampled held-out answers together: their positions over the forwards these take."""
    parts = result["validation"].values()
    forwards = sum(float(part["positions"] / part[kind][nodes]) for part in parts)
    return float(sum(part["positions"] for part in parts)) / forwards


def _acceptance(result: dict[str, Any]) -> list[float]:
    """Both kinds of answers together, by forwards."""
    parts = result["validation"].values()
    forwards = [part["positions"] / part["tau"][CHOSEN_AT_NODES] for part in parts]
    weighted = [
        [share * n / sum(forwards) for share in part["acceptance"]] for part, n in zip(parts, forwards, strict=True)
    ]
    return [sum(shares) for shares in zip(*weighted, strict=True)]


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2


def _num_parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if name != "draft_ids"]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            for part in sorted(path.glob("rows-*.jsonl")) if path.is_dir() else [path]:
                digest.update(part.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
