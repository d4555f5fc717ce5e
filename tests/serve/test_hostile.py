"""A hostile network, storms, crowds: an error or a closed socket for whoever it is, nothing at all for anybody else."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import threading
import time

import httpx
import pytest

from amphista.serve import guard
from amphista.serve.server import PatientProtocol
from benchmarks.lab import siege
from tests.serve.serving import ASKED, KEYS, serving, talkative_llm

CHAT = "/v1/chat/completions"
HEAD = (
    f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\nContent-Type: application/json\r\n"
)


@pytest.fixture(scope="module")
def crowded():
    """Room for a thousand to wait."""
    with serving(talkative_llm(), max_waiting=2000) as served:
        yield served
    served.check_idle()


def connect(served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def settled(served, seconds=20):
    """Nothing runs any more, and every row is free."""
    deadline = time.monotonic() + seconds
    while served.worker._scheduler.has_work or served.worker._tickets:
        assert time.monotonic() < deadline, "something still runs"
        time.sleep(0.01)
    served.check_idle()


def received(sock) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def body(seed=0, **more) -> dict:
    return {"messages": ASKED, "max_tokens": 24, "seed": seed, **more}


def test_bodies_beyond_all_bounds(served):
    def parts(total):
        for _ in range(total // 2**20):
            yield b"x" * 2**20

    with served.client() as client:
        long = {"Content-Type": "application/json", "Content-Length": str(100 * 2**20)}
        with connect(served) as sock:  # nothing of it need be sent
            sock.sendall((HEAD + f"Content-Length: {long['Content-Length']}\r\n\r\n").encode())
            assert b" 413 " in received(sock)
        try:
            response = client.post(CHAT, content=parts(100 * 2**20), headers={"Content-Type": "application/json"})
            assert response.status_code == 413
        except (httpx.WriteError, httpx.ReadError):
            pass  # the server has hung up in the middle
        for size, status in ((guard.MAX_BODY_BYTES, 200), (guard.MAX_BODY_BYTES + 1, 413)):
            content = b'{"prompt": "x"}'.ljust(size)
            response = client.post("/tokenize", content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == status
    assert served.chat()["choices"]


def test_no_http_at_all(served):
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 9 + b"\x00",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with connect(served) as sock:
            sock.sendall(sent)
            assert b" 400 " in received(sock)
    for path in ("//metrics", "/%2e%2e/metrics", "/./metrics", "/metrics%00", "/health/../metrics", "http://x/metrics"):
        with connect(served) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert b"amphista:" not in received(sock), path


def test_sockets_on_which_nothing_comes_are_closed(monkeypatch):
    monkeypatch.setattr("amphista.serve.server.HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with serving(talkative_llm()) as served:
        with connect(served) as silent, connect(served) as half, connect(served) as drip:
            half.sendall(b"POST /v1/chat")
            drip.sendall((HEAD + "Content-Length: 4000\r\n\r\n").encode())
            started = time.monotonic()
            with pytest.raises(OSError):  # one byte at a time, until nobody listens any more
                while time.monotonic() - started < 10:
                    drip.sendall(b"{")
                    time.sleep(0.05)
            assert time.monotonic() - started < 5
            assert received(silent) == received(half) == b""
        assert served.chat()["choices"]
        assert PatientProtocol is served.server.config.http_protocol_class


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_are_decoded_no_further(served, stream):
    asked = body(ignore_eos=True, stream=stream, max_tokens=450)
    with connect(served) as sock:
        data = json.dumps(asked).encode()
        sock.sendall((HEAD + f"Content-Length: {len(data)}\r\n\r\n").encode() + data)
        deadline = time.monotonic() + 10
        while not served.worker._scheduler.running:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        (request,) = served.worker._scheduler.running
    settled(served)
    assert request.sequence.finish_reason is None and request.sequence.num_output < 450


def test_under_siege(monkeypatch):
    """The long forms of this are commands of benchmarks/lab/siege.py."""
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    with serving(talkative_llm(), api_keys=(), kv_gib=0.004) as served:
        port = int(served.url.rpartition(":")[2])
        assert served.chat(max_tokens=4)["choices"]
        settled(served)
        files = len(os.listdir("/proc/self/fd"))
        stormed = asyncio.run(siege.storm(port, 1.5))
        assert stormed["left"]["in mid-answer"] > 3 and len(stormed["left"]) > 3
        settled(served)

        async def attacked():
            attackers = asyncio.ensure_future(siege.attackers(port))
            soaked = await siege.soak(port, os.getpid(), 2.0, num_clients=4)
            assert not attackers.done(), "they have given up"
            attackers.cancel()
            await asyncio.gather(attackers, return_exceptions=True)
            return soaked

        assert asyncio.run(attacked())["answers"] > 3
        settled(served)
        for _ in range(8):  # the first still warm up; what leaks grows in all
            soaked = asyncio.run(siege.soak(port, os.getpid(), 2.0))
            settled(served)
            gc.collect()
            if (growth := soaked["last"]["megabytes"] - soaked["first"]["megabytes"]) < 8:
                break
        deadline = time.monotonic() + 20
        while len(os.listdir("/proc/self/fd")) > files:
            assert time.monotonic() < deadline, "a file is left open"
            time.sleep(0.05)
    assert growth < 8, soaked
    assert soaked["last"]["threads"] <= soaked["first"]["threads"]
    assert soaked["last"]["files"] <= soaked["first"]["files"] + 16, "of clients that come and go"


def test_a_slow_reader_gets_longer_pieces_and_holds_nobody_up(served):
    asked = body(ignore_eos=True, stream=True, max_tokens=440, amphista={"trace": True})
    with connect(served) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        data = json.dumps(asked).encode()
        sock.sendall((HEAD + f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n").encode() + data)
        quick = served.chat(seed=2, max_tokens=24)  # meanwhile
        assert quick["choices"]
        settled(served)  # decoded to its end, though nobody has read it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        raw = received(sock).decode()
    pieces = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
    assert text == served.chat(ignore_eos=True, max_tokens=440, seed=0)["choices"][0]["message"]["content"]
    steps = [piece["choices"][0]["amphista"]["steps"] for piece in pieces if "amphista" in piece["choices"][0]]
    assert sum(map(len, steps)) > len(steps), "no pieces were joined"


async def streams(served, bodies) -> list[str]:
    """The texts of requests that are all sent at once."""
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=120, limits=limits) as client:

        async def one(asked) -> str:
            text, has_ended = "", False
            async with client.stream("POST", CHAT, json={**asked, "stream": True}) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        choice = json.loads(line[6:])["choices"][0]
                        text += choice["delta"].get("content") or ""
                        has_ended = has_ended or choice["finish_reason"] is not None
            assert has_ended
            return text

        return await asyncio.gather(*map(one, bodies))


def alone(served, asked) -> str:
    """What the library says by itself, plainly."""
    settings = {"max_new_tokens": asked["max_tokens"], "temperature": asked["temperature"], "seed": asked["seed"]}
    return served.llm.baseline.generate(asked["messages"], **settings).text


def kind(number, content, **more) -> dict:
    message = {"role": "user", "content": content}
    return {"messages": [message], "max_tokens": 40, "seed": number, "temperature": 1.0, **more}


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd_gets_what_each_would_get_alone(crowded, number):
    kinds = [kind(n, f"Number {n} " * (1 + n % 5), max_tokens=8 + n, temperature=float(n % 2)) for n in range(10)]
    expected = [alone(crowded, one) for one in kinds]
    started, before = time.monotonic(), siege.held_by(os.getpid())["megabytes"]
    texts = asyncio.run(streams(crowded, [kinds[n % 10] for n in range(number)]))
    assert texts == [expected[n % 10] for n in range(number)]
    assert time.monotonic() - started < 60
    assert siege.held_by(os.getpid())["megabytes"] - before < 150, "of clients and server together"
    settled(crowded)


def test_no_word_of_one_is_in_anothers_answer(crowded):
    """Prompts share a beginning and hold a word each; rows of the beginning are reused."""
    kinds = [kind(n, f"The same beginning of all of them. Q{n:02d}Z") for n in range(32)]
    texts = asyncio.run(streams(crowded, kinds))
    for number, (one, text) in enumerate(zip(kinds, texts, strict=True)):
        assert text == alone(crowded, one)
        assert set(re.findall(r"Q\d\dZ", text)) <= {f"Q{number:02d}Z"}
    cached = crowded.chat(**kinds[0])["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 32, "nothing was reused: this test shows nothing"


def test_a_failing_step_fails_its_request_alone(monkeypatch):
    with serving(talkative_llm()) as served:
        engine, broken = served.llm.engine, []
        step = engine._step

        def breaks(batch):
            if any(len(sequence.token_ids) > 100 for sequence in batch):
                broken.append(batch)
                raise FloatingPointError("a secret of the machine")
            return step(batch)

        monkeypatch.setattr(engine, "_step", breaks)
        others = [threading.Thread(target=served.chat, kwargs={"seed": n, "max_tokens": 20}) for n in range(3)]
        for thread in others:
            thread.start()
        long = [{"role": "user", "content": "x" * 120}]
        response = served.post(CHAT, body(messages=long))
        assert response.status_code == 500 and "secret" not in response.text
        short = [{"role": "user", "content": "x" * 60}]
        with served.client() as client:
            asked = body(messages=short, stream=True, ignore_eos=True, max_tokens=60)
            with client.stream("POST", CHAT, json=asked) as stream:
                lines = [line for line in stream.iter_lines() if line]
        assert lines[-2] == "event: error" and json.loads(lines[-1][6:])["error"]["type"] == "server_error"
        assert "secret" not in lines[-1] and broken
        for thread in others:
            thread.join()
        assert served.chat()["choices"]
        settled(served)


def test_who_waits_hears_that_the_line_is_there(monkeypatch):
    monkeypatch.setattr("amphista.serve.service.PING_SECONDS", 0.05)
    with serving(talkative_llm(), max_running=1) as served:
        step = served.llm.engine.step
        monkeypatch.setattr(served.llm.engine, "step", lambda batch: (time.sleep(0.02), step(batch))[1])
        first = threading.Thread(target=served.chat, kwargs={"ignore_eos": True, "max_tokens": 60})
        first.start()
        while not served.worker._scheduler.running:
            time.sleep(0.001)
        with served.client() as client, client.stream("POST", CHAT, json=body(stream=True, max_tokens=2)) as response:
            lines = [line for line in response.iter_lines() if line]
        first.join()
    assert lines.count(": ping") > 3 and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"]


def test_answers_go_on_while_it_drains_and_then_break_off():
    with serving(talkative_llm(), drain=1.0) as served:
        slow = served.llm.engine.step
        served.llm.engine.step = lambda batch: (time.sleep(0.01), slow(batch))[1]
        served.worker._paced._engine = served.llm.engine
        events: dict[str, list[str]] = {}

        def read(name, num_tokens):
            with served.client() as client:
                asked = body(stream=True, ignore_eos=True, max_tokens=num_tokens, amphista={"drafter": "none"})
                with client.stream("POST", CHAT, json=asked) as response:
                    events[name] = [line for line in response.iter_lines() if line]

        threads = [threading.Thread(target=read, args=named) for named in (("short", 20), ("long", 400))]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(served.worker._scheduler.running) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        served.server.should_exit = True
        for thread in threads:
            thread.join(30)
    assert events["short"][-1] == "data: [DONE]"
    assert events["long"][-2] == "event: error"
    assert json.loads(events["long"][-1][6:])["error"]["code"] == "unavailable"
