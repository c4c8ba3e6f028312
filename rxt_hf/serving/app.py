# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The HTTP side: endpoints, errors, metrics, and the server that `rxt serve` starts."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ..cache_rxt import StateError
from .chat import Chat
from .conversations import Order, PageSize, conversation_routes
from .guard import Guard, check_address, error_body, impatient
from .items import page_of
from .messages import RequestError, known_error
from .requests import JSON, ChatRequest, CompactRequest, ResponseRequest, refuse
from .responses import Responses, compact
from .service import Job, Service, Settings, is_id
from .state import OtherWeightsError, read_memory
from .store import StateStore

try:
    import anyio
    import prometheus_client
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, Response
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError(f"The server needs {error.name}: pip install 'rxt-hf[serve]'.") from None

MAX_BODY = 256 * 1024
# what else a memory's file holds beside its numbers
FILE_SLACK = 8192


class EventStream(Response):
    """Server-sent events; a client that hangs up, or reads too slowly, ends the job. `held` is let go at the end."""

    def __init__(self, events: AsyncGenerator[bytes], job: Job, held: contextlib.AsyncExitStack, timeout_s: float):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.events, self.job, self.held, self.timeout_s = events, job, held, timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def deliver() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async with self.held, contextlib.aclosing(self.events), _hang_up(receive, self.job):
            with anyio.move_on_after(self.timeout_s + 60):
                await deliver()


@contextlib.asynccontextmanager
async def _hang_up(receive: Any, job: Job) -> AsyncGenerator[None]:
    """Cancels the job when its client has gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()


def error_answer(error: RequestError) -> Response:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    return JSON(error_body(error.message, kind, error.code, error.param), error.status, error.headers)


class Metrics:
    """What Prometheus reads: of all tenants together, and nothing of what was said."""

    def __init__(self, service: Service):
        self.registry = prometheus_client.CollectorRegistry()
        self.ended = prometheus_client.Counter(
            "rxt_turns", "Turns that have ended, by their end", ["reason"], registry=self.registry
        )
        self.first_token = prometheus_client.Histogram(
            "rxt_first_token_seconds",
            "Time from a turn's arrival to its first token",
            registry=self.registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        engine = service.engine
        for name, text, read in (
            ("rxt_rows_active", "Turns that are generated", lambda: engine.active),
            ("rxt_rows_max", "Turns that can be generated at once", lambda: engine.max_rows),
            ("rxt_turns_waiting", "Turns that wait for a row", lambda: engine.waiting),
            ("rxt_tokens_generated", "Tokens that have been generated", lambda: engine.tokens),
            ("rxt_steps", "Forwards of one token of each active row", lambda: engine.steps),
            ("rxt_store_records", "States in the store", lambda: service.store.usage().records),
            ("rxt_store_bytes", "Bytes in the store", lambda: service.store.usage().num_bytes),
        ):
            prometheus_client.Gauge(name, text, registry=self.registry).set_function(read)

    def observe(self, job: Job) -> None:
        self.ended.labels(job.turn.finish_reason or "cancelled").inc()
        if job.turn.first_token_at is not None:
            self.first_token.observe(job.turn.first_token_at - job.turn.started_at)


def build_app(model: Any, tokenizer: Any, store: StateStore, settings: Settings | None = None) -> Any:
    """
    Builds the server as an ASGI application; its engine starts here and ends with the application's lifespan.

    Args:
        model ([`RxTForCausalLM`]): is not changed.
        tokenizer (`PreTrainedTokenizerFast`): with the chat template of RxT.
        store ([`StateStore`]): shared by all servers that answer for the same conversations; closed at the end.
        settings ([`Settings`], *optional*): limits and options.
    """
    settings = settings or Settings()
    service = Service(model, tokenizer, store, settings)
    metrics = Metrics(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        sweeper = asyncio.ensure_future(service.sweep())
        app.state.is_ready = True
        yield
        app.state.is_ready = False
        sweeper.cancel()
        await asyncio.to_thread(service.engine.close)
        store.close()

    app = FastAPI(title="rxt serve", lifespan=lifespan, docs_url=None, redoc_url=None, strict_content_type=False)
    app.state.is_ready, app.state.service = False, service

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            # names of fields are the client's, and may be of any length
            place = [str(part)[:80] for part in first["loc"][:6] if part not in ("body", "query", "path")]
            text = f"{'.'.join(place)}: {first['msg']}" if place else first["msg"]
            error = RequestError(text, code=first["type"], param=place[0] if place else None)
        elif isinstance(error, HTTPException):
            error = RequestError(str(error.detail), status=error.status_code)
        return error_answer(known_error(error))

    for kind in (RequestError, RequestValidationError, HTTPException, StateError, Exception):
        app.add_exception_handler(kind, handle)
    add_generating_routes(app, service, metrics)
    add_response_routes(app, service)
    app.include_router(conversation_routes(service))
    add_own_routes(app, service, metrics)
    memory_file = 2 * (service.memory_bytes + FILE_SLACK)

    def max_body(path: str) -> int:
        # a sealed memory is base64; its client may send one beside the memory's own bytes of text
        return memory_file if path.startswith("/v1/memories/") else MAX_BODY + memory_file

    return Guard(app, settings.tokens, max_body)


def add_generating_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Adds the two endpoints that let the model speak."""

    async def run(asked: Responses | Chat, request: Request) -> Response:
        check_model(service, asked.body.model)
        async with contextlib.AsyncExitStack() as held:
            await held.enter_async_context(service.lease(asked.tenant, asked.conversation))
            job = await held.enter_async_context(service.running(asked.tenant, asked.id, await asked.start()))
            held.callback(metrics.observe, job)
            if asked.body.stream:
                return EventStream(asked.events(), job, held.pop_all(), service.settings.timeout_s)
            async with _hang_up(request.receive, job):
                await job.finish()
            return JSON(await asked.finish())

    @app.post("/v1/responses")
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        return await run(Responses(service, request.scope["tenant"], body), request)

    @app.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        return await run(Chat(service, request.scope["tenant"], body), request)


def check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.settings.name:
        raise RequestError(
            f"There is no model {name[:80]!r}, this is {service.settings.name!r}.",
            status=404,
            code="model_not_found",
            param="model",
        )


def add_response_routes(app: FastAPI, service: Service) -> None:
    """Adds what has been answered, and memories that clients keep."""

    @app.post("/v1/responses/compact")
    async def compact_history(body: CompactRequest, request: Request) -> Response:
        check_model(service, body.model)
        return JSON(await compact(service, request.scope["tenant"], body))

    @app.get("/v1/responses/{response_id}")
    async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
        refuse(stream, "A response that is finished is not streamed.", "stream")
        about, _ = await service.load_about(request.scope["tenant"], response_id, "resp_")
        return JSON(about["response"])

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> Response:
        await service.delete(request.scope["tenant"], response_id, "resp_")
        return JSON({"id": response_id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(response_id: str, request: Request) -> Response:
        tenant = request.scope["tenant"]
        job = service.jobs.get((tenant, response_id))
        if job is None:
            await service.load_about(tenant, response_id, "resp_")
            raise RequestError("The response is finished.", code="response_finished")
        job.cancel()
        await job.finish()
        return JSON(job.describe("cancelled") if job.describe else {})

    @app.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: PageSize = 20,
        order: Order = "desc",
    ) -> Response:
        about, _ = await service.load_about(request.scope["tenant"], response_id, "resp_")
        return JSON(page_of(about["input"], after, limit, order))


def add_own_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Adds models, memories as files, the page, and what an operator asks."""

    def model_json() -> dict[str, Any]:
        return {
            "id": service.settings.name,
            "object": "model",
            "created": service.created_at,
            "owned_by": "rxt_hf",
            "fingerprint": service.fingerprint,
            "memory_bytes": service.memory_bytes,
            "cache_bytes_per_token": service.bytes_per_token,
            "max_position_embeddings": service.model.config.max_position_embeddings,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSON({"object": "list", "data": [model_json()]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        check_model(service, name)
        return JSON(model_json())

    @app.get("/v1/memories/{memory_id}")
    async def get_memory(memory_id: str, request: Request) -> Response:
        _, memory, _ = await service.load_state(request.scope["tenant"], memory_id, ("resp_", "conv_", "mem_"))
        return Response(memory.to_bytes(), media_type="application/octet-stream")

    @app.put("/v1/memories/{memory_id}")
    async def put_memory(memory_id: str, request: Request) -> Response:
        tenant = request.scope["tenant"]
        refuse(
            not is_id(memory_id, ("mem_",)), "The id of a memory is mem_ and up to 64 letters or digits.", "memory_id"
        )
        await service.check_room(tenant)
        try:
            memory = read_memory(await request.body(), service.model, service.fingerprint)
        except OtherWeightsError as error:
            raise RequestError(str(error), status=409, code="weights_changed") from None
        except StateError as error:
            raise RequestError(str(error), code="invalid_memory") from None
        await service.keep(tenant, [service.record(tenant, memory_id, {}, memory)])
        turns = int(memory.turns[0])
        return JSON({"id": memory_id, "object": "memory", "bytes": memory.nbytes, "turns": turns})

    @app.delete("/v1/memories/{memory_id}")
    async def delete_memory(memory_id: str, request: Request) -> Response:
        await service.delete(request.scope["tenant"], memory_id, "mem_")
        return JSON({"id": memory_id, "object": "memory", "deleted": True})

    @app.get("/health")
    async def health() -> Response:
        return JSON({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = app.state.is_ready and service.engine.is_running
        return JSON({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        text = await asyncio.to_thread(prometheus_client.generate_latest, metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    page = {
        "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'",
        "x-frame-options": "DENY",
    }
    for path, name in (("/", "page.html"), ("/page.js", "page.js")):
        file = FileResponse(Path(__file__).with_name(name), headers=page)
        app.add_api_route(path, lambda file=file: file, include_in_schema=False)


def serve(app: Any, settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> None:
    """
    Serves until a signal comes, and then ends the turns that run.

    Raises: `ValueError` for an address that others can reach, without tokens.
    """
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    check_address(host, settings.tokens is not None)
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=impatient(AutoHTTPProtocol),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=30,
        limit_concurrency=4096,
        h11_max_incomplete_event_size=64 * 1024,
    )


__all__ = ["build_app", "serve"]
