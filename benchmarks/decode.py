"""Decoding compared in one run: stock generate, plain decoding, Medusa, Amphista, interleaved prompt by prompt.

    python benchmarks/decode.py --questions spec_bench.jsonl --limit 40 --out benchmarks/<machine>/decode

Takes every n-th question of the file (first turn), writes OUT/records.jsonl (question ids, token ids, counts and times;
never question text), OUT/run.json (machine, versions, settings) and OUT/report.md. Speedups are ratios of tokens per
second in this one run, on the same engine and counter; `hf` is the stock `generate` of transformers, greedy only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import amphista
from amphista import provenance
from amphista.drafter.checkpoint import load_drafter
from amphista.evaluation.lossless import first_divergence
from amphista.evaluation.metrics import loop_free_length, tau_over
from amphista.jsonl import read_lines
from amphista.llm import LLM, finish

WARM_UP_TOKENS = 8
Record = dict[str, Any]


def main() -> None:
    arguments = read_arguments()
    names = arguments.methods.split(",")
    if names[0] != "none":
        raise SystemExit("--methods must begin with none: everything is compared with it")
    if arguments.temperature and "hf" in names:
        raise SystemExit("hf draws its own noise: compare it greedily")
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = amphista.load(arguments.target, "none")
    methods = {name: make_method(base, name) for name in names}
    run = {"settings": {key: str(value) for key, value in vars(arguments).items() if key not in ("questions", "out")}}
    run["settings"]["questions"] = arguments.questions.name
    (arguments.out / "run.json").write_text(json.dumps(run | provenance.record(), indent=1) + "\n")
    records = []
    with (arguments.out / "records.jsonl").open("w") as stream:
        for record in measure(base, methods, arguments):
            records.append(record)
            stream.write(json.dumps(record) + "\n")
            stream.flush()
    report = write_report(records, list(methods), arguments)
    (arguments.out / "report.md").write_text(report)
    print(report)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--methods", default="none,hf,medusa@8,amphista@8,medusa@16,amphista@16")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args()


def make_method(base: LLM, name: str) -> LLM | None:
    """`drafter` or `drafter@tree`; None stands for stock generate."""
    if name == "hf":
        return None
    drafter, _, tree = name.partition("@")
    loaded = load_drafter(drafter, base.target.spec, base.target.shared, base.target.fingerprint)
    return LLM(base.target, loaded, tree=tree or None)


def measure(base: LLM, methods: dict[str, LLM | None], arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per question and method; a warm-up of each method first."""
    questions = [question for _, question in read_lines(arguments.questions)]
    picked = questions[:: max(1, len(questions) // arguments.limit)][: arguments.limit]
    for index, question in enumerate([picked[0], *picked]):
        is_warm_up = index == 0
        params = amphista.SamplingParams(
            max_new_tokens=WARM_UP_TOKENS if is_warm_up else arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=index,
        )
        prompt_ids = base.prompt_ids(question["turns"][0])
        plain: list[int] | None = None
        for name, llm in methods.items():
            record = run_hf(base, prompt_ids, params) if llm is None else run_ours(llm, prompt_ids, params)
            if name == "none":
                plain = record["token_ids"]
            if is_warm_up:
                continue
            record |= {"id": question["question_id"], "category": question["category"], "method": name, "seed": index}
            yield record | compare(base, prompt_ids, params, record["token_ids"], plain, name)
        sys.stderr.write(f"{index}/{len(picked)}\r")


def compare(
    base: LLM,
    prompt_ids: list[int],
    params: amphista.SamplingParams,
    ours: list[int],
    plain: list[int] | None,
    name: str,
) -> Record:
    """Against `none`, which therefore comes first."""
    if plain is None or name == "none":
        return {}
    found = first_divergence(base.target, prompt_ids, params, ours, plain)
    return {"divergence": None if found is None else {"position": found.position, "margin": found.margin}}


def run_ours(llm: LLM, prompt_ids: list[int], params: amphista.SamplingParams) -> Record:
    stats = (answer := finish(llm.stream_ids(prompt_ids, params))).stats
    return {
        "token_ids": answer.token_ids,
        "accepted": stats.accepted,
        "seconds": stats.seconds,
        "prefill_seconds": stats.prefill_seconds,
        "phase_seconds": stats.phase_seconds,
        "finish_reason": str(answer.finish_reason),
    }


def run_hf(base: LLM, prompt_ids: list[int], params: amphista.SamplingParams) -> Record:
    ids = torch.tensor([prompt_ids])
    started = time.perf_counter()
    out = base.target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_new_tokens, do_sample=False
    )
    seconds = time.perf_counter() - started
    token_ids = out[0, len(prompt_ids) :].tolist()
    return {"token_ids": token_ids, "accepted": [0] * (len(token_ids) - 1), "seconds": seconds}


def write_report(records: list[Record], methods: list[str], arguments: argparse.Namespace) -> str:
    by_method = {name: [r for r in records if r["method"] == name] for name in methods}
    machine = provenance.machine()
    lines = [
        f"# Decoding {arguments.target}",
        "",
        f"{len(by_method[methods[0]])} questions of {arguments.questions.name}, first turns, at most "
        f"{arguments.max_new_tokens} new tokens, temperature {arguments.temperature:g}, float32. "
        f"{machine['processor']}, {machine['torch_threads']} threads, {machine['instruction_set']}.",
        "",
        "tau: tokens committed per target forward (loop-free: before an answer starts to loop). identical: answers "
        "equal to `none`. Speedups: tokens per second over `none` in this run; decode: without the prompt.",
        "",
        "| method | tau | tau loop-free | tokens/s | speedup | decode speedup | identical |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(name, by_method) for name in methods]
    loops = sum(loop_free_length(r["token_ids"]) < len(r["token_ids"]) for r in by_method["none"])
    lines += ["", f"{loops} of {len(by_method['none'])} answers run into a loop.", ""]
    for record in records:
        if record.get("divergence"):
            at = record["divergence"]
            lines.append(
                f"- {record['method']} differs on question {record['id']} at token {at['position']}; "
                f"the target's margin there is {at['margin']:.2g}"
            )
    return "\n".join(lines) + "\n"


def row(name: str, by_method: dict[str, list[Record]]) -> str:
    mine, plain = by_method[name], by_method["none"]
    answers = [(r["token_ids"], r["accepted"]) for r in mine]
    rate, plain_rate = whole_rate(mine), whole_rate(plain)
    same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(mine, plain, strict=True))
    decode = "" if name == "hf" else f"{decode_rate(mine) / decode_rate(plain):.2f}x"
    return (
        f"| {name} | {tau_over(answers):.2f} | {tau_over(answers, loop_free=True):.2f} | {rate:.1f} | "
        f"{rate / plain_rate:.2f}x | {decode} | {same}/{len(mine)} |"
    )


def whole_rate(records: list[Record]) -> float:
    return sum(len(r["token_ids"]) for r in records) / sum(r["seconds"] for r in records)


def decode_rate(records: list[Record]) -> float:
    tokens = sum(len(r["token_ids"]) - 1 for r in records)
    return tokens / sum(r["seconds"] - r["prefill_seconds"] for r in records)


if __name__ == "__main__":
    main()
