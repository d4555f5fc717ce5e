"""Load on OpenAI-compatible servers: closed loops of so many clients, all systems taking turns.

    LLAMA_CPP=build python -m benchmarks.lab.load --gguf FILE --data DIR --out DIR

The script starts the servers; one after the other answers the same prompts while the others are stopped; OUT has every
answer's times (records.jsonl) and the tables made from them (run.json). Systems, those asked for by `--systems`:

    amphista      amphista serve, default target and drafter; `--serve NAME='--max-stall 0.3'` adds one with options
    none          the same server, asked to decode plainly
    engine        the same engine without a server, in this process; one client alone
    llama         llama-server of a build of llama.cpp on the same GGUF, 16 slots
    llama-ngram   the same with `--spec-type ngram-simple`
    transformers  transformers serve with continuous batching, on the same weights in float32; one round, few prompts

Each client sends its next prompt when its last answer has ended. Prompts are Spec-Bench's first turns, spread evenly,
read anew in every round; answers are as long whatever they say. TTFT: from sending, refusals
included, to first text. TPOT: (last - first) /
(tokens - 1). Throughput: tokens of all clients a second. `over`: how a system's throughput stands to that of the first
system, round by round; `same_texts`: answers that are the first system's to the letter.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httptools

from amphista import provenance
from amphista.evaluation.questions import load_questions
from amphista.llm import load
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import locate

SYSTEMS = "none,amphista,engine,llama,llama-ngram,transformers"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
START_SECONDS = 300
SLOTS, CONTEXT = 16, 2048


@dataclass
class Answer:
    """One answer: when its pieces came, seconds from when it was sent."""

    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0
    text: str = ""
    num_refused: int = 0

    @property
    def tpot(self) -> float:
        """Seconds a token, after the first."""
        return (self.last - self.first) / max(1, self.num_tokens - 1)


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: str
    num_tokens: int
    temperature: float
    salt: str


@dataclass(frozen=True)
class System:
    """Who answers, and how much is asked of it."""

    name: str
    answer: Callable[[Asked], Awaitable[Answer]]
    process: subprocess.Popen[bytes] | None = None
    most_clients: int = 10**6
    most_rounds: int = 10**6
    most_prompts: int = 10**6


class RefusedError(Exception):
    """The server has too much to do: it is asked again."""


class Events(asyncio.Protocol):
    """Sends one request and reads the events of its answer; light, because it runs on the cores that it measures."""

    def __init__(self, request: bytes) -> None:
        self._request, self._rest = request, b""
        self._parser = httptools.HttpResponseParser(self)
        self.answer, self.done = Answer(), asyncio.get_running_loop().create_future()
        self._started = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._read(json.loads(line[6:]))

    def _read(self, chunk: dict[str, Any]) -> None:
        answer = self.answer
        if "error" in chunk:
            raise RefusedError(chunk["error"])
        for choice in chunk.get("choices", []):
            if piece := choice["delta"].get("content"):
                answer.last = time.perf_counter() - self._started
                answer.first = answer.first or answer.last
                answer.text += piece
        if usage := chunk.get("usage"):
            answer.num_tokens = usage["completion_tokens"]

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        if status != 200 or not self.answer.num_tokens:
            failure = f"answered {status}, {self.answer}, {self._rest[:300]!r}"
            self._fail(RefusedError(failure) if status in (429, 503) else RuntimeError(failure))
        elif not self.done.done():
            self.done.set_result(self.answer)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or RuntimeError(f"hung up behind {self.answer}"))

    def _fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def exactly(asked: Asked, **more: Any) -> dict[str, Any]:
    """For servers that ignore what they do not know: no filter, no early end, nothing known of the prompt."""
    return {"top_k": 0, "min_p": 0.0, "ignore_eos": True, "cache_prompt": False, "cache_salt": asked.salt, **more}


def server(port: int, extra: Callable[[Asked], dict[str, Any]] = exactly) -> Callable[[Asked], Awaitable[Answer]]:
    """Asks a server."""

    async def answer(asked: Asked) -> Answer:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": asked.prompt}],
            "max_tokens": asked.num_tokens,
            "temperature": asked.temperature,
            **{"top_p": 1.0, "seed": 1, "stream": True, "stream_options": {"include_usage": True}},
            **extra(asked),
        }
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data
        loop = asyncio.get_running_loop()
        began, num_refused = time.perf_counter(), 0
        while True:
            sent = time.perf_counter()
            transport, events = await loop.create_connection(lambda: Events(request), "127.0.0.1", port)
            try:
                found: Answer = await events.done
                break
            except RefusedError:
                num_refused += 1
                await asyncio.sleep(1.0)
            finally:
                transport.close()
        found.first, found.last, found.num_refused = found.first + sent - began, found.last + sent - began, num_refused
        return found

    return answer


def for_transformers(asked: Asked) -> dict[str, Any]:
    """It takes no field that it does not know; without an end token in its settings an answer has its full length."""
    settings = {"do_sample": asked.temperature > 0, "top_k": 0}
    return {"model": locate(DEFAULT_TARGET), "generation_config": json.dumps(settings)}


def engine() -> Callable[[Asked], Awaitable[Answer]]:
    """The engine of this process."""
    llm = load()

    def decode(asked: Asked) -> Answer:
        answer, started = Answer(), time.perf_counter()
        settings: dict[str, Any] = {"max_new_tokens": asked.num_tokens, "temperature": asked.temperature, "seed": 1}
        stream = llm.stream(asked.prompt, ignore_eos=True, **settings)
        for piece in stream:
            answer.last = time.perf_counter() - started
            answer.first = answer.first or answer.last
            answer.text += piece
        answer.num_tokens = len(stream.answer.token_ids)
        return answer

    return lambda asked: asyncio.to_thread(decode, asked)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def started(command: Sequence[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server, as soon as it is healthy."""
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _is_healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} did not start: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            process.send_signal(signal.SIGCONT)


@contextmanager
def awake(process: subprocess.Popen[bytes] | None) -> Iterator[None]:
    """Lets a server run; all others are stopped meanwhile, so that none that waits busily slows another."""
    if process is not None:
        process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        if process is not None:
            process.send_signal(signal.SIGSTOP)


def _is_healthy(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b" 200 " in sock.recv(4096)
    except OSError:
        return False


def systems(asked: argparse.Namespace, stack: ExitStack) -> Iterator[System]:
    """Those asked for, started as they are come to."""
    servers: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}

    def running(name: str, *command: str, extra: Callable[[Asked], dict[str, Any]] = exactly, log: str = "") -> System:
        """A system on a server of its own, or on that of another."""
        log = log or name
        if log not in servers:
            port = free_port()
            words = [word.format(port=port) for word in command]
            process = stack.enter_context(started(words, port, asked.out / f"{log}.log"))
            process.send_signal(signal.SIGSTOP)
            servers[log] = port, process
        port, process = servers[log]
        return System(name, server(port, extra), process)

    serve = [sys.executable, "-m", "amphista", "serve", "--port", "{port}"]
    for name in filter(None, asked.systems.split(",")):
        if name == "none":
            yield running(name, *serve, extra=partial(exactly, amphista={"drafter": "none"}), log="amphista")
        elif name == "amphista":
            yield running(name, *serve)
        elif name == "engine":
            yield System(name, engine(), most_clients=1)
        elif name == "transformers":
            script = str(Path(sys.executable).parent / "transformers")
            options = ["serve", "--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", "{port}"]
            options += ["--cb-block-size", "32", "--cb-num-blocks", str(SLOTS * CONTEXT // 32)]  # else most of memory
            found = running(name, script, *options, extra=for_transformers)
            yield replace(found, most_clients=4, most_rounds=1, most_prompts=4)
        else:
            build, drafts = Path(os.environ["LLAMA_CPP"]), name.removeprefix("llama").removeprefix("-")
            options = ["-m", str(asked.gguf), "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "--port", "{port}"]
            options += ["-t", str(os.cpu_count())] + (["--spec-type", f"{drafts}-simple"] if drafts else [])
            yield running(name, str(build / "bin" / "llama-server"), *options)
    for name, more in (one.split("=", 1) for one in asked.serve):
        yield running(name, *serve, *shlex.split(more))


def one_round(system: System, requests: Sequence[Asked], num_clients: int) -> tuple[list[Answer], float]:
    """All answers, in the order of the requests, and the seconds of all."""
    with awake(system.process):
        return asyncio.run(loops(system, requests, num_clients))


async def loops(system: System, requests: Sequence[Asked], num_clients: int) -> tuple[list[Answer], float]:
    """So many clients, each asking again as soon as it has its answer."""
    answers, waiting = [Answer()] * len(requests), iter(list(enumerate(requests)))

    async def client() -> None:
        for number, request in waiting:
            answers[number] = await system.answer(request)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers, time.perf_counter() - began


Runs = dict[str, list[tuple[list[Answer], float]]]  # by system: answers and seconds of each round


def told(name: str, runs: Runs) -> dict[str, Any]:
    """Figures of one system's rounds, and beside those of the first."""
    mine, first = runs[name], next(iter(runs.values()))
    answers = [answer for one, _ in mine for answer in one]
    pairs = [pair for (one, _), (other, _) in zip(mine, first, strict=False) for pair in zip(one, other, strict=False)]
    ratios = [_rate(one) / _rate(other) for one, other in zip(mine, first, strict=False)]
    slowest = sorted(other.last / answer.last for answer, other in pairs)
    return {
        "system": name,
        "answers": len(answers),
        "tokens_per_second": round(statistics.median(map(_rate, mine)), 1),
        "over": round(statistics.median(ratios), 3),
        "over_worst": round(min(ratios), 3),
        "over_slowest_5_percent": round(slowest[len(slowest) // 20], 3),
        "refused": sum(answer.num_refused for answer in answers),
        "same_texts": sum(answer.text == other.text for answer, other in pairs),
        "ttft_ms": _quantiles([1000 * answer.first for answer in answers]),
        "tpot_ms": _quantiles([1000 * answer.tpot for answer in answers]),
    }


def _rate(run: tuple[list[Answer], float]) -> float:
    answers, seconds = run
    return sum(answer.num_tokens for answer in answers) / seconds


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: round(ordered[min(len(ordered) - 1, int(p * len(ordered)))], 1) for name, p in QUANTILES.items()}


def measured(
    asked: argparse.Namespace, all_systems: Sequence[System], prompts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each system in each cell; every answer goes into the records. A system that fails is left out then."""
    cells = list(zip(map(int, asked.clients.split(",")), map(int, asked.prompts.split(",")), strict=True))
    with (asked.out / "records.jsonl").open("w") as records:
        for temperature in map(float, asked.temperatures.split(",")):
            for num_clients, num_prompts in cells:
                place = {"clients": num_clients, "temperature": temperature}
                runs: Runs = {}
                for turn, system in itertools.product(range(asked.rounds), all_systems):
                    if num_clients > system.most_clients or turn >= system.most_rounds:
                        continue
                    few = prompts[: min(num_prompts, system.most_prompts)]
                    salt = f"{system.name} {place} {turn}"
                    requests = [Asked(prompt, asked.tokens, temperature, salt) for prompt in few]
                    try:
                        answers, seconds = one_round(system, requests, num_clients)
                    except (OSError, RuntimeError) as error:
                        print(f"{system.name}, {place}, round {turn}: {error}", file=sys.stderr)
                        continue
                    runs.setdefault(system.name, []).append((answers, seconds))
                    for number, answer in enumerate(answers):
                        row = {"system": system.name, **place, "round": turn, "prompt": number, **asdict(answer)}
                        records.write(json.dumps(row) + "\n")
                for name in runs:
                    yield {**place, **told(name, runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=SYSTEMS, help="may be empty where --serve names some")
    parser.add_argument("--serve", action="append", default=[], metavar="NAME=OPTIONS")
    parser.add_argument("--gguf", type=Path, help="the default target's file, from its wheel")
    parser.add_argument("--data", type=Path, help="folder with spec_bench.jsonl")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--prompts", default="8,16,32,64", help="answers of a round, by clients")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    most = max(map(int, asked.prompts.split(",")))
    prompts = [question.turns[0] for question in load_questions("spec_bench", asked.data, most).questions]
    with ExitStack() as stack:
        everyone = list(systems(asked, stack))
        for system in list(everyone):
            try:
                one_round(system, [Asked(prompts[0], 16, 0.0, "warm")], 1)
            except (OSError, RuntimeError) as error:
                print(f"{system.name} is left out: {error}", file=sys.stderr)
                everyone.remove(system)
        rows = []
        for row in measured(asked, everyone, prompts):
            rows.append(row)
            print(json.dumps(row), flush=True)
            run = {"provenance": provenance.record(), "rows": rows}
            (asked.out / "run.json").write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
