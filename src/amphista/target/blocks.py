"""A GGUF file's own blocks as a target's weights: mapped, and multiplied as they lie or packed anew, by the C step.

A model of the fast forward's families is built without weights; its linear layers and its embedding get the file's
blocks. These layers compute what stock ones would with the float32 weights that the blocks stand for, in C, on the
file's pages, which processes share. The torch form and the C step read them, too, or a copy where whole numbers are
quicker.
`NativeError` says what cannot be had so; such a target is converted to float32 (gguf.py).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from amphista.errors import NativeError
from amphista.kernels.parts import ABOUT_ONE
from amphista.native.weights import HALVES, Weight
from amphista.target.gguf_metadata import FACTORS, FREQUENCIES
from amphista.target.products import ARENA, NativeLinear

GGUF = "gguf"  # as a type of weights
INDEX = "tensors.json"
ROTATED_IN_PAIRS = "llama"  # the architecture whose queries' and keys' rows a file holds as they are rotated
BLOCKS = {"F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL"}
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NOT_ROUNDED = "shared_expert_gate"  # read with the router, which keeps its numbers
OWN_MODULES = {  # where an architecture's differ
    "gemma2": NORMS_AROUND,
    "gemma3": NORMS_AROUND,
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}


class BlockedLinear(nn.Linear):
    """A linear layer whose weight is blocks; what reads `weight` itself, which has only its shape, gets NaN."""

    def __init__(self, blocks: Tensor, bias: Tensor | None = None) -> None:
        native = Weight.of_blocks(blocks, bias)
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = native.num_inputs, native.num_outputs
        self.native: Weight = native
        self.blocks, self.weight = blocks, _without_numbers(native)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return functional.linear(input, self.rows(torch.arange(self.out_features)), self.bias)
        return self.native.multiply(input.reshape(-1, self.in_features)).view(*input.shape[:-1], -1)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids [...] -> [..., I]."""
        return self.native.rows(ids.flatten()).view(*ids.shape, -1)


class BlockedEmbedding(nn.Embedding):
    """An embedding whose rows are blocks, multiplied by a scale."""

    def __init__(self, blocks: Tensor, scale: float = 1.0) -> None:
        native = Weight.of_blocks(blocks)
        super().__init__(1, 1)
        self.num_embeddings, self.embedding_dim = native.num_outputs, native.num_inputs
        self.native: Weight = native
        self.weight = _without_numbers(native)
        self.embed_scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return self.native.rows(input.flatten()).view(*input.shape, -1) * self.embed_scale


class BlockedExperts(nn.Module):
    """Many MLPs whose weights are blocks, of which each row takes a few; a stock layer's `experts`."""

    def __init__(self, experts: Any, blocks: Sequence[Tensor]) -> None:
        """blocks: of all gates, ups and downs [X, O, ...]."""
        super().__init__()
        self.act_fn, self.blocks = experts.act_fn, blocks
        self.weights = [[Weight.of_blocks(each) for each in part] for part in blocks]
        found = [(len(part), part[0].num_outputs, part[0].num_inputs) for part in self.weights]
        (number, both, size), inner = experts.gate_up_proj.shape, experts.down_proj.shape[2]
        expected = [(number, both // 2, size), (number, both // 2, size), (number, size, inner)]
        if found != expected:
            raise NativeError(f"experts of the file have the shapes {found}: expected {expected}")
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.tensor(math.nan).expand(part.shape), requires_grad=False)
            for part in (experts.gate_up_proj, experts.down_proj)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Rows [N, D], which they take and how much of each [N, C] -> [N, D]."""
        mixed = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            row, place = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up, down = (part[expert] for part in self.weights)
            inner = self.act_fn(gate.multiply(hidden_states[row])) * up.multiply(hidden_states[row])
            mixed.index_add_(0, row, top_k_weights[row, place, None] * down.multiply(inner))
        return mixed


def _without_numbers(native: Weight) -> nn.Parameter:
    shape = native.num_outputs, native.num_inputs
    return nn.Parameter(torch.tensor(math.nan).expand(shape), requires_grad=False)


def native_of(layer: nn.Module) -> Weight:
    """The weight of a linear layer or an embedding, as the C step reads it; raises NativeError."""
    if isinstance(layer, BlockedLinear | BlockedEmbedding):
        return layer.native
    return Weight.of(layer.get_parameter("weight"))


def scale_of(embedding: nn.Module) -> float:
    """What an embedding's rows are multiplied by when they are looked up (Gemma)."""
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(torch.as_tensor(scale).to(embedding.get_parameter("weight").dtype))


def rows_of(layer: nn.Linear, ids: Tensor) -> Tensor:
    """A copy of some rows of a linear layer's weight: ids [...] -> [..., I]."""
    if isinstance(layer, BlockedLinear):
        return layer.rows(ids)
    return functional.embedding(ids, layer.weight)  # whole rows at a time, which indexing does not copy


class BlockLinear(NativeLinear):
    """Weights in blocks, packed where that is quicker, else held as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._take([self._packed(weight, bias)])

    @classmethod
    def _packed(cls, weight: Tensor, bias: Tensor | None) -> Weight:
        return Weight.of_blocks(weight, bias).packed(ARENA, is_coarse=cls.has_8_bits)

    @staticmethod
    def weight_of(layer: nn.Linear) -> Tensor:
        assert isinstance(layer, BlockedLinear)
        return layer.blocks

    @classmethod
    def side_by_side(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Self:
        made = cls.__new__(cls)
        parts = [cls._packed(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        made._take([Weight.side_by_side(parts)] if len(parts) > 2 else parts)
        return made


class CoarseBlockLinear(BlockLinear):
    """The same for rows of 8 bits, as llama.cpp has them: another target than the float32 one (`check_coarse`)."""

    has_8_bits = True

    @property
    def arithmetic(self) -> str:
        return "blocks-int8"


def check_coarse(model: nn.Module) -> None:
    """Raise NativeError unless all products of a model on blocks can have rows of 8 bits."""
    for name, module in model.named_modules():
        weights = [module.native] if isinstance(module, BlockedLinear) else []
        if isinstance(module, BlockedExperts):
            weights = [part[0] for part in module.weights]
        if not name.endswith(NOT_ROUNDED) and not all(weight.packed_size() for weight in weights):
            raise NativeError(f"whole numbers of 8 bits are not multiplied by the blocks of {name} here")


# -- a file ------------------------------------------------------------------------------------------------------------


def write_index(reader: Any, folder: Path) -> None:
    """Note where the tensors of a file lie, from its `GGUFReader`: what is left of its header is slow to read."""
    tensors = {
        tensor.name: [tensor.tensor_type.name, [int(size) for size in tensor.shape], int(tensor.data_offset)]
        for tensor in reader.tensors
    }
    record = {"architecture": reader.fields["general.architecture"].contents(), "tensors": tensors}
    (folder / INDEX).write_text(json.dumps(record))


class MappedTensors:
    """The tensors of a GGUF file as its pages, under `transformers`' names."""

    def __init__(self, gguf_file: Path, folder: Path, config: Any) -> None:
        """folder: with the index of the file; config: of the model, for its heads."""
        record = json.loads((folder / INDEX).read_text())
        num_bytes = gguf_file.stat().st_size
        self._pages = torch.from_file(str(gguf_file), shared=False, size=num_bytes, dtype=torch.uint8)
        modules = {**MODULES, **OWN_MODULES.get(record["architecture"], {})}
        self._found = {_name_of(name, modules): entry for name, entry in record["tensors"].items()}
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self._heads = heads if record["architecture"] == ROTATED_IN_PAIRS else {}
        self.unread = set(self._found) - {FREQUENCIES, *(FACTORS.values() if config.model_type == "phi3" else ())}
        self._tried: set[str] = set()

    def take(self, name: str) -> Tensor:
        """Blocks uint8 [..., O, blocks in a row, bytes of a block], or float32 numbers [...]; raises NativeError."""
        if name not in self._found:
            raise NativeError(f"the file has no {name}")
        self.unread.discard(name)
        kind, shape, offset = self._found[name]
        numbers = self._numbers(kind, shape[::-1], offset)
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return numbers
        return numbers.view(heads, -1, 2, *numbers.shape[1:]).transpose(1, 2).reshape(numbers.shape)

    def _numbers(self, kind: str, shape: list[int], offset: int) -> Tensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        per_block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        end = offset + math.prod(shape) // per_block * size
        if end > len(self._pages):
            raise NativeError(f"the file ends at byte {len(self._pages)}, a tensor at {end}")
        held = self._pages[offset:end]
        if kind in PLAIN and (kind != "F16" or len(shape) == 1 or shape[-1] % HALVES):
            return held.view(PLAIN[kind]).view(shape).float()
        if kind not in BLOCKS or len(shape) == 1:
            raise NativeError(f"the C step has no weights in {kind} of shape {shape}")
        if kind == "IQ4_NL":  # two at a time: alone they are as large as those of Q4_0
            size *= 2
            if shape[-1] % (2 * per_block):
                raise NativeError(f"the C step has no weights in {kind} of shape {shape}")
        blocks = held.view(-1, held.numel() // math.prod(shape[:-1]) // size, size)
        self._try(kind, blocks[:1])
        return blocks.view(*shape[:-1], -1, size)

    def _try(self, kind: str, row: Tensor) -> None:
        """Compare what the C step and the `gguf` package make of one row of each kind."""
        from gguf import GGMLQuantizationType, dequantize

        if kind not in self._tried:
            found = Weight.of_blocks(row).rows(torch.zeros(1, dtype=torch.int64))
            if not torch.equal(found, torch.from_numpy(dequantize(row.flatten(1).numpy(), GGMLQuantizationType[kind]))):
                raise NativeError(f"the C step and the gguf package read blocks of {kind} differently")
            self._tried.add(kind)


def _name_of(name: str, modules: Mapping[str, str]) -> str:
    """`transformers`' name of a tensor; its own where there is none."""
    parts = name.split(".")
    layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    stem, last = (".".join(parts[2:-1]), parts[-1]) if layer else (".".join(parts[:-1]), parts[-1])
    return f"{layer}{modules[stem]}.{last}" if stem in modules else name


def give_blocks(model: Any, gguf_file: Path, folder: Path) -> None:
    """Let a model of the fast forward's families, built on the meta device, run on the mapped blocks of a file.

    raises NativeError where the C step cannot multiply them, or the file does not hold what the model needs.
    """
    config, decoder = model.config, model.get_decoder()
    tensors = MappedTensors(gguf_file, folder, config)
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    for name, module in list(model.named_modules()):
        if not list(module.parameters(recurse=False)):
            continue
        is_tied = module is model.get_output_embeddings() and config.tie_word_embeddings
        made = _filled(module, "model.embed_tokens" if is_tied else name, tensors)
        model.set_submodule(name, made)
    if tensors.unread:
        raise NativeError(f"the file holds {min(tensors.unread)}, which {type(model).__name__} has not")


def _filled(module: Any, name: str, tensors: MappedTensors) -> Any:
    """A module with the tensors of this name in place of its own, which are only sizes."""
    if isinstance(getattr(module, "gate_up_proj", None), Tensor):
        return BlockedExperts(module, [tensors.take(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down")])
    numbers, size = tensors.take(f"{name}.weight"), module.weight.shape
    if isinstance(module, nn.Linear):
        numbers = numbers[None] if numbers.dim() == 1 else numbers  # of one output
        made: Any = BlockedLinear(numbers, None if module.bias is None else tensors.take(f"{name}.bias"))
    elif isinstance(module, nn.Embedding):
        is_scaled = hasattr(module, "embed_scale")  # Gemma's, which has no value on the meta device
        made = BlockedEmbedding(numbers, module.embedding_dim**0.5 if is_scaled else 1.0)
    else:
        made = module
        is_about_one = type(module).__name__ in ABOUT_ONE  # files hold the weight itself
        made.weight = nn.Parameter(numbers - 1.0 if is_about_one else numbers, requires_grad=False)
    if made.weight.shape != size:
        raise NativeError(f"{name} of the file has the shape {list(made.weight.shape)}: expected {list(size)}")
    return made
