"""Coupling: what the noise of a sampled answer says about its drafts.

The target takes the token with the best l / T + G, where G, the noise of each token at each position, is known before
anybody has worked out l (keyed sampling). What a drafter's logits z say of the best l, softmax(z / t) with the divisor
t that was measured for that, they say of the best l + T G, too:

    p = softmax((z + w T G) / t)

w = 1 if z erred as l would with noise of its own. Drafts that look at the target's noise are drafter-invariant
speculative decoding (arXiv 2408.07978), here for trees; the target's choice stays its own.

Tokens that a drafter does not name count as n of the probability of the last that it names, with noise as it typically
lies, log(n / i) of the i-th.

Shapes: R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amphista.accept.chooser import Chooser
from amphista.accept.draw import Floats
from amphista.tree.candidates import Candidates, ConditionalRanks, NgramDraft

NUM_RANKS = 64  # of each head, for noise to choose among
NOISE_SHARE = 0.7  # w: the likeliest, from 0.45 to 0.85, at temperatures of 0.7 and 1, Amphista's heads and Medusa's
TYPICAL_NOISE = -math.log(math.log(2))  # the median
LEAST = 1e-9  # a probability
MOST = 1e6  # a weight of noise, beside which nothing else counts


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
    heat = min(NOISE_SHARE * chooser.sampling.temperature, MOST)
    weights = np.minimum(heat / np.array(divisors[: candidates.num_heads]), MOST)
    noises, below = chooser.noise(position, candidates.tokens), candidates.below
    if below is None:
        parts = (candidates.tokens, candidates.log_probs, noises, weights)
        tokens, log_probs = _best_first(*parts, num_ranks)
        return replace(candidates, tokens=tokens, log_probs=log_probs)
    ordered = _best_below(below, noises, weights)  # tokens keep their places, which others name
    if len(set(map(len, candidates.tokens))) == 1:
        log_probs = _noised(np.array(candidates.log_probs), np.array(noises), weights[:, None]).tolist()
    else:
        each = zip(candidates.log_probs, noises, weights, strict=True)
        log_probs = [_noised(np.array(values), noise, weight).tolist() for values, noise, weight in each]
    return replace(candidates, log_probs=log_probs, below=ordered)


def _best_below(below: ConditionalRanks, noises: Sequence[Floats], weights: Floats) -> ConditionalRanks:
    """What stands below each token in the order of its log p. noises: of the tokens of each depth."""
    if isinstance(below.ranks, np.ndarray):
        depths = slice(1, 1 + len(below.ranks))
        of_places = np.take_along_axis(np.array(noises[depths])[:, None], below.ranks, -1)
        log_probs = np.asarray(below.log_probs, dtype=np.float64)
        ranks, given = _in_order(below.ranks, _noised(log_probs, of_places, weights[depths, None, None]))
        return replace(below, ranks=ranks, log_probs=given)
    ordered = []
    for k, (some, values) in enumerate(zip(below.ranks, below.log_probs, strict=True), 1):
        weighed = np.repeat(weights[k], len(some))
        ordered.append(_best_first(some, values, [noises[k][list(row)] for row in some], weighed))
    return replace(below, ranks=[ranks for ranks, _ in ordered], log_probs=[given for _, given in ordered])


def coupled_graft(graft: NgramDraft | None, chooser: Chooser, position: int) -> NgramDraft | None:
    """An n-gram draft for a sequence; how likely its tokens are was learned of others at the same temperature."""
    if graft is None or chooser.sampling.is_greedy:
        return graft
    weight, sure = min(NOISE_SHARE * chooser.sampling.temperature, MOST), graft.num_forced
    noises = chooser.noise_along(position + sure, graft.tokens[sure:]) if graft.tokens[sure:] else []
    noised = [_noised_alone(*pair, weight) for pair in zip(graft.log_probs[sure:], noises, strict=True)]
    return NgramDraft(graft.tokens, [*graft.log_probs[:sure], *noised], sure)


def _noised_alone(log_prob: float, noise: float, weight: float) -> float:
    """The same as `_noised` of a single named token, without arrays: there is one in each step of each sequence."""
    unnamed = math.log(max(-math.expm1(log_prob), LEAST))
    number = max(unnamed - max(log_prob, math.log(LEAST)), 0.0)
    left = 1e-6 if weight == 1 else 1 - weight
    others = unnamed - number + weight * (number + TYPICAL_NOISE) + math.log1p(math.expm1(left * number) / left)
    ahead = others - log_prob - weight * noise
    return -(ahead + math.log1p(math.exp(-ahead))) if ahead > 0 else -math.log1p(math.exp(ahead))


def _best_first(
    items: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[float]],
    noises: Sequence[Floats],
    weights: Floats,
    most: int | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Rows of items [n][R] in the order of their log p, and these; of each at most so many."""
    if len(set(map(len, items))) > 1:
        rows = [slice(n, n + 1) for n in range(len(items))]
        each = [_best_first(items[n], log_probs[n], noises[n], weights[n], most) for n in rows]
        return [row for (row,), _ in each], [values for _, (values,) in each]
    noised = _noised(np.array(log_probs), np.array(noises), weights[:, None])
    ordered, values = _in_order(np.array(items, dtype=np.int64), noised, most)
    return ordered.tolist(), values.tolist()


def _in_order(items: NDArray[Any], noised: Floats, most: int | None = None) -> tuple[NDArray[Any], Floats]:
    """Items [..., R] in the order of their log p, and these; of each row at most so many."""
    order = np.argsort(-noised, axis=-1, kind="stable")[..., :most]
    return np.take_along_axis(items, order, -1), np.take_along_axis(noised, order, -1)


def _noised(log_probs: Floats, noise: Floats, weight: Floats) -> Floats:
    """log p of the named tokens [..., R], from their log-probabilities without noise, noise and its weight [..., 1].

    number: log n of what is not named; the sum over its i of exp(weight log(n / i)) is taken for an integral.
    """
    unnamed = np.log(np.maximum(1 - np.exp(log_probs).sum(-1, keepdims=True), LEAST))
    number = np.maximum(unnamed - np.maximum(log_probs.min(-1, keepdims=True, initial=0), math.log(LEAST)), 0)
    left = np.where(weight == 1, 1e-6, 1 - weight)
    best = unnamed - number + weight * (number + TYPICAL_NOISE)
    others = best + np.log1p(np.expm1(left * number) / left)
    scores = log_probs + weight * noise
    found: Floats = scores - np.logaddexp(np.logaddexp.reduce(scores, axis=-1, keepdims=True), others)
    return found
