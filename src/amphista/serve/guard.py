"""At the door: who may come in, how much they may bring, how long they may take to bring it."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amphista.serve.errors import ApiError, response_to

MAX_BODY_BYTES = 4 * 2**20
BODY_SECONDS = 30.0
OPEN = frozenset({"/", "/app.js", "/style.css", "/icon.svg", "/health", "/ready", "/version"})


class Guard:
    """Lets nobody without a key behind the open paths, and no body that is too large or too slow.

    keys: none at all let everybody in. hosts: names of this server that a request may use, None: any.
    `scope["state"]["tenant"]` says whose request it is: the number of the key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: frozenset[str] | None = None) -> None:
        self._app, self._keys, self._hosts = app, [key.encode() for key in keys], hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer for the app where it must not be asked."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_host(headers.get(b"host", b"").decode("latin-1"))
            tenant = self._tenant(headers.get(b"authorization", b""))
            if tenant is None and scope["path"] not in OPEN:
                raise ApiError(401, "a valid API key is needed: send it as 'Authorization: Bearer KEY'")
            scope.setdefault("state", {})["tenant"] = tenant
            body = await self._read(headers.get(b"content-length", b""), receive)
        except ApiError as error:
            response = response_to(error)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    def _check_host(self, host: str) -> None:
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if self._hosts is not None and name not in self._hosts:
            raise ApiError(
                400, "this server answers to 127.0.0.1 and localhost alone: start it with an API key for more"
            )

    def _tenant(self, authorization: bytes) -> int | None:
        """Which key it is, in a time that does not depend on it."""
        if not self._keys:
            return 0
        scheme, _, given = authorization.partition(b" ")
        equal = [hmac.compare_digest(key, given.strip()) for key in self._keys]
        return equal.index(True) if any(equal) and scheme.lower() == b"bearer" else None

    async def _read(self, length: bytes, receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone."""
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise _too_large()
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > MAX_BODY_BYTES:
                        raise _too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(400, f"the body did not come within {BODY_SECONDS:.0f} s") from None


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read, then what the connection says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
