"""Acceptance: follow the target's own choices down the tree. One walk for greedy and sampling.

At each node the target chooses its next token from that node's logits. If a child carries it, step there; else stop.
The last choice is the new pending token. A token is emitted only when the target chose it, so the output is the
target's own, whatever the tree: drafts that are chosen, not sampled, allow no better lossless rule.

Shapes: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from amphista.accept.chooser import Choice, Chooser, choose_all
from amphista.accept.draw import broken_logits
from amphista.errors import AmphistaError
from amphista.tree.token_tree import TokenTree


@dataclass(frozen=True)
class Acceptance:
    """The accepted path (node indices, root first), its tokens without the root, and the new pending token."""

    path: list[int]
    accepted: list[int]
    pending: int

    @property
    def num_accepted(self) -> int:
        """Accepted draft tokens, 0..depth."""
        return len(self.accepted)

    @property
    def tokens(self) -> list[int]:
        """What the step adds to the output: the accepted tokens, then the target's own."""
        return [*self.accepted, self.pending]

    def cut(self, num_tokens: int) -> Acceptance:
        """Keep only the first `num_tokens` (>= 1) of `tokens`; the last kept one becomes the pending token."""
        if num_tokens >= len(self.tokens):
            return self
        return Acceptance(self.path[:num_tokens], self.accepted[: num_tokens - 1], self.tokens[num_tokens - 1])


@dataclass
class Walk:
    """One sequence's way down its tree, from the root.

    logits: [N, V]. root_position: absolute position of the pending token; the token chosen at a node of depth d sits at
    root_position + d + 1. argmaxes: of each row of logits, where they are known already.
    """

    tree: TokenTree
    logits: Tensor
    chooser: Chooser
    root_position: int
    argmaxes: Sequence[int] | None = None
    path: list[int] = field(default_factory=lambda: [0])
    accepted: list[int] = field(default_factory=list)

    @property
    def next_choice(self) -> Choice:
        node, position = self.path[-1], self.root_position + len(self.path)
        return Choice(self.chooser, self.logits[node], position, self.accepted)

    def go(self, token: int) -> int | None:
        """Step to the child that carries the token; where there is none the way ends with it."""
        child = self.tree.child(self.path[-1], token)
        if child is None:
            return token
        self.path.append(child)
        self.accepted.append(token)
        return None

    def go_as_known(self) -> int | None:
        """The whole way at once where all choices are known."""
        pending = None
        if self.argmaxes is not None and self.chooser.is_argmax:
            while pending is None:
                token = self.argmaxes[self.path[-1]]
                pending = self.go(token) if token >= 0 else self.turn_back(broken_logits())
        return pending

    def turn_back(self, error: AmphistaError) -> int:
        """End with the token before the one that cannot be chosen: it may be behind the answer's end, and if it is not,
        the next step says so. raises the error where there is none before."""
        if not self.accepted:
            raise error
        self.path.pop()
        return self.accepted.pop()


def walk_all(walks: Sequence[Walk]) -> list[Acceptance]:
    """Walk the target's choices, all side by side: those at one depth are made together."""
    pending = [walk.go_as_known() for walk in walks]
    while going := [i for i, token in enumerate(pending) if token is None]:
        for i, token in zip(going, _choices([walks[i] for i in going]), strict=True):
            pending[i] = walks[i].turn_back(token) if isinstance(token, AmphistaError) else walks[i].go(token)
    ends = zip(walks, pending, strict=True)
    return [Acceptance(walk.path, walk.accepted, token) for walk, token in ends if token is not None]


def _choices(walks: Sequence[Walk]) -> list[int | AmphistaError]:
    """Where one cannot be made, its error, and each is made alone."""
    try:
        return [*choose_all([walk.next_choice for walk in walks])]
    except AmphistaError as error:
        return [error] if len(walks) == 1 else [choice for walk in walks for choice in _choices([walk])]
