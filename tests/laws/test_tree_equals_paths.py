"""Laws 3 and 4: logits and hidden states of every tree node equal a plain forward on that node's path, on every tested
family, with contexts beyond the window and depths that cross it; and a committed cache equals a fresh prefill.

Mutations (a position off by one, a dropped or an extra mask bit, a wrong commit row) must be caught by the same checks.
"""

from __future__ import annotations

import dataclasses
from functools import wraps
from threading import Thread

import pytest
import torch
from transformers import AttentionMaskInterface

from amphista.cache.static import KVCache
from amphista.errors import TargetError
from amphista.target import attention
from amphista.target.attention import Layout
from amphista.target.exactness import _Check, check_exactness
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree
from tests.tiny import FAMILIES, WINDOW, tiny_model, tiny_target

TREE = TokenTree([11, 40, 41, 42, 43, 40, 44, 45, 46, 47], [-1, 0, 0, 1, 1, 2, 3, 6, 7, 8])
CONTEXTS = [1, WINDOW - 3, WINDOW, 3 * WINDOW + 1]


def atol(target: Target) -> float:
    """Below any real difference, above rounding: models are float64, but stock eager has a float32 softmax, and some
    routers of experts are float32."""
    if target.config.model_type in {"glm4_moe", "dots1", "ernie4_5_moe"}:
        return 1e-5
    return 1e-4 if target.config._attn_implementation == "eager" else 1e-9


def prompt_of(length: int) -> list[int]:
    return [(7 * i + 3) % 250 for i in range(length)]


@torch.no_grad()
def plain(model, ids):
    """Logits and post-norm hidden states of the last token, no cache, stock masks."""
    output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return output.logits[0, -1], output.hidden_states[-1][0, -1]


def worst_difference(target: Target, length: int) -> float:
    cache = target.new_cache()
    prompt = prompt_of(length)
    target.prefill(prompt, cache)
    output = target.verify(TREE, cache)
    worst = 0.0
    for node in range(TREE.num_nodes):
        logits, hidden = plain(target.model, prompt + [TREE.tokens[i] for i in TREE.path(node)])
        worst = max(worst, float((logits - output.logits[node]).abs().max()))
        worst = max(worst, float((hidden - output.hidden[node]).abs().max()))
    return worst


@pytest.fixture(scope="module", params=FAMILIES)
def family_target(request):
    return tiny_target(request.param, dtype=torch.float64)


def test_tree_logits_equal_path_logits(family_target):
    for length in CONTEXTS:
        assert worst_difference(family_target, length) < atol(family_target), f"context of {length} tokens"


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 2, 5], [0, 1, 3, 6, 7, 8, 9]])
def test_commit_equals_fresh_prefill(family_target, path):
    """Keep a path, then verify again: as if the kept tokens had been prefilled."""
    prompt = prompt_of(2 * WINDOW)
    committed, fresh = family_target.new_cache(), family_target.new_cache()
    family_target.prefill(prompt, committed)
    family_target.verify(TREE, committed)
    committed.commit(path)
    family_target.prefill(prompt + [TREE.tokens[node] for node in path], fresh)
    assert committed.num_rows == fresh.num_rows
    for ours, theirs in zip(committed.layers, fresh.layers, strict=True):
        rows = ours.num_rows
        torch.testing.assert_close(ours.keys[:, :, :rows], theirs.keys[:, :, :rows], atol=atol(family_target), rtol=0)
        torch.testing.assert_close(
            ours.values[:, :, :rows], theirs.values[:, :, :rows], atol=atol(family_target), rtol=0
        )
    again = family_target.verify(TREE, committed).logits
    torch.testing.assert_close(again, family_target.verify(TREE, fresh).logits, atol=atol(family_target), rtol=0)


def test_chunked_prefill_equals_one_forward(family_target, monkeypatch):
    prompt = prompt_of(3 * WINDOW + 2)
    logits, _ = plain(family_target.model, prompt)
    monkeypatch.setattr("amphista.target.target.PREFILL_CHUNK", 5)
    output = family_target.prefill(prompt, family_target.new_cache())
    torch.testing.assert_close(output.logits[-1], logits, atol=atol(family_target), rtol=0)
    assert output.hidden.shape == (len(prompt), family_target.spec.hidden_size)


def test_shared_head_reproduces_the_logits(family_target):
    """`project` includes whatever a family does after its LM head (soft-capping here)."""
    output = family_target.prefill(prompt_of(6), family_target.new_cache())
    torch.testing.assert_close(
        family_target.shared.project(output.hidden[-1:]), output.logits, atol=atol(family_target), rtol=0
    )


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_scaled_logits_of_other_families(family):
    """Families outside the tested list are checked at load; these two scale their logits."""
    from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

    from tests.tiny import SIZES

    torch.manual_seed(0)
    config = {"cohere": CohereConfig(**SIZES, logit_scale=0.3), "granite": GraniteConfig(**SIZES, logits_scaling=7.0)}
    target = Target(AutoModelForCausalLM.from_config(config[family]).double())
    check_exactness(target)
    assert worst_difference(target, 5) < atol(target)


def test_probe_accepts_every_tested_family(family_target):
    check_exactness(family_target)


def test_eager_attention_gets_an_additive_mask():
    """A bool mask under eager attention is silently wrong: True would be added as 1.0."""
    model = tiny_model("llama", dtype=torch.float64)
    model.set_attn_implementation("eager")
    assert worst_difference(Target(model), 9) < 1e-4


def test_bfloat16_stays_within_rounding():
    target = tiny_target("llama", dtype=torch.bfloat16)
    check_exactness(target)


def test_longrope_stays_inside_the_context_in_which_positions_are_alone():
    """Beyond its original context a longrope model rotates every token by the longest position in the forward."""
    from amphista.engine.params import SamplingParams
    from amphista.engine.step import Engine
    from amphista.tree.grow import parse_tree
    from tests.decoding import decode
    from tests.oracle.decode import decode_plainly
    from tests.tiny import HOSTILE

    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **factors}
    target = tiny_target("phi3", dtype=torch.float64, rope_parameters=rope, original_max_position_embeddings=24)
    assert target.spec.max_positions == 24
    prompt, params = prompt_of(9), SamplingParams(max_new_tokens=40)
    expected = decode_plainly(target.model, prompt, params)[:16]
    target.eos_ids = frozenset()
    for name in ("always-right", "random", "always-wrong"):
        sequence = decode(Engine(target, HOSTILE[name](prompt + expected), parse_tree(12)), prompt, params)
        assert sequence.output_ids == expected and sequence.finish_reason == "length"


# -- mutations: each must be seen by the law above, or by the check at load -----


def test_mutation_full_mask_on_a_windowed_model_is_seen(monkeypatch):
    monkeypatch.setattr(Layout, "mask", lambda layout, rule: layout.visible[:, None])
    assert worst_difference(tiny_target("mistral-windowed", dtype=torch.float64), 3 * WINDOW) > 1e-3


def shifted_windows(monkeypatch):
    """Every window one row wider."""
    right = Layout.mask
    wider = lambda layout: dataclasses.replace(layout, key_positions=layout.key_positions + 1)  # noqa: E731
    monkeypatch.setattr(Layout, "mask", lambda layout, rule: right(wider(layout), rule))


def test_mutation_window_off_by_one_is_seen(monkeypatch):
    target = tiny_target("mistral-windowed", dtype=torch.float64)
    shifted_windows(monkeypatch)
    assert worst_difference(target, 3 * WINDOW) > 1e-3
    with pytest.raises(TargetError, match="cannot be verified as a tree"):
        check_exactness(target)


def test_mutation_bool_mask_under_eager_is_seen(monkeypatch):
    model = tiny_model("llama", dtype=torch.float64)
    model.set_attn_implementation("eager")
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "eager", attention._sdpa_mask)
    target = Target(model)
    assert worst_difference(target, 9) > 1e-3
    with pytest.raises(TargetError, match="cannot be verified as a tree"):
        check_exactness(target)


@pytest.mark.parametrize("bit", [(6, 1, False), (6, 0, False), (4, 3, True), (5, 1, True)])
def test_mutation_one_mask_bit_is_seen(bit, monkeypatch):
    row, column, value = bit
    right = TokenTree.ancestor_mask

    def wrong(tree):
        mask = right(tree)
        if tree.num_nodes > row and not tree.is_chain:
            assert mask[row, column] != value
            mask[row, column] = value
        return mask

    monkeypatch.setattr(TokenTree, "ancestor_mask", wrong)
    assert worst_difference(tiny_target("llama", dtype=torch.float64), 5) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_mutation_position_off_by_one_is_seen(family, monkeypatch):
    """Every node below the root one position too far."""
    right = TokenTree.depths.func
    monkeypatch.setattr(TokenTree, "depths", property(lambda tree: [d + (d > 0) for d in right(tree)]))
    target = tiny_target(family, dtype=torch.float64)
    assert worst_difference(target, 5) > 1e-3
    with pytest.raises(TargetError, match="cannot be verified as a tree"):
        check_exactness(target)


def test_mutation_wrong_commit_row_is_seen():
    target = tiny_target("llama", dtype=torch.float64)
    prompt, outputs = prompt_of(9), []
    for path in ([0, 1, 3], [0, 1, 4]):
        cache = target.new_cache()
        target.prefill(prompt, cache)
        target.verify(TREE, cache)
        cache.commit(path)
        outputs.append(target.verify(TokenTree([99], [-1]), cache).logits)
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_position_scheme_is_refused_at_load():
    """A model that derives positions from rows fails the check by name, not silently."""
    target = tiny_target("llama", dtype=torch.float64)
    forward = target.model.forward
    target.model.forward = wraps(forward)(lambda **inputs: forward(**{**inputs, "position_ids": None}))
    with pytest.raises(TargetError, match="llama models cannot be verified as a tree"):
        check_exactness(target)


def test_a_forward_that_breaks_is_refused_at_load():
    """It ends in a sentence with the reason, not in a KeyError."""
    target = tiny_target("llama")

    def broken(**inputs):
        raise KeyError("chunked_attention")

    target.model.forward = wraps(target.model.forward)(broken)
    with pytest.raises(TargetError, match=r"llama models cannot be verified as a tree.*chunked_attention"):
        check_exactness(target)


def test_small_logits_hide_nothing(monkeypatch):
    """A model whose logits are all close to zero is measured by its own scale."""
    target = tiny_target("llama", dtype=torch.float64)
    with torch.no_grad():
        target.shared.head_weight.mul_(1e-6)
    check_exactness(target)
    right = TokenTree.depths.func
    monkeypatch.setattr(TokenTree, "depths", property(lambda tree: [d + (d > 0) for d in right(tree)]))
    monkeypatch.setattr("amphista.target.exactness._check", lambda target: _Check(target).run(5, thorough=False))
    with pytest.raises(TargetError, match="differ from its own"):
        check_exactness(target)


def test_outside_our_forwards_the_library_makes_its_own_masks():
    """Another thread and the same one: `generate`, padding, a batch, are as they were."""
    model = tiny_model("mistral-windowed", dtype=torch.float64)
    ids, padding = torch.tensor([prompt_of(20), prompt_of(20)]), torch.ones(2, 20, dtype=torch.int64)
    padding[1, :6] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=padding).logits
        seen = []
        layout = Layout.of(Span(TokenTree.chain([5, 6, 7]), KVCache(0)), torch.device("cpu"))
        with attention.laid_out(layout):
            thread = Thread(target=lambda: seen.append(model(input_ids=ids, attention_mask=padding).logits))
            thread.start()
            thread.join()
    assert torch.equal(seen[0], expected)
