"""How much the joint node budget brings at every batch size, simulated from recorded drafts and measured costs.

    python -m benchmarks.lab.simulate_budget record DRAFTS.jsonl --data FOLDER     # some minutes, with the default target
    python -m benchmarks.lab.simulate_budget DRAFTS.jsonl [--noise 0.05]

A recording holds, for every position of greedy Spec-Bench answers, the nodes that heads and n-gram draft offered
together and the n-gram draft alone, best first, and which were right: so any policy can be played on it exactly. Seconds
are those of `benchmarks/zen5-2-cores/tune.txt`, on a straight line beyond 48 rows; asking heads for k sequences takes
1.6 ms and 0.1 ms for each further one. Nothing here is a measurement of a batch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amphista.tree.account import Account
from amphista.tree.budget import Claim, DraftRow, NodeBudget, Plan
from amphista.tree.candidates import NgramDraft
from amphista.tree.controller import DraftController
from amphista.tree.learned import Forward, StepCosts
from amphista.tree.offers import Growth
from amphista.tree.token_tree import TokenTree
from amphista.tree.tune import Costs

TUNE = Path(__file__).parents[1] / "zen5-2-cores" / "tune.txt"
MEASURED_ROWS, ALL_ROWS = 48, 128
SIZES = (1, 2, 4, 8, 16, 32)


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
    """One recorded answer that is being played: where it stands, and what it has cost it in plain steps."""

    steps: list[dict[str, Any]]
    controller: DraftController = field(default_factory=DraftController)
    at: int = 0
    plain_steps: float = 0.0

    @property
    def row(self) -> DraftRow:
        scores = [0.0, *map(_log, self.steps[self.at]["ngram"])]
        log_probs = [below - above for above, below in zip(scores, scores[1:])]
        graft = NgramDraft([1] * len(log_probs), log_probs) if log_probs else None
        return DraftRow(self.controller, graft, max_depth=len(self.steps) - 1 - self.at)

    def scores(self, *, asked: bool) -> Iterator[float]:
        return map(_log, self.steps[self.at]["both" if asked else "ngram"])

    def accept(self, num_nodes: int, *, asked: bool) -> list[int]:
        """Accepted tokens, 1 where the n-gram draft was right, else 0; moves on."""
        step = self.steps[self.at]
        right = [node for node in step["both_right" if asked else "ngram_right"] if node < num_nodes]
        self.at += 1 + len(right)
        return [int(step["ngram_right"][:1] == [1])] * len(right)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -1e9


class Unguarded(Account):
    """An account that nobody looks into."""

    def book(self, num_accepted: int, claimed: float, plain_steps: float) -> None:
        pass


class PerSequence(NodeBudget):
    """Every sequence decides as if it were alone."""

    def whom_to_ask(self, rows, plain):
        return [b for b, row in enumerate(rows) if super(PerSequence, self).whom_to_ask([row], Forward(1))]

    def share(self, rows, scores, num_asked, plain):
        alone = [int(asked) for asked in self.asked]
        parts = zip(rows, scores, alone, strict=True)
        return [super(PerSequence, self).share([row], [nodes], asked, Forward(1))[0] for row, nodes, asked in parts]


class PlainSum(NodeBudget):
    """The batch's tokens per second, whoever gets them."""

    def _share(self, claims, forward):
        seconds = self.costs.by_rows(forward)
        offers = [(claim.trust * math.exp(score), b) for b, claim in enumerate(claims) for score in claim.scores]
        offers.sort(key=lambda offer: -offer[0])
        tokens, best, best_rate = float(len(claims)), 0, len(claims) / seconds(forward.num_rows)
        for count, (probability, _) in enumerate(offers[: self.costs.costs.max_nodes - len(claims)], start=1):
            tokens += probability
            if (rate := tokens / seconds(forward.num_rows + count)) > best_rate:
                best, best_rate = count, rate
        return [[probability for probability, b in offers[:best] if b == row] for row in range(len(claims))]

    def _best_prefix(self, rows, shares, gains, plain):
        seconds = self.costs.by_rows(Forward(plain.num_rows + sum(map(len, shares)), plain.num_decoding))
        tokens, extra = float(sum(1 + sum(nodes) for nodes in shares)), 0.0
        num_rows = plain.num_rows + sum(map(len, shares))
        best, best_rate, first = 0, tokens / seconds(num_rows), self._first_seconds(plain)
        order = sorted(gains, key=lambda b: -gains[b])
        for count, b in enumerate(order, start=1):
            tokens, extra = tokens + gains[b], extra + rows[b].controller.row_seconds(first)
            forward = Forward(num_rows, plain.num_decoding, num_asked=count)
            if (rate := tokens / (self.costs.seconds(forward) + extra)) > best_rate:
                best, best_rate = count, rate
        return order[:best]


@dataclass
class Outcome:
    """Tokens and seconds of all answers, plain seconds for as many, and each answer's tokens over plain ones."""

    speedup: float
    shares: list[float]
    mean_nodes: float
    asked: float
    worst_balance: float


def play(drafts, size, budget, account, costs, noise, num_answers=96, seed=0):
    source = random.Random(seed)
    queue = [drafts[i % len(drafts)] for i in range(num_answers)]
    source.shuffle(queue)
    queue.reverse()
    truth, running, shares, worst = StepCosts(costs), [], [], []
    tokens = plain_tokens = nodes = asks = steps = 0.0

    def admit():
        while len(running) < size and queue:
            answer = Answer(queue.pop())
            answer.controller.account = account()
            answer.at = source.randrange(40) if steps == 0 else 0
            answer.start = answer.at
            running.append(answer)

    admit()
    while len(running) == size:
        plain = Forward(len(running), len(running))
        rows = [answer.row for answer in running]
        asked = budget.asked_list = budget.whom_to_ask(rows, plain)
        budget.asked = [b in asked for b in range(len(rows))]
        scores = [answer.scores(asked=was) for answer, was in zip(running, budget.asked)]
        sizes = budget.share(rows, scores, len(asked), plain)
        growths, accepted = [], []
        for answer, was, n in zip(running, budget.asked, sizes):
            claimed = sum(answer.steps[answer.at]["both" if was else "ngram"][: n - 1])
            growths.append(Growth(TokenTree(list(range(n)), list(range(-1, n - 1))), claimed))
        plan = Plan(rows, growths, asked, plain)
        took = truth.seconds(plan.forward)
        for answer, was, n in zip(running, budget.asked, sizes):
            accepted.append(answer.accept(n, asked=was))
            answer.plain_steps += took / truth.seconds(plain)
        budget.observe(plan, accepted, took * math.exp(noise * source.gauss(0, 1)))
        tokens += len(rows) + sum(map(len, accepted))
        plain_tokens += len(rows) * took / truth.seconds(plain)
        steps += 1
        nodes += plan.forward.num_rows
        asks += len(asked)
        for answer in [a for a in running if a.at >= len(a.steps)]:
            shares.append((answer.at - answer.start) / answer.plain_steps)
            worst.append(answer.at - answer.start - 0.98 * answer.plain_steps)
            running.remove(answer)
        admit()
    return Outcome(tokens / plain_tokens, sorted(shares), nodes / steps / size, asks / steps / size, min(worst))


if __name__ == "__main__":
    import sys, time

    drafts = [json.loads(l)["steps"] for l in open(sys.argv[1])]
    noise = float(sys.argv[2]) if len(sys.argv) > 2 else 0.05
    costs = tuned()
    for name, kind, account in [
        ("today's auto in every row", PerSequence, Unguarded),
        ("plain sum", PlainSum, Unguarded),
        ("log, no account", NodeBudget, Unguarded),
        ("log + account", NodeBudget, Account),
    ]:
        for size in SIZES:
            t = time.time()
            o = play(drafts, size, kind(costs), account, costs, noise)
            below = sum(s < 0.95 for s in o.shares) / len(o.shares)
            print(
                f"{name:28} B={size:2} {o.speedup:.3f} min {o.shares[0]:.2f} p5 {o.shares[len(o.shares) // 20]:.2f} below.95 {below:.2f} nodes/row {o.mean_nodes:.2f} asked {o.asked:.2f} worst {o.worst_balance:.1f} ({time.time() - t:.1f}s)",
                flush=True,
            )
