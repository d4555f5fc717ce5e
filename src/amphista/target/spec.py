"""What a drafter may know of its target: dimensions, two frozen matrices, and a fingerprint.

`TargetSpec` is plain data. `SharedWeights` hands out the target's own embedding and language-model head, so
that no drafter stores a copy. `Fingerprint` says which target a drafter was trained for (hidden states of a
fine-tune or of another quantisation have another distribution, so acceptance would silently collapse).

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from amphista.errors import TargetError
from amphista.native.weights import Weight
from amphista.target.blocks import BlockedLinear, native_of, rows_of, scale_of

NUM_FINGERPRINT_ROWS = 64
Mix = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # a layer's attention: `EarlyLayers`


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """The dimensions a drafter may depend on.

    Where a family's layers differ (lists by layer), the largest counts. `max_positions` is the context in which a
    token's rotation depends on its own position alone; `limited_by` says why it is shorter than the configuration's.
    """

    family: str
    hidden_size: int
    embedding_size: int
    vocab_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    limited_by: str = ""

    @classmethod
    def from_config(cls, config: Any, *, embedding_size: int, vocab_size: int) -> TargetSpec:
        """Read the dimensions of a `transformers` configuration, whatever its family calls them."""
        config = config.get_text_config(decoder=True)
        heads = _first(config, "num_attention_heads", "n_head", "num_heads")
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        ropes = rotations(config)
        max_positions, limited_by = context_of(config)
        return cls(
            family=config.model_type,
            hidden_size=hidden,
            embedding_size=embedding_size,
            vocab_size=vocab_size,
            num_layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_first(config, "num_key_value_heads", default=heads),
            head_size=max(
                _first(config, "head_dim", default=hidden // heads), _first(config, "global_head_dim", default=0)
            ),
            intermediate_size=_first(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
            rope_theta=float(next((r["rope_theta"] for r in ropes if r.get("rope_theta")), 10000.0)),
            norm_eps=float(_first(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", default=1e-5)),
            max_positions=max_positions,
            limited_by=limited_by,
        )

    def row_width(self, taps: tuple[int, ...]) -> int:
        """Numbers in a row of hidden states with these taps behind them."""
        return self.hidden_size * (1 + len(taps))

    @property
    def context(self) -> str:
        """`max_positions` for people, with the reason where there is one."""
        return f"{self.max_positions} ({self.limited_by})" if self.limited_by else str(self.max_positions)


@dataclass(frozen=True)
class Probes:
    """Rows that a drafter lets ride on a forward: M inputs in place of embeddings, one below the other under nodes of a
    tree, and keys and values of P rows a layer, as they are (not rotated), which they alone see. Nothing of them is
    ever chosen, seen by a token, or cached.

    inputs [M, embedding size], prefix [L, 2, J, P, E].
    """

    inputs: Tensor
    prefix: Tensor

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.inputs)


def _first(config: Any, *names: str, default: float | None = None) -> Any:
    """The first of these settings that is there; of a list with one entry a layer, the largest."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # some layers have another (`per_layer_config`)
            value = [getattr(config.per_layer_config[layer], name) for layer in range(config.num_hidden_layers)]
        if isinstance(value, list | tuple):
            value = max(value, default=None)
        if value is not None:
            return value
    if default is None:
        raise TargetError(f"a {config.model_type} configuration has none of {', '.join(names)}: cannot size a drafter")
    return default


def rotations(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters, one for each type of layer that has any; full attention's first."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_type = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
    if not by_type and "full_attention" not in rope:
        return [rope] if rope else []
    return sorted(by_type.values(), key=lambda value: value is not by_type.get("full_attention"))


def changes_with_length(rope: dict[str, Any]) -> bool:
    """Whether the rotation of a position is another in a longer text."""
    if rope.get("rope_type") == "longrope":
        return bool(rope.get("short_factor") != rope.get("long_factor"))
    return rope.get("rope_type") == "dynamic"


def context_of(config: Any) -> tuple[int, str]:
    """Positions a configuration allows, and why no more.

    YaRN (arXiv 2309.00071) reaches `factor` times the original context, which some configurations give in place of the
    whole. Longrope (arXiv 2402.13753) and dynamic NTK have other factors beyond the original context, for all tokens of
    a forward alike: there a deep node of a tree would change the rotation of every other.
    """
    limit = _first(config, "max_position_embeddings", "n_positions", "max_seq_len", default=1 << 30)
    for rope in rotations(config):
        original = rope.get("original_max_position_embeddings") or limit
        if rope.get("rope_type") == "yarn":
            limit = max(limit, int(original * (rope.get("factor") or 1)))
        elif changes_with_length(rope):
            original = min(limit, getattr(config, "original_max_position_embeddings", None) or original)
            return (
                original,
                f"{rope['rope_type']}: beyond its original context of {original} all rotations change at once",
            )
    return limit, ""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a family does between its bare LM head and its logits (Cohere multiplies, Granite divides, Gemma2 caps)."""

    multiply: float = 1.0
    divide: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> LogitTransform:
        config = config.get_text_config(decoder=True)
        return cls(
            multiply=float(getattr(config, "logit_scale", None) or 1.0),
            divide=float(getattr(config, "logits_scaling", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None) or None,
        )

    def __call__(self, logits: Tensor) -> Tensor:
        scale = self.multiply / self.divide
        logits = logits if scale == 1.0 else logits * scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def apply(self, logits: Tensor) -> None:
        """The same to the bit, in place."""
        if (scale := self.multiply / self.divide) != 1.0:
            logits.mul_(scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)


class EarlyLayers(Protocol):
    """The target's first layers, for rows that stand in no cache of its: what these see is up to who runs them."""

    @property
    def final_norm(self) -> Tensor:
        """Weight [D] of the norm before the LM head."""

    def entered(self, inputs: Tensor) -> Tensor:
        """What the first layer reads of embeddings [N, D]."""

    def read_early(self, token_ids: Tensor, positions: Sequence[int], num_layers: int, mix: Mix) -> list[Tensor]:
        """Residuals [n, D] before the first and behind each of so many layers, of tokens [n].

        mix: a layer's attention, given its number, from 0, and the rows' queries [n, H, E], to be multiplied with keys
        as they are, keys and values [n, J, E], as the target's cache holds them -> [n, H * E].
        """

    def first_seen(self, layer: int, position: int) -> int:
        """The first position that a row at `position` sees in a layer."""


class SharedWeights:
    """The target's frozen embedding and LM head, lent to drafters; the same wherever a drafter is copied to.

    early_layers: lent, too, where the target is on its fast path, and its attention has neither caps nor sinks.
    """

    def __init__(self, embedding: nn.Module, lm_head: nn.Linear, transform: LogitTransform) -> None:
        self._embedding, self._lm_head, self._transform = embedding, lm_head, transform
        self.early_layers: EarlyLayers | None = None

    def __deepcopy__(self, memo: object) -> SharedWeights:
        return self

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Token embeddings: ids [...] -> [..., embedding size]."""
        embedded: Tensor = self._embedding(token_ids)
        return embedded

    def project(self, states: Tensor) -> Tensor:
        """Hidden states [..., D] -> the target's logits [..., V], scaling and soft-capping included.

        Gradients flow to `states`, never to the head.
        """
        states = states.to(self.head_weight.dtype)
        return self.transform(self._lm_head(states))

    def transform(self, logits: Tensor) -> Tensor:
        """The family's own scaling and soft-capping, for logits made with `head_rows`."""
        return self._transform(logits)

    @property
    def has_plain_logits(self) -> bool:
        """Whether `transform` leaves logits as they are."""
        return self._transform == LogitTransform()

    @property
    def logit_scale(self) -> float:
        """What `transform` multiplies logits by."""
        return self._transform.multiply / self._transform.divide

    @property
    def logit_cap(self) -> float:
        """What logits stay below in size, by a tanh, before they are so multiplied; 0 where they are not capped."""
        return (self._transform.softcap or 0.0) / self.logit_scale

    @property
    def native_embedding(self) -> Weight:
        """The embedding's table [V, embedding size], for the C step. raises NativeError."""
        return native_of(self._embedding)

    @property
    def embedding_scale(self) -> float:
        """What rows of that table are multiplied by to be embeddings."""
        return scale_of(self._embedding)

    @property
    def head_weight(self) -> Tensor:
        """The LM head [V, D]; of a target in blocks no more than its size."""
        return self._lm_head.weight

    @property
    def is_blocked(self) -> bool:
        """Whether they are a GGUF file's blocks."""
        return isinstance(self._lm_head, BlockedLinear)

    @property
    def has_bias(self) -> bool:
        """Whether the LM head has a bias."""
        return getattr(self._lm_head, "bias", None) is not None

    @torch.no_grad()
    def head_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """A copy of some LM-head rows: ids [...] -> weight [..., D] and bias [...] or None."""
        bias = getattr(self._lm_head, "bias", None)
        rows = rows_of(self._lm_head, token_ids)
        return rows, None if bias is None else bias[token_ids]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Which target a drafter was trained for."""

    family: str
    hidden_size: int
    embedding_size: int
    vocab_size: int
    tokenizer_sha256: str
    lm_head_sha256: str

    @classmethod
    def of(cls, spec: TargetSpec, shared: SharedWeights, vocabulary: Mapping[str, int]) -> Fingerprint:
        """Hash the tokenizer's vocabulary and 64 evenly spaced LM-head rows, rounded to bf16."""
        rows = torch.linspace(0, spec.vocab_size - 1, NUM_FINGERPRINT_ROWS, dtype=torch.float64).long()
        weight, _ = shared.head_rows(rows.to(shared.head_weight.device))
        head_bytes = weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        tokens = json.dumps(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])), ensure_ascii=True)
        return cls(
            family=spec.family,
            hidden_size=spec.hidden_size,
            embedding_size=spec.embedding_size,
            vocab_size=spec.vocab_size,
            tokenizer_sha256=hashlib.sha256(tokens.encode()).hexdigest(),
            lm_head_sha256=hashlib.sha256(head_bytes).hexdigest(),
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """Names of the fields in which two fingerprints differ."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]
