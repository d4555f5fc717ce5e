from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from amphista.accept.chooser import Chooser
from amphista.cache.static import KVCache
from amphista.engine.loops import LoopWatch
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.prefixes import taken_over
from amphista.engine.sequence import Sequence, whole_step
from amphista.engine.sequence_cache import SequenceCache, Unfed
from amphista.errors import CapacityError
from amphista.target.text import IncrementalText, Text
from tests.tiny import EOS, byte_tokenizer

PROMPT = [1, 2, 3]


class Nothing:
    """A target of which rows only want caches."""

    def new_cache(self):
        return KVCache(1)

    def copy_rows(self, source, to, num_rows):
        to.take_copy(source, num_rows)


def filled(rows, num_rows):
    """The same rows, so many of them."""
    size = num_rows - rows.cache.num_committed
    rows.cache.layers[0].append(torch.zeros(1, 1, size, 2), torch.zeros(1, 1, size, 2))
    rows.cache.commit(range(size))
    return rows


def sequence(*, max_new_tokens=10, max_positions=100, stop=(), penalty=1.0, prompt=PROMPT):
    params = SamplingParams(max_new_tokens=max_new_tokens, stop=stop, repetition_penalty=penalty)
    token_ids = list(prompt)
    return Sequence(
        token_ids=token_ids,
        num_prompt=len(token_ids),
        params=params,
        chooser=Chooser(params, prompt),
        end_ids=frozenset([EOS]),
        max_positions=max_positions,
        rows=filled(SequenceCache(Nothing(), None, token_ids), len(token_ids)),
        stops=IncrementalText(Text(byte_tokenizer()), stop) if stop else None,
    )


def take(found, tokens):
    """As the engine does; returns how many were taken."""
    ending = found.ending(tokens)
    found.take(tokens[: ending.num_taken], ending)
    return ending.num_taken


@pytest.mark.parametrize(
    ("prompt", "keep"),
    [
        ([1, 2, 3, 4, 5, 6, 7], 4),  # 5 rows are cached, and the drafter's row 5 was made with the pending token 6
        ([1, 2, 3, 4, 9], 3),
        ([1, 2, 3, 4, 5], 4),  # the last prompt token is read again
        ([1, 2, 3], 2),
        ([9, 2, 3], 0),
        ([1], 0),
    ],
)
@pytest.mark.parametrize("is_copy", [False, True])
def test_what_is_taken_over_is_the_common_prefix_but_one(prompt, keep, is_copy):
    rows = filled(SequenceCache(Nothing(), None, [1, 2, 3, 4, 5, 6]), 5)
    found = sequence(prompt=prompt)
    found.release()
    found.adopt(replace(taken_over(rows, found.token_ids), is_copy=is_copy))
    assert found.rows.cache.num_committed == found.rows.cache.num_rows == found.rows.num_rows == keep
    assert found.rows.token_ids is found.token_ids and found.num_unread == len(prompt) - keep
    assert rows.cache.num_committed == (5 if is_copy else keep)


def test_ids_that_were_never_cached_are_not_trusted():
    """A broken-off step may have left ids without rows."""
    rows = filled(SequenceCache(Nothing(), None, [1, 2, 3, 4, 5, 6]), 2)
    assert taken_over(rows, [1, 2, 3, 4, 5, 6, 7]).num_rows == 1


def test_what_is_left_to_read():
    found = sequence()
    assert found.num_unread == 0 and found.num_left == 10 and not found.is_finished
    take(found, [7, 8])
    filled(found.rows, 4)
    assert found.num_unread == 0 and found.num_left == 8
    found.release()
    assert found.num_unread == 4 and found.rows.num_rows == 0, "all but the pending token, after a preemption"


def test_take_counts_what_it_takes():
    found = sequence()
    assert take(found, [7]) == 1 and take(found, [8, 9]) == 2
    assert found.output_ids == [7, 8, 9] and found.pending == 9 and found.root_position == 5
    assert found.stats.num_tokens == 3 and found.finish_reason is None


def test_take_ends_at_the_end_token():
    found = sequence()
    assert take(found, [7, EOS, 8]) == 2
    assert found.output_ids == [7, EOS] and found.stats.num_tokens == 2
    assert found.finish_reason is FinishReason.STOP


def test_take_ends_at_the_token_limit():
    found = sequence(max_new_tokens=2)
    assert take(found, [7, 8, 9]) == 2
    assert found.finish_reason is FinishReason.LENGTH and found.output_ids == [7, 8]


def test_an_end_token_at_the_limit_is_a_stop():
    found = sequence(max_new_tokens=2)
    take(found, [7, EOS])
    assert found.finish_reason is FinishReason.STOP


def test_take_ends_with_the_context():
    """Position 5 is the last one that can be read; the token chosen there is still an answer."""
    found = sequence(max_positions=6)
    assert take(found, [7, 8, 9, 10, 11]) == 4
    assert found.finish_reason is FinishReason.LENGTH and found.root_position == 6


def test_max_depth_never_lets_a_tree_pass_a_limit():
    found = sequence(max_new_tokens=6)
    assert found.max_depth == 5
    take(found, [7])
    assert found.max_depth == 4
    take(found, [7, 7, 7, 7])
    assert found.max_depth == 0
    by_context = sequence(max_new_tokens=50, max_positions=8)
    take(by_context, [7])
    assert by_context.max_depth == 4, "root at 3, positions 4 to 7 below it"


def tokens_of(text):
    return byte_tokenizer()(text)["input_ids"]


def test_text_ends_at_a_stop_string_inside_the_tokens():
    found = sequence(stop=("XY",), max_new_tokens=50)
    assert take(found, tokens_of("abXYcd")) == 4
    assert found.output_ids == tokens_of("abXY") and found.finish_reason is FinishReason.STOP


def test_a_step_broken_off_has_done_nothing():
    found = sequence(stop=("XYZ",), penalty=2.0, max_new_tokens=50)
    take(found, tokens_of("aX"))
    filled(found.rows, 4)
    found.check()
    before = deepcopy(found.stats)
    with pytest.raises(KeyboardInterrupt), whole_step([found]):
        filled(found.rows, 7)
        found.rows.unfed.append(Unfed(torch.zeros(2, 2), [1, 2], None, 2))
        take(found, tokens_of("YZ"))
        assert found.finish_reason is FinishReason.STOP and found.stops.stopped
        raise KeyboardInterrupt
    found.check()
    assert found.output_ids == tokens_of("aX") and found.finish_reason is None and found.stats == before
    assert not found.rows.unfed and found.chooser.output.keys() == set(tokens_of("aX"))
    assert take(found, tokens_of("YZ")) == 2 and found.finish_reason is FinishReason.STOP


def test_a_step_that_cuts_a_loop_off_and_is_broken_off_has_done_nothing():
    found = sequence(max_new_tokens=50)
    found.watch = LoopWatch()
    loop = [1, 2] * 12
    take(found, loop[:20])
    filled(found.rows, 22)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), whole_step([found]):
            take(found, loop[20:])
            assert found.output_ids == [1, 2] and found.finish_reason is FinishReason.LOOP
            raise KeyboardInterrupt
        assert found.output_ids == loop[:20] and found.finish_reason is None
    take(found, loop[20:])
    assert found.output_ids == [1, 2]


def test_looking_for_the_end_changes_nothing():
    found = sequence(stop=("XYZ",), max_new_tokens=50)
    found.watch = LoopWatch()
    for _ in range(2):
        assert found.ending(tokens_of("abXYZc")).num_taken == 5 and found.output_ids == []
    loop = [1, 2] * 12
    for _ in range(2):
        assert found.ending([*loop, 9]).reason is FinishReason.LOOP and found.output_ids == []
    take(found, loop)
    assert found.output_ids == [1, 2] and found.finish_reason is FinishReason.LOOP and found.stats.num_tokens == 24


def test_caches_that_do_not_hold_what_was_read_are_refused():
    found = sequence()
    take(found, [7])
    found.check()
    found.rows.cache.layers[0].append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    with pytest.raises(CapacityError, match="3 rows are cached and 4 written"):
        found.check()
    found.rows.cache.commit([0])
    with pytest.raises(CapacityError, match="4 rows are cached and 4 written, but 3 tokens"):
        found.check()


def test_penalties_see_what_was_taken_and_nothing_else():
    found = sequence(penalty=2.0)
    take(found, [7, EOS, 8])
    scores = found.chooser.scores(np.full(300, 4.0), 9)
    assert {token for token in range(300) if scores[token] == 2.0} == {1, 2, 3, 7, EOS}
