"""The path correction: what a head says once it knows the token that stands above. Not in the Amphista paper.

Parallel heads know depths, not paths: head k gives what comes k tokens ahead whatever came before it. A correction of
low rank makes that conditional on the token p at the depth above, at a cost that does not grow with the tree:

    o_k(p) = o_k + U (a * SiLU(b)),     [a ; b] = A n_E(E(p)) + G n_o(o_k) + g        a, b of `path_rank` numbers
    z_k(x | p) = LM(o_k(p))[x]  for the `path_shortlist` best tokens x of z_k,        z_k(x)  for all others

U starts at 0: the start is the uncorrected drafter. Related: DSpark's Markov head (arXiv 2607.05147: a table W1[p] W2
of rank 256 on top of the logits), TreeFlash (arXiv 2606.03819: a SwiGLU block on [E(p) ; h], evaluated for the best
tokens of every position at once), Domino (arXiv 2605.29707). Ours is TreeFlash's function at a Markov head's size, and
it needs no table of the vocabulary's size: E and LM are the target's own. That only a shortlist is corrected makes the
conditional distribution exact, its tail included, without ever scoring the vocabulary for each parent; training sees
the very same distribution.

The first head has no drafted token above it but the pending one: heads that do not read it (Medusa's) are corrected by
it, the others are left alone.

Shapes: K heads, D hidden size, S shortlist; below a head's S tokens stand the S tokens of the next head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amphista.drafter.layers import RMSNorm
from amphista.target.spec import TargetSpec


class PathCorrection(nn.Module):
    """o_k(p) - o_k, for any head."""

    def __init__(self, rank: int, spec: TargetSpec) -> None:
        super().__init__()
        self.token_norm = RMSNorm(spec.embedding_size, spec.norm_eps)
        self.state_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.token = nn.Linear(spec.embedding_size, 2 * rank, bias=False)
        self.state = nn.Linear(spec.hidden_size, 2 * rank)
        self.output = nn.Linear(rank, spec.hidden_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def read(self, embedded: Tensor) -> Tensor:
        """A n_E(E(p)) of tokens' embeddings [..., embedding size] -> [..., 2 * rank]; the same in every position."""
        read: Tensor = self.token(self.token_norm(embedded))
        return read

    def forward(self, states: Tensor, above: Tensor) -> Tensor:
        """States o_k [..., D] and what was `read` of the tokens above [..., 2 * rank], broadcast -> [..., D]."""
        up, gate = (self.state(self.state_norm(states)) + above).chunk(2, dim=-1)
        shift: Tensor = self.output(up * F.silu(gate))
        return shift

    def nothing(self) -> Tensor:
        """0, with a gradient of 0 for every weight: distributed wrappers wait for one where no row has an aim."""
        return torch.stack([weight.flatten()[0] * 0 for weight in self.parameters()]).sum()


def moved(
    states: Tensor, corrections: Tensor, weight: Tensor, bias: Tensor | None, transform: Callable[[Tensor], Tensor]
) -> Tensor:
    """By how much corrections [..., P, D] of states [..., D] move the logits of the tokens that score by weight
    [..., S, D] and bias [..., S], the family's `transform` included: [..., P, S].

    The move itself is computed, not the difference of two logits, which half precision would round away.
    """
    moves = corrections.to(weight.dtype) @ weight.transpose(-1, -2)
    moves = moves.to(torch.promote_types(moves.dtype, torch.float32))
    start = (weight @ states.to(weight.dtype)[..., None])[..., 0][..., None, :].to(moves.dtype)
    if bias is not None:
        start = start + bias[..., None, :]
    return transform(start + moves) - transform(start)


def conditional(log_probs: Tensor, shifts: Tensor) -> Tensor:
    """Shortlist log-probabilities [..., 1, S], part of a whole distribution, and what each parent adds [..., P, S].

    -> [..., P, S], normalised with the rest of the distribution, which keeps its logits.
    """
    shifted = log_probs + shifts
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-7))
    return shifted - torch.logaddexp(rest, torch.logsumexp(shifted, -1, keepdim=True))
