"""Who sees whom in a forward of ours, by the model's own rules: nothing about a family is guessed.

A `transformers` model makes its masks through functions of (query position, key position), one for each kind of layer:
causal, within a window, within a chunk. Here the two makers of masks, `sdpa` and `eager`, are registered anew: while a
forward of ours runs in the calling thread, the model's own function is evaluated at the *positions* of rows (siblings
of a tree share one) and joined with who descends from whom. Any other forward gets the library's own masks.

Shapes: B sequences, N new rows, S all rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from amphista.cache.hf import as_transformers_cache
from amphista.cache.static import KVCache
from amphista.errors import TargetError
from amphista.target.spans import Span

Rule = Callable[[Any, Any, Any, Any], Any]  # (sequence, head, query position, key position) -> may it be seen
_LOCAL = threading.local()  # two threads may decode at once


@dataclass(frozen=True)
class Layout:
    """Where the rows of one forward stand, and which of them may see each other whatever a layer's rule says.

    positions: int [B or 1, N]. key_positions: int [B or 1, S]. visible: bool [B or 1, N, S], or None where a layer's
    rule decides alone. free: bool [S], True at keys that stand nowhere, which no rule concerns.
    """

    positions: Tensor
    key_positions: Tensor
    visible: Tensor | None
    free: Tensor | None = None

    @classmethod
    def of(cls, span: Span, device: torch.device) -> Layout:
        """The rows of a tree behind the committed ones, which all of them may see."""
        positions = torch.tensor(span.positions, device=device)
        keys = torch.cat([torch.arange(span.num_past, device=device), positions])
        ancestors = span.tree.ancestor_mask().to(device)
        past = ancestors.new_ones(len(ancestors), span.num_past)
        if span.probes is None:
            return cls(positions[None], keys[None], torch.cat([past, ancestors], dim=1)[None])
        prefix = span.probes.prefix.shape[3]
        is_probe = torch.tensor(span.tree.tokens, device=device) < 0
        visible = torch.cat([past, ancestors, is_probe[:, None].expand(-1, prefix)], dim=1)
        free = functional.pad(torch.zeros_like(keys, dtype=torch.bool), (0, prefix), value=True)
        return cls(positions[None], functional.pad(keys, (0, prefix))[None], visible[None], free)

    @classmethod
    def of_all(cls, spans: Sequence[Span], device: torch.device) -> Layout:
        """Spans side by side, rows and keys alike: nobody sees a row of another sequence."""
        layouts = [cls.of(span, device) for span in spans]
        if len(layouts) == 1:
            return layouts[0]
        rows, keys = (
            torch.cat(parts, dim=1) for parts in zip(*((a.positions, a.key_positions) for a in layouts), strict=True)
        )
        visible = torch.block_diag(*(layout.visible[0] for layout in layouts if layout.visible is not None))
        if all(layout.free is None for layout in layouts):
            return cls(rows, keys, visible.bool()[None])
        free = [torch.zeros_like(a.key_positions[0]).bool() if a.free is None else a.free for a in layouts]
        return cls(rows, keys, visible.bool()[None], torch.cat(free))

    @classmethod
    def causal(cls, length: int, device: torch.device) -> Layout:
        """Rows [T] without a cache."""
        positions = torch.arange(length, device=device)[None]
        return cls(positions, positions, None)

    def mask(self, rule: Rule) -> Tensor | None:
        """bool [B or 1, 1, N, S]; None where every row sees all before it and nothing else is to be said."""
        if rule is causal_mask_function:  # `visible` never shows what lies ahead
            return None if self.visible is None else self.visible[:, None]
        device = self.positions.device
        batch = torch.arange(len(self.positions), device=device)[:, None, None, None]
        queries, keys = self.positions[:, None, :, None], self.key_positions[:, None, None, :]
        seen: Tensor = rule(batch, torch.zeros_like(batch[:1]), queries, keys)
        seen = seen if self.free is None else seen | self.free
        return seen if self.visible is None else seen & self.visible[:, None]

    def hand(self, mask: Tensor, rule: Rule) -> Tensor:
        """The mask as a layer is handed it."""
        return mask


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """The masks of forwards in this thread follow `layout`."""
    before = getattr(_LOCAL, "layout", None)
    _LOCAL.layout = layout
    try:
        yield
    finally:
        _LOCAL.layout = before


@dataclass(frozen=True)
class _Noting(Layout):
    """Remembers which mask was made by which rule."""

    made: list[tuple[Tensor, Rule]] = field(default_factory=list)

    def hand(self, mask: Tensor, rule: Rule) -> Tensor:
        self.made.append((mask, rule))
        return mask


@torch.no_grad()
def layer_rules(model: Any) -> list[Rule]:
    """The rule of each decoder layer, as the model itself hands masks to them in a forward over one token.

    model: a causal LM whose decoder calls `layers` with `attention_mask`, and whose attention is sdpa or eager.
    """
    row = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    layout = _Noting(row, row, torch.ones_like(row, dtype=torch.bool)[None])
    handed: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: handed.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in model.get_decoder().layers
    ]
    try:
        with laid_out(layout):
            cache = as_transformers_cache(
                [KVCache(len(hooks)).layers], [1]
            )  # with one, positions are not searched for packed rows
            model(input_ids=row, position_ids=row, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    return [next(rule for made, rule in layout.made if made is mask) for mask in handed]


def refuse_attention(config: Any) -> None:
    """Raise TargetError for an attention implementation that takes no mask of ours."""
    implementation = getattr(config, "_attn_implementation", None) or "sdpa"
    if implementation not in ("sdpa", "eager"):
        raise TargetError(
            f"the target uses {implementation!r} attention, which takes no tree mask: load it with "
            "attn_implementation='sdpa' (or 'eager')"
        )


def _sdpa_mask(*args: Any, mask_function: Rule = causal_mask_function, **settings: Any) -> Tensor | None:
    layout: Layout | None = getattr(_LOCAL, "layout", None)
    if layout is None:
        made: Tensor | None = sdpa_mask(*args, mask_function=mask_function, **settings)
        return made
    mask = layout.mask(mask_function)
    return None if mask is None else layout.hand(mask, mask_function)


def _eager_mask(*args: Any, mask_function: Rule = causal_mask_function, **settings: Any) -> Tensor:
    layout: Layout | None = getattr(_LOCAL, "layout", None)
    if layout is None:
        made: Tensor = eager_mask(*args, mask_function=mask_function, **settings)
        return made
    mask = layout.mask(mask_function)
    assert mask is not None, "forwards of ours always say what is visible"
    added = torch.zeros(mask.shape, dtype=settings.get("dtype", torch.float32), device=mask.device)
    added.masked_fill_(~mask, torch.finfo(added.dtype).min)  # the library's own lowest number
    return layout.hand(added, mask_function)


AttentionMaskInterface.register("sdpa", _sdpa_mask)
AttentionMaskInterface.register("eager", _eager_mask)
