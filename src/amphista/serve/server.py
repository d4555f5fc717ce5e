"""The server: uvicorn around the app. SIGTERM and Ctrl-C let answers end, then the process ends with 0."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from amphista.llm import LLM
from amphista.serve.app import create_app
from amphista.serve.service import Service
from amphista.serve.settings import Settings

HEAD_SECONDS = 30.0  # for a connection's first request, head only
LEAVE_SECONDS = 5.0  # for the last bytes, behind the drain


class PatientProtocol(HttpToolsProtocol):
    """Closes connections on which no request comes: uvicorn would keep them for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, transport.close)

    def on_headers_complete(self) -> None:
        self._head_timer.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Drains: takes no more, lets answers end as long as the settings say, ends the others with an error."""

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_seconds: float, told: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service, self._drain_seconds, self._told = service, drain_seconds, told

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                self._told(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: Any = None) -> None:
        """Both ends of it at once."""
        seconds = 0.0 if self.force_exit else self._drain_seconds
        drained = asyncio.ensure_future(self._service.close(seconds))
        await super().shutdown(sockets)
        await drained

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, not the process: what it does then is an orderly end, so its exit code is 0."""
        is_main = threading.current_thread() is threading.main_thread()  # signals come there alone
        for number in (signal.SIGTERM, signal.SIGINT) if is_main else ():
            asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


def server_of(llm: LLM, settings: Settings, told: Callable[[str], None]) -> Server:
    """A server to `run` until the process is told to end. told: called with the address, once it listens."""
    service = Service(llm, settings.limits(llm), settings.name_of(llm), ignore_tools=settings.ignore_tools)
    config = uvicorn.Config(
        create_app(service, settings),
        host=settings.host,
        port=settings.port,
        http=PatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.drain + LEAVE_SECONDS),
    )
    return Server(config, service, settings.drain, told)
