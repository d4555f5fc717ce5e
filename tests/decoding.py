"""Decoding one sequence to its end, or step by step, for tests."""

from __future__ import annotations

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
