"""Settings of a server."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass
from pathlib import Path

from amphista.engine.scheduler import Limits
from amphista.errors import ConfigError
from amphista.llm import LLM
from amphista.target.pages import free_bytes

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHARE_OF_FREE_MEMORY = 0.25  # for keys and values


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where it listens, whom it lets in, how much it takes on at once.

    no_auth: answer everybody although others than this machine can reach it. kv_gib: memory for keys and values, by
    default a quarter of what is free. max_stall: seconds that reading a prompt may hold up those that are being
    answered. drain: seconds that answers may go on behind a SIGTERM. ignore_tools: answer without tools where the chat
    template knows none, which is refused else.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    served_model_name: str | None = None
    max_running: int | None = None
    max_waiting: int = 64
    max_stall: float = 0.1
    kv_gib: float | None = None
    drain: float = 30.0
    ignore_tools: bool = False

    def __post_init__(self) -> None:
        if not (self.api_keys or self.no_auth or self.host in LOOPBACK):
            raise ConfigError(
                f"others could reach a server on {self.host}: give --api-key, or --no-auth where everybody may ask"
            )
        if not all(key.strip() and key.isascii() for key in self.api_keys):
            raise ConfigError("an API key is empty, or not ASCII")
        if self.kv_gib is not None and not 0 < self.kv_gib < math.inf:
            raise ConfigError(f"--kv-gib is {self.kv_gib:g}: expected GiB above 0, or leave it out")

    def check_address(self) -> None:
        """raises ConfigError where nobody can listen there: better before a model is loaded."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.create_server((self.host, self.port), family=family):
                pass
        except OSError as error:
            text = f"cannot listen on {self.host} port {self.port}: {error.strerror or error}"
            raise ConfigError(f"{text}; choose another --host or --port") from error

    @property
    def known_hosts(self) -> frozenset[str] | None:
        """What a request may call this server, where a page of another site could else reach it by a name of its own
        (DNS rebinding); None: anything."""
        return frozenset(LOOPBACK) if self.host in LOOPBACK and not self.api_keys else None

    def limits(self, llm: LLM) -> Limits:
        """What the scheduler may give away."""
        device = llm.target.device
        share = SHARE_OF_FREE_MEMORY * free_bytes(device)
        return Limits(
            kv_bytes=int(share if self.kv_gib is None else self.kv_gib * 2**30),
            row_bytes=llm.engine.row_bytes,
            max_running=self.max_running or (64 if device.type == "cuda" else 16),
            spare_rows=llm.engine.max_nodes,
            max_stall_seconds=self.max_stall,
            max_waiting=self.max_waiting,
        )

    def name_of(self, llm: LLM) -> str:
        """What clients call the model: never a path of this machine."""
        name = llm.target.name
        return self.served_model_name or (Path(name).name if Path(name).exists() else name)


def read_keys(given: list[str], file: Path | None, environment: str | None) -> tuple[str, ...]:
    """Keys from options, a file (one a line) and the environment (with commas between). raises ConfigError."""
    try:
        lines = file.read_text(encoding="utf-8").split() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from error
    return (*given, *lines, *(key.strip() for key in (environment or "").split(",") if key.strip()))
