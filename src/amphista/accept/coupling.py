"""Coupling: what the noise of a sampled answer says about its drafts.

The target takes the token with the best l / T + G, where G, the noise of each token at each position, is known before
anybody has worked out l (keyed sampling). What a drafter's logits z say of the best l, softmax(z / t) with the divisor
t that was measured for that, they say of the best l + T G, too:

    p = softmax((z + w T G) / t)

w = 1 if z erred as l would with noise of its own. Drafts that look at the target's noise are the coupling of arXiv
2408.07978 (drafter-invariant speculative decoding), here for trees; the target's choice stays its own.

Tokens that a drafter does not name count as n of the probability of the last that it names, with noise as it typically
lies, log(n / i) of the i-th.

Shapes: R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from amphista.accept.sampling import Chooser, Floats
from amphista.tree.candidates import Candidates

NUM_RANKS = 64  # of each head, for noise to choose among
NOISE_SHARE = 0.7  # w: the likeliest, from 0.45 to 0.85, at temperatures of 0.7 and 1, Amphista's heads and Medusa's
TYPICAL_NOISE = -math.log(math.log(2))  # the median
LEAST = 1e-9  # a probability


def ranks_to_name(choosers: Iterable[Chooser], num_ranks: int) -> int:
    """How many ranks heads shall name where trees want so many."""
    return num_ranks if all(chooser.sampling.is_greedy for chooser in choosers) else max(num_ranks, NUM_RANKS)


def coupled(
    candidates: Candidates, chooser: Chooser, position: int, divisors: Sequence[float], num_ranks: int
) -> Candidates:
    """What is on offer for a sequence, from what heads say of the target's best tokens; `num_ranks` a head, but for
    those that know paths.

    position: of the tokens at depth 1. divisors: of the heads' logits.
    """
    if chooser.sampling.is_greedy or not candidates.tokens:
        return candidates
    weights = [NOISE_SHARE * chooser.sampling.temperature / divisor for divisor in divisors]
    noises = [weights[k] * chooser.noise(position + k, ids) for k, ids in enumerate(candidates.tokens)]
    log_probs = list(map(_noised, map(np.array, candidates.log_probs), noises, weights))
    if candidates.below is not None:  # tokens keep their places, which others name
        below = candidates.below
        children = list(map(_children, below.ranks, below.log_probs, noises[1:], weights[1:]))
        below = replace(below, ranks=[ranks for ranks, _ in children], log_probs=[values for _, values in children])
        return replace(candidates, log_probs=[values.tolist() for values in log_probs], below=below)
    orders = [np.argsort(-values, kind="stable")[:num_ranks] for values in log_probs]
    tokens = [np.array(ids)[order].tolist() for ids, order in zip(candidates.tokens, orders, strict=True)]
    values = [values[order].tolist() for values, order in zip(log_probs, orders, strict=True)]
    return replace(candidates, tokens=tokens, log_probs=values)


def _children(
    ranks: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]], noise: Floats, weight: float
) -> tuple[list[list[int]], list[list[float]]]:
    """The children of each token of a depth, best first again."""
    if len(set(map(len, ranks))) > 1:
        each = [_children([places], [values], noise, weight) for places, values in zip(ranks, log_probs, strict=True)]
        return [places for (places,), _ in each], [values for _, (values,) in each]
    places = np.array(ranks, dtype=np.int64)
    noised = _noised(np.array(log_probs), noise[places], weight)
    order = np.argsort(-noised, axis=-1, kind="stable")
    return np.take_along_axis(places, order, -1).tolist(), np.take_along_axis(noised, order, -1).tolist()


def _noised(log_probs: Floats, noise: Floats, weight: float) -> Floats:
    """log p of the named tokens [..., R], from their log-probabilities without noise and the weighted noise.

    number: log n of what is not named; the sum over its i of exp(weight log(n / i)) is taken for an integral.
    """
    unnamed = np.log(np.maximum(1 - np.exp(log_probs).sum(-1, keepdims=True), LEAST))
    number = np.maximum(unnamed - np.maximum(log_probs.min(-1, keepdims=True, initial=0), math.log(LEAST)), 0)
    left = (1 - weight) or 1e-6
    best = unnamed - number + weight * (number + TYPICAL_NOISE)
    others = best + np.log1p(np.expm1(left * number) / left)
    scores = log_probs + noise
    found: Floats = scores - np.logaddexp(np.logaddexp.reduce(scores, axis=-1, keepdims=True), others)
    return found
