"""The drafter interface: what a drafter is asked, what it is made of, what it remembers.

A drafter proposes; it never decides. It sees the target's hidden states and next tokens (`commit`), and offers tokens
by depth (`draft`): all from one pass, or in rounds, each of which reads what the rounds before have drafted.

Index convention (ALGORITHM section 1): row j pairs hidden state h_j with the next token x_{j+1}. After the row of
position t, head k (1..K) predicts x_{t+1+k}, which is depth k of the draft tree below the pending token x_{t+1}.

Shapes: T rows, D hidden size, W = (1 + taps) D, K heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from amphista.cache.static import KVCache, sent
from amphista.errors import ConfigError
from amphista.target.spec import Probes
from amphista.tree.candidates import Candidates

# Beyond any drafter that pays; what stands in a stranger's config.json must not steer loops or sizes.
MAX_HEADS = 64
MAX_LAYERS = 64
MAX_SHORTLIST = 256
MAX_SIZE = 1 << 20
HEAD_TEMPERATURES = (0.01, 100.0)
# After each round but the last: what is on offer of every sequence asked -> places, among what is on offer deepest, of
# the tokens below which the next round shall look.
Look = Callable[[Sequence[Candidates]], Sequence[Sequence[int]]]


def check_range(name: str, value: int | None, least: int, most: int) -> None:
    """Raise ConfigError for a setting outside least..most; None is left out."""
    if value is not None and not least <= value <= most:
        raise ConfigError(f"{name} is {str(value)[:40]}: expected {least} to {most}")


def check_taps(taps: tuple[int, ...], num_layers: int) -> None:
    """Raise ConfigError for taps that are not numbers of layers, ascending."""
    if list(taps) != sorted(set(taps) & set(range(1, num_layers + 1))):
        raise ConfigError(f"taps are {str(taps)[:40]}: expected numbers of layers, 1 to {num_layers}, ascending")


@dataclass
class DrafterState:
    """What a drafter remembers of one sequence; belongs to one generation, never to the drafter.

    target_cache: the target's own of that sequence, to be read alone, and no more of it than `num_rows` rows.
    """

    num_rows: int = 0
    features: Any = None
    pending: Tensor | None = None
    caches: list[Any] = field(default_factory=list)
    target_cache: KVCache | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(cache.num_bytes for cache in self.caches)


@dataclass(frozen=True)
class Ask:
    """One sequence of which a draft is asked, of so many heads; rows it has not read, hidden [T or more, W] with the
    tokens [T] that followed each of the first, are committed first.

    probed: what the target gave for the drafter's probes below the last of these rows [M, D].
    """

    state: DrafterState
    max_depth: int
    hidden: Tensor | None = None
    next_ids: Sequence[int] = ()
    probed: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """Settings common to all drafters that score tokens."""

    num_heads: int = 5
    lm_head: Literal["shared", "own"] = "shared"
    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        check_range("num_heads", self.num_heads, 1, MAX_HEADS)
        check_range("draft_vocab", self.draft_vocab, 1, 1 << 31)
        if self.lm_head not in ("shared", "own"):
            raise ConfigError(f"lm_head is {self.lm_head!r}: expected 'shared' or 'own'")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured on held-out answers (`train/calibrate.py`), so that expected acceptance equals realised.

    `greedy` and `sampled` divide each head's logits for the target's best token and, times the temperature, for one
    drawn by noise that nobody knows (engines do: `accept/coupling.py`); `coverage` is the share of text tokens inside
    the draft vocabulary; `accuracy[k][r]` is how often head k's rank-r token was the text's.
    """

    greedy: list[float]
    sampled: list[float]
    coverage: float = 1.0
    accuracy: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        least, most = HEAD_TEMPERATURES
        if not all(least <= value <= most for value in [*self.greedy, *self.sampled]):
            raise ConfigError(f"a head's temperature lies outside {least} to {most}: expected one near 1")
        if not 0 < self.coverage <= 1:
            raise ConfigError(f"coverage is {self.coverage}: expected a share above 0, at most 1")
        if not all(0 <= value <= 1 for ranks in self.accuracy for value in ranks):
            raise ConfigError("accuracy holds a number that is no share: expected 0 to 1")
        if not all(sum(ranks) <= 1.001 for ranks in self.accuracy):
            raise ConfigError("accuracy adds up to more than 1 over the ranks of a head")
        if len({len(self.greedy), len(self.sampled), len(self.accuracy or self.greedy)}) != 1:
            raise ConfigError("calibration has another number of heads in greedy, sampled and accuracy")

    @property
    def num_heads(self) -> int:
        return len(self.greedy)


class Drafter(nn.Module):
    """A proposer: subclasses implement `commit`, `draft` and `trim`. Those that score tokens have `scoring.py`.

    taps: after how many of the target's layers (1..L, ascending) it reads states, too: they stand in a row of hidden
    states behind h_t, as they are. num_early: behind how many of its first layers it is trained on residuals: in
    training these stand there, too, at the end.
    """

    name: str
    taps: tuple[int, ...] = ()
    num_early: int = 0
    config: DrafterConfig
    calibration: Calibration | None = None

    @property
    def num_heads(self) -> int:
        """Number of heads K, which is the depth of the deepest tree."""
        return self.config.num_heads

    @property
    def probes(self) -> Probes | None:
        """Rows that it lets ride on the target's forward; most have none."""
        return None

    @property
    def heads_a_round(self) -> int:
        """How many depths one round of asking gives: all, unless drafted tokens are read."""
        return self.num_heads

    @property
    def cost_key(self) -> dict[str, Any] | None:
        """All that the seconds of drafting depend on beside the target: dimensions, not weights. None: next to none."""
        return None

    @property
    def num_weights(self) -> int:
        """Number of trained weights."""
        return sum(weight.numel() for weight in self.parameters())

    def head_temperatures(self, temperature: float = 0.0) -> list[float]:
        """What divides each head's logits [K] for the target's best token, or for one drawn at a temperature by noise
        that nobody knows."""
        if self.calibration is None:
            return [temperature if temperature > 0 else 1.0] * self.num_heads
        if temperature > 0:
            return [head * temperature for head in self.calibration.sampled]
        return self.calibration.greedy

    @property
    def row_bytes(self) -> int:
        """Bytes of what is kept for each row."""
        return 0

    def freeze(self, *, native: bool = False, exact: bool = False) -> Drafter:
        """Make ready for decoding, in C where that can be had; most need not."""
        return self

    def prepare(self, num_ranks: int, num_rows: int) -> None:
        """Record now what drafting so many ranks behind so many rows will replay; most record nothing."""

    def start(self) -> DrafterState:
        """An empty state for a new sequence."""
        return DrafterState()

    def copy(self, state: DrafterState, num_rows: int) -> DrafterState:
        """The first `num_rows` rows, for another sequence; the next `commit` must come before the next `draft`."""
        caches = [cache.copied(num_rows) for cache in state.caches]
        return replace(state, num_rows=min(state.num_rows, num_rows), caches=caches)

    @abstractmethod
    def commit(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        """Append rows: `hidden` [T, W] with the tokens `next_ids` [T] that followed each. Only the last row drafts."""

    @abstractmethod
    def draft(self, state: DrafterState, num_ranks: int, max_depth: int | None = None) -> Candidates:
        """The best `num_ranks` tokens of the first `max_depth` heads, for the position after the last committed row."""

    def commit_all(self, asks: Sequence[Ask]) -> None:
        """Append the rows that wait."""
        for ask in asks:
            if ask.hidden is not None:
                hidden = ask.hidden[: len(ask.next_ids)]
                self.commit(ask.state, hidden, sent(ask.next_ids, hidden.device))

    def draft_all(self, asks: Sequence[Ask], num_ranks: int, look: Look | None = None) -> list[Candidates]:
        """Commit the rows that wait and draft for several sequences, each as deep as it can go. Broken off, it may have
        committed some of them.

        look: asked after each round, of those that draft in rounds; by default the `num_ranks` likeliest of each depth.
        """
        self.commit_all(asks)
        return [self.draft(ask.state, num_ranks, ask.max_depth) for ask in asks]

    @abstractmethod
    def trim(self, state: DrafterState, num_rows: int) -> None:
        """Forget all rows behind the first `num_rows`; the next `commit` must come before the next `draft`."""
