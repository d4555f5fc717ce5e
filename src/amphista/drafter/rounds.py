"""Sequential heads: each reads the tokens that were drafted above its own, so a draft is asked for in rounds.

A drafter of this kind says where a path stands that has read the pending token alone (`first`), where it stands after
one token more (`next`), and `first` again for all positions of a text at once (`first_along`). That is the training
form: along a text the tokens that `next` reads are the text's. So head k means the same in both forms by construction,
and what `next` computes for a path must depend on nothing but that path (tests/laws/test_rounds.py).

One pass may give several depths (`heads_a_round`): then their heads are scored together, what stands below a token of
the block is the same below all of its depth, and a new round begins behind the last of them alone.

Which tokens a round looks below is not the drafter's choice (`tree/grow.py`). What is made for drafted tokens lives in
`Paths` and ends with the draft: no cache ever holds a row of it.

Shapes: B sequences, T rows, P selected rows, M rows, n paths, K heads, r heads a round, R ranks, D hidden size.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from amphista.cache.static import sent
from amphista.drafter.base import Ask, DrafterState, Look
from amphista.drafter.native_layers import put_in
from amphista.drafter.scoring import ScoringDrafter, StateOf
from amphista.errors import NativeError
from amphista.tree.asking import Offered
from amphista.tree.candidates import Candidates

logger = logging.getLogger("amphista")


@dataclass(frozen=True)
class Paths:
    """Where some paths stand: `states` [n, D] of the head that is next on each.

    What else a drafter needs to go on is its own: tensors have a row a path, other fields are common to all.
    """

    states: Tensor

    @property
    def of_round(self) -> Tensor:
        """Right behind a pass: the states [n, r, D] of all heads that it gives, the next one's first."""
        return self.states[:, None]

    def at(self, index: Tensor | slice) -> Self:
        """Some of them, as often as `index` names each."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        chosen = {
            name: value[index] if isinstance(index, slice) else value.index_select(0, index)
            for name, value in tensors.items()
        }
        return replace(self, **chosen)


PathsT = TypeVar("PathsT", bound=Paths)


class SequentialHeads(ScoringDrafter, Generic[PathsT]):
    """K heads, of which head k reads the k - 1 tokens drafted above its own."""

    @property
    def heads_a_round(self) -> int:
        return 1

    def _go_native(self, *, exact: bool) -> None:
        """Multiply in C, or say in a line why not."""
        try:
            native_heads = self._heads_in_c(exact=exact)
            put_in(self, exact=exact)
        except NativeError as error:
            self.why_not_native = str(error)
            logger.warning("%s drafts without products in C, slower: %s", self.name, error)
            return
        self.why_not_native, self._native_heads = None, native_heads
        self._frozen = (torch.float32, self.device, self.num_weights)
        if self.config.lm_head == "own":
            del self.own_head, self.own_bias

    @abstractmethod
    def first(self, states: Sequence[DrafterState]) -> PathsT:
        """The paths [B] that have read the pending token of each sequence, its last committed row."""

    @abstractmethod
    def first_along(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> PathsT:
        """The same in training form: hidden [B, T, D], next ids [B, T], flat rows [P] -> paths [P]."""

    @abstractmethod
    def next(self, paths: PathsT, tokens: Tensor) -> PathsT:
        """Where paths [n] stand once they have read one token [n] more each."""

    def head_states(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        state, rows = self.states_of(hidden, next_ids, select)(slice(None)), torch.arange(len(select))
        rows = rows.to(select.device)
        return torch.stack([state(head, rows) for head in range(self.num_heads)], dim=1)

    def states_of(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Callable[[slice], StateOf]:
        paths, ahead = self.first_along(hidden, next_ids, select), _tokens_ahead(next_ids, select, self.num_heads - 1)
        return lambda some: _AlongText(self, paths.at(some), ahead[some]).state

    def _scores(self, paths: PathsT, heads: slice) -> Tensor:
        """Logits [n, r, N] of some heads, the next ones, right behind a pass."""
        states = paths.of_round[:, : heads.stop - heads.start]
        if self.config.lm_head == "shared":
            return self.head_logits(states, heads.start).float()
        each = zip(states.unbind(1), range(heads.start, heads.stop), strict=True)
        return torch.stack([self.head_logits(state, head) for state, head in each], dim=1).float()

    @torch.inference_mode()
    def draft_all(self, asks: Sequence[Ask], num_ranks: int, look: Look | None = None) -> list[Candidates]:
        self.commit_all(asks)
        drafts = [Offered(self.heads_a_round) for _ in asks]
        look = look or (lambda _: [draft.likeliest(num_ranks) for draft in drafts])
        divisors = torch.tensor(self.head_temperatures(), device=self.device)
        paths = self.first([ask.state for ask in asks])
        owners, places = list(range(len(asks))), [0] * len(asks)  # of each path: whose it is, what it has read last
        for head in range(deepest := min(self.num_heads, max(ask.max_depth for ask in asks))):
            slot = head % self.heads_a_round
            if slot == 0:
                heads = slice(head, min(head + self.heads_a_round, deepest))
                logits = self._scores(paths, heads) / divisors[heads, None]
                ranked = [part.transpose(0, 1).tolist() for part in self.top_ranks(logits, num_ranks)]
                blocks = list(range(len(owners)))  # of each path: which of those that were scored
            tokens, log_probs = ([part[slot][block] for block in blocks] for part in ranked)
            starts = {b: owners.index(b) for b in dict.fromkeys(owners)}
            for b, start in starts.items():
                rows = slice(start, start + owners.count(b))
                drafts[b].add(places[rows], tokens[rows], log_probs[rows])
            able = [b for b in starts if head + 1 < min(asks[b].max_depth, self.num_heads)]
            named = look([draft.candidates for draft in drafts]) if able else []
            chosen = [(b, place) for b in able for place in named[b]]
            if not chosen:
                break
            above = [starts[b] + place // len(tokens[0]) for b, place in chosen]
            read = [drafts[b].deepest[place] for b, place in chosen]
            blocks = [blocks[path] for path in above]
            paths = self.next(paths.at(sent(above, self.device)), sent(read, self.device))
            owners, places = (list(column) for column in zip(*chosen, strict=True))
        return [draft.candidates for draft in drafts]


class _AlongText:
    """The states of one head after the other, where the tokens read are those of the text, `ahead` [M, K - 1]."""

    def __init__(self, drafter: SequentialHeads[Any], paths: Paths, ahead: Tensor) -> None:
        self._drafter, self._paths, self._ahead = drafter, paths, ahead
        self._head, self._rows = 0, torch.arange(len(ahead), device=ahead.device)

    def state(self, head: int, rows: Tensor) -> Tensor:
        """Of rows, ascending, that the head before was asked for; heads are asked in their order."""
        paths = self._paths.at(torch.searchsorted(self._rows, rows))
        if head:
            assert head == self._head + 1, "heads are asked one after the other"
            paths = self._drafter.next(paths, self._ahead[rows, head - 1])
        self._head, self._rows, self._paths = head, rows, paths
        return paths.states


def _tokens_ahead(next_ids: Tensor, select: Tensor, number: int) -> Tensor:
    """x_{t+2} .. of the flat rows t [P] in next ids [B, T] -> [P, number]; behind the end the last one again, which no
    head counts."""
    length = next_ids.shape[1]
    columns = select[:, None] % length + torch.arange(1, number + 1, device=select.device)
    return next_ids.flatten()[(select - select % length)[:, None] + columns.clamp_max(length - 1)]
