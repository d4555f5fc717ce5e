"""What can be compared, and how each is run: our engine with any drafter and tree, and stock `generate`.

A method is written `name[=drafter][@tree]`. Names of METHODS are built in; any other name is a drafter: a shipped one
(`amphista`, `medusa`: heads alone), `lookup`, both (`amphista+lookup`) or, with `=`, a folder or hub id under a name of
the user's choice. A new kind of method is one line in METHODS.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from amphista.drafter.base import Drafter
from amphista.drafter.checkpoint import DRAFTERS, load_proposer, shipped_for
from amphista.drafter.proposer import Proposer
from amphista.drafter.scoring import ScoringDrafter
from amphista.engine.batch import Batch, Job
from amphista.engine.costs import costs_for
from amphista.engine.params import SamplingParams
from amphista.engine.stream import Answer
from amphista.errors import AmphistaError, ConfigError
from amphista.evaluation.stock import StockGenerate, assisted, plain, prompt_lookup
from amphista.llm import LLM
from amphista.target.target import Target
from amphista.tree.grow import DEFAULT_TREE, AutoGrower, check_tree

logger = logging.getLogger("amphista")

NONE, HF = "none", "hf"


class Method(Protocol):
    """One way to decode. `settings` says in plain JSON what runs; it goes into the run's record."""

    settings: dict[str, Any]

    def run(self, prompt_ids: list[int], params: SamplingParams) -> dict[str, Any]:
        """Answer one prompt: the measured fields of a Record."""


@dataclass(frozen=True)
class MethodSpec:
    """A parsed method: the name it goes by in a run, what builds it, and its two settings."""

    name: str
    kind: str
    drafter: str | None = None
    tree: str | None = None


def parse_methods(text: str | Sequence[str]) -> list[MethodSpec]:
    """`none,medusa@16,mine=runs/best@16` -> specs with distinct names; `none` is put first where it is missing.

    A method goes by its name alone, and by `name@tree` where a name stands more than once.
    """
    parts = [part.strip() for part in (text.split(",") if isinstance(text, str) else text)]
    if not any(parts) or not all(parts):
        raise ConfigError(f"--methods {text!r}: expected one or more of name[=drafter][@tree], separated by commas")
    specs = [_parse(part) for part in parts]
    if all(spec.kind != NONE for spec in specs):
        specs.insert(0, MethodSpec(NONE, NONE))
    specs.sort(key=lambda spec: spec.kind != NONE)
    counts = Counter(spec.name for spec in specs)
    named = [
        MethodSpec(f"{spec.name}@{spec.tree or DEFAULT_TREE}", spec.kind, spec.drafter, spec.tree)
        if counts[spec.name] > 1
        else spec
        for spec in specs
    ]
    twice = [name for name, count in Counter(spec.name for spec in named).items() if count > 1]
    if twice:
        raise ConfigError(f"--methods names {twice[0]!r} twice: give distinct names, as in first=PATH,second=PATH")
    return named


def _parse(part: str) -> MethodSpec:
    name, equals, value = part.partition("=")
    rest = value if equals else name
    tree: str | None = None
    head, at, tail = rest.rpartition("@")
    if at and not Path(rest).expanduser().exists():
        rest, tree = head, tail
        check_tree(tree)
    drafter = rest if equals else None
    name = name if equals else rest
    if not name or (equals and not rest):
        raise ConfigError(f"--methods: {part!r} is not of the form name[=drafter][@tree]")
    if name not in METHODS:
        return MethodSpec(name, "drafter", drafter or name, tree)
    if drafter and name != "hf-assisted":
        raise ConfigError(f"--methods: {part!r}: {name} takes no drafter; give your drafter another name")
    if name == "hf-assisted" and not drafter:
        raise ConfigError("--methods: hf-assisted needs a draft model with the target's vocabulary: hf-assisted=PATH")
    if tree and name != "hf-lookup":
        raise ConfigError(f"--methods: {part!r}: {name} grows no tree")
    if tree and not (tree.isdigit() and int(tree) > 1):
        raise ConfigError(f"--methods: {part!r}: hf-lookup drafts chains: give a number of nodes, at least 2")
    return MethodSpec(name, name, drafter, tree)


@dataclass(frozen=True)
class MethodSettings:
    """What all methods of a run share: the tree of methods that name none, and whether other targets' drafters load."""

    tree: str | None = None
    allow_other_target: bool = False


def build_method(spec: MethodSpec, target: Target, settings: MethodSettings) -> Method:
    """Load what a method needs; errors name the method."""
    try:
        return METHODS.get(spec.kind, _drafter)(spec, target, settings)
    except AmphistaError as error:
        raise type(error)(f"method {spec.name}: {error}") from error


class Ours:
    """Our engine with a drafter and a tree; `none` is the same engine with the root alone."""

    def __init__(self, target: Target, drafter: Proposer, tree: str | None, settings: dict[str, Any]) -> None:
        self.llm = LLM(target, drafter, tree=tree)
        self.settings = settings | {"dtype": target.type_name, "path": target.path}

    def prepare(self, num_rows: int) -> None:
        """Record forwards and drafts now, unmeasured, where the device records them."""
        self.llm.engine.prepare(num_rows)

    def run(self, prompt_ids: list[int], params: SamplingParams) -> dict[str, Any]:
        """Every turn is a fresh request: no method profits from the caches of the turn before."""
        stream = self.llm.stream_ids(prompt_ids, params)
        pieces = [result.text for result in stream.steps()]
        return self._measured(stream.answer, pieces)

    def run_together(
        self, asked: Sequence[tuple[list[int], SamplingParams]], batch_size: int
    ) -> list[dict[str, Any] | BaseException]:
        """Answer several, so many at a time: the same of each, or what it failed with. An answer's seconds are those of
        every step it took part in."""
        found: dict[int, dict[str, Any] | BaseException] = {}
        jobs = [Job(prompt_ids, params, index) for index, (prompt_ids, params) in enumerate(asked)]
        for finished in Batch[int](self.llm.engine, batch_size).run(jobs):
            answer = self.llm.answer_of(finished)
            found[finished.job.tag] = finished.error or self._measured(answer, [answer.text])
        return [found[index] for index in range(len(asked))]

    @staticmethod
    def _measured(answer: Answer, pieces: list[str]) -> dict[str, Any]:
        stats = answer.stats
        return {
            "token_ids": answer.token_ids,
            "pieces": pieces,
            "accepted": stats.accepted,
            "expected": [round(expected, 4) for expected in stats.expected],
            "tree_nodes": stats.tree_nodes,
            "drafted": [int(asked) for asked in stats.drafted],
            "step_seconds": stats.step_seconds,
            "seconds": stats.seconds,
            "prefill_seconds": stats.prefill_seconds,
            "phase_seconds": stats.phase_seconds,
            "finish_reason": str(answer.finish_reason),
        }


def costs_of(method: Method) -> dict[str, Any] | None:
    """The measured costs of a drafting method's steps, in milliseconds: those that its `auto` trees weigh, measured
    where its trees weigh none. They belong to the machine, not to the settings of a run."""
    if not isinstance(method, Ours) or method.llm.drafter.proposes_nothing:
        return None
    grower = method.llm.engine.grower
    costs = grower.costs if isinstance(grower, AutoGrower) else costs_for(method.llm.target, method.llm.drafter)
    verify = [round(1000 * seconds, 3) for seconds in costs.verify]
    return {"verify_ms": verify, "draft_ms": 1000 * costs.draft, "round_ms": 1000 * costs.further_round}


def _none(spec: MethodSpec, target: Target, settings: MethodSettings) -> Method:
    return Ours(target, Proposer(), "1", {"engine": "amphista", "drafter": "none", "tree": "1"})


def _drafter(spec: MethodSpec, target: Target, settings: MethodSettings) -> Method:
    assert spec.drafter is not None
    drafter = load_proposer(
        spec.drafter,
        target.spec,
        target.shared,
        target.fingerprint,
        allow_other_target=settings.allow_other_target,
    )
    tree = spec.tree or settings.tree
    described = {
        "engine": "amphista",
        "drafter": drafter.name,
        "tree": str(tree or DEFAULT_TREE),
        "drafter_weights": 0 if drafter.heads is None else drafter.heads.num_weights,
        "drafter_sha256": _weights_sha256(drafter.heads),
    }
    return Ours(target, drafter, tree, described)


def _weights_sha256(heads: Drafter | None) -> str:
    """Identifies a drafter by its weights, so that a resumed run cannot go on with another one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(({} if heads is None else heads.state_dict()).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hf(spec: MethodSpec, target: Target, settings: MethodSettings) -> Method:
    return StockGenerate(target.stock(), plain())


def _hf_lookup(spec: MethodSpec, target: Target, settings: MethodSettings) -> Method:
    return StockGenerate(target.stock(), prompt_lookup(spec.tree))


def _hf_assisted(spec: MethodSpec, target: Target, settings: MethodSettings) -> Method:
    assert spec.drafter is not None
    return StockGenerate(target.stock(), assisted(spec.drafter, target))


METHODS: dict[str, Callable[[MethodSpec, Target, MethodSettings], Method]] = {
    NONE: _none,
    HF: _hf,
    "hf-lookup": _hf_lookup,
    "hf-assisted": _hf_assisted,
}


def timed_drafters(text: str, target: Target, *, allow_other_target: bool = False) -> dict[str, ScoringDrafter]:
    """`NAME[=DRAFTER],...` -> drafters by name, for timing; a kind not shipped for the target is left out, and told.

    `none` or nothing: no drafter. A drafter without heads has nothing to time.
    """
    drafters: dict[str, ScoringDrafter] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, place = part.partition("=")
        if name in drafters:
            raise ConfigError(f"--drafters names {name!r} twice: give distinct names, as in first=PATH,second=PATH")
        if part == NONE:
            continue
        if not place and name in DRAFTERS and shipped_for(name, target.fingerprint) is None:
            logger.info(f"no {name} drafter is shipped for {target.name}: none is timed")
            continue
        heads = load_proposer(
            place or name, target.spec, target.shared, target.fingerprint, allow_other_target=allow_other_target
        ).heads
        if isinstance(heads, ScoringDrafter):
            drafters[name] = heads
    return {name: drafter.freeze(native=target.is_native) for name, drafter in drafters.items()}
