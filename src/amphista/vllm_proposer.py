"""Drafts inside vLLM, as a chain: the proposer that its `speculative_config` names (method `custom_class`).

`amphista dev export vllm FOLDER` writes the module to name. vLLM verifies, samples and schedules; a tree it cannot
verify. It hands a custom proposer tokens only, so the target's hidden states are read by a hook on its model.

Law: what is drafted is what our own drafter drafts of the same tokens and hidden states, whatever the batch, the chunks
of a prompt, or where requests stand in a batch. A drafter's state is a function of the tokens it was made of, and found
again by them: no request has a name here.

Shapes: T rows of a request in a step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amphista.drafter.base import Ask, Drafter, DrafterState
from amphista.drafter.checkpoint import load_drafter
from amphista.drafter.lookup import LOOKUP
from amphista.errors import ConfigError, DrafterError, TargetError
from amphista.target.loading import ModelSource, load_text
from amphista.target.spec import Fingerprint, LogitTransform, SharedWeights, TargetSpec
from amphista.tree.grow import ChainGrower

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}  # nothing stands between their embedding, layers and LM head
GRAPHS_UNSEEN = "recorded graphs run no hooks: start vLLM with enforce_eager=True or cudagraph_mode PIECEWISE"


@dataclass(frozen=True)
class StepRows:
    """What a step told of a request: its token ids by now, the position of the first row that was read, the hidden
    states [T, D] of all that were (rejected drafts behind the others), and whether a draft is wanted."""

    token_ids: np.ndarray[Any, np.dtype[np.integer[Any]]]
    start: int
    hidden: Tensor
    wants_draft: bool = True

    @property
    def next_ids(self) -> list[int]:
        """The tokens that followed the rows that stay."""
        ids: list[int] = self.token_ids[self.start + 1 :][: len(self.hidden)].tolist()
        return ids


@dataclass(eq=False)
class _Known:
    """A drafter's state of these tokens; it has read the rows from position `first` on."""

    token_ids: np.ndarray[Any, np.dtype[np.integer[Any]]]
    first: int
    state: DrafterState

    def starts(self, rows: StepRows) -> bool:
        """Whether the rows before these are among its own."""
        end = rows.start + 1
        mine, others = self.token_ids, rows.token_ids
        fits = self.first < rows.start < len(mine) and mine[end - 1] == others[end - 1]
        return fits and np.array_equal(mine[:end], others[:end])


class ChainDrafts:
    """The drafter's states of what runs, and of up to `capacity` sequences in all, those used last."""

    def __init__(self, heads: Drafter, num_tokens: int, capacity: int) -> None:
        self._heads, self._num_tokens, self._capacity = heads, num_tokens, capacity
        self._known: list[_Known] = []  # in the order of their last use
        self._grower = ChainGrower()

    def propose(self, rows: Sequence[StepRows]) -> list[list[int]]:
        """For each request of a step the tokens drafted behind its last one; none where none are wanted."""
        asks = [self._ask(request) for request in rows]
        self._heads.commit_all([ask for ask, request in zip(asks, rows, strict=True) if not request.wants_draft])
        wanting = [index for index, request in enumerate(rows) if request.wants_draft]
        drafts: list[list[int]] = [[] for _ in rows]
        if wanting:
            offered = self._heads.draft_all([asks[index] for index in wanting], self._grower.num_ranks)
            for index, candidates in zip(wanting, offered, strict=True):
                pending = int(rows[index].token_ids[-1])
                tree = self._grower.grow(pending, candidates, self._num_tokens).tree
                drafts[index] = list(tree.tokens[1:])
        return drafts

    def _ask(self, rows: StepRows) -> Ask:
        next_ids = rows.next_ids
        known = self._of(rows)
        known.token_ids = rows.token_ids[: rows.start + len(next_ids) + 1].copy()
        self._known = [*self._known, known][-self._capacity :]
        depth = min(self._num_tokens, self._heads.num_heads)
        return Ask(known.state, depth, hidden=rows.hidden[: len(next_ids)], next_ids=next_ids)

    def _of(self, rows: StepRows) -> _Known:
        """The state that has read just what stands before these rows: taken where it is, copied from one that has read
        more, or empty where nobody has (rows of vLLM's own prefix cache): it drafts from less context then."""
        found = [known for known in self._known if known.starts(rows)] if rows.start else []
        for known in found:
            if len(known.token_ids) == rows.start + 1:
                self._known.remove(known)
                return known
        if found:
            first = found[-1].first
            return _Known(rows.token_ids, first, self._heads.copy(found[-1].state, rows.start - first))
        return _Known(rows.token_ids, rows.start, self._heads.start())


class ChainProposer:
    """What vLLM makes of the class it was named. `drafter`: a shipped name, a folder or a hub id."""

    drafter = "amphista"

    def __init__(self, vllm_config: Any) -> None:
        """raises TargetError or ConfigError for what it cannot draft for."""
        self._config = vllm_config.model_config
        self._num_tokens = vllm_config.speculative_config.num_speculative_tokens
        self._capacity = vllm_config.scheduler_config.max_num_seqs
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
            raise ConfigError("the target is split over several devices: amphista drafts in vLLM for one")
        family = self._config.hf_config.model_type
        if family not in FAMILIES:
            raise TargetError(f"amphista drafts in vLLM for {', '.join(sorted(FAMILIES))}, not for {family}")
        if self.drafter.endswith(LOOKUP):
            raise DrafterError("lookup is vLLM's own method 'ngram': name a drafter with heads")
        self._step: tuple[Tensor, list[int], list[int]] | None = None

    def load_model(self, model: nn.Module) -> None:
        """Load the drafter for vLLM's model, whose embedding and LM head it shares, and watch that model's forwards."""
        config = self._config.hf_config
        embedding, head = _shared_tables(model, config.vocab_size)
        shared = SharedWeights(embedding, head, LogitTransform())
        spec = TargetSpec.from_config(config, embedding_size=embedding.embedding_dim, vocab_size=config.vocab_size)
        name = self._config.tokenizer
        text = load_text(ModelSource(name, name, {}))
        heads = load_drafter(self.drafter, spec, shared, Fingerprint.of(spec, shared, text.vocabulary))
        if self._num_tokens > heads.num_heads:
            raise ConfigError(f"num_speculative_tokens is {self._num_tokens}: this drafter has {heads.num_heads} heads")
        heads.freeze(native=heads.device.type == "cpu")
        self._drafts = ChainDrafts(heads, self._num_tokens, self._capacity)
        model.register_forward_hook(self._watch, with_kwargs=True)

    def _watch(self, model: nn.Module, args: Any, inputs: dict[str, Any], hidden: Tensor) -> None:
        """Keep the hidden states of a forward, and which rows are whose."""
        from vllm.forward_context import get_forward_context

        by_layer = get_forward_context().attn_metadata
        if by_layer:  # else it is a trial run
            bounds = next(iter(by_layer.values())).query_start_loc.tolist()
            self._step = hidden, bounds, inputs["positions"].tolist()

    @torch.inference_mode()
    def propose(
        self, sampled: list[list[int]], num_tokens: Any, token_ids: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Up to `num_speculative_tokens` for each request of the last forward that has sampled."""
        if self._step is None:
            raise ConfigError(GRAPHS_UNSEEN)
        (hidden, bounds, positions), self._step = self._step, None
        return self._drafts.propose(
            [
                StepRows(token_ids[b, : num_tokens[b]], positions[first], hidden[first:end], bool(new))
                for b, (first, end, new) in enumerate(zip(bounds, bounds[1:], sampled, strict=False))
            ]
        )


def _shared_tables(model: nn.Module, vocab_size: int) -> tuple[nn.Embedding, nn.Linear]:
    """The embedding and the LM head of vLLM's model without their padding; no copies."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    embedding = next((m for m in tables if not isinstance(m, ParallelLMHead)), None)
    head = next((m for m in tables if isinstance(m, ParallelLMHead)), embedding)
    if embedding is None or head is None or not all(m.weight.is_floating_point() for m in (embedding, head)):
        raise TargetError("vLLM holds no plain embedding and LM head of this target that a drafter could share")
    rows = [nn.Parameter(m.weight[:vocab_size], requires_grad=False) for m in (embedding, head)]
    linear = nn.Linear(rows[1].shape[1], vocab_size, bias=False, device="meta")
    linear.weight = rows[1]
    return nn.Embedding.from_pretrained(rows[0]), linear
