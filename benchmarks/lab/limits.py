"""What the machine allows: memory bandwidth and matrix rate, measured on the spot, and the least a forward can take.

    T_least(n) = max(bytes it must read / bandwidth, operations / matrix rate)

The roofline of Williams et al. (Communications of the ACM 52(4), 2009) for one forward over n tree nodes: every weight
of the layers and of the LM head is read once, so are the keys and values of the context; a weight takes two operations
a node, a cached row four per attention head and value. Embedding rows, norms, rotations and the softmax are left out,
so that the time is a lower bound.

A rate is the best of several kernels, the target's own products among them: one kernel alone is no limit (a plain sum
reads slower than a packed product does, a square product computes slower than one over fewer rows). What is read is far
larger than the caches. Weights smaller than that, read again and again, are partly found in a cache and can look faster
than this limit; a whole forward's are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from amphista.engine.timing import Cell, rounds
from amphista.kernels.linear import Product, TorchLinear
from amphista.target.pages import free_bytes
from amphista.target.products import RoundedLinear
from amphista.target.target import Target

READ_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far beyond any cache; on a GPU also far above a launch
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
READ_ROWS = (1, 2, 4)  # a product over so few reads its weight and does little else
COMPUTE_ROWS = (64, 256)
MIN_ROUNDS, MAX_ROUNDS, BUDGET_SECONDS = 3, 20, 0.3  # of each kernel
Way = tuple[float, Callable[[], object]]  # what one call reads (bytes) or does (operations), and the call


@dataclass(frozen=True)
class Limits:
    """Bytes read and operations done per second, at best, in one dtype on one device, and by which kernel."""

    bytes_per_second: float
    operations_per_second: float
    read_by: str = ""
    computed_by: str = ""


@dataclass(frozen=True)
class ForwardWork:
    """What one forward must read and compute: `weights` once for all nodes, `row_values` a cached row.

    itemsize: bytes of what is cached; weight_size: of a weight, where that is another type.
    """

    weights: int
    row_values: int
    attention_width: int
    itemsize: int
    weight_size: float | None = None

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
            weight_size=_block_size(target) if target.has_blocks else 1 if target.has_int8 else None,
        )

    def num_bytes(self, batch: int, context: int) -> int:
        """Bytes that must be read by a forward of `batch` sequences with `context` rows each."""
        weights = round(self.weights * (self.weight_size or self.itemsize))
        return weights + self.itemsize * batch * context * self.row_values

    def num_operations(self, batch: int, context: int, nodes: int) -> int:
        """Multiplications and additions over `nodes` per sequence."""
        return batch * nodes * (2 * self.weights + 4 * context * self.attention_width)

    def least_ms(self, limits: Limits, *, batch: int, context: int, nodes: int) -> float:
        """Milliseconds below which no forward can come on a machine of these limits."""
        reading = self.num_bytes(batch, context) / limits.bytes_per_second
        computing = self.num_operations(batch, context, nodes) / limits.operations_per_second
        return 1000 * max(reading, computing)


def _block_size(target: Target) -> float:
    """Bytes of a weight among blocks, on average."""
    assert target.lean is not None
    return target.lean.num_product_bytes / sum(
        product.num_outputs * product.num_inputs for product in target.lean.products
    )


def measure_limits(target: Target) -> Limits:
    """The best of several kernels, of a few rounds each, in the target's dtype on its device."""
    with torch.inference_mode():
        read_by, bytes_per_second = _fastest(target, reading_ways(target))
        computed_by, operations_per_second = _fastest(target, computing_ways(target))
    return Limits(bytes_per_second, operations_per_second, read_by, computed_by)


def reading_ways(target: Target) -> dict[str, Way]:
    """Kernels that can do no more than read (and write) memory."""
    asked = _by_device(READ_BYTES, target)
    num_bytes = min(asked, free_bytes(target.device) // 8)
    numbers = torch.ones(num_bytes // 4, device=target.device)
    half = len(numbers) // 2
    width = target.spec.hidden_size
    product = own_product(
        target, max(1, num_bytes // (width * (1 if target.has_int8 else target.dtype.itemsize))), width
    )
    ways: dict[str, Way] = {
        "sum": (4 * len(numbers), numbers.sum),
        "dot product": (8 * half, lambda: torch.dot(numbers[:half], numbers[half : 2 * half])),
        "copy": (8 * half, lambda: numbers[:half].copy_(numbers[half : 2 * half])),
    }
    for count in READ_ROWS:
        rows = torch.full((count, width), 0.5, device=target.device, dtype=target.dtype)
        ways[f"product over {count} row{'s' * (count > 1)}"] = (product.num_bytes, _call(product, rows))
    return ways


def computing_ways(target: Target) -> dict[str, Way]:
    """Products that can do no more than multiply and add."""
    size = _by_device(MATRIX_SIZE, target)
    matrix = torch.full((size, size), 0.5, device=target.device, dtype=target.dtype)
    product = own_product(target, size, size)
    ways: dict[str, Way] = {}
    if not target.has_int8:  # 8-bit products are another arithmetic: theirs alone is their limit
        ways["square product"] = (2 * size**3, lambda: matrix.matmul(matrix))
    for count in [*(count for count in COMPUTE_ROWS if count < size), size]:
        ways[f"own product over {count} rows"] = (2 * count * size**2, _call(product, matrix[:count]))
    return ways


def own_product(target: Target, num_outputs: int, num_inputs: int) -> Product:
    """A product of this size by the kernel that the fast path uses for this target."""
    weight = torch.full((num_outputs, num_inputs), 0.5, device=target.device, dtype=target.dtype)
    return (RoundedLinear if target.has_int8 else TorchLinear)(weight)


def _by_device(values: dict[str, int], target: Target) -> int:
    kind = target.device.type
    return values[kind if kind in values else "cuda"]


def _call(product: Product, rows: torch.Tensor) -> Callable[[], object]:
    return lambda: product(rows)


def _fastest(target: Target, ways: dict[str, Way]) -> tuple[str, float]:
    """The name of the fastest kernel, and its rate."""
    rates = {name: amount / seconds_of(target, work) for name, (amount, work) in ways.items()}
    best = max(rates, key=lambda name: rates[name])
    return best, rates[best]


def seconds_of(target: Target, work: Callable[[], object]) -> float:
    """Seconds of the fastest round, after one that is not counted."""
    cell = Cell(work)
    cell.time(target.device)
    for done in rounds([cell], target.device):
        if done == MAX_ROUNDS or (done >= MIN_ROUNDS and sum(cell.seconds) > BUDGET_SECONDS):
            break
    return cell.shortest
