"""Load on OpenAI-compatible servers: closed loops of so many clients, the servers taking turns.

    amphista serve --max-waiting 64 &
    python -m benchmarks.lab.load --data DIR --server amphista=http://127.0.0.1:8000 \
        --server none=http://127.0.0.1:8000,none --concurrency 1,4,16,64 --temperatures 0,0.7

Each client sends its next prompt when its last answer has ended. Prompts are Spec-Bench's first turns, spread evenly;
answers have 128 tokens whatever they say; nothing of a prompt is known to a server from the run before. `,none` behind
an address asks an amphista server to decode plainly. Told by server, concurrency and temperature, over all rounds: TTFT
(send to first text), TPOT (last - first) / (tokens - 1), tokens a second of all clients together, how that stands to
the last server named, and whether the texts were the same as its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from amphista.evaluation.questions import load_questions

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Server:
    """Where it is, and what is added to each request."""

    name: str
    url: str
    extra: dict[str, Any]

    @classmethod
    def of(cls, text: str) -> Server:
        """From NAME=URL or NAME=URL,none."""
        name, _, address = text.partition("=")
        url, _, drafter = address.partition(",")
        return cls(name, url, {"amphista": {"drafter": drafter}} if drafter else {})


@dataclass
class Answer:
    """One answer: when its pieces came, seconds from when it was sent."""

    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0
    text: str = ""

    @property
    def tpot(self) -> float:
        """Seconds a token, after the first."""
        return (self.last - self.first) / max(1, self.num_tokens - 1)


@dataclass
class Run:
    """All answers of one round, in the order of the prompts."""

    answers: list[Answer]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second of all clients together."""
        return sum(answer.num_tokens for answer in self.answers) / self.seconds


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    prompts: Sequence[str]
    num_tokens: int
    key: str | None = None


def body_of(server: Server, load: Load, prompt: str, temperature: float, salt: str) -> dict[str, Any]:
    """A request that any of these servers understands; what one does not know, it ignores."""
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": load.num_tokens,
        "temperature": temperature,
        "seed": 1,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
        "cache_prompt": False,
        **server.extra,
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Read one answer; waits and asks again where the server says so."""
    answer, started = Answer(), time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == 429:
            await asyncio.sleep(float(response.headers.get("retry-after", 1)))
            return await ask(client, body)
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    answer.last = time.perf_counter() - started
                    answer.first = answer.first or answer.last
                    answer.text += piece
            if usage := chunk.get("usage"):
                answer.num_tokens = usage["completion_tokens"]
    return answer


async def run(server: Server, load: Load, concurrency: int, temperature: float, salt: str) -> Run:
    """One closed loop."""
    headers = {} if load.key is None else {"Authorization": f"Bearer {load.key}"}
    limits = httpx.Limits(max_connections=None)
    answers = [Answer()] * len(load.prompts)
    waiting = iter(list(enumerate(load.prompts)))
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=None, limits=limits) as client:

        async def loop() -> None:
            for number, prompt in waiting:
                answers[number] = await ask(client, body_of(server, load, prompt, temperature, salt))

        started = time.perf_counter()
        await asyncio.gather(*(loop() for _ in range(concurrency)))
        return Run(answers, time.perf_counter() - started)


def told(name: str, runs: Sequence[Run], beside: Sequence[Run]) -> dict[str, Any]:
    """Figures of one server's rounds, and beside the last server's."""
    answers = [answer for one in runs for answer in one.answers]
    ratios = [one.rate / other.rate for one, other in zip(runs, beside, strict=True)]
    pairs = [
        pair for one, other in zip(runs, beside, strict=True) for pair in zip(one.answers, other.answers, strict=True)
    ]
    return {
        "server": name,
        "tokens_per_second": round(statistics.median(one.rate for one in runs), 1),
        "over_last": round(statistics.median(ratios), 3),
        "worst_over_last": round(min(ratios), 3),
        "same_texts": sum(answer.text == other.text for answer, other in pairs),
        "answers": len(answers),
        "ttft_ms": dict(_quantiles([1000 * answer.first for answer in answers])),
        "tpot_ms": dict(_quantiles([1000 * answer.tpot for answer in answers])),
        "slowest_5_percent_over_last": _slowest(pairs),
    }


def _slowest(pairs: Sequence[tuple[Answer, Answer]]) -> float:
    """The ratio of speeds that 95 of 100 requests reach."""
    ratios = sorted(other.last / answer.last for answer, other in pairs)
    return round(ratios[len(ratios) // 20], 3)


def _quantiles(values: Sequence[float]) -> Iterator[tuple[str, float]]:
    ordered = sorted(values)
    for name, share in QUANTILES.items():
        yield name, round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", type=Server.of, required=True, metavar="NAME=URL[,none]")
    parser.add_argument("--data", type=Path, help="folder with spec_bench.jsonl")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--key")
    asked = parser.parse_args()
    questions = load_questions("spec_bench", asked.data, asked.prompts).questions
    load = Load([question.turns[0] for question in questions], asked.tokens, asked.key)
    for temperature in map(float, asked.temperatures.split(",")):
        for concurrency in map(int, asked.concurrency.split(",")):
            runs: dict[str, list[Run]] = {server.name: [] for server in asked.server}
            for number in range(asked.rounds):
                for server in asked.server:
                    salt = f"{server.name} {temperature} {concurrency} {number} {time.time()}"
                    runs[server.name].append(asyncio.run(run(server, load, concurrency, temperature, salt)))
            for name, each in runs.items():
                row = {
                    "concurrency": concurrency,
                    "temperature": temperature,
                    **told(name, each, list(runs.values())[-1]),
                }
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
