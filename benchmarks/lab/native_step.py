"""Times a forward of the C step beside the torch form's (lean.py), interleaved, by rows of one tree; or drafting.

    python benchmarks/lab/native_step.py --dtype float32,gguf,int8,bfloat16 --rows 1,2,4,8,16 --context 200 --repeats 15
    python benchmarks/lab/native_step.py --dtype float32,int8,bfloat16 --rows 1,2,4 --drafts 1,2,4,8
    python benchmarks/lab/native_step.py --dtype gguf,int8,bfloat16 --prompts 64,128,512,1024,2048 --repeats 5

With --drafts: so many sequences at once give `--rows` rows each to the default heads, which are then asked, in C,
with weights of 8 bits and as they are, and in torch; shares are those of a forward of one row, timed in turn.

Prints the medians and least times in ms, their ratio, T(n) / T(1), and the time that reading the weights once takes at
the memory bandwidth measured in the same run. gguf, int8: the file's own blocks, whose torch form multiplies in C, too.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from amphista.cache.static import KVCache
from amphista.drafter.base import Ask
from amphista.drafter.checkpoint import load_proposer
from amphista.kernels.linear import TorchLinear
from amphista.target.blocks import GGUF
from amphista.target.lean import LeanModel
from amphista.target.loading import load_target
from amphista.target.native_forward import NativeForward
from amphista.target.products import PlainLinear
from amphista.target.spans import Span
from amphista.tree.token_tree import TokenTree


def tree_of(rows: int) -> TokenTree:
    """A root with chains of up to three below it."""
    parents = [-1]
    for node in range(1, rows):
        parents.append(0 if node % 3 == 1 else node - 1)
    return TokenTree([100 + node for node in range(rows)], parents)


def bandwidth(seconds: float = 1.0) -> float:
    """GB/s of reading a large tensor with all threads, the best of several passes."""
    numbers = torch.ones(1 << 27)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.numel() * 4 / (time.perf_counter() - start) / 1e9)
    return best


def raise_priority() -> None:
    """Real-time priority for all threads of this process, so that other work on the machine disturbs less."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(20))


def lower_priority() -> None:
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))


def both_forms(dtype: str) -> tuple[LeanModel, NativeForward]:
    """The torch form of the default target at its best, and the C step."""
    if dtype in (GGUF, "int8"):
        target = load_target(dtype=dtype, progress=lambda line: None)
        assert target._lean is not None and target._native is not None
        return target._lean, target._native
    target = load_target(dtype="bfloat16" if dtype == "bfloat16" else "float32", fast=False, progress=lambda line: None)
    plain = LeanModel(target.model, product=PlainLinear)
    return LeanModel(target.model, product=TorchLinear), NativeForward(plain, [None] * target.spec.num_layers)


def forwards(dtype: str, context: int) -> tuple[dict[str, Callable[[TokenTree], None]], int]:
    """Both forms of the default target behind the same context; bytes of weights that the C step reads."""
    lean, native = both_forms(dtype)
    prompt = [(7 * i + 3) % 40000 for i in range(context)]
    cache = KVCache(len(native.layers))
    chain = TokenTree.chain(prompt)

    def torch_form(tree: TokenTree) -> None:
        cache.trim(cache.num_committed)
        lean.logits(lean.hidden_of([Span(tree, cache)])).argmax(-1)

    def c_step(tree: TokenTree) -> None:
        native([Span(tree, cache)])

    torch_form(chain)
    cache.commit(range(context))
    return {"torch": torch_form, "native": c_step}, lean.num_product_bytes


def drafts(
    dtype: str, context: int, numbers: list[int], rows: list[int], repeats: int, before: Callable[[], None]
) -> None:
    """Prints a line for each number of sequences and of rows they are fed."""
    target = load_target(dtype=dtype, progress=lambda line: None)
    token_ids = [(7 * i + 3) % 40000 for i in range(context)]
    cache = target.new_cache()
    hidden = target.prefill(token_ids, cache).hidden
    forms = {}
    for name, settings in {
        "8 bits": {"native": True},
        "as it is": {"native": True, "exact": True},
        "torch": {},
    }.items():
        heads = load_proposer("amphista", target.spec, target.shared, target.fingerprint).heads
        assert heads is not None
        forms[name] = heads.freeze(**settings)
    states = {name: [form.start() for _ in range(max(numbers))] for name, form in forms.items()}
    for name, form in forms.items():
        for state in states[name]:
            form.commit(state, hidden, torch.tensor(token_ids))
    before()
    for number in numbers:
        for count in rows:
            times: dict[str, list[float]] = {name: [] for name in (*forms, "forward")}
            for _ in range(repeats):
                for name, form in forms.items():
                    fed = hidden[:count], token_ids[:count]
                    asks = [Ask(state, form.num_heads, *fed) for state in states[name][:number]]
                    start = time.perf_counter()
                    form.draft_all(asks, 8)
                    times[name].append((time.perf_counter() - start) * 1000)
                    for state in states[name]:
                        form.trim(state, context)
                start = time.perf_counter()
                target.verify(TokenTree([5], [-1]), cache)
                times["forward"].append((time.perf_counter() - start) * 1000)
                cache.trim(context)
            least = {name: min(found) for name, found in times.items()}
            shares = [f"{name} {least[name]:.2f} ({least[name] / least['forward']:.3f})" for name in forms]
            print(f"  {number} sequences fed {count} rows: {', '.join(shares)}; forward {least['forward']:.2f}")


def prompts(dtype: str, numbers: list[int], repeats: int) -> None:
    """Prints how soon prompts of so many tokens are read, each into a new cache."""
    target = load_target(dtype=dtype, progress=lambda line: None)
    least = dict.fromkeys(numbers, math.inf)
    for _ in range(repeats):
        for number in numbers:
            start = time.perf_counter()
            target.prefill([(7 * i + 3) % 40000 for i in range(number)], target.new_cache())
            least[number] = min(least[number], time.perf_counter() - start)
    shown = (
        f"{number} in {1000 * seconds:.0f} ms ({number / seconds:.0f} a second)" for number, seconds in least.items()
    )
    print(f"{dtype}, {torch.get_num_threads()} threads, tokens of a prompt, least time: {', '.join(shown)}")


def measure(
    forms: dict[str, Callable[[TokenTree], None]], rows: list[int], repeats: int
) -> dict[str, dict[int, list[float]]]:
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in rows} for name in forms}
    for repeat in range(repeats + 1):
        for count in rows:
            tree = tree_of(count)
            for name, form in forms.items():
                form(tree)
                start = time.perf_counter()
                form(tree)
                if repeat:
                    times[name][count].append((time.perf_counter() - start) * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32,gguf,int8,bfloat16")
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--drafts", help="numbers of sequences: time drafting")
    parser.add_argument("--prompts", help="numbers of tokens: time reading prompts")
    parser.add_argument("--realtime", action="store_true", help="real-time priority while timing (root, Linux)")
    options = parser.parse_args()
    rows = [int(part) for part in options.rows.split(",")]
    for dtype in options.dtype.split(","):
        if options.prompts:
            prompts(dtype, [int(part) for part in options.prompts.split(",")], options.repeats)
            continue
        if options.drafts:
            print(f"{dtype}, context {options.context}, {torch.get_num_threads()} threads: least ms")
            numbers = [int(part) for part in options.drafts.split(",")]
            before = raise_priority if options.realtime else lambda: None
            drafts(dtype, options.context, numbers, rows, options.repeats, before)
            lower_priority() if options.realtime else None
            continue
        forms, num_bytes = forwards(dtype, options.context)
        if options.realtime:
            forms["native"](tree_of(4)), forms["torch"](tree_of(4))
            raise_priority()
        times, speed = measure(forms, rows, options.repeats), bandwidth(0.3)
        if options.realtime:
            lower_priority()
        print(f"{dtype}, context {options.context}, {torch.get_num_threads()} threads, {speed:.1f} GB/s")
        print(f"  weights of {num_bytes / 1e6:.0f} MB are read in {num_bytes / speed / 1e6:.1f} ms")
        for count in rows:
            line = f"  {count:3d} rows"
            for name in forms:
                found = times[name][count]
                share = min(found) / min(times[name][rows[0]])
                line += f" | {name} {statistics.median(found):6.1f} least {min(found):6.1f} x{share:.2f}"
            print(line + f" | native faster x{min(times['torch'][count]) / min(times['native'][count]):.2f}")


if __name__ == "__main__":
    main()
