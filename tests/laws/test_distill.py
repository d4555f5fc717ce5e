"""Distillation: a killed and resumed run, or one shared by several processes, holds the rows of the uninterrupted one,
each once; its answers are the target's own to the prompts as rendered; and what training reads from it is what it would
make of the same conversations itself.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from amphista.drafter.proposer import Proposer
from amphista.engine.loops import loop_free_length
from amphista.engine.params import SamplingParams
from amphista.engine.slot_batch import SlotBatch
from amphista.engine.step import Engine
from amphista.errors import ConfigError, TargetError
from amphista.train import distill
from amphista.train.conversations import load_conversations
from amphista.train.distill import DistillConfig, Distiller, Share, chance
from amphista.train.distilled import AnswerFile, read_answered, read_folder, read_run
from amphista.train.prompts import read_rows
from amphista.tree.grow import parse_tree
from tests.decoding import decode
from tests.talkative import asked, talkative_target
from tests.tiny import EOS, tiny_target

CONFIG = DistillConfig(max_new_tokens=20, max_len=400, batch_size=4, seed=3)


@pytest.fixture(scope="module")
def target():
    return talkative_target()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in asked(40, turns=3)))
    return load_conversations([str(path)])


@pytest.fixture(scope="module")
def whole(target, prompts, tmp_path_factory):
    """The uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole")
    Distiller(target, CONFIG, prompts, out).run()
    return out


def settings_of(name, turn):
    is_sampled = chance(CONFIG.seed, name, "sampled?") / 2**64 < CONFIG.sampled_share
    seed = chance(CONFIG.seed, name, turn)
    return SamplingParams(max_new_tokens=20, temperature=0.7 * is_sampled, seed=seed)


# -- what the rows are ------------------------------------------------------------------------------------------------


def test_every_answer_is_the_target_s_own_to_the_conversation_so_far(target, prompts, whole):
    """Turn by turn with the plain engine on rendered messages; somebody else's answers are nowhere."""
    engine, text = Engine(target, Proposer(), parse_tree(1)), target.text
    answered = {one.id: one for one in read_answered(whole)}
    assert answered.keys() == prompts.conversations.keys()
    counts = {"stop": 0, "length": 0, "loop": 0, "later": 0}
    for name, messages in prompts.conversations.items():
        history, expected, finish = [], [], []
        for message in messages:
            history.append(message)
            if message["role"] != "user" or (finish and finish[-1] != "stop"):
                continue
            prompt = text.render(history)
            sequence = decode(engine, prompt, settings_of(name, len(finish)))
            ids, reason = sequence.output_ids, sequence.finish_reason.value
            looped = [n for n in range(1, len(ids) + 1) if loop_free_length(ids[:n]) < n]
            if looped and not (reason == "stop" and looped[0] == len(ids)):
                ids, reason = ids[: loop_free_length(ids[: looped[0]])], "loop"
            expected.append((prompt, ids))
            finish.append(reason)
            history.append({"role": "assistant", "content": text.decode(ids)})
        (row,) = answered[name].rows
        assert row.token_ids == expected[-1][0] + expected[-1][1]
        for number, (prompt, ids) in enumerate(expected, start=1):
            assert row.token_ids[: len(prompt)] == prompt
            marked = [index for index, mark in enumerate(row.answers) if mark == number]
            assert marked == list(range(len(prompt), len(prompt) + len(ids)))
        assert row.num_answer_tokens == sum(len(ids) for _, ids in expected)
        assert answered[name].finish == tuple(finish)
        for reason in finish:
            counts[reason] += 1
        counts["later"] += len(finish) - 1
        assert "Somebody" not in text.decode(row.token_ids)
    assert counts["stop"] >= 10 and counts["length"] >= 2 and counts["later"] >= 5, counts


def test_greedy_and_sampled_are_mixed(whole):
    temperatures = [row.temperature for row in read_folder(whole)]
    assert {0.0, 0.7} == set(temperatures) and 10 <= sum(t > 0 for t in temperatures) <= 30


def test_rows_are_what_training_makes_of_the_same_conversations(target, prompts, whole, tmp_path):
    """Where every answer ended by itself: the conversation as text, rendered and marked by train/prompts.py."""
    lines, names = [], set()
    for one in read_answered(whole):
        if set(one.finish) != {"stop"}:
            continue
        (row,) = one.rows
        messages, turn = [], 0
        for message in prompts.conversations[one.id]:
            messages.append(message)
            if message["role"] == "user":
                turn += 1
                said = [t for t, mark in zip(row.token_ids, row.answers, strict=True) if mark == turn]
                messages.append({"role": "assistant", "content": target.text.decode(said)})
        lines.append({"id": one.id, "messages": messages})
        names.add(one.id)
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = dict(vocab_size=300, max_len=400)
    rendered = {row.id: row for row in read_rows([path], target.text, {EOS}, **options)}
    ours = read_rows([whole], target.text, {EOS}, fingerprint=target.fingerprint, **options)
    assert len(rendered) >= 10 and any(max(row.answers) > 1 for row in rendered.values())
    for row in ours:
        if row.id in names:
            assert dataclasses.replace(row, temperature=None) == rendered[row.id]


def test_a_template_that_rewrites_history_makes_rows_of_their_own(prompts, tmp_path):
    from tests.laws.test_next_turn import FORGETFUL

    target = talkative_target()
    target.text.tokenizer.chat_template = FORGETFUL
    Distiller(target, dataclasses.replace(CONFIG, limit=None), prompts, tmp_path).run()
    several = [one for one in read_answered(tmp_path) if len(one.finish) > 1]
    assert several
    for one in several:
        assert [row.id for row in one.rows] == [one.id, *(f"{one.id}/{i}" for i in range(1, len(one.finish)))]
        assert all(max(row.answers) == 1 for row in one.rows)


def test_answers_that_are_not_text_stay_as_they_were_chosen(prompts, tmp_path):
    """Random bytes come back as other tokens when the next turn is rendered: the row ends, the ids are the target's."""
    target = tiny_target(with_text=True, dtype=torch.float64)
    config = dataclasses.replace(CONFIG, max_new_tokens=12, cut_loops=False)
    engine = Engine(target, Proposer(), parse_tree(1))
    end = {97, 120, 200, 14, 33, 250, 5, 61}  # tokens that end an answer, so that later turns come about
    target.eos_ids = frozenset(end)
    Distiller(target, config, prompts, tmp_path).run()
    split = [one for one in read_answered(tmp_path) if len(one.rows) > 1]
    assert split, "every answer survived: the test would be vacuous"
    for row in split[0].rows:
        spans = [i for i, mark in enumerate(row.answers) if mark]
        turn = split[0].rows.index(row)
        params = dataclasses.replace(settings_of(split[0].id, turn), max_new_tokens=12)
        assert decode(engine, row.token_ids[: spans[0]], params).output_ids == [row.token_ids[i] for i in spans]


# -- killed, resumed, shared ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it on the way out, as nothing catches a kill."""


def everything(folder):
    return {one.id: one for one in read_answered(folder)}


@pytest.mark.parametrize("kills", [[1], [6, 9], [7], [3, 20, 2]])
def test_a_resumed_run_equals_the_uninterrupted_one(target, prompts, whole, tmp_path, monkeypatch, kills):
    add = AnswerFile.add
    for after in kills:
        added = []

        def dying(store, answered, after=after, added=added):
            if len(added) == after:
                raise Killed
            added.append(answered.id)
            add(store, answered)

        monkeypatch.setattr(AnswerFile, "add", dying)
        before = everything(tmp_path) if any(tmp_path.iterdir()) else {}
        with pytest.raises(Killed):
            Distiller(target, CONFIG, prompts, tmp_path).run()
        assert everything(tmp_path).keys() == {*before, *added} and len(everything(tmp_path)) == len(before) + after
    monkeypatch.undo()
    summary = Distiller(target, CONFIG, prompts, tmp_path).run()
    assert everything(tmp_path) == everything(whole)
    assert summary["conversations"] == 40 and summary["decoded_tokens"] > 0
    lines = (tmp_path / "rows-0.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 40


def test_a_torn_line_is_answered_again(target, prompts, whole, tmp_path, monkeypatch):
    add = AnswerFile.add

    def dying(store, answered):
        add(store, answered)
        if len(store.done) == 5:
            raise Killed

    monkeypatch.setattr(AnswerFile, "add", dying)
    with pytest.raises(Killed):
        Distiller(target, CONFIG, prompts, tmp_path).run()
    monkeypatch.undo()
    file = tmp_path / "rows-0.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert len(everything(tmp_path)) == 4
    Distiller(target, CONFIG, prompts, tmp_path).run()
    assert everything(tmp_path) == everything(whole)


def test_shares_together_are_the_run_of_one(target, prompts, whole, tmp_path):
    for index in range(3):
        Distiller(target, CONFIG, prompts, tmp_path, share=Share(index, 3)).run()
    assert everything(tmp_path) == everything(whole)
    assert {path.name for path in tmp_path.glob("rows-*")} == {"rows-0.jsonl", "rows-1.jsonl", "rows-2.jsonl"}


def test_batch_size_and_limit_change_no_answer_and_a_run_can_be_extended(target, prompts, whole, tmp_path):
    few = dataclasses.replace(prompts, conversations=dict(list(prompts.conversations.items())[:11]))
    Distiller(target, dataclasses.replace(CONFIG, limit=11, batch_size=3), few, tmp_path).run()
    assert len(everything(tmp_path)) == 11
    Distiller(target, dataclasses.replace(CONFIG, batch_size=9), prompts, tmp_path).run()
    assert everything(tmp_path) == everything(whole)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed is 4, there it is 3"),
        ({"max_new_tokens": 21, "temperature": 0.8}, "max_new_tokens is 21, there it is 20; temperature is 0.8"),
    ],
)
def test_another_configuration_is_refused(target, prompts, whole, changes, message):
    with pytest.raises(ConfigError, match=message):
        Distiller(target, dataclasses.replace(CONFIG, **changes), prompts, whole).run()


def test_another_target_other_prompts_and_another_number_of_processes_are_refused(target, prompts, whole):
    with pytest.raises(ConfigError, match="processes is 2, there it is 1"):
        Distiller(target, CONFIG, prompts, whole, share=Share(1, 2)).run()
    with pytest.raises(ConfigError, match="lm_head_sha256"):
        Distiller(tiny_target("phi3", with_text=True, dtype=torch.float64), CONFIG, prompts, whole).run()
    others = dataclasses.replace(prompts, sources={"prompts.jsonl": "0" * 64})
    with pytest.raises(ConfigError, match=r"prompts.prompts.jsonl is 0+\.\.\., there it is"):
        Distiller(target, CONFIG, others, whole).run()


def test_two_runs_of_one_process_at_once_are_refused(target, prompts, tmp_path):
    distiller = Distiller(target, CONFIG, prompts, tmp_path)
    with (
        AnswerFile(tmp_path, 0, distiller._run_record()),
        pytest.raises(ConfigError, match="another process is distilling"),
    ):
        distiller.run()


def test_what_cannot_be_answered_is_skipped_with_its_reason(target, tmp_path):
    lines = [
        {"id": "long", "prompt": "word " * 90},
        {"id": "tool", "messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]},
        {"id": "later", "turns": ["short", "word " * 90]},
        {"id": "good", "prompt": "Hello"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    asked_for = load_conversations([str(tmp_path / "p.jsonl")])
    summary = Distiller(target, CONFIG, asked_for, out).run()
    assert summary["skipped"] == {"longer than 380 tokens": 1, "has a turn of the role 'tool'": 1}
    assert summary["conversations"] == 2 and {row.id for row in read_folder(out)} == {"later", "good"}
    again = Distiller(target, CONFIG, asked_for, out).run()
    assert again["decoded_tokens"] == 0 and again["skipped"] == summary["skipped"]


def test_a_target_that_cannot_hold_conversations_is_refused(prompts, tmp_path):
    with pytest.raises(TargetError, match="has no chat template"):
        Distiller(tiny_target(), CONFIG, prompts, tmp_path)
    with pytest.raises(ConfigError, match="context holds 512"):
        Distiller(talkative_target(), dataclasses.replace(CONFIG, max_new_tokens=512, max_len=600), prompts, tmp_path)


def test_run_json_says_how_the_rows_came_about(target, whole):
    run = read_run(whole)
    assert run["chat_template"] == target.text.tokenizer.chat_template and run["target"] == "talkative"
    assert run["config"]["sampled_share"] == 0.5 and run["identity"]["target"]["family"] == "phi"
    assert run["identity"]["target"]["type"] == "float64"
    assert {"versions", "machine", "command"} <= run["provenance"].keys()
    assert json.loads((whole / "summary-0.json").read_text())["conversations"] == 40


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def test_slots_answer_conversations_as_the_engine_does(prompts, tmp_path, monkeypatch):
    """Turns, ends and loops: greedy conversations are the same rows; sampled ones have other noise."""
    target = tiny_target("llama", with_text=True, dtype=torch.float64)
    assert target.speed_up(), target.why_stock
    Distiller(target, CONFIG, prompts, tmp_path / "engine").run()
    monkeypatch.setattr(distill, "has_slots", lambda model: True)
    distiller = Distiller(target, CONFIG, prompts, tmp_path / "slots")
    assert isinstance(distiller._batch, SlotBatch)
    distiller.run()
    ours, theirs = ({one.id: one for one in read_answered(tmp_path / by, 0)} for by in ("slots", "engine"))
    greedy = [name for name, one in theirs.items() if not one.temperature]
    assert ours.keys() == theirs.keys() and 10 < len(greedy) < len(theirs)
    assert [ours[name] for name in greedy] == [theirs[name] for name in greedy]
    assert [name for name in theirs if not ours[name].temperature] == greedy
