from __future__ import annotations

import pytest
import torch
from transformers import AttentionMaskInterface, DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from amphista.cache.static import KVCache
from amphista.errors import TargetError
from amphista.target.attention import Layout, laid_out, layer_rules
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree
from tests.tiny import WINDOW, tiny_model

TREE = TokenTree([1, 2, 3, 4, 5], [-1, 0, 0, 1, 3])
NUM_PAST = 6


def _span(tree, num_past):
    cache = KVCache(0)
    cache.num_committed = num_past
    return Span(tree, cache)


def layout():
    return Layout.of(_span(TREE, NUM_PAST), torch.device("cpu"))


def visible_plainly(may_see=lambda query, key: True):
    """Row by row: all of the past and its own ancestors, as far as positions allow."""
    rows = []
    for node in range(TREE.num_nodes):
        position = NUM_PAST + TREE.depths[node]
        keys = [(q, True) for q in range(NUM_PAST)]
        keys += [(NUM_PAST + TREE.depths[other], other in TREE.path(node)) for other in range(TREE.num_nodes)]
        rows.append([seen and may_see(position, q) for q, seen in keys])
    return rows


def test_causal():
    mask = layout().mask(causal_mask_function)
    assert mask.shape == (1, 1, 5, 11) and mask.dtype == torch.bool
    assert mask[0, 0].tolist() == visible_plainly()
    assert Layout.causal(4, torch.device("cpu")).mask(causal_mask_function) is None


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 9, 100])
def test_windows_go_by_positions(window):
    mask = layout().mask(sliding_window_causal_mask_function(window))
    assert mask[0, 0].tolist() == visible_plainly(lambda query, key: query - key < window)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 100])
def test_chunks_go_by_positions(chunk):
    mask = layout().mask(chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64)))
    assert mask[0, 0].tolist() == visible_plainly(lambda query, key: query // chunk == key // chunk)


def test_a_window_without_a_cache():
    mask = Layout.causal(6, torch.device("cpu")).mask(sliding_window_causal_mask_function(3))
    assert mask[0, 0].tolist() == [[0 <= q - k < 3 for k in range(6)] for q in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_masks_are_0_or_the_lowest_number(dtype):
    make = AttentionMaskInterface()["eager"]
    with laid_out(layout()):
        mask = make(batch_size=1, q_length=5, kv_length=11, mask_function=causal_mask_function, dtype=dtype)
    assert mask.dtype == dtype
    seen = torch.tensor(visible_plainly())
    assert bool((mask[0, 0][seen] == 0).all()) and bool((mask[0, 0][~seen] == torch.finfo(dtype).min).all())


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_without_a_layout_masks_are_the_librarys(kind):
    make = AttentionMaskInterface()[kind]
    mask = make(batch_size=1, q_length=3, kv_length=5, q_offset=2, mask_function=causal_mask_function)
    seen = [[k <= q + 2 for k in range(5)] for q in range(3)]
    assert (mask[0, 0] == (1 if kind == "sdpa" else 0)).tolist() == seen


@pytest.mark.parametrize(
    ("family", "windowed"),
    [
        ("llama", [False, False]),
        ("mistral", [False, False]),
        ("mistral-windowed", [True, True]),
        ("qwen2", [False, False]),
        ("qwen2-windowed", [False, True]),
    ],
)
def test_each_layers_rule_is_what_the_model_hands_to_it(family, windowed):
    rules = layer_rules(tiny_model(family))
    far, near = (torch.tensor(position) for position in (0, WINDOW))
    batch = torch.tensor(0)
    assert [not bool(rule(batch, batch, near, far)) for rule in rules] == windowed


def test_a_window_number_that_no_layer_heeds_is_nothing():
    """The family reads no such key: the fast path asks the model, not the configuration."""
    model = tiny_model("llama", sliding_window=WINDOW)
    assert layer_rules(model) == [causal_mask_function] * 2


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_tree_mask_is_refused_by_name(implementation):
    model = tiny_model("llama")
    model.config._attn_implementation_internal = implementation
    with pytest.raises(TargetError, match=f"'{implementation}'.*attn_implementation='sdpa'"):
        Target(model)


def test_generate_is_untouched():
    """The same tokens with a cache of the library's own, after forwards of ours have run."""
    model = tiny_model("mistral-windowed", dtype=torch.float64)
    target = Target(model)
    prompt = list(range(5, 25))
    target.prefill(prompt, target.new_cache())
    with torch.no_grad():
        ids = torch.tensor([prompt])
        whole = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        last = model(input_ids=ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last[0, -1], whole[0, -1])


def test_spans_side_by_side_see_nothing_of_each_other():
    spans = [_span(TREE, 3), _span(TokenTree.chain([5, 6]), 9), _span(TokenTree([1], [-1]), 0)]
    layout = Layout.of_all(spans, torch.device("cpu"))
    mask = layout.mask(sliding_window_causal_mask_function(4))[0, 0]
    row = column = 0
    for span in spans:
        alone = Layout.of(span, torch.device("cpu"))
        rows, columns = alone.visible[0].shape
        part = (slice(row, row + rows), slice(column, column + columns))
        assert torch.equal(mask[part], alone.mask(sliding_window_causal_mask_function(4))[0, 0])
        mask[part] = False
        row, column = row + rows, column + columns
    assert not mask.any() and mask.shape == (row, column)
    assert layout.positions[0].tolist() == [position for span in spans for position in span.positions]
