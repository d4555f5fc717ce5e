"""What all parallel-head drafters share: the LM head or a draft vocabulary of it, ranking, calibration, paths.

All K heads come from one pass over the context; what each says of a token may be corrected by the token above it
(path.py). Training form and decoding form give the same logits (tests/laws/test_parity.py).

Shapes: B sequences, T rows, P selected rows, K heads, R ranks, S shortlist, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amphista.drafter.base import Ask, Drafter, DrafterConfig, DrafterState
from amphista.drafter.frozen_head import FrozenHead
from amphista.drafter.native_drafter import Modules, NativeDrafter, Scores
from amphista.drafter.path import PathCorrection, conditional, moved
from amphista.drafter.ranked import Ranked
from amphista.errors import ConfigError, DrafterError, NativeError
from amphista.target.spec import SharedWeights, TargetSpec
from amphista.tree.candidates import Candidates

logger = logging.getLogger("amphista")
StateOf = Callable[[int, Tensor], Tensor]  # head and rows [M] -> the head's states of these rows [M, D]


class ParallelHeads(Drafter):
    """K heads over the target's (or their own) LM head, full or over a draft vocabulary."""

    draft_ids: Tensor | None

    def __init__(self, config: DrafterConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self._shared = shared
        self._shared_rows: tuple[Tensor, Tensor | None] | None = None
        self._frozen_head: FrozenHead | None = None
        self._path_table: Tensor | None = None
        self._frozen: tuple[torch.dtype, torch.device, int] | None = None
        self._native: NativeDrafter | None = None
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
        self.path = None if config.path_rank is None else PathCorrection(config.path_rank, spec)

    # -- once trained -------------------------------------------------------------------------------------------

    def freeze(self, *, native: bool = False, exact: bool = False) -> ParallelHeads:
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

    def _go_native(self, *, exact: bool) -> None:
        """Decode in C, or say in a line why not."""
        try:
            if self.device.type != "cpu" or not self._shared.has_plain_logits:
                raise NativeError("it is for CPUs, and for LM heads whose logits are taken as they are")
            path, shortlist = self.path, self.config.path_shortlist
            self._native = NativeDrafter(self.parts(), self._scores(), path, shortlist, exact=exact)
        except NativeError as error:
            self.why_not_native = str(error)
            logger.warning("%s drafts without the C step, slower: %s", self.name, error)
            return
        self.why_not_native = None
        self._modules = dict.fromkeys(self._modules)  # what was trained is there as it decodes
        if self.config.lm_head == "own":
            del self.own_head, self.own_bias

    def _scores(self) -> Scores:
        own = self.config.lm_head == "own"
        weights = [self.own_weights(k) for k in range(self.num_heads)] if own else [self._gather_head()]
        rows = list(self.own_head) if own else []
        return Scores(shared=self._shared, weights=weights, own_rows=rows, draft_ids=self.draft_ids)

    @abstractmethod
    def parts(self) -> Modules:
        """What the heads are made of, for the form that decodes in C."""

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
        self._shared_rows = self._path_table = self._frozen_head = None

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
    def draft_states(self, states: Sequence[DrafterState]) -> Tensor:
        """Decoding form: the head states [B, K, D] of the last committed row of each sequence."""

    @abstractmethod
    def features(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> list[Tensor]:
        """What all heads read, of the flat rows `select` [P]: tensors whose rows are these."""

    @abstractmethod
    def states_one_by_one(self, features: list[Tensor]) -> StateOf:
        """`head_states` of features a head at a time, for training that asks only for the rows that count."""

    def forward(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        """Same as `head_states`; the name that distributed wrappers call."""
        return self.head_states(hidden, next_ids, select)

    @abstractmethod
    def match_scale(self, hidden_rms: float) -> None:
        """Scale the start so that every head's first logits are close to the target's own, LM(h_t)."""

    def start(self) -> DrafterState:
        return self.start_rows() if self._native is None else self._native.start()

    def start_rows(self) -> DrafterState:
        """`start` in torch."""
        return DrafterState()

    @torch.inference_mode()
    def commit(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        if self._native is not None:
            self._native.feed(state, hidden, next_ids.tolist())
        else:
            self.feed(state, hidden, next_ids)

    @abstractmethod
    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        """`commit` in torch."""

    def draft(
        self, state: DrafterState, num_ranks: int, temperature: float = 0.0, max_depth: int | None = None
    ) -> Candidates:
        return self.draft_all([Ask(state, max_depth or self.num_heads, temperature)], num_ranks)[0]

    @torch.inference_mode()
    def draft_all(self, asks: Sequence[Ask], num_ranks: int) -> list[Candidates]:
        divisors = [self.head_temperatures(ask.temperature) for ask in asks]
        if self._native is not None:
            return self._native.draft(asks, num_ranks, divisors, self._log_coverage)
        self.commit_all(asks)
        max_depths = [ask.max_depth for ask in asks]
        deepest = max(max_depths)  # the LM head is the larger part of a draft
        head_states = self.draft_states([ask.state for ask in asks])[:, :deepest]
        table = torch.tensor(divisors, device=head_states.device)[:, :deepest, None]
        return self.ranked(head_states, table, num_ranks).candidates(max_depths)

    def ranked(self, states: Tensor, divisors: Tensor, num_ranks: int) -> Ranked:
        """States [B, k, D] of the first k heads -> the best tokens of each; divisors [B, k, 1] of its logits."""
        logits = self.head_logits(states).float() / divisors
        if self.path is None or states.shape[1] == 1:
            return Ranked(*self.top_ranks(logits, num_ranks))
        token_ids, log_probs = self.top_ranks(logits, max(num_ranks, self.config.path_shortlist))
        below = self.ranks_below(states, token_ids, log_probs, divisors[..., 0], num_ranks)
        return Ranked(token_ids, log_probs, *below)

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

    def head_temperatures(self, temperature: float) -> list[float]:
        """What divides each head's logits [K] at this request temperature."""
        if self.calibration is None:
            return [temperature if temperature > 0 else 1.0] * self.num_heads
        if temperature > 0:
            return [head * temperature for head in self.calibration.sampled]
        return self.calibration.greedy

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
        """Decoding form, all heads' shortlists at once -> `ConditionalRanks` as tensors
        [..., K - 1, S parents, R best children].

        states [..., K, D]; token_ids and log_probs [..., K, S or more] as `top_ranks` gives them; divisors [..., K].
        """
        token_ids, log_probs = (ranked[..., : self.config.path_shortlist] for ranked in (token_ids, log_probs))
        assert self.path is not None
        corrections = self.path(states[..., 1:, None, :], self._read(token_ids[..., :-1, :], states.dtype))
        rows = self._shortlist_rows(token_ids[..., 1:, :])
        moves = moved(states[..., 1:, :], corrections, *rows, self._shared.transform)
        children = log_probs[..., 1:, None, :] - self._log_coverage
        given = conditional(children, moves.float() / divisors[..., 1:, None, None])
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
        return functional.embedding(self._draft_index(token_ids), self._path_table)

    def _draft_index(self, token_ids: Tensor) -> Tensor:
        """Token ids of the draft vocabulary -> places in it."""
        return token_ids if self.draft_ids is None else torch.searchsorted(self.draft_ids, token_ids.contiguous())

    def _rows(self, token_ids: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """What scores tokens [..., S]: rows [..., S, D] of the LM head (or of one head's own), and their biases."""
        if not own:
            return self._shared.head_rows(token_ids)
        index = self._draft_index(token_ids)
        return functional.embedding(index, own[0]), own[1][index] if len(own) > 1 else None

    def _shortlist_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for all heads but the first, [..., K - 1, S, D]."""
        if self.config.lm_head == "shared":
            return self._rows(token_ids, ())
        rows = [self._rows(ids, self.own_weights(k)) for k, ids in enumerate(token_ids.unbind(-2), start=1)]
        biases = [bias for _, bias in rows if bias is not None]
        return torch.stack([weight for weight, _ in rows], -3), torch.stack(biases, -2) if biases else None
