"""Law 9: a next chat turn on the kept caches equals a fresh prefill, also with templates that rewrite history."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.sequence import Sequence
from amphista.engine.sequence_cache import SequenceCache
from amphista.engine.step import Engine
from amphista.errors import CapacityError
from amphista.llm import LLM
from amphista.tree.grow import parse_tree
from tests.decoding import begin, decode, step
from tests.tiny import AUTO_TREES, TEMPLATE, anew, real_drafters, tiny_target

FORGETFUL = (  # drops the text of all earlier answers, as templates of reasoning models do with their thinking
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + (m['content'] if m['role'] == 'user' or loop.last else '-')"
    " + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
PARAMS = SamplingParams(max_new_tokens=12, temperature=0.8, seed=5)
NAMES = ["none", "amphista-full", "amphista-one-stage", "medusa-shared", "none+lookup", "amphista-full+lookup"]
NAMES += ["hydra-prefix", "eagle-full", "falcon-pairs"]
TREES = {"7": parse_tree(7), **AUTO_TREES}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["plain", "forgetful"])
def test_next_turn_equals_fresh_prefill(name, template, tree):
    target = tiny_target(with_text=True)
    target.text.tokenizer.chat_template = template
    drafter = real_drafters(target)[name]
    if Proposer.of(drafter).heads is not None:
        Proposer.of(drafter).heads.freeze()
    llm = LLM(target, drafter, tree=7)
    kept = llm.conversation()
    reused = 0
    for message in ("Hello there", "And then?", "Über\u00e4ll 日本"):
        prompt = llm.prompt_ids([*kept.messages, {"role": "user", "content": message}])
        llm.engine.grower = anew(TREES[tree])
        fresh = decode(llm.engine, prompt, PARAMS)
        llm.engine.grower = anew(TREES[tree])
        answer = kept.send(message, params=PARAMS)
        assert answer.token_ids == fresh.output_ids
        assert answer.stats.accepted == fresh.stats.accepted, "the drafter's caches differ from fresh ones"
        assert answer.stats.expected == pytest.approx(fresh.stats.expected, abs=1e-4), "what it expects differs"
        assert answer.stats.drafted == fresh.stats.drafted
        reused += answer.stats.num_cached_tokens
    assert reused > 20, "nothing was reused: the law would be vacuous"


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [0, 1, 3, 5])
def test_rewound_caches_equal_fresh_ones(target, name, shared, tree):
    """Continue with a prompt that shares only its first tokens with what is cached."""
    engine = Engine(target, real_drafters(target)[name], TREES[tree])
    first = decode(engine, [5, 17, 230, 44, 9, 61], PARAMS)
    second = first.token_ids[:shared] + [77, 78, 79]
    engine.grower = anew(TREES[tree])
    expected = decode(engine, second, PARAMS)
    engine.grower = anew(TREES[tree])
    sequence = decode(engine, second, PARAMS, after=first)
    assert sequence.output_ids == expected.output_ids
    assert sequence.stats.num_cached_tokens == max(0, shared - 1)
    assert sequence.stats.expected == pytest.approx(expected.stats.expected, abs=1e-4)
    rows, fresh = sequence.rows, expected.rows
    rows.feed()
    assert rows.num_rows == rows.cache.num_committed
    for ours, theirs in zip(rows.cache.layers, fresh.cache.layers, strict=True):
        size = theirs.num_rows
        torch.testing.assert_close(ours.keys[:, :, :size], theirs.keys[:, :, :size], atol=1e-4, rtol=1e-4)


def test_same_prompt_again_reads_only_its_last_token(target):
    engine = Engine(target, real_drafters(target)["amphista-full"], parse_tree(7))
    prompt = [5, 17, 230, 44, 9, 61]
    first = decode(engine, prompt, PARAMS)
    second = decode(engine, prompt, PARAMS, after=first)
    assert second.output_ids == first.output_ids and second.stats.num_cached_tokens == len(prompt) - 1


def test_answer_broken_off_leaves_usable_caches(target):
    """Stop reading in mid-answer, then ask something else on the same caches."""
    engine = Engine(target, real_drafters(target)["amphista-full"], parse_tree(7))
    sequence = begin(engine, [5, 17, 230], PARAMS)
    step(engine, sequence)
    follow_up = [*sequence.token_ids, 42, 43]
    expected = decode(engine, follow_up, PARAMS).output_ids
    assert decode(engine, follow_up, PARAMS, after=sequence).output_ids == expected


def test_prefill_broken_off_between_chunks_leaves_usable_caches(target, monkeypatch):
    """Two chunks have been read: the same prompt again equals a fresh one, steps included."""
    engine = Engine(target, real_drafters(target)["amphista-full"], parse_tree(7))
    prompt = [5, 17, 230, 44, 9, 61, 70, 71, 72, 73]
    forward, calls = target._forward, []

    def fails_in_the_third_chunk(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **settings)

    sequence = engine.new_sequence(prompt, PARAMS)
    sequence.chunk_len = 3
    with monkeypatch.context() as patch:
        patch.setattr(target, "_forward", fails_in_the_third_chunk)
        with pytest.raises(KeyboardInterrupt):
            while True:
                step(engine, sequence)
    assert sequence.rows.num_rows == 6 and sequence.num_unread == 4
    again, fresh = decode(engine, prompt, PARAMS, after=sequence), decode(engine, prompt, PARAMS)
    assert (again.output_ids, again.stats.accepted) == (fresh.output_ids, fresh.stats.accepted)
    assert again.stats.num_cached_tokens == 5


def test_streams_keep_their_own_answers():
    """An answer read after the next turn began is still its own; the next turn ends a stream that has not ended."""
    target = tiny_target(with_text=True)
    llm = LLM(target, real_drafters(target)["amphista-full"], tree=7)
    conversation = llm.conversation()
    first = conversation.stream("Hello", params=PARAMS)
    "".join(first)
    ids = list(first.answer.token_ids)
    second = conversation.stream("And then?", params=PARAMS)
    assert first.answer.token_ids == ids and first.answer.prompt_ids != second.request.prompt_ids
    begun = next(second.steps()).token_ids
    conversation.stream("Something else", params=PARAMS)
    assert list(second) == [] and second.answer.token_ids == begun and second.answer.finish_reason == "abort"


def test_a_sequence_whose_caches_were_taken_over_reads_again(target):
    """It has let go of them: nobody writes into another's rows."""
    engine = Engine(target, real_drafters(target)["amphista-full"], parse_tree(7))
    sequence = begin(engine, [5, 17, 230], PARAMS)
    other = begin(engine, [5, 17], PARAMS, after=sequence)
    while not sequence.is_finished:
        step(engine, sequence)
    assert sequence.output_ids == decode(engine, [5, 17, 230], PARAMS).output_ids
    while not other.is_finished:
        step(engine, other)
    assert other.output_ids == decode(engine, [5, 17], PARAMS).output_ids


def test_a_turn_becomes_history_by_itself():
    """When its stream is read to the end, or closed, or the next turn begins; not when it never began."""
    llm = LLM(tiny_target(with_text=True))
    conversation = llm.conversation("Be brief")
    text = "".join(conversation.stream("Hello", params=PARAMS))
    system = {"role": "system", "content": "Be brief"}
    said = [system, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}]
    assert conversation.messages == said
    with conversation.stream("And then?", params=PARAMS) as stream:
        piece = next(iter(stream))
    assert conversation.messages[3:] == [
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": stream.answer.text},
    ]
    assert stream.answer.text.startswith(piece)
    conversation.stream("Never read", params=PARAMS)
    answer = conversation.send("Last", params=PARAMS)
    assert [message["content"] for message in conversation.messages[5:]] == ["Last", answer.text]
    fresh = llm.generate(conversation.messages[:-1], params=PARAMS)
    assert fresh.token_ids == answer.token_ids


def test_reading_on_after_a_break_goes_on(text_target):
    llm = LLM(text_target)
    whole = llm.generate("Hello", params=PARAMS)
    stream = llm.stream("Hello", params=PARAMS)
    ids = []
    for result in stream.steps():
        ids += result.token_ids
        break
    for result in stream.steps():
        ids += result.token_ids
    assert ids == whole.token_ids == stream.answer.token_ids


@pytest.mark.parametrize("path", ["stock", "fast"])
def test_failed_forward_leaves_usable_caches(path, monkeypatch):
    """An interrupt inside the target's forward drops the half-written rows."""
    target = tiny_target()
    assert path == "stock" or target.speed_up()
    engine = Engine(target, real_drafters(target)["amphista-full"], parse_tree(7))
    sequence = begin(engine, [5, 17, 230], PARAMS)
    rows = sequence.rows.cache.num_committed

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if path == "stock":
            patch.setattr(target.model.model.layers[1], "forward", interrupt)
        else:
            patch.setattr(target._lean.layers[1].mlp.down, "added", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(engine, sequence)
    sequence.rows.cache.check_integrity()
    assert sequence.rows.cache.num_rows == rows
    while not sequence.is_finished:
        step(engine, sequence)
    assert sequence.output_ids == decode(engine, [5, 17, 230], PARAMS).output_ids


def _mixes_up_rows_that_wait(monkeypatch):
    joined = SequenceCache._joined
    monkeypatch.setattr(SequenceCache, "_joined", lambda rows: (joined(rows)[0].flip(0), joined(rows)[1]))


def _keeps_a_row_too_many(monkeypatch):
    adopt = Sequence.adopt
    monkeypatch.setattr(
        Sequence, "adopt", lambda sequence, match: adopt(sequence, replace(match, num_rows=match.num_rows + 1))
    )


def _keeps_the_drafters_rows(monkeypatch):
    monkeypatch.setattr(SequenceCache, "keep", lambda rows, num_rows: rows.cache.trim(num_rows))


@pytest.mark.parametrize("mutation", [_mixes_up_rows_that_wait, _keeps_a_row_too_many, _keeps_the_drafters_rows])
def test_a_mutation_of_taking_over_is_seen(monkeypatch, mutation):
    """A target that repeats itself, so that lookup often has something to say."""
    target = tiny_target(tie_word_embeddings=True)
    drafter = real_drafters(target)["amphista-full+lookup"]
    prompts = [[5, 6, 7, 8] * 4, [5, 6, 7, 8, 5, 6, 9, 6] * 2, [5, 6, 7, 8] * 4]

    def expectations(engine, *, kept):
        found, sequence = [], None
        for prompt in prompts:
            sequence = decode(engine, prompt, PARAMS, after=sequence if kept else None)
            found.append(sequence.stats.expected)
        return found

    engine = Engine(target, drafter, parse_tree(7))
    fresh = expectations(engine, kept=False)
    assert np.allclose(np.concatenate(expectations(engine, kept=True)), np.concatenate(fresh), atol=1e-4)
    mutation(monkeypatch)
    try:
        mutated = expectations(engine, kept=True)
    except (IndexError, KeyError, AssertionError, RuntimeError, TypeError, CapacityError):
        return
    assert list(map(len, mutated)) != list(map(len, fresh)) or not np.allclose(
        np.concatenate(mutated), np.concatenate(fresh), atol=1e-4
    )
