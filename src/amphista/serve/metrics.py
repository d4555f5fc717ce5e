"""Metrics: what happens here, as Prometheus reads it, in a registry of the server's own. Names are vLLM's, where it has
them, behind `amphista:`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from amphista.engine.loop import Update
from amphista.engine.request import Request, State
from amphista.engine.sequence import Sequence
from amphista.engine.step import StepResult
from amphista.errors import QueueFullError, UnavailableError
from amphista.serve.worker import Load

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_POSITIONS = 16  # deeper ones are counted as this


@dataclass
class Count:
    """A counter, or one for each value of a label."""

    name: str
    text: str
    label: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def add(self, number: float, value: str = "") -> None:
        """Count on."""
        self.numbers[value] = self.numbers.get(value, 0) + number

    def told(self, model: str) -> CounterMetricFamily:
        """What a scrape gets."""
        if self.label is None:
            family = CounterMetricFamily(self.name, self.text, labels=["model_name"])
            family.add_metric([model], self.numbers.get("", 0))
            return family
        family = CounterMetricFamily(self.name, self.text, labels=["model_name", self.label])
        for value, number in self.numbers.items():
            family.add_metric([model, value], number)
        return family


class Spread:
    """A histogram."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def note(self, value: float) -> None:
        """Count a value among those up to the next bound."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self, model: str) -> HistogramMetricFamily:
        """What a scrape gets."""
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        family.add_metric([model], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        return family


class Metrics(Collector):
    """Counted and scraped by one thread: prometheus-client's own counters take locks and check labels at each token.

    load: what the scheduler holds now. cost_ratio: how far off the measured costs are now, where there are any."""

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
        self._registry.register(self)
        self._load, self._num_preempted = load, 0
        self._all: list[Count | Spread] = []
        self.preemptions = self._count("num_preemptions", "Requests that gave up their rows for others.")
        self.queries = self._count("prefix_cache_queries", "Prompt tokens looked for among kept rows.")
        self.hits = self._count("prefix_cache_hits", "Prompt tokens found there.")
        self.prompt_tokens = self._count("prompt_tokens", "Prompt tokens of answered requests.")
        self.generation_tokens = self._count("generation_tokens", "Tokens decoded.")
        self.success = self._count("request_success", "Answers that ended.", "finished_reason")
        self.refused = self._count("requests_refused", "Requests that were not answered.", "reason")
        self.first = self._spread("time_to_first_token_seconds", "From the request to its first token.")
        self.between = self._spread("inter_token_latency_seconds", "A step's time over its tokens.")
        self.whole = self._spread("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self.queued = self._spread("request_queue_time_seconds", "Before anything of the prompt was read.")
        self.reading = self._spread("request_prefill_time_seconds", "Reading the prompt.")
        self.decoding = self._spread("request_decode_time_seconds", "From the first token to the last.")
        self.iteration = self._spread("iteration_tokens_total", "Tokens of an iteration.", NODES)
        self.nodes = self._spread("step_nodes", "Nodes verified for a request in a step, the root included.", NODES)
        self.drafts = self._count("spec_decode_num_drafts", "Trees with more than the root.")
        self.draft_tokens = self._count("spec_decode_num_draft_tokens", "Nodes but the roots.")
        self.accepted = self._count("spec_decode_num_accepted_tokens", "Draft tokens accepted.", "source")
        self.by_position = self._count("spec_decode_num_accepted_tokens_per_pos", "By depth.", "position")

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        """Counters and histograms, for the registry."""
        return (one.told(self._model) for one in self._all)

    def note(self, updates: list[Update], now: float) -> None:
        """Count an iteration; `now` is when it ended."""
        num_tokens, num_preempted = 0, self._load().num_preempted
        self.preemptions.add(num_preempted - self._num_preempted)
        self._num_preempted = num_preempted
        for update in updates:
            if isinstance(update.result, StepResult) and update.result.token_ids:
                num_tokens += len(update.result.token_ids)
                self._step(update.request, update.result, now)
            if update.state.has_ended:
                self._end(update, now)
        if num_tokens:
            self.generation_tokens.add(num_tokens)
            self.iteration.note(num_tokens)

    def _step(self, request: Request, result: StepResult, now: float) -> None:
        last = self._last.get(request)
        self._last[request] = now
        if last is None:
            self.first.note(now - request.submitted_at)
            return
        self.between.note((now - last) / len(result.token_ids))
        self.nodes.note(result.num_nodes)
        if result.num_nodes > 1:
            self.drafts.add(1)
            self.draft_tokens.add(result.num_nodes - 1)
        for position, source in enumerate(result.sources[:-1]):
            self.accepted.add(1, source.value)
            self.by_position.add(1, str(min(position, MAX_POSITIONS)))

    def _end(self, update: Update, now: float) -> None:
        request = update.request
        self._last.pop(request, None)
        if update.state is not State.FINISHED:
            self.refused.add(1, _reason(update))
            return
        sequence = request.sequence
        assert isinstance(sequence, Sequence) and sequence.finish_reason is not None and request.admitted_at is not None
        stats = sequence.stats
        self.success.add(1, sequence.finish_reason.value)
        self.prompt_tokens.add(stats.num_prompt_tokens)
        self.queries.add(stats.num_prompt_tokens)
        self.hits.add(stats.num_cached_tokens)
        self.whole.note(now - request.submitted_at)
        self.queued.note(request.admitted_at - request.submitted_at)
        self.reading.note(stats.prefill_seconds)
        self.decoding.note(stats.decode_seconds)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        gauge = Gauge(f"amphista:{name}", text, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(read)

    def _count(self, name: str, text: str, label: str | None = None) -> Count:
        count = Count(f"amphista:{name}", text, label)
        self._all.append(count)
        return count

    def _spread(self, name: str, text: str, bounds: tuple[float, ...] = SECONDS) -> Spread:
        spread = Spread(f"amphista:{name}", text, bounds)
        self._all.append(spread)
        return spread


def _reason(update: Update) -> str:
    if update.state is State.CANCELLED:
        return "cancelled"
    kinds = {QueueFullError: "queue_full", UnavailableError: "unavailable"}
    return next((reason for kind, reason in kinds.items() if isinstance(update.error, kind)), "error")
