"""Recorded answers, replayed against the trees that would have been grown for them.

A recorded answer is a walk the target really takes, so what each step would have accepted of a tree is known: as deep
as the tree holds the text's own path. Trees of all sizes are grown once, for their nodes come in an order of which the
first n are the tree of n nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

from amphista.engine.loops import loop_free_length
from amphista.train.dataset import PaddedBatch
from amphista.tree.build import ranked
from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import best_first

Sizes = list[int]  # for each depth along the text, the tree size that first reaches it


class Walks:
    """Tokens and forwards of many answers, by tree size."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._tokens, self._forwards = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)

    def add(self, answer: AnswerReplay, length: int) -> None:
        """Count the first `length` tokens of an answer."""
        for size in self._tokens:
            accepted = answer.walk(size, length)
            self._tokens[size] += sum(accepted) + len(accepted)
            self._forwards[size] += len(accepted)

    def tau(self) -> dict[int, float]:
        """Tokens per forward by tree size."""
        return {size: tokens / max(self._forwards[size], 1) for size, tokens in self._tokens.items()}


class AnswerReplay:
    """One recorded answer, and at each of its rows the sizes that trees need to hold what follows."""

    def __init__(self, next_ids: list[int], sizes_at: Callable[[int], Sizes]) -> None:
        """sizes_at: by the number of the row in this answer; asked once for each that is come to."""
        self._next_ids, self._sizes_at = next_ids, sizes_at
        self._reached: dict[int, Sizes] = {}

    def __len__(self) -> int:
        return len(self._next_ids)

    @cached_property
    def loop_free_length(self) -> int:
        """Tokens before the answer begins to loop."""
        return loop_free_length(self._next_ids)

    def walk(self, num_nodes: int, length: int) -> list[int]:
        """Decode the first `length` tokens with trees of `num_nodes`: drafted tokens accepted in each forward.

        The first token is the prefill's; a step that crosses the end counts up to it.
        """
        row, accepted = 0, []
        last = length - 1
        while row < last:
            if row not in self._reached:
                self._reached[row] = self._sizes_at(row)
            reached = sum(size <= num_nodes for size in self._reached[row])
            accepted.append(min(reached, last - row - 1))
            row += accepted[-1] + 1
        return accepted


def answers_in(batch: PaddedBatch) -> Iterator[tuple[int, list[int]]]:
    """The answers of a batch: the place of the first of its rows among all answer rows, and their next tokens."""
    answers = batch.answer_rows.answers.cpu()
    next_ids = batch.answer_rows.next_ids.tolist()
    bounds = [0, *((answers[1:] != answers[:-1]).nonzero().squeeze(-1) + 1).tolist(), len(next_ids)]
    for start, end in pairwise(bounds):
        if end - start > 1:
            yield start, next_ids[start:end]


def sizes_of_best_tree(candidates: Candidates, coming: Sequence[int], num_nodes: int) -> Sizes:
    """For the best trees of what is on offer, up to `num_nodes`; coming: the pending token and those that follow it."""
    grown = best_first(coming[0], candidates, num_nodes, candidates.num_heads)
    at = 0
    sizes: Sizes = []
    for node in range(1, len(grown.tokens)):
        is_next = len(sizes) + 1 < len(coming) and grown.parents[node] == at
        if is_next and grown.tokens[node] == coming[len(sizes) + 1]:
            at = node
            sizes.append(node + 1)
    return sizes


class NestedTemplates:
    """The best static trees of all sizes for accuracies by depth and rank: each holds the smaller ones.

    What they would accept is exact where a drafter is asked in rounds and its ranks are known along the text alone.
    """

    def __init__(self, accuracy: Sequence[Sequence[float]], num_nodes: int) -> None:
        grown = best_first(-1, ranked(accuracy), num_nodes, len(accuracy))
        paths: list[tuple[int, ...]] = [()]
        for rank, parent in zip(grown.tokens[1:], grown.parents[1:], strict=True):
            paths.append((*paths[parent], rank))
        self._size = {path: node + 1 for node, path in enumerate(paths)}

    def sizes(self, ranks: Sequence[int]) -> Sizes:
        """Where the text's tokens have these ranks, each given the text above it; -1 for none."""
        paths = [tuple(ranks[: depth + 1]) for depth in range(len(ranks))]
        return [self._size[path] for path in paths if path in self._size]
