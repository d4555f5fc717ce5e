"""The check made at every load: does this model verify a tree as it would its paths, and can its LM head be shared?

A family outside the tested list may ignore the mask or derive positions from rows; the output would then differ from
the target's own without any error. Four tree nodes against plain forwards of their paths show it in milliseconds.
"""

from __future__ import annotations

import torch

from amphista.errors import TargetError
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree

TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-6,
    torch.float16: 3e-2,
    torch.bfloat16: 1.5e-1,
}  # of the logits' scale
PROBE_PROMPT = 5
PARENTS = [-1, 0, 0, 1]


def probe(target: Target) -> None:
    """Raise TargetError when tree logits or the shared LM head do not reproduce the plain forward."""
    try:
        _compare(target)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise TargetError(
            f"{target.spec.family} models cannot be verified as a tree here: their forward takes no tree mask, "
            f"positions or cache of ours ({type(error).__name__}: {error}). Choose a target of another family"
        ) from error


def _compare(target: Target) -> None:
    ids = [token % target.spec.vocab_size for token in range(7, 7 + PROBE_PROMPT + len(PARENTS))]
    prompt, tree = ids[:PROBE_PROMPT], TokenTree(ids[PROBE_PROMPT:], PARENTS)
    cache = target.new_cache()
    target.prefill(prompt, cache)
    output = target.verify(tree, cache)
    worst = 0.0
    scale = 1.0
    for node in range(tree.num_nodes):
        path = tree.path(node)
        plain = target.prefill(prompt + [tree.tokens[i] for i in path], target.new_cache()).logits[-1]
        scale = max(scale, float(plain.float().abs().max()))
        worst = max(worst, float((plain - output.logits[node]).float().abs().max()))
    tolerance = TOLERANCE[target.dtype] * scale
    family = target.spec.family
    if not worst <= tolerance:
        raise TargetError(
            f"{family} models cannot be verified as a tree here: logits of a tree node differ from those of its path "
            f"by {worst:.3g} (allowed {tolerance:.3g}). Choose a target of another family"
        )
    shared = target.shared.project(output.hidden)
    difference = float((shared - output.logits).float().abs().max())
    if not difference <= tolerance:
        raise TargetError(
            f"the LM head of {family} models cannot be shared with drafters: its logits differ from the model's own "
            f"by {difference:.3g} (allowed {tolerance:.3g})"
        )
