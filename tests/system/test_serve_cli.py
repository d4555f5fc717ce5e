"""`amphista serve` as it is started, asked and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from tests.system.test_cli import amphista

BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 300, "stream": True, "ignore_eos": True}


def test_a_signal_lets_answers_end_and_it_ends_with_0(target_folder):
    options = ["--target", str(target_folder), "--tree", "4", "--port", "0", "--kv-gib", "0.05"]
    command = [sys.executable, "-m", "amphista", "serve", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = []
        while not said or not said[-1].startswith("amphista: http://"):
            said.append(process.stderr.readline())
            assert said[-1], said
        with httpx.Client(base_url=said[-1].removeprefix("amphista: ").strip(), timeout=60) as client:
            assert client.get("/ready").json() == {"ready": True}
            name = client.get("/v1/models").json()["data"][0]["id"]
            assert name == target_folder.name, "a path of this machine"
            events = []
            with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
                for line in response.iter_lines():
                    if line and not events:
                        process.send_signal(signal.SIGTERM)
                    events += [line] if line else []
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert "Traceback" not in rest


def test_a_server_for_others_needs_a_key(monkeypatch):
    monkeypatch.delenv("AMPHISTA_API_KEY", raising=False)
    refused = amphista("serve", "--host", "0.0.0.0", "--target", "is not even looked for")
    assert refused.returncode == 2 and "--no-auth" in refused.stderr


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = amphista("serve", "--port", taken.getsockname()[1], "--target", "is not even looked for")
    assert refused.returncode == 2 and "in use" in refused.stderr and "--port" in refused.stderr


BINDING = """
import os, sys
from amphista.cli.serve import bind_threads
if "first" in sys.argv: import torch
cores = bind_threads()
import torch
torch.ones(1 << 22).sum()
print(cores and len(cores), len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="no cores to choose from")
def test_threads_that_multiply_are_bound_unless_openmp_was_told_otherwise_or_is_loaded():
    def cores(*args, **told):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
        command = [sys.executable, "-c", BINDING, *args]
        return subprocess.run(command, env=env | told, capture_output=True, text=True, check=True).stdout.split()

    every = str(len(os.sched_getaffinity(0)))
    bound = cores()
    assert bound[0] == every and int(bound[1]) < int(every)
    assert cores("first") == cores(OMP_NUM_THREADS=every) == cores(OMP_PROC_BIND="false") == ["None", every]
