"""What follows a layer's attention in the fast forward: an MLP, or many of them of which each row takes a few.

Experts (arXiv 1701.06538) are weighed as their family does: by a softmax over all of them or by sigmoids, the best
chosen by that or by that and a correction (arXiv 2408.15664), divided by their sum or not, with or without an expert
that every row takes. A row's experts are added in the order of their numbers, whoever takes them beside it.

Shapes: N rows, D hidden size, I inner size, X experts, C of them that a row takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amphista.kernels.linear import Product, TorchLinear
from amphista.kernels.parts import Gate
from amphista.native.layers import NativeExperts, NativeMlp
from amphista.target.blocks import BlockedExperts, rows_of
from amphista.target.products import PlainLinear, native_halves, native_weight

# What a block of a known family has, by name: the router is `gate` or `router`.
BLOCKS = (
    {"experts", "gate"},
    {"experts", "router"},
    {"experts", "gate", "shared_expert", "shared_expert_gate"},
    {"experts", "gate", "shared_experts"},
)
BY_SIGMOID = {"Dots1TopkRouter", "Glm4MoeTopkRouter"}
MORE = 1e-20  # than their sum is what theirs are divided by
IN_FLOAT32 = {*BY_SIGMOID, "Ernie4_5_MoeTopKRouter"}  # whatever the type of weights


def has_experts(block: Any) -> bool:
    """Whether what follows a layer's attention is many MLPs."""
    return hasattr(block, "experts")


def router_of(block: Any) -> Any:
    """What tells the experts of a block's rows."""
    return block.router if hasattr(block, "router") else block.gate


def _parts_of(experts: Any) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor | None]]]:
    """Gate, up and down of each: weights, or blocks of a file, and biases."""
    if isinstance(experts, BlockedExperts):
        yield from ((parts, (None,) * 3) for parts in zip(*experts.blocks, strict=True))
        return
    wide, narrow = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if not hasattr(experts, "gate_up_proj_bias"):
        yield from (((*both.chunk(2), down), (None,) * 3) for both, down in zip(wide, narrow, strict=True))
        return
    biases = zip(experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach(), strict=True)
    for both, down, (of_both, of_down) in zip(wide, narrow, biases, strict=True):  # in turn, and transposed
        yield (both[:, ::2].T, both[:, 1::2].T, down.T), (of_both[::2], of_both[1::2], of_down)


def chooses_within_groups(router: Any) -> bool:
    """Whether some experts are left out beforehand, by groups (arXiv 2412.19437), which is not known here."""
    return getattr(router, "num_group", 1) != getattr(router, "topk_group", 1)


@contextmanager
def all_taken(choosing: Iterable[Any]) -> Iterator[None]:
    """Let rows take every expert for a while, of stock routers, of `Experts` or of records of the C step.

    Which are the best hangs on roundings where two are nearly as good: two forms may differ by much and both be right.
    """
    before = [(one, one.top_k) for one in choosing]
    for one, _ in before:
        one.top_k = one.num_experts
    try:
        yield
    finally:
        for one, top_k in before:
            one.top_k = top_k


@dataclass(frozen=True)
class Mlp:
    """down(silu(gate) up), gate and up side by side."""

    gate_up: Product
    down: Product

    @classmethod
    def of(cls, block: Any, product: type[Product]) -> Mlp:
        """Of a module with two layers for gate and up, or one that holds both."""
        if not hasattr(block, "gate_up_proj"):
            return cls(product.of(block.gate_proj, block.up_proj), product.of(block.down_proj))
        bias = block.gate_up_proj.bias
        halves = (
            list(product.weight_of(block.gate_up_proj).chunk(2)),
            [None] * 2 if bias is None else list(bias.chunk(2)),
        )
        return cls(product.side_by_side(*halves), product.of(block.down_proj))

    @property
    def products(self) -> list[Product]:
        return [self.gate_up, self.down]

    def inner(self, rows: Tensor, gate: Gate) -> Tensor:
        """[N, D] -> [N, I]."""
        return gate(self.gate_up(rows))

    def native(self) -> NativeMlp:
        """As the C step reads it."""
        gate, up = native_halves(self.gate_up)
        return NativeMlp(gate, up, native_weight(self.down))


@dataclass
class Experts:
    """router: X outputs, and one more where it says how much of the shared one a row takes. each: X, the shared one
    behind them, if there is one. correction: [X]."""

    router: TorchLinear
    each: Sequence[Mlp]
    top_k: int
    correction: Tensor | None
    by_sigmoid: bool
    is_normed: bool
    has_shared: bool
    least: float
    more: float
    scale: float

    @classmethod
    def of(cls, block: Any, product: type[Product]) -> Experts:
        """Of a block of a known family; its router keeps its type whatever the product."""
        router = router_of(block)
        each = [
            Mlp(product.side_by_side(parts[:2], biases[:2]), product(parts[2], biases[2]))
            for parts, biases in _parts_of(block.experts)
        ]
        shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
        rows = [router.weight.detach()]
        if shared is not None and shared.down_proj.in_features == 0:
            shared = None
        if shared is not None:
            each.append(Mlp.of(shared, product))
        if shared is not None and hasattr(block, "shared_expert_gate"):
            rows.append(rows_of(block.shared_expert_gate, torch.arange(1)).detach())
        statics = getattr(router, "moe_statics", router)
        correction = getattr(statics, "e_score_correction_bias", None)
        return cls(
            router=(TorchLinear if product is TorchLinear else PlainLinear)(
                torch.cat(rows).float() if type(router).__name__ in IN_FLOAT32 else torch.cat(rows),
                getattr(router, "bias", None),
            ),
            each=each,
            top_k=router.top_k,
            correction=None if correction is None else correction.detach().flatten().float(),
            by_sigmoid=type(router).__name__ in BY_SIGMOID,
            is_normed=bool(getattr(router, "norm_topk_prob", True)),
            has_shared=shared is not None,
            least=float(getattr(router, "norm_min", 0.0)),
            more=MORE if type(router).__name__ in BY_SIGMOID else 0.0,
            scale=float(getattr(router, "routed_scaling_factor", 1.0)),
        )

    @property
    def num_experts(self) -> int:
        """Without the shared one."""
        return len(self.each) - self.has_shared

    @property
    def products(self) -> list[Product]:
        return [self.router, *(product for mlp in self.each for product in mlp.products)]

    def __call__(self, rows: Tensor, gate: Gate) -> Tensor:
        """[N, D] -> [N, D]."""
        taken, portions = self._choose(rows)
        mixed = torch.zeros_like(rows)
        for expert in taken.unique().tolist():
            row, place = (taken == expert).nonzero(as_tuple=True)
            mlp, portion = self.each[expert], portions[row, place, None].to(rows.dtype)
            mixed = mixed.index_add(0, row, portion * mlp.down(mlp.inner(rows[row], gate)))
        return mixed

    def _choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each row takes, and how much of each: [N, C], with the shared one [N, C + 1]."""
        number = self.num_experts
        said = self.router(rows.to(self.router.weight.dtype)).to(torch.promote_types(rows.dtype, torch.float32))
        scores = said[:, :number]
        scores = scores.sigmoid() if self.by_sigmoid else functional.softmax(scores, dim=-1)
        wanted = scores if self.correction is None else scores + self.correction
        taken = wanted.topk(self.top_k, dim=-1).indices
        portions = scores.gather(1, taken)
        if self.is_normed:
            portions = portions / (portions.sum(dim=-1, keepdim=True).clamp(min=self.least) + self.more)
        portions = portions * self.scale
        if not self.has_shared:
            return taken, portions
        shared = said[:, number:].sigmoid() if said.shape[1] > number else torch.ones_like(said[:, :1])
        return functional.pad(taken, (0, 1), value=number), torch.cat([portions, shared], dim=1)

    def native(self) -> NativeExperts:
        """As the C step reads them."""
        return NativeExperts(
            native_weight(self.router),
            [mlp.native() for mlp in self.each],
            self.top_k,
            self.correction,
            self.by_sigmoid,
            self.is_normed,
            self.has_shared,
            self.least,
            self.more,
            self.scale,
        )
