"""One node budget for a batch: the trees of all sequences compete for the rows of one forward.

A step over N rows takes T(N) seconds, asking the heads included, and gives sequence b 1 + g_b tokens, g_b being the sum
of its nodes' probabilities. The step takes the N at which the geometric mean of the sequences' tokens per second is
highest: a sequence that gains much may not slow down the others for a little more. Every sequence's nodes come best
first, so the node that raises the mean most is always among the next ones, and one pass finds the best trees of every
N; T need not be convex, so all N are looked at. No node at all is plain decoding. With one sequence this is CaDDTree
(arXiv 2606.01813).

What a request may lose by that is bounded by its `Account`.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from amphista.tree.candidates import NgramDraft
from amphista.tree.children import Growth
from amphista.tree.controller import FIRST_WEIGHT, HOPE, LONGEST_REST, WORD_WEIGHT, DraftController
from amphista.tree.learned import DraftCurve, Forward, StepCosts
from amphista.tree.tune import Costs, chain_scores
from amphista.tree.worth import Worth

FIRST_STREAK, LONGEST_STREAK = 4, 128  # steps, all plain or all drafted, until one of the other kind is taken
EARLY, SELDOM_EARLY = 4, 32  # one new sequence in so many tries its heads early, though they failed others lately; the
# first does; twice as many after each failure, up to
WORTH = 1.03  # times the rate without drafts is what they must promise: claims run a little high, weighing takes time
SURE = 0.75  # hardly any n-gram draft is more likely to be right
PAUSE = 7  # steps in which nobody is weighed again, where neither heads nor n-gram drafts promised to pay
READ = 32  # rows that wait for heads which have read their prompt, at most
FIRST_GAINS = (0.45, 0.65, 0.8)  # accepted tokens of a tree of 2, 3, 4 nodes, before anything is known


@dataclass(frozen=True)
class DraftRow:
    """What the budget knows of one decoding sequence before a step; `max_depth` 0: it can take one token only.

    num_unfed: rows that its heads have to read before they can be asked.
    """

    controller: DraftController
    graft: NgramDraft | None
    max_depth: int
    pending: int = 0
    num_unfed: int = 0


@dataclass(frozen=True)
class Plan:
    """What a step will verify: a tree for each row, whose heads were asked, and the plain step it stands against.

    probed: of each row the nodes below which a group of `num_probes` probes stands.
    """

    rows: Sequence[DraftRow]
    growths: Sequence[Growth]
    asked: Sequence[int]
    plain: Forward
    probed: Sequence[Sequence[int]] = ()
    num_probes: int = 0

    @property
    def forward(self) -> Forward:
        """The step as it will be."""
        num_drafted = sum(growth.tree.num_nodes - 1 for growth in self.growths)
        if self.probed:
            num_drafted += self.num_probes * sum(map(len, self.probed))
        if not num_drafted and not self.asked:
            return self.plain
        return self.plain._replace(num_rows=self.plain.num_rows + num_drafted, num_asked=len(self.asked))


@dataclass(frozen=True)
class Claim:
    """One sequence's nodes below its root: log-scores, best first.

    is_wary: it refuses every step that would give it fewer tokens than plain decoding in the same time.
    """

    scores: Iterator[float]
    is_wary: bool = False


def share(
    claims: Sequence[Claim], curve: DraftCurve, plain_seconds: float, *, least: int = 0, worth: float = 1.0
) -> list[list[float]]:
    """The probabilities of the nodes each sequence is to verify, the root's not.

    curve: of the step; there are at most as many nodes altogether as it goes, fewer where no more are claimed.
    plain_seconds: of a step without any. least: how many there must be, if claimed. worth: times the rate of the step
    without them is what they must promise.
    """
    tokens, product = [1.0] * len(claims), 1.0
    frontier: list[tuple[float, int, float]] = []  # (-by how much it raises the mean, whose, probability)

    def offer(b: int) -> None:
        if (score := next(claims[b].scores, None)) is not None:
            probability = math.exp(score)
            heapq.heappush(frontier, (-probability / tokens[b], b, probability))

    for b in range(len(claims)):
        offer(b)
    wary = [b for b, claim in enumerate(claims) if claim.is_wary]
    taken: list[tuple[int, float]] = []
    took, best, best_rate = curve.seconds[0], 0, 0.0 if least else worth / curve.seconds[0]
    while frontier and len(taken) + 1 < len(curve.seconds):
        raised = -frontier[0][0] * took / len(claims)  # at most, in seconds, by each further node: the best come first
        if best_rate and not wary and raised <= curve.rises[len(taken)]:
            break
        _, b, probability = heapq.heappop(frontier)
        product /= tokens[b]
        tokens[b] += probability
        product *= tokens[b]
        taken.append((b, probability))
        offer(b)
        took = curve.seconds[len(taken)]
        rate = product ** (1 / len(claims)) / took
        if rate > best_rate and len(taken) >= least and all(tokens[w] * plain_seconds >= took for w in wary):
            best, best_rate = len(taken), rate
    shares: list[list[float]] = [[] for _ in claims]
    for b, probability in taken[:best]:
        shares[b].append(probability)
    return shares


def best_size(scores: Sequence[float], costs: Costs, *, drafted: bool) -> int:
    """How many of one tree's first nodes to verify: scores[i] is the log-score of node i, the root's comes first."""
    curve = StepCosts(costs).by_drafts(Forward(1, num_asked=int(drafted)), costs.max_nodes - 1)
    (taken,) = share([Claim(iter(scores[1:]))], curve, curve.seconds[0])
    return 1 + len(taken)


@dataclass
class Streak:
    """Steps all plain, or all drafted: after a long one a step of the other kind is due, to see what it takes."""

    length: int = 0
    is_plain: bool = True
    longest: int = FIRST_STREAK

    @property
    def is_long(self) -> bool:
        return self.length >= self.longest

    def note(self, *, is_plain: bool) -> None:
        """Count a step."""
        if is_plain == self.is_plain:
            self.length += 1
            return
        if self.is_long:
            self.longest = min(2 * self.longest, LONGEST_STREAK)
        self.length, self.is_plain = 1, is_plain


class NodeBudget:
    """Decides whose heads are asked and how many nodes each tree gets, and learns from every step.

    `plain` is always the forward of the same step if nothing were drafted: a row for each sequence that decodes, and
    those of prompts that are read beside them.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = StepCosts(costs)
        self._lately = defaultdict[int, DraftController](DraftController)  # of all sequences, by how many share a step
        self._num_until_early, self._early = 1, EARLY  # new sequences until one tries its heads early; and behind it
        self._num_unasked = 0  # steps since any heads were asked
        self._unasked: list[int] = []  # nodes of each row in the step under way, if no heads are asked
        self._streaks, self._turn = defaultdict[int, Streak](Streak), 0  # by the power of two of a plain step's rows
        self._weighed: list[DraftController] = []  # of the last step with nothing to gain; those that wait for a trial
        self._resting, self._pause = self._weighed, 0  # steps until they are weighed again
        self._worths, self._is_resting = defaultdict[int, Worth](Worth), False

    def rests(self, plain: Forward) -> bool:
        """Whether nothing is drafted in this step, because it has not paid lately; to be asked once a step."""
        self._is_resting = plain.num_decoding > 1 and self._worth(plain).rests()
        return self._is_resting

    def _worth(self, plain: Forward) -> Worth:
        return self._worths[plain.num_decoding.bit_length()]

    def looks_seldom(self, plain: Forward) -> bool:
        """Whether a row is so dear beside the others' tokens that hardly any n-gram draft pays."""
        seconds = self.costs.decoding(plain)
        row = self.costs.decoding(plain._replace(num_rows=plain.num_rows + 1)) - seconds
        return plain.num_decoding * row > SURE * seconds

    def whom_to_ask(self, rows: Sequence[DraftRow], plain: Forward) -> list[int]:
        """Indices of the rows whose heads are worth asking, or due for a trial; to be called once a step."""
        if self._pauses(rows):
            return []
        self._pause = 0
        for row in rows:
            if row.controller.is_new:
                is_early = self._is_early(plain)
                row.controller.expect(*self._expected(plain), FIRST_WEIGHT if is_early else WORD_WEIGHT)
                if not is_early:
                    row.controller.rest = LONGEST_REST
        if self._is_plain(rows, plain):
            return []
        shares = self._share_ngrams(rows, plain)
        self._unasked = [len(nodes) for nodes in shares]
        missed = [1 - (nodes[0] if nodes else 0.0) for nodes in shares]
        number = plain.num_decoding
        gains = {b: missed[b] * row.controller.hoped(number) for b, row in enumerate(rows) if row.max_depth > 0}
        if self._is_drafted(rows, plain) and (shown := self._shows_asking(rows, list(gains), plain)):
            return shown
        asked = self._best_prefix(rows, shares, gains, plain)
        left = sorted(gains.keys() - set(asked))
        tried: list[DraftController] = []
        if left and not any(row.controller.account.is_wary for row in rows):
            pays = self._paying(plain)
            for b in left if pays(HOPE, self._first(plain)[1]) else ():  # else trials only cost
                controller = rows[b].controller  # where heads pay but for their n-gram draft, there is nothing to try
                if not pays(controller.hoped(number), controller.row_seconds):
                    tried.append(controller)
                    if controller.try_again(missed[b]):
                        asked.append(b)
        if not asked and not any(shares):
            self._weighed = [row.controller for row in rows]
            self._resting, self._pause = tried, min([PAUSE, *(controller.num_rests for controller in tried)])
        return sorted(asked)

    def _pauses(self, rows: Sequence[DraftRow]) -> bool:
        """Whether these had nothing to gain when they were weighed, and nothing is new: weighing takes time, too."""
        if not self._pause or any(row.graft is not None for row in rows):
            return False
        if self._weighed != [row.controller for row in rows]:
            return False
        self._pause -= 1
        for controller in self._resting:
            controller.rest_on()
        return True

    def _is_early(self, plain: Forward) -> bool:
        """Whether a new sequence tries its heads early: reading its prompt for a trial costs it several steps."""
        self._num_until_early -= 1
        if self._num_until_early:
            return False
        pays = self._paying(plain)(*self._expected(plain))
        self._early = EARLY if pays else min(2 * self._early, SELDOM_EARLY)
        self._num_until_early = self._early
        return True

    def _shows_asking(self, rows: Sequence[DraftRow], able: Sequence[int], plain: Forward) -> list[int]:
        """Whose heads show what asking costs: in turn one that has read; where none has, whoever has least to read, the
        later the more that is."""
        self._turn += 1
        ready = [b for b in able if rows[b].num_unfed <= READ]
        if ready:
            return [ready[self._turn % len(ready)]]
        least = min(able, key=lambda b: rows[b].num_unfed, default=None)
        if least is None or self._num_unasked < self._streak(plain).longest * (1 + rows[least].num_unfed / READ):
            return []
        return [least]

    def share(
        self, rows: Sequence[DraftRow], scores: Sequence[Iterator[float]], num_asked: int, plain: Forward
    ) -> list[int]:
        """How many nodes, root included, each row's tree gets; `scores` of their nodes as they are grown."""
        if self._is_plain(rows, plain):
            return [1] * len(rows)
        if num_asked == 0 and self._unasked and not self._is_drafted(rows, plain):
            return [1 + sum(1 for _ in islice(nodes, n)) for nodes, n in zip(scores, self._unasked, strict=True)]
        claims = [_claim(row, nodes) for row, nodes in zip(rows, scores, strict=True)]
        least = int(self._is_drafted(rows, plain))
        return [1 + len(nodes) for nodes in self._share(claims, plain._replace(num_asked=num_asked), least=least)]

    def observe(self, plan: Plan, accepted: Sequence[Sequence[int]], seconds: float, planning: float = 0.0) -> None:
        """Learn from a step: the draft tokens each row accepted, its seconds, asking the heads included, and those that
        finding out whom to ask took."""
        forward, plain, self._unasked = plan.forward, plan.plain, []
        self._num_unasked = 0 if plan.asked else self._num_unasked + 1
        is_plain = forward == plain
        self._streak(plain).note(is_plain=is_plain)
        self.costs.observe(forward, seconds)
        if plain.num_decoding > 1 and not self._is_resting:
            number, took = plain.num_decoding, self.costs.decoding(plain)
            won = sum(map(len, accepted)) / number * took - (self.costs.decoding(forward) - took)
            self._worth(plain).note(number, won, planning)
        plain_steps = 1.0 if is_plain else self.costs.seconds(forward) / self.costs.seconds(plain)
        for row, tokens in zip(plan.rows, accepted, strict=True):
            row.controller.account.book(1 + len(tokens), plain_steps)
        for b in plan.asked:
            graft = plan.rows[b].graft
            if graft is None or list(accepted[b][:1]) != graft.tokens[:1]:
                num_nodes = plan.growths[b].tree.num_nodes
                if plan.probed:
                    num_nodes += plan.num_probes * len(plan.probed[b])
                self.record(plan.rows[b].controller, len(accepted[b]), num_nodes, forward, plain)

    def record(
        self, controller: DraftController, num_accepted: int, num_nodes: int, forward: Forward, plain: Forward
    ) -> None:
        """Count a draft of one sequence's heads: accepted tokens, nodes of its tree, the step and its plain one."""
        seconds = self.costs.by_rows(forward._replace(num_asked=0))
        row_seconds = seconds(forward.num_rows) - seconds(forward.num_rows - num_nodes + 1)
        for record in (controller, self._others(plain)):
            record.record(num_accepted, row_seconds)
        controller.update_backoff(pays=self._paying(plain)(controller.gain, controller.row_seconds))

    def _streak(self, plain: Forward) -> Streak:
        """That of steps like this one: what other steps take says little about it."""
        return self._streaks[plain.num_rows.bit_length()]

    def _is_plain(self, rows: Sequence[DraftRow], plain: Forward) -> bool:
        spent = any(row.controller.account.is_spent for row in rows)
        return not rows or spent or (self._streak(plain).is_long and not self._streak(plain).is_plain)

    def _is_drafted(self, rows: Sequence[DraftRow], plain: Forward) -> bool:
        wary = any(row.controller.account.is_wary for row in rows)
        has_room = self.costs.costs.max_nodes > len(rows)
        return self._streak(plain).is_long and self._streak(plain).is_plain and has_room and not wary

    def _share_ngrams(self, rows: Sequence[DraftRow], plain: Forward) -> list[list[float]]:
        """The probabilities of the nodes that n-gram drafts get where no heads are asked."""
        if all(row.graft is None for row in rows):
            return [[] for _ in rows]
        return self._share([_claim(row, iter(_chain(row.graft)[1:])) for row in rows], plain, worth=WORTH)

    def _share(
        self, claims: Sequence[Claim], forward: Forward, *, least: int = 0, worth: float = 1.0
    ) -> list[list[float]]:
        curve = self.costs.by_drafts(forward, max(0, self.costs.costs.max_nodes - len(claims)))
        plain_seconds = self.costs.decoding(forward._replace(num_asked=0))
        return share(claims, curve, plain_seconds, least=least, worth=worth)

    def _best_prefix(
        self, rows: Sequence[DraftRow], shares: list[list[float]], gains: dict[int, float], plain: Forward
    ) -> list[int]:
        """Those to ask: in order of what their heads are likely to add, as many as raise the mean most."""
        forward = plain._replace(num_rows=plain.num_rows + sum(map(len, shares)))
        plain_seconds = self.costs.decoding(plain)
        tokens, extra = [1 + sum(nodes) for nodes in shares], 0.0
        product, order = math.prod(tokens), sorted(gains, key=lambda b: -gains[b])
        best, best_rate = 0, WORTH * product ** (1 / len(rows)) / self.costs.decoding(forward)
        wary = [b for b, row in enumerate(rows) if row.controller.account.is_wary]
        for count, b in enumerate(order, start=1):
            product /= tokens[b]
            tokens[b] += gains[b]
            product *= tokens[b]
            extra += rows[b].controller.row_seconds
            took = self.costs.decoding(forward._replace(num_asked=count)) + extra
            rate = product ** (1 / len(rows)) / took
            if rate > best_rate and all(tokens[w] * plain_seconds >= took for w in wary):
                best, best_rate = count, rate
        return order[:best]

    def _paying(self, plain: Forward) -> Callable[[float, float], bool]:
        """Whether asking is worth it, were all sequences alike: tokens gained, seconds of rows, by each."""
        plain_seconds, number = self.costs.decoding(plain), plain.num_decoding
        asked_seconds = self.costs.decoding(plain._replace(num_asked=number))
        return lambda gain, row_seconds: (1 + gain) * plain_seconds > WORTH * (asked_seconds + number * row_seconds)

    def _expected(self, plain: Forward) -> tuple[float, float]:
        """Of a new sequence: what heads brought others lately, and the seconds of their rows."""
        lately = self._others(plain)
        if lately.is_new:
            lately.expect(*self._first(plain))
        return lately.gain, lately.row_seconds

    def _others(self, plain: Forward) -> DraftController:
        """What heads brought in steps of about as many sequences: in larger ones trees are smaller."""
        return self._lately[plain.num_decoding.bit_length()]

    def _first(self, plain: Forward) -> tuple[float, float]:
        """The same before anything is known: of the small tree that would pay best here."""
        asked = plain._replace(num_asked=1)
        steps = [asked._replace(num_rows=plain.num_rows + drafts) for drafts in range(1, 1 + len(FIRST_GAINS))]
        trees = zip(FIRST_GAINS, map(self.costs.decoding, steps), strict=True)
        gain, took = max(trees, key=lambda tree: (1 + tree[0]) / tree[1])
        return gain, took - self.costs.decoding(asked)


def _claim(row: DraftRow, scores: Iterator[float]) -> Claim:
    return Claim(scores, row.controller.account.is_wary)


def _chain(graft: NgramDraft | None) -> list[float]:
    return chain_scores(graft.log_probs) if graft is not None else [0.0]
