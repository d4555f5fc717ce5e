"""engine/loops.py: the loop-free prefix against a slow reference, and the steps that lead to its end."""

from __future__ import annotations

import random

import pytest

from amphista.engine.loops import LoopWatch, loop_free_length, steps_within


def slowly(ids):
    for start in range(len(ids)):
        for span in range(1, 65):
            times = 1
            while ids[start + times * span : start + (times + 1) * span] == ids[start : start + span]:
                times += 1
            if times >= 3 and times * span >= 24 and len(ids[start : start + span]) == span:
                return start + span
    return len(ids)


def test_examples():
    assert loop_free_length([1, 2, 3]) == 3
    assert loop_free_length([7] * 23) == 23
    assert loop_free_length([7] * 24) == 1
    assert loop_free_length([1, 2, 3] + [4, 5, 6, 7, 8, 9, 10, 11] * 3) == 11
    assert loop_free_length([1, 2, 3] + [4, 5, 6, 7, 8, 9, 10, 11] * 2 + [4, 5, 6]) == 22
    assert loop_free_length(list(range(65)) * 3) == 195


@pytest.mark.parametrize("seed", range(60))
def test_equals_slow_reference(seed):
    source = random.Random(seed)
    ids = [source.randrange(3) for _ in range(source.randrange(40))]
    span = [source.randrange(3) for _ in range(source.randrange(1, 70))]
    ids += span * source.randrange(1, 6) + [source.randrange(3) for _ in range(source.randrange(20))]
    assert loop_free_length(ids) == slowly(ids)


def test_a_step_across_the_edge_counts():
    assert steps_within([2, 0, 3], 1) == 0
    assert steps_within([2, 0, 3], 2) == steps_within([2, 0, 3], 4) == 1
    assert steps_within([2, 0, 3], 5) == 2
    assert steps_within([2, 0, 3], 6) == steps_within([2, 0, 3], 9) == 3
    assert steps_within([2, 0, 3], 3, prefill_tokens=3) == 0
    assert steps_within([2, 0, 3], 6, prefill_tokens=3) == 1


@pytest.mark.parametrize("seed", range(40))
def test_the_watch_sees_a_loop_at_its_first_token(seed):
    source = random.Random(seed)
    ids = [source.randrange(4) for _ in range(source.randrange(30))]
    ids += [source.randrange(300) for _ in range(source.randrange(1, 66))] * source.randrange(1, 26)
    watch = LoopWatch()
    seen = [watch.push(token) for token in ids]
    looped = [loop_free_length(ids[:n]) < n for n in range(1, len(ids) + 1)]
    first = looped.index(True) if True in looped else len(ids)
    assert seen[: first + 1] == looped[: first + 1]
