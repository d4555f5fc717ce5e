"""The check made at every load: does this model verify a tree as its own plain forward reads the paths?

What is right is the model's forward without a cache and with no mask or position of ours. Against it stand a prompt
read in pieces, a tree with wrong siblings before right ones, the accepted path moved together, another tree behind it:
on the model itself with a short prompt, and on a tiny copy of its class (tiny.py) beyond every window and chunk, where
rows of several sequences are read together as well. Where no tiny copy can be built, the model itself is read beyond
its windows, which takes longer and tells the same.

Differences are measured by how far logits differ between contexts, so that small logits hide nothing; a tiny copy has
weights at which every token of a context counts.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from amphista.cache.static import KVCache
from amphista.errors import TargetError, first_line
from amphista.target.families import refuse_unsupported
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.target.tiny import WINDOW, tiny_model
from amphista.tree.token_tree import TokenTree

ROUNDING = {  # of the spread of logits; MoE routers and coarse types make more of it than a plain sum would
    torch.float64: 1e-4,  # some parts are float32 whatever the rest is
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
ENOUGH = 5.0  # times what is allowed, that another token in the context changes
SHORT, LONG = 5, 3 * WINDOW + 2
MOST_ROWS = 8192  # that the model itself is read for where it has no tiny copy
FIRST_TOKEN = 7
INPUTS = {"past_key_values": "cache", "position_ids": "positions", "use_cache": "word on its cache"}
PARENTS = [-1, 0, 0, 1, 2, 2, 4, 5, 6]
TOKENS = [0, 1, 2, 3, 3, 4, 5, 5, 6]  # two pairs of nodes carry the same token below different ones
LEAVES = (3, 7, 8)
ACCEPTED = [0, 2, 4, 6]
NOT_CAUSAL = "of a row depend on the rows after it: as configured it is not causal; they"
SHARED = "made by the LM head that drafters share"


def check_exactness(target: Target) -> None:
    """Raise TargetError, with the reason, where trees are not verified exactly; tries eager attention before."""
    refuse_unsupported(target.config)
    try:
        _check(target)
    except TargetError:
        if target.config._attn_implementation != "sdpa" or not _with_eager(target):
            raise


def _with_eager(target: Target) -> bool:
    """Whether the target verifies trees with eager attention, which it then keeps."""
    try:
        target.model.set_attn_implementation("eager")
        _check(target)
    except (TargetError, ValueError):
        target.model.set_attn_implementation("sdpa")
        return False
    target.why_stock = "only its eager attention verifies trees"
    return True


def _check(target: Target) -> None:
    try:
        copy = Target(tiny_model(target.config))
    except TargetError as error:
        _probe_beyond_windows(target, error)
        return
    check, rows = _Check(copy), min(LONG, copy.spec.max_positions - len(TOKENS))
    check.run(rows)
    check.run_together(rows)
    if check.told_apart < ENOUGH:
        _probe_beyond_windows(target, TargetError("its tiny copy hardly depends on the context"))
    else:
        _Check(target).run(SHORT, thorough=False)


def _probe_beyond_windows(target: Target, why: TargetError) -> None:
    settings = target.config.get_text_config(decoder=True).to_dict()
    windows = [size for name, size in settings.items() if "window" in name or "chunk" in name if isinstance(size, int)]
    rows = max(windows, default=0) + LONG
    if rows > min(MOST_ROWS, target.spec.max_positions - len(TOKENS)):
        raise _refusal(target, f"it attends within windows of {rows - LONG} tokens, too long to be read, and {why}")
    check = _Check(target)
    check.run(rows)
    if check.told_apart < 1:
        raise _refusal(
            target, f"its logits hardly depend on the context, so that nothing can be told from them, and {why}"
        )


def _refusal(target: Target, reason: str) -> TargetError:
    return TargetError(
        f"{target.spec.family} models cannot be verified as a tree here: {reason}. Choose a target of another family"
    )


class _Check:
    """Trees and batches of one model against its own plain forward."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._allowed = self.told_apart = 0.0

    def run(self, num_rows: int, *, thorough: bool = True) -> None:
        """Behind a prompt of so many rows; raises TargetError with the reason.

        thorough: all branches, a prompt in pieces, and another tree behind an accepted path; else one branch in a few
        forwards.
        """
        known = signature(self._target.model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        for name, meant in INPUTS.items():
            if name not in known and not (takes_any and name != "past_key_values"):
                raise _refusal(self._target, f"its forward takes no {meant} ({name})")
        try:
            if thorough:
                self._run(num_rows)
            else:
                self._glance(num_rows)
        except (torch.OutOfMemoryError, TargetError):
            raise
        except Exception as error:  # whatever a forward raises at inputs that it does not know
            raise _refusal(
                self._target,
                f"its forward takes no cache, positions or rows of ours ({type(error).__name__}: {first_line(error)})",
            ) from error

    def _run(self, num_rows: int) -> None:
        target, prompt = self._target, self._ids(range(num_rows))
        tree, cache = self._tree(num_rows), target.new_cache()
        paths = self._plain_paths(prompt, tree, LEAVES)
        self._scale(paths)
        self.told_apart = float((paths[3] - paths[4]).abs().max()) / self._allowed  # by one token before them
        half = num_rows // 2
        target.prefill(prompt[:half], cache)
        output = target.prefill(prompt[half:], cache)
        self._equal(paths[-1], self._plain(prompt)[-1], NOT_CAUSAL)
        self._equal(output.logits[-1], paths[-1], "after a prompt read in pieces")
        self._verify(tree, cache, paths, "of a tree's node")
        cache.commit(ACCEPTED)
        prompt = prompt + [tree.tokens[node] for node in ACCEPTED]
        tree = self._tree(len(prompt))
        self._verify(tree, cache, self._plain_paths(prompt, tree, LEAVES[:2]), "behind an accepted path")

    def _glance(self, num_rows: int) -> None:
        prompt, tree, cache = self._ids(range(num_rows)), self._tree(num_rows), self._target.new_cache()
        paths = self._plain_paths(prompt, tree, LEAVES[1:2])
        self._scale(paths)
        self._equal(self._target.prefill(prompt, cache).logits[-1], paths[-1], "after a prompt")
        self._verify(tree, cache, paths, "of a tree's node")

    def _verify(self, tree: TokenTree, cache: KVCache, paths: dict[int, Tensor], what: str) -> None:
        """The tree's logits at the nodes of `paths`, and what the shared LM head makes of its hidden states."""
        output = self._target.verify(tree, cache)
        if len(output.hidden) != tree.num_nodes:
            raise _refusal(self._target, "its decoder does not return the hidden states of all rows")
        for node, expected in paths.items():
            if node >= 0:
                self._equal(output.logits[node], expected, what)
        self._equal(self._target.shared.project(output.hidden), output.logits, SHARED)

    def run_together(self, num_rows: int) -> None:
        """A tree behind one sequence and the last tokens of a shorter one, in one forward."""
        prompts = [self._ids(range(num_rows)), self._ids(range(3, num_rows // 2))]
        tree, chain = self._tree(num_rows), TokenTree.chain(prompts[1][-2:])
        caches = [self._target.new_cache() for _ in prompts]
        self._target.prefill(prompts[0], caches[0])
        self._target.prefill(prompts[1][:-2], caches[1])
        first, second = self._target.forward([Span(tree, caches[0]), Span(chain, caches[1], only_last=True)])
        what = "of sequences read together"
        for node, logits in self._plain_paths(prompts[0], tree, LEAVES[:2]).items():
            if node >= 0:
                self._equal(first.logits[node], logits, what)
        self._equal(second.logits[-1], self._plain(prompts[1])[-1], what)

    def _ids(self, places: range) -> list[int]:
        vocab_size = self._target.spec.vocab_size
        return [(FIRST_TOKEN + 5 * place + place * place) % vocab_size for place in places]

    def _tree(self, num_rows: int) -> TokenTree:
        return TokenTree([(FIRST_TOKEN + num_rows + t) % self._target.spec.vocab_size for t in TOKENS], PARENTS)

    @torch.inference_mode()
    def _plain(self, ids: list[int]) -> Tensor:
        """Logits [T, V] as the model alone reads a text."""
        model: Any = self._target.model
        logits: Tensor = model(input_ids=torch.tensor([ids], device=self._target.device), use_cache=False).logits[0]
        return logits.float() if logits.dtype is not torch.float64 else logits

    def _plain_paths(self, prompt: list[int], tree: TokenTree, leaves: tuple[int, ...]) -> dict[int, Tensor]:
        """Logits of the nodes on the paths to some leaves, and of the prompt's last row as node -1."""
        found: dict[int, Tensor] = {}
        for leaf in leaves:
            path = tree.path(leaf)
            logits = self._plain(prompt + [tree.tokens[node] for node in path])[len(prompt) - 1 :]
            found |= dict(zip([-1, *path], logits, strict=True))
        return found

    def _scale(self, paths: dict[int, Tensor]) -> None:
        """Allow of a difference what rounding makes of the spread between contexts."""
        rows = torch.stack(list(paths.values()))
        spread = (rows - rows.mean(0)).abs().max() + 1e-3 * rows.abs().max()
        self._allowed = float(ROUNDING[self._target.dtype] * spread)

    def _equal(self, ours: Tensor, plain: Tensor, what: str) -> None:
        difference = float((ours.to(plain.dtype) - plain).abs().max())
        if not difference <= self._allowed:
            raise _refusal(
                self._target, f"logits {what} differ from its own by {difference:.3g} (allowed {self._allowed:.3g})"
            )
