from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from amphista.errors import TargetError
from amphista.target.attention import REFUSED_FAMILIES, MaskForm, MaskPlan, preferred_attention, refuse_unsupported
from amphista.tree.token_tree import TokenTree
from tests.tiny import FAMILIES, WINDOW

TREE = TokenTree([1, 2, 3, 4, 5], [-1, 0, 0, 1, 3])
NUM_PAST = 6


def config(family, **settings):
    return SimpleNamespace(model_type=family, **settings)


def written(plan, dtype=torch.float32):
    positions = torch.tensor(TREE.depths) + NUM_PAST
    return plan.write(TREE.ancestor_mask(), positions, NUM_PAST, dtype)


def visible_plainly(window=None):
    """Row by row: all of the past and its own ancestors, as far as the window reaches back in positions."""
    rows = []
    for node in range(TREE.num_nodes):
        position = NUM_PAST + TREE.depths[node]
        keys = [(q, True) for q in range(NUM_PAST)]
        keys += [(NUM_PAST + TREE.depths[other], other in TREE.path(node)) for other in range(TREE.num_nodes)]
        rows.append([seen and (window is None or position - q < window) for q, seen in keys])
    return rows


def test_full_mask():
    mask = written(MaskPlan(MaskForm.FULL, None, False))
    assert mask.shape == (1, 1, 5, 11) and mask.dtype == torch.bool
    assert mask[0, 0].tolist() == visible_plainly()


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 9, 100])
def test_windowed_mask_goes_by_positions(window):
    mask = written(MaskPlan(MaskForm.WINDOWED, window, False))
    assert mask[0, 0].tolist() == visible_plainly(window)


def test_a_windowed_family_without_a_window_sees_all():
    assert written(MaskPlan(MaskForm.WINDOWED, None, False))[0, 0].tolist() == visible_plainly()


def test_masks_by_layer_type():
    masks = written(MaskPlan(MaskForm.BY_LAYER_TYPE, 3, False))
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert masks["full_attention"][0, 0].tolist() == visible_plainly()
    assert masks["sliding_attention"][0, 0].tolist() == visible_plainly(3)
    without = written(MaskPlan(MaskForm.BY_LAYER_TYPE, None, False))
    assert without["sliding_attention"][0, 0].tolist() == visible_plainly()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_masks_are_0_or_the_lowest_number(dtype):
    mask = written(MaskPlan(MaskForm.FULL, None, True), dtype)
    assert mask.dtype == dtype
    seen = torch.tensor(visible_plainly())
    assert bool((mask[0, 0][seen] == 0).all()) and bool((mask[0, 0][~seen] == torch.finfo(dtype).min).all())


# -- which plan for which family --------------------------------------------------------------------------------------

PLANS = {
    "llama": (MaskForm.FULL, None),
    "gpt2": (MaskForm.FULL, None),
    "mistral": (MaskForm.WINDOWED, None),
    "mistral-windowed": (MaskForm.WINDOWED, WINDOW),
    "phi3-windowed": (MaskForm.WINDOWED, WINDOW),
    "qwen2": (MaskForm.BY_LAYER_TYPE, None),
    "qwen2-windowed": (MaskForm.BY_LAYER_TYPE, WINDOW),
    "gemma2": (MaskForm.BY_LAYER_TYPE, WINDOW),
    "gemma3": (MaskForm.BY_LAYER_TYPE, WINDOW),
}


@pytest.mark.parametrize("family", PLANS)
def test_plans_of_tested_families(family):
    plan = MaskPlan.for_config(FAMILIES[family]())
    assert (plan.form, plan.window) == PLANS[family]


def test_untested_families_are_guessed_from_their_configuration():
    assert MaskPlan.for_config(config("new")).form is MaskForm.FULL
    assert MaskPlan.for_config(config("new", sliding_window=4)) == MaskPlan(MaskForm.WINDOWED, 4, False)
    layered = config("new", sliding_window=4, layer_types=["full_attention", "sliding_attention"])
    assert MaskPlan.for_config(layered) == MaskPlan(MaskForm.BY_LAYER_TYPE, 4, False)
    assert MaskPlan.for_config(config("new", sliding_window=4, use_sliding_window=False)).form is MaskForm.FULL


def test_eager_masks_are_additive():
    assert MaskPlan.for_config(config("llama", _attn_implementation="eager")).is_additive
    assert not MaskPlan.for_config(config("llama", _attn_implementation="sdpa")).is_additive
    assert preferred_attention(config("gemma2")) == "eager" and preferred_attention(config("llama")) == "sdpa"


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_tree_mask_is_refused_by_name(implementation):
    with pytest.raises(TargetError, match=f"'{implementation}'.*attn_implementation='sdpa'"):
        MaskPlan.for_config(config("llama", _attn_implementation=implementation))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(REFUSED_FAMILIES))
def test_refused_families_are_named(family):
    with pytest.raises(TargetError, match=family):
        refuse_unsupported(config(family))
    with pytest.raises(TargetError, match=family):
        MaskPlan.for_config(config(family))


@pytest.mark.parametrize("family", ["mpt", "bloom", "mamba", "jamba", "t5"])
def test_known_troublemakers_are_refused(family):
    assert family in REFUSED_FAMILIES


def test_any_encoder_decoder_is_refused():
    with pytest.raises(TargetError, match="new is an encoder-decoder"):
        refuse_unsupported(config("new", is_encoder_decoder=True))


def test_falcon_is_refused_with_alibi_only():
    with pytest.raises(TargetError, match="falcon models cannot be verified as a tree: its ALiBi"):
        refuse_unsupported(config("falcon", alibi=True))
    refuse_unsupported(config("falcon", alibi=False))
