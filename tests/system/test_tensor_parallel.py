"""One model over two processes, by gloo: the same tokens as in one, whatever the batch, with prefixes copied."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from amphista.errors import TargetError
from amphista.llm import load
from benchmarks.lab.load import free_port

ASKED = [
    {
        "messages": [{"role": "user", "content": "The same beginning of all. " * (1 + n % 3) + "x" * n}],
        "max_tokens": 30,
        "seed": n,
        "temperature": float(n % 2),
        "ignore_eos": True,
        "return_token_ids": True,
    }
    for n in range(6)
]


def test_two_processes_say_what_one_says(target_folder, tmp_path):
    port = free_port()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "amphista", "serve", "--tensor-parallel"]
    options = f"--port {port} --tree 6 --kv-gib 0.001 --target".split()
    command = [sys.executable, *launcher, *options, str(target_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            deadline = time.monotonic() + 120
            while "amphista: http" not in log.read_text():
                assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.1)

            def tokens(asked):
                answer = client.post("/v1/chat/completions", json=asked).json()
                return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                found = [*pool.map(tokens, ASKED), *map(tokens, ASKED)]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    llm = load(target_folder, drafter="none", fast=False)
    for (ids, _), asked in zip(found, [*ASKED, *ASKED], strict=True):
        settings = {"max_new_tokens": 30, "seed": asked["seed"], "temperature": asked["temperature"]}
        assert ids == llm.generate(asked["messages"], ignore_eos=True, **settings).token_ids
    assert any(num_cached for _, num_cached in found), "nothing was copied: that is not shown"


def test_one_process_alone_is_refused(target_folder):
    with pytest.raises(TargetError, match="torchrun"):
        load(target_folder, tensor_parallel=True)
