"""What the machine allows: memory bandwidth and matrix rate, measured on the spot, and the least a forward can take.

    T_least(n) = max(bytes it must read / bandwidth, operations / matrix rate)

The roofline of Williams et al. (Communications of the ACM 52(4), 2009) for one forward over n tree nodes: every weight
of the layers and of the LM head is read once, so are the keys and values of the context; a weight takes two operations
a node, a cached row four per attention head and value. Embedding rows, norms, rotations and the softmax are left out:
it is a lower bound, and so are the measured rates (a kernel that is not the best one makes it look closer).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from amphista.evaluation.stock import now
from amphista.kernels.int8 import Int8Linear
from amphista.target.target import Target

READ_BYTES = 256 << 20  # far beyond any cache
MATRIX_SIZE = 2048
ROUNDS = 5


@dataclass(frozen=True)
class Limits:
    """Bytes read and operations done per second, at best, by this process's threads in one dtype."""

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class ForwardWork:
    """What one forward must read and compute: `weights` once for all nodes, `row_values` a cached row.

    itemsize: bytes of what is cached; weight_size: of a weight, where that is another type.
    """

    weights: int
    row_values: int
    attention_width: int
    itemsize: int
    weight_size: int | None = None

    @classmethod
    def of(cls, target: Target, num_layers: int | None = None) -> ForwardWork:
        """Counted from the target; num_layers: the layers the numbers shall stand for, where it holds fewer."""
        spec = target.spec
        layers = num_layers or spec.num_layers
        head = spec.vocab_size * spec.hidden_size
        per_layer = target.num_layer_weights // spec.num_layers
        return cls(
            weights=head + layers * per_layer,
            row_values=2 * layers * spec.num_key_value_heads * spec.head_size,
            attention_width=layers * spec.num_attention_heads * spec.head_size,
            itemsize=target.dtype.itemsize,
            weight_size=1 if target.has_int8 else None,
        )

    def num_bytes(self, batch: int, context: int) -> int:
        """Bytes that must be read by a forward of `batch` sequences with `context` rows each."""
        weights = self.weights * (self.weight_size or self.itemsize)
        return weights + self.itemsize * batch * context * self.row_values

    def num_operations(self, batch: int, context: int, nodes: int) -> int:
        """Multiplications and additions over `nodes` per sequence."""
        return batch * nodes * (2 * self.weights + 4 * context * self.attention_width)

    def least_ms(self, limits: Limits, *, batch: int, context: int, nodes: int) -> float:
        """Milliseconds below which no forward can come on a machine of these limits."""
        reading = self.num_bytes(batch, context) / limits.bytes_per_second
        computing = self.num_operations(batch, context, nodes) / limits.operations_per_second
        return 1000 * max(reading, computing)


def measure_limits(target: Target) -> Limits:
    """The best of a few rounds each, in the target's dtype on its device.

    Reading sums an array of 256 MiB; the matrix rate is that of a square product of 2048 rows, of the target's own
    kernel where its weights have 8 bits.
    """
    numbers = torch.ones(READ_BYTES // 4, device=target.device)
    matrix = torch.full((MATRIX_SIZE, MATRIX_SIZE), 0.5, device=target.device, dtype=target.dtype)
    product = Int8Linear(matrix) if target.has_int8 else matrix.matmul
    return Limits(
        bytes_per_second=READ_BYTES / _best(target, lambda: numbers.sum()),
        operations_per_second=2 * MATRIX_SIZE**3 / _best(target, lambda: product(matrix)),
    )


def _best(target: Target, work: Any) -> float:
    """Seconds of the fastest round, after one that is not counted."""
    best = math.inf
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            started = now(target)
            work()
            if turn:
                best = min(best, now(target) - started)
    return best
