"""Writes a GGUF file of random weights at the dimensions of a public model, to time engines on.

    python -m benchmarks.lab.random_gguf --model llama-3.2-1b --like DEFAULT.gguf --out FILE

Its text is that of another file, the default target's, with unused tokens up to the model's vocabulary. What such a
model writes means nothing; how long it takes does not depend on it. `llama-quantize` makes the types of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch

from benchmarks.lab.family_steps import MODELS

CONTEXT = 4096
ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}
ROUTER = "ffn_gate_inp"  # whose numbers are float32
TEXT = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.chat_template")
IDS = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")


def copy_text(source: gguf.GGUFReader, writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """The tokenizer of another file, its vocabulary filled up."""
    tokens, types = (source.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    unused = [f"<unused{number}>" for number in range(vocab_size - len(tokens))]
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*types, *[gguf.TokenType.UNUSED] * len(unused)])
    for name in TEXT:
        value = source.fields[name].contents()
        writer.add_array(name, value) if isinstance(value, list) else writer.add_string(name, value)
    for name in IDS:
        writer.add_uint32(name, source.fields[name].contents())


def write(name: str, like: Path, out: Path) -> None:
    family, sizes = MODELS[name]
    if family not in ARCHITECTURES:
        raise SystemExit(f"{name} is of the family {family}: expected one of {', '.join(ARCHITECTURES)}")
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    size = sizes.get("head_dim", hidden // heads)
    keys = size * sizes["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, ARCHITECTURES[family])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(sizes["vocab_size"])
    copy_text(gguf.GGUFReader(like), writer, sizes["vocab_size"])
    layer: dict[str, tuple[int, ...]] = {
        "attn_q": (heads * size, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, heads * size),
    }
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    if family == "qwen3_moe":
        experts, inner = sizes["num_experts"], sizes["moe_intermediate_size"]
        writer.add_expert_count(experts)
        writer.add_expert_used_count(sizes["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(inner)
        layer |= {f"ffn_{part}_exps": (experts, inner, hidden) for part in ("gate", "up")}
        layer |= {"ffn_down_exps": (experts, hidden, inner), ROUTER: (experts, hidden)}
        norms |= {"attn_q_norm": size, "attn_k_norm": size}
    else:
        layer |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    torch.manual_seed(0)
    add_matrix(writer, "token_embd", (sizes["vocab_size"], hidden))
    if not sizes["tie_word_embeddings"]:
        add_matrix(writer, "output", (sizes["vocab_size"], hidden))
    add_norm(writer, "output_norm", hidden)
    for number in range(sizes["num_hidden_layers"]):
        for norm, length in norms.items():
            add_norm(writer, f"blk.{number}.{norm}", length)
        for part, shape in layer.items():
            add_matrix(writer, f"blk.{number}.{part}", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_matrix(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape) * 0.02
    writer.add_tensor(f"{name}.weight", (numbers if name.endswith(ROUTER) else numbers.half()).numpy())


def add_norm(writer: gguf.GGUFWriter, name: str, size: int) -> None:
    writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    write(asked.model, asked.like, asked.out)


if __name__ == "__main__":
    main()
