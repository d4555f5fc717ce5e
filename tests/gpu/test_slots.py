"""Slots on a GPU: the Triton kernels against torch, the recorded block against the engine. The laws themselves are in
tests/laws/test_slots.py, where the same block runs on a CPU; these need a GPU:

pytest tests/gpu
"""

from __future__ import annotations

import pytest
import torch

from amphista.engine.slot_batch import SlotBatch
from amphista.engine.slots import has_slots
from amphista.kernels import slot_kernels
from amphista.target.target import Target
from tests.laws.test_slots import answered, by_engine, jobs
from tests.tiny import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (4, 4, 16), (8, 1, 128)])
def test_attention_is_that_of_torch(dtype, heads, key_heads, size):
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([0, 1, 63, 64, 65, 130, 299])
    rows = torch.randn(len(lengths), heads + 2 * key_heads, size, generator=draw).to(dtype)
    cached = torch.randn(2, len(lengths), key_heads, 300, size, generator=draw).to(dtype)
    queries, keys, values = rows.cuda().split_with_sizes((heads, key_heads, key_heads), 1)
    ours = [part.cuda() for part in cached]
    mixed = slot_kernels.attend(queries * 0.2, (keys, values), (ours[0], ours[1]), lengths.cuda())
    wide = [part.double() for part in cached]
    scaled = (queries * 0.2).cpu().double()
    expected = slot_kernels.attend(scaled, (keys.cpu().double(), values.cpu().double()), (wide[0], wide[1]), lengths)
    assert (mixed.cpu().double() - expected).abs().max() < ROUNDING[dtype] * expected.abs().max()
    for mine, theirs in zip(ours, wide, strict=True):
        assert torch.equal(mine.cpu().double(), theirs)  # the new rows, and no other, are written


def test_choice_is_that_of_torch():
    draw = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(64, 5003, generator=draw)
    heat = torch.tensor([0.0, 0.7, 1.0, 2.0]).repeat(16)
    seeds, positions = torch.arange(64) * 7919 - 2**62, torch.arange(64) * 31
    ours = slot_kernels.choose(logits.cuda(), heat.cuda(), seeds.cuda(), positions.cuda())
    assert ours.tolist() == slot_kernels.choose(logits, heat, seeds, positions).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_slots_answer_as_the_engine_does(family, temperature):
    target = Target(tiny_model(family, hidden_size=64, head_dim=16).cuda(), name=family)
    assert target.speed_up(), target.why_stock
    assert has_slots(target.lean)
    together = answered(SlotBatch(target.lean, target.eos_ids, 5, 96), jobs(40, temperature))
    alone = answered(SlotBatch(target.lean, target.eos_ids, 1, 96), jobs(40, temperature))
    assert together == alone
    if temperature == 0:
        assert together == by_engine(target, jobs(40))
