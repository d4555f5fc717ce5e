"""Metrics: what happens here, as Prometheus reads it, in a registry of the server's own. Names are vLLM's, where it has
them, behind `amphista:`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from amphista.engine.loop import Update
from amphista.engine.request import Request, State
from amphista.engine.sequence import Sequence
from amphista.engine.step import StepResult
from amphista.errors import QueueFullError, UnavailableError
from amphista.serve.worker import Load

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_POSITIONS = 16  # deeper ones are counted as this


class Metrics:
    """load: what the scheduler holds now. cost_ratio: how far off the measured costs are now, where there are any."""

    def __init__(self, model: str, load: Callable[[], Load], cost_ratio: Callable[[], float] | None = None) -> None:
        self._registry, self._model = CollectorRegistry(), model
        self._last: dict[Request, float] = {}  # when its last tokens came
        for name, text, read in (
            ("num_requests_running", "Requests with rows.", lambda: load().num_running),
            ("num_requests_waiting", "Requests without rows.", lambda: load().num_waiting),
            ("kv_cache_usage_perc", "Share of the memory for keys and values.", lambda: load().kv_usage),
        ):
            self._gauge(name, text, read)
        if cost_ratio is not None:
            self._gauge("cost_model_ratio", "Seconds of a plain step over what was measured once.", cost_ratio)
        self._load, self._num_preempted = load, 0
        self.preemptions = self._counter("num_preemptions", "Requests that gave up their rows for others.")
        self.queries = self._counter("prefix_cache_queries", "Prompt tokens looked for among kept rows.")
        self.hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens decoded.")
        self.success = self._counters("request_success", "Answers that ended.", "finished_reason")
        self.refused = self._counters("requests_refused", "Requests that were not answered.", "reason")
        self.first = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.between = self._histogram("inter_token_latency_seconds", "A step's time over its tokens.")
        self.whole = self._histogram("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self.queued = self._histogram("request_queue_time_seconds", "Before anything of the prompt was read.")
        self.reading = self._histogram("request_prefill_time_seconds", "Reading the prompt.")
        self.decoding = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        self.iteration = self._histogram("iteration_tokens", "Tokens of an iteration.", NODES)
        self.nodes = self._histogram("step_nodes", "Nodes verified for a request in a step, the root included.", NODES)
        self.drafts = self._counter("spec_decode_num_drafts", "Trees with more than the root.")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "Nodes but the roots.")
        self.accepted = self._counters("spec_decode_num_accepted_tokens", "Draft tokens accepted.", "source")
        self.by_position = self._counters("spec_decode_num_accepted_tokens_per_pos", "By depth.", "position")

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self._registry)

    def note(self, updates: list[Update], now: float) -> None:
        """Count an iteration; `now` is when it ended."""
        num_tokens, num_preempted = 0, self._load().num_preempted
        self.preemptions.inc(num_preempted - self._num_preempted)
        self._num_preempted = num_preempted
        for update in updates:
            if isinstance(update.result, StepResult) and update.result.token_ids:
                num_tokens += len(update.result.token_ids)
                self._step(update.request, update.result, now)
            if update.state.has_ended:
                self._end(update, now)
        if num_tokens:
            self.generation_tokens.inc(num_tokens)
            self.iteration.observe(num_tokens)

    def _step(self, request: Request, result: StepResult, now: float) -> None:
        last = self._last.get(request)
        self._last[request] = now
        if last is None:
            self.first.observe(now - request.submitted_at)
            return
        self.between.observe((now - last) / len(result.token_ids))
        self.nodes.observe(result.num_nodes)
        if result.num_nodes > 1:
            self.drafts.inc()
            self.draft_tokens.inc(result.num_nodes - 1)
        for position, source in enumerate(result.sources[:-1]):
            self.accepted(source.value).inc()
            self.by_position(str(min(position, MAX_POSITIONS))).inc()

    def _end(self, update: Update, now: float) -> None:
        request = update.request
        self._last.pop(request, None)
        if update.state is not State.FINISHED:
            self.refused(_reason(update)).inc()
            return
        sequence = request.sequence
        assert isinstance(sequence, Sequence) and sequence.finish_reason is not None and request.admitted_at is not None
        stats = sequence.stats
        self.success(sequence.finish_reason.value).inc()
        self.prompt_tokens.inc(stats.num_prompt_tokens)
        self.queries.inc(stats.num_prompt_tokens)
        self.hits.inc(stats.num_cached_tokens)
        self.whole.observe(now - request.submitted_at)
        self.queued.observe(request.admitted_at - request.submitted_at)
        self.reading.observe(stats.prefill_seconds)
        self.decoding.observe(stats.decode_seconds)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        gauge = Gauge(f"amphista:{name}", text, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(read)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"amphista:{name}", text, ["model_name"], registry=self._registry).labels(self._model)

    def _counters(self, name: str, text: str, label: str) -> Callable[[str], Counter]:
        """One for each value of a label."""
        counter = Counter(f"amphista:{name}", text, ["model_name", label], registry=self._registry)
        return cache(lambda value: counter.labels(self._model, value))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        histogram = Histogram(f"amphista:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)


def _reason(update: Update) -> str:
    if update.state is State.CANCELLED:
        return "cancelled"
    kinds = {QueueFullError: "queue_full", UnavailableError: "unavailable"}
    return next((reason for kind, reason in kinds.items() if isinstance(update.error, kind)), "error")
