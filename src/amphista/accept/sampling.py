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
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amphista.errors import RequestError, TargetError
from amphista.native.noise import bits_along, bits_at, first_bits, may_win

Floats = NDArray[np.float64]
TOP_P_FIRST = 1024
FEW = 8  # tokens are few where they are not one of so many
ROUNDING = 1e-6  # far above that of a few float64 additions on scores


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose. temperature 0 is greedy; top_k 0 or -1, top_p 1, min_p 0 and the penalties' defaults are off.

    repetition_penalty looks at prompt and output (arXiv 1909.05858, section 4.1), frequency_penalty and
    presence_penalty at the output alone, as in the OpenAI API. logit_bias: {token id: what is added to its logit}.
    suppress_tokens: ids that are never chosen. min_tokens: no token that ends the answer before so many are there.
    seed None: a fresh one for each answer, told in `Answer.params`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    suppress_tokens: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value, is_whole = plain(getattr(self, name)), name in WHOLE
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
                raise RequestError(f"{name} is {shown(value)}: expected a{' whole' if is_whole else ''} number")
            if not NUMBERS[name][0](value):
                raise RequestError(f"{name} is {shown(value)}: expected {NUMBERS[name][1]}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "suppress_tokens", token_ids("suppress_tokens", self.suppress_tokens))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Whether logits are taken as they are: no penalty, bias or ban."""
        return (
            (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1, 0, 0)
            and not (self.logit_bias or self.suppress_tokens)
            and self.min_tokens == 0
        )

    @property
    def is_filtered(self) -> bool:
        """Whether tokens of little probability are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def with_seed(self) -> Self:
        """The same with a seed: its own, or a fresh one."""
        return self if self.seed is not None else replace(self, seed=fresh_seed())


def fresh_seed() -> int:
    """53 bits of the system's entropy: every reader of JSON keeps them whole."""
    return secrets.randbits(53)


def is_finite(value: float) -> bool:
    """Whether a number is one of the floats; a whole one may be too large for that."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value for a message; Python writes no number of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


Check = Callable[[Any], bool]
NUMBERS: dict[str, tuple[Check, str]] = {
    "temperature": (lambda value: is_finite(value) and value >= 0, "0 (greedy) or more"),
    "top_k": (lambda value: value >= -1, "0 or -1 (off) or more"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0 and at most 1 (off)"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 (off) to 1"),
    "repetition_penalty": (lambda value: is_finite(value) and value > 0, "a number above 0; 1 is off"),
    "frequency_penalty": (is_finite, "a finite number; 0 is off"),
    "presence_penalty": (is_finite, "a finite number; 0 is off"),
    "min_tokens": (lambda value: value >= 0, "0 (off) or more"),
    "seed": (lambda value: 0 <= value < 2**64, "an integer from 0 to 2^64 - 1, or none for a fresh one"),
}
WHOLE = ("top_k", "min_tokens", "seed")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or several as a tuple; raises RequestError."""
    ids = plain(value)
    ids = (ids,) if type(ids) is int else ids
    if not isinstance(ids, list | tuple | set | frozenset) or not all(type(i) is int and i >= 0 for i in ids):
        raise RequestError(f"{name} is {shown(value)}: expected a list of token ids (whole numbers)")
    return tuple(ids)


def plain(value: Any) -> Any:
    """Arrays, tensors and their numbers as lists and numbers; what is none as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if any(hasattr(part, "tolist") for part in value) else value
    return value.tolist() if hasattr(value, "tolist") else value


def _bias(value: Any) -> dict[int, float]:
    """Token id -> bias; the keys may be strings, as in JSON. raises RequestError."""
    try:
        bias = {int(token): float(added) for token, added in dict(value or {}).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"logit_bias is {shown(value)}: expected {{token id: number}}") from error
    if any(token < 0 for token in bias) or not all(map(math.isfinite, bias.values())):
        raise RequestError(f"logit_bias is {shown(value)}: expected token ids from 0 and finite numbers")
    return bias


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Floats:
    """Standard Gumbel noise [V], indexed by token id.

    Uniforms are 52 bits plus a half, so strictly inside (0, 1), and both logarithms are finite.
    """
    return _noise(first_bits(seed, position, vocab_size))


def gumbel_argmax(scores: NDArray[np.floating[Any]], seed: int, position: int, temperature: float = 1.0) -> int:
    """argmax(scores / temperature + gumbel_noise(seed, position, V)), with logarithms for tokens alone that can win.

    Noise grows with its bits, so the largest bits bound it: where score + that bound stays below what the best-scored
    token reaches with its own noise, no logarithm is needed. At V = 49152 that leaves some hundred tokens; in C, where
    each token is bounded by its own bits, some ten.
    """
    best = int(scores.argmax())
    top = float(scores[best])
    _refuse_broken(top)
    if scores.dtype == np.float32 and (told := may_win(seed, position, scores, best, temperature)) is not None:
        return _noised_argmax(scores, *told, top, temperature)
    left = np.flatnonzero(scores > -np.inf)
    if FEW * left.size <= scores.size:  # a filter has left few
        return _noised_argmax(scores, left, bits_at(seed, position, left), top, temperature)
    bits = first_bits(seed, position, scores.size)
    reach = float(_noise(bits[[best]])[0] - _noise(bits.max(keepdims=True))[0])
    with np.errstate(over="ignore"):
        least = np.nextafter(scores.dtype.type(top + temperature * (reach - ROUNDING)), scores.dtype.type(-np.inf))
    alive = np.flatnonzero(scores >= least)
    return _noised_argmax(scores, alive, bits[alive], top, temperature)


def _noised_argmax(
    scores: NDArray[np.floating[Any]],
    tokens: NDArray[np.int64],
    bits: NDArray[np.uint64],
    top: float,
    temperature: float,
) -> int:
    """Of some tokens. top: the best score."""
    with np.errstate(over="ignore"):
        below = (scores[tokens].astype(np.float64) - top) / temperature
    return int(tokens[(below + _noise(bits)).argmax()])


def _noise(bits: NDArray[np.uint64]) -> Floats:
    uniforms = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: Floats = -np.log(-np.log(uniforms))
    return noise


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


class Grammar(Protocol):
    """What an answer must look like: which tokens may stand at each place of it, given those chosen before."""

    def allowed(self, index: int) -> NDArray[np.bool_]:
        """Which tokens [V] may be number `index` of the answer; those before it were chosen."""

    def forced(self, index: int) -> list[int]:
        """What must come from number `index` on, as far as there is no choice: to be drafted, not to be trusted."""

    def chose(self, index: int, token: int) -> None:
        """Token number `index` was chosen; what was chosen there and behind it before is forgotten."""


class Chooser:
    """The target's choice at successive positions of one sequence.

    prompt_ids and the output (`extend`) are what penalties look at; end_ids are kept back until `min_tokens` are there.
    Tokens on the path under verification are passed with each choice, because a plain decoding would have had them in
    its output. A grammar sees what is chosen, in order, and nothing else: so it asks of each token what it would ask in
    plain decoding.
    """

    grammar: Grammar | None = None

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], end_ids: Iterable[int] = ()) -> None:
        self.sampling = sampling
        self._seed = fresh_seed() if sampling.seed is None else sampling.seed
        self._first = len(prompt_ids)  # the position of the first output token
        self._prompt = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self.output: Counter[int] = Counter()  # replaced, never changed
        self._banned = sorted({*sampling.suppress_tokens})
        self._ends = sorted({*sampling.suppress_tokens, *end_ids})

    def extend(self, token_ids: Iterable[int]) -> None:
        """Tokens that became output."""
        if not self.sampling.is_plain:
            self.output = self.output + Counter(token_ids)

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the plain argmax of the logits, whatever came before."""
        return self.sampling.is_greedy and self.sampling.is_plain and self.grammar is None

    def choose(self, logits: Tensor, position: int, path: Iterable[int] = ()) -> int:
        """The token for absolute `position`, from the target's logits [V] at the position before."""
        if self.sampling.is_greedy:
            scores = _quick(self._adjusted(logits, position, path))
            token = int(scores.argmax())
            _refuse_broken(float(scores[token]))
        else:
            token = self._draw(logits, position, path)
        if self.grammar is not None:
            self.grammar.chose(position - self._first, token)
        return token

    def _draw(self, logits: Tensor, position: int, path: Iterable[int]) -> int:
        if self.sampling.is_filtered:
            return gumbel_argmax(self._log_probs(logits, position, path), self._seed, position)
        adjusted = self._adjusted(logits, position, path).cpu()
        scores: NDArray[np.floating[Any]] = adjusted.to(torch.promote_types(adjusted.dtype, torch.float32)).numpy()
        return gumbel_argmax(scores, self._seed, position, self.sampling.temperature)

    def noise(self, position: int, token_ids: Sequence[Sequence[int]]) -> list[Floats]:
        """The noise of some tokens at each of successive absolute positions, known before any logits are."""
        bits = [bits_at(self._seed, at, ids) for at, ids in enumerate(token_ids, position)]
        ends = np.cumsum([len(some) for some in bits])
        noise = _noise(np.concatenate(bits))
        return [noise[end - len(some) : end] for some, end in zip(bits, ends, strict=True)]

    def noise_along(self, position: int, token_ids: Sequence[int]) -> list[float]:
        """That of one token at each of successive positions."""
        along: list[float] = _noise(bits_along(self._seed, position, token_ids)).tolist()
        return along

    def margin(self, logits: Tensor, position: int, path: Iterable[int] = ()) -> float:
        """Gap between the two best scores: the logit margin when greedy, the gap of the noised scores otherwise."""
        best = self._scores(logits, position, path).topk(2).values
        return float(best[0] - best[1])

    def _scores(self, logits: Tensor, position: int, path: Iterable[int]) -> Tensor:
        if self.sampling.is_greedy:
            return self._adjusted(logits, position, path)
        log_probs = self._log_probs(logits, position, path)
        return torch.from_numpy(log_probs + gumbel_noise(self._seed, position, log_probs.size))

    def _log_probs(self, logits: Tensor, position: int, path: Iterable[int]) -> Floats:
        scores = self._adjusted(logits, position, path).double().cpu().numpy()
        _refuse_broken(float(scores.max()))
        return filtered_log_probs(scores, self.sampling)

    def _adjusted(self, logits: Tensor, position: int, path: Iterable[int]) -> Tensor:
        """Bias, then penalties, then bans and what the grammar forbids; in float32 as `transformers` has it, whatever
        type the logits come in."""
        sampling = self.sampling
        if sampling.is_plain and self.grammar is None:
            return logits
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if sampling.logit_bias:
            scores[list(sampling.logit_bias)] += scores.new_tensor(list(sampling.logit_bias.values()))
        output = self.output + Counter(path) if path else self.output
        if sampling.repetition_penalty != 1 and (seen := sorted(self._prompt | output.keys())):
            picked = scores[seen]
            penalty = sampling.repetition_penalty
            scores[seen] = torch.where(picked < 0, picked * penalty, picked / penalty)
        if output and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = scores.new_tensor(list(output.values()))
            scores[list(output)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        scores[self._ends if position - self._first < sampling.min_tokens else self._banned] = -math.inf
        if self.grammar is not None:
            allowed = torch.from_numpy(self.grammar.allowed(position - self._first)).to(scores.device)
            scores.masked_fill_(~allowed, -math.inf)
        return scores


def _quick(scores: Tensor) -> Any:
    """An array, whose argmax of some ten thousand numbers takes a tenth of the tensor's; the first of equals, too."""
    return scores.numpy() if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64) else scores


def _refuse_broken(best: float) -> None:
    """Raise where the best score shows that there is nothing to choose from."""
    if math.isnan(best) or best == math.inf:
        raise TargetError(
            "the target's logits are no finite numbers: its weights are damaged, its type is too coarse, or a bias or "
            "penalty goes beyond float32"
        )
    if best == -math.inf:
        raise RequestError("every token is suppressed or forbidden: nothing is left to choose from")
