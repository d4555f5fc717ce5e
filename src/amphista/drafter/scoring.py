"""What all drafters share that score tokens: the LM head or a draft vocabulary of it, ranking, calibration.

Head k scores x_{t+1+k}, from a state of the target's hidden size. How heads come to their states is said in
`heads.py`, for those that give all depths in one pass, and in `rounds.py`, for those that read what was drafted.

Shapes: B sequences, T rows, P selected rows, M rows, K heads, R ranks, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amphista.drafter.base import Ask, Drafter, DrafterConfig, DrafterState
from amphista.drafter.frozen_head import FrozenHead
from amphista.drafter.native_layers import NativeLayer
from amphista.drafter.path import PathCorrection
from amphista.errors import ConfigError, DrafterError, NativeError
from amphista.target.spec import SharedWeights, TargetSpec
from amphista.tree.candidates import Candidates

StateOf = Callable[[int, Tensor], Tensor]  # head and rows [M] -> the head's states of these rows [M, D]


class ScoringDrafter(Drafter):
    """K heads over the target's (or their own) LM head, full or over a draft vocabulary.

    `path`: the path correction, of parallel heads alone.
    """

    draft_ids: Tensor | None
    path: PathCorrection | None

    def __init__(self, config: DrafterConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self._shared, self.path = shared, None
        self._shared_rows: tuple[Tensor, Tensor | None] | None = None
        self._frozen_head: FrozenHead | None = None
        self._frozen: tuple[torch.dtype, torch.device, int] | None = None
        self._native_heads: list[NativeLayer] = []  # once ready for decoding in C: one, or one for each head
        self.why_not_native: str | None = "it was not asked for"
        size = config.draft_vocab
        if size is not None and size > spec.vocab_size:
            raise ConfigError(f"draft_vocab is {size}, but the target has only {spec.vocab_size} tokens")
        ids = torch.arange(size) if size is not None else None
        self.register_buffer("draft_ids", ids)
        if config.lm_head == "own":
            rows = (config.num_heads, self.draft_vocab)
            self.own_head = nn.Parameter(torch.empty(*rows, spec.hidden_size))
            self.own_bias = nn.Parameter(torch.empty(rows)) if shared.has_bias else None
            self._start_own_head()

    # -- once trained -------------------------------------------------------------------------------------------

    def freeze(self, *, native: bool = False, exact: bool = False) -> ScoringDrafter:
        """Make ready for decoding on this device; training, moving and saving end here. Repeating it changes nothing.

        native: decode in C where that can be had (`why_not_native`). exact: with weights as they are also there.
        """
        if self._frozen is None:
            self._frozen = (self.dtype, self.device, self.num_weights)
            self.eval().requires_grad_(False)
            with torch.inference_mode():
                if native:
                    self._go_native(exact=exact)
        return self

    @abstractmethod
    def _go_native(self, *, exact: bool) -> None:
        """Decode in C, or say in a line why not."""

    def _heads_in_c(self, *, exact: bool) -> list[NativeLayer]:
        """What the heads score with, multiplied in C. raises NativeError."""
        if self.device.type != "cpu":
            raise NativeError("it is for CPUs")
        own = self.config.lm_head == "own"
        weights = [self.own_weights(k) for k in range(self.num_heads)] if own else [self._gather_head()]
        return [NativeLayer(*pair, exact=exact) for pair in weights]

    @property
    def cost_key(self) -> dict[str, Any]:
        form = "native" if self.why_not_native is None else "torch"
        return {"name": self.name, "config": asdict(self.config), "dtype": str(self.dtype), "form": form}

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

    @property
    def row_width(self) -> int:
        """Numbers in a row of hidden states as training gives them."""
        return self.spec.row_width(self.taps) + self.num_early * self.spec.hidden_size

    def check_weights(self) -> None:
        """Raise DrafterError for weights that would harm more than the drafts; most cannot."""

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
            self._start_own_head()

    @torch.no_grad()
    def _start_own_head(self) -> None:
        """Every head's own LM head begins as the target's; on `meta`, where weights are only sizes, nothing begins."""
        if not self.own_head.is_meta:
            weight, bias = self._gather_head()
            self.own_head.copy_(weight)
            if self.own_bias is not None and bias is not None:
                self.own_bias.copy_(bias)

    @property
    def draft_vocab(self) -> int:
        """Number of tokens the heads score."""
        return self.spec.vocab_size if self.draft_ids is None else int(self.draft_ids.numel())

    def forget_gathered_head(self) -> None:
        """Drop the gathered LM-head rows; they are gathered again at the next use (after a load or a move)."""
        self._shared_rows = self._frozen_head = None

    def _apply(self, *args: Any, **kwargs: Any) -> ScoringDrafter:
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
        if self._shared_rows is None:
            with torch.inference_mode(False):  # who asks first may be a validation, who asks next a training step
                self._shared_rows = self._gather_head()
        weight, bias = self._shared_rows
        return self._shared.transform(functional.linear(hidden.to(weight.dtype), weight, bias))

    def frozen_head(self) -> FrozenHead | None:
        """The target's head over the draft vocabulary for training, in autocast's type or its own.

        None where heads have LM heads of their own, score the whole vocabulary, or the family transforms its logits.
        """
        if self.config.lm_head != "shared" or self.draft_ids is None or not self._shared.has_plain_logits:
            return None
        kind = self._shared.head_weight.device.type
        dtype = self._shared.head_weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if self._frozen_head is None or self._frozen_head.dtype is not dtype:
            weight, bias = self._gather_head()
            self._frozen_head = FrozenHead(weight.to(dtype), None if bias is None else bias.to(dtype))
        return self._frozen_head

    def own_weights(self, head: int) -> tuple[Tensor, ...]:
        """What one head alone scores with: weight [N, D] and, where there is one, bias [N]; () for the shared head."""
        if self.config.lm_head == "shared":
            return ()
        return (self.own_head[head],) if self.own_bias is None else (self.own_head[head], self.own_bias[head])

    def score(self, states: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        """Logits [..., N] of one head's states [..., D] by its `own_weights`."""
        if not own:
            return self.target_logits(states)
        return self._shared.transform(functional.linear(states, *own))

    def head_logits(self, states: Tensor, head: int | None = None) -> Tensor:
        """States [..., K, D] -> logits [..., K, N]; or, for one head, [..., D] -> [..., N]."""
        if self._native_heads and (head is not None or self.config.lm_head == "shared"):
            return self._shared.transform(self._native_heads[(head or 0) % len(self._native_heads)](states))
        if self.config.lm_head == "shared":
            return self.target_logits(states)
        if head is not None:
            return self.score(states, self.own_weights(head))
        return torch.stack([self.head_logits(states[..., k, :], k) for k in range(states.shape[-2])], dim=-2)

    # -- training and decoding forms ------------------------------------------------------------------------------

    @abstractmethod
    def head_states(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        """Training form, all positions at once: hidden [B, T, D], next ids [B, T], flat rows [P] -> [P, K, D].

        A head that reads drafted tokens is given the text's.
        """

    @abstractmethod
    def states_of(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Callable[[slice], StateOf]:
        """`head_states` a head at a time, for training that asks only for the rows that count.

        For a slice of the rows `select`: states of its rows, by their places in it. Rows that a head is asked for,
        ascending, must be among those that the head before was asked for.
        """

    def forward(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        """Same as `head_states`; the name that distributed wrappers call."""
        return self.head_states(hidden, next_ids, select)

    def at_step(self, step: int, num_steps: int) -> None:
        """Told before each step of training, for those that are trained otherwise as it goes on."""

    @abstractmethod
    def match_scale(self, hidden_rms: float) -> None:
        """Scale the start so that every head's first logits are close to the target's own, LM(h_t)."""

    @torch.inference_mode()
    def commit(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        self.feed(state, hidden, next_ids)

    @abstractmethod
    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        """`commit` in torch."""

    def draft(self, state: DrafterState, num_ranks: int, max_depth: int | None = None) -> Candidates:
        return self.draft_all([Ask(state, max_depth or self.num_heads)], num_ranks)[0]

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
