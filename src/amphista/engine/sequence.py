"""Sequence: one request's tokens, caches and counters; Context: what survives it into the next chat turn.

Invariant between steps: the caches hold every token but the last. The last one is the pending token. The drafter's
cache holds what it was fed; rows wait in `unfed` until it is asked again, and are then given to it in one go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amphista.accept.logprobs import TokenLogprob
from amphista.accept.sampling import Chooser
from amphista.cache.static import KVCache, sent
from amphista.drafter.base import Drafter, DrafterState
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.stats import DecodeStats
from amphista.errors import CapacityError, RequestError
from amphista.target.text import IncrementalText
from amphista.tree.controller import DraftController

MAX_UNFED = 512


@dataclass
class Context:
    """Cached rows and the token ids they were made from."""

    cache: KVCache
    draft_state: DrafterState
    token_ids: list[int] = field(default_factory=list)
    num_requests: int = 0
    unfed: list[tuple[Tensor, list[int]]] = field(default_factory=list)

    def defer(self, drafter: Drafter, hidden: Tensor, next_ids: list[int]) -> None:
        """Keep rows [T, D] and the tokens that followed each for the drafter; they do not pile up without end."""
        self.unfed.append((hidden, next_ids))
        if drafter.num_heads == 0 or sum(len(ids) for _, ids in self.unfed) > MAX_UNFED:
            self.feed(drafter)

    def feed(self, drafter: Drafter) -> None:
        """Give the drafter every row it has not read. Row j is made of h_j and x_{j+1}, and never rolled back."""
        if self.unfed:
            num_fed = self.cache.num_committed - sum(len(ids) for _, ids in self.unfed)
            if self.draft_state.num_rows > num_fed:  # it was fed, and broken off before that was noted
                drafter.trim(self.draft_state, num_fed)
            hidden = torch.cat([rows for rows, _ in self.unfed]) if len(self.unfed) > 1 else self.unfed[0][0]
            device = hidden.device if drafter.num_heads else None  # without heads nobody reads the ids: no copy
            ids = sent([token for _, tokens in self.unfed for token in tokens], device)
            drafter.commit(self.draft_state, hidden, ids)
            self.unfed.clear()  # last: a feeding that is broken off is done again

    def rewind(self, prompt_ids: list[int], drafter: Drafter) -> int:
        """Keep what a new prompt shares with the cached rows; returns how many rows that is.

        With a common prefix of P tokens, P - 1 rows stay: the drafter's row P was made with a next token that may now
        be another. The last prompt token is always read again, because its logits are needed. A prefill that broke off
        has left fewer rows in the drafter than in the target.
        """
        self.feed(drafter)
        cached = self.token_ids[: self.cache.num_committed]
        common = 0
        for old, new in zip(cached, prompt_ids, strict=False):
            if old != new:
                break
            common += 1
        keep = max(0, min(common - 1, self.draft_state.num_rows))
        self.cache.trim(keep)
        drafter.trim(self.draft_state, keep)
        self.token_ids = list(prompt_ids)
        self.num_requests += 1
        return keep


@dataclass
class Sequence:
    """One request. While it runs, `context.token_ids` are its prompt and output; the last one is pending.

    stops: the text so far, where a stop string may end it; else text is the reader's.
    """

    context: Context
    request: int
    params: SamplingParams
    chooser: Chooser
    prompt_ids: list[int]
    end_ids: frozenset[int]
    max_positions: int
    stops: IncrementalText | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    controller: DraftController = field(default_factory=DraftController)
    finish_reason: FinishReason | None = None
    output_ids: list[int] = field(default_factory=list)  # everything emitted, the end token included
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def check_context(self) -> None:
        """Raise RequestError when another request has taken over this one's caches, CapacityError when they do not hold
        every token but the pending one."""
        if self.context.num_requests != self.request:
            raise RequestError("this answer cannot go on: a later request has taken over its conversation's caches")
        cache = self.context.cache
        if not cache.num_committed == cache.num_rows == self.root_position:
            raise CapacityError(f"{cache.num_committed} rows are cached, but {self.root_position} tokens were read")

    @property
    def pending(self) -> int:
        """Chosen by the target, not yet in any cache: the root of the next tree."""
        return self.context.token_ids[-1]

    @property
    def root_position(self) -> int:
        """Absolute position of the pending token."""
        return len(self.context.token_ids) - 1

    @property
    def max_depth(self) -> int:
        """How deep a tree may be: a step emits one token more than it accepts, and positions end with the context."""
        remaining = self.params.max_new_tokens - self.stats.num_tokens
        return max(0, min(remaining - 1, self.max_positions - 1 - self.root_position))

    def take(self, tokens: list[int]) -> int:
        """Add chosen tokens up to the first that ends the answer; returns how many were taken."""
        taken = 0
        for token in tokens:
            taken += 1
            self.context.token_ids.append(token)
            self.output_ids.append(token)
            self.stats.num_tokens += 1
            if token in self.end_ids:
                self.finish_reason = FinishReason.STOP
            elif self.stops is not None:
                self.stops.push(token)
                if self.stops.stopped:
                    self.finish_reason = FinishReason.STOP
            full = self.stats.num_tokens >= self.params.max_new_tokens or self.root_position >= self.max_positions
            if self.finish_reason is None and full:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                break
        self.chooser.extend(tokens[:taken])
        return taken

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """All that a block does to this sequence, or, where it is broken off (Ctrl-C), nothing of it.

        Rows behind the pending token are dropped; what was there before lies untouched below them.
        """
        context, num_tokens, num_output = self.context, len(self.context.token_ids), len(self.output_ids)
        unfed, stats, output = list(context.unfed), self.stats.snapshot(), self.chooser.output
        stops = None if self.stops is None else self.stops.copy()
        try:
            yield
        except BaseException:
            self.finish_reason, self.stops, self.chooser.output = None, stops, output
            del context.token_ids[num_tokens:], self.output_ids[num_output:], self.logprobs[num_output:]
            context.unfed[:] = unfed
            context.cache.trim(self.root_position)
            self.stats.restore(stats)
            raise
