"""Lookup: what followed the last tokens where they stood before, in the prompt or in the answer so far.

No weights and no pass over anything (prompt lookup; SAM decoding, arXiv 2411.10666, is the same idea on a suffix
automaton). It gives one chain of tokens, a `NgramDraft` on the tree of whatever heads it stands beside, and it may be
deeper than they are.

How likely a token of the chain is: a token d deep behind a match of m tokens is right about as often as one behind a
match of m + d - 1, for by then so many are known to agree; and more often if it came as it had come before, less often
if it had come otherwise. PRIOR is that share on answers of the default target to training prompts, where it falls that
of both neighbours (benchmarks/lab/lookup_shares.py); each request moves it by its own outcomes.
"""

from __future__ import annotations

import math
from itertools import chain, pairwise, repeat

from amphista.drafter.ngrams import LONGEST_MATCH, NgramIndex
from amphista.tree.candidates import NgramDraft

LOOKUP = "lookup"
PRIOR = {  # by whether it repeats what came before it, from that many agreeing tokens on
    None: {1: 0.25, 2: 0.51, 3: 0.63, 4: 0.73, 6: 0.77, 9: 0.77, 12: 0.89, 16: 0.94},
    True: {1: 0.38, 2: 0.75, 3: 0.81, 4: 0.81, 6: 0.89, 9: 0.96, 12: 0.96, 16: 0.99},
    False: {1: 0.13, 2: 0.29, 3: 0.4, 4: 0.49, 6: 0.63, 9: 0.68, 12: 0.76, 16: 0.77},
}
PRIOR_WEIGHT = 10  # outcomes of the request that weigh as much as the prior
DEEPEST = 16


class Lookup:
    """Proposals for one sequence, and how they have fared."""

    def __init__(self) -> None:
        self.index = NgramIndex()
        self._outcomes = {(repeats, start): [0, 0] for repeats, prior in PRIOR.items() for start in prior}  # right, all
        self._log_probs = {  # by agreeing
            repeats: [math.log(self.likelihood(length, repeats)) for length in range(1, LONGEST_MATCH + 1)]
            for repeats in PRIOR
        }
        self._proposed: tuple[int, int, list[int]] | None = None  # tokens known then, the match's length, where it read

    def propose(self, token_ids: list[int], max_depth: int) -> NgramDraft | None:
        """The chain that may follow `token_ids`, which begin with what was given before."""
        try:
            self.index.extend(token_ids[len(self.index) :])
        except BaseException:  # broken off in mid-change (Ctrl-C): the next proposal builds it anew
            self.index, self._proposed = NgramIndex(), None
            raise
        self._learn()
        found = self.index.match()
        depth = min(max_depth, DEEPEST)
        if found is None or depth < 1:
            return None
        place, length = found
        sources = self.index.continuation(place, depth)
        self._proposed = (len(self.index), length, sources)
        tokens, repeats = self.index.tokens, self.index.repeats
        agreeing = chain(range(length - 1, LONGEST_MATCH), repeat(LONGEST_MATCH - 1))
        log_probs = [self._log_probs[repeats[at]][number] for at, number in zip(sources, agreeing, strict=False)]
        return NgramDraft([tokens[at] for at in sources], log_probs)

    def likelihood(self, num_agreeing: int, repeats: bool | None = None) -> float:
        """How likely the next token is the one that followed before, so many tokens having agreed.

        repeats: of that one, whether it was what had followed before it (`NgramIndex.repeats`).
        """
        start = _bucket(num_agreeing)
        right, total = self._outcomes[repeats, start]
        return (right + PRIOR_WEIGHT * PRIOR[repeats][start]) / (total + PRIOR_WEIGHT)

    def _learn(self) -> None:
        """Compare the last proposal with the tokens that have come since, up to its first mistake."""
        if self._proposed is None:
            return
        known, length, sources = self._proposed
        self._proposed = None
        for ahead, (at, came) in enumerate(zip(sources, self.index.tokens[known:], strict=False)):
            said, repeats, start = self.index.tokens[at], self.index.repeats[at], _bucket(length + ahead)
            self._outcomes[repeats, start][0] += said == came
            self._outcomes[repeats, start][1] += 1
            value = math.log(self.likelihood(start, repeats))
            self._log_probs[repeats][start - 1 : _ENDS[start]] = [value] * (_ENDS[start] + 1 - start)
            if said != came:
                return


def _bucket(num_agreeing: int) -> int:
    return _BUCKETS[min(num_agreeing, LONGEST_MATCH)]


_STARTS = [*PRIOR[None], LONGEST_MATCH + 1]
_ENDS = {start: after - 1 for start, after in pairwise(_STARTS)}
_BUCKETS = {length: start for start, after in pairwise(_STARTS) for length in range(start, after)}
