"""Tree masks for stock models: who sees whom, in the form each attention implementation and family expects.

Measured on stock `transformers` 5.23 models: `sdpa` takes a bool mask; `eager` adds its mask to the scores, so a bool
mask there is silently wrong and an additive one is needed. Windowed layers see key q from node p iff
position(p) - position(q) < window, by positions, never by rows (siblings share a position).

Shapes: B sequences, N new rows, S all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from amphista.errors import TargetError


class MaskForm(Enum):
    """What a family's forward takes as `attention_mask`."""

    FULL = "one full mask"
    WINDOWED = "one windowed mask"
    BY_LAYER_TYPE = "a dict by layer type"


TESTED_FAMILIES = {
    "llama": MaskForm.FULL,
    "gpt_neox": MaskForm.FULL,
    "gpt2": MaskForm.FULL,
    "opt": MaskForm.FULL,
    "mistral": MaskForm.WINDOWED,
    "phi3": MaskForm.WINDOWED,
    "qwen2": MaskForm.BY_LAYER_TYPE,
    "qwen3": MaskForm.BY_LAYER_TYPE,
    "gemma2": MaskForm.BY_LAYER_TYPE,
    "gemma3_text": MaskForm.BY_LAYER_TYPE,
}
EAGER_ONLY = {"gemma2"}  # soft-caps its attention scores, which sdpa cannot
REFUSED_FAMILIES = {
    "mpt": "its ALiBi biases follow rows, not positions",
    "bloom": "its ALiBi biases follow rows, not positions",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"), "it is recurrent"),
    **dict.fromkeys(
        ("jamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "lfm2", "qwen3_next", "granitemoehybrid"),
        "part of its layers are recurrent and cannot hold a tree",
    ),
    **dict.fromkeys(("t5", "bart", "mbart", "pegasus", "whisper", "marian"), "it is an encoder-decoder model"),
}


@dataclass(frozen=True)
class MaskPlan:
    """How to write a target's masks, decided once at load."""

    form: MaskForm
    window: int | None
    is_additive: bool

    @classmethod
    def for_config(cls, config: Any) -> MaskPlan:
        """Decide from a `transformers` configuration; refuses by name what cannot be verified as a tree."""
        refuse_unsupported(config)
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        form = TESTED_FAMILIES.get(config.model_type)
        if form is None:
            layered = len(set(getattr(config, "layer_types", None) or ())) > 1
            form = MaskForm.BY_LAYER_TYPE if layered else MaskForm.WINDOWED if window else MaskForm.FULL
        if form is MaskForm.FULL:
            window = None
        implementation = getattr(config, "_attn_implementation", None) or "sdpa"
        if implementation not in ("sdpa", "eager"):
            raise TargetError(
                f"the target uses {implementation!r} attention, which takes no tree mask: load it with "
                "attn_implementation='sdpa' (or 'eager')"
            )
        return cls(form, window, implementation == "eager")

    def write(
        self, ancestors: Tensor, positions: Tensor, num_past: int, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """The `attention_mask` for N new rows behind `num_past` committed ones.

        ancestors: bool [N, N], True where row i may see row j (itself included). positions: int [N].
        Committed rows sit at positions 0..num_past-1 and are seen by all, the window permitting.
        """
        past = ancestors.new_ones(ancestors.shape[0], num_past)
        keys = torch.cat([torch.arange(num_past, device=positions.device), positions])
        return self.write_rows(torch.cat([past, ancestors], dim=1)[None], positions[None], keys[None], dtype)

    def write_rows(
        self, visible: Tensor, positions: Tensor, key_positions: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """The `attention_mask` for N new rows in each of B sequences.

        visible: bool [B, N, S], True where a row may see another, the window permitting. positions: int [B, N].
        key_positions: int [B, S], or [1, S] where they are the same for all.
        """
        if self.form is MaskForm.FULL or (self.form is MaskForm.WINDOWED and self.window is None):
            return self._shape(visible, dtype)
        windowed = visible
        if self.window is not None:
            windowed = visible & (positions[:, :, None] - key_positions[:, None, :] < self.window)
        if self.form is MaskForm.WINDOWED:
            return self._shape(windowed, dtype)
        return {"full_attention": self._shape(visible, dtype), "sliding_attention": self._shape(windowed, dtype)}

    def _shape(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.is_additive:
            return mask[:, None]
        additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return additive.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


def refuse_unsupported(config: Any) -> None:
    """Raise TargetError, naming the family, for what is known not to verify as a tree."""
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(f"{family} is an encoder-decoder model: amphista accelerates decoder-only causal LMs")
    reason = REFUSED_FAMILIES.get(family)
    if family == "falcon" and getattr(config, "alibi", False):
        reason = "its ALiBi biases follow rows, not positions"
    if reason is not None:
        raise TargetError(f"{family} models cannot be verified as a tree: {reason}. Choose a target of another family")


def preferred_attention(config: Any) -> str:
    """The attention implementation to load a family with."""
    return "eager" if config.model_type in EAGER_ONLY else "sdpa"
