"""Law 7: the loss of one head is the cross-entropy written out by hand, gradients reach the drafter only, a resumed run
equals the uninterrupted one bit for bit; and the tau a trainer simulates is the tau that decoding realises.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.card import CardConfig, read_front_matter
from amphista.drafter.checkpoint import load_drafter
from amphista.drafter.eagle import Eagle, EagleConfig
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import ConfigError, DataError
from amphista.train.calibrate import GRID, calibrate, head_temperatures, losses_by_temperature
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.dataset import HiddenStates, collate, frequent_tokens
from amphista.train.head_loss import HeadLoss
from amphista.train.losses import LossConfig
from amphista.train.prompts import TokenRow, mark_answers
from amphista.train.run_folder import scalars
from amphista.train.trainer import Trainer
from amphista.train.validation import validate
from amphista.tree.build import build_template, ranked
from amphista.tree.grow import StaticGrower, parse_tree
from tests.decoding import begin, decode, step
from tests.tiny import EOS, shaken, tiny_target

PROMPT, ANSWER = [5, 17, 230, 44], [9, 61, 9, 63, 250, 100, 7, EOS]
ROW = TokenRow("a", "a", PROMPT + ANSWER, [0] * 4 + [1] * 8)
TWO_TURNS = TokenRow("b", "b", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 0, 1, 1, 1, 0, 0, 2, 2, 2])


def drafter_for(target, **switches):
    return shaken(Amphista(AmphistaConfig(num_heads=3, **switches), target.spec, target.shared), scale=0.2)


def batch_for(target, rows):
    return collate(rows, HiddenStates(target, rows, None).get(rows))


def logits_of_row(target, drafter, row):
    """Head logits at every position of one row, straight from the drafter."""
    ids = torch.tensor([row.token_ids])
    hidden = target.hidden_states(ids).clone()
    next_ids = torch.tensor([row.token_ids[1:] + [0]])
    with torch.no_grad():
        return drafter.head_logits(drafter.head_states(hidden, next_ids, torch.arange(ids.shape[1]))), hidden[0]


@pytest.mark.parametrize("draft_vocab", [None, 120])
def test_loss_equals_cross_entropy_written_out(target, draft_vocab):
    """Position t counts for head k iff x_{t+1} and x_{t+1+k} lie in the same answer (1-based k)."""
    drafter = drafter_for(target, draft_vocab=draft_vocab)
    if draft_vocab:
        drafter.set_draft_ids(frequent_tokens([ROW, TWO_TURNS], draft_vocab, [EOS]))
    vocabulary = list(range(300)) if draft_vocab is None else drafter.draft_ids.tolist()
    config = LossConfig(soft_weight=1.0, text_weight=0.3, depth_decay=0.5)
    rows = [ROW, TWO_TURNS]
    sums, counts = [0.0] * 3, [0] * 3
    for row in rows:
        logits, hidden = logits_of_row(target, drafter, row)
        for t in range(len(row.token_ids)):
            for k in (1, 2, 3):
                if t + 1 + k >= len(row.token_ids):
                    continue
                if not row.answers[t + 1] or row.answers[t + 1] != row.answers[t + 1 + k]:
                    continue
                z = logits[t, k - 1].double()
                log_probs = (z - z.exp().sum().log()).tolist()
                aim = target.shared.project(hidden[t + k]).double()[vocabulary]
                probs = (aim.exp() / aim.exp().sum()).tolist()
                soft = -sum(p * lp for p, lp in zip(probs, log_probs, strict=True))
                token = row.token_ids[t + 1 + k]
                text = -log_probs[vocabulary.index(token)] if token in vocabulary else 0.0
                sums[k - 1] += 1.0 * soft + 0.3 * text
                counts[k - 1] += 1
    assert counts == [7 + 4, 6 + 2, 5], "which positions count"
    by_hand = [s / c for s, c in zip(sums, counts, strict=True)]
    batch = batch_for(target, rows)
    sums = HeadLoss(drafter, config)(batch.hidden, batch.next_ids, batch.answer_rows)
    loss, per_head = sums.loss(config), sums.per_head()
    assert per_head.tolist() == pytest.approx(by_hand, rel=1e-4)
    weights = [1, 0.5, 0.25]
    assert float(loss.detach()) == pytest.approx(
        sum(w * v for w, v in zip(weights, by_hand, strict=True)) / sum(weights), rel=1e-4
    )


def test_gradient_reaches_the_drafter_only(target):
    drafter = drafter_for(target)
    batch = batch_for(target, [ROW])
    HeadLoss(drafter, LossConfig())(batch.hidden, batch.next_ids, batch.answer_rows).loss(LossConfig()).backward()
    missing = [name for name, p in drafter.named_parameters() if p.grad is None or float(p.grad.abs().sum()) == 0]
    assert missing == []
    assert all(p.grad is None and not p.requires_grad for p in target.model.parameters())
    assert not any(p is q for p in drafter.parameters() for q in target.model.parameters())


def test_a_batch_of_one_token_answers_has_a_loss_of_nothing(target):
    """No head has anything to aim at; the step must still have a gradient, of zero."""
    drafter = drafter_for(target)
    batch = batch_for(target, [TokenRow("y", "y", [1, 2, 3], [0, 0, 1])])
    sums = HeadLoss(drafter, LossConfig())(batch.hidden, batch.next_ids, batch.answer_rows)
    loss, per_head = sums.loss(LossConfig()), sums.per_head()
    loss.backward()
    assert float(loss.detach()) == 0 and per_head.tolist() == [0, 0, 0]


def test_heads_without_an_aim_have_a_gradient_of_nothing(target):
    """Of every weight, own LM heads too: distributed training waits for the gradient of each."""
    drafter = shaken(Medusa(MedusaConfig(num_heads=3, lm_head="own", draft_vocab=100), target.spec, target.shared))
    drafter.set_draft_ids(frequent_tokens([ROW], 100, [EOS]))
    batch = batch_for(target, [TokenRow("y", "y", [1, 2, 3], [0, 0, 1])])
    HeadLoss(drafter, LossConfig())(batch.hidden, batch.next_ids, batch.answer_rows).loss(LossConfig()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in drafter.parameters())


def test_padding_changes_nothing(target):
    """A row alone and the same row beside a longer one give the same losses."""
    drafter = drafter_for(target)
    longer = TokenRow("c", "c", PROMPT * 4, [0] * 16)
    alone, padded = (batch_for(target, rows) for rows in ([ROW], [ROW, longer]))
    loss = HeadLoss(drafter, LossConfig())
    one = loss(alone.hidden, alone.next_ids, alone.answer_rows).per_head()
    other = loss(padded.hidden, padded.next_ids, padded.answer_rows).per_head()
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_conversation_masks_are_the_answers(text_target):
    """Prefix check: marked tokens are exactly the assistant's texts and their end tokens."""
    text = text_target.text
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Grüße"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
    ((ids, marks),) = mark_answers(messages, text, {EOS})
    for number, answer in ((1, "Grüße"), (2, "Ciao")):
        marked = [token for token, mark in zip(ids, marks, strict=True) if mark == number]
        assert text.decode(marked) == answer and marked[-1] == EOS
    assert ids == text.render(messages, add_generation_prompt=False)[: len(ids)]


def test_rewritten_history_makes_rows_of_their_own(text_target):
    from tests.laws.test_next_turn import FORGETFUL

    target = tiny_target(with_text=True)
    target.text.tokenizer.chat_template = FORGETFUL
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "One"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Two"},
    ]
    rows = mark_answers(messages, target.text, {EOS})
    answers = [target.text.decode([t for t, m in zip(*row, strict=True) if m]) for row in rows]
    assert answers == ["One", "Two"]


# -- simulated tau == realised tau ------------------------------------------------------------------------------------


def recorded(target, drafter, grower):
    """(rows, tau) of real decodings that end with a step, well before the token limit, so that no tree is cut short."""
    engine = Engine(target, drafter, grower)
    rows, tokens, steps = [], 0, 0
    for i in range(12):
        prompt = [(31 * i + j) % 250 for j in range(4)]
        sequence = begin(engine, prompt, SamplingParams(max_new_tokens=60))
        while sequence.stats.num_steps < 16 and sequence.finish_reason is None:
            step(engine, sequence)
        answer = sequence.output_ids
        rows.append(TokenRow(str(i), str(i), prompt + answer, [0] * 4 + [1] * len(answer)))
        tokens += len(answer) - 1
        steps += sequence.stats.num_steps
    assert tokens / steps > 1, "nothing was accepted: the law would be vacuous"
    return rows, tokens / steps


@pytest.mark.parametrize("num_nodes", [2, 8, 24])
def test_simulated_tau_equals_decoded_tau(target, num_nodes):
    """Decode, record, replay the record against the heads: the same tau, step for step."""
    drafter = shaken(Amphista(AmphistaConfig(num_heads=3), target.spec, target.shared), scale=0.05)
    drafter.match_scale(5.0)
    rows, tau = recorded(target, drafter, parse_tree(num_nodes))
    result = validate(drafter, rows, HiddenStates(target, rows, None), LossConfig(), tree_sizes=[num_nodes])
    assert result.tau[num_nodes] == pytest.approx(tau, abs=1e-9)


@pytest.mark.parametrize("num_nodes", [2, 8, 24])
def test_simulated_tau_of_static_trees_equals_decoded_tau(target, num_nodes, monkeypatch):
    """The same of a drafter that is asked in rounds, whose ranks are known along the text alone."""
    drafter = shaken(Eagle(EagleConfig(num_heads=3), target.spec, target.shared), scale=0.05)
    drafter.match_scale(5.0)
    accuracy = [[0.3, 0.2, 0.1, 0.05], [0.25, 0.2, 0.1], [0.2, 0.1]]
    rows, tau = recorded(target, drafter, StaticGrower(build_template(accuracy, num_nodes)))
    monkeypatch.setattr("amphista.train.replay.ranked", lambda _: ranked(accuracy))  # not fitted to these rows
    result = validate(drafter, rows, HiddenStates(target, rows, None), LossConfig(), tree_sizes=[num_nodes])
    assert result.tau[num_nodes] == pytest.approx(tau, abs=1e-9)


# -- the trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(target):
    """Answers the tiny target really gives, as lines of a file."""
    lines = []
    for i in range(40):
        prompt = [(31 * i + j) % 250 for j in range(4)]
        sequence = decode(Engine(target, _none(), parse_tree(1)), prompt, SamplingParams(max_new_tokens=10 + i % 7))
        lines.append({"id": f"p{i}", "prompt_ids": prompt, "answer_ids": sequence.output_ids, "temperature": 0.0})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def data_file(tmp_path, answers):
    path = tmp_path / "answers.jsonl"
    path.write_text(answers)
    return path


def _none():
    from amphista.drafter.proposer import Proposer

    return Proposer()


def config_for(data_file, **changes):
    values = dict(
        drafter="amphista",
        model={"num_heads": 3, "draft_vocab": 150},
        data=DataConfig(files=(str(data_file),), validation_share=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-3, batch_size=4, epochs=3, warmup_steps=2),
        log_every=1,
        save_every=5,
    )
    return TrainConfig(**{**values, **changes})


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def losses_of(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    ("kind", "store"),
    [("amphista", False), ("amphista", True), ("medusa", True), ("eagle", False), ("falcon", True), ("bita", True)],
)
def test_resumed_run_equals_uninterrupted_run(target, data_file, tmp_path, kind, store):
    config = config_for(
        data_file,
        drafter=kind,
        data=DataConfig(files=(str(data_file),), validation_share=0.2, store=store),
    )
    whole = Trainer(target, config, tmp_path / "whole" / "run", lambda line: None)
    whole.run()
    cut = tmp_path / "cut" / "run"
    Trainer(target, config, cut, lambda line: None).run(stop_after=8)  # killed three steps after a save
    resumed = Trainer(target, config, cut, lambda line: None)
    resumed.run()
    for name, tensor in weights_of(tmp_path / "whole" / "run" / "last").items():
        assert torch.equal(tensor, weights_of(cut / "last")[name]), name
    for name, parameter in whole.drafter.state_dict().items():
        assert torch.equal(parameter, resumed.drafter.state_dict()[name]), name
    assert losses_of(tmp_path / "whole" / "run") == losses_of(cut) and len(losses_of(cut)) == whole.num_steps


def test_a_run_killed_after_its_last_step_takes_no_other(target, data_file, tmp_path, monkeypatch):
    """Killed while it calibrated: the state is that of the last step, and there are more batches in the epoch."""
    steps = OptimizerConfig(batch_size=4, epochs=2, max_steps=3, warmup_steps=1)
    config = config_for(data_file, optimizer=steps, save_every=3)
    with monkeypatch.context() as patch:
        patch.setattr("amphista.train.results.calibrate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Trainer(target, config, tmp_path / "run", lambda line: None).run()
    assert not (tmp_path / "run" / "last").exists()
    resumed = Trainer(target, config, tmp_path / "run", lambda line: None)
    resumed.run()
    whole = Trainer(target, config, tmp_path / "whole", lambda line: None)
    whole.run()
    assert resumed.progress.step == whole.progress.step == 3 and len(losses_of(tmp_path / "run")) == 3
    for name, tensor in weights_of(tmp_path / "whole" / "last").items():
        assert torch.equal(tensor, weights_of(tmp_path / "run" / "last")[name]), name


@pytest.mark.parametrize(
    ("kind", "model", "rate", "share"),
    [
        ("amphista", {}, 3e-3, 0.8),
        ("amphista", {"taps": [1, 2]}, 3e-3, 0.8),
        ("bita", {"prefix_len": 4}, 2e-2, 0.97),
        ("early-exit", {"exit_layer": 1}, 1e-2, 0.9),
    ],
    ids=["amphista", "taps", "bita", "early-exit"],
)
def test_training_lowers_the_loss_and_ships_a_working_drafter(target, data_file, tmp_path, kind, model, rate, share):
    config = config_for(
        data_file,
        drafter=kind,
        model={"num_heads": 3, "draft_vocab": 150, **model},
        optimizer=OptimizerConfig(learning_rate=rate, batch_size=4, epochs=12, warmup_steps=2),
    )
    folder = Trainer(target, config, tmp_path / "run", lambda line: None).run()
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-5:]) < share * sum(losses[:5])
    for where in (folder, tmp_path / "run" / "best"):
        drafter = load_drafter(str(where), target.spec, target.shared, target.fingerprint)
        assert drafter.taps == tuple(model.get("taps", ()))
        prompt = [31, 32, 33, 34]
        params = SamplingParams(max_new_tokens=12)
        expected = decode(Engine(target, _none(), parse_tree(1)), prompt, params).output_ids
        assert decode(Engine(target, drafter, parse_tree(12)), prompt, params).output_ids == expected
    card = (folder / "README.md").read_text()
    assert "base_model" in card and "tau" in card


# -- one step, however it is split ------------------------------------------------------------------------------------


def gradients_of(trainer, rows):
    """(what the step logs, the gradient it leaves)."""
    sums = trainer._gradient(rows)
    found = {name: p.grad.clone() for name, p in trainer.drafter.named_parameters()}
    trainer.optimizer.zero_grad()
    return sums, found


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("amphista", LossConfig()),
        ("amphista", LossConfig(accept_until_fail=True, depth_decay=0.7)),
        ("falcon", LossConfig(accept_until_fail=True)),
    ],
)
def test_a_step_in_parts_is_the_step_of_its_batch(target, data_file, tmp_path, parts, kind, loss):
    """Parts of unequal answers, some without a row at all, give the loss and the gradient of the batch at once."""
    whole, split = (
        Trainer(
            target,
            config_for(data_file, drafter=kind, loss=loss, optimizer=OptimizerConfig(batch_size=5, accumulate=count)),
            tmp_path / str(count),
            lambda line: None,
        )
        for count in (1, parts)
    )
    rows = whole.parts.data.rows[:5]
    assert len({row.num_answer_tokens for row in rows}) > 2
    shaken(whole.drafter, scale=0.02), shaken(split.drafter, scale=0.02)
    (sums, expected), (in_parts, found) = gradients_of(whole, rows), gradients_of(split, rows)
    torch.testing.assert_close(in_parts.loss(loss), sums.loss(loss), rtol=1e-5, atol=0)
    assert torch.equal(in_parts.aims, sums.aims) and torch.equal(in_parts.counted, sums.counted)
    assert loss.accept_until_fail == bool((sums.counted < sums.aims).any())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-4 * float(gradient.norm()), name


def test_a_step_s_gradient_is_that_of_its_loss(target, data_file, tmp_path):
    """Sums first, one division behind: the same as differentiating the mean."""
    trainer = Trainer(target, config_for(data_file), tmp_path, lambda line: None)
    rows = trainer.parts.data.rows[:4]
    _, found = gradients_of(trainer, rows)
    batch = batch_for(target, rows)
    sums = HeadLoss(trainer.drafter, LossConfig())(batch.hidden, batch.next_ids, batch.answer_rows)
    sums.loss(LossConfig()).backward()
    for name, parameter in trainer.drafter.named_parameters():
        assert float((found[name] - parameter.grad).norm()) <= 1e-4 * float(parameter.grad.norm()), name


def test_a_run_may_go_on_in_other_parts(target, data_file, tmp_path):
    """Parts are a matter of memory: whoever ran out of it at step 8 goes on with smaller ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(target, config_for(data_file), tmp_path, lambda line: None).run(stop_after=8)
    steps = OptimizerConfig(learning_rate=3e-3, batch_size=4, epochs=3, warmup_steps=2, accumulate=2)
    Trainer(target, config_for(data_file, optimizer=steps, tensorboard=True), tmp_path, lambda line: None).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    wanted = {
        record["step"]: record["loss"] for record in logged if "loss" in record and record["step"] > 5
    }  # the saved state's
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(wanted)
    assert {"validation/tau/4", "head_loss/1", "learning_rate"} <= set(events.Tags()["scalars"])


def test_records_become_named_numbers():
    record = {"step": 3, "loss": 1.5, "validation": {"tau": {4: 1.25}, "top": [[0.5], [0.25]]}, "note": "text"}
    found = {"step": 3.0, "loss": 1.5, "validation/tau/4": 1.25, "validation/top/1/1": 0.5, "validation/top/2/1": 0.25}
    assert dict(scalars(record)) == found


# -- what a row can do to a run ---------------------------------------------------------------------------------------


def poisoned_model(target, token, value):
    """The target, with a state of `value` wherever it reads `token`."""
    compute = target.hidden_states

    def hidden_states(ids, taps=()):
        states = compute(ids, taps).clone()
        states[ids == token] = value
        return states

    return hidden_states


def one_row_with(data_file, token):
    """Let one training row alone hold the token; returns its id."""
    lines = [json.loads(line) for line in data_file.read_text().splitlines()]
    for line in lines:
        line["prompt_ids"] = [1 if t == token else t for t in line["prompt_ids"]]
        line["answer_ids"] = [1 if t == token else t for t in line["answer_ids"]]
    lines[7]["answer_ids"][2] = token
    data_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines[7]["id"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_whose_hidden_states_are_not_finite_is_named(target, data_file, tmp_path, monkeypatch, value):
    name = one_row_with(data_file, 222)
    monkeypatch.setattr(target, "hidden_states", poisoned_model(target, 222, value))
    with pytest.raises(DataError, match=f"row '{name}': the target's hidden states hold NaN or infinity"):
        Trainer(target, config_for(data_file), tmp_path, lambda line: None).run()


def test_a_row_whose_loss_is_not_finite_is_named(target, data_file, tmp_path, monkeypatch):
    """Its hidden states are finite, but too large for the target's own softmax."""
    name = one_row_with(data_file, 222)
    trainer = Trainer(target, config_for(data_file), tmp_path, lambda line: None)
    before = {name: p.clone() for name, p in trainer.drafter.named_parameters()}
    monkeypatch.setattr(target, "hidden_states", poisoned_model(target, 222, 3e38))
    rows = next(rows for rows in trainer._batches() if name in [row.id for row in rows])
    monkeypatch.setattr(trainer, "_batches", lambda: iter([rows]))
    with pytest.raises(DataError, match=f"the loss is not finite for row '{name}': leave it out"):
        trainer.run()
    assert len(rows) > 1 and trainer.progress.step == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.drafter.named_parameters()), "a step was taken"


def test_weights_that_are_not_finite_are_named(target, data_file, tmp_path):
    trainer = Trainer(target, config_for(data_file), tmp_path, lambda line: None)
    with torch.no_grad():
        trainer.drafter.heads[1].linear.bias[0] = math.inf
    with pytest.raises(DataError, match=r"nor is the weight drafter\.heads\.1\.linear\.bias: lower"):
        trainer.run()


@pytest.mark.parametrize("temperature", [0.8, 1.5, 2.4])
def test_calibration_finds_the_temperature_that_made_the_text(temperature):
    """4000 labels drawn at a known temperature: the grid's best is within 0.15 of it (off with chance below 1e-4)."""
    logits = torch.randn(4000, 30) * 3
    labels = torch.multinomial(torch.softmax(logits / temperature, -1), 1).squeeze(-1)
    assert float(GRID[losses_by_temperature(logits, labels).argmin()]) == pytest.approx(temperature, abs=0.15)


def test_calibration_is_made_on_the_rows_it_is_for(target):
    """Greedy divisors from greedy rows; sampled ones from sampled rows, for a request temperature of 1."""
    drafter = drafter_for(target)
    rows = [TokenRow(str(i), str(i), [i, *ROW.token_ids], [0, *ROW.answers], 0.5 * (i % 2)) for i in range(6)]
    hidden = HiddenStates(target, rows, None)
    calibration, measured = calibrate(drafter, rows, hidden, LossConfig())
    assert calibration.greedy == head_temperatures(drafter, rows[::2], hidden)
    assert calibration.sampled == [t / 0.5 for t in head_temperatures(drafter, rows[1::2], hidden)]
    assert measured["greedy"]["positions"] == measured["sampled"]["positions"] == 3 * 7


@pytest.mark.parametrize("temperatures", [[1e-5, 1e-7], [1.0, 0.2, 0.2]])
def test_calibration_takes_answers_of_any_temperatures_in_any_order(target, temperatures):
    drafter = drafter_for(target)
    rows = [TokenRow(str(at), "a", ROW.token_ids, ROW.answers, at) for at in temperatures]
    hidden = HiddenStates(target, rows, None)
    found = [calibrate(drafter, some, hidden, LossConfig())[0].sampled for some in (rows, rows[::-1])]
    assert found[0] == found[1] and all(0.6 / 0.2 <= value <= 100 for value in found[0])


def test_a_draft_vocabulary_without_any_held_out_token_is_calibrated(target):
    drafter = drafter_for(target, draft_vocab=2)
    drafter.set_draft_ids(torch.tensor([1, 2]))
    assert 0 < calibrate(drafter, [ROW], HiddenStates(target, [ROW], None), LossConfig())[0].coverage < 0.01


def test_held_out_answers_of_one_token_are_refused_before_training(target, tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [{"id": str(i), "prompt_ids": PROMPT, "answer_ids": [9]} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="has a second token"):
        Trainer(target, config_for(path), tmp_path / "run", lambda line: None)


def test_a_store_without_its_states_is_filled_again(target, tmp_path):
    """Marks whose states are gone must not pass zeros for hidden states."""
    first = HiddenStates(target, [ROW], tmp_path).get([ROW])[0]
    next(tmp_path.glob("*/hidden.f16")).unlink()
    again = HiddenStates(target, [ROW], tmp_path).get([ROW])[0]
    torch.testing.assert_close(again, first.half().float(), atol=1e-3, rtol=1e-3)
    assert float(again.abs().sum()) > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("optimizer.bin", b"PK half"),
        ("scheduler.bin", None),
        ("progress.json", b'{"step": 4, "more": 1}'),
    ],
)
def test_a_state_that_is_damaged_is_said(target, data_file, tmp_path, name, content):
    run = tmp_path / "run"
    Trainer(target, config_for(data_file), run, lambda line: None).run(stop_after=5)
    (run / "state" / name).unlink()
    if content is not None:
        (run / "state" / name).write_bytes(content)
    with pytest.raises(DataError, match=r"state is damaged and cannot be resumed .* remove it to begin anew"):
        Trainer(target, config_for(data_file), run, lambda line: None).run()


def test_freed_memory_is_given_back_every_few_steps(target, data_file, tmp_path, monkeypatch):
    """Kept in between; of batches of every length it would grow for hours."""
    steps, trainer = [], Trainer(target, config_for(data_file), tmp_path, lambda line: None)
    monkeypatch.setattr("amphista.train.trainer.trim_allocator", lambda: steps.append(trainer.progress.step))
    monkeypatch.setattr("amphista.train.trainer.STEPS_TO_TRIM", 4)
    trainer.run(stop_after=11)
    assert steps == [4, 8]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\n{}\n[1]\n"])
def test_a_log_that_cannot_be_read_stops_no_run(target, data_file, tmp_path, content):
    run = tmp_path / "run"
    Trainer(target, config_for(data_file), run, lambda line: None).run(stop_after=5)
    (run / "log.jsonl").unlink()
    if content is not None:
        (run / "log.jsonl").write_bytes(content)
    Trainer(target, config_for(data_file), run, lambda line: None).run()
    assert min(json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()) > 1


def test_what_is_no_folder_where_a_drafter_goes_is_said_at_once(target, data_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").write_text("mine")
    with pytest.raises(ConfigError, match="last is there already and is no folder"):
        Trainer(target, config_for(data_file), tmp_path / "run", lambda line: None).run(stop_after=1)


def test_other_data_in_the_same_folder_is_refused(target, data_file, tmp_path):
    Trainer(target, config_for(data_file), tmp_path / "run", lambda line: None).run(stop_after=5)
    data_file.write_text("".join(data_file.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(ConfigError, match="rows_sha256 is"):
        Trainer(target, config_for(data_file), tmp_path / "run", lambda line: None).run()


def test_a_run_goes_on_with_a_target_of_its_own_type_only(data_file, tmp_path):
    """One fingerprint, two types: a run that went on would be half of each."""
    Trainer(tiny_target(), config_for(data_file), tmp_path / "run", lambda line: None).run(stop_after=5)
    other = tiny_target(dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"target\.type is bfloat16, there it is float32"):
        Trainer(other, config_for(data_file), tmp_path / "run", lambda line: None).run()


def test_two_runs_in_one_folder_are_refused(target, data_file, tmp_path):
    """The second one touches nothing."""
    first, second = (Trainer(target, config_for(data_file), tmp_path / "run", lambda line: None) for _ in range(2))
    refusals = []

    def interfere(step, of, line):
        if not refusals:
            with pytest.raises(ConfigError, match="another process is training into"):
                second.run()
            refusals.append(step)

    first.on_step = interfere
    first.run()
    assert refusals == [1]
    undisturbed = Trainer(target, config_for(data_file), tmp_path / "alone", lambda line: None)
    undisturbed.run()
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "alone")


def test_runs_side_by_side_do_not_touch_each_other_s_hidden_states(target, data_file, tmp_path):
    """Another run with fewer rows, begun in the middle of a stored one in a sibling folder, changes nothing of it."""
    stored = DataConfig(files=(str(data_file),), validation_share=0.2, store=True)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data_file.read_text().splitlines(keepends=True)[:12]))
    others = config_for(few, data=DataConfig(files=(str(few),), validation_share=0.3, store=True))
    begun = []

    def interfere(step, of, line):
        if not begun:
            begun.append(step)
            Trainer(target, others, tmp_path / "runs" / "other", lambda line: None).run()

    Trainer(target, config_for(data_file, data=stored), tmp_path / "runs" / "one", print, interfere).run()
    Trainer(target, config_for(data_file, data=stored), tmp_path / "alone" / "one", print).run()
    assert begun and losses_of(tmp_path / "runs" / "one") == losses_of(tmp_path / "alone" / "one")


def test_a_line_left_out_is_told_in_log_and_card(target, data_file, tmp_path):
    data_file.write_text(data_file.read_text() + '{"prompt_ids": [1], "answer_ids": []}\n')
    lines = []
    folder = Trainer(target, config_for(data_file), tmp_path / "run", lines.append).run()
    assert any("1 lines left out" in line and "line 41 has no answer tokens" in line for line in lines)
    record = json.loads((folder / "config.json").read_text())["training"]["data"]["left_out"]
    assert record == {"lines": 1, "first": ["answers.jsonl line 41 has no answer tokens"]}
    assert "1 lines of the data could not be used" in (folder / "README.md").read_text()


def test_the_validation_loss_is_a_mean_over_positions(target):
    """However rows of unequal answers fall into batches."""
    drafter = drafter_for(target)
    rows = [TokenRow(str(n), str(n), [3] * 4 + [9, 61] * n, [0] * 4 + [1] * 2 * n) for n in (1, 2, 3, 9)]
    hidden = HiddenStates(target, rows, None)
    once, apart = (validate(drafter, rows, hidden, LossConfig(), batch_size=size) for size in (4, 1))
    assert once.head_loss == pytest.approx(apart.head_loss, rel=1e-5) and once.loss == pytest.approx(
        apart.loss, rel=1e-5
    )
    batch = batch_for(target, rows)
    by_hand = HeadLoss(drafter, LossConfig())(batch.hidden, batch.next_ids, batch.answer_rows).per_head()
    assert once.head_loss == pytest.approx(by_hand.tolist(), rel=1e-5)


def test_a_card_may_be_worded_anew_in_mid_run(target, data_file, tmp_path):
    """Its settings touch no weight, so they are no reason to refuse a resume; the last wording is the card's."""
    Trainer(target, config_for(data_file), tmp_path / "run", lambda line: None).run(stop_after=5)
    card = CardConfig(license="mit", base_model="owner/target", datasets=("owner/answers",))
    folder = Trainer(target, config_for(data_file, card=card), tmp_path / "run", lambda line: None).run()
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    front_matter = read_front_matter(folder / "README.md")
    assert (front_matter["base_model"], front_matter["license"]) == ("owner/target", "mit")
    assert front_matter["datasets"] == ["owner/answers"] and front_matter["training_data"]["files"] == [data_file.name]


def test_a_cut_log_line_and_a_left_over_state_are_survived(target, data_file, tmp_path):
    config, run = config_for(data_file), tmp_path / "run"
    Trainer(target, config, run, lambda line: None).run(stop_after=5)
    with (run / "log.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    (run / ".old-state").mkdir()
    (run / ".old-state" / "left-over").write_text("")
    Trainer(target, config, run, lambda line: None).run()
    assert all(json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())


def test_calibration_is_honest(target, data_file, tmp_path):
    """Accuracies are probabilities, coverage is a share, temperatures are positive."""
    folder = Trainer(target, config_for(data_file), tmp_path / "run", lambda line: None).run()
    calibration = json.loads((folder / "config.json").read_text())["calibration"]
    assert all(0 <= sum(ranks) <= 1 + 1e-6 and min(ranks) >= 0 for ranks in calibration["accuracy"])
    assert 0 < calibration["coverage"] <= 1
    assert all(math.isfinite(t) and t > 0 for t in calibration["greedy"] + calibration["sampled"])


def test_other_settings_in_the_same_folder_are_refused(target, data_file, tmp_path):
    Trainer(target, config_for(data_file), tmp_path / "run", lambda line: None).run(stop_after=5)
    other = config_for(data_file, seed=1)
    with pytest.raises(ConfigError, match=r"another training run: config\.seed is 1, there it is 0"):
        Trainer(target, other, tmp_path / "run", lambda line: None).run()


def test_kill_between_old_and_new_state_is_survived(target, data_file, tmp_path):
    """Only the old state is left when a kill hits between the two renames: the run goes on from there."""
    config, run = config_for(data_file), tmp_path / "run"
    Trainer(target, config, run, lambda line: None).run(stop_after=5)
    shutil.move(run / "state", run / ".old-state")
    lines = []
    Trainer(target, config, run, lines.append).run()
    assert any("resuming at step 5" in line for line in lines)
