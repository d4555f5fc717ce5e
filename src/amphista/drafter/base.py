"""The drafter interface and what all parallel-head drafters share.

A drafter proposes; it never decides. It sees the target's hidden states and next tokens (`commit`), and offers
per-depth candidates (`draft`). All K heads come from one pass; nothing drafted is fed back.

Index convention (ALGORITHM section 1): row j pairs hidden state h_j with the next token x_{j+1}. After the row of
position t, head k (1..K) predicts x_{t+1+k}, which is depth k of the draft tree below the pending token x_{t+1}.

Shapes: B sequences, T rows, P selected rows, K heads, R ranks, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from amphista.errors import ConfigError, DrafterError
from amphista.kernels.frozen import pack_linears
from amphista.kernels.linear import PackedLinear, quick_type
from amphista.target.spec import SharedWeights, TargetSpec
from amphista.tree.candidates import Candidates, Graft


@dataclass
class DrafterState:
    """What a drafter remembers of one sequence; belongs to one generation, never to the drafter."""

    num_rows: int = 0
    features: Any = None
    caches: list[Any] = field(default_factory=list)
    lookup: Any = None


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """Settings common to all parallel-head drafters."""

    num_heads: int = 5
    lm_head: Literal["shared", "own"] = "shared"
    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ConfigError(f"num_heads is {self.num_heads}: a drafter needs at least one head")
        if self.lm_head not in ("shared", "own"):
            raise ConfigError(f"lm_head is {self.lm_head!r}: expected 'shared' or 'own'")
        if self.draft_vocab is not None and self.draft_vocab < 1:
            raise ConfigError(f"draft_vocab is {self.draft_vocab}: give at least 1, or leave it out for all tokens")


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
        self._frozen: tuple[torch.dtype, torch.device, int] | None = None
        self._product_type: torch.dtype | None = None
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

    # -- once trained -------------------------------------------------------------------------------------------

    def freeze(self, *, exact: bool = False, as_trained: bool = False) -> ParallelHeads:
        """Make ready for decoding on this device; training, moving and saving end here. Repeating it is free.

        exact: products in the drafter's own type also where bfloat16 would be faster (`quick_type`). as_trained: keep
        the form it was trained in, as on a GPU, where graphs of it are recorded (captured.py).
        """
        if self._frozen is None:
            as_trained = as_trained or self.device.type != "cpu"
            self._frozen = (self.dtype, self.device, self.num_weights)
            self._product_type = self.dtype if exact or as_trained else quick_type(self.dtype, self.device)
            self.eval().requires_grad_(False)
            with torch.inference_mode():
                if as_trained:
                    pack_linears(self)
                else:
                    self.pack(self._product_type)
        return self

    def pack(self, dtype: torch.dtype) -> None:
        """Replace what was trained by what decodes, its products in `dtype`."""
        pack_linears(self)

    def _save_to_state_dict(self, *args: Any) -> None:
        if self._frozen is not None:
            raise DrafterError(f"this {self.name} drafter was made ready for decoding: load it again to save it")
        super()._save_to_state_dict(*args)

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
        self._shared_rows = self._packed_rows = None

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
            self._shared_rows = self._gather_head()
        weight, bias = self._shared_rows
        return self._shared.transform(torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias))

    def _packed_head(self, hidden: Tensor) -> Tensor:
        if self._packed_rows is None:
            weight, bias = self._gather_head()
            self._packed_rows = PackedLinear(
                weight.to(self._product_type), None if bias is None else bias.to(self._product_type)
            )
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
        return self.rank(self.head_logits(states).float(), num_ranks, temperature)

    def rank(self, logits: Tensor, num_ranks: int, temperature: float = 0.0) -> Candidates:
        """Logits [k, N] of the first k heads -> the best tokens of each under the calibrated temperatures."""
        divisors = self.head_temperatures(temperature)[: logits.shape[0]].to(logits.device)
        token_ids, log_probs = self.top_ranks(logits / divisors[:, None], num_ranks)
        return Candidates(token_ids.tolist(), log_probs.tolist())

    def top_ranks(self, logits: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
        """Tempered logits [..., N] -> token ids and log-probabilities [..., R], discounted by the coverage.

        A head knows nothing of tokens outside its vocabulary: what it says is conditional on the text staying inside.
        """
        best = logits.topk(min(num_ranks, logits.shape[-1]), dim=-1)
        token_ids = best.indices if self.draft_ids is None else self.draft_ids[best.indices]
        coverage = 1.0 if self.calibration is None else self.calibration.coverage
        log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
        return token_ids, best.values - log_total + math.log(max(coverage, 1e-9))

    def head_temperatures(self, temperature: float) -> Tensor:
        """What divides each head's logits [K] at this request temperature."""
        if self.calibration is None:
            return torch.full((self.num_heads,), temperature if temperature > 0 else 1.0)
        if temperature > 0:
            return torch.tensor(self.calibration.sampled) * temperature
        return torch.tensor(self.calibration.greedy)
