"""A server under siege: storms of clients that leave, long use, and attackers beside well-behaved clients.

    python -m benchmarks.lab.siege storm --seconds 300 --options '--target FOLDER' --out FILE
    python -m benchmarks.lab.siege soak --seconds 1800 --options '--target FOLDER --kv-gib 0.01' --out FILE
    python -m benchmarks.lab.siege attack --seconds 300 --out FILE

storm: clients ask, streamed or whole, and leave at any time, most by a reset; at the end every row must be free and
the same request get the same answer as before. soak: answers without end; memory, threads and open files of the
server over time, memory's growth by a straight line over all but the first sixth, exit code after SIGTERM. attack:
seconds between the pieces of well-behaved streams, by turns beside two other answers and beside attackers, a process
of their own, who ask for two such answers and read them a byte a second, and do their worst: bodies of 100 MB,
half-open sockets, a byte a second sent, deep JSON, bad UTF-8, giant prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from amphista import provenance
from benchmarks.lab.load import Asked, RefusedError, free_port, server, started

CHAT = "/v1/chat/completions"
WORDS = ["red", "green", "blue", "sun", "moon", "star", "dog", "cat", "bird", "tree", "leaf", "root"]
TURN_SECONDS = 5.0
GUEST, NUM_GUESTS = Asked("Slowly", 100, 1.0, ""), 2  # what readers ask who then read a byte a second


def request(content: bytes, *, path: str = CHAT, length: int | None = None) -> bytes:
    """A whole request, or one that promises more than it holds."""
    size = len(content) if length is None else length
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + content


def chat(prompt: str, **settings: Any) -> bytes:
    """A request for an answer."""
    return request(json.dumps({"messages": [{"role": "user", "content": prompt}], **settings}).encode())


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection of its own, broken off at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)  # it is closed then


async def gauges(port: int) -> dict[str, float]:
    """What the server says it holds now."""
    async with connected(port) as (reader, writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        lines = (await reader.read()).decode().splitlines()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    found = (line for line in lines if line.startswith(tuple(f"amphista:{name}" for name in names)))
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in found}


async def until(seconds: float, num_clients: int, work: Callable[[random.Random], Awaitable[str]]) -> Counter[str]:
    """So many clients at work again and again; what came of it how often."""
    ended, deadline = Counter[str](), time.monotonic() + seconds

    async def client(number: int) -> None:
        source = random.Random(number)
        while time.monotonic() < deadline:
            ended[await work(source)] += 1

    await asyncio.gather(*map(client, range(num_clients)))
    return ended


# -- storm ------------------------------------------------------------------------------------------------------------


async def storm(port: int, seconds: float, num_clients: int = 12) -> dict[str, Any]:
    """Clients that leave. raises AssertionError unless all is free again and answers are what they were."""
    ask, asked = server(port), Asked("The same as ever", 24, 1.0, "")
    before = (await ask(asked)).text

    async def one(source: random.Random) -> str:
        prompt = " ".join(source.choices(WORDS, k=source.randint(1, 60)))
        sent = chat(
            prompt, stream=source.random() < 0.7, n=source.choice([1, 1, 2, 4]), max_tokens=200, ignore_eos=True
        )
        how = source.choice(["half a request", "at once", "in mid-answer", "in mid-answer", "at the end"])
        with contextlib.suppress(OSError):
            async with connected(port) as (reader, writer):
                writer.write(sent[: len(sent) // 2] if how == "half a request" else sent)
                await writer.drain()
                if how == "in mid-answer":
                    for _ in range(source.randint(1, 20)):
                        await reader.read(source.randint(1, 400))
                elif how == "at the end":
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(), source.random() * 3)
                await asyncio.sleep(source.random() / 50)
        return how

    left = await until(seconds, num_clients, one)
    deadline = time.monotonic() + 60
    while any((held := await gauges(port)).values()):
        assert time.monotonic() < deadline, f"still held: {held}"
        await asyncio.sleep(0.1)
    assert (await ask(asked)).text == before, "the answer is another one"
    return {"left": dict(left), "held": held}


# -- soak -------------------------------------------------------------------------------------------------------------


def held_by(pid: int) -> dict[str, float]:
    """Memory in MB, threads, open files of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    memory, threads = int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
    return {"megabytes": round(memory, 1), "threads": threads, "files": len(os.listdir(f"/proc/{pid}/fd"))}


async def soak(port: int, pid: int, seconds: float, num_clients: int = 16) -> dict[str, Any]:
    """Use for a long time; samples of what the process holds."""
    ask, samples, began = server(port), [], time.monotonic()

    async def one(source: random.Random) -> str:
        prompt = " ".join(source.choices(WORDS, k=source.randint(1, 60)))
        with contextlib.suppress(RefusedError):
            await ask(Asked(prompt, source.randint(1, 60), source.choice([0.0, 1.0]), str(source.randint(0, 9))))
        return "answers"

    async def watch() -> None:
        while time.monotonic() - began < seconds:
            await asyncio.sleep(seconds / 60)
            samples.append({"seconds": round(time.monotonic() - began, 1), **held_by(pid)})

    ended, _ = await asyncio.gather(until(seconds, num_clients, one), watch())
    late = samples[len(samples) // 6 :]
    line = statistics.linear_regression([s["seconds"] / 60 for s in late], [s["megabytes"] for s in late])
    return {**ended, "megabytes_a_minute": round(line.slope, 2), "first": late[0], "last": late[-1], "samples": samples}


# -- attack -----------------------------------------------------------------------------------------------------------


async def attackers(port: int) -> None:
    """Do their worst until they are killed."""
    deep = b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    huge = json.dumps({"messages": [{"role": "user", "content": "word " * 800_000}]}).encode()

    async def sent(*parts: bytes, pause: float = 0.0) -> None:
        async with connected(port) as (reader, writer):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            await asyncio.wait_for(reader.read(), 30)

    async def again(*parts: bytes, pause: float = 0.0, every: float = 0.2) -> None:
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                await sent(*parts, pause=pause)
            await asyncio.sleep(every)

    async def slow_reader() -> None:
        while True:
            with contextlib.suppress(OSError):
                async with connected(port) as (reader, writer):
                    writer.write(chat(GUEST.prompt, stream=True, max_tokens=GUEST.num_tokens, ignore_eos=True))
                    for _ in range(round(2 * TURN_SECONDS)):  # once a turn: who attacks stands still every other
                        await reader.read(1)
                        await asyncio.sleep(1)

    megabyte = b"x" * 2**20
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = chat("A byte a second", max_tokens=1)
    await asyncio.gather(
        again(request(b"", length=100 * 2**20), *[megabyte] * 100),
        again(chunked, *[b"100000\r\n" + megabyte + b"\r\n"] * 100),
        again(request(deep)),
        again(request(b'{"prompt": "\xff\xfe"}', path="/v1/completions")),
        again(request(huge), every=1.0),
        *(again(b"POST ") for _ in range(100)),
        *(again(*[whole[i : i + 1] for i in range(len(whole))], pause=1.0) for _ in range(50)),
        *(slow_reader() for _ in range(NUM_GUESTS)),
    )


async def gaps(port: int, seconds: float, num_clients: int) -> list[float]:
    """Seconds between pieces of well-behaved streams."""
    found: list[float] = []

    async def one(source: random.Random) -> str:
        last = None
        async with connected(port) as (reader, writer):
            writer.write(chat(" ".join(source.choices(WORDS, k=20)), stream=True, max_tokens=64, ignore_eos=True))
            async for line in reader:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    found.extend([] if last is None else [now - last])
                    last = now
                elif line.startswith(b"data: [DONE]"):
                    break
        return "answers"

    await until(seconds, num_clients, one)
    return found


async def attack(port: int, seconds: float, num_clients: int = 4) -> dict[str, Any]:
    """Quiet and attacked by turns; quantiles of gaps in either, in ms. What attackers get answered others get in quiet
    turns: more answers make longer steps, whoever reads them."""

    async def turn_of(guests: int) -> list[float]:
        asked = asyncio.gather(*(server(port)(GUEST) for _ in range(guests)))
        found = await gaps(port, min(seconds, TURN_SECONDS), num_clients)
        await asked
        return found

    command = [sys.executable, "-m", "benchmarks.lab.siege", "attackers", "--port", str(port)]
    quiet: list[float] = []
    attacked: list[float] = []
    with subprocess.Popen(command) as process:
        try:
            for turn in range(2 * max(1, round(seconds / TURN_SECONDS / 2))):
                process.send_signal(signal.SIGCONT if turn % 2 else signal.SIGSTOP)
                (attacked if turn % 2 else quiet).extend(await turn_of(0 if turn % 2 else NUM_GUESTS))
        finally:
            process.kill()
    shown = {name: _quantiles(found) for name, found in (("quiet", quiet), ("attacked", attacked))}
    return {**shown, "p99_ratio": round(shown["attacked"]["p99"] / shown["quiet"]["p99"], 3)}


def _quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {name: round(1000 * cuts[percent - 1], 2) for name, percent in (("p50", 50), ("p95", 95), ("p99", 99))}


# -- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def besieged(asked: argparse.Namespace) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server, its port and process."""
    port, options = free_port(), shlex.split(asked.options)
    command = [sys.executable, "-m", "amphista", "serve", "--port", str(port), "--max-waiting", "2000", *options]
    with started(command, port, asked.out.with_suffix(".log")) as process:
        yield port, process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["storm", "soak", "attack", "attackers"])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--options", default="", help="of amphista serve")
    parser.add_argument("--port", type=int, help="of attackers")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.kind == "attackers":
        os.nice(19)  # elsewhere they would have cores of their own
        asyncio.run(attackers(asked.port))
        return
    with besieged(asked) as (port, process):
        arguments = (port, process.pid, asked.seconds) if asked.kind == "soak" else (port, asked.seconds)
        kinds: dict[str, Callable[..., Any]] = {"storm": storm, "soak": soak, "attack": attack}
        found = asyncio.run(kinds[asked.kind](*arguments))
        process.send_signal(signal.SIGTERM)
        found["exit_code"] = process.wait(60)
    record = {"provenance": provenance.record(), asked.kind: found}
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    found.pop("samples", None)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
