"""Several engines behind one address, by Ray Serve: a replica is the app with an engine of its own.

Ray spreads requests over the replicas, replaces one that dies, and needs nothing from the app. Each replica loads the
model itself, on its share of the cores; prefixes are kept by each for itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve

from amphista.serve.settings import SHARE_OF_FREE_MEMORY, Settings
from amphista.target.pages import free_bytes

APP = "amphista"


def application(model: Mapping[str, Any], settings: Settings, num_replicas: int) -> Any:
    """The Ray Serve application. model: what `amphista.llm.load` takes.

    Who does not fit into a replica's slots and queue waits at Ray's proxy, as many again, and is then refused (429).
    """
    num_ongoing = (settings.max_running or 16) + settings.max_waiting
    cores = (os.cpu_count() or 1) / num_replicas
    kv_gib = (
        SHARE_OF_FREE_MEMORY * free_bytes(torch.device("cpu")) / 2**30 if settings.kv_gib is None else settings.kv_gib
    )
    own = replace(settings, kv_gib=kv_gib / num_replicas)

    def build() -> FastAPI:
        """In the replica's process."""
        from amphista.llm import load
        from amphista.serve.app import create_app
        from amphista.serve.service import Service

        llm = load(**model)
        return create_app(Service(llm, own.limits(llm), own.name_of(llm), ignore_tools=own.ignore_tools), own)

    @serve.deployment(
        name=APP,
        num_replicas=num_replicas,
        max_ongoing_requests=num_ongoing,
        max_queued_requests=num_ongoing,
        backpressure_config={"status_code": 429},
        graceful_shutdown_timeout_s=settings.drain,
        ray_actor_options={
            "num_cpus": cores,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cores)))}},
        },
    )
    @serve.ingress(build)
    class Replica:
        pass

    return Replica.bind()  # type: ignore[attr-defined]  # what the decorators have made of it


def run(model: Mapping[str, Any], settings: Settings, num_replicas: int, told: Callable[[str], None]) -> None:
    """Start Ray where none runs yet, and answer until the process is told to end."""
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None})
    serve.run(application(model, settings, num_replicas), name=APP)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # only now: Ray has put handlers of its own there
        signal.signal(number, lambda *_: ended.set())
    told(f"http://{settings.host}:{settings.port}")
    ended.wait()
    serve.shutdown()
    ray.shutdown()
