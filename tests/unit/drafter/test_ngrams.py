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


def test_a_continuation_that_reaches_the_end_repeats_itself():
    index = NgramIndex()
    index.extend([5, 1, 2, 1, 2])
    place, _ = index.match()
    assert place == 2 and index.continuation(place, 5) == [3, 4, 3, 4, 3]


@pytest.mark.parametrize("seed", range(6))
def test_repeats_are_the_tokens_that_had_followed_before(seed):
    tokens, index = texts(seed), NgramIndex()
    index.extend(tokens)
    matches = [match_plainly(tokens[:count]) for count in range(len(tokens))]
    expected = [match and tokens[match[0] + 1] == token for match, token in zip(matches, tokens, strict=True)]
    assert index.repeats == expected and {None, False, True} == set(expected)


def test_a_token_costs_the_same_however_long_the_text_is():
    """No step reads the text again: what a token adds are its own n-grams, and whether it came before."""
    index = NgramIndex()
    index.extend(texts(1, 500))
    text, index.tokens = index.tokens, Unread(index.tokens)
    index.extend([3])
    assert index.tokens.num_read <= sum(SIZES) + 1, len(text)


class Unread(list):
    """Counts how many of its items are read by slices."""

    num_read = 0

    def __getitem__(self, where):
        found = super().__getitem__(where)
        self.num_read += len(found) if isinstance(where, slice) else 1
        return found
