"""`amphista serve --replicas 2`: one address, the same tokens from either; a replica that is killed is replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

pytestmark = pytest.mark.ray
KEY = {"Authorization": "Bearer secret"}
ASKED = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 40,
    "temperature": 1.0,
    "seed": 5,
    "ignore_eos": True,
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def asked(client, **more):
    return client.post("/v1/chat/completions", json={**ASKED, "return_token_ids": True, **more})


def test_two_replicas_one_of_them_killed(target_folder, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: make test-ray")
    options = ["--target", str(target_folder), "--tree", "4", "--kv-gib", "0.1", "--api-key", "secret"]
    command = [sys.executable, "-m", "amphista", "serve", "--replicas", "2", "--port", str(free_port()), *options]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        (tmp_path / "log").open("w+") as log,
        subprocess.Popen(command, stderr=log, stdout=log, env=environment) as process,
    ):
        url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
        try:
            with httpx.Client(base_url=url, headers=KEY, timeout=60) as client:
                wait_until(lambda: "amphista: http" in (tmp_path / "log").read_text(), 240, log)
                assert client.get("/ready").status_code == 200
                assert httpx.get(f"{url}/metrics").status_code == 401
                answers = [asked(client).json()["choices"][0]["token_ids"] for _ in range(12)]
                assert all(answer == answers[0] for answer in answers)
                with client.stream("POST", "/v1/chat/completions", json={**ASKED, "stream": True}) as response:
                    chunks = list(response.iter_raw())
                assert len(chunks) > 3 and b"[DONE]" in chunks[-1]
                replicas = replica_processes()
                assert len(replicas) == 2
                os.kill(replicas[0], signal.SIGKILL)
                wait_until(lambda: len(set(replica_processes()) - {replicas[0]}) == 2, 120, log)
                wait_until(lambda: all(asked(client).status_code == 200 for _ in range(6)), 120, log)
                assert asked(client).json()["choices"][0]["token_ids"] == answers[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    assert process.returncode == 0


def replica_processes() -> list[int]:
    """Those whose title Ray has set."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                title = file.read()
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica:amphista"):
            found.append(int(name))
    return found


def wait_until(is_so, seconds, log) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            log.seek(0)
            pytest.fail(log.read()[-3000:])
        time.sleep(0.5)
