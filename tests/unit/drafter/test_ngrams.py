from __future__ import annotations

import random

import pytest

from amphista.drafter.ngrams import LONGEST_MATCH, SIZES, NgramIndex


def match_plainly(tokens):
    """The most recent earlier place of the longest of the n-grams that end the text, by looking everywhere."""
    end = len(tokens) - 1
    for size in sorted(SIZES, reverse=True):
        if size > len(tokens):
            continue
        for place in range(end - 1, size - 2, -1):
            if tokens[place + 1 - size : place + 1] == tokens[end + 1 - size :]:
                length = next(
                    (n for n in range(LONGEST_MATCH) if n > place or tokens[place - n] != tokens[end - n]),
                    LONGEST_MATCH,
                )
                return place, length
    return None


def texts(seed, num_tokens=120):
    """Few tokens and copied spans, so that matches of every length occur."""
    source = random.Random(seed)
    tokens = []
    while len(tokens) < num_tokens:
        if tokens and source.random() < 0.3:
            start = source.randrange(len(tokens))
            tokens += tokens[start : start + source.randrange(1, 30)]
        else:
            tokens.append(source.randrange(6))
    return tokens[:num_tokens]


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_looking_everywhere_finds(seed):
    tokens, index, lengths = texts(seed), NgramIndex(), set()
    for count, token in enumerate(tokens, start=1):
        index.extend([token])
        found = index.match()
        assert found == match_plainly(tokens[:count])
        lengths.add(found[1] if found else 0)
    assert {1, 2, 3} <= lengths and max(lengths) >= 10, "the oracle saw few cases"


@pytest.mark.parametrize("seed", range(6))
def test_trimmed_and_grown_again_it_is_as_if_new(seed):
    source, index, tokens = random.Random(seed), NgramIndex(), []
    for turn in range(12):
        keep = source.randrange(len(tokens) + 1)
        index.trim(keep)
        tokens = tokens[:keep] + texts(100 * seed + turn, 40)
        index.extend(tokens[keep:])
        fresh = NgramIndex()
        fresh.extend(tokens)
        assert vars(index) == vars(fresh)
    index.trim(0)
    assert vars(index) == vars(NgramIndex()) and index.match() is None


def test_trimming_behind_the_end_changes_nothing():
    index = NgramIndex()
    index.extend([1, 2, 3])
    index.trim(9)
    assert index.tokens == [1, 2, 3]


def test_a_continuation_that_reaches_the_end_repeats_itself():
    index = NgramIndex()
    index.extend([5, 1, 2, 1, 2])
    place, _ = index.match()
    assert place == 2 and index.continuation(place, 5) == [1, 2, 1, 2, 1]


def test_a_token_costs_the_same_however_long_the_text_is(monkeypatch):
    """No step reads the text again: the n-grams looked at are those of the new token."""
    looked_at = []
    gram = NgramIndex._gram
    monkeypatch.setattr(NgramIndex, "_gram", lambda index, *where: (looked_at.append(where), gram(index, *where))[1])
    index = NgramIndex()
    index.extend(texts(1, 500))
    looked_at.clear()
    index.extend([3])
    index.match()
    assert len(looked_at) == len(SIZES)
