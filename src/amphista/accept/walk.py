"""Acceptance: follow the target's own choices down the tree. One walk for greedy and sampling.

At each node the target chooses its next token from that node's logits. If a child carries it, step there; else stop.
The last choice is the new pending token. A token is emitted only when the target chose it, so the output is the
target's own, whatever the tree: drafts that are chosen, not sampled, allow no better lossless rule.

Shapes: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from amphista.accept.sampling import Chooser
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


def walk(
    tree: TokenTree, logits: Tensor, chooser: Chooser, root_position: int, argmaxes: Sequence[int] | None = None
) -> Acceptance:
    """Walk the target's choices from the root.

    logits: [N, V]. root_position: absolute position of the pending token; the token chosen at a node of depth d sits
    at root_position + d + 1. argmaxes: of each row of logits, where they are known already.
    """
    known = argmaxes if argmaxes is not None and chooser.is_argmax else None
    node, path = 0, [0]
    accepted: list[int] = []
    while True:
        token = known[node] if known else chooser.choose(logits[node], root_position + len(path), accepted)
        child = tree.child(node, token)
        if child is None:
            return Acceptance(path, accepted, token)
        node = child
        path.append(node)
        accepted.append(token)
