"""BiTA on the engine: the target's tokens whatever the masks and the prefix are, drafts that are those of the training
form, probes only where they can be of use, checkpoints whose weights could reach the target refused.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from amphista.drafter.base import Ask
from amphista.drafter.bita import MOST, Bita, BitaConfig
from amphista.drafter.checkpoint import load_drafter, save_drafter
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.engine.timing import draft_ratio
from amphista.errors import DrafterError
from amphista.target.target import Target
from amphista.train.dataset import idle_batch
from amphista.train.head_loss import HeadLoss
from amphista.train.losses import LossConfig
from amphista.tree.grow import AutoGrower, parse_tree
from amphista.tree.tune import Costs
from tests.decoding import begin, decode, step
from tests.laws.test_fast_path import shaken_model
from tests.laws.test_lossless import PROMPT, SAMPLINGS, TREES, check
from tests.laws.test_native import NEEDS_COMPILER
from tests.oracle.decode import decode_plainly
from tests.tiny import AUTO_TREES, EOS, anew, shaken, tiny_target

SWITCHES = {
    "full": {"prefix_len": 4},
    "masks-alone": {"prefix_len": 0, "num_heads": 2},
    "paths": {"prefix_len": 3, "path_rank": 8, "path_shortlist": 6},
    "own-draft-vocabulary": {"prefix_len": 2, "draft_vocab": 100, "lm_head": "own"},
}
ALWAYS = AutoGrower(Costs.measured({1: 1.0, 2: 1.0001, 24: 1.001}))
TOKENS = [(13 * i + 5) % 250 for i in range(14)]


def drafter_for(target, name="full", scale=0.3) -> Bita:
    return shaken(Bita(BitaConfig(**SWITCHES[name]), target.spec, target.shared), scale=scale)


@pytest.fixture(scope="module")
def drafters(target):
    return {name: drafter_for(target, name) for name in SWITCHES}


@pytest.fixture(scope="module")
def expected(target):
    return {name: decode_plainly(target.model, PROMPT, params, {EOS}) for name, params in SAMPLINGS.items()}


@pytest.mark.parametrize("sampling", ["greedy", "sampled", "penalised-sampled"])
@pytest.mark.parametrize("tree", ["1", "chain", "7", "24", *AUTO_TREES])
@pytest.mark.parametrize("name", SWITCHES)
def test_the_targets_tokens(target, drafters, expected, name, tree, sampling):
    check(target, drafters[name], tree, sampling, expected)


def test_drafts_are_accepted_somewhere(target, drafters, expected):
    steps = []
    for name in SWITCHES:
        sequence = decode(Engine(target, drafters[name], parse_tree(200)), PROMPT, SAMPLINGS["greedy"])
        assert sequence.output_ids == expected["greedy"]
        steps += sequence.stats.accepted
    assert sum(n > 0 for n in steps) >= 6


@pytest.mark.parametrize("tree", ["7", "auto-cheap"])
def test_a_batch_has_the_tokens_of_each_alone(target, drafters, tree):
    prompts = [PROMPT, TOKENS, [3, 1, 4, 1, 5, 9, 2, 6]]
    params = [SAMPLINGS[name] for name in ("greedy", "sampled", "penalised-sampled")]
    engine = Engine(target, drafters["full"], anew(TREES[tree]))
    batch = [engine.new_sequence(*pair) for pair in zip(prompts, params, strict=True)]
    while running := [sequence for sequence in batch if not sequence.is_finished]:
        assert not [result for result in engine.step(running) if isinstance(result, Exception)]
    for sequence, prompt, given in zip(batch, prompts, params, strict=True):
        assert sequence.output_ids == decode_plainly(target.model, prompt, given, {EOS})


@pytest.mark.parametrize("form", ["stock", "fast", pytest.param("native", marks=NEEDS_COMPILER)])
def test_what_is_drafted_in_service_is_what_training_sees(form):
    """After every step: states of the group below the last accepted node, and the candidates made of them."""
    target = Target(shaken_model("mistral-windowed"))
    if form != "stock":
        target.speed_up(native=form == "native")
    drafter, seen = drafter_for(target), 0
    engine = Engine(target, drafter, parse_tree(290))
    sequence = begin(engine, TOKENS, SamplingParams(max_new_tokens=30))
    while not sequence.is_finished:
        step(engine, sequence)
        rows = sequence.rows
        assert rows.is_probed == (sequence.max_depth > 0)
        if not rows.is_probed:
            continue
        read = sequence.token_ids[: rows.num_rows]
        with torch.no_grad():
            states = target.probe_rows(read, torch.tensor([rows.num_rows - 1]), drafter.probes)[0]
        ask = rows.ask(drafter.num_heads)
        torch.testing.assert_close(ask.probed, states, atol=1e-4, rtol=1e-4)
        (drafted,) = drafter.draft_all([ask], 5)
        rows.note_fed()
        with torch.no_grad():
            best = drafter.head_logits(states[None])[0].topk(5).indices.tolist()
        assert drafted.tokens == best
        assert drafter.draft(rows.draft_state, 5).tokens == best, "asked twice"
        seen += max(sequence.stats.accepted) > 0
    assert seen >= 3, "paths through the tree were probed, too"


def test_the_training_form_reads_what_the_target_gave(target, drafters):
    for name, drafter in drafters.items():
        text = torch.tensor([TOKENS])
        with torch.no_grad():
            probed = target.probe_rows(TOKENS, torch.arange(len(TOKENS)), drafter.probes)
            hidden = torch.cat([target.hidden_states(text), probed.flatten(1)[None]], dim=-1)
            assert hidden.shape[-1] == drafter.row_width
            states = drafter.head_states(hidden, text.roll(-1, 1), torch.arange(len(TOKENS)))
            one_by_one = drafter.states_of(hidden, text.roll(-1, 1), torch.arange(len(TOKENS)))(slice(2, 9))
            state = drafter.start()
            ask = Ask(state, 2, hidden[0, :5, : target.spec.hidden_size], TOKENS[1:6], probed[4])
            drafter.commit_all([ask])
            drafting = drafter.draft_states([state])[0]
        torch.testing.assert_close(drafting, states[4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one_by_one(1, torch.tensor([2, 3])), states[[4, 5], 1], atol=1e-5, rtol=1e-5)
        assert (name == "paths") == (not torch.equal(states, probed))


def test_a_process_without_rows_has_a_gradient_of_nothing(target):
    drafter, batch = drafter_for(target).train(), idle_batch(drafter_for(target).row_width)
    sums = HeadLoss(drafter, LossConfig())(batch.hidden, batch.next_ids, batch.answer_rows)
    sums.loss(LossConfig()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in drafter.parameters())


def test_what_was_not_probed_drafts_nothing(target, drafters):
    drafter, state = drafters["full"], drafters["full"].start()
    assert drafter.draft(state, 5).tokens == []
    probed = torch.randn(3, 32)
    drafter.commit_all([Ask(state, 3, torch.zeros(4, 32), [1, 2, 3, 4], probed)])
    other = drafter.start()
    both = drafter.draft_all([Ask(other, 3, torch.zeros(1, 32), [1]), Ask(state, 2)], 4)
    assert [drafted.num_heads for drafted in both] == [0, 2]
    drafter.trim(state, 4)
    assert drafter.draft(state, 5).num_heads == 3
    drafter.trim(state, 3)
    assert state.num_rows == 3 and drafter.draft(state, 5).tokens == []


def test_probes_end_with_the_answer_and_with_the_context(monkeypatch):
    """Below nodes whose next step could draft nothing there are none, nor beyond the last position."""
    target = tiny_target(max_position_embeddings=32)
    drafter, widths = drafter_for(target), []
    forward = target.forward

    def watched(spans, taps=()):
        widths.append([span.num_probes for span in spans])
        assert all(max(span.positions) < 32 for span in spans)
        return forward(spans, taps)

    monkeypatch.setattr(target, "forward", watched)
    for params, prompt in ((SamplingParams(max_new_tokens=99), TOKENS), (SamplingParams(max_new_tokens=4), TOKENS[:3])):
        widths.clear()
        sequence = decode(Engine(target, drafter, parse_tree(20)), prompt, params)
        assert sequence.output_ids == decode_plainly(target.model, prompt, params, {EOS})
        assert max(width for (width,) in widths) > 0 and widths[-1] == [0] and widths[0] == [0]


@pytest.mark.parametrize(("costs", "is_probed"), [({1: 1.0, 2: 1.0001, 24: 1.001}, True), ({1: 1.0, 2: 3.0}, False)])
def test_where_rows_are_dear_nothing_rides(target, expected, costs, is_probed, monkeypatch):
    engine = Engine(target, drafter_for(target), AutoGrower(Costs.measured(costs)))
    sequence, widths = begin(engine, PROMPT, SAMPLINGS["greedy"]), []
    forward = target.forward
    monkeypatch.setattr(
        target, "forward", lambda spans, *rest: widths.append(spans[0].num_probes) or forward(spans, *rest)
    )
    while not sequence.is_finished:
        step(engine, sequence)
    assert sequence.output_ids == expected["greedy"]
    assert (max(widths) > 0) == is_probed


def test_a_step_that_is_broken_off_leaves_the_group_before(target, drafters, monkeypatch):
    engine = Engine(target, drafters["full"], parse_tree(9))
    sequence = begin(engine, PROMPT, SamplingParams(max_new_tokens=24))
    step(engine, sequence), step(engine, sequence)
    before = sequence.rows.unfed[-1].probed
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.grower), "observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            step(engine, sequence)
    assert sequence.rows.unfed[-1].probed is before is not None
    while not sequence.is_finished:
        step(engine, sequence)
    assert sequence.output_ids == decode_plainly(target.model, PROMPT, SamplingParams(max_new_tokens=24), {EOS})


def test_the_next_turn_goes_on_with_fresh_probes(target, drafters):
    engine, params = Engine(target, drafters["full"], parse_tree(9)), SamplingParams(max_new_tokens=12)
    first = decode(engine, TOKENS, params)
    prompt = [*first.token_ids, 7, 8]
    second = decode(engine, prompt, params, first)
    assert second.stats.num_cached_tokens > 10
    assert second.output_ids == decode_plainly(target.model, prompt, params, {EOS})


def test_a_draft_costs_a_product(target):
    drafter = drafter_for(target)
    assert draft_ratio(target, drafter).ratio > 0 and drafter.cost_key["form"] == "torch"


@NEEDS_COMPILER
@pytest.mark.parametrize("name", SWITCHES)
def test_scores_in_c_are_those_of_torch(target, drafters, expected, name):
    exact = copy.deepcopy(drafters[name]).freeze(native=True, exact=True)
    rounded = copy.deepcopy(drafters[name]).freeze(native=True)
    assert exact.why_not_native is None and rounded.cost_key["form"] == "native"
    states = torch.randn(3, exact.num_heads, target.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scores, found, near = (one.head_logits(states) for one in (drafters[name], exact, rounded))
        alone = exact.head_logits(states[:, 1], 1)
    torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(alone, scores[:, 1], atol=1e-4, rtol=1e-5)
    assert 0 < float((near - scores).norm() / scores.norm()) < 0.05
    check(target, rounded, "24", "greedy", expected)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(target, drafters, tmp_path):
    save_drafter(drafters["paths"], tmp_path / "bita", target.fingerprint, card="", training={})
    loaded = load_drafter(tmp_path / "bita", target.spec, target.shared, target.fingerprint)
    assert isinstance(loaded, Bita) and loaded.config == drafters["paths"].config
    for name, tensor in drafters["paths"].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("part", ["masks", "prefix"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.01 * MOST])
def test_weights_that_would_reach_the_target_are_refused(target, tmp_path, part, value):
    drafter = drafter_for(target)
    with torch.no_grad():
        getattr(drafter, part).flatten()[7] = value
    save_drafter(drafter, tmp_path / "bita", target.fingerprint, card="", training={})
    with pytest.raises(DrafterError, match=f"are none in torch.float32: {part}|holds a number beyond 1000"):
        load_drafter(tmp_path / "bita", target.spec, target.shared, target.fingerprint)
