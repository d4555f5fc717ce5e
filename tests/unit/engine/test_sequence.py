from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from amphista.accept.sampling import Chooser
from amphista.cache.static import KVCache
from amphista.drafter.base import DrafterState
from amphista.drafter.proposer import Proposer
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.sequence import Context, Sequence
from amphista.errors import CapacityError
from amphista.target.text import IncrementalText, Text
from tests.tiny import EOS, byte_tokenizer

PROMPT = [1, 2, 3]


def context(token_ids, num_cached=None):
    cache = KVCache(1)
    num_rows = len(token_ids) - 1 if num_cached is None else num_cached
    cache.layers[0].append(torch.zeros(1, 1, num_rows, 2), torch.zeros(1, 1, num_rows, 2))
    cache.commit(range(num_rows))
    return Context(cache, DrafterState(num_rows=num_rows), list(token_ids))


def sequence(*, max_new_tokens=10, max_positions=100, stop=(), penalty=1.0):
    params = SamplingParams(max_new_tokens=max_new_tokens, stop=stop, repetition_penalty=penalty)
    return Sequence(
        context=context(PROMPT, num_cached=3),
        params=params,
        chooser=Chooser(params, PROMPT),
        request=0,
        prompt_ids=PROMPT,
        end_ids=frozenset([EOS]),
        max_positions=max_positions,
        stops=IncrementalText(Text(byte_tokenizer()), stop) if stop else None,
    )


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
def test_rewind_keeps_the_common_prefix_but_one(prompt, keep):
    found = context([1, 2, 3, 4, 5, 6])
    assert found.rewind(prompt, Proposer()) == keep
    assert found.cache.num_committed == found.cache.num_rows == found.draft_state.num_rows == keep
    assert found.token_ids == prompt


def test_rewind_does_not_trust_ids_that_were_never_cached():
    """A broken-off step may have left ids without rows."""
    found = context([1, 2, 3, 4, 5, 6], num_cached=2)
    assert found.rewind([1, 2, 3, 4, 5, 6, 7], Proposer()) == 1


def test_rewind_keeps_no_hold_of_the_callers_list():
    prompt, found = [1, 2, 3], context([1, 2])
    found.rewind(prompt, Proposer())
    found.token_ids.append(9)
    assert prompt == [1, 2, 3]


def test_take_counts_what_it_takes():
    found = sequence()
    assert found.take([7]) == 1 and found.take([8, 9]) == 2
    assert found.output_ids == [7, 8, 9] and found.pending == 9 and found.root_position == 5
    assert found.stats.num_tokens == 3 and found.finish_reason is None


def test_take_ends_at_the_end_token():
    found = sequence()
    assert found.take([7, EOS, 8]) == 2
    assert found.output_ids == [7, EOS] and found.stats.num_tokens == 2
    assert found.finish_reason is FinishReason.STOP


def test_take_ends_at_the_token_limit():
    found = sequence(max_new_tokens=2)
    assert found.take([7, 8, 9]) == 2
    assert found.finish_reason is FinishReason.LENGTH and found.output_ids == [7, 8]


def test_an_end_token_at_the_limit_is_a_stop():
    found = sequence(max_new_tokens=2)
    found.take([7, EOS])
    assert found.finish_reason is FinishReason.STOP


def test_take_ends_with_the_context():
    """Position 5 is the last one that can be read; the token chosen there is still an answer."""
    found = sequence(max_positions=6)
    assert found.take([7, 8, 9, 10, 11]) == 4
    assert found.finish_reason is FinishReason.LENGTH and found.root_position == 6


def test_max_depth_never_lets_a_tree_pass_a_limit():
    found = sequence(max_new_tokens=6)
    assert found.max_depth == 5
    found.take([7])
    assert found.max_depth == 4
    found.take([7, 7, 7, 7])
    assert found.max_depth == 0
    by_context = sequence(max_new_tokens=50, max_positions=8)
    by_context.take([7])
    assert by_context.max_depth == 4, "root at 3, positions 4 to 7 below it"


def tokens_of(text):
    return byte_tokenizer()(text)["input_ids"]


def test_text_ends_at_a_stop_string_inside_the_tokens():
    found = sequence(stop=("XY",), max_new_tokens=50)
    assert found.take(tokens_of("abXYcd")) == 4
    assert found.output_ids == tokens_of("abXY") and found.finish_reason is FinishReason.STOP


def test_a_step_broken_off_has_done_nothing():
    found = sequence(stop=("XYZ",), penalty=2.0, max_new_tokens=50)
    found.take(tokens_of("aX"))
    found.rows.cache.layers[0].append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    found.rows.cache.commit(range(1))
    found.check_context()
    before = deepcopy(found.stats)
    with pytest.raises(KeyboardInterrupt), found.whole_step():
        found.rows.cache.layers[0].append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
        found.context.defer(Proposer(), torch.zeros(2, 2), [1, 2])
        found.take(tokens_of("YZ"))
        assert found.finish_reason is FinishReason.STOP and found.stops.stopped
        raise KeyboardInterrupt
    found.check_context()
    assert found.output_ids == tokens_of("aX") and found.finish_reason is None and found.stats == before
    assert not found.rows.unfed and found.chooser.output.keys() == set(tokens_of("aX"))
    assert found.take(tokens_of("YZ")) == 2 and found.finish_reason is FinishReason.STOP


def test_caches_that_do_not_hold_what_was_read_are_refused():
    found = sequence()
    found.take([7])
    found.check_context()
    found.rows.cache.layers[0].append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    with pytest.raises(CapacityError, match="3 rows are cached"):
        found.check_context()


def test_penalties_see_what_was_taken_and_nothing_else():
    found = sequence(penalty=2.0)
    found.take([7, EOS, 8])
    scores = found.chooser._scores(torch.full((300,), 4.0), 9, [])
    assert {token for token in range(300) if scores[token] == 2.0} == {1, 2, 3, 7, EOS}
