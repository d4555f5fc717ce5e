"""The C step: a node's logits are the same bits as plain decoding's, and as near to the stock model as float32 is.

Random trees of several sequences in one call, behind contexts from none to beyond the window, in every type of weights,
for odd sizes, on every instruction set that this machine runs. The same checks must see each of the faults that the
library can be built with.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from amphista.cache.static import KVCache
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import NativeError
from amphista.native.build import find_compiler, load
from amphista.native.crew import CREW
from amphista.native.weights import Weight
from amphista.target.experts import all_taken
from amphista.target.lean import LeanModel
from amphista.target.lean_layers import routers_of
from amphista.target.native_forward import NativeForward, windows_of
from amphista.target.products import PlainLinear, RoundedLinear
from amphista.target.spans import Span
from amphista.target.spec import Probes
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from amphista.tree.token_tree import TokenTree
from tests.decoding import decode
from tests.laws.test_fast_path import OTHER_FAMILIES, TREE, long_answer, shaken_model
from tests.tiny import HOSTILE, WINDOW

FLAGS = {
    "native": ("-march=native", "-fopenmp"),
    "avx2": ("-march=x86-64-v3", "-fopenmp"),
    "portable": ("-march=x86-64", "-fopenmp"),
}
ODD = {"hidden_size": 36, "intermediate_size": 50, "head_dim": 10, "vocab_size": 301, "num_hidden_layers": 2}
MODELS = {
    "llama-odd": ("llama", ODD),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral-windowed": ("mistral-windowed", {}),
    "qwen2-windowed": ("qwen2-windowed", {**ODD, "num_key_value_heads": 4}),
    "qwen3-wide": ("qwen3", {"head_dim": 72, "hidden_size": 72, "intermediate_size": 200}),
    **{name: (name, {}) for name in OTHER_FAMILIES},
    "ernie4_5_moe-floor": ("ernie4_5_moe", {"moe_norm_min": 0.9}),
    "dots1-none-shared": ("dots1", {"n_shared_experts": 0}),
    "qwen3_moe-many": ("qwen3_moe", {"num_experts": 40, "num_experts_per_tok": 6}),
    "gemma3-odd": ("gemma3-by-kind", ODD),
    "olmo2-odd": ("olmo2", {**ODD, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12}),
}
BY_FOURS = {f"llama-{size}": ("llama", {"head_dim": size, "num_hidden_layers": 2}) for size in (64, 96, 128)}  # AVX-512
CASES = [*itertools.product(MODELS, FLAGS), *itertools.product(BY_FOURS, ["native"])]
TYPES = ["float32", "bfloat16", "int8"]
CONTEXTS = [0, 1, WINDOW - 2, 2 * WINDOW + 3, 67]
FAULTS = ["skipped ancestor", "seen sibling", "late position", "dropped tail", "dropped odd", "order by rows",
          "wide window", "other cache", "early tap", "seen prefix",
          "first row's experts"]  # fmt: skip
LATE_THREAD = len(FAULTS) + 1


def has_compiler() -> bool:
    try:
        find_compiler()
    except NativeError:
        return False
    return True


pytestmark = NEEDS_COMPILER = pytest.mark.skipif(not has_compiler(), reason="no C compiler")


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """In C, so that pieces of work are shared out; torch's would only wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        yield


def runs_here(flags: str) -> bool:
    return flags != "avx2" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@cache
def forward_of(name: str, type_name: str, flags: tuple[str, ...]) -> tuple[NativeForward, Target]:
    family, changes = (MODELS | BY_FOURS)[name]
    model = shaken_model(family, **changes)
    model = model.to(torch.bfloat16) if type_name == "bfloat16" else model
    target = Target(model, name=name)
    with pytest.MonkeyPatch.context() as patch:
        if flags != FLAGS["native"]:  # weights must not be packed for another build than the one that reads them
            patch.setattr(Weight, "packed_size", lambda weight, flags=None: 0)
        lean = LeanModel(model, product=RoundedLinear if type_name == "int8" else PlainLinear)
    return NativeForward(lean, windows_of(lean, target.spec.max_positions), flags=flags), target


def span_of(token_ids: list[int], parents: list[int], cache: KVCache, probes: Probes | None = None) -> Span:
    """Also of what is no `TokenTree`: several roots, parents that cannot be. probes: two groups at its end."""
    if probes is not None:
        size, end = probes.num_rows, len(token_ids)
        token_ids = token_ids + [-1 - j for j in range(size)] * 2
        for node in (0, end - 1):
            parents = [*parents, node, *range(len(parents), len(parents) + size - 1)]
    return Span(SimpleNamespace(tokens=token_ids, parents=parents, num_nodes=len(token_ids)), cache, probes=probes)


@cache
def probes_of(forward: NativeForward) -> Probes:
    shape, generator = forward.model.shape, torch.Generator().manual_seed(3)
    rows = (forward.model.num_layers, 2, shape.num_key_value_heads, 5, shape.head_size)
    return Probes(*(torch.randn(size, generator=generator) for size in ((3, forward.model.hidden_size), rows)))


def random_tree(source: random.Random, num_nodes: int) -> tuple[list[int], list[int]]:
    """Tokens and parents; now and then several roots."""
    parents = [source.randrange(-1, node) if source.random() < 0.2 else node - 1 for node in range(num_nodes)]
    return [source.randrange(300) for _ in parents], parents


def path_to(parents: list[int], node: int) -> list[int]:
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = parents[node]
    return nodes[::-1]


TAPS = (1, 2)


def plainly(forward: NativeForward, tokens: list[int], num_layers: int) -> tuple[KVCache, list[torch.Tensor]]:
    """Token after token, each in a forward of its own: the cache, and logits with hidden states of each."""
    kept, found = KVCache(num_layers), []
    for token in tokens:
        output = forward([span_of([token], [-1], kept)], taps=TAPS)
        kept.commit([0])
        found.append(torch.cat([output.logits[0], output.hidden[0]]))
    return kept, found


def differences(forward: NativeForward, num_layers: int, seed: int) -> int:
    """Nodes of random trees of several sequences whose bits are not those of plain decoding; committed rows, too."""
    source, wrong = random.Random(seed), 0
    for num_spans in (1, 3):
        spans, plain = [], []
        for _ in range(num_spans):
            prompt = [source.randrange(300) for _ in range(source.choice(CONTEXTS))]
            tokens, parents = random_tree(source, source.choice([1, 2, 3, 5, 9, 14]))
            path = path_to(parents, len(tokens) - 1)
            kept = plainly(forward, prompt, num_layers)[0]
            whole, found = plainly(forward, prompt + [tokens[node] for node in path], num_layers)
            spans.append(span_of(tokens, parents, kept, probes_of(forward)))
            plain.append((path, whole, found[len(prompt) :]))
        output = forward(spans, taps=TAPS)
        rows, first = torch.cat([output.logits, output.hidden], dim=1), 0
        wrong += sum(map(int.__ne__, output.choices, output.logits.argmax(-1).tolist()))
        for span, (path, whole, found) in zip(spans, plain, strict=True):
            wrong += sum(not torch.equal(rows[first + node], row) for node, row in zip(path, found, strict=True))
            first += span.tree.num_nodes
            span.cache.commit(path)
            for ours, theirs in zip(span.cache.layers, whole.layers, strict=True):
                end = whole.num_committed
                wrong += not torch.equal(ours.keys[:, :, :end], theirs.keys[:, :, :end])
                wrong += not torch.equal(ours.values[:, :, :end], theirs.values[:, :, :end])
    return wrong


def distance(forward: NativeForward, target: Target) -> float:
    """Of a chain and of a tree behind it, from the stock model, by the largest logit and by the largest state; with
    coarse weights of every expert, for which are the best hangs on roundings."""
    is_coarse = target.dtype is torch.bfloat16 or forward.head.kind not in (0, 1)
    choosing = [*routers_of(target.model.get_decoder()), *forward.model.experts] if is_coarse else []
    with all_taken(choosing):
        return _distance(forward, target)


def _distance(forward: NativeForward, target: Target) -> float:
    tokens, found = [(7 * i + 3) % 250 for i in range(3 * WINDOW)], []
    ours, theirs = KVCache(target.spec.num_layers), target.new_cache()
    chain = forward([span_of(tokens, list(range(-1, len(tokens) - 1)), ours)], [len(tokens) - 1], TAPS)
    found.append((chain, target.prefill(tokens, theirs, TAPS)))
    ours.commit(range(len(tokens)))
    found.append((forward([span_of(TREE.tokens, TREE.parents, ours)], taps=TAPS), target.verify(TREE, theirs, TAPS)))
    ours.trim(len(tokens)), theirs.trim(len(tokens))
    probed = [Span(TREE, cache).probed([0, 3], probes_of(forward)) for cache in (ours, theirs)]
    found.append((forward([probed[0]], range(TREE.num_nodes), TAPS), target.forward([probed[1]], TAPS)[0]))
    found = [(getattr(a, part), getattr(b, part)) for part in ("logits", "hidden") for a, b in found]
    return max(float((a - b.float()).abs().max() / b.float().abs().max()) for a, b in found)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize(("name", "flags"), CASES)
def test_a_nodes_bits_are_those_of_plain_decoding(name, type_name, flags):
    if not runs_here(flags):
        pytest.skip("this processor has no AVX2")
    forward, target = forward_of(name, type_name, FLAGS[flags])
    assert differences(forward, target.spec.num_layers, seed=len(name)) == 0
    allowed = {"float32": 1e-4, "bfloat16": 0.15, "int8": 0.3}[type_name]
    assert (1e-4 if type_name == "int8" else 0) < distance(forward, target) < allowed


@pytest.mark.parametrize("type_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-odd", "llama-64", "mistral-windowed"])
def test_long_paths_whose_rows_lie_apart_have_the_bits_of_plain_decoding(name, type_name):
    """Two chains of 20 nodes, in turn: more keys than are scored at once, none beside the next."""
    forward, target = forward_of(name, type_name, FLAGS["native"])
    source, num_layers = random.Random(1), target.spec.num_layers
    prompt, tokens = ([source.randrange(300) for _ in range(number)] for number in (5, 40))
    kept = plainly(forward, prompt, num_layers)[0]
    output = forward([span_of(tokens, [max(node - 2, -1) for node in range(40)], kept)], taps=TAPS)
    rows = torch.cat([output.logits, output.hidden], dim=1)
    for first in (0, 1):
        _, found = plainly(forward, prompt + tokens[first::2], num_layers)
        assert torch.equal(rows[first::2], torch.stack(found[len(prompt) :]))


@pytest.mark.parametrize("type_name", TYPES)
def test_a_prompt_has_the_same_bits_in_any_pieces(type_name):
    """A server cuts prompts by what waits beside them; torch, which once read long ones in bfloat16, sums otherwise."""
    dtype = torch.bfloat16 if type_name == "bfloat16" else torch.float32
    target = Target(shaken_model("llama").to(dtype))
    assert target.speed_up(native=True, int8=type_name == "int8") and target.is_native
    prompt, found = [(7 * i) % 250 for i in range(400)], []
    for first in (400, 200, 129, 1):
        cache = target.new_cache()
        read = [target.prefill(piece, cache) for piece in (prompt[:first], prompt[first:]) if piece]
        found.append((read[-1].logits, torch.cat([output.hidden for output in read])))
    for logits, hidden in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(hidden, found[0][1])


@pytest.fixture(scope="module")
def mutable(tmp_path_factory):
    """A build with faults to switch on, and its forward for a model."""
    flags = ("-O1", "-march=native", "-fopenmp", "-DMUTABLE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMPHISTA_CACHE", str(tmp_path_factory.mktemp("mutable")))
        yield flags, ctypes.c_int.in_dll(load(flags), "amphista_mutant")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(mutable, fault):
    flags, switch = mutable
    name = {"wide window": "mistral-windowed", "first row's experts": "qwen3_moe"}.get(fault, "llama-odd")
    forward, target = forward_of(name, "float32", flags)
    checks = lambda: (differences(forward, target.spec.num_layers, seed=1), distance(forward, target))  # noqa: E731
    switch.value = FAULTS.index(fault) + 1
    try:
        wrong, far = checks()
    finally:
        switch.value = 0
    assert wrong > 0 or far > 1e-3
    wrong, far = checks()
    assert wrong == 0 and far < 1e-4


def test_how_long_threads_wait_is_measured(mutable, monkeypatch):
    flags, switch = mutable
    forward, target = forward_of("llama-odd", "float32", flags)
    found = {}
    for switch.value in (LATE_THREAD, 0):
        noted = found[switch.value] = []
        monkeypatch.setattr(CREW, "note", lambda *call, noted=noted: noted.append(call))
        distance(forward, target)
    for team, waited, elapsed in found[LATE_THREAD]:
        assert team == 2 and 0.3 < waited / elapsed < 0.6  # one of the two, nearly all the time
    assert sum(waited for _, waited, _ in found[0]) < sum(waited for _, waited, _ in found[LATE_THREAD]) / 2


BAD = {
    "a parent that comes later": dict(parents=[-1, 2, 1]),
    "a parent of its own": dict(parents=[0, 0, 1]),
    "a token that is none": dict(token_ids=[1, 301, 2]),
    "a negative token": dict(token_ids=[1, -1, 2]),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_is_refused_and_nothing_written(bad):
    forward, target = forward_of("llama-odd", "float32", FLAGS["native"])
    kept, _ = plainly(forward, [5, 6], target.spec.num_layers)
    before = [layer.keys[:, :, :2].clone() for layer in kept.layers]
    span = {"token_ids": [1, 2, 3], "parents": [-1, 0, 1], **BAD[bad]}
    with pytest.raises(NativeError, match="refuses a forward"):
        forward([span_of(cache=kept, **span)])
    assert all(map(torch.equal, before, [layer.keys[:, :, :2] for layer in kept.layers]))
    kept.check_integrity()
    assert kept.num_rows == 2
    with pytest.raises(NativeError, match="logits of a row"):
        forward([span_of([1], [-1], kept)], [1])
    for tap in (0, 3):
        with pytest.raises(NativeError, match="no layer's"):
            forward([span_of([1], [-1], kept)], taps=(1, tap))


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("name", ["llama-odd", "qwen3-wide", "mistral-windowed"])
def test_a_prompt_read_at_once_has_the_bits_of_its_tokens_one_by_one(name, type_name, monkeypatch):
    """By any number of threads; also where rows are so many that threads share what they make of them."""
    forward, target = forward_of(name, type_name, FLAGS["native"])
    source, num_layers = random.Random(len(name)), target.spec.num_layers
    tokens = [source.randrange(300) for _ in range(107)]
    _, found = plainly(forward, tokens, num_layers)
    for threads, first in ((1, 70), (2, 33), (5, 31), (3, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        kept, rows = KVCache(num_layers), []
        for part in filter(None, (tokens[:first], tokens[first:])):
            output = forward([span_of(part, list(range(-1, len(part) - 1)), kept)], taps=TAPS)
            kept.commit(range(len(part)))
            rows.append(torch.cat([output.logits, output.hidden], dim=1))
        assert torch.equal(torch.cat(rows), torch.stack(found))


# -- in a target ------------------------------------------------------------------------------------------------------


def native_target(family: str, **changes) -> Target:
    target = Target(shaken_model(family), name=family)
    assert target.speed_up(native=True, **changes) and target.why_not_native is None
    assert target.path == ("native-int8" if changes.get("int8") else "native")
    return target


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("family", ["mistral-windowed", "qwen2-windowed", "qwen3", *OTHER_FAMILIES])
def test_decoding_is_that_of_the_stock_model(family, kind):
    target = native_target(family)
    for params in (SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=20, temperature=0.8, seed=7)):
        prompt, expected = long_answer(target, params)
        sequence = decode(Engine(target, HOSTILE[kind](prompt + expected), parse_tree(9)), prompt, params)
        assert sequence.output_ids == expected
        assert kind != "always-right" or max(sequence.stats.accepted) >= 3


def test_a_batch_has_the_bits_of_each_alone():
    target, lengths = native_target("mistral-windowed"), [3, WINDOW + 2, 1, 2 * WINDOW]
    together, alone = [target.new_cache() for _ in lengths], [target.new_cache() for _ in lengths]
    for length, *caches in zip(lengths, together, alone, strict=True):
        for kept in caches:
            target.prefill(list(range(1, length + 1)), kept)
    for step in range(70):
        trees = [TokenTree.chain([token]) for token in (40 + step, 50, 60, 70 + step)]
        outputs = target.forward([Span(*pair) for pair in zip(trees, together, strict=True)])
        for tree, kept, output in zip(trees, alone, outputs, strict=True):
            assert torch.equal(target.verify(tree, kept).logits, output.logits)
        for kept in (*together, *alone):
            kept.commit([0])


def _no_compiler(patch):
    patch.setenv("CC", "never-installed-cc")
    load.cache_clear()


def _fails_its_test(patch):
    call = NativeForward.__call__

    def far_off(form, spans, wanted=None, taps=()):
        output = call(form, spans, wanted, taps)
        return dataclasses.replace(output, hidden=output.hidden * 1.01)

    patch.setattr(NativeForward, "__call__", far_off)


@pytest.mark.parametrize("trouble", [_no_compiler, _fails_its_test])
def test_without_the_c_step_the_torch_form_decodes_and_one_line_says_why(trouble, monkeypatch, caplog):
    target = Target(shaken_model("llama"), name="tiny")
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "amphista"):
        trouble(patch)
        assert target.speed_up(native=True)
    load.cache_clear()
    assert target.path == "fast" and target.why_not_native
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"tiny decodes without the C step, slower: {target.why_not_native}"
    stock = Target(target.model)
    ours, theirs = (t.prefill(list(range(9)), t.new_cache()).logits for t in (target, stock))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
