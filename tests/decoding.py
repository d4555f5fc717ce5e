"""Decoding one sequence to its end, or step by step, for tests; a drafter's heads along a path."""

from __future__ import annotations

import torch

from amphista.drafter.rounds import SequentialHeads
from amphista.engine.params import SamplingParams
from amphista.engine.prefixes import taken_over
from amphista.engine.sequence import Sequence
from amphista.engine.step import Engine, StepResult


def step(engine: Engine, sequence: Sequence) -> StepResult:
    """One step of one sequence; its error, if it has one, is raised."""
    (result,) = engine.step([sequence])
    if isinstance(result, Exception):
        raise result
    return result


def begin(engine: Engine, prompt: list[int], params: SamplingParams, after: Sequence | None = None) -> Sequence:
    """A sequence whose prompt has been read; after: one whose caches it takes over."""
    sequence = engine.new_sequence(prompt, params)
    if after is not None:
        sequence.adopt(taken_over(after.rows, sequence.token_ids))
        after.release()
    while not sequence.num_output:
        step(engine, sequence)
    return sequence


def decode(engine: Engine, prompt: list[int], params: SamplingParams, after: Sequence | None = None) -> Sequence:
    """A finished sequence."""
    sequence = begin(engine, prompt, params, after)
    while not sequence.is_finished:
        step(engine, sequence)
    return sequence


def training_rows(target, drafter, token_ids):
    """What training gives a drafter of a text, a row for each of its tokens: [1, T, W]."""
    ids = torch.tensor([token_ids])
    rows = [target.hidden_states(ids, drafter.taps)]
    if drafter.num_early:
        rows.append(target.early_states(ids, drafter.num_early))
    return torch.cat(rows, dim=-1).clone()


def started(target, drafter, token_ids):
    """A drafter's state of a sequence of which the target has read these tokens, and the drafter nothing."""
    state = drafter.start()
    state.target_cache = target.new_cache()
    target.prefill(token_ids, state.target_cache)
    return state


@torch.inference_mode()
def heads_along(drafter, state, tokens):
    """What each head says behind the last row of a state, decoding: states [K, D], where `tokens` [K - 1] follow the
    pending one."""
    if not isinstance(drafter, SequentialHeads):
        return drafter.draft_states([state])[0]
    paths = [drafter.first([state])]
    for token in tokens[: drafter.num_heads - 1]:
        paths.append(drafter.next(paths[-1], torch.as_tensor(token).view(1)))
    return torch.cat([path.states for path in paths])
