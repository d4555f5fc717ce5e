"""amphista serve: an OpenAI-compatible server, and a page to talk to it.

amphista serve
amphista serve --host 0.0.0.0 --api-key SECRET --max-running 8
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from amphista.cli import options

PANEL = "Server"
BOUND = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
OWN_WAYS = {*BOUND, "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PANEL, **more)


@options.with_records
def serve(
    model: options.ModelOptions,
    host: Annotated[str, _option("Where to listen; another than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, _option("0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        _option("Let in whoever has this key (repeatable). Also AMPHISTA_API_KEY, with commas between."),
    ] = None,
    api_key_file: Annotated[Path | None, _option("A file of keys, one a line.")] = None,
    no_auth: Annotated[bool, _option("Answer everybody who can reach it.", "--no-auth")] = False,
    cors_origin: Annotated[list[str] | None, _option("A site whose pages may ask (repeatable).")] = None,
    served_model_name: Annotated[str | None, _option("What clients call the model.")] = None,
    max_running: Annotated[int | None, _option("Requests decoded at once. Default 16, on CUDA 64.", min=1)] = None,
    max_waiting: Annotated[int, _option("Requests that may wait; more are refused (429).", min=0)] = 64,
    max_stall: Annotated[float, _option("Seconds that reading a prompt may hold up others.", min=0.001)] = 0.1,
    kv_gib: Annotated[float | None, _option("Memory for keys and values. Default a quarter of what is free.")] = None,
    replicas: Annotated[
        int, _option("So many engines, each with weights of its own, by Ray ('amphista\\[ray]').", min=1)
    ] = 1,
    drain: Annotated[float, _option("Seconds that answers may go on when the server is told to end.", min=0)] = 30.0,
    ignore_tools: Annotated[
        bool, _option("Answer without tools where the chat template knows none, not refuse.", "--ignore-tools")
    ] = False,
) -> None:
    """Answer OpenAI's API, and show a page that tells who guessed each token."""
    cores = None if replicas > 1 or model.tensor_parallel else bind_threads()
    try:
        from amphista.serve.server import server_of
        from amphista.serve.settings import Settings, read_keys

        if replicas > 1:
            from amphista.serve.ray_app import run as run_replicas
    except ModuleNotFoundError as error:
        extra = "ray" if replicas > 1 else "serve"
        raise typer.BadParameter(f"{error.name} is missing: pip install 'amphista[{extra}]'") from error
    settings = Settings(
        host=host,
        port=port,
        api_keys=read_keys(api_key or [], api_key_file, os.environ.get("AMPHISTA_API_KEY")),
        no_auth=no_auth,
        cors_origins=tuple(cors_origin or ()),
        served_model_name=served_model_name,
        max_running=max_running,
        max_waiting=max_waiting,
        max_stall=max_stall,
        kv_gib=kv_gib,
        drain=drain,
        ignore_tools=ignore_tools,
    )
    if replicas > 1 and model.tensor_parallel:
        raise typer.BadParameter("--replicas and --tensor-parallel do not go together: start torchrun once a replica")
    settings.check_address()
    if replicas > 1:
        run_replicas(asdict(model), settings, replicas, _told)
    else:
        server = server_of(model.load(), settings, _told)
        if cores is not None:  # OpenMP has bound this thread, too, which from now on talks to clients
            os.sched_setaffinity(0, cores)
        server.run()


def bind_threads() -> set[int] | None:
    """Let each thread that multiplies keep its core: else those that talk to clients drive two of them together on one,
    and the others wait. Told to OpenMP before it is loaded; returns the cores there are.

    None, and nothing is told, where the user has told it something, and where binding cannot be asked for.
    """
    if sys.platform != "linux" or "torch" in sys.modules or OWN_WAYS & os.environ.keys():
        return None
    os.environ.update(BOUND)
    return os.sched_getaffinity(0)


def _told(address: str) -> None:
    print(f"amphista: {address}", file=sys.stderr, flush=True)
