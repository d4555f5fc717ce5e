"""The speculative step: draft, grow, verify, accept, commit. Plain decoding is the same step with the root alone.

This is the only place where target, drafter, acceptance and cache meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amphista.accept.logprobs import TokenLogprob, token_logprobs
from amphista.accept.sampling import Chooser
from amphista.accept.walk import walk
from amphista.cache.static import sent
from amphista.drafter.base import Drafter
from amphista.drafter.captured import CapturedDrafter, captured
from amphista.drafter.lookup import DEEPEST
from amphista.engine.params import SamplingParams
from amphista.engine.sequence import Context, Sequence
from amphista.engine.stats import Clock, DecodeStats
from amphista.errors import RequestError
from amphista.target.captured import NODES
from amphista.target.target import Target
from amphista.target.text import IncrementalText
from amphista.tree.candidates import Candidates
from amphista.tree.grow import Grower

NO_CANDIDATES = Candidates([], [])


@dataclass(frozen=True)
class StepResult:
    """What one step (or the prefill) added: token ids, accepted draft tokens, log-probabilities where they are asked
    for. `text`: what may now be shown, filled in by the reader (`llm.Stream`)."""

    token_ids: list[int]
    num_accepted: int
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""


def end_ids(target: Target, params: SamplingParams) -> frozenset[int]:
    """The target's own end tokens, those asked for, and stop strings that are special tokens."""
    special = {} if target.text is None or not params.stop else target.text.special_tokens
    own = frozenset() if params.ignore_eos else target.eos_ids
    return own | set(params.stop_token_ids) | {special[stop] for stop in params.stop if stop in special}


class Engine:
    """Decodes sequences with one target, drafter and grower; a sequence's state is its context's, wherever it lies."""

    def __init__(self, target: Target, drafter: Drafter, grower: Grower) -> None:
        self.target, self.grower = target, grower
        self.drafter = captured(drafter, is_static=target.is_static)

    @property
    def _waits_for(self) -> torch.device:
        """What a step's clock waits for: nothing where replays end with a copy to the host, and more would only keep
        the host from going ahead of the device; moving committed rows then counts into what follows it."""
        return torch.device("cpu") if self.target.is_static else self.target.device

    def new_context(self) -> Context:
        """Empty caches for one conversation."""
        return Context(self.target.new_cache(), self.drafter.start())

    def prepare(self, num_rows: int) -> None:
        """Record now what decoding up to so many rows will replay: where time is measured, not in mid-answer."""
        deepest = max(self.drafter.num_heads, DEEPEST)
        is_chain = self.grower.max_nodes > NODES[-1]  # as long as what is offered
        self.target.prepare(deepest + 1 if is_chain else self.grower.max_nodes, num_rows)
        if isinstance(self.drafter, CapturedDrafter):
            self.drafter.prepare(self.grower.num_ranks, num_rows)

    def start(
        self, prompt_ids: list[int], params: SamplingParams, context: Context | None = None
    ) -> tuple[Sequence, StepResult]:
        """Prefill a prompt, reusing what `context` already holds of it, and choose the first token."""
        self.check(prompt_ids, params)
        context, params = context or self.new_context(), params.with_seed()
        stats, ends = DecodeStats(), end_ids(self.target, params)
        clock = Clock(stats, self.target.device)
        started = clock.now()
        chooser = Chooser(params, prompt_ids, ends)
        with clock.phase("prefill"):
            keep = context.rewind(prompt_ids, self.drafter)
            output = self.target.prefill(prompt_ids[keep:], context.cache)
            pending = chooser.choose(output.logits[-1], len(prompt_ids))
            context.defer(self.drafter, output.hidden, [*prompt_ids[keep + 1 :], pending])
            context.feed(self.drafter)
        sequence = Sequence(
            context=context,
            request=context.num_requests,
            params=params,
            chooser=chooser,
            prompt_ids=list(prompt_ids),
            end_ids=ends,
            max_positions=self.target.spec.max_positions,
            stops=self.new_text(params) if params.stop else None,
            stats=stats,
        )
        logprobs = self._logprobs(sequence, output.logits[-1:], [pending])
        sequence.take([pending])
        stats.num_prompt_tokens, stats.num_cached_tokens = len(prompt_ids), keep
        stats.prefill_seconds = clock.now() - started
        return sequence, StepResult([pending], 0, logprobs)

    def new_text(self, params: SamplingParams) -> IncrementalText | None:
        """What reads an answer's text and finds its stop strings; None without a tokenizer."""
        text = self.target.text
        return None if text is None else IncrementalText(text, params.stop, params.min_tokens)

    def step(self, sequence: Sequence) -> StepResult:
        """One target forward: between 1 and depth + 1 tokens. Broken off, it has done nothing, and can be repeated."""
        sequence.check_context()
        with sequence.whole_step():
            return self._step(sequence)

    def _step(self, sequence: Sequence) -> StepResult:
        clock = Clock(sequence.stats, self._waits_for)
        started = clock.now()
        context, root_position = sequence.context, sequence.root_position
        with clock.phase("draft"):
            candidates = self._propose(sequence)
        with clock.phase("tree"):
            growth = self.grower.grow(sequence.pending, candidates, sequence.max_depth)
        with clock.phase("verify"):
            output = self.target.verify(growth.tree, context.cache)
        with clock.phase("accept"):
            acceptance = walk(growth.tree, output.logits, sequence.chooser, root_position, output.choices)
            taken = sequence.take(acceptance.tokens)
            sequence.stats.num_dropped += len(acceptance.tokens) - taken
            acceptance = acceptance.cut(taken)
            logprobs = self._logprobs(sequence, output.logits, acceptance.tokens, acceptance.path)
        with clock.phase("commit"):
            context.cache.commit(acceptance.path)
            context.defer(self.drafter, self._rows(output.hidden, acceptance.path), acceptance.tokens)
            self.grower.learn(sequence.controller, candidates, growth.tree.num_nodes, acceptance.accepted)
        sequence.stats.count(growth, acceptance.num_accepted, drafted=candidates.num_heads > 0)
        sequence.stats.step_seconds.append(clock.now() - started)
        return StepResult(acceptance.tokens, acceptance.num_accepted, logprobs)

    def _logprobs(
        self, sequence: Sequence, logits: Tensor, tokens: list[int], path: list[int] | None = None
    ) -> list[TokenLogprob]:
        """Of tokens chosen at the nodes `path` (default all), kept in the sequence, too; none unless asked for."""
        if not sequence.params.logprobs:
            return []
        rows = logits if path is None else logits[sent(path, logits.device)]
        logprobs = token_logprobs(rows, tokens, sequence.params.top_logprobs)
        sequence.logprobs += logprobs
        return logprobs

    def _rows(self, hidden: Tensor, path: list[int]) -> Tensor:
        """Hidden states [T, D] of a path, copied; without heads nobody reads them, so they may be any."""
        return hidden[sent(path, hidden.device)] if self.drafter.num_heads else hidden[: len(path)]

    def _propose(self, sequence: Sequence) -> Candidates:
        """What may follow: what the sequence itself suggests, and what the heads say where it pays to ask them."""
        context, state = sequence.context, sequence.context.draft_state
        depth = min(sequence.max_depth, self.grower.max_depth)
        if depth == 0:
            return NO_CANDIDATES
        graft = self.drafter.draft_ngrams(state, context.token_ids, depth)
        if self.drafter.num_heads == 0 or not self.grower.wants_heads(sequence.controller, graft):
            return replace(NO_CANDIDATES, graft=graft)
        context.feed(self.drafter)
        depth = min(depth, self.drafter.num_heads)
        drafted = self.drafter.draft(state, self.grower.num_ranks, sequence.params.temperature, depth)
        return replace(drafted, graft=graft)

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raise RequestError for what cannot be decoded, before anything is."""
        params.check_ids(self.target.spec.vocab_size)
        if self.target.text is None and params.stop:
            raise RequestError("stop strings need a tokenizer, and this target was loaded without one")
        if not prompt_ids:
            raise RequestError("the prompt is empty: give at least one token")
        limit = self.target.spec.max_positions
        if len(prompt_ids) > limit:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, but the target's context holds "
                f"{self.target.spec.context}: shorten it"
            )
        known = range(self.target.spec.vocab_size)
        if unknown := [token for token in prompt_ids if type(token) is not int or token not in known]:
            raise RequestError(f"the prompt holds token id {unknown[0]!r}; the target has {len(known)} tokens, from 0")
