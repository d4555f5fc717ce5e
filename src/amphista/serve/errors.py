"""One table of errors: whatever goes wrong is told in OpenAI's shape, with the status its kind has here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from amphista.errors import AmphistaError, CapacityError, QueueFullError, RequestError, UnavailableError, first_line

STATUSES: dict[type[BaseException], int] = {
    QueueFullError: 429,
    UnavailableError: 503,
    RequestError: 400,
    CapacityError: 400,
    RecursionError: 400,
}
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "unavailable", 500: "internal_error"}
LOG = logging.getLogger("amphista.serve")
TELLING = (400, 401, 404, 405, 413, 429, 500, 503)


class ApiError(AmphistaError):
    """A request that is refused with a status of its own. param: the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def body_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body; of a defect no more is told than that it is one."""
    if isinstance(error, ApiError):
        return error.status, _body(error.status, str(error), error.param, error.code)
    status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)
    text = "the request is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
    return status, _body(status, text if status != 500 else "the server failed at this request; its log says why")


def _body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def logged(error: BaseException, what: str) -> None:
    """Leave a defect of ours in the log: who asked is told no more than that it is one."""
    if body_of(error)[0] == 500:
        LOG.error("%s failed", what, exc_info=error)


def response_to(error: BaseException) -> JSONResponse:
    """Says when to try again where that is known."""
    status, body = body_of(error)
    headers = {"Retry-After": str(round(error.retry_after))} if isinstance(error, QueueFullError) else {}
    if status == 503:
        headers["Retry-After"] = "5"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def add_handlers(app: FastAPI) -> None:
    """Catch everything, what the framework says by itself included."""

    async def of_ours(request: Request, error: Exception) -> JSONResponse:
        logged(error, request.url.path)
        return response_to(error)

    async def of_checks(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_to(_first(error, request))

    async def of_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = 400 if error.status_code == 422 else error.status_code
        return JSONResponse(_body(status, str(error.detail)), status, error.headers)

    for kind in (AmphistaError, RecursionError, Exception):
        app.add_exception_handler(kind, of_ours)
    app.add_exception_handler(RequestValidationError, of_checks)
    app.add_exception_handler(HTTPException, of_framework)


def _first(error: RequestValidationError, request: Request) -> ApiError:
    """The first field that is wrong, as the form says it that what was given came closest to; nothing of that is told
    back."""
    every = error.errors()
    of_first = [found for found in every if found["loc"][:2] == every[0]["loc"][:2]]
    found = max(of_first, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where = list(_named(found["loc"][1:], error.body, found["type"] == "missing"))
    param = where[0] if where and isinstance(where[0], str) else None
    if found["type"] == "none_required":
        return ApiError(400, f"{param} is not supported by this server: leave it out", param=param)
    if not where and isinstance(error.body, bytes):
        return ApiError(400, "the body was not sent as JSON: send the header 'Content-Type: application/json' with it")
    place = ".".join(map(str, where)) or "the body"
    return ApiError(400, f"{place}: {found['msg'].removeprefix('Value error, ')}", param=param)


def _named(loc: Sequence[str | int], body: Any, is_missing: bool) -> Iterator[str | int]:
    """The parts of a place that are fields and numbers of the body; between them stand names of our types."""
    for index, part in enumerate(loc):
        if isinstance(body, dict) and part in body:
            body = body[part]
            yield part
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part] if part < len(body) else None
            yield part
        elif is_missing and index == len(loc) - 1:
            yield part
