"""Times a forward at the dimensions of public models, with random weights: `transformers`' own of one token, in its
type, beside ours by rows of a tree, in that type and in 8 bits, in turn.

    python -m benchmarks.lab.family_steps --models gemma-3-270m,gemma-3-1b --repeats 9

Dimensions are those of each model's published configuration. What such a model writes means nothing; how long its
forward takes does not depend on the values in its matrices. Prints least times in ms, and T(n) / T(1).
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from amphista.target.loading import keep_cap
from amphista.target.target import Target
from benchmarks.lab.native_step import tree_of

CONTEXT = 200


def _sizes(layers: int, hidden: int, heads: int, key_heads: int, inner: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        **more,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-270m": ("gemma3_text", _sizes(18, 640, 4, 1, 2048, 262144, head_dim=256, sliding_window=512)),
    "qwen3-0.6b": ("qwen3", _sizes(28, 1024, 16, 8, 3072, 151936, head_dim=128)),
    "gemma-2-2b": ("gemma2", _sizes(26, 2304, 8, 4, 9216, 256000, head_dim=256, sliding_window=4096)),
    "gemma-3-1b": ("gemma3_text", _sizes(26, 1152, 4, 1, 6912, 262144, head_dim=256, sliding_window=512)),
    "llama-3.2-1b": ("llama", _sizes(16, 2048, 32, 8, 8192, 128256)),
    "olmo-2-1b": ("olmo2", _sizes(16, 2048, 16, 16, 8192, 100352, tie_word_embeddings=False)),
    "granite-3.3-2b": (
        "granite",
        _sizes(40, 2048, 32, 8, 8192, 49159, residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0),
    ),
    "granite-3.1-1b-a400m": (
        "granitemoe",
        _sizes(
            24,
            1024,
            16,
            8,
            512,
            49155,
            num_local_experts=32,
            num_experts_per_tok=8,
            residual_multiplier=0.22,
            embedding_multiplier=12.0,
        ),
    ),
    "qwen3-30b-a3b-6-layers": (  # of 48
        "qwen3_moe",
        _sizes(
            6,
            2048,
            32,
            4,
            6144,
            151936,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        ),
    ),
    "smollm3-3b": ("smollm3", _sizes(36, 2048, 16, 4, 11008, 128256)),
    "phi-4-mini": ("phi3", _sizes(32, 3072, 24, 8, 8192, 200064, pad_token_id=0)),
}


def model_of(name: str, dtype: torch.dtype) -> Any:
    """A model of these dimensions whose weights are drawn at random."""
    family, sizes = MODELS[name]
    config = CONFIG_MAPPING[family](**sizes, max_position_embeddings=4096)
    keep_cap(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    return model


class Stock:
    """`transformers`' own forward of one token behind a context."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, DynamicCache(config=model.config)
        self._read(list(range(1, CONTEXT + 1)))

    def _read(self, token_ids: list[int]) -> None:
        with torch.inference_mode():
            self._model(torch.tensor([token_ids]), past_key_values=self._cache, logits_to_keep=1)

    def __call__(self, rows: int) -> None:
        self._read([100])
        self._cache.crop(-1)


class Ours:
    """A forward of ours over so many rows of a tree behind the same context."""

    def __init__(self, model: Any, **settings: Any) -> None:
        self.target = Target(model)
        assert self.target.speed_up(native=True, **settings), self.target.why_stock
        assert self.target.is_native, self.target.why_not_native
        self._cache = self.target.new_cache()
        self.target.prefill(list(range(1, CONTEXT + 1)), self._cache)

    def __call__(self, rows: int) -> None:
        self.target.verify(tree_of(rows), self._cache)
        self._cache.trim(CONTEXT)


def measure(name: str, rows: list[int], repeats: int, dtype: torch.dtype) -> dict[str, dict[int, float]]:
    """Least ms of each form by rows."""
    model = model_of(name, dtype)
    forms: dict[str, Any] = {"transformers": Stock(model), "ours": Ours(model)}
    found: dict[str, dict[int, float]] = {}
    time_all(forms, rows, repeats, found)
    forms.clear()
    if dtype is not torch.float32:
        del model
        gc.collect()
        model = model_of(name, torch.float32)
    forms["8 bits"] = Ours(model, int8=True)
    time_all(forms, rows, repeats, found)
    return found


def time_all(forms: dict[str, Any], rows: list[int], repeats: int, found: dict[str, dict[int, float]]) -> None:
    for repeat in range(repeats + 1):
        for count in rows:
            for form, forward in forms.items():
                if form == "transformers" and count > 1:
                    continue
                start = time.perf_counter()
                forward(count)
                ms = 1000 * (time.perf_counter() - start)
                if repeat:
                    least = found.setdefault(form, {})
                    least[count] = min(ms, least.get(count, ms))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="gemma-3-270m,qwen3-0.6b,gemma-3-1b,llama-3.2-1b,olmo-2-1b")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rows = [int(part) for part in options.rows.split(",")]
    for name in options.models.split(","):
        found = measure(name, rows, options.repeats, getattr(torch, options.dtype))
        print(f"{name}, {options.dtype}, context {CONTEXT}, {torch.get_num_threads()} threads")
        for form, least in found.items():
            shown = ", ".join(f"{count}: {ms:.1f} (x{ms / least[rows[0]]:.2f})" for count, ms in least.items())
            print(f"  {form}: {shown}", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
