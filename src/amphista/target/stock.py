"""The forward of an unmodified `transformers` model: over spans, over whole texts, over embeddings.

Logits come from the model's own forward, under masks by its own rules (attention.py), its scaling and soft-capping
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from amphista.cache.hf import Rows, as_transformers_cache
from amphista.cache.static import sent
from amphista.target.attention import Layout, laid_out
from amphista.target.families import decoder_of
from amphista.target.hidden_states import HookedStates, Taps
from amphista.target.probe_rows import embedded, layers_of
from amphista.target.spans import Span


class StockForward:
    """A causal LM, and the hooks on it that keep hidden states and taps."""

    def __init__(self, model: Any, num_layers: int) -> None:
        self._model, self.decoder = model, decoder_of(model)
        self._kept = HookedStates(self.decoder, num_layers)
        self._keeps_logits = "logits_to_keep" in signature(model.forward).parameters

    def __call__(
        self, spans: Sequence[Span], wanted: Tensor | None, taps: Taps, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Logits of the rows `wanted`, hidden states and taps of all, of one row of all tokens; cache and masks keep
        sequences apart."""
        layout = Layout.of_all(spans, device)
        inputs: dict[str, Any] = {}
        if wanted is not None and self._keeps_logits:  # as indices: given a number, some leave rows out before the end
            inputs["logits_to_keep"] = wanted
        cache = as_transformers_cache([layers_of(span) for span in spans], [span.tree.num_nodes for span in spans])
        if any(span.probes is not None for span in spans):
            inputs["inputs_embeds"] = embedded(self._model.get_input_embeddings(), spans, device)[None]
        else:
            inputs["input_ids"] = sent([token for span in spans for token in span.tree.tokens], device)[None]
        self._kept.hook(taps)
        with laid_out(layout):
            output = self._model(position_ids=layout.positions, past_key_values=cache, use_cache=True, **inputs)
        hidden, logits = self._kept.take(taps)[0], output.logits[0]
        return logits if wanted is None or len(logits) == len(wanted) else logits[wanted], hidden

    def hidden(self, token_ids: Tensor, taps: Taps) -> Tensor:
        """Hidden states and taps [B, T, W] of right-padded rows [B, T] without a cache."""
        self._kept.hook(taps)
        self.decoder(input_ids=token_ids, use_cache=False)
        return self._kept.take(taps)

    def read(self, inputs: Tensor, layout: Layout, rows: Sequence[Sequence[Rows]]) -> Tensor:
        """Hidden states [1, N, D] of embeddings [1, N, embedding size]; rows: by layer, of the one sequence."""
        cache = as_transformers_cache(list(zip(*rows, strict=True)), [inputs.shape[1]])
        with laid_out(layout):
            self.decoder(inputs_embeds=inputs, position_ids=layout.positions, past_key_values=cache, use_cache=True)
        return self._kept.take(())

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._kept.remove()
