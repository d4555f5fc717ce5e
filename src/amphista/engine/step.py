"""The step, for any batch: propose, grow, forward, accept, commit, take. Some sequences read a chunk of their prompt in
it, the others verify a tree; plain decoding is a tree of the root alone.

This is the only place where target, drafter, acceptance and cache meet.

Law: a sequence's tokens are those of decoding it alone and plainly, whatever the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Several
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amphista.accept.chooser import Chooser
from amphista.accept.coupling import coupled, coupled_graft, ranks_to_name
from amphista.accept.logprobs import TokenLogprob, token_logprobs
from amphista.accept.walk import Walk, walk_all
from amphista.cache.static import sent
from amphista.drafter.base import Drafter
from amphista.drafter.captured_drafter import captured
from amphista.drafter.lookup import DEEPEST
from amphista.drafter.proposer import Proposer
from amphista.engine.loops import LoopWatch
from amphista.engine.params import SamplingParams
from amphista.engine.sequence import Ending, Sequence, whole_step
from amphista.engine.sequence_cache import SequenceCache
from amphista.engine.stats import Clock
from amphista.engine.trace import Source, StepTrace, sources
from amphista.errors import RequestError
from amphista.target.captured_forward import NODES
from amphista.target.output import TargetOutput
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.target.text import IncrementalText
from amphista.tree.budget import DraftRow, Plan
from amphista.tree.candidates import Candidates, with_forced
from amphista.tree.children import Growth
from amphista.tree.grow import Grower
from amphista.tree.learned import Forward
from amphista.tree.token_tree import TokenTree

TOLD_CHUNK = 64  # tokens of a prompt read at once where logits of all are wanted: they take V floats each


@dataclass(frozen=True)
class StepResult:
    """What one step added to a sequence: token ids, accepted draft tokens, log-probabilities where they are asked for;
    no token while a prompt is read. `sources`: who guessed each accepted token. `num_nodes`: of the tree it verified,
    `trace`: that tree, for sequences that ask for it. `text`: what may now be shown, filled in by the reader."""

    token_ids: list[int]
    num_accepted: int
    logprobs: list[TokenLogprob] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    num_nodes: int = 0
    trace: StepTrace | None = None
    text: str = ""


@dataclass(frozen=True)
class _Outcome:
    """What a forward means for one sequence: the nodes whose rows stay, the tokens chosen at the last nodes of that
    path, as far as the answer goes, and how many more were chosen in vain."""

    path: list[int]
    tokens: list[int]
    ending: Ending
    logprobs: list[TokenLogprob]
    num_dropped: int = 0


def end_ids(target: Target, params: SamplingParams) -> frozenset[int]:
    """The target's own end tokens, those asked for, and stop strings that are special tokens."""
    special = {} if target.text is None or not params.stop else target.text.special_tokens
    own = frozenset() if params.ignore_eos else target.eos_ids
    return own | set(params.stop_token_ids) | {special[stop] for stop in params.stop if stop in special}


class Engine:
    """Steps sequences with one target, proposer and grower; all state of a request is its sequence's.

    Any thread may step: one at a time.
    """

    def __init__(self, target: Target, proposer: Proposer | Drafter, grower: Grower) -> None:
        self.target, self.proposer, self.grower = target, Proposer.of(proposer), grower
        heads = self.proposer.heads
        self._heads = None if heads is None else captured(heads, is_static=target.is_static)
        self._taps = () if heads is None else heads.taps
        self._probes = None if heads is None else heads.probes
        self._lock = threading.Lock()

    @property
    def _waits_for(self) -> torch.device:
        """What a step's clock waits for: nothing where replays end with a copy to the host, and more would only keep
        the host from going ahead of the device; moving committed rows then counts into what follows it."""
        return torch.device("cpu") if self.target.is_static else self.target.device

    @property
    def max_nodes(self) -> int:
        """No tree grows larger, the root included."""
        deepest = max(self.proposer.num_heads, DEEPEST)
        is_chain = self.grower.max_nodes > NODES[-1]  # as long as what is offered
        return deepest + 1 if is_chain else self.grower.max_nodes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of keys and values, the drafter's included."""
        return self.target.row_bytes + (0 if self._heads is None else self._heads.row_bytes)

    def prepare(self, num_rows: int) -> None:
        """Record now what decoding up to so many rows will replay: where time is measured, not in mid-answer."""
        self.target.prepare(self.max_nodes, num_rows, self._taps)
        if self._heads is not None:
            self._heads.prepare(self.grower.num_ranks, num_rows)

    def new_sequence(self, prompt_ids: list[int], params: SamplingParams, *, cut_loops: bool = False) -> Sequence:
        """A request that nothing is done for yet. raises RequestError for what cannot be decoded."""
        self.check(prompt_ids, params)
        params, ends, token_ids = params.with_seed(), end_ids(self.target, params), list(prompt_ids)
        sequence = Sequence(
            token_ids=token_ids,
            num_prompt=len(token_ids),
            params=params,
            chooser=Chooser(params, prompt_ids, ends),
            end_ids=ends,
            max_positions=self.target.spec.max_positions,
            rows=SequenceCache(self.target, self._heads, token_ids),
            lookup=self.proposer.new_lookup(),
            stops=self.new_text(params) if params.stop else None,
            watch=LoopWatch() if cut_loops else None,
        )
        sequence.stats.num_prompt_tokens = len(token_ids)
        return sequence

    def new_text(self, params: SamplingParams) -> IncrementalText | None:
        """What reads an answer's text and finds its stop strings; None without a tokenizer."""
        text = self.target.text
        return None if text is None else IncrementalText(text, params.stop, params.min_tokens)

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
                f"the prompt has {len(prompt_ids)} tokens, but the target's context holds {self.target.spec.context}: "
                "shorten it"
            )
        known = range(self.target.spec.vocab_size)
        if unknown := [token for token in prompt_ids if type(token) is not int or token not in known]:
            raise RequestError(f"the prompt holds token id {unknown[0]!r}; the target has {len(known)} tokens, from 0")

    def step(self, batch: Several[Sequence]) -> list[StepResult | Exception]:
        """One target forward for all: each adds 1 to depth + 1 tokens, or reads a chunk of its prompt.

        A sequence that fails has its error in its place, and stays as it was; the others go on. Broken off (Ctrl-C),
        the step has done nothing, and can be repeated.
        """
        with self._lock:
            if len(batch) > 1:
                with suppress(Exception), whole_step(batch):
                    return list(self._step(batch))
            return [self._step_alone(sequence) for sequence in batch]  # one, or several: whose error was it?

    def decode(self, prompt_ids: list[int], params: SamplingParams) -> Sequence:
        """Decode one prompt to its end."""
        sequence = self.new_sequence(prompt_ids, params)
        while not sequence.is_finished:
            (result,) = self.step([sequence])
            if isinstance(result, Exception):
                raise result
        return sequence

    def _step_alone(self, sequence: Sequence) -> StepResult | Exception:
        try:
            with whole_step([sequence]):
                return self._step([sequence])[0]
        except Exception as error:
            return error

    def _step(self, batch: Several[Sequence]) -> list[StepResult]:
        for sequence in batch:
            sequence.check()
        reading = [sequence for sequence in batch if sequence.num_unread]
        decoding = [sequence for sequence in batch if not sequence.num_unread]
        clock = Clock([one.stats for one in batch], self._waits_for, whole=None if decoding else "prefill")
        started = clock.now()
        chunks = [_chunk(sequence) for sequence in reading]
        plan, offered, asked_at = self._plan(decoding, chunks, clock)
        pairs = zip(decoding, plan.growths, strict=True)
        drafted = [Span(growth.tree, s.rows.cache, only_choices=s.only_choices) for s, growth in pairs]
        spans = chunks + (self._with_probes(drafted, plan) if plan.probed else drafted)
        with clock.phase("verify"):
            outputs = self.target.forward(spans, self._taps)
        ended = clock.now()
        with clock.phase("accept"):
            outcomes = [_read(*parts) for parts in zip(reading, spans, outputs, strict=False)]
            outcomes += _verified(decoding, spans[len(reading) :], outputs[len(reading) :])
        with clock.phase("commit"):
            each_done = zip([*reading, *decoding], outcomes, outputs, spans, strict=True)
            results = {id(parts[0]): _advance(*parts) for parts in each_done}
            if decoding:
                accepted = [results[id(sequence)].token_ids[:-1] for sequence in decoding]
                self.grower.observe(plan, accepted, ended - asked_at, asked_at - started)
        seconds = clock.now() - started
        _count(reading, decoding, plan, outcomes[len(reading) :], seconds)
        trees, paths = zip(plan.growths, offered, strict=True), [outcome.path for outcome in outcomes[len(reading) :]]
        for sequence, tree, path in zip(decoding, trees, paths, strict=True):
            results[id(sequence)] = _told(results[id(sequence)], sequence, tree, path, seconds)
        return [results[id(sequence)] for sequence in batch]

    def _plan(
        self, decoding: Several[Sequence], chunks: Several[Span], clock: Clock
    ) -> tuple[Plan, Several[Candidates], float]:
        """A tree for each sequence that decodes, grown from what the sequences themselves suggest, and from what the
        heads say of those for which it pays to ask them; what was on offer; when asking began."""
        past = [sequence.rows.cache.num_committed for sequence in decoding] + [span.num_past for span in chunks]
        num_read = sum(span.tree.num_nodes for span in chunks)
        plain = Forward(
            num_rows=len(decoding) + num_read,
            num_decoding=len(decoding),
            num_prompts=len(chunks),
            num_cached_rows=sum(past),
            num_prompt_rows=num_read,
        )
        if not decoding:
            return Plan([], [], [], plain), [], clock.now()
        with clock.phase("draft"):
            rests, several = self.grower.rests(plain), len(decoding) > 1
            seldom = several and self.proposer.use_lookup and self.grower.looks_seldom(plain)
            rows = [self._draft_row(sequence, seldom, rests=rests) for sequence in decoding]
            wanted = asked = [] if rests or self._heads is None else self.grower.whom_to_ask(rows, plain)
            if self._probes is not None:  # what was not probed has no draft: this step brings one
                asked = [b for b in wanted if decoding[b].rows.is_probed]
            for b in asked:
                decoding[b].rows.catch_up()
            asked_at = clock.now()
            candidates = self._ask(decoding, rows, asked, plain)
        with clock.phase("tree"):
            plan = self.grower.grow_batch(rows, candidates, asked, plain)
            plan = plan if self._probes is None else self._probed(plan, decoding, wanted)
        return plan, candidates, asked_at

    def _probed(self, plan: Plan, decoding: Several[Sequence], wanted: Several[int]) -> Plan:
        """The plan with probes in the trees of those whose next step may draft, below nodes that leave room for it."""
        assert self._probes is not None
        num_probes = self._probes.num_rows
        probed: list[list[int]] = [[] for _ in decoding]
        plan = replace(plan, probed=probed, num_probes=num_probes)
        for b in wanted:
            sequence, tree = decoding[b], plan.growths[b].tree
            deepest = min(sequence.max_depth - 2, sequence.max_positions - sequence.root_position - num_probes - 1)
            able = [node for node, depth in enumerate(tree.depths) if depth <= deepest]
            probed[b] += self.grower.where_to_probe(plan, b, able)
        return plan

    def _with_probes(self, spans: Several[Span], plan: Plan) -> list[Span]:
        """The same with probes below the nodes that the plan names."""
        assert self._probes is not None
        pairs = zip(spans, plan.probed, strict=True)
        return [span.probed(nodes, self._probes) for span, nodes in pairs]

    def _draft_row(self, sequence: Sequence, seldom: bool, *, rests: bool = False) -> DraftRow:
        depth = min(sequence.max_depth, self.grower.max_depth) if sequence.drafts and not rests else 0
        ids = sequence.token_ids
        graft = self.proposer.ngrams(sequence.lookup, ids, depth, seldom=seldom) if depth else None
        grammar, graft = sequence.chooser.grammar, coupled_graft(graft, sequence.chooser, sequence.root_position + 1)
        if grammar is not None and depth:
            graft = with_forced(graft, grammar.forced(sequence.num_output)[: min(depth, self.max_nodes - 1)])
        return DraftRow(sequence.controller, graft, depth, sequence.pending, sequence.rows.num_unfed)

    def _ask(
        self, decoding: Several[Sequence], rows: Several[DraftRow], asked: Several[int], plain: Forward
    ) -> list[Candidates]:
        """What is on offer for each sequence; the heads of all that are asked draft together."""
        candidates = [Candidates([], [], graft=row.graft) for row in rows]
        heads, num_ranks, choosers = self._heads, self.grower.num_ranks, [decoding[b].chooser for b in asked]
        if heads is None or not asked:
            return candidates
        asks = [decoding[b].rows.ask(min(rows[b].max_depth, heads.num_heads)) for b in asked]

        def note(drafts: Several[Candidates]) -> None:
            for b, chooser, offered in zip(asked, choosers, drafts, strict=True):
                drafted = coupled(offered, chooser, decoding[b].root_position + 1, heads.head_temperatures(), num_ranks)
                candidates[b] = drafted if rows[b].graft is None else replace(drafted, graft=rows[b].graft)

        def look(drafts: Several[Candidates]) -> Several[Several[int]]:
            note(drafts)
            return self.grower.look_below(rows, candidates, asked, plain)

        note(heads.draft_all(asks, ranks_to_name(choosers, num_ranks), look))
        for b in asked:
            decoding[b].rows.note_fed()
        return candidates


def _chunk(sequence: Sequence) -> Span:
    """The next tokens of a prompt."""
    start = sequence.rows.num_rows
    is_told = sequence.prompt_logprobs is not None
    size = min(max(1, sequence.chunk_len), sequence.num_unread, *[TOLD_CHUNK] * is_told)
    tokens = sequence.token_ids[start : start + size]
    return Span(TokenTree.chain(tokens), sequence.rows.cache, not is_told, sequence.only_choices)


def _read(sequence: Sequence, span: Span, output: TargetOutput) -> _Outcome:
    """A chunk stays whole; the first token of the answer is chosen at the end of the prompt."""
    size, tokens, choices = span.tree.num_nodes, list[int](), output.choices and output.choices[-1:]
    if size == sequence.num_unread and not sequence.num_output:
        end = Walk(TokenTree.chain([0]), output.logits[-1:], sequence.chooser, sequence.num_prompt - 1, choices)
        tokens = walk_all([end])[0].tokens
    _tell_prompt(sequence, output.logits)
    return _Outcome(list(range(size)), tokens, sequence.ending(tokens), _logprobs(sequence, output, [-1], tokens))


def _tell_prompt(sequence: Sequence, logits: Tensor) -> None:
    """Note what the target thought of the prompt's tokens that follow those just read; once, however often that is."""
    told, first = sequence.prompt_logprobs, sequence.rows.num_rows + 1
    if told is not None:
        tokens = sequence.prompt_ids[first : first + len(logits)]
        found = token_logprobs(logits[: len(tokens)], tokens, sequence.params.top_logprobs)
        told += found[len(told) + 1 - first :]


def _verified(decoding: Several[Sequence], spans: Several[Span], outputs: Several[TargetOutput]) -> list[_Outcome]:
    """The target's own way down each tree, as far as the answer goes."""
    outcomes, parts = [], list(zip(decoding, spans, outputs, strict=True))
    ways = walk_all([Walk(span.tree, o.logits, s.chooser, s.root_position, o.choices) for s, span, o in parts])
    for whole, (sequence, _, output) in zip(ways, parts, strict=True):
        ending = sequence.ending(whole.tokens)
        way = whole.cut(ending.num_taken)
        logprobs, num_dropped = _logprobs(sequence, output, way.path, way.tokens), len(whole.tokens) - ending.num_taken
        outcomes.append(_Outcome(way.path, way.tokens, ending, logprobs, num_dropped))
    return outcomes


def _logprobs(sequence: Sequence, output: TargetOutput, path: list[int], tokens: list[int]) -> list[TokenLogprob]:
    """Of tokens chosen at the nodes `path`; none unless asked for."""
    if not sequence.params.logprobs or not tokens:
        return []
    rows = output.logits[sent(path, output.logits.device)]
    return token_logprobs(rows, tokens, sequence.params.top_logprobs)


def _advance(sequence: Sequence, outcome: _Outcome, output: TargetOutput, span: Span) -> StepResult:
    """Rows first, tokens last: what is seen of a sequence is never ahead of its caches."""
    rows, path = sequence.rows, outcome.path
    base = rows.cache.num_committed
    next_ids = [*sequence.token_ids[base + 1 : base + 1 + len(path)], *outcome.tokens]
    rows.cache.commit(path)
    rows.defer(output.hidden, path, next_ids, None if span.probes is None else _probed_below(span, path[-1], output))
    sequence.logprobs += outcome.logprobs
    if outcome.tokens:
        sequence.take(outcome.tokens, outcome.ending)
    named = [Source.TARGET] * len(outcome.tokens)
    return StepResult(outcome.tokens, max(0, len(outcome.tokens) - 1), outcome.logprobs, named)


def _probed_below(span: Span, node: int, output: TargetOutput) -> Tensor | None:
    """Hidden states [M, D] of the probes below a node, if there are any."""
    first = span.tree.child(node, -1)
    return None if first is None or span.probes is None else output.hidden[first : first + span.probes.num_rows].clone()


def _told(
    result: StepResult,
    sequence: Sequence,
    offered: tuple[Growth, Candidates],
    path: list[int],
    seconds: float,
) -> StepResult:
    """The result with who guessed its tokens, and the whole tree where it is asked for."""
    growth, candidates = offered
    named, trace = sources(growth.tree, candidates, path), None
    if sequence.is_traced:
        every = sources(growth.tree, candidates, range(growth.tree.num_nodes))
        trace = StepTrace(growth.tree, every, growth.scores, path, seconds)
    return replace(result, sources=[*named[1:], Source.TARGET], num_nodes=growth.tree.num_nodes, trace=trace)


def _count(
    reading: Several[Sequence], decoding: Several[Sequence], plan: Plan, outcomes: Several[_Outcome], seconds: float
) -> None:
    """Into the stats; outcomes: of those that decode."""
    for sequence in reading:
        sequence.stats.prefill_seconds += seconds
    for b, (sequence, growth, outcome) in enumerate(zip(decoding, plan.growths, outcomes, strict=True)):
        sequence.stats.count(growth, len(outcome.tokens) - 1, drafted=b in plan.asked)
        sequence.stats.num_dropped += outcome.num_dropped
        sequence.stats.step_seconds.append(seconds)
