"""Tiny random targets as GGUF files, laid out as llama.cpp's converter does; each tensor may be of its own kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from tests.tiny import EOS, TEMPLATE, VOCAB, WINDOW, byte_tokenizer

HIDDEN, INNER, LAYERS = 256, 512, 2
HEADS = {
    "llama": (4, 2),
    "qwen2": (4, 2),
    "qwen3": (2, 1),
    "qwen2moe": (4, 2),
    "qwen3moe": (2, 1),
    "gemma2": (2, 1),
    "gemma3": (2, 1),
    "phi3": (4, 2),
}  # of queries, of keys; transformers takes Qwen3's for 128 wide
GEMMAS = {"gemma2", "gemma3"}
EXPERTS, EXPERTS_INNER, SHARED_INNER = 4, 256, 512
PIECES = {*GEMMAS, "phi3"}  # whose text is cut by sentencepiece
FUSED_IN_PHI3 = {"attn_q", "attn_k", "attn_v", "ffn_gate"}
HALVES = {
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.IQ4_XS: (0,),
    Kind.IQ4_NL: (0,),
}  # where blocks that nobody quantises hold float16


def random_blocks(kind: Kind, outputs: int, inputs: int, seed: int, scale: float = 0.1) -> np.ndarray:
    """uint8 [O, bytes of a row]; of F32 and F16 numbers."""
    source = np.random.default_rng(seed)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    if kind not in HALVES:
        return gguf.quantize(source.normal(0, scale, (outputs, inputs)).astype(np.float32), kind)
    blocks = source.integers(0, 256, (outputs, inputs // numbers, size), dtype=np.uint8)
    for at in HALVES[kind]:
        steps = source.normal(0, scale / 500, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = steps[..., None].view(np.uint8)
    return blocks.reshape(outputs, -1)


def head_size(architecture: str) -> int:
    """Gemma's is no share of the hidden size."""
    return 64 if architecture in GEMMAS else HIDDEN // HEADS[architecture][0]


def shapes(architecture: str, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a file."""
    heads, key_heads = HEADS[architecture]
    size = head_size(architecture)
    queries, rows = heads * size, key_heads * size
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    found |= {} if tied else {"output.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        own: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (queries, HIDDEN),
            "attn_k.weight": (rows, HIDDEN),
            "attn_v.weight": (rows, HIDDEN),
            "attn_output.weight": (HIDDEN, queries),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if architecture in ("qwen2", "qwen2moe"):
            own |= {"attn_q.bias": (HIDDEN,), "attn_k.bias": (rows,), "attn_v.bias": (rows,)}
        if architecture in ("qwen3", "qwen3moe"):
            own |= {"attn_q_norm.weight": (size,), "attn_k_norm.weight": (size,)}
        if architecture == "gemma3":
            own |= {"attn_q_norm.weight": (size,), "attn_k_norm.weight": (size,)}
        if architecture in GEMMAS:
            own |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
        if architecture == "phi3":
            own = {name: shape for name, shape in own.items() if name.split(".")[0] not in FUSED_IN_PHI3}
            own |= {"attn_qkv.weight": (HIDDEN + 2 * rows, HIDDEN), "ffn_up.weight": (2 * INNER, HIDDEN)}
        if architecture.endswith("moe"):
            own = {name: shape for name, shape in own.items() if name.split("_")[0] != "ffn" or "norm" in name}
            own |= {f"ffn_{name}_exps.weight": (EXPERTS, EXPERTS_INNER, HIDDEN) for name in ("gate", "up")}
            own |= {"ffn_gate_inp.weight": (EXPERTS, HIDDEN), "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERTS_INNER)}
        if architecture == "qwen2moe":
            own |= {f"ffn_{name}_shexp.weight": (SHARED_INNER, HIDDEN) for name in ("gate", "up")}
            own |= {"ffn_down_shexp.weight": (HIDDEN, SHARED_INNER), "ffn_gate_inp_shexp.weight": (HIDDEN,)}
        found |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    return found


def write_gguf(
    path: Path,
    kind_of: Callable[[str], Kind],
    architecture: str = "llama",
    *,
    tied: bool = True,
    more: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    say: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """kind_of: of a matrix, by its name; vectors are float32. more: names of tensors that no such model has; without:
    of those that are left out. say: more metadata, or tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    _write_settings(writer, *HEADS[architecture])
    (_write_pieces if architecture in PIECES else _write_letters)(writer)
    if architecture in GEMMAS:
        writer.add_key_length(head_size(architecture))
        writer.add_sliding_window(WINDOW)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(3.0)
        writer.add_final_logit_softcapping(20.0)
    if architecture.endswith("moe"):
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(EXPERTS_INNER)
        writer.add_key_length(head_size(architecture))
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(SHARED_INNER)
    say(writer)
    for seed, (name, shape) in enumerate({**shapes(architecture, tied=tied), **dict.fromkeys(more, (HIDDEN,))}.items()):
        if name in without:
            continue
        if len(shape) == 1:
            vector = np.random.default_rng(seed).normal(1, 0.2, shape).astype(np.float32)
            writer.add_tensor(name, vector if name.endswith("weight") else vector - 1)
        else:
            kind = Kind.F32 if name.endswith("ffn_gate_inp.weight") else kind_of(name)
            rows = math.prod(shape[:-1])
            blocks = random_blocks(kind, rows, shape[-1], seed, 1.0 if name == "token_embd.weight" else 0.1)
            writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_settings(writer: gguf.GGUFWriter, heads: int, key_heads: int) -> None:
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(TEMPLATE)


def _write_letters(writer: gguf.GGUFWriter) -> None:
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    names = [name for name, _ in tokens] + [f"<unused{number}>" for number in range(VOCAB - len(tokens) - 2)]
    names += ["th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types([1] * 256 + [3] * (VOCAB - 258) + [1] * 2)
    writer.add_token_merges(["t h", "th e"])  # one alone an older transformers takes for its letters


def _write_pieces(writer: gguf.GGUFWriter) -> None:
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["<s>", "</s>", "<unk>", "<pad>", "\u2581", "t", "h", "th"]
    names += [f"<unused{number}>" for number in range(VOCAB - len(names))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([-float(place) for place in range(VOCAB)])
    writer.add_token_types([6] * 256 + [3, 3, 2, 3] + [1] * 4 + [5] * (VOCAB - 264))
    writer.add_unk_token_id(258)
    writer.add_pad_token_id(259)
