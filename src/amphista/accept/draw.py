"""Keyed sampling: the token with the best filtered log-probability plus Gumbel noise.

The noise depends only on (seed, absolute position, token id): whatever drafter, tree or batch leads to a position, the
same token is chosen there. Sampled speculative output is therefore token-identical to sampled autoregressive output,
and each token has exactly the target's distribution (Gumbel-max).

Noise comes of Philox, a counter generator: key = seed, counter = (block of token ids, position, stream). Positions own
disjoint counter ranges, so (s, p) and (s + 1, p - 1) are unrelated.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from amphista.accept.sampling import Sampling
from amphista.errors import RequestError, TargetError
from amphista.native import noise
from amphista.native.noise import Words, bits_of, first_bits

Floats = NDArray[np.float64]
Scores = NDArray[np.floating[Any]]
TOP_P_FIRST = 1024
FEW = 8  # tokens are few where they are not one of so many


class Drawn(NamedTuple):
    """A row of scores [V] to draw a token of, for an absolute position."""

    scores: Scores
    sampling: Sampling
    seed: int
    position: int


def draw_all(rows: Sequence[Drawn]) -> list[int]:
    """Of each row, all of one size, the token that sampling chooses; in C where it is there."""
    tokens = None
    if all(row.scores.dtype == np.float32 for row in rows):
        scores = [np.ascontiguousarray(row.scores) for row in rows]
        tokens = noise.draw([_drawing(*parts) for parts in zip(rows, scores, strict=True)], scores[0].size)
    if tokens is None:
        return [_draw(row) for row in rows]
    if min(tokens) < 0:
        refuse_broken(math.nan if noise.BROKEN in tokens else -math.inf)
    return tokens


def _drawing(row: Drawn, scores: Scores) -> noise.Drawing:
    how, address = row.sampling, scores.__array_interface__["data"][0]
    top_k = min(max(0, how.top_k), scores.size)
    return noise.Drawing(address, row.seed, row.position, how.temperature, how.top_p, how.min_p, top_k)


def _draw(row: Drawn) -> int:
    if row.sampling.is_filtered:
        refuse_broken(float(row.scores.max()))
        return gumbel_argmax(filtered_log_probs(row.scores.astype(np.float64), row.sampling), row.seed, row.position)
    return gumbel_argmax(row.scores, row.seed, row.position, row.sampling.temperature)


def refuse_broken(best: float) -> None:
    """Raise where the best score shows that there is nothing to choose from."""
    if math.isnan(best) or best == math.inf:
        raise broken_logits()
    if best == -math.inf:
        raise RequestError("every token is suppressed or forbidden: nothing is left to choose from")


def broken_logits() -> TargetError:
    return TargetError(
        "the target's logits are no finite numbers: its weights are damaged, its type is too coarse, or a bias or "
        "penalty goes beyond float32"
    )


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Floats:
    """Standard Gumbel noise [V], indexed by token id."""
    return noise_of(first_bits(seed, position, vocab_size))


def noise_of(bits: Words) -> Floats:
    """Uniforms are 52 bits plus a half, so strictly inside (0, 1), and both logarithms are finite."""
    uniforms = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    found: Floats = -np.log(-np.log(uniforms))
    return found


def gumbel_argmax(scores: Scores, seed: int, position: int, temperature: float = 1.0) -> int:
    """argmax(scores / temperature + gumbel_noise(seed, position, V)), the first of equals."""
    top = float(scores.max())
    refuse_broken(top)
    left = np.flatnonzero(scores > -np.inf)
    is_few = FEW * left.size <= scores.size  # a filter has left few
    positions = np.full(left.size, position)
    bits = bits_of(seed, positions, left) if is_few else first_bits(seed, position, scores.size)[left]
    with np.errstate(over="ignore"):
        below = (scores[left].astype(np.float64) - top) / temperature
    return int(left[(below + noise_of(bits)).argmax()])


def filtered_log_probs(logits: Floats, sampling: Sampling) -> Floats:
    """Temperature, then top-k, top-p, min-p: unnormalised log-probabilities [V], -inf where filtered out."""
    with np.errstate(over="ignore", invalid="ignore"):
        scores = logits / sampling.temperature
        if not np.isfinite(scores.max()):  # a temperature so low that the quotient is beyond all numbers
            scores = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        kth = np.partition(scores, scores.size - sampling.top_k)[scores.size - sampling.top_k]
        scores = np.where(scores < kth, -np.inf, scores)
    if sampling.top_p < 1:
        scores = _top_p(scores, sampling.top_p)
    if sampling.min_p > 0:
        scores = np.where(scores < scores.max() + math.log(sampling.min_p), -np.inf, scores)
    return scores


def _top_p(scores: Floats, top_p: float) -> Floats:
    """Keep the smallest set of best tokens whose probability reaches top_p; ties in score go to the lower id.

    Sorting a whole vocabulary takes milliseconds: sort the best 1024 and fall back only if the cut is not among them.
    """
    probs = np.exp(scores - scores.max())
    wanted = top_p * probs.sum()
    for size in (min(TOP_P_FIRST, scores.size), scores.size):
        best = np.arange(scores.size) if size == scores.size else np.argpartition(-scores, size - 1)[:size]
        order = best[np.lexsort((best, -scores[best]))]
        kept = order[np.cumsum(probs[order]) - probs[order] < wanted]
        if size == scores.size or (kept.size < size and scores[kept[-1]] > scores[order[-1]]):
            break
    filtered = np.full_like(scores, -np.inf)
    filtered[kept] = scores[kept]
    return filtered
