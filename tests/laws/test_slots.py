"""Slots decode what their prompts alone decode: any number at a time, places filled anew, loops cut where the engine
cuts them; sampled as the same noise chooses. On a CPU, where the recorded block runs as it is; on a GPU: tests/gpu."""

from __future__ import annotations

import pytest
import torch

from amphista.drafter.proposer import Proposer
from amphista.engine import slot_batch, slots
from amphista.engine.batch import Batch, Job
from amphista.engine.params import SamplingParams
from amphista.engine.slot_batch import SlotBatch
from amphista.engine.step import Engine
from amphista.errors import CapacityError, CaptureError
from amphista.kernels.slot_kernels import choose
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from tests.tiny import tiny_model

PROMPTS = [[5, 17, 230, 44, 9], [7], [3, 3, 3], list(range(40, 61)), [100, 2], [9, 8, 7, 6], [211] * 9]


def fast_target(family="llama"):
    target = Target(tiny_model(family).double(), name=family)
    assert target.speed_up(), target.why_stock
    return target


def jobs(num_tokens, temperature=0.0, cut_loops=True):
    return [
        Job(
            prompt,
            SamplingParams(max_new_tokens=num_tokens + i, temperature=temperature, seed=i),
            i,
            cut_loops=cut_loops,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def answered(batch, asked, follow_ups=0):
    found, left = {}, [follow_ups]

    def follow(job, output_ids, reason):
        found[job.tag] = output_ids, reason
        if not left[0] or isinstance(job.tag, tuple):
            return None
        left[0] -= 1
        return Job(job.prompt_ids + output_ids + [4], job.params, (job.tag, "next"), cut_loops=job.cut_loops)

    for _ in batch.run(iter(asked), follow):
        pass
    return found


def by_engine(target, asked):
    batch = Batch(Engine(target, Proposer(), parse_tree(1)), 2)
    return {one.job.tag: (one.sequence.output_ids, one.sequence.finish_reason) for one in batch.run(asked)}


@pytest.mark.parametrize("num_slots", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "granite", "phi3-half"])
def test_slots_answer_as_the_engine_does(family, num_slots):
    target = fast_target(family)
    ours = answered(SlotBatch(target.lean, target.eos_ids, num_slots, 96), jobs(40))
    assert ours == by_engine(target, jobs(40))
    assert len({reason for _, reason in ours.values()}) > 1


def test_a_next_turn_takes_the_place_of_the_one_it_follows():
    target = fast_target()
    ours = answered(SlotBatch(target.lean, target.eos_ids, 2, 96), jobs(10), follow_ups=3)
    assert sum(isinstance(tag, tuple) for tag in ours) == 3
    firsts = by_engine(target, jobs(10))
    for tag, result in ours.items():
        if isinstance(tag, tuple):
            first = firsts[tag[0]][0]
            job = Job(PROMPTS[tag[0]] + first + [4], jobs(10)[tag[0]].params, tag, cut_loops=True)
            assert by_engine(target, [job])[tag] == result


def test_sampled_answers_depend_on_seed_and_prompt_alone():
    target = fast_target()
    together = answered(SlotBatch(target.lean, frozenset(), 16, 96), jobs(30, 0.8, cut_loops=False))
    alone = answered(SlotBatch(target.lean, frozenset(), 1, 96), jobs(30, 0.8, cut_loops=False))
    assert together == alone
    ids = torch.tensor([PROMPTS[3] + together[3][0]])
    logits = target.lean.logits(target.hidden_states(ids))[0]
    length = len(PROMPTS[3])
    positions = torch.arange(length, ids.shape[1])
    heat = torch.full((len(positions),), 0.8)
    chosen = choose(logits[length - 1 : -1], heat, torch.full_like(positions, 3), positions)
    assert chosen.tolist() == together[3][0]


def test_noise_gives_each_token_its_probability():
    num = 200_000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    chosen = choose(logits.expand(num, 4), torch.full((num,), 0.5), torch.full((num,), 7), torch.arange(num))
    shares = torch.bincount(chosen, minlength=4) / num
    assert torch.allclose(shares, torch.softmax(logits[0] / 0.5, 0), atol=0.004)
    assert choose(logits.expand(9, 4), torch.zeros(9), torch.arange(9), torch.arange(9)).tolist() == [2] * 9


def test_fewer_slots_where_memory_is_short(monkeypatch):
    target = fast_target()
    monkeypatch.setattr(slot_batch, "free_bytes", lambda device: 3_000_000)
    ours = answered(SlotBatch(target.lean, target.eos_ids, 16, 96), jobs(20))
    assert ours == by_engine(target, jobs(20))
    monkeypatch.setattr(slot_batch, "free_bytes", lambda device: 1000)
    with pytest.raises(CapacityError, match="smaller max_len"):
        SlotBatch(target.lean, target.eos_ids, 16, 96)


def test_only_models_of_plain_causal_rows_have_slots():
    assert not slots.has_slots(None)
    assert not slots.has_slots(fast_target().lean)  # not on CUDA


def test_a_block_that_cannot_be_recorded_is_run_as_it_is(monkeypatch):
    def refuse(recorder, run):
        run()  # warming up has moved everything on by then
        raise CaptureError("no room")

    monkeypatch.setattr(slots.Recorder, "record", refuse)
    target = fast_target()
    with pytest.warns(RuntimeWarning, match="without a captured graph, slower: no room"):
        ours = answered(SlotBatch(target.lean, target.eos_ids, 3, 96), jobs(20))
    assert ours == by_engine(target, jobs(20))
