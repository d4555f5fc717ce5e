"""What holds of Falcon alone: blocks of one token are EAGLE, and what glancing shows, to which rows, how often.

Its equations, and that a draft leaves nothing behind, stand with the other drafters asked in rounds (test_rounds.py).
"""

from __future__ import annotations

import pytest
import torch

from amphista.drafter import falcon
from amphista.drafter.eagle import Eagle, EagleConfig
from amphista.drafter.falcon import Falcon, FalconConfig
from amphista.drafter.path_rows import Contexts, step
from amphista.errors import ConfigError
from tests.tiny import shaken

IDS = [5, 17, 230, 44, 9, 61, 62, 63, 99, 100, 7, 250]


@pytest.fixture(scope="module")
def text(target):
    hidden = target.hidden_states(torch.tensor([[*IDS, 1]]))[:, :-1].clone()
    return hidden, torch.tensor([[*IDS[1:], 1]])


def heads_of(drafter, text):
    with torch.no_grad():
        return drafter.head_states(*text, torch.arange(len(IDS)))


def states_of(drafter, text, share=0.0):
    """With this share of the missed tokens shown, in training."""
    drafter._share = share
    return heads_of(drafter, text)


def test_blocks_of_one_token_are_eagle(target, text):
    eagle = shaken(Eagle(EagleConfig(num_heads=3), target.spec, target.shared))
    ours = Falcon(FalconConfig(num_heads=3, block_size=1), target.spec, target.shared).eval()
    ours.load_state_dict(eagle.state_dict())
    expected = states_of(eagle, text)
    torch.testing.assert_close(states_of(ours, text), expected, atol=1e-5, rtol=1e-5)
    assert states_of(ours.train(), text, 1.0).equal(states_of(ours.eval(), text)), "there is nothing to show"
    drafts = []
    for drafter in (eagle, ours):
        state = drafter.start()
        drafter.commit(state, text[0][0, :7], text[1][0, :7])
        drafts.append(drafter.draft(state, 6))
    assert drafts[0].tokens == drafts[1].tokens and drafts[0].num_rounds == drafts[1].num_rounds == 3


def glanced_plainly(drafter, text, t):
    """States [k, D] of the first pass behind row t, and which tokens were shown: where slot i would miss x_{t+1+i} the
    row of t + i stands in its place."""
    (rows, ids), size, layer = (drafter.fused(*text)[0], text[1][0]), drafter.config.block_size, drafter.stage.layer
    cached = tuple(part[0] for part in drafter._keys_values(rows[None], torch.arange(len(ids))[None]))
    before = Contexts([cached], torch.tensor([0]), torch.tensor([t - size + 1]))
    none = rows.new_empty(1, drafter.spec.num_key_value_heads, 0, drafter.spec.head_size)
    block, shown = rows[t - size + 1 : t + 1].clone(), []
    for is_glanced in (False, True):
        asking = None if drafter.slot_positions is None else (block[-1:] + drafter.slot_positions)[None]
        states = drafter.output_norm(step(layer, block[None], (none, none), before, asking)[0][0])
        best = drafter.head_logits(states).argmax(-1)
        for slot in range(0 if is_glanced else size - 1):
            at = min(t + slot + 1, len(ids) - 1)
            shown.append(bool(best[slot] != ids[at]))
            block[slot] = rows[at] if shown[-1] else block[slot]
    return states, shown


@pytest.mark.parametrize("settings", [{}, {"block_size": 3}, {"slots": "last"}], ids=str)
def test_missed_tokens_are_shown_in_the_place_of_the_rows_that_missed_them(target, text, settings):
    drafter = shaken(Falcon(FalconConfig(num_heads=4, **settings), target.spec, target.shared)).train()
    best, size = drafter.head_logits(states_of(drafter, text)).argmax(-1), drafter.config.block_size
    hidden, ids = text[0], text[1].clone()
    for t in (3, 6, 9):  # the text is moved so that some tokens are not missed
        ids[0, t + 1] = best[t, 0]
    plain, found = (states_of(drafter, (hidden, ids), share) for share in (0.0, 1.0))
    assert states_of(drafter.eval(), (hidden, ids), 1.0).equal(plain), "in training alone"
    assert found[: size - 1].equal(plain[: size - 1]), "where there is no whole block"
    every = []
    for t in range(size - 1, len(IDS)):
        with torch.no_grad():
            expected, shown = glanced_plainly(drafter, (hidden, ids), t)
        torch.testing.assert_close(found[t, :size], expected, atol=1e-5, rtol=1e-5)
        assert any(shown) != bool((found[t] - plain[t]).abs().max() < 1e-5)
        every += shown
    assert 0 < sum(every) < len(every), "some are missed, some are not"


def test_a_share_of_them_is_shown_by_chance():
    columns, tokens = torch.arange(4000).view(2000, 2), torch.arange(4000).view(2000, 2) % 7
    first, second = (falcon._chance(columns, tokens, step) for step in (0, 1))
    assert float(first.min()) >= 0 and float(first.max()) < 1
    for part in (first, second, first[:, 0], first[tokens == 3]):
        assert float((part < 0.3).double().mean()) == pytest.approx(0.3, abs=0.04)
    assert float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) == pytest.approx(0, abs=0.06)
    assert first[17].equal(falcon._chance(columns[17], tokens[17], 0)), "of a row, whichever stand beside it"


def test_ever_fewer_are_shown(target, text):
    drafter = shaken(Falcon(FalconConfig(glance_share=1.0), target.spec, target.shared)).train()
    plain, changed = states_of(drafter, text, share=0.0), []
    for done in (0, 60, 100):
        drafter.at_step(done, 100)
        changed.append(int(((heads_of(drafter, text) - plain).abs().amax((1, 2)) > 1e-5).sum()))
    assert len(IDS) >= changed[0] > changed[1] > changed[2] == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"block_size": 0}, "block_size is 0: expected 1 to 4"),
        ({"block_size": 5}, "block_size is 5: expected 1 to 4"),
        ({"mixer": "gru"}, "mixer is 'gru': expected linear or lstm"),
        ({"glance_share": 1.5}, "glance_share is 1.5: expected a number from 0 to 1"),
        ({"slots": "first"}, "slots is 'first': expected previous or last"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        FalconConfig(**setting)
