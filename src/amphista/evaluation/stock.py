"""Stock `transformers` decoding on the stock model: plain `generate`, prompt lookup, assisted generation.

Each at the settings that were fastest where we tried: the model's own attention (sdpa), its dynamic cache, under
`torch.inference_mode` (on CPU about a tenth faster than `generate` alone, and faster than a static cache). Forwards are
counted by hooks on the model, never taken from the library's own statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.stats import now
from amphista.errors import ConfigError
from amphista.target.loading import load_target
from amphista.target.target import Target

LOOKUP_TOKENS = 10  # the value in the documentation of transformers


@dataclass(frozen=True)
class Variant:
    """What is added to `generate`: entries of its configuration, models, and their description for the record."""

    settings: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)


def plain() -> Variant:
    """Autoregressive `generate`."""
    return Variant({"generate": "autoregressive"})


def prompt_lookup(nodes: str | None) -> Variant:
    """Prompt lookup drafting up to `nodes` - 1 tokens behind the pending one."""
    num_tokens = LOOKUP_TOKENS if nodes is None else int(nodes) - 1
    arguments = {"prompt_lookup_num_tokens": num_tokens}
    return Variant({"generate": "prompt lookup", **arguments}, arguments)


def assisted(name: str, target: Target) -> Variant:
    """Assisted generation with a smaller causal LM; raises ConfigError unless both share one vocabulary."""
    assistant = load_target(name, device=str(target.device), fast=False)
    ours = None if target.text is None else target.text.vocabulary
    theirs = None if assistant.text is None else assistant.text.vocabulary
    if ours != theirs:
        raise ConfigError(f"the draft model {name} has another vocabulary than the target {target.name}")
    described = {"generate": "assisted", "assistant": name, "assistant_sha256": assistant.fingerprint.lm_head_sha256}
    return Variant(described, models={"assistant_model": assistant.model})


class ForwardMeter:
    """Rows before and in each forward of a model, and when it ended; read through hooks, which change nothing."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.rows_before: list[int] = []
        self.rows: list[int] = []
        self.ends: list[float] = []

    @contextmanager
    def attached(self) -> Iterator[ForwardMeter]:
        """Count while the block runs."""
        model = self._target.model
        hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.rows_before.append(0 if cache is None else int(cache.get_seq_length()))
        self.rows.append(int(ids.shape[1]))

    def _after(self, module: Any, args: Any, output: Any) -> None:
        self.ends.append(now(self._target.device))


class StockGenerate:
    """`model.generate` as a method. At temperature 0 its tokens are the target's; above, it draws its own noise."""

    def __init__(self, target: Target, variant: Variant) -> None:
        self._target, self._variant = target, variant
        self.settings = {
            "engine": "transformers",
            "dtype": target.type_name,
            "attention": target.model.config._attn_implementation,
            "cache": "dynamic",
            "inference_mode": True,
            **variant.settings,
        }

    def run(self, prompt_ids: list[int], params: SamplingParams) -> dict[str, Any]:
        target = self._target
        ids = torch.tensor([prompt_ids], device=target.device)
        room = target.spec.max_positions + 1 - len(prompt_ids)  # where our engine ends with `length`
        config = self._generation_config(params, min(params.max_new_tokens, room))
        devices = [target.device] if target.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(), ForwardMeter(target).attached() as meter:
            torch.manual_seed((params.seed or 0) % 2**63)
            started = now(target.device)
            output = target.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, **self._variant.models
            )
            ended = now(target.device)
        token_ids = output[0, len(prompt_ids) :].tolist()
        return self._measured(meter, (started, ended), len(prompt_ids), token_ids, self._end_tokens(params))

    def _end_tokens(self, params: SamplingParams) -> frozenset[int]:
        return frozenset() if params.ignore_eos else self._target.eos_ids

    def _generation_config(self, params: SamplingParams, max_new_tokens: int) -> Any:
        """Explicit settings only: the model's own generation_config may say otherwise and must not."""
        eos = sorted(self._end_tokens(params))  # empty: none; None would be the model's own
        generation_config = self._target.model.generation_config
        sampling = {
            "temperature": params.temperature,
            "top_k": max(params.top_k, 0),
            "top_p": params.top_p,
            "min_p": params.min_p or (0.0 if generation_config.min_p else None),  # None: the model's own
        }
        return type(generation_config)(
            max_new_tokens=max_new_tokens,
            do_sample=not params.is_greedy,
            num_beams=1,
            repetition_penalty=params.repetition_penalty,
            eos_token_id=eos,
            pad_token_id=eos[0] if eos else 0,  # never used; left out, `generate` would take an end token's
            use_cache=True,
            **self._variant.arguments,
            **({} if params.is_greedy else sampling),
        )

    def _measured(
        self,
        meter: ForwardMeter,
        span: tuple[float, float],
        num_prompt: int,
        token_ids: list[int],
        eos: frozenset[int],
    ) -> dict[str, Any]:
        """What the forwards say. Before forward i the cache holds all tokens but the pending one."""
        started, ended = span
        length = next((i + 1 for i, token in enumerate(token_ids) if token in eos), len(token_ids))
        committed = [rows + 1 - num_prompt for rows in meter.rows_before[1:]] + [len(token_ids)]
        kept = [min(count, length) for count in committed]
        num_steps = sum(before < length for before in kept[:-1])
        steps = [after - before - 1 for before, after in pairwise(kept[: num_steps + 1])]
        edges = [*meter.ends[:num_steps], ended]
        text = self._target.text
        return {
            "token_ids": token_ids[:length],
            "pieces": [] if text is None else [text.decode(token_ids[:length])],
            "accepted": steps,
            "tree_nodes": meter.rows[1 : num_steps + 1],
            "step_seconds": [after - before for before, after in pairwise(edges)],
            "prefill_tokens": kept[0],
            "seconds": ended - started,
            "prefill_seconds": meter.ends[0] - started,
            "phase_seconds": {"prefill": meter.ends[0] - started, "generate": ended - meter.ends[0]},
            "finish_reason": str(FinishReason.STOP if token_ids[length - 1] in eos else FinishReason.LENGTH),
        }
