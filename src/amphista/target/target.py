"""The frozen target: one forward for prefill and verification, on the unmodified `transformers` model.

Prefill is verification of a chain, so there is one path into the model. Logits always come from the model's own
forward, its scaling and soft-capping included; hidden states are what its LM head reads (after the final norm), taken
by a hook on the decoder's output (asking for all hidden states would keep every layer; a hook on the LM head would
be cut by `logits_to_keep`).

Shapes: B sequences, T prompt tokens, N tree nodes, D hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from amphista.cache.hf import as_transformers_cache, as_transformers_slots
from amphista.cache.slots import SlotCache
from amphista.cache.static import KVCache
from amphista.errors import CapacityError, TargetError
from amphista.target.attention import MaskPlan
from amphista.target.spec import Fingerprint, LogitTransform, SharedWeights, TargetSpec
from amphista.target.text import Text
from amphista.tree.token_tree import TokenTree

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class TargetOutput:
    """One forward: logits [N, V] (prefill: [1, V], the last row) and hidden states [N, D] of all rows."""

    logits: Tensor
    hidden: Tensor


class Target:
    """A frozen causal LM that reads chains and trees of tokens.

    model: a `transformers` causal LM. text: its tokenizer side, None for tests on bare token ids.
    """

    def __init__(self, model: Any, text: Text | None = None, *, name: str = "target") -> None:
        self.model = model.eval().requires_grad_(False)
        self.text, self.name = text, name
        self.mask_plan = MaskPlan.for_config(model.config)
        embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        if embedding is None or lm_head is None:
            raise TargetError(f"{model.config.model_type} has no embedding or no LM head that drafters could share")
        self.shared = SharedWeights(embedding, lm_head, LogitTransform.from_config(model.config))
        self.spec = TargetSpec.from_config(
            model.config, embedding_size=embedding.weight.shape[1], vocab_size=lm_head.weight.shape[0]
        )
        self._local = threading.local()  # two threads may decode at once
        self._decoder = model.get_decoder()
        self.num_weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.num_layer_weights = sum(p.numel() for p in self._decoder.parameters()) - embedding.weight.numel()
        self._decoder.register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, module: Any, args: Any, output: Any) -> None:
        self._local.hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    @property
    def device(self) -> torch.device:
        return self.shared.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.head_weight.dtype

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """All end tokens of the generation configuration; it may name one or several."""
        for source in (getattr(self.model, "generation_config", None), self.model.config):
            ids = getattr(source, "eos_token_id", None)
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
        eos = None if self.text is None else self.text.eos_id
        return frozenset() if eos is None else frozenset([eos])

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Which target this is, for drafter checkpoints."""
        return Fingerprint.of(self.spec, self.shared, {} if self.text is None else self.text.vocabulary)

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return KVCache(self.spec.num_layers)

    def new_slots(self, num_slots: int) -> SlotCache:
        """Empty caches for a batch of up to `num_slots` sequences."""
        return SlotCache(self.spec.num_layers, num_slots)

    def prefill(self, token_ids: list[int], cache: KVCache) -> TargetOutput:
        """Read and commit a prompt (or its continuation) in chunks: logits of the last token, hidden of all."""
        hidden = []
        logits = None
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = token_ids[start : start + PREFILL_CHUNK]
            output = self._forward(
                chunk, list(range(len(chunk))), _causal(len(chunk), self.device), cache, logits_to_keep=1
            )
            cache.commit(range(len(chunk)))
            hidden.append(output.hidden)
            logits = output.logits
        if logits is None:
            raise CapacityError("cannot prefill an empty prompt")
        return TargetOutput(logits, torch.cat(hidden))

    def verify(self, tree: TokenTree, cache: KVCache) -> TargetOutput:
        """One forward over the tree's N nodes behind the committed rows; the caller commits the accepted path."""
        ancestors = tree.ancestor_mask().to(self.device)
        return self._forward(tree.tokens, tree.depths, ancestors, cache, logits_to_keep=0)

    @torch.inference_mode()
    def _forward(
        self, token_ids: list[int], depths: list[int], ancestors: Tensor, cache: KVCache, *, logits_to_keep: int
    ) -> TargetOutput:
        past = cache.num_committed
        positions = torch.tensor(depths, device=self.device) + past
        deepest = past + max(depths)
        if deepest >= self.spec.max_positions:
            raise CapacityError(f"position {deepest} is beyond the context of {self.spec.max_positions}")
        try:
            output = self.model(
                input_ids=torch.tensor([token_ids], device=self.device),
                position_ids=positions[None],
                attention_mask=self.mask_plan.write(ancestors, positions, past, self.dtype),
                past_key_values=as_transformers_cache(cache),
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        except BaseException:
            cache.trim(past)  # a failed or interrupted forward leaves no half-written rows
            raise
        hidden = self._local.hidden
        self._local.hidden = None
        return TargetOutput(output.logits[0], hidden[0])

    @torch.inference_mode()
    def extend(self, token_ids: list[int], cache: SlotCache) -> TargetOutput:
        """Read and commit one token for each of the first B slots: logits [B, V], hidden states [B, D].

        Rows are left-aligned, so slot b sees the rows 0..length_b of its own; what lies behind is another sequence's
        rest. raises CapacityError when a slot is at the end of the context.
        """
        cache.make_room(len(token_ids))
        lengths = cache.lengths(len(token_ids))
        if max(lengths) >= self.spec.max_positions:
            raise CapacityError(f"position {max(lengths)} is beyond the context of {self.spec.max_positions}")
        positions = torch.tensor(lengths, device=self.device)
        keys = torch.arange(max(lengths) + 1, device=self.device)
        visible = keys[None] <= positions[:, None]
        output = self.model(
            input_ids=torch.tensor(token_ids, device=self.device)[:, None],
            position_ids=positions[:, None],
            attention_mask=self.mask_plan.write_rows(visible[:, None], positions[:, None], keys[None], self.dtype),
            past_key_values=as_transformers_slots(cache, positions, len(keys)),
            use_cache=True,
            logits_to_keep=0,
        )
        cache.advance(len(token_ids))
        hidden = self._local.hidden
        self._local.hidden = None
        return TargetOutput(output.logits[:, 0], hidden[:, 0])

    @torch.inference_mode()
    def hidden_states(self, token_ids: Tensor) -> Tensor:
        """Hidden states [B, T, D] of right-padded rows [B, T] without a cache, for training.

        Padding needs no mask: causal rows never look to the right.
        """
        output = self._decoder(input_ids=token_ids, use_cache=False)
        self._local.hidden = None
        hidden: Tensor = output.last_hidden_state
        return hidden


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_()
