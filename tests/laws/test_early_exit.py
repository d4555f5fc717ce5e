"""Early exits in service: in every form of the target that lends its layers, what is drafted is what training sees, and
the tokens are the target's; forms that lend none are refused.

That heads say what the equations say, that a draft leaves nothing, and what holds of all drafters that are asked in
rounds, is in test_rounds.py, test_parity.py, test_lossless.py and test_feeding.py.
"""

from __future__ import annotations

import pytest
import torch

from amphista.drafter.card import write_card
from amphista.drafter.checkpoint import load_drafter, save_drafter
from amphista.drafter.early_exit import EarlyExit, EarlyExitConfig
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.engine.timing import draft_ratio
from amphista.errors import ConfigError, DrafterError
from amphista.evaluation.latency import LatencyConfig, measure_latency
from amphista.target.lean import LeanModel
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from tests.decoding import begin, decode, heads_along, step, training_rows
from tests.laws.test_batch import TREES, plainly, together
from tests.laws.test_fast_path import shaken_model
from tests.laws.test_native import NEEDS_COMPILER
from tests.oracle.decode import decode_plainly
from tests.tiny import EOS, anew, shaken, tiny_target

NATIVE = ["native", "native-int8"]
FORMS = ["fast", "fast-static", *(pytest.param(form, marks=NEEDS_COMPILER) for form in NATIVE)]
FAMILIES = {
    "llama": ("llama", {}),
    "mistral-windowed": ("mistral-windowed", {}),
    "mistral-narrow": ("mistral-windowed", {"sliding_window": 2}),  # a path does not see its own first rows
    "qwen2-windowed": ("qwen2-windowed", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    "qwen3": ("qwen3", {"layer_types": ["full_attention"] * 4}),
    "gemma3-by-kind": ("gemma3-by-kind", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "layer_types": ["full_attention"] * 4}),
}
PROMPT = [5, 17, 230, 44, 9, 61, 62, 63, 99, 100, 7, 250]
PARAMS = SamplingParams(max_new_tokens=24)


def target_for(form="fast", family="llama", dtype=torch.float32) -> Target:
    kind, changes = FAMILIES[family]
    target = Target(shaken_model(kind, num_hidden_layers=4, dtype=dtype, **changes), static=form == "fast-static")
    assert target.speed_up(native=form in NATIVE, int8=form == "native-int8") and target.path == form
    return target


def drafter_for(target, **changes) -> EarlyExit:
    config = EarlyExitConfig(**{"exit_layer": 3, "rank": 8, **changes})
    return shaken(EarlyExit(config, target.spec, target.shared)).to(target.dtype)


def distance_from_training(target, drafter, sequence) -> float:
    """Of what the state in service says along a path, by its scale."""
    sequence.rows.feed()
    ids, ahead = sequence.token_ids, [7, 8, 9, 10]
    found = heads_along(drafter, sequence.rows.draft_state, ahead)
    hidden = training_rows(target, drafter, [*ids, *ahead])[:, :-1]
    row = torch.tensor([len(ids) - 2])
    with torch.inference_mode():
        expected = drafter.head_states(hidden, torch.tensor([[*ids[1:], *ahead]]), row)[0]
    return float((found - expected).abs().max() / expected.abs().max())


def worst_distance(target, drafter) -> float:
    engine = Engine(target, drafter, parse_tree(30))
    sequence, worst = begin(engine, PROMPT, PARAMS), 0.0
    while not sequence.is_finished:
        step(engine, sequence)
        worst = max(worst, distance_from_training(target, drafter, sequence))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_drafted_in_service_is_what_training_sees(form, family):
    target = target_for(form, family)
    allowed = 0.1 if form == "native-int8" else 1e-4  # where a bit less is another whole number here and there
    assert worst_distance(target, drafter_for(target)) < allowed


def test_what_embeddings_are_multiplied_by_is_seen_by_both():
    """By a norm's eps alone, so where they are small."""
    kind, changes = FAMILIES["granite"]
    model = shaken_model(kind, num_hidden_layers=4, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e-3)
    target = Target(model)
    assert target.speed_up() and worst_distance(target, drafter_for(target)) < 1e-3


@pytest.mark.parametrize("family", ["mistral-windowed", "mistral-narrow"])
def test_a_window_that_is_not_kept_is_seen(family, monkeypatch):
    monkeypatch.setattr(LeanModel, "first_seen", lambda *given: 0)
    target = target_for("fast", family)
    assert worst_distance(target, drafter_for(target)) > 1e-3


@pytest.mark.parametrize("form", [*FORMS, pytest.param("native-bfloat16", marks=NEEDS_COMPILER)])
def test_the_targets_tokens(form):
    form, dtype = ("native", torch.bfloat16) if form == "native-bfloat16" else (form, torch.float32)
    target = target_for(form, dtype=dtype)
    drafter, accepted = drafter_for(target).freeze(native=target.is_native), 0
    for tree in ("chain", 7, 60):
        for params in (PARAMS, SamplingParams(max_new_tokens=24, temperature=0.8, seed=3)):
            expected = decode(Engine(target, Proposer(), parse_tree(1)), PROMPT, params).output_ids
            if form != "native-int8" and dtype is torch.float32:
                assert expected == decode_plainly(target.model, PROMPT, params, {EOS})
            sequence = decode(Engine(target, drafter, parse_tree(tree)), PROMPT, params)
            assert sequence.output_ids == expected
            accepted += sum(sequence.stats.accepted)
    assert accepted > 0


@pytest.mark.parametrize("tree", TREES)
def test_batches_are_each_sequence_alone_and_plain(tree):
    target = target_for(dtype=torch.float64)
    assert together(Engine(target, drafter_for(target), anew(TREES[tree]))) == plainly(target)


@pytest.mark.parametrize("shared", [2, 6, 12])
def test_the_next_turn_goes_on_from_the_caches_of_the_last(shared):
    """Rows that are rewound, and kept by another: the drafter reads the cache of its own sequence."""
    target = target_for()
    drafter = drafter_for(target)
    engine = Engine(target, drafter, parse_tree(30))
    first = decode(engine, PROMPT, PARAMS)
    prompt = [*PROMPT[:shared], 8, 9, 10]
    fresh, after = decode(engine, prompt, PARAMS), begin(engine, prompt, PARAMS, first)
    assert after.stats.num_cached_tokens == shared - 1
    copied = engine.new_sequence(PROMPT[:9], PARAMS)
    copied.rows = after.rows.copied(shared, copied.token_ids)
    assert copied.rows.draft_state.target_cache is copied.rows.cache
    while not after.is_finished:
        step(engine, after)
        assert after.rows.draft_state.target_cache is after.rows.cache
        assert distance_from_training(target, drafter, after) < 1e-4
    assert after.output_ids == fresh.output_ids and after.stats.accepted == fresh.stats.accepted


def test_the_end_of_the_context_is_not_drafted_over():
    model = shaken_model("llama", num_hidden_layers=4, max_position_embeddings=20)
    target = Target(model)
    assert target.speed_up()
    sequence = decode(Engine(target, drafter_for(target), parse_tree(9)), PROMPT, SamplingParams(ignore_eos=True))
    assert sequence.output_ids == decode_plainly(model, PROMPT, SamplingParams(ignore_eos=True))


# -- costs, checkpoints, refusals -------------------------------------------------------------------------------------


def test_what_it_costs_is_measured():
    target = target_for()
    drafter = drafter_for(target)
    asking = draft_ratio(target, drafter)
    assert asking.ratio > 0 and asking.further_round > 0 and drafter.row_bytes == 0
    measured = measure_latency(target, LatencyConfig(contexts=(16,), nodes=(1, 4), rounds=1), {"it": drafter})
    assert all(row["ms"] > 0 for row in measured["draft"])


@pytest.mark.parametrize("rank", [0, 8])
def test_a_checkpoint_comes_back(tmp_path, rank):
    target = target_for()
    drafter = drafter_for(target, rank=rank, exit_layer=None)
    assert drafter.num_early == 1 and drafter.num_weights == 32 + 3 * 32 * rank
    card = write_card(drafter, "someone/llama", {})
    assert "after M2R2" in card and "arxiv:2502.02040" in card
    save_drafter(drafter, tmp_path / "exit", target.fingerprint, card=card, training={})
    loaded = load_drafter(tmp_path / "exit", target.spec, target.shared, target.fingerprint)
    assert isinstance(loaded, EarlyExit) and loaded.config == drafter.config and loaded.num_early == 1
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    stock = Target(target.model)
    with pytest.raises(DrafterError, match=r"fast path alone.* load a model of another family that has one"):
        load_drafter(tmp_path / "exit", stock.spec, stock.shared, stock.fingerprint)


@pytest.mark.parametrize(("family", "is_fast"), [("gpt_neox", False), ("gemma2", True)])
def test_what_lends_no_layers_is_refused(family, is_fast):
    target = tiny_target(family)
    assert target.speed_up() == is_fast
    with pytest.raises(ConfigError, match="fast path alone"):
        EarlyExit(EarlyExitConfig(), target.spec, target.shared)


def test_a_sequence_without_the_targets_cache_is_refused():
    drafter = drafter_for(target_for())
    state = drafter.start()
    drafter.commit(state, torch.zeros(1, 32), torch.tensor([1]))
    with pytest.raises(DrafterError, match="without one"):
        drafter.draft(state, 4)


@pytest.mark.parametrize(("setting", "value"), [("exit_layer", 0), ("exit_layer", 5), ("rank", -1)])
def test_what_cannot_be_is_refused(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} is {value}"):
        drafter_for(target_for(), **{setting: value})
