"""BiTA (arXiv 2401.12522): the target drafts while it verifies, by trained inputs that stand in for tokens to come.

    p_{s,k} = Target(e_k at position s + k | prefix, x_{<=s}, e_{<k}),  k = 1..M;   z_k = LM(p_{s,k}) for x_{s+1+k}

A group of M probes stands below nodes of the tree that is verified; what the target gives for the group below the last
accepted node is the next draft, of one product with the LM head. Trained are M mask embeddings and `prefix_len` keys
and values a layer, not rotated, which probes alone see; the target is frozen, and no token sees a probe. So what is
drafted has read the text up to x_s, not the pending token x_{s+1}, unless a path correction (ours) brings it in.

Certain: the equations, M = 3 and 16 prefix rows, distinct masks, groups below the root and every node. Ours: the start,
the objectives on tokens, trees in place of the paper's one, groups only where they pay (tree `auto`), none in a prompt.

Shapes: B sequences, P selected rows, K = M heads, D hidden size, L layers, J key-value heads, E head size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amphista.drafter.base import MAX_SIZE, Ask, DrafterState, Look, check_range
from amphista.drafter.heads import ParallelConfig, ParallelHeads
from amphista.drafter.scoring import StateOf
from amphista.errors import DrafterError, NativeError
from amphista.target.spec import Probes, SharedWeights, TargetSpec
from amphista.tree.candidates import Candidates

logger = logging.getLogger("amphista")
START_STD = 0.02  # of the prefix; masks start as embeddings are spread, of so many tokens:
SEEN_TOKENS = 4096
MOST = 1e3  # no embedding, key or value is larger: what overflowed in a probe's row would reach masked sums as a NaN


@dataclass(frozen=True, kw_only=True)
class BitaConfig(ParallelConfig):
    """`num_heads` masks; `prefix_len` keys and values a layer, 0 for masks alone."""

    num_heads: int = 3
    prefix_len: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("prefix_len", self.prefix_len, 0, MAX_SIZE)


class Bita(ParallelHeads):
    """Masks and prefix; its head states are the target's own hidden states of probes."""

    name = "bita"
    config: BitaConfig
    is_capturable = False

    def __init__(self, config: BitaConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        rows = (2, spec.num_key_value_heads, config.prefix_len, spec.head_size)
        self.masks = nn.Parameter(torch.empty(config.num_heads, spec.embedding_size))
        self.prefix = nn.Parameter(torch.empty(spec.num_layers, *rows))
        if not self.masks.is_meta:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        ids = torch.arange(min(self.spec.vocab_size, SEEN_TOKENS), device=self._shared.head_weight.device)
        known = self._shared.embed(ids).float()
        mean, spread = known.mean(0).to(self.masks.device), known.std(0).to(self.masks.device)
        self.masks.copy_(mean + torch.randn(self.masks.shape) * spread)
        self.prefix.normal_(0, START_STD)

    @property
    def probes(self) -> Probes:
        return Probes(self.masks, self.prefix)

    @property
    def row_width(self) -> int:
        return self.spec.row_width(self.taps) + self.num_heads * self.spec.hidden_size

    def _go_native(self, *, exact: bool) -> None:
        """Score in C: all else is the target's forward."""
        try:
            self._native_heads, self.why_not_native = self._heads_in_c(exact=exact), None
        except NativeError as error:
            self.why_not_native = str(error)
            logger.warning("%s scores without products in C, slower: %s", self.name, error)

    def check_weights(self) -> None:
        for name, weight in (("mask embedding", self.masks), ("prefix", self.prefix)):
            if bool((weight.abs() > MOST).any()):
                raise DrafterError(f"its {name} holds a number beyond {MOST:g}, whose overflow would reach the target")

    def match_scale(self, hidden_rms: float) -> None:
        """Nothing to do: its states are the target's own."""

    # -- training form: behind each hidden state stand the states of the group below it ------------------------------

    def features(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> list[Tensor]:
        probed = hidden.flatten(0, 1).index_select(0, select)[:, self.spec.row_width(self.taps) :]
        if torch.is_grad_enabled():  # a gradient of 0 where nothing was probed: distributed wrappers wait for one
            probed = probed + 0 * (self.masks.sum() + self.prefix.sum())
        return [probed.unflatten(-1, (self.num_heads, -1)), next_ids.flatten().index_select(0, select)]

    def head_states(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        return self.given_pending(*self.features(hidden, next_ids, select))

    def states_one_by_one(self, features: list[Tensor]) -> StateOf:
        states = self.given_pending(*features)
        return lambda head, rows: states[:, head].index_select(0, rows)

    # -- decoding form ------------------------------------------------------------------------------------------------

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        state.features, state.pending = None, next_ids[-1]
        state.num_rows += len(next_ids)

    def commit_all(self, asks: Sequence[Ask]) -> None:
        super().commit_all(asks)
        for ask in asks:
            if ask.probed is not None:
                ask.state.features = ask.probed.to(self.dtype)

    def draft_all(self, asks: Sequence[Ask], num_ranks: int, look: Look | None = None) -> list[Candidates]:
        """Nothing for a sequence below whose last row there was no group."""
        self.commit_all(asks)
        able = [ask for ask in asks if ask.state.features is not None]
        read = [Ask(ask.state, ask.max_depth) for ask in able]
        drafts = iter(super().draft_all(read, num_ranks) if read else ())
        return [Candidates([], []) if ask.state.features is None else next(drafts) for ask in asks]

    @torch.inference_mode()
    def draft_states(self, states: Sequence[DrafterState]) -> Tensor:
        pending = torch.stack([state.pending for state in states if state.pending is not None])
        return self.given_pending(torch.stack([state.features for state in states]), pending)

    def trim(self, state: DrafterState, num_rows: int) -> None:
        if num_rows < state.num_rows:
            state.num_rows, state.features = num_rows, None
