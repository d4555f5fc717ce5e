"""Blocks used by more than one drafter: norm, rotary positions, attention with a cache, SwiGLU, residual block.

One pre-norm layer serves as staged adaptation layer (causal, rotary, cached) and as encoder over the head slots
(no rotary, no cache): our own, with the target's sizes, whatever the target's family (ALGORITHM section 2).

Shapes: B sequences, T rows, S keys, D hidden size, H heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from amphista.kernels.parts import attention_of_any_shape
from amphista.native import training as native
from amphista.target.spec import TargetSpec

FEW_ROWS = 16
MANY_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Sizes of one drafter layer."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    rope_theta: float
    norm_eps: float

    @classmethod
    def of(cls, spec: TargetSpec, intermediate_size: int | None = None) -> LayerSizes:
        """The target's, but for the inner size of the MLP where that is given."""
        return cls(
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_attention_heads,
            num_key_value_heads=spec.num_key_value_heads,
            head_size=spec.head_size,
            intermediate_size=intermediate_size or spec.intermediate_size,
            rope_theta=spec.rope_theta,
            norm_eps=spec.norm_eps,
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm in the input's dtype (arXiv 1910.07467), with sums and product in the wider of both."""

    def __init__(self, size: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), scale))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and self.weight.requires_grad:
            kind = _NormInC if native.norms(x, self.weight) else _TrainedNorm
            normed: Tensor = kind.apply(x, self.weight, self.eps)
            return normed
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # Autocast brings bfloat16 rows to float32 weights. torch does the same sums then, but warns that it found no
        # fused kernel; asked in the weight's dtype it uses that one. Equal bit for bit, forward and backward.
        return F.rms_norm(x.to(self.weight.dtype), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


class _TrainedNorm(torch.autograd.Function):
    """The same with a gradient in few passes over the rows: torch has no kernel of its own for it on a CPU.

    With r = 1 / rms(x), y = r x w: dx = r (g w) - x r^3 mean(g w x), dw = sum over rows of g x r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, weight.dtype)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).mul_(weight).to(x.dtype)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            product = upstream.to(scale.dtype) * x
            rows = product.flatten(0, -2)
            of_weight = torch.mv(rows.t(), scale.flatten()) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, of_weight, None
            mean = torch.mv(rows, weight.to(scale.dtype)).view_as(scale).div_(x.shape[-1])
            of_x = torch.mul(upstream, weight, out=product).mul_(scale)
            return of_x.addcmul_(x.to(scale.dtype), mean.mul_(scale**3), value=-1).to(x.dtype), of_weight, None


class _NormInC(torch.autograd.Function):
    """The same in one pass each way, for products in bfloat16: rounded here, not before each product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        normed, scales = native.norm(rows, weight.detach(), eps)
        ctx.save_for_backward(rows, weight, scales)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scales = ctx.saved_tensors
        given = upstream.reshape(rows.shape).bfloat16().contiguous()
        of_x, of_weight = native.norm_gradient(rows, given, weight.detach(), scales)
        return of_x.view(upstream.shape), of_weight, None


class ResidualBlock(nn.Module):
    """z + SiLU(A z + b), A and b start at 0: the identity at step 0 (arXiv 2401.10774, section 2.1.1)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        return z + F.silu(self.linear(z))


class RowCache(Protocol):
    """Where a causal layer keeps its keys and values."""

    num_rows: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [1, H, T, E] behind the `num_rows` there are; all rows."""


class LayerCache:
    """Keys and values of one staged adaptation layer for one sequence: rows are appended, or cut off the end."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._kv: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [1, H, T, E] behind the last one and return all rows; storage doubles when full."""
        end = self.num_rows + keys.shape[2]
        if self._kv is None or end > self._kv.shape[3]:
            grown = keys.new_empty(2, *keys.shape[:2], max(64, 2 * end), keys.shape[3])
            if self._kv is not None:
                grown[..., : self.num_rows, :] = self._kv[..., : self.num_rows, :]
            self._kv = grown
        self._kv[0, :, :, self.num_rows : end] = keys
        self._kv[1, :, :, self.num_rows : end] = values
        self.num_rows = end
        return self._kv[0, :, :, :end], self._kv[1, :, :, :end]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._kv is None else self._kv.numel() * self._kv.element_size()

    def copied(self, num_rows: int) -> LayerCache:
        """The first `num_rows` rows, in storage of their own."""
        copy = LayerCache()
        copy.num_rows = min(num_rows, self.num_rows)
        if self._kv is not None:
            copy._kv = self._kv[..., : max(1, copy.num_rows), :].clone()
        return copy

    @property
    def storage(self) -> Tensor | None:
        """Keys and values [2, 1, H, S, E] with the room there is."""
        return self._kv

    def move_to(self, storage: Tensor) -> None:
        """Go on in other storage, with the rows there are."""
        if self._kv is not None:
            storage[..., : self.num_rows, :] = self._kv[..., : self.num_rows, :]
        self._kv = storage

    def trim(self, num_rows: int) -> None:
        """Keep the first `num_rows` rows."""
        self.num_rows = min(self.num_rows, num_rows)


def rotary_angles(positions: Tensor, head_size: int, theta: float) -> Tensor:
    """Angles [..., T, E / 2] of integer positions [..., T] (arXiv 2104.09864), in float32."""
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    return positions.float()[..., None] * theta**-exponents


def rotary_tables(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [..., T, E] for integer positions [..., T]."""
    angles = rotary_angles(positions, head_size, theta)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Attention of queries [B, H, T, E] over keys and values [B, J, S, E], H a multiple of J; -> [B, H, T, E].

    Causal: the last row sees all S keys, each one before it one less. On a CPU torch's own attention is slow where rows
    are few (the slots of the heads: 5, thousands of times) and in bfloat16, where two batched products are faster. They
    hold all scores at once, so long rows stay with torch.
    """
    length, num_keys = query.shape[2], key.shape[2]
    few = length <= FEW_ROWS
    halved = query.dtype is torch.bfloat16 and length <= MANY_ROWS
    is_causal = is_causal and length > 1
    if query.device.type == "cpu" and mask is None and (few or halved):
        return _mix_in_products(query, key, value, _future(length, num_keys, query) if is_causal else None)
    if is_causal and length < num_keys:  # torch's own causal mask lets the first row see one key
        mask, is_causal = _future(length, num_keys, query), False
    grouped = query.shape[1] != key.shape[1]
    return attention_of_any_shape(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def _future(length: int, num_keys: int, like: Tensor) -> Tensor:
    """Additive [T, S]: what each row may not see yet."""
    return like.new_full((length, num_keys), -torch.inf).triu_(num_keys - length + 1)


def _mix_in_products(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """The same in two batched products: the query heads of a group lie one below the other over their keys."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    below = query.reshape(batch * key.shape[1], groups * length, size)
    keys, values = key.reshape(-1, *key.shape[2:]), value.reshape(-1, *value.shape[2:])
    if hidden is None:
        scores = torch.bmm(below * size**-0.5, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(hidden.repeat(groups, 1), below, keys.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), values).view(batch, heads, length, size)


class Attention(nn.Module):
    """Grouped-query attention; rotary positions and a cache are the caller's choice."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
        self.head_size = sizes.head_size
        self.query = nn.Linear(sizes.hidden_size, self.num_heads * self.head_size, bias=False)
        self.key = nn.Linear(sizes.hidden_size, self.num_kv_heads * self.head_size, bias=False)
        self.value = nn.Linear(sizes.hidden_size, self.num_kv_heads * self.head_size, bias=False)
        self.output = nn.Linear(self.num_heads * self.head_size, sizes.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: RowCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D], or of the flat rows `select` [P] alone [P, D].

        mask [B or 1, 1, T, S] is True where a key may be seen.
        """
        query = self.queries(x, rotary)
        key, value = self.keys_values(x, rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = mix(query, key, value, mask, is_causal=is_causal and mask is None).transpose(1, 2).flatten(2)
        output: Tensor = self.output(mixed if select is None else mixed.flatten(0, 1).index_select(0, select))
        return output

    def queries(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Queries [B, H, T, E] of x [B, T, D]."""
        query = self._split(self.query(x), self.num_heads)
        return query if rotary is None else _rotate(query, *_tables(rotary, x.dtype))

    def keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, J, T, E] of x [B, T, D]."""
        key, value = (self._split(layer(x), self.num_kv_heads) for layer in (self.key, self.value))
        return key if rotary is None else _rotate(key, *_tables(rotary, x.dtype)), value

    def look_up(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One query a row: x [M, D] over its own keys and values [M, J, S, E], without positions; -> [M, D]."""
        query = self.query(x).view(len(x), self.num_kv_heads, -1, self.head_size) * self.head_size**-0.5
        mixed = torch.matmul(torch.matmul(query, keys.transpose(-2, -1)).softmax(-1), values)
        output: Tensor = self.output(mixed.flatten(1))
        return output

    def _split(self, x: Tensor, num_heads: int) -> Tensor:
        return x.view(*x.shape[:-1], num_heads, self.head_size).transpose(1, 2)


def _tables(rotary: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cosine, sine = (table.to(dtype).unsqueeze(-3) for table in rotary)
    return cosine, sine


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return output


class TransformerLayer(nn.Module):
    """Pre-norm layer whose two output projections start at 0, so that it starts as the identity."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention_norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.attention = Attention(sizes)
        self.mlp_norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.mlp = SwiGLU(sizes.hidden_size, sizes.intermediate_size)
        nn.init.zeros_(self.attention.output.weight)
        nn.init.zeros_(self.mlp.down.weight)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: RowCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; rotary positions [B or 1, T] when given.

        select: flat rows [P] whose outputs [P, D] are wanted; the others are keys and values for them.
        """
        rotary = None
        if positions is not None:
            rotary = rotary_tables(positions, self.sizes.head_size, self.sizes.rope_theta)
        mixed = self.attention(
            self.attention_norm(x), rotary=rotary, mask=mask, is_causal=is_causal, cache=cache, select=select
        )
        return self.widened((x if select is None else x.flatten(0, 1).index_select(0, select)) + mixed)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `look_up` reads: keys and values [B, J, T, E] of x [B, T, D], without positions."""
        return self.attention.keys_values(self.attention_norm(x))

    def look_up(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The layer for one row [M, D] of each sequence, whose keys and values [M, J, S, E] are there."""
        return self.widened(x + self.attention.look_up(self.attention_norm(x), keys, values))

    def widened(self, x: Tensor) -> Tensor:
        """What the layer makes of states [..., D] that attention has been added to."""
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output
