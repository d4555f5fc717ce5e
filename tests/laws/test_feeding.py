"""What the engine feeds a drafter: after every step, the drafter's state in service equals the training form over all
tokens so far. Row j must be made of h_j and x_{j+1}, through chunked prefill, wide trees, accepted paths and rewinds;
a wrong row costs acceptance only, so no losslessness law can see it. Three wrong feedings must be seen by this one.
"""

from __future__ import annotations

import pytest
import torch

from amphista.accept.coupling import NUM_RANKS
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.sequence_cache import SequenceCache
from amphista.engine.step import Engine
from amphista.tree.grow import DynamicGrower, parse_tree
from tests.decoding import begin, heads_along, step, training_rows
from tests.tiny import SEQUENTIAL, real_drafters, tiny_target

PROMPTS = [[5, 17, 230, 44, 9, 61, 3, 4], [5, 17, 230, 44, 80, 81, 82, 83, 84]]  # the second rewinds into the first
NAMES = [
    "amphista-full",
    "amphista-one-stage",
    "amphista-draft-vocabulary",
    "amphista-no-stages",
    "medusa-shared",
    "medusa-own",
    "eagle-full",
    "falcon-pairs",
    "early-exit-full",
]


@pytest.fixture(scope="module")
def precise():
    """A target in float64, so that equality can be asked for to 1e-9."""
    target = tiny_target(dtype=torch.float64)
    assert target.speed_up()
    return target, real_drafters(target)


class Seldom(DynamicGrower):
    """Asks the heads in one step of four: what they missed is fed in one go."""

    calls = 0

    def whom_to_ask(self, rows, plain):
        type(self).calls += 1
        return super().whom_to_ask(rows, plain) if type(self).calls % 4 == 0 else []


def difference(target, drafter, sequence):
    """Between the head logits of the state in service and those of the training form."""
    sequence.rows.feed()
    ids, state = sequence.token_ids, sequence.rows.draft_state
    rows = state.num_rows
    assert rows == len(ids) - 1 == sequence.rows.cache.num_committed
    ahead = [7] * drafter.num_heads  # what heads read that read drafted tokens
    hidden = training_rows(target, drafter, ids + ahead)[:, :-1]
    states = heads_along(drafter, state, ahead)
    with torch.inference_mode():
        expected = drafter.head_states(hidden, torch.tensor([ids[1:] + ahead]), torch.tensor([rows - 1]))[0]
        return float((drafter.head_logits(expected) - drafter.head_logits(states)).abs().max())


def worst_difference(target, drafter, temperature=0.0, grower=parse_tree(250), every=1, with_lookup=False):  # noqa: B008
    """(worst difference over two requests on one context, accepted tokens); looked at after each `every` steps."""
    engine = Engine(target, Proposer(drafter, use_lookup=with_lookup), grower)
    worst, accepted, sequence = 0.0, 0, None
    for prompt in PROMPTS:
        params = SamplingParams(max_new_tokens=40, temperature=temperature, seed=0)
        sequence = begin(engine, prompt, params, sequence)
        worst = max(worst, difference(target, drafter, sequence))
        while not sequence.is_finished:
            step(engine, sequence)
            if sequence.stats.num_steps % every == 0:
                worst = max(worst, difference(target, drafter, sequence))
        accepted += sum(sequence.stats.accepted)
    return worst, accepted


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    new_sequence = Engine.new_sequence

    def in_small_chunks(engine, *given):
        sequence = new_sequence(engine, *given)
        sequence.chunk_len = 3
        return sequence

    monkeypatch.setattr(Engine, "new_sequence", in_small_chunks)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_state_in_service_equals_training_form(precise, name, temperature):
    target, drafters = precise
    grower = parse_tree(60 if name in SEQUENTIAL else 250)
    worst, accepted = worst_difference(target, drafters[name], temperature, grower)
    assert worst < 1e-9
    assert accepted > (1 if name in SEQUENTIAL else 3), "nothing was accepted: paths of several nodes were never fed"


@pytest.mark.parametrize("every", [1, 6, 999])  # 999: only after the next request has rewound
@pytest.mark.parametrize(
    "name",
    ["amphista-full", "amphista-draft-vocabulary", "medusa-own", "eagle-full", "falcon-pairs", "early-exit-bare"],
)
def test_rows_fed_late_make_the_same_state(precise, name, every):
    target, drafters = precise
    waited = []
    commit = drafters[name].commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafters[name], "commit", lambda *given: (waited.append(len(given[2])), commit(*given))[1])
        worst, accepted = worst_difference(target, drafters[name], 0.0, Seldom(60), every, True)
    assert worst < 1e-9 and accepted > 0
    assert every == 1 or max(waited[1:]) > 4, "nothing was fed late"


def test_a_feeding_broken_off_is_done_again(precise, monkeypatch):
    """An interrupt when the first stage has read the rows and the second has not."""
    target, drafters = precise
    drafter = drafters["amphista-full"]
    engine = Engine(target, drafter, parse_tree(250))
    sequence = begin(engine, PROMPTS[0], SamplingParams(max_new_tokens=20))
    step(engine, sequence)

    def interrupt(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drafter.stages[1].layer, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(engine, sequence)
    while not sequence.is_finished:
        assert difference(target, drafter, sequence) < 1e-9
        step(engine, sequence)


def forgets_a_row(rows, feed):
    del rows.unfed[1:2]
    feed(rows)


def in_the_wrong_order(rows, feed):
    rows.unfed.reverse()
    feed(rows)


@pytest.mark.parametrize("mutation", [forgets_a_row, in_the_wrong_order])
def test_mutation_of_late_feeding_is_seen(precise, monkeypatch, mutation):
    target, drafters = precise
    feed = SequenceCache.feed
    monkeypatch.setattr(SequenceCache, "feed", lambda rows: mutation(rows, feed))
    with pytest.raises(AssertionError):
        worst, _ = worst_difference(target, drafters["amphista-full"], 0.0, Seldom(250), 6)
        assert worst < 1e-6


def test_rows_do_not_wait_without_end(precise, monkeypatch):
    monkeypatch.setattr("amphista.engine.sequence_cache.MAX_UNFED", 5)
    target, drafters = precise
    engine = Engine(target, drafters["amphista-full"], Seldom(1))
    sequence = begin(engine, PROMPTS[0], SamplingParams(max_new_tokens=40))
    while not sequence.is_finished:
        step(engine, sequence)
        assert len(sequence.rows.unfed) <= 5
    assert difference(target, drafters["amphista-full"], sequence) < 1e-9


def wrong_next_ids(commit, state, hidden, next_ids):
    commit(state, hidden, torch.cat([torch.full_like(next_ids[:-1], 7), next_ids[-1:]]))


def shifted_hidden(commit, state, hidden, next_ids):
    commit(state, hidden.roll(1, dims=0), next_ids)


def only_the_last_hidden(commit, state, hidden, next_ids):
    commit(state, torch.cat([torch.zeros_like(hidden[:-1]), hidden[-1:]]), next_ids)


@pytest.mark.parametrize("mutation", [wrong_next_ids, shifted_hidden, only_the_last_hidden])
def test_mutation_of_the_feeding_is_seen(precise, monkeypatch, mutation):
    target, drafters = precise
    drafter = drafters["amphista-full"]
    commit = drafter.commit
    monkeypatch.setattr(drafter, "commit", lambda *arguments: mutation(commit, *arguments))
    assert worst_difference(target, drafter)[0] > 1e-6


@pytest.mark.parametrize(("temperature", "wanted"), [(0.0, 8), (0.6, NUM_RANKS)])
def test_heads_name_enough_for_noise_to_choose_among(precise, monkeypatch, temperature, wanted):
    """For a sampled request more than the tree holds; and as deep as it has room for."""
    target, drafters = precise
    drafter = drafters["amphista-full"]
    asked = []
    draft = drafter.draft_all
    monkeypatch.setattr(drafter, "draft_all", lambda *given: asked.append(given) or draft(*given))
    engine = Engine(target, drafter, parse_tree(9))
    step(engine, begin(engine, PROMPTS[0], SamplingParams(max_new_tokens=6, temperature=temperature, seed=0)))
    ((ask,), num_ranks, _), *others = asked
    assert not others and num_ranks == wanted
    assert ask.max_depth == 4  # the heads that 6 tokens leave room for


def test_the_drafter_rests_where_nothing_may_be_drafted(precise, monkeypatch):
    """A tree of the root alone, and the last token of an answer, cost no draft."""
    target, drafters = precise
    drafter = drafters["amphista-full"]
    monkeypatch.setattr(drafter, "draft_all", None)
    alone, wide = Engine(target, drafter, parse_tree(1)), Engine(target, drafter, parse_tree(8))
    step(alone, begin(alone, PROMPTS[0], SamplingParams(max_new_tokens=3)))
    last = begin(wide, PROMPTS[0], SamplingParams(max_new_tokens=2))
    step(wide, last)
    assert last.stats.tree_nodes == [1]
