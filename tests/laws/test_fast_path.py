"""The fast path equals the stock model: logits and hidden states of prefills, trees, commits, ragged batches and rows
for training, for every family and shape that qualifies, windows crossed and caches grown; and decoding is lossless.

Mutations (rotary positions off by one, heads of another group, a dropped mask bit, a residual left out) must be seen by
the same checks, and a model with anything unknown in it must not qualify.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import CapacityError, TargetError
from amphista.target import lean
from amphista.target.lean import LeanModel
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from amphista.tree.token_tree import TokenTree
from tests.decoding import decode
from tests.oracle.decode import decode_plainly
from tests.tiny import EOS, HOSTILE, WINDOW, tiny_model, tiny_target

TREE = TokenTree([11, 40, 41, 42, 43, 40, 44, 45, 46, 47], [-1, 0, 0, 1, 1, 2, 3, 6, 7, 8])
OTHER_FAMILIES = (
    "gemma", "gemma2", "gemma3", "gemma3-by-kind",
    "phi3", "phi3-windowed", "phi3-half", "granite", "smollm3", "olmo2", "olmo3", "exaone4",
    "ernie4_5", "glm4",
    "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe", "glm4_moe", "dots1", "ernie4_5_moe", "gpt_oss",
)  # fmt: skip
CHANGES = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-group": ("llama", {"num_key_value_heads": 1}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {}),
    "mistral-windowed": ("mistral-windowed", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-windowed": ("qwen2-windowed", {}),
    "qwen3": ("qwen3", {}),
    **{name: (name, {}) for name in OTHER_FAMILIES},
    "ernie4_5_moe-floor": ("ernie4_5_moe", {"moe_norm_min": 0.9}),
    "dots1-none-shared": ("dots1", {"n_shared_experts": 0}),
    "qwen3_moe-many": ("qwen3_moe", {"num_experts": 40, "num_experts_per_tok": 6}),
}
TOLERANCE = 1e-5  # of the largest logit or hidden state: float32, products added in another order


def prompt_of(length: int) -> list[int]:
    return [(7 * i + 3) % 250 for i in range(length)]


def shaken_model(family: str, **changes):
    """Biases and norms are random too: a path could forget them without anyone noticing."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if parameter.mean() > 0.5 else 0.0, 0.3)
    return model


def pair(name: str) -> tuple[Target, Target]:
    """The same weights on both paths."""
    family, changes = CHANGES[name]
    model = shaken_model(family, **changes)
    fast, stock = Target(model, name=name), Target(model, name=name)
    assert fast.speed_up(), fast.why_stock
    return fast, stock


@pytest.fixture(scope="module", params=CHANGES)
def both(request):
    return pair(request.param)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and bool(torch.isfinite(ours).all())
    return float((ours - theirs).abs().max() / theirs.abs().max())


def worst_difference(fast: Target, stock: Target, length: int) -> float:
    """A chunked prefill, a tree, a commit and a tree behind it, on both."""
    outputs = []
    for target in (fast, stock):
        cache = target.new_cache()
        first = target.prefill(prompt_of(length), cache)
        tree = target.verify(TREE, cache)
        cache.commit([0, 2, 5])
        again = target.verify(TREE, cache)
        alone = target.verify(TokenTree([9], [-1]), _committed(cache))
        outputs.append([t for o in (first, tree, again, alone) for t in (o.logits, o.hidden)])
    return max(difference(a, b) for a, b in zip(*outputs, strict=True))


def _committed(cache):
    cache.commit([0, 1, 3])
    return cache


@pytest.mark.parametrize("length", [1, WINDOW, 3 * WINDOW + 1, 150])
def test_prefill_tree_and_commit(both, length, monkeypatch):
    if length > 20:
        monkeypatch.setattr("amphista.target.target.PREFILL_CHUNK", 60)  # fused attention behind a cache, then growth
    assert worst_difference(*both, length) < TOLERANCE


def test_longrope_is_right_up_to_its_original_context():
    """Behind it all rotations would change; the table, which grows ahead, is made of those before."""
    fast, stock = pair("phi3-half")
    assert worst_difference(fast, stock, fast.spec.max_positions - 16) < TOLERANCE
    with pytest.raises(CapacityError, match=r"beyond the context of 512 \(longrope"):
        fast.hidden_states(torch.ones(1, 513, dtype=torch.int64))


@pytest.mark.parametrize("native", [False, True])
def test_experts_whose_scores_vanish(native):
    """What all routers say of a row is so low that the sum of its experts' scores is hardly anything."""
    model = shaken_model("glm4_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight += 15 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    fast, stock = Target(model), Target(model)
    assert fast.speed_up(native=native) and fast.is_native == (native and fast.why_not_native is None)
    assert worst_difference(fast, stock, 40) < TOLERANCE


def test_ragged_batch(both):
    lengths = [3, WINDOW + 2, 1, 2 * WINDOW]
    outputs = []
    for target in both:
        caches = [target.new_cache() for _ in lengths]
        for cache, length in zip(caches, lengths, strict=True):
            target.prefill(prompt_of(length), cache)
        found = []
        for step in range(3):
            trees = [TREE, TokenTree.chain([40 + step, 5]), TokenTree([50], [-1]), TREE]
            found += target.forward([Span(*pair) for pair in zip(trees, caches, strict=True)])
            for cache, path in zip(caches, ([0, 1, 3], [0, 1], [0], [0]), strict=True):
                cache.commit(path), cache.check_integrity()
        outputs.append([t for o in found for t in (o.logits, o.hidden)])
    assert max(difference(a, b) for a, b in zip(*outputs, strict=True)) < TOLERANCE


@pytest.mark.parametrize("length", [1, 5, 3 * WINDOW])
def test_training_rows(both, length):
    ids = torch.tensor([prompt_of(length), [i + 1 for i in prompt_of(length)]])
    assert difference(both[0].hidden_states(ids), both[1].hidden_states(ids)) < TOLERANCE


def test_what_drafters_are_lent_is_the_same(both):
    fast, stock = both
    assert fast.spec == stock.spec and fast.fingerprint == stock.fingerprint and fast.eos_ids == stock.eos_ids
    output = fast.prefill(prompt_of(6), fast.new_cache())
    assert difference(fast.shared.project(output.hidden[-1:]), output.logits) < TOLERANCE


def long_answer(target, params):
    """A prompt that fills the limit: an answer of two tokens would test nothing."""
    for start in range(3, 40):
        prompt = [start, *prompt_of(WINDOW - 3)]
        expected = decode_plainly(target.model, prompt, params, {EOS})
        if len(expected) == params.max_new_tokens:
            return prompt, expected
    raise AssertionError("no prompt has a long answer")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("family", ["mistral-windowed", "qwen2-windowed", "qwen3", *OTHER_FAMILIES])
def test_decoding_is_lossless(family, kind):
    target = tiny_target(family)
    assert target.speed_up()
    for params in (SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=20, temperature=0.8, seed=7)):
        prompt, expected = long_answer(target, params)
        sequence = decode(Engine(target, HOSTILE[kind](prompt + expected), parse_tree(9)), prompt, params)
        assert sequence.output_ids == expected
        assert kind != "always-right" or max(sequence.stats.accepted) >= 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite", "olmo2", "phi3-half"])
def test_bfloat16_is_as_close_to_the_truth_as_the_stock_path(family):
    model = tiny_model(family)
    exact = Target(model).prefill(prompt_of(30), Target(model).new_cache()).logits
    rounded = tiny_model(family).to(torch.bfloat16)
    fast, stock = Target(rounded), Target(rounded)
    assert fast.speed_up(), fast.why_stock
    errors = [difference(t.prefill(prompt_of(30), t.new_cache()).logits.float(), exact) for t in (fast, stock)]
    assert errors[0] < 1.5 * errors[1] < 0.2
    cache, other = fast.new_cache(), stock.new_cache()
    fast.prefill(prompt_of(9), cache), stock.prefill(prompt_of(9), other)
    assert difference(fast.verify(TREE, cache).logits, stock.verify(TREE, other).logits) < 0.1


# -- weights of 8 bits: another target, lossless to itself ------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-windowed"])
def test_int8_is_near_the_stock_model_and_trees_are_their_paths(family):
    model = shaken_model(family)
    fast, stock = Target(model), Target(model)
    assert fast.speed_up(int8=True, native=True) and fast.path == "native-int8" and fast.dtype is torch.float32
    assert 1e-4 < worst_difference(fast, stock, 2 * WINDOW) < 0.2
    cache = fast.new_cache()
    fast.prefill(prompt_of(9), cache)
    whole = fast.verify(TREE, cache)
    for path in ([0, 2, 5], [0, 1, 3, 6, 7, 8, 9]):
        cache.trim(9)
        tokens = [TREE.tokens[node] for node in path]
        chain = fast.verify(TokenTree(tokens, list(range(-1, len(path) - 1))), cache)
        assert torch.equal(chain.logits, whole.logits[path])


@pytest.mark.parametrize("kind", HOSTILE)
def test_int8_decoding_is_lossless(kind):
    target = tiny_target("qwen3")
    assert target.speed_up(int8=True, native=True)
    for params in (SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=20, temperature=0.8, seed=7)):
        for start in (3, 8):
            prompt = [start, *prompt_of(WINDOW)]
            expected = decode(Engine(target, Proposer(), parse_tree(1)), prompt, params).output_ids
            found = decode(Engine(target, HOSTILE[kind](prompt + expected), parse_tree(9)), prompt, params)
            assert found.output_ids == expected


# -- what must not pass -----------------------------------------------------------------------------------------------


def _rotated_late(monkeypatch):
    original = LeanModel._rotations
    monkeypatch.setattr(LeanModel, "_rotations", lambda self, positions: original(self, 2 * positions))


def _other_group(monkeypatch):
    original = lean._Attention._grouped
    monkeypatch.setattr(
        lean._Attention,
        "_grouped",
        lambda self, queries, *rest: original(self, queries.roll(1, 2), *rest),
    )


def _mask_bit(monkeypatch):
    original = lean._grouped

    def drop(visible, *rest):
        visible = visible.clone()
        visible[:, 1:, 0] = False
        return original(visible, *rest)

    monkeypatch.setattr(lean, "_grouped", drop)


def _no_residual(monkeypatch):
    monkeypatch.setattr("amphista.kernels.linear.Product.added", lambda self, rows, residual: self(rows))


def _norm_forgotten(monkeypatch):
    monkeypatch.setattr(lean.Norm, "__call__", lambda self, rows: torch.rms_norm(rows, self.weight.shape, None, 1e-6))


@pytest.mark.parametrize("mutation", [_rotated_late, _other_group, _mask_bit, _no_residual, _norm_forgotten])
def test_a_mutation_is_seen(mutation, monkeypatch):
    fast, stock = pair("qwen2")
    with monkeypatch.context() as patch:
        mutation(patch)
        assert worst_difference(fast, stock, 12) > 100 * TOLERANCE
    assert worst_difference(fast, stock, 12) < TOLERANCE


def test_a_forward_that_differs_is_refused_at_load(monkeypatch):
    _norm_forgotten(monkeypatch)
    target = Target(shaken_model("qwen3"))
    with pytest.raises(TargetError, match="differs from its stock model"):
        target.speed_up()


def test_a_failed_forward_leaves_the_cache_as_it_was(monkeypatch):
    fast, stock = pair("llama")
    cache, other = fast.new_cache(), stock.new_cache()
    fast.prefill(prompt_of(9), cache), stock.prefill(prompt_of(9), other)
    first, second = fast._lean.layers
    with monkeypatch.context() as patch, pytest.raises(AttributeError):
        patch.setattr(fast._lean, "layers", [first, dataclasses.replace(second, mlp=None)])
        fast.verify(TREE, cache)
    cache.check_integrity()
    assert difference(fast.verify(TREE, cache).logits, stock.verify(TREE, other).logits) < TOLERANCE
