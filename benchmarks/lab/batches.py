"""Throughput of batches: every drafter against plain decoding at the same batch size, in turn.

    python -m benchmarks.lab.batches --data DIR --sizes 1,4,8 --drafters lookup,amphista+lookup
    python -m benchmarks.lab.batches --data DIR --sampling '{"temperature": 0.7, "top_p": 0.9}'

Prompts are first turns of Spec-Bench, spread evenly; answers have 64 to 192 tokens, 128 on average, as they come: of
one length, those without drafts would end together and leave no place empty, those with drafts would not. Told are
decoded tokens a second, prompts included, and the ratio to `none` (median over rounds, and the worst), whether the
tokens were the same, and the slowest answer's tokens per second of its own steps over those of `none`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from amphista.drafter.checkpoint import load_proposer
from amphista.engine.batch import Batch, Job
from amphista.engine.params import SamplingParams
from amphista.evaluation.questions import load_questions
from amphista.llm import LLM
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import load_target

LENGTHS = range(64, 193)


def settings_of(number: int, sampling: dict[str, Any]) -> SamplingParams:
    """Those of one prompt: its own length and seed."""
    return SamplingParams(ignore_eos=True, max_new_tokens=LENGTHS[number * 37 % len(LENGTHS)], seed=number, **sampling)


def run(llm: LLM, prompts: list[list[int]], size: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """One batch of so many prompts, each decoded once."""
    started, tokens, slowest = time.perf_counter(), {}, float("inf")
    jobs = [Job(prompt, settings_of(number, sampling), number) for number, prompt in enumerate(prompts)]
    for finished in Batch[int](llm.engine, size).run(jobs):
        assert finished.error is None, finished.error
        tokens[finished.job.tag] = finished.sequence.output_ids
        slowest = min(slowest, finished.sequence.stats.decode_tokens_per_second or 0.0)
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "rate": sum(map(len, tokens.values())) / seconds, "slowest": slowest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--dtype")
    parser.add_argument("--drafters", default="lookup,amphista+lookup")
    parser.add_argument("--sizes", default="1,2,4,8,16,32")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sampling", type=json.loads, default={}, help="settings of all answers, as JSON")
    asked = parser.parse_args()
    target = load_target(asked.target, dtype=asked.dtype)
    names = ["none", *asked.drafters.split(",")]
    found = {name: load_proposer(name, target.spec, target.shared, target.fingerprint) for name in names}
    llms = {name: LLM(target, proposer) for name, proposer in found.items()}
    questions = load_questions("spec_bench", asked.data, asked.prompts).questions
    prompts = [llms["none"].prompt_ids(question.turns[0]) for question in questions]
    for size in map(int, asked.sizes.split(",")):
        rounds = [
            {name: run(llm, prompts, size, asked.sampling) for name, llm in llms.items()} for _ in range(asked.rounds)
        ]
        for name in names:
            ratios = [done[name]["rate"] / done["none"]["rate"] for done in rounds]
            row = {
                "dtype": asked.dtype or "default",
                **asked.sampling,
                "batch": size,
                "drafter": name,
                "tokens_per_second": round(statistics.median(done[name]["rate"] for done in rounds), 1),
                "over_none": round(statistics.median(ratios), 3),
                "worst": round(min(ratios), 3),
                "slowest_over_none": round(min(done[name]["slowest"] / done["none"]["slowest"] for done in rounds), 3),
                "same_tokens": all(done[name]["tokens"] == done["none"]["tokens"] for done in rounds),
            }
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
