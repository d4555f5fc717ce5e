"""Training form == decoding form: the head logits a trainer sees for all positions at once equal those of a decoding
that commits rows in pieces through the caches. Trainers elsewhere lost most of their acceptance to a mismatch here.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from amphista.drafter.base import Ask
from amphista.errors import DrafterError
from tests.decoding import heads_along, started, training_rows
from tests.tiny import REAL_DRAFTERS, real_drafters

IDS = [5, 17, 230, 44, 9, 61, 62, 63, 99, 100, 7, 250]
HEADS = [name for name in REAL_DRAFTERS if name != "none" and not name.endswith("+lookup")]
BEHIND = [1, 40, 41, 42, 43, 44, 45]
PIECES = [[12], [1] * 12, [5, 1, 3, 2, 1]]


@pytest.fixture(scope="module")
def drafters(target):
    return real_drafters(target)


def training_logits(target, drafter, dtype=torch.float32):
    """Hidden states and next tokens of some rows, what heads say of them, and those of a text that goes on behind."""
    ids = IDS + BEHIND
    hidden = training_rows(target, drafter, ids)[:, :-1].to(dtype)
    next_ids = torch.tensor([ids[1:]])
    with torch.no_grad():
        states = drafter.head_states(hidden, next_ids, torch.arange(len(IDS)))
        return hidden[0, : len(IDS)], next_ids[0, : len(IDS)], drafter.head_logits(states)


def decoded(drafter, state, next_ids, row):
    """Logits [K, N] behind `row` rows, along the text."""
    ahead = [*next_ids, *torch.tensor(BEHIND[1:])][row:]
    states = heads_along(drafter, state, ahead)
    with torch.inference_mode():
        return drafter.head_logits(states)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_training_logits_equal_decoding_logits(target, drafters, name, pieces, frozen):
    drafter = drafters[name]
    hidden, next_ids, expected = training_logits(target, drafter)
    if frozen:  # as it decodes: packed once it is trained
        drafter = copy.deepcopy(drafter).freeze()
        assert drafter.num_weights == drafters[name].num_weights
    state, row = started(target, drafter, IDS), 0
    for size in pieces:
        drafter.commit(state, hidden[row : row + size], next_ids[row : row + size])
        row += size
        torch.testing.assert_close(decoded(drafter, state, next_ids, row), expected[row - 1], atol=1e-4, rtol=1e-5)
    assert state.num_rows == len(IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_drafters_of_half_precision_decode(target, drafters, name, dtype):
    """A target in half precision makes its drafter so, too: committed in pieces, as close to what float32 says as it is
    in its training form."""
    hidden, next_ids, expected = training_logits(target, drafters[name])
    drafter = copy.deepcopy(drafters[name]).to(dtype)
    _, _, trained = training_logits(target, drafter, dtype)
    state = started(target, drafter.freeze(), IDS)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        drafter.commit(state, hidden[rows].to(dtype), next_ids[rows])
    logits = decoded(drafter, state, next_ids, len(IDS))
    errors = [float((found.float() - expected[-1]).norm() / expected[-1].norm()) for found in (logits, trained[-1])]
    assert 0 < errors[0] < 2 * errors[1] < 1


@pytest.mark.parametrize("name", HEADS)
def test_what_decodes_cannot_be_saved(drafters, name):
    frozen = copy.deepcopy(drafters[name]).freeze()
    assert frozen.num_weights == drafters[name].num_weights and frozen.dtype == drafters[name].dtype
    with pytest.raises(DrafterError, match="load it again"):
        frozen.state_dict()


@pytest.mark.parametrize("name", HEADS)
def test_trimmed_rows_leave_no_trace(target, drafters, name):
    """Commit wrong rows, trim, commit the right ones: as if the wrong ones had never been there."""
    drafter = drafters[name]
    hidden, next_ids, expected = training_logits(target, drafter)
    state = started(target, drafter, IDS)
    drafter.commit(state, hidden[:4], next_ids[:4])
    drafter.commit(state, hidden[:5] * -1, next_ids[:5])
    drafter.trim(state, 4)
    drafter.commit(state, hidden[4:], next_ids[4:])
    torch.testing.assert_close(decoded(drafter, state, next_ids, len(IDS)), expected[-1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["amphista-full", "amphista-one-stage", "amphista-no-auto-embedding"])
def test_staged_adaptation_is_causal_and_sees_the_context(target, drafters, name):
    """A later token changes no earlier row; an earlier one changes later rows."""
    drafter = drafters[name]
    hidden, next_ids, _ = training_logits(target, drafter)
    with torch.no_grad():
        changed = hidden.clone()
        changed[6] += 1.0
        expected, changed_logits = (
            drafter.head_logits(drafter.head_states(rows[None], next_ids[None], torch.arange(len(IDS))))
            for rows in (hidden, changed)
        )
    difference = (changed_logits - expected).abs().amax(dim=(1, 2))
    assert difference[:6].max() == 0 and difference[6:].min() > 1e-4


def test_medusa_sees_nothing_but_its_own_row(target, drafters):
    drafter = drafters["medusa-shared"]
    hidden, next_ids, _ = training_logits(target, drafter)
    with torch.no_grad():
        changed = hidden.clone()
        changed[6] += 1.0
        expected, changed_logits = (
            drafter.head_logits(drafter.head_states(rows[None], next_ids[None], torch.arange(len(IDS))))
            for rows in (hidden, changed)
        )
    difference = (changed_logits - expected).abs().amax(dim=(1, 2))
    assert difference[[*range(6), *range(7, 12)]].max() == 0 and difference[6] > 1e-4


@pytest.mark.parametrize("changed", [0, 1, -1])
@pytest.mark.parametrize("name", ["amphista-full", "amphista-causal-slots", "amphista-own-slots"])
def test_slots_see_each_other_as_the_mask_says(target, drafters, name, changed):
    """Change one head's MLP: all heads' logits move, those of it and of later ones, or its own alone."""
    drafter = drafters[name]
    _, _, before = training_logits(target, drafter)
    bias = drafter.heads[changed].linear.bias
    original = bias.detach().clone()
    with torch.no_grad():
        bias.add_(1.0)
    try:
        _, _, after = training_logits(target, drafter)
    finally:
        with torch.no_grad():
            bias.copy_(original)
    moved = (after - before).abs().amax(dim=(0, 2)) > 1e-5
    own, heads = changed % drafter.num_heads, range(drafter.num_heads)
    sees = {"bidirectional": heads, "causal": range(own, drafter.num_heads), "own": [own]}[drafter.config.slot_mask]
    assert moved.tolist() == [head in sees for head in heads]


@pytest.mark.parametrize("switches", [{}, {"stages": 1}, {"stages": 0}, {"auto_embedding": False}, {"lm_head": "own"}])
def test_untrained_heads_start_close_to_the_target(target, switches):
    """Identity start: at step 0 every head's distribution is close to LM(h_t)."""
    from amphista.drafter.amphista import Amphista, AmphistaConfig

    hidden = target.hidden_states(torch.tensor([IDS])).clone()
    drafter = Amphista(AmphistaConfig(**switches), target.spec, target.shared).eval()
    drafter.match_scale(float(hidden.pow(2).mean().sqrt()))
    with torch.no_grad():
        states = drafter.head_states(hidden, torch.tensor([IDS]), torch.arange(len(IDS)))
        ours = torch.log_softmax(drafter.head_logits(states), -1)
        theirs = torch.log_softmax(target.shared.project(hidden[0]), -1)
    divergence = (theirs.exp()[:, None] * (theirs[:, None] - ours)).sum(-1)
    spread = (theirs.exp() * (theirs - theirs.roll(1, dims=0))).sum(-1).mean()
    assert divergence.mean() < 0.05 * spread


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_several_sequences_draft_as_each_alone(target, drafters, name, frozen):
    """In one pass, each at its own depth."""
    drafter = copy.deepcopy(drafters[name])
    drafter = drafter.freeze() if frozen else drafter
    hidden, next_ids, _ = training_logits(target, drafters[name])
    asks = []
    for number, depth in enumerate([drafter.num_heads, 1, 2]):
        state, end = started(target, drafter, IDS), 4 + 3 * number
        drafter.commit(state, hidden[: end - number], next_ids[: end - number])
        waiting = (hidden[end - number : end], next_ids[end - number : end].tolist()) if number else ()
        asks.append(Ask(state, depth, *waiting))
    for ask, found in zip(asks, drafter.draft_all(asks, 5), strict=True):
        depth = ask.max_depth
        alone = drafter.draft(ask.state, 5, depth)
        assert found.num_heads == depth
        # Of paths a shortlist is shown, which is longer.
        assert [tokens[:5] for tokens in found.tokens] == [tokens[:5] for tokens in alone.tokens]
        for ours, theirs in zip(found.log_probs, alone.log_probs, strict=True):
            assert ours[:5] == pytest.approx(theirs[:5], abs=1e-4)
        assert (found.below is None) == (alone.below is None)
        assert found.below is None or replace(found.below, log_probs=[]) == replace(alone.below, log_probs=[])


@pytest.mark.parametrize("name", HEADS)
def test_copied_rows_go_on_as_the_ones_they_were_copied_from(target, drafters, name):
    hidden, next_ids, _ = training_logits(target, drafters[name])
    drafter, state = drafters[name], started(target, drafters[name], IDS)
    drafter.commit(state, hidden[:9], next_ids[:9])
    copied = drafter.copy(state, 6)
    drafter.commit(state, hidden[9:], next_ids[9:])
    drafter.commit(copied, hidden[6:], next_ids[6:])
    assert copied.num_rows == state.num_rows == len(hidden)
    assert drafter.draft(copied, 4).tokens == drafter.draft(state, 4).tokens
