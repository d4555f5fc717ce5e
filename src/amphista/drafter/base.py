"""The drafter interface and what all parallel-head drafters share.

A drafter proposes; it never decides. It sees the target's hidden states and next tokens (`commit`), and offers
per-depth candidates (`draft`). All K heads come from one pass; nothing drafted is fed back.

Index convention (ALGORITHM section 1): row j pairs hidden state h_j with the next token x_{j+1}. After the row of
position t, head k (1..K) predicts x_{t+1+k}, which is depth k of the draft tree below the pending token x_{t+1}.

Shapes: B sequences, T rows, P selected rows, K heads, R ranks, S shortlist, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from amphista.drafter.path import PathCorrection, conditional, moved
from amphista.errors import ConfigError, DrafterError
from amphista.kernels.frozen import pack_linears
from amphista.kernels.linear import PackedLinear
from amphista.target.spec import SharedWeights, TargetSpec
from amphista.tree.candidates import Below, Candidates, Graft


@dataclass
class DrafterState:
    """What a drafter remembers of one sequence; belongs to one generation, never to the drafter."""

    num_rows: int = 0
    features: Any = None
    pending: Tensor | None = None
    caches: list[Any] = field(default_factory=list)
    lookup: Any = None


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """Settings common to all parallel-head drafters.

    `path_rank`: rank of the path correction (`path.py`, not in the paper), None for heads that know no paths;
    `path_shortlist`: the best tokens of each head that it is worked out for, as children and as parents.
    """

    num_heads: int = 5
    lm_head: Literal["shared", "own"] = "shared"
    draft_vocab: int | None = None
    path_rank: int | None = None
    path_shortlist: int = 16

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ConfigError(f"num_heads is {self.num_heads}: a drafter needs at least one head")
        if self.lm_head not in ("shared", "own"):
            raise ConfigError(f"lm_head is {self.lm_head!r}: expected 'shared' or 'own'")
        if self.draft_vocab is not None and self.draft_vocab < 1:
            raise ConfigError(f"draft_vocab is {self.draft_vocab}: give at least 1, or leave it out for all tokens")
        if self.path_rank is not None and self.path_rank < 1:
            raise ConfigError(f"path_rank is {self.path_rank}: give at least 1, or leave it out for no path correction")
        if self.path_shortlist < 1:
            raise ConfigError(f"path_shortlist is {self.path_shortlist}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured on held-out answers (`train/calibrate.py`), so that expected acceptance equals realised.

    `greedy` and `sampled` divide each head's logits at temperature 0 and above; `coverage` is the share of text
    tokens inside the draft vocabulary; `accuracy[k][r]` is how often head k's rank-r token was the text's.
    """

    greedy: list[float]
    sampled: list[float]
    coverage: float = 1.0
    accuracy: list[list[float]] = field(default_factory=list)


class Drafter(nn.Module):
    """A proposer. Subclasses implement `head_states` (training form), `commit` and `draft_states` (decoding form)."""

    name: str
    config: DrafterConfig

    @property
    def num_heads(self) -> int:
        """Number of heads K, which is the depth of the deepest tree."""
        return self.config.num_heads

    @property
    def inner(self) -> Drafter:
        """The drafter that has weights: itself, unless it stands inside another."""
        return self

    def start(self) -> DrafterState:
        """An empty state for a new sequence."""
        return DrafterState()

    def recall(self, state: DrafterState, token_ids: list[int], max_depth: int) -> Graft | None:
        """What the sequence itself suggests after `token_ids`, the pending one included; costs no pass over anything.

        The ids grow at their end between two calls, or begin anew after a `trim`.
        """
        return None

    @abstractmethod
    def commit(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        """Append rows: `hidden` [T, D] with the tokens `next_ids` [T] that followed each. Only the last row drafts."""

    @abstractmethod
    def draft(
        self, state: DrafterState, num_ranks: int, temperature: float = 0.0, max_depth: int | None = None
    ) -> Candidates:
        """The best `num_ranks` tokens of the first `max_depth` heads, for the position after the last committed row."""

    @abstractmethod
    def trim(self, state: DrafterState, num_rows: int) -> None:
        """Forget all rows behind the first `num_rows`; the next `commit` must come before the next `draft`."""


class ParallelHeads(Drafter):
    """K heads over the target's (or their own) LM head, full or over a draft vocabulary."""

    draft_ids: Tensor | None

    def __init__(self, config: DrafterConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.calibration: Calibration | None = None
        self._shared = shared
        self._shared_rows: tuple[Tensor, Tensor | None] | None = None
        self._packed_rows: PackedLinear | None = None
        self._path_table: Tensor | None = None
        self._frozen: tuple[torch.dtype, torch.device, int] | None = None
        size = config.draft_vocab
        if size is not None and size > spec.vocab_size:
            raise ConfigError(f"draft_vocab is {size}, but the target has only {spec.vocab_size} tokens")
        ids = torch.arange(size) if size is not None else None
        self.register_buffer("draft_ids", ids)
        if config.lm_head == "own":
            weight, bias = self._gather_head()
            self.own_head = nn.Parameter(weight.float().expand(config.num_heads, -1, -1).clone())
            own_bias = None if bias is None else bias.float().expand(config.num_heads, -1).clone()
            self.own_bias = None if own_bias is None else nn.Parameter(own_bias)
        self.path = None if config.path_rank is None else PathCorrection(config.path_rank, spec)

    # -- once trained -------------------------------------------------------------------------------------------

    def freeze(self) -> ParallelHeads:
        """Pack for decoding what can be packed on this device; training and moving end here. Repeating it is free."""
        if self._frozen is None:
            self._frozen = (self.dtype, self.device, self.num_weights)
            pack_linears(self.eval().requires_grad_(False))
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype if self._frozen is None else self._frozen[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device if self._frozen is None else self._frozen[1]

    @property
    def num_weights(self) -> int:
        """Number of trained weights, the shared LM head not counted."""
        return sum(p.numel() for p in self.parameters()) if self._frozen is None else self._frozen[2]

    # -- the draft vocabulary and its LM head ---------------------------------------------------------------------

    def set_draft_ids(self, token_ids: Tensor) -> None:
        """Choose the draft vocabulary: ids [N], distinct, sorted ascending on entry into the drafter."""
        if self.draft_ids is None or token_ids.numel() != self.draft_ids.numel():
            raise DrafterError(f"{token_ids.numel()} draft tokens were given to a drafter sized for {self.draft_vocab}")
        if token_ids.unique().numel() != token_ids.numel():
            raise DrafterError("the draft vocabulary names a token twice")
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self.spec.vocab_size:
            raise DrafterError(f"the draft vocabulary names a token beyond the target's {self.spec.vocab_size}")
        self.draft_ids.copy_(token_ids.sort().values)
        self.forget_gathered_head()
        if self.config.lm_head == "own":
            weight, bias = self._gather_head()
            with torch.no_grad():
                self.own_head.copy_(weight.float().expand_as(self.own_head))
                if self.own_bias is not None and bias is not None:
                    self.own_bias.copy_(bias.float().expand_as(self.own_bias))

    @property
    def draft_vocab(self) -> int:
        """Number of tokens the heads score."""
        return self.spec.vocab_size if self.draft_ids is None else int(self.draft_ids.numel())

    def forget_gathered_head(self) -> None:
        """Drop the gathered LM-head rows; they are gathered again at the next use (after a load or a move)."""
        self._shared_rows = self._packed_rows = self._path_table = None

    def _apply(self, *args: Any, **kwargs: Any) -> ParallelHeads:
        self.forget_gathered_head()
        super()._apply(*args, **kwargs)
        return self

    def _gather_head(self) -> tuple[Tensor, Tensor | None]:
        device = self._shared.head_weight.device
        ids = torch.arange(self.spec.vocab_size) if self.draft_ids is None else self.draft_ids
        return self._shared.head_rows(ids.to(device))

    def target_logits(self, hidden: Tensor) -> Tensor:
        """The target's logits [..., N] over the draft vocabulary, for its hidden states [..., D]."""
        if self.draft_ids is None:
            return self._shared.project(hidden)
        if self._frozen is not None:
            return self._shared.transform(self._packed_head(hidden))
        if self._shared_rows is None:
            with torch.inference_mode(False):  # who asks first may be a validation, who asks next a training step
                self._shared_rows = self._gather_head()
        weight, bias = self._shared_rows
        return self._shared.transform(torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias))

    def _packed_head(self, hidden: Tensor) -> Tensor:
        if self._packed_rows is None:
            self._packed_rows = PackedLinear(*self._gather_head())
        rows = hidden.reshape(-1, hidden.shape[-1]).to(self._packed_rows.dtype)
        return self._packed_rows(rows).view(*hidden.shape[:-1], -1)

    def own_weights(self, head: int) -> tuple[Tensor, ...]:
        """What one head alone scores with: weight [N, D] and, where there is one, bias [N]; () for the shared head."""
        if self.config.lm_head == "shared":
            return ()
        return (self.own_head[head],) if self.own_bias is None else (self.own_head[head], self.own_bias[head])

    def score(self, states: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        """Logits [..., N] of one head's states [..., D] by its `own_weights`."""
        if not own:
            return self.target_logits(states)
        return self._shared.transform(torch.nn.functional.linear(states, *own))

    def head_logits(self, states: Tensor, head: int | None = None) -> Tensor:
        """States [..., K, D] -> logits [..., K, N]; or, for one head, [..., D] -> [..., N]."""
        if self.config.lm_head == "shared":
            return self.target_logits(states)
        if head is not None:
            return self.score(states, self.own_weights(head))
        return torch.stack([self.head_logits(states[..., k, :], k) for k in range(states.shape[-2])], dim=-2)

    # -- training and decoding forms ------------------------------------------------------------------------------

    @abstractmethod
    def head_states(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        """Training form, all positions at once: hidden [B, T, D], next ids [B, T], flat rows [P] -> [P, K, D]."""

    @abstractmethod
    def draft_states(self, state: DrafterState) -> Tensor:
        """Decoding form: the head states [K, D] of the last committed row."""

    def forward(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        """Same as `head_states`; the name that distributed wrappers call."""
        return self.head_states(hidden, next_ids, select)

    @abstractmethod
    def match_scale(self, hidden_rms: float) -> None:
        """Scale the start so that every head's first logits are close to the target's own, LM(h_t)."""

    @torch.inference_mode()
    def draft(
        self, state: DrafterState, num_ranks: int, temperature: float = 0.0, max_depth: int | None = None
    ) -> Candidates:
        states = self.draft_states(state)[:max_depth]  # the LM head is the larger part of a draft
        return self.rank(self.head_logits(states).float(), num_ranks, temperature, states)

    def rank(
        self, logits: Tensor, num_ranks: int, temperature: float = 0.0, states: Tensor | None = None
    ) -> Candidates:
        """Logits [k, N] of the first k heads -> the best tokens of each under the calibrated temperatures.

        states [k, D] are what the logits were made from; without them nothing is said of paths.
        """
        divisors = self.head_temperatures(temperature)[: logits.shape[0]].to(logits.device)
        knows_paths = self.path is not None and states is not None and len(logits) > 1
        width = max(num_ranks, self.config.path_shortlist) if knows_paths else num_ranks
        token_ids, log_probs = self.top_ranks(logits / divisors[:, None], width)
        below = None
        if knows_paths and states is not None:
            ranks, values = self.ranks_below(states, token_ids, log_probs, divisors, num_ranks)
            below = Below(ranks.tolist(), values.tolist())
        return Candidates(token_ids.tolist(), log_probs.tolist(), below=below)

    def top_ranks(self, logits: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
        """Tempered logits [..., N] -> token ids and log-probabilities [..., R], discounted by the coverage.

        A head knows nothing of tokens outside its vocabulary: what it says is conditional on the text staying inside.
        """
        best = logits.topk(min(num_ranks, logits.shape[-1]), dim=-1)
        log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
        return self._token_ids(best.indices), best.values - log_total + self._log_coverage

    @property
    def _log_coverage(self) -> float:
        return math.log(max(1.0 if self.calibration is None else self.calibration.coverage, 1e-9))

    def _token_ids(self, index: Tensor) -> Tensor:
        """Places in the draft vocabulary -> token ids."""
        return index if self.draft_ids is None else self.draft_ids[index]

    def head_temperatures(self, temperature: float) -> Tensor:
        """What divides each head's logits [K] at this request temperature."""
        if self.calibration is None:
            return torch.full((self.num_heads,), temperature if temperature > 0 else 1.0)
        if temperature > 0:
            return torch.tensor(self.calibration.sampled) * temperature
        return torch.tensor(self.calibration.greedy)

    # -- paths: what a head says once it knows the token above (path.py) ------------------------------------------

    @property
    def trains_heads(self) -> bool:
        """Whether anything but the path correction has a gradient."""
        return any(weight.requires_grad for name, weight in self.named_parameters() if not name.startswith("path."))

    def freeze_heads(self) -> None:
        """Train the path correction alone."""
        for name, weight in self.named_parameters():
            weight.requires_grad_(name.startswith("path."))

    def correction(self, states: Tensor, above: Tensor) -> Tensor:
        """What is added to head states [..., D] below the tokens `above` [...], broadcast -> [..., D]."""
        assert self.path is not None
        correction: Tensor = self.path(states, self.path.read(self._shared.embed(above).to(states.dtype)))
        return correction

    def given_pending(self, states: Tensor, pending: Tensor) -> Tensor:
        """For heads that have not read the pending tokens [...]: states [..., K, D] with the first head's corrected."""
        if self.path is None:
            return states
        first = states[..., 0, :]
        return torch.cat([(first + self.correction(first, pending))[..., None, :], states[..., 1:, :]], dim=-2)

    def given_above(self, logits: Tensor, states: Tensor, correction: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        """Training form: one head's logits [M, N] of states [M, D], each row given the token above it.

        correction [M, D] is what `correction` gave for these tokens; own: what the head scores with.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        index = logits.detach().topk(min(self.config.path_shortlist, logits.shape[-1]), dim=-1).indices
        rows = self._rows(self._token_ids(index), own)
        moves = moved(states, correction[:, None], *rows, self._shared.transform)
        return logits.scatter_add(-1, index, moves[:, 0].to(logits.dtype))

    def ranks_below(
        self, states: Tensor, token_ids: Tensor, log_probs: Tensor, divisors: Tensor, num_ranks: int
    ) -> tuple[Tensor, Tensor]:
        """Decoding form, all heads' shortlists at once: `Below` as tensors [..., K - 1, S parents, R best children].

        states [..., K, D]; token_ids and log_probs [..., K, S or more] as `top_ranks` gives them; divisors [K].
        """
        token_ids, log_probs = (ranked[..., : self.config.path_shortlist] for ranked in (token_ids, log_probs))
        assert self.path is not None
        corrections = self.path(states[..., 1:, None, :], self._read(token_ids[..., :-1, :], states.dtype))
        rows = self._shortlist_rows(token_ids[..., 1:, :])
        moves = moved(states[..., 1:, :], corrections, *rows, self._shared.transform)
        children = log_probs[..., 1:, None, :] - self._log_coverage
        given = conditional(children, moves.float() / divisors[1:, None, None])
        best = given.topk(min(num_ranks, given.shape[-1]), dim=-1)
        return best.indices, best.values + self._log_coverage

    def _read(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What the path correction reads of drafted tokens [...]: once trained, from a table [N, 2 * rank]."""
        assert self.path is not None
        if self._frozen is None:
            return self.path.read(self._shared.embed(token_ids).to(dtype))
        if self._path_table is None:
            every = self._token_ids(torch.arange(self.draft_vocab, device=token_ids.device))
            self._path_table = self.path.read(self._shared.embed(every).to(dtype))
        return self._path_table[self._draft_index(token_ids)]

    def _draft_index(self, token_ids: Tensor) -> Tensor:
        """Token ids of the draft vocabulary -> places in it."""
        return token_ids if self.draft_ids is None else torch.searchsorted(self.draft_ids, token_ids.contiguous())

    def _rows(self, token_ids: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """What scores tokens [..., S]: rows [..., S, D] of the LM head (or of one head's own), and their biases."""
        if not own:
            return self._shared.head_rows(token_ids)
        index = self._draft_index(token_ids)
        return own[0][index], own[1][index] if len(own) > 1 else None

    def _shortlist_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for all heads but the first, [..., K - 1, S, D]."""
        if self.config.lm_head == "shared":
            return self._rows(token_ids, ())
        rows = [self._rows(ids, self.own_weights(k)) for k, ids in enumerate(token_ids.unbind(-2), start=1)]
        biases = [bias for _, bias in rows if bias is not None]
        return torch.stack([weight for weight, _ in rows], -3), torch.stack(biases, -2) if biases else None
