"""How the target chooses its next token: penalties, temperature, filters, keyed noise.

One rule serves greedy and sampling. At temperature 0 the choice is the argmax. Above, it is the argmax of filtered
log-probabilities plus Gumbel noise that depends only on (seed, absolute position, token id): whatever drafter, tree or
batch leads to a position, the same token is chosen there. Sampled speculative output is therefore token-identical to
sampled autoregressive output, and each token has exactly the target's distribution (Gumbel-max).

Noise comes from NumPy's Philox counter generator: key = seed, counter = (block of token ids, position). Positions own
disjoint counter ranges, so (s, p) and (s + 1, p - 1) are unrelated.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amphista.errors import RequestError

Floats = NDArray[np.float64]
TOP_P_FIRST = 1024
ROUNDING = 1e-6  # far above that of a few float64 additions on scores


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "top_k", "seed"):
            value = getattr(self, name)
            kinds = int if name in ("top_k", "seed") else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise RequestError(f"{name} is {value!r}: expected a{' whole' if kinds is int else ''} number")

        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)}: expected {expected}")

        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 (greedy) or more")
        require(self.top_k >= 0, "top_k", "0 (off) or more")
        require(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1 (off)")
        require(0 <= self.min_p <= 1, "min_p", "a number from 0 (off) to 1")
        require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a number above 0; 1 is off",
        )
        require(0 <= self.seed < 2**64, "seed", "an integer from 0 to 2^64 - 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Floats:
    """Standard Gumbel noise [V], indexed by token id.

    Uniforms are 52 bits plus a half, so strictly inside (0, 1), and both logarithms are finite.
    """
    return _noise(_random_bits(seed, position, vocab_size))


def gumbel_argmax(scores: Floats, seed: int, position: int) -> int:
    """argmax(scores + gumbel_noise(seed, position, V)), with logarithms for the tokens alone that can win.

    Noise grows with its bits, so the largest bits bound it: where score + that bound stays below what the best-scored
    token reaches with its own noise, no logarithm is needed. At V = 49152 that leaves some hundred tokens.
    """
    bits = _random_bits(seed, position, scores.size)
    best = scores.argmax()
    floor = scores[best] + _noise(bits[[best]])[0] - _noise(bits.max(keepdims=True))[0]
    alive = np.flatnonzero(scores >= floor - ROUNDING)
    return int(alive[(scores[alive] + _noise(bits[alive])).argmax()])


def _random_bits(seed: int, position: int, vocab_size: int) -> NDArray[np.uint64]:
    """64 random bits a token [V]."""
    return np.random.Philox(key=seed, counter=[0, position, 0, 0]).random_raw(vocab_size)


def _noise(bits: NDArray[np.uint64]) -> Floats:
    uniforms = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: Floats = -np.log(-np.log(uniforms))
    return noise


def filtered_log_probs(logits: Floats, sampling: Sampling) -> Floats:
    """Temperature, then top-k, top-p, min-p: unnormalised log-probabilities [V], -inf where filtered out."""
    scores = logits / sampling.temperature
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


class Chooser:
    """The target's choice at successive positions of one sequence.

    `seen` are the tokens a repetition penalty looks at: prompt and output. Tokens on the path under verification are
    passed with each choice, because a plain decoding would have had them in its output.
    """

    def __init__(self, sampling: Sampling, seen: Iterable[int]) -> None:
        self.sampling = sampling
        self._seen = set(seen) if sampling.repetition_penalty != 1 else set()

    def extend(self, token_ids: Iterable[int]) -> None:
        """Tokens that became output."""
        if self.sampling.repetition_penalty != 1:
            self._seen.update(token_ids)

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the plain argmax of the logits, whatever came before."""
        return self.sampling.is_greedy and self.sampling.repetition_penalty == 1

    def choose(self, logits: Tensor, position: int, path: Iterable[int] = ()) -> int:
        """The token for absolute `position`, from the target's logits [V] at the position before."""
        if self.sampling.is_greedy:
            return int(self._scores(logits, position, path).argmax())
        return gumbel_argmax(self._log_probs(logits, path), self.sampling.seed, position)

    def margin(self, logits: Tensor, position: int, path: Iterable[int] = ()) -> float:
        """Gap between the two best scores: the logit margin when greedy, the gap of the noised scores otherwise."""
        best = self._scores(logits, position, path).topk(2).values
        return float(best[0] - best[1])

    def _scores(self, logits: Tensor, position: int, path: Iterable[int]) -> Tensor:
        if self.sampling.is_greedy:
            return self._penalised(logits, path)
        log_probs = self._log_probs(logits, path)
        return torch.from_numpy(log_probs + gumbel_noise(self.sampling.seed, position, log_probs.size))

    def _log_probs(self, logits: Tensor, path: Iterable[int]) -> Floats:
        return filtered_log_probs(self._penalised(logits, path).double().cpu().numpy(), self.sampling)

    def _penalised(self, logits: Tensor, path: Iterable[int]) -> Tensor:
        """Divide positive and multiply negative logits of tokens already there (arXiv 1909.05858, section 4.1)."""
        if self.sampling.repetition_penalty == 1:
            return logits
        index = torch.tensor(sorted({*self._seen, *path}), device=logits.device)
        if index.numel() == 0:
            return logits
        logits = logits.clone()
        picked = logits[index]
        penalty = self.sampling.repetition_penalty
        logits[index] = torch.where(picked < 0, picked * penalty, picked / penalty)
        return logits


def choose_each(choosers: Sequence[Chooser], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """What each of B choosers makes of its own row of logits [B, V] at its own position; one pass for all argmaxes."""
    tokens: list[int] = logits.float().argmax(-1).tolist()
    others = [index for index, chooser in enumerate(choosers) if not chooser.is_argmax]
    for index, row in zip(others, logits[others].cpu(), strict=True):
        tokens[index] = choosers[index].choose(row, positions[index])
    return tokens
