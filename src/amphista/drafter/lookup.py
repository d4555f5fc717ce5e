"""Lookup: what followed the last tokens where they stood before, in the prompt or in the answer so far.

No weights and no pass over anything (prompt lookup; SAM decoding, arXiv 2411.10666, is the same idea on a suffix
automaton). It gives one chain of tokens, a `NgramDraft` on the tree of whatever heads it stands beside, and it may be
deeper than they are.

How likely a token of the chain is: a token d deep behind a match of m tokens is right about as often as one behind a
match of m + d - 1, for by then so many are known to agree. PRIOR is that share on greedy and sampled answers of the
default target; each request moves it by its own outcomes.
"""

from __future__ import annotations

import math
from itertools import pairwise

from amphista.drafter.ngrams import LONGEST_MATCH, NgramIndex
from amphista.tree.candidates import NgramDraft

LOOKUP = "lookup"
PRIOR = {1: 0.24, 2: 0.52, 3: 0.6, 4: 0.66, 6: 0.74, 9: 0.84, 12: 0.87, 16: 0.95}  # from that many agreeing tokens on
PRIOR_WEIGHT = 10  # outcomes of the request that weigh as much as the prior
DEEPEST = 16


class Lookup:
    """Proposals for one sequence, and how they have fared."""

    def __init__(self) -> None:
        self.index = NgramIndex()
        self._outcomes = {start: [0, 0] for start in PRIOR}  # right, all
        self._log_probs = [math.log(self.likelihood(length)) for length in range(1, LONGEST_MATCH + 1)]  # by agreeing
        self._proposed: tuple[int, int, list[int]] | None = None  # tokens known then, the match's length, what it said

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
        tokens = self.index.continuation(place, depth)
        self._proposed = (len(self.index), length, tokens)
        log_probs = self._log_probs[length - 1 : length - 1 + depth]
        return NgramDraft(tokens, log_probs + self._log_probs[-1:] * (depth - len(log_probs)))

    def likelihood(self, num_agreeing: int) -> float:
        """How likely the next token is the one that followed before, so many tokens having agreed."""
        start = _bucket(num_agreeing)
        right, total = self._outcomes[start]
        return (right + PRIOR_WEIGHT * PRIOR[start]) / (total + PRIOR_WEIGHT)

    def _learn(self) -> None:
        """Compare the last proposal with the tokens that have come since, up to its first mistake."""
        if self._proposed is None:
            return
        known, length, tokens = self._proposed
        self._proposed = None
        for ahead, (said, came) in enumerate(zip(tokens, self.index.tokens[known:], strict=False)):
            start = _bucket(length + ahead)
            self._outcomes[start][0] += said == came
            self._outcomes[start][1] += 1
            value = math.log(self.likelihood(start))
            self._log_probs[start - 1 : _ENDS[start]] = [value] * (_ENDS[start] + 1 - start)
            if said != came:
                return


def _bucket(num_agreeing: int) -> int:
    return _BUCKETS[min(num_agreeing, LONGEST_MATCH)]


_STARTS = [*PRIOR, LONGEST_MATCH + 1]
_ENDS = {start: after - 1 for start, after in pairwise(_STARTS)}
_BUCKETS = {length: start for start, after in pairwise(_STARTS) for length in range(start, after)}
