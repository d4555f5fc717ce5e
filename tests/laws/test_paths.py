"""Heads that know the token above: what a trainer sees of a path is what decoding sees, no node promises more than one
child, a correction of nothing changes nothing, and what trees then expect is what they get.
"""

from __future__ import annotations

import copy
import json
import math
import random
from functools import cache

import numpy as np
import pytest
import torch

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.base import Calibration
from amphista.drafter.checkpoint import read_checkpoint
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import ConfigError
from amphista.train.calibrate import calibrate, head_temperatures
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.dataset import HiddenStates, collate
from amphista.train.losses import LossConfig
from amphista.train.token_row import TokenRow
from amphista.train.trainer import Trainer
from amphista.train.validation import ranked_heads, validate
from amphista.tree.grow import parse_tree
from tests.decoding import begin, step
from tests.tiny import EOS, shaken, tiny_target

IDS = [5, 17, 230, 44, 9, 61, 62, 63, 99, 100, 7, 250]
KINDS = {
    "amphista": lambda t, **c: Amphista(AmphistaConfig(num_heads=4, path_rank=8, **c), t.spec, t.shared),
    "medusa": lambda t, **c: Medusa(MedusaConfig(num_heads=4, path_rank=8, **c), t.spec, t.shared),
    "own": lambda t, **c: Medusa(MedusaConfig(num_heads=3, path_rank=8, lm_head="own", **c), t.spec, t.shared),
}
TEMPERATURES = [1.3, 0.7, 1.1, 0.9]


def path_drafter(target, kind, *, scale=0.2, **settings):
    drafter = shaken(KINDS[kind](target, **settings), scale=scale)
    temperatures = TEMPERATURES[: drafter.num_heads]
    drafter.calibration = Calibration(greedy=temperatures, sampled=temperatures, coverage=0.9)
    return drafter


def fed(target, drafter, ids=IDS):
    """(state after the last row, its head states in training form, the pending token)."""
    hidden = target.hidden_states(torch.tensor([ids[:-1]])).clone()
    next_ids = torch.tensor([ids[1:]])
    state = drafter.start()
    for row in range(len(ids) - 1):
        drafter.commit(state, hidden[0, row : row + 1], next_ids[0, row : row + 1])
    with torch.no_grad():
        return state, drafter.head_states(hidden, next_ids, torch.tensor([len(ids) - 2]))[0], next_ids[0, -1]


def index_of(drafter, token):
    return token if drafter.draft_ids is None else drafter.draft_ids.tolist().index(token)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("draft_vocab", [None, 120])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])  # gemma2 caps its logits
def test_training_form_equals_decoding_form(family, kind, draft_vocab, frozen):
    target = tiny_target(family)
    drafter = path_drafter(target, kind, draft_vocab=draft_vocab, path_shortlist=7)
    if draft_vocab:
        drafter.set_draft_ids(torch.arange(50, 170))
    state, states, _ = fed(target, drafter)
    if frozen:
        drafter = copy.deepcopy(drafter).freeze()
    candidates = drafter.draft(state, 5)
    assert len(candidates.below.ranks) == drafter.num_heads - 1
    checked = 0
    for k in range(1, drafter.num_heads):
        assert len(candidates.tokens[k]) == 7
        with torch.no_grad():
            logits = drafter.head_logits(states)[k]
            for i, parent in enumerate(candidates.tokens[k - 1]):
                correction = drafter.correction(states[k], torch.tensor(parent))
                given = drafter.given_above(logits[None], states[k][None], correction[None], drafter.own_weights(k))
                expected = torch.log_softmax(given[0] / TEMPERATURES[k], -1) + math.log(0.9)
                ranks, values = candidates.below.children(k - 1, i)
                said = [float(expected[index_of(drafter, candidates.tokens[k][r])]) for r in ranks]
                assert values == pytest.approx(said, abs=2e-3) and values == sorted(values, reverse=True)
                assert sum(map(math.exp, values)) <= 0.9 + 1e-5
                checked += len(values)
    assert checked == (drafter.num_heads - 1) * 7 * 5


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_shortlist_moves_and_only_by_the_token_above(target, kind):
    """z_k(x | p) = LM(o_k + correction)[x] on the shortlist, z_k(x) elsewhere: the equation of path.py."""
    drafter = path_drafter(target, kind, path_shortlist=9)
    _, states, _ = fed(target, drafter)
    with torch.no_grad():
        logits, above = drafter.head_logits(states)[2], torch.tensor(77)
        correction = drafter.path(states[2], drafter.path.read(target.shared.embed(above)))
        given = drafter.given_above(logits[None], states[2][None], correction[None], drafter.own_weights(2))[0]
        fresh = drafter.head_logits(states[2] + correction, 2)
    best = logits.topk(9).indices
    torch.testing.assert_close(given[best], fresh[best], atol=1e-4, rtol=1e-5)
    others = torch.ones_like(logits, dtype=torch.bool)
    others[best] = False
    assert torch.equal(given[others], logits[others]) and (given[best] - logits[best]).abs().min() > 1e-4


@pytest.mark.parametrize(("kind", "moves"), [("amphista", False), ("medusa", True)])
def test_the_first_head_is_corrected_where_it_has_not_read_the_pending_token(target, kind, moves):
    drafter = path_drafter(target, kind)
    state, states, pending = fed(target, drafter)
    plain = KINDS[kind](target)
    plain.load_state_dict(drafter.state_dict())
    torch.nn.init.zeros_(plain.path.output.weight)
    _, uncorrected, _ = fed(target, plain)
    assert torch.equal(states[0], uncorrected[0]) is not moves
    with torch.no_grad():
        correction = drafter.correction(uncorrected[0], pending) * moves
    torch.testing.assert_close(states[0], uncorrected[0] + correction)
    torch.testing.assert_close(drafter.draft_states([state])[0], states)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_correction_is_no_correction(target, kind):
    drafter = path_drafter(target, kind, path_shortlist=8)
    torch.nn.init.zeros_(drafter.path.output.weight)
    state, _, _ = fed(target, drafter)
    candidates = drafter.draft(state, 8)
    for k, (rows, values) in enumerate(zip(candidates.below.ranks, candidates.below.log_probs, strict=True), start=1):
        for ranks, logs in zip(rows, values, strict=True):
            assert list(ranks) == list(range(8)) and logs == pytest.approx(candidates.log_probs[k], abs=1e-5)


def test_depth_and_ranks_are_bounded(target):
    drafter = path_drafter(target, "amphista", path_shortlist=6)
    state, _, _ = fed(target, drafter)
    assert drafter.draft(state, 3, max_depth=1).below is None
    below = drafter.draft(state, 3, max_depth=2).below
    assert [len(below.ranks), len(below.ranks[0]), len(below.ranks[0][0])] == [1, 6, 3]
    many = drafter.draft(state, 30)
    assert {len(tokens) for tokens in many.tokens} == {30} and len(many.below.ranks[0][0]) == 6


def _rows_of_the_neighbour(monkeypatch):
    """Each token is given the children of the one before it."""
    ranks_below = Amphista.ranks_below
    monkeypatch.setattr(
        Amphista, "ranks_below", lambda *inputs: tuple(part.roll(1, dims=-2) for part in ranks_below(*inputs))
    )


def _tail_forgotten(monkeypatch):
    monkeypatch.setattr("amphista.drafter.heads.conditional", lambda logs, shifts: (logs + shifts).log_softmax(-1))


@pytest.mark.parametrize("mutation", [_rows_of_the_neighbour, _tail_forgotten])
def test_a_mutation_is_seen(mutation, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        test_training_form_equals_decoding_form("llama", "amphista", None, False)


# -- measured as it decodes -------------------------------------------------------------------------------------------


def test_validation_sees_what_decoding_sees(target):
    drafter = path_drafter(target, "medusa", path_shortlist=6)
    row = TokenRow("a", "a", IDS, [0] * 3 + [1] * 9)
    hidden = HiddenStates(target, [row], None)
    with torch.inference_mode():
        ranked = ranked_heads(drafter, collate([row], hidden.get([row])), 4)
    state, _, _ = fed(target, drafter)
    decoded, replayed = drafter.draft(state, 6), ranked.candidates(8)
    assert replayed.tokens == decoded.tokens and np.array_equal(replayed.below.ranks, decoded.below.ranks)
    for ours, theirs in zip(replayed.below.log_probs, decoded.below.log_probs, strict=True):
        assert [v for row in ours for v in row] == pytest.approx([v for row in theirs for v in row], abs=1e-4)
    above = torch.tensor([decoded.tokens[0][2]])
    said = ranked.ranked_tokens(1, torch.tensor([8]), above)[0, :6].tolist()
    assert said == [decoded.tokens[1][rank] for rank in decoded.below.children(0, 2)[0]]
    unknown = next(token for token in range(300) if token not in decoded.tokens[0])
    assert ranked.ranked_tokens(1, torch.tensor([8]), torch.tensor([unknown]))[0].tolist() == decoded.tokens[1]


def recorded(target, drafter, num_nodes):
    """(rows, tau) of real decodings that end with a step."""
    engine, rows, tokens, steps = Engine(target, drafter, parse_tree(num_nodes)), [], 0, 0
    for i in range(12):
        prompt = [(31 * i + j) % 250 for j in range(4)]
        sequence = begin(engine, prompt, SamplingParams(max_new_tokens=60))
        while sequence.stats.num_steps < 16 and sequence.finish_reason is None:
            step(engine, sequence)
        answer = sequence.output_ids
        rows.append(TokenRow(str(i), str(i), prompt + answer, [0] * 4 + [1] * len(answer)))
        tokens, steps = tokens + len(answer) - 1, steps + sequence.stats.num_steps
    return rows, tokens / steps


@pytest.mark.parametrize("num_nodes", [8, 40])
def test_simulated_tau_equals_decoded_tau(target, num_nodes):
    drafter = shaken(KINDS["amphista"](target, path_shortlist=12), scale=0.05)
    drafter.match_scale(5.0)
    rows, tau = recorded(target, drafter, num_nodes)
    result = validate(drafter, rows, HiddenStates(target, rows, None), LossConfig(), tree_sizes=[num_nodes])
    assert tau > 1, "nothing was accepted: the law would be vacuous"
    assert result.tau[num_nodes] == pytest.approx(tau, abs=1e-9)


# -- trained ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    """Texts in which the token above says all there is to say: 3 x + 1 in a ring, or now and then 5 x + 2."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines, source = [], random.Random(0)
    for i in range(120):
        ring = [(11 * i) % 41]
        while len(ring) < 14:
            ring.append((3 * ring[-1] + 1) % 41 if source.random() < 0.7 else (5 * ring[-1] + 2) % 41)
        lines.append({"id": str(i), "prompt_ids": ring[:3], "answer_ids": [*ring[3:], EOS]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def config_of(data, steps=4, share=0.05, **values):
    """share: to validate on, which takes longer than a few steps do."""
    return TrainConfig(
        data=DataConfig(files=(data,), validation_share=share),
        optimizer=OptimizerConfig(max_steps=steps, batch_size=8, learning_rate=1e-2, epochs=50, warmup_steps=1),
        **values,
    )


MODEL = {"num_heads": 3, "draft_vocab": 60}
PATH = {"path_rank": 16, "path_shortlist": 48}


@pytest.fixture(scope="module")
def first(target, data, tmp_path_factory):
    return Trainer(target, config_of(data, 12, 0.4, model=MODEL), tmp_path_factory.mktemp("first") / "run", print).run()


LOSS = LossConfig(soft_weight=0.0, text_weight=1.0)


@pytest.fixture(scope="module")
def corrected(target, data, first, tmp_path_factory):
    """By what is frozen: a trainer before and after it has put a correction on a trained drafter."""

    @cache
    def corrected(freeze):
        config = config_of(data, 40, 0.4, init=str(first), model=PATH, freeze=freeze, loss=LOSS)
        trainer = Trainer(target, config, tmp_path_factory.mktemp("corrected") / "run", print)
        start = {name: weight.clone() for name, weight in trainer.drafter.state_dict().items()}
        trained = {name for name, weight in trainer.drafter.named_parameters() if weight.requires_grad}
        before = validate(trainer.drafter, trainer.parts.data.validation_rows, trainer.parts.hidden, LOSS)
        return trainer, start, trained, before, trainer.run()

    return corrected


@pytest.mark.parametrize("freeze", ["heads", "none"])
def test_a_correction_is_put_on_a_trained_drafter(target, data, corrected, tmp_path, freeze):
    """The heads stay bit for bit where they are frozen; the correction learns what stands below what."""
    trainer, start, trained, before, folder = corrected(freeze)
    assert all(name.startswith("path.") for name in trained) is (freeze == "heads")
    after = validate(trainer.drafter, trainer.parts.data.validation_rows, trainer.parts.hidden, LOSS)
    moved = {name for name, weight in trainer.drafter.state_dict().items() if not torch.equal(weight, start[name])}
    assert moved == trained
    assert after.head_loss[2] < before.head_loss[2] - 0.1
    assert after.top[1][0] > before.top[1][0] + 0.1, "what stands below what is known now"
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.path_rank == 16 and checkpoint.calibration is not None
    again = Trainer(target, config_of(data, init=str(folder), freeze=freeze), tmp_path / "again", print)
    assert again.drafter.config == checkpoint.config


def test_a_frozen_run_goes_on_where_it_was(target, data, first, tmp_path):
    config = config_of(data, 6, init=str(first), model=PATH, freeze="heads")
    whole = Trainer(target, config, tmp_path / "whole", print).run()
    Trainer(target, config, tmp_path / "parts", print).run(stop_after=3)
    Trainer(target, config, tmp_path / "parts", print).run()
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "parts/last/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(corrected):
    """(a drafter with a half-trained correction, held-out rows, their hidden states)."""
    trainer = corrected("none")[0]
    drafter = copy.deepcopy(trainer.drafter).eval()
    return drafter, trainer.parts.data.validation_rows, trainer.parts.hidden


def test_expected_tokens_are_those_that_come(trained):
    """Calibrated on the rows it is measured on, a correction promises what it gives: with trees of all sizes."""
    drafter, rows, hidden = trained
    drafter.calibration, _ = calibrate(drafter, rows, hidden, LossConfig())
    batch = collate(rows, hidden.get(rows))
    with torch.inference_mode():
        ranked = ranked_heads(drafter, batch, 47)
    next_ids, inside = batch.answer_rows.next_ids.tolist(), batch.answer_rows.aims(drafter.num_heads - 1).tolist()
    for num_nodes in (2, 4, 8, 16):
        expected, accepted = 0.0, 0
        for row in inside:
            growth = parse_tree(num_nodes).grow(next_ids[row], ranked.candidates(row), drafter.num_heads)
            node, expected = 0, expected + growth.expected
            for token in next_ids[row + 1 : row + 1 + drafter.num_heads]:
                node = growth.tree.child(node, token)
                if node is None:
                    break
                accepted += 1
        assert accepted > 20 and expected == pytest.approx(accepted, rel=0.2)


@pytest.mark.parametrize("wrong", [0.8, 1.6])
def test_the_temperature_of_the_conditional_distribution_is_found(trained, wrong, monkeypatch):
    """Logits given the token above that are `wrong` times too large are divided by so much more."""
    drafter, rows, hidden = trained
    found = head_temperatures(drafter, rows, hidden)
    given = Amphista.given_above
    monkeypatch.setattr(Amphista, "given_above", lambda *inputs: given(*inputs) * wrong)
    again = head_temperatures(drafter, rows, hidden)
    assert again[0] == found[0], "the first head has no token above it"
    inside = [(b, a) for b, a in zip(found[1:], again[1:], strict=True) if 0.6 < b < 3 and 0.6 < a < 3]
    assert inside
    for before, after in inside:
        assert after == pytest.approx(before * wrong, abs=0.11)


@pytest.mark.parametrize(
    ("model", "freeze", "message"),
    [
        ({}, "heads", "leaves nothing to train"),
        ({"path_rank": 4, "num_heads": 2}, "none", "num_heads is 3, not 2"),
        ({"path_rank": 0}, "none", "path_rank is 0"),
        ({"path_shortlist": 0}, "none", "path_shortlist is 0"),
    ],
)
def test_what_cannot_be_is_refused(target, data, first, tmp_path, model, freeze, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(target, config_of(data, init=str(first), model=model, freeze=freeze), tmp_path / "run", print)


def test_a_correction_is_not_changed_in_size(target, data, first, tmp_path):
    folder = Trainer(target, config_of(data, 1, init=str(first), model=PATH), tmp_path / "run", print).run()
    with pytest.raises(ConfigError, match="path_rank is 16, not 8"):
        Trainer(target, config_of(data, init=str(folder), model={"path_rank": 8}), tmp_path / "again", print)
    with pytest.raises(ConfigError, match="freeze is 'all'"):
        config_of(data, freeze="all")
