"""The target's choice of the next token: the argmax of its adjusted logits, or what keyed noise draws (accept/draw.py).

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amphista.accept.draw import (
    Drawn,
    Floats,
    Scores,
    draw_all,
    filtered_log_probs,
    gumbel_noise,
    noise_of,
    refuse_broken,
)
from amphista.accept.sampling import Sampling, fresh_seed
from amphista.native.noise import bits_of


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
        self._prompt = ids_of(set(prompt_ids) if sampling.repetition_penalty != 1 else ())
        self.output: Counter[int] = Counter()  # replaced, never changed
        self._biased, self._added = ids_of(sampling.logit_bias), list(sampling.logit_bias.values())
        self._banned = ids_of(sampling.suppress_tokens)
        self._ends = ids_of({*sampling.suppress_tokens, *end_ids})

    def extend(self, token_ids: Sequence[int]) -> None:
        """Tokens that became output."""
        if not self.sampling.is_plain:
            self.output = self.output + Counter(token_ids)

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the plain argmax of the logits, whatever came before."""
        return self.sampling.is_greedy and self.sampling.is_plain and self.grammar is None

    def choose(self, logits: Tensor, position: int, path: Sequence[int] = ()) -> int:
        """The token for absolute `position`, from the target's logits [V] at the position before."""
        return choose_all([Choice(self, logits, position, path)])[0]

    def scores(self, logits: Scores, position: int, path: Sequence[int] = ()) -> Scores:
        """Bias, then penalties, then bans and what the grammar forbids; in float32 as `transformers` has it."""
        sampling = self.sampling
        if sampling.is_plain and self.grammar is None:
            return logits
        scores = logits.copy()
        output = self.output + Counter(path) if path else self.output
        with np.errstate(over="ignore", invalid="ignore"):  # what no float32 holds is refused where it is the best
            scores[self._biased] += np.array(self._added, dtype=scores.dtype)
            self._punish(scores, output)
        scores[self._ends if position - self._first < sampling.min_tokens else self._banned] = -math.inf
        if self.grammar is not None:
            scores[~self.grammar.allowed(position - self._first)] = -math.inf
        return scores

    def _punish(self, scores: Scores, output: Counter[int]) -> None:
        sampling, outputs = self.sampling, ids_of(output)
        if sampling.repetition_penalty != 1:
            seen, penalty = np.append(self._prompt, outputs), sampling.repetition_penalty
            picked = scores[seen]
            scores[seen] = np.where(picked < 0, picked * penalty, picked / penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = np.array(list(output.values()), dtype=scores.dtype)
            scores[outputs] -= sampling.frequency_penalty * counts + sampling.presence_penalty

    def drawn(self, scores: Scores, position: int) -> Drawn:
        """What the token is drawn of above temperature 0."""
        return Drawn(scores, self.sampling, self._seed, position)

    def note(self, position: int, token: int) -> None:
        """Tell the grammar, if there is one, what was chosen."""
        if self.grammar is not None:
            self.grammar.chose(position - self._first, token)

    def noise(self, position: int, token_ids: Sequence[Sequence[int]]) -> list[Floats]:
        """The noise of some tokens at each of successive absolute positions, known before any logits are."""
        sizes = [len(some) for some in token_ids]
        positions = np.repeat(np.arange(position, position + len(sizes)), sizes)
        noise = noise_of(bits_of(self._seed, positions, list(chain(*token_ids))))
        return np.split(noise, np.cumsum(sizes)[:-1])

    def noise_along(self, position: int, token_ids: Sequence[int]) -> list[float]:
        """That of one token at each of successive positions."""
        positions = range(position, position + len(token_ids))
        along: list[float] = noise_of(bits_of(self._seed, positions, token_ids)).tolist()
        return along

    def margin(self, logits: Tensor, position: int, path: Sequence[int] = ()) -> float:
        """Gap between the two best scores: the logit margin when greedy, the gap of the noised scores otherwise."""
        (row,) = on_host([logits])
        scores = self.scores(row, position, path)
        if not self.sampling.is_greedy:
            scores = filtered_log_probs(scores.astype(np.float64), self.sampling)
            scores += gumbel_noise(self._seed, position, scores.size)
        second, best = np.sort(scores)[-2:]
        return float(best - second)


class Choice(NamedTuple):
    """One choice to make; path: the accepted tokens in between, which are not yet output."""

    chooser: Chooser
    logits: Tensor
    position: int
    path: Sequence[int] = ()


def choose_all(choices: Sequence[Choice]) -> list[int]:
    """The token of each; what is drawn is drawn together."""
    rows = on_host([one.logits for one in choices])
    scores = [one.chooser.scores(row, one.position, one.path) for one, row in zip(choices, rows, strict=True)]
    drawn = [i for i, one in enumerate(choices) if not one.chooser.sampling.is_greedy]
    tokens = [0 if i in drawn else _argmax(row) for i, row in enumerate(scores)]
    found = draw_all([choices[i].chooser.drawn(scores[i], choices[i].position) for i in drawn]) if drawn else []
    for i, token in zip(drawn, found, strict=True):
        tokens[i] = token
    for one, token in zip(choices, tokens, strict=True):
        one.chooser.note(one.position, token)
    return tokens


def on_host(rows: Sequence[Tensor]) -> list[Scores]:
    """Logits of the same type as arrays, at least float32; in one copy where they are elsewhere."""
    if rows[0].device.type != "cpu":
        rows = list(torch.stack(list(rows)).cpu())
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    return [row.to(wide).numpy() for row in rows]


def ids_of(token_ids: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(token_ids, dtype=np.int64)


def _argmax(scores: Scores) -> int:
    """The first of equals."""
    token = int(scores.argmax())
    refuse_broken(float(scores[token]))
    return token
