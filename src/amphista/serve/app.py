"""The app: paths, who answers them, and how answers go out. Everything else is told by `errors.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.sse import format_sse_event
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from amphista.errors import AmphistaError
from amphista.prompts import texts_in
from amphista.provenance import versions
from amphista.serve.errors import TELLING, add_handlers, body_of, logged, response_to
from amphista.serve.guard import Guard
from amphista.serve.responses import ResponseShape, ResponsesRequest, named
from amphista.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TemplateRequest,
    TokenizeRequest,
)
from amphista.serve.service import Call, Service
from amphista.serve.settings import Settings
from amphista.serve.shapes import Shape, model, models
from amphista.target.text import Text

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "index.html": "text/html",
    "app.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ERRORS: dict[int | str, dict[str, Any]] = {status: {"description": "An error in OpenAI's shape"} for status in TELLING}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
Result = TypeVar("Result")


class StrictJson(Request):
    """A request whose JSON pydantic reads: in a tenth of the time, in which nobody else's step could go on; what is not
    JSON to the letter (NaN, other encodings than UTF-8, half a character) is refused."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is no JSON: {error}") from None


class Route(APIRoute):
    """Gives requests to who answers them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_strictly(request: Request) -> Response:
            try:
                return await answer(StrictJson(request.scope, request.receive))
            except (AmphistaError, HTTPException, RequestValidationError, RecursionError):
                raise
            except Exception as error:  # uvicorn would hang up, and whoever asks next on that connection would hear it
                logged(error, request.url.path)
                return response_to(error)

        return answer_strictly


class EventStream(StreamingResponse):
    """Server-sent events of a call; whatever ends the response ends the call, even before its first event."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, call: Call, shape: Shape | ResponseShape) -> None:
        super().__init__(_events(call.id, shape), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._end = lambda: service.worker.cancel(call.ticket)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _events(name: str, shape: Shape | ResponseShape) -> AsyncIterator[bytes]:
    try:
        async for chunk in shape.chunks():
            if chunk is None:
                yield format_sse_event(comment="ping")
            else:
                yield format_sse_event(event=chunk.get("type"), data_str=json.dumps(chunk))
        if shape.last_words is not None:
            yield format_sse_event(data_str=shape.last_words)
    except Exception as error:
        logged(error, name)
        yield format_sse_event(event="error", data_str=json.dumps(body_of(error)[1]))


async def _answered(
    service: Service,
    starting: Coroutine[Any, Any, Call],
    request: Request,
    shaped: Callable[[Call, Text], Shape | ResponseShape] = Shape,
) -> Response:
    """Streamed or whole; nothing goes on for a client that has gone."""
    call = await starting
    try:
        whole = None
        if await _unless_gone(call.begin(), request) is not None:
            shape = shaped(call, service.text)
            if call.body.stream:
                return EventStream(service, call, shape)
            whole = await _unless_gone(shape.whole(), request)
    except BaseException:
        service.worker.cancel(call.ticket)
        raise
    service.worker.cancel(call.ticket)
    return Response(status_code=204) if whole is None else JSONResponse(whole)


async def _unless_gone(work: Coroutine[Any, Any, Result], request: Request) -> Result | None:
    """The result; None as soon as the client has gone."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The whole server but its sockets."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close(0)

    app = FastAPI(
        title="amphista",
        version=versions()["amphista"],
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.router.route_class = Route
    add_handlers(app)
    app.add_middleware(Guard, keys=settings.api_keys, hosts=settings.known_hosts)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_headers=["*"],  # OpenAI's own client sends a dozen of its own
            allow_methods=["*"],
            expose_headers=["Retry-After"],
        )
    _add_state(app, service)
    _add_answers(app, service)
    _add_texts(app, service)
    _add_page(app)
    _complete_schema(app, service.name)
    return app


def _add_state(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the engine lives."""
        is_healthy = service.worker.is_healthy
        return JSONResponse({"status": "ok" if is_healthy else "stuck"}, 200 if is_healthy else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether it is loaded, warm, and not about to end."""
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": versions()["amphista"]}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return models([service.name], created, service.max_len)

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        service.check_model(model_id)
        return model(model_id, created, service.max_len)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answered(service, service.chat(body, request.state.tenant), request)

    @app.post("/v1/completions", responses=STREAMED)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await _answered(service, service.complete(body, request.state.tenant), request)

    @app.post("/v1/responses", responses=STREAMED)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        starting = named(service.chat(body.as_chat(), request.state.tenant))
        return await _answered(service, starting, request, partial(ResponseShape, body=body))


def _add_texts(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        tokens = await service.rendered(lambda: _tokens(service, body))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_len}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        service.check_model(body.model)
        return {"prompt": await service.rendered(lambda: service.text.decode_exactly(body.tokens))}

    @app.post("/apply-template")
    async def apply_template(body: TemplateRequest) -> dict[str, str]:
        service.check_model(body.model)
        messages = [message.for_template() for message in body.messages]
        is_open = body.add_generation_prompt
        return {
            "prompt": await service.rendered(lambda: service.text.render_text(messages, add_generation_prompt=is_open))
        }


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    service.check_length(texts_in(body.model_dump(include={"prompt", "messages"})))
    if body.messages is not None:
        return service.render(body.messages, add_generation_prompt=body.add_generation_prompt)
    assert body.prompt is not None
    return service.text.encode(body.prompt) if body.add_special_tokens else service.text.encode_part(body.prompt)


def _add_page(app: FastAPI) -> None:
    for file, kind in PAGE_FILES.items():
        path = "/" if file == "index.html" else f"/{file}"
        response = Response((PAGE / file).read_bytes(), media_type=kind, headers=PAGE_HEADERS)
        app.add_route(path, _always(response), include_in_schema=False)


def _always(response: Response) -> Callable[[Request], Response]:
    return lambda request: response


def _complete_schema(app: FastAPI, name: str) -> None:
    """What the framework does not know of: keys, the models there are, and that nothing is answered by 422."""
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["components"]["schemas"].pop("HTTPValidationError", None)
    schema["components"]["schemas"].pop("ValidationError", None)
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = [] if path in ("/health", "/ready", "/version") else [{"key": []}]
    for body in schema["components"]["schemas"].values():
        if "model" in body.get("properties", {}):
            body["properties"]["model"] = {"anyOf": [{"enum": [name]}, {"type": "null"}]}
