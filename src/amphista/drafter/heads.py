"""Parallel heads: all K come from one pass over the context, and what each says may be corrected by the token above.

The correction is `path.py`'s. Training form and decoding form give the same logits (tests/laws/test_parity.py).

Shapes: B sequences, T rows, P selected rows, K heads, R ranks, S shortlist, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from amphista.drafter.base import MAX_SHORTLIST, MAX_SIZE, Ask, DrafterConfig, DrafterState, Look, check_range
from amphista.drafter.native_drafter import Modules, NativeDrafter, Scores
from amphista.drafter.path import PathCorrection, conditional, moved
from amphista.drafter.ranked import Ranked
from amphista.drafter.scoring import ScoringDrafter, StateOf
from amphista.errors import NativeError
from amphista.target.spec import SharedWeights, TargetSpec
from amphista.tree.candidates import Candidates

logger = logging.getLogger("amphista")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(DrafterConfig):
    """`path_rank`: rank of the path correction (`path.py`, not in the papers), None for heads that know no paths;
    `path_shortlist`: the best tokens of each head that it is worked out for, as children and as parents."""

    path_rank: int | None = None
    path_shortlist: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("path_rank", self.path_rank, 1, MAX_SIZE)
        check_range("path_shortlist", self.path_shortlist, 1, MAX_SHORTLIST)


class ParallelHeads(ScoringDrafter):
    """K heads, of which none reads what another one drafted."""

    config: ParallelConfig
    is_capturable = True  # whether `captured.py` can record what it computes

    def __init__(self, config: ParallelConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        self._path_table: Tensor | None = None
        self._native: NativeDrafter | None = None
        self.path = None if config.path_rank is None else PathCorrection(config.path_rank, spec)

    # -- decoding in C --------------------------------------------------------------------------------------------

    def _go_native(self, *, exact: bool) -> None:
        """Decode in C, or say in a line why not."""
        try:
            if self.device.type != "cpu" or not (self.path is None or self._shared.has_plain_logits):
                raise NativeError("it is for CPUs, and for paths where the LM head's logits are taken as they are")
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
        return Scores(shared=self._shared, weights=weights, draft_ids=self.draft_ids)

    @abstractmethod
    def parts(self) -> Modules:
        """What the heads are made of, for the form that decodes in C."""

    # -- training and decoding forms ------------------------------------------------------------------------------

    @abstractmethod
    def draft_states(self, states: Sequence[DrafterState]) -> Tensor:
        """Decoding form: the head states [B, K, D] of the last committed row of each sequence."""

    @abstractmethod
    def features(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> list[Tensor]:
        """What all heads read, of the flat rows `select` [P]: tensors whose rows are these."""

    @abstractmethod
    def states_one_by_one(self, features: list[Tensor]) -> StateOf:
        """`head_states` of features a head at a time."""

    def states_of(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Callable[[slice], StateOf]:
        features = self.features(hidden, next_ids, select)
        return lambda some: self.states_one_by_one([feature[some] for feature in features])

    def forget_gathered_head(self) -> None:
        self._path_table = None
        super().forget_gathered_head()

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

    @torch.inference_mode()
    def draft_all(self, asks: Sequence[Ask], num_ranks: int, look: Look | None = None) -> list[Candidates]:
        divisors = [self.head_temperatures()] * len(asks)
        if self._native is not None:
            scale = self._shared.logit_scale
            divisors = [[divisor / scale for divisor in row] for row in divisors]
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


def with_paths(drafter: ScoringDrafter) -> ParallelHeads | None:
    """The drafter, where it has a path correction."""
    return drafter if isinstance(drafter, ParallelHeads) and drafter.path is not None else None
