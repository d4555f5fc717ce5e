"""How much the joint node budget brings at every batch size, simulated from recorded drafts and measured costs.

python -m benchmarks.lab.simulate_budget record drafts.jsonl --data FOLDER    (some minutes, with the default target)
python -m benchmarks.lab.simulate_budget play drafts.jsonl

A recording holds, for every position of greedy Spec-Bench answers, the nodes that heads and n-gram draft offered
together and those of the n-gram draft alone, best first, and which were right: any policy can be played on it exactly.
Seconds are those of `benchmarks/zen5-2-cores/tune.txt`, on a straight line beyond 48 rows; asking the heads of k
sequences takes 1.6 ms and 0.1 ms for each further one. Steps scatter by 5 %. Nothing here is a measurement of a batch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from amphista.engine.params import SamplingParams
from amphista.evaluation.questions import load_questions
from amphista.llm import load
from amphista.tree.account import Account
from amphista.tree.budget import Claim, DraftRow, NodeBudget, Plan
from amphista.tree.candidates import Candidates, NgramDraft
from amphista.tree.children import GrownNodes, Growth
from amphista.tree.controller import DraftController
from amphista.tree.dynamic import best_first
from amphista.tree.grow import DynamicGrower
from amphista.tree.learned import Forward, StepCosts
from amphista.tree.token_tree import TokenTree
from amphista.tree.tune import Costs

TUNE = Path(__file__).parents[1] / "zen5-2-cores" / "tune.txt"
ALL_ROWS = 128
SIZES = (1, 2, 4, 8, 16, 32)
NOISE = 0.05
NUM_TOKENS, NUM_NODES = 160, 32


class Recorder(DynamicGrower):
    """Decodes plainly, and keeps what might have been verified."""

    def __init__(self) -> None:
        super().__init__(11)
        self.offered: list[tuple[GrownNodes, GrownNodes]]
        object.__setattr__(self, "offered", [])

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> Growth:
        both = best_first(pending, candidates, NUM_NODES, max_depth)
        ngram = best_first(pending, Candidates([], [], candidates.graft), NUM_NODES, max_depth)
        self.offered.append((both, ngram))
        return Growth.of(both, 1)


def record(out: Path, data: Path, limit: int) -> None:
    """Write a recording of the first turns of some Spec-Bench questions."""
    llm = load(drafter="amphista+lookup", tree=1)
    with out.open("w", encoding="utf-8") as lines:
        for question in load_questions("spec_bench", data, limit).questions:
            llm.engine.grower = recorder = Recorder()
            ids = llm.prompt_ids(question.turns[0])
            text = llm.engine.decode(ids, SamplingParams(max_new_tokens=NUM_TOKENS)).output_ids
            steps = [
                {"both": _scores(both), "both_right": _right(both, text[at + 1 :])}
                | {"ngram": _scores(ngram), "ngram_right": _right(ngram, text[at + 1 :])}
                for at, (both, ngram) in enumerate(recorder.offered)
            ]
            lines.write(json.dumps({"id": question.id, "steps": steps}) + "\n")


def _scores(grown: GrownNodes) -> list[float]:
    return [round(math.exp(score), 4) for score in grown.scores[1:]]


def _right(grown: GrownNodes, text: list[int]) -> list[int]:
    """The nodes whose path is the text."""
    depth, right = {0: 0}, []
    for node in range(1, grown.num_nodes):
        above = depth.get(grown.parents[node], len(text))
        if above < len(text) and text[above] == grown.tokens[node]:
            depth[node] = above + 1
            right.append(node)
    return right


def tuned() -> Costs:
    """The machine's costs, in milliseconds."""
    lines = re.findall(r"^ +(\d+) +([\d.]+) +[\d.]+ +[\d.]+$", TUNE.read_text(encoding="utf-8"), re.MULTILINE)
    verify = {int(rows): float(ms) for rows, ms in lines}
    slope = (verify[48] - verify[32]) / 16
    verify[ALL_ROWS] = verify[48] + slope * (ALL_ROWS - 48)
    costs = Costs.measured(verify, 1.6)
    return Costs(costs.verify, costs.draft, drafted=0.1)


@dataclass
class Answer:
    """One recorded answer that is being played: where it stands, and how many plain steps its time was worth."""

    steps: list[dict[str, Any]]
    controller: DraftController = field(default_factory=DraftController)
    at: int = 0
    plain_steps: float = 0.0

    @property
    def row(self) -> DraftRow:
        scores = [0.0, *map(_log, self.steps[self.at]["ngram"])]
        log_probs = [below - above for above, below in pairwise(scores)]
        graft = NgramDraft([1] * len(log_probs), log_probs) if log_probs else None
        return DraftRow(self.controller, graft, max_depth=len(self.steps) - 1 - self.at)

    def scores(self, *, asked: bool) -> Iterator[float]:
        return map(_log, self.steps[self.at]["both" if asked else "ngram"])

    @property
    def is_over(self) -> bool:
        return self.at >= len(self.steps)

    def growth(self, num_nodes: int, *, asked: bool) -> Growth:
        """A tree of so many nodes, whatever its shape, and what it claims."""
        claimed = sum(self.steps[self.at]["both" if asked else "ngram"][: num_nodes - 1])
        return Growth(TokenTree(list(range(num_nodes)), list(range(-1, num_nodes - 1))), claimed)

    def accept(self, num_nodes: int, *, asked: bool) -> list[int]:
        """Accepted tokens, 1 where the n-gram draft was right, else 0; moves on."""
        step = self.steps[self.at]
        right = [node for node in step["both_right" if asked else "ngram_right"] if node < num_nodes]
        self.at += 1 + len(right)
        return [int(step["ngram_right"][:1] == [1])] * len(right)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -1e9


class Unguarded(Account):
    """An account that stays even, whatever happens."""

    def book(self, num_tokens: int, plain_steps: float) -> None:
        pass


class EachAlone(NodeBudget):
    """Every sequence decides as if it were alone."""

    def whom_to_ask(self, rows: Sequence[DraftRow], plain: Forward) -> list[int]:
        self.asked = [bool(super(EachAlone, self).whom_to_ask([row], Forward(1))) for row in rows]
        return [b for b, asked in enumerate(self.asked) if asked]

    def share(
        self, rows: Sequence[DraftRow], scores: Sequence[Iterator[float]], num_asked: int, plain: Forward
    ) -> list[int]:
        parts = zip(rows, scores, self.asked, strict=True)
        return [super(EachAlone, self).share([row], [nodes], asked, Forward(1))[0] for row, nodes, asked in parts]


class PlainSum(NodeBudget):
    """The batch's tokens per second, whoever gets them."""

    def _share(
        self, claims: Sequence[Claim], forward: Forward, *, least: int = 0, worth: float = 1.0
    ) -> list[list[float]]:
        seconds = self.costs.by_rows(forward)
        offers = [(math.exp(score), b) for b, claim in enumerate(claims) for score in claim.scores]
        offers.sort(key=lambda offer: -offer[0])
        tokens, best, best_rate = float(len(claims)), 0, worth * len(claims) / seconds(forward.num_rows)
        for count, (probability, _) in enumerate(offers[: ALL_ROWS - len(claims)], start=1):
            tokens += probability
            if (rate := tokens / seconds(forward.num_rows + count)) > best_rate:
                best, best_rate = count, rate
        return [[probability for probability, b in offers[:best] if b == row] for row in range(len(claims))]

    def _best_prefix(
        self, rows: Sequence[DraftRow], shares: list[list[float]], gains: dict[int, float], plain: Forward
    ) -> list[int]:
        forward = plain._replace(num_rows=plain.num_rows + sum(map(len, shares)))
        tokens, extra = float(len(rows) + sum(map(sum, shares))), 0.0
        order, best, best_rate = sorted(gains, key=lambda b: -gains[b]), 0, tokens / self.costs.seconds(forward)
        for count, b in enumerate(order, start=1):
            tokens, extra = tokens + gains[b], extra + rows[b].controller.row_seconds
            if (rate := tokens / (self.costs.seconds(forward._replace(num_asked=count)) + extra)) > best_rate:
                best, best_rate = count, rate
        return order[:best]


POLICIES: dict[str, tuple[type[NodeBudget], type[Account]]] = {
    "each alone": (EachAlone, Unguarded),
    "plain sum": (PlainSum, Unguarded),
    "mean of logs": (NodeBudget, Unguarded),
    "mean of logs, accounts": (NodeBudget, Account),
}


class Game:
    """A batch that is refilled as soon as an answer ends; its figures are those of full batches."""

    def __init__(self, recording: list[list[dict[str, Any]]], budget: NodeBudget, account: type[Account]) -> None:
        self.source = random.Random(0)
        self.waiting = self.source.sample(recording * 12, 12 * len(recording))
        self.budget, self.account, self.truth = budget, account, StepCosts(tuned())
        self.running: list[Answer] = []
        self.shares: list[float] = []  # of each answer: tokens over those of plain decoding in its time
        self.tokens = self.plain_tokens = 0.0

    def play(self, size: int) -> None:
        """Until the queue is empty."""
        while True:
            while self.waiting and len(self.running) < size:
                self.running.append(Answer(self.waiting.pop()))
                self.running[-1].controller.account = self.account()
            if len(self.running) < size:
                return
            self.step()

    def step(self) -> None:
        running, plain = self.running, Forward(len(self.running), len(self.running))
        rows = [answer.row for answer in running]
        chosen = self.budget.whom_to_ask(rows, plain)
        asked = [b in chosen for b in range(len(rows))]
        parts = list(zip(running, asked, strict=True))
        sizes = self.budget.share(rows, [answer.scores(asked=was) for answer, was in parts], len(chosen), plain)
        growths = [answer.growth(n, asked=was) for (answer, was), n in zip(parts, sizes, strict=True)]
        plan = Plan(rows, growths, chosen, plain)
        seconds = self.truth.seconds(plan.forward)
        plain_steps = seconds / self.truth.seconds(plain)
        accepted = [answer.accept(n, asked=was) for (answer, was), n in zip(parts, sizes, strict=True)]
        self.budget.observe(plan, accepted, seconds * math.exp(self.source.gauss(0, NOISE)))
        self.tokens += len(rows) + sum(map(len, accepted))
        self.plain_tokens += len(rows) * plain_steps
        for answer in running:
            answer.plain_steps += plain_steps
        self.shares += [answer.at / answer.plain_steps for answer in running if answer.is_over]
        self.running = [answer for answer in running if not answer.is_over]


def play(path: Path) -> None:
    """Print decoding over plain decoding, the slowest answer, and how many are below 0.95, for each policy and size."""
    recording = [json.loads(line)["steps"] for line in path.read_text(encoding="utf-8").splitlines()]
    say("decoding over plain / slowest answer / answers below 0.95 (simulated)")
    say(f"{'batch':24}" + "".join(f"{size:>20}" for size in SIZES))
    for name, (budget, account) in POLICIES.items():
        cells = []
        for size in SIZES:
            game = Game(recording, budget(tuned()), account)
            game.play(size)
            below = sum(share < 0.95 for share in game.shares) / len(game.shares)
            cells.append(f"{game.tokens / game.plain_tokens:.2f} / {min(game.shares):.2f} / {below:4.0%}")
        say(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "play"])
    parser.add_argument("drafts", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=16, help="questions to record")
    options = parser.parse_args()
    if options.what == "record":
        record(options.drafts, options.data, options.limit)
    else:
        play(options.drafts)


if __name__ == "__main__":
    main()
