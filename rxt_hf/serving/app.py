# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The HTTP side: OpenAI's Responses, Conversations and Chat Completions, and the server that `rxt serve` starts."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers.utils import logging

from ..cache_rxt import StateError
from .guard import Guard, check_address, error_body, impatient
from .messages import Answer, RequestError, from_chat, from_items
from .service import Base, Job, Service, Settings, is_id, new_id, not_found
from .state import OtherWeightsError, read_memory
from .store import Record, StateStore

logger = logging.get_logger(__name__)

try:
    import prometheus_client
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, Response
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError(f"The server needs {error.name}: pip install 'rxt-hf[serve]'.") from None

MAX_BODY = 256 * 1024
# what else a memory's file holds beside its numbers
FILE_SLACK = 8192
# the first is this server's own: what the answer read of each slot of the memory
OPTIONAL_INCLUDES = {"memory.reads", "reasoning.encrypted_content"}

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Items = Annotated[list[dict[str, Any]], Field(max_length=1024)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="ignore")
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ConversationId(BaseModel):
    id: str


class ContextManagement(BaseModel):
    type: Literal["compaction"]
    compact_threshold: int | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseRequest(Body):
    model: str | None = None
    input: str | Items | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    context_management: list[ContextManagement] | None = None
    store: bool | None = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    metadata: Metadata | None = None
    tools: Items | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None
    # read by others alone: who asks, what it costs, and how OpenAI caches
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # of this server: as in Chat Completions
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None


class CompactRequest(Body):
    model: str | None = None
    input: str | Items | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None


class ConversationRequest(Body):
    items: Items | None = None
    metadata: Metadata | None = None


class MetadataRequest(Body):
    metadata: Metadata | None


class ItemsRequest(Body):
    items: Annotated[Items, Field(min_length=1)]


class ChatRequest(Body):
    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    store: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: int | None = None
    tools: Items | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: dict[str, Any] | None = None
    metadata: Metadata | None = None
    logprobs: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None


def to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def answer_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def refuse(condition: Any, message: str, param: str) -> None:
    if condition:
        raise RequestError(message, param=param)


def is_text_format(given: Any) -> bool:
    return given is None or (isinstance(given, dict) and given.get("type") == "text")


def check_tools(tools: list[dict[str, Any]] | None, choice: Any, *, is_nested: bool) -> list[dict[str, Any]] | None:
    """The functions that a model may call, as it is told of them."""
    refuse(
        choice not in (None, "auto", "none"), "The model chooses itself: tool_choice is auto or none.", "tool_choice"
    )
    functions = []
    for tool in tools or ():
        given = tool.get("function") if is_nested else tool
        function: dict[str, Any] = given if isinstance(given, dict) else {}
        is_function = tool.get("type") == "function" and isinstance(function.get("name"), str)
        refuse(not is_function, "Tools are functions with a name.", "tools")
        functions.append(
            {name: function[name] for name in ("name", "description", "parameters") if function.get(name)}
        )
    return None if choice == "none" else functions or None


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
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(deliver(), self.timeout_s + 60)


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


class Events:
    """Numbered events of one streamed response."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return b"event: " + kind.encode() + b"\ndata: " + to_json(event) + b"\n\n"

    def start_text(self, index: int, item: dict[str, Any]) -> bytes:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        begun = {**item, "status": "in_progress", "content": []}
        return self("response.output_item.added", output_index=index, item=begun) + self(
            "response.content_part.added", **place, part=part
        )

    def text(self, index: int, item: dict[str, Any], piece: str) -> bytes:
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        return self("response.output_text.delta", **place, delta=piece, logprobs=[])

    def end_text(self, index: int, item: dict[str, Any]) -> bytes:
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        (part,) = item["content"]
        return (
            self("response.output_text.done", **place, text=part["text"], logprobs=[])
            + self("response.content_part.done", **place, part=part)
            + self("response.output_item.done", output_index=index, item=item)
        )

    def whole(self, index: int, item: dict[str, Any]) -> bytes:
        """An item that is known at once."""
        if item["type"] == "message":
            text = item["content"][0]["text"]
            return self.start_text(index, item) + self.text(index, item, text) + self.end_text(index, item)
        place = {"item_id": item["id"], "output_index": index}
        chunks = [self("response.output_item.added", output_index=index, item=item)]
        if item["type"] == "function_call":
            kind, name = "response.function_call_arguments", item["name"]
            chunks.append(self(f"{kind}.delta", **place, delta=item["arguments"]))
            chunks.append(self(f"{kind}.done", **place, arguments=item["arguments"], name=name))
        elif item["type"] == "reasoning":
            (part,) = item["content"]
            chunks.append(self("response.reasoning_text.delta", **place, content_index=0, delta=part["text"]))
            chunks.append(self("response.reasoning_text.done", **place, content_index=0, text=part["text"]))
        return b"".join([*chunks, self("response.output_item.done", output_index=index, item=item)])


def message_item(text: str, key: str | None = None, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    key = key or new_id("msg")
    return {"id": key, "type": "message", "role": "assistant", "status": status, "content": [part]}


def output_items(answer: Answer, status: str, message_id: str | None = None) -> list[dict[str, Any]]:
    """The items of a response; without calls there is a message, even an empty one."""
    items = []
    if answer.thoughts:
        content = [{"type": "reasoning_text", "text": answer.thoughts}]
        items.append({"id": new_id("rs"), "type": "reasoning", "summary": [], "content": content, "status": status})
    if answer.text or not answer.calls:
        items.append(message_item(answer.text, message_id, status))
    for call in answer.calls:
        ids = {"id": new_id("fc"), "call_id": new_id("call")}
        items.append({"type": "function_call", **ids, **call, "status": "completed"})
    return items


def input_items(given: Any) -> list[dict[str, Any]]:
    """The items of an input as they are listed: with ids, and their content in parts."""
    items = []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given or []:
        kind = item.get("type") or "message"
        if kind == "compaction":
            continue
        item = {**item, "type": kind, "id": new_id({"message": "msg", "function_call": "fc"}.get(kind, "item"))}
        if kind == "message" and isinstance(item["content"], str):
            part = "output_text" if item["role"] == "assistant" else "input_text"
            more = {"annotations": [], "logprobs": []} if part == "output_text" else {}
            item["content"] = [{"type": part, "text": item["content"], **more}]
        items.append({"status": "completed", **item})
    return items


def page_of(items: list[dict[str, Any]], after: str | None, limit: int, order: str) -> dict[str, Any]:
    """A page of a list that is in the order of time."""
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise not_found(after)
        items = items[places[0] + 1 :]
    data = items[:limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(items) > limit}


class Responses:
    """One request for a response, from its checks to what is kept of it."""

    def __init__(self, service: Service, tenant: str, body: ResponseRequest):
        self.service, self.tenant, self.body = service, tenant, body
        self.id, self.message_id, self.created_at = new_id("resp"), new_id("msg"), int(time.time())
        given = body.conversation
        self.conversation = given.id if isinstance(given, ConversationId) else given
        self.tools = check_tools(body.tools, body.tool_choice, is_nested=False)
        self.job: Any = None
        self.base: Any = None

    def check(self) -> None:
        body = self.body
        refuse(body.background, "Responses in the background are not supported.", "background")
        refuse(body.top_logprobs, "Log probabilities are not supported.", "top_logprobs")
        refuse(set(body.include or ()) - OPTIONAL_INCLUDES, "Nothing of that can be included.", "include")
        is_plain = is_text_format((body.text or {}).get("format"))
        refuse(not is_plain, "The model answers with plain text: text.format.type is text.", "text")

    async def start(self) -> Job:
        body, service = self.body, self.service
        self.check()
        messages, sealed = from_items(body.input or [])
        self.base = await service.base(
            self.tenant, previous=body.previous_response_id, conversation=self.conversation, sealed=sealed
        )
        if body.store is not False:
            await service.check_room(self.tenant)
        finished, asked = service.interactions(self.base.about, messages, self.tools)
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.job = service.start(
            self.tenant,
            self.base,
            finished,
            asked,
            instructions=body.instructions,
            thinks=body.reasoning is not None and body.reasoning.effort not in (None, "none"),
            max_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=stop,
            streams=bool(body.stream),
        )
        self.job.describe = lambda status: self.as_json(status, [])
        return self.job

    def as_json(self, status: str, output: list[dict[str, Any]], answer: Answer | None = None) -> dict[str, Any]:
        body, turn = self.body, self.job.turn
        usage = None
        if answer is not None:
            count, said = self.job.input_tokens, len(turn.token_ids)
            usage = {
                "input_tokens": count,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": said,
                "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
                "total_tokens": count + said,
            }
        is_cut = turn.finish_reason == "length" and status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.service.settings.name,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "conversation": None if self.conversation is None else {"id": self.conversation},
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store is not False,
            "temperature": turn.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": turn.top_p,
            "truncation": body.truncation or "disabled",
            "usage": usage,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    async def finish(self) -> dict[str, Any]:
        """The response of the finished turn, once what is to be kept of it is kept."""
        service, turn = self.service, self.job.turn
        answer = service.answer(self.job)
        statuses = {"stop": "completed", "length": "incomplete", "cancelled": "cancelled"}
        status = statuses[turn.finish_reason]
        output = output_items(answer, "completed" if status == "completed" else "incomplete", self.message_id)
        memory, about = turn.memory_after, service.shared(self.base.about)
        if status == "cancelled":
            return self.as_json(status, output, answer)
        keeps = service.settings.keeps_text
        kept = self.as_json(status, output if keeps else [], answer)
        if not keeps:
            kept["instructions"], kept["tools"] = None, []
        records = []
        given = input_items(self.body.input) if keeps else []
        if self.body.store is not False:
            own = {**about, "response": kept, "input": given}
            records.append(service.record(self.tenant, self.id, own, memory))
        if self.conversation is not None:
            records += conversation_records(service, self.tenant, self.conversation, self.base, memory, given + output)
        await service.keep(self.tenant, records, self.conversation, self.base.version)
        if self.body.context_management:
            sealed = service.sealed(self.tenant, about, memory)
            output = [*output, {"id": new_id("cmp"), "type": "compaction", "encrypted_content": sealed}]
        response = self.as_json(status, output, answer)
        if "memory.reads" in (self.body.include or ()):
            response["memory_reads"] = await asyncio.to_thread(service.reads, turn)
        return response

    async def events(self) -> AsyncGenerator[bytes]:
        """The stream; the text is out before the memory is written, and `response.completed` comes after."""
        event = Events()
        item, is_open = message_item("", self.message_id), False
        begun = self.as_json("in_progress", [])
        yield event("response.created", response=begun) + event("response.in_progress", response=begun)
        async for piece in self.job.pieces():
            chunk = b"" if is_open else event.start_text(0, item)
            is_open = True
            yield chunk + event.text(0, item, piece)
        try:
            response = await self.finish()
        except Exception as error:
            # status 200 has been sent: whatever fails now can be said only as an event; `known_error` logs the unknown
            known = known_error(error)
            reason = {"code": "server_error", "message": f"{known.message} ({known.code})"}
            yield event("response.failed", response={**self.as_json("failed", []), "error": reason})
            return
        for index, done in enumerate(response["output"]):
            is_begun = is_open and done["id"] == self.message_id
            yield event.end_text(index, done) if is_begun else event.whole(index, done)
        kind = "completed" if response["status"] == "completed" else "incomplete"
        yield event(f"response.{kind}", response=response)


def conversation_records(
    service: Service, tenant: str, key: str, base: Base, memory: Any, items: list[dict[str, Any]]
) -> list[Record]:
    """The head of a conversation after a turn, and the turn's items; written together or not at all."""
    about = dict(base.about)
    records = []
    if service.settings.keeps_text and items:
        about["parts"] = about.get("parts", 0) + 1
        records.append(Record(tenant, f"items_{key}_{about['parts']}", to_json(items)))
    return [service.record(tenant, key, about, memory, ttl=False), *records]


async def conversation_items(service: Service, tenant: str, key: str) -> list[dict[str, Any]]:
    about, _ = await service.load_about(tenant, key, "conv_")
    items: list[dict[str, Any]] = []
    for part in range(1, about.get("parts", 0) + 1):
        found = await service.call(service.store.get, tenant, f"items_{key}_{part}")
        items += json.loads(found[0]) if found else []
    return items


def known_error(error: Exception) -> RequestError:
    """What a client may know of an error: of one that nobody expected nothing of the inside."""
    if isinstance(error, RequestError):
        return error
    logger.exception("A request has failed.", exc_info=error)
    return RequestError("The server has failed; the memory is as before.", status=500, code="server_error")


def error_answer(error: RequestError) -> Response:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    return answer_json(error_body(error.message, kind, error.code, error.param), error.status, error.headers)


class Chat:
    """One request of Chat Completions: the client sends all messages, the server knows how far it has read them."""

    def __init__(self, service: Service, tenant: str, body: ChatRequest):
        self.service, self.tenant, self.body = service, tenant, body
        self.id, self.created_at = new_id("chatcmpl"), int(time.time())
        self.job: Any = None

    async def start(self) -> Job:
        body, service = self.body, self.service
        refuse(body.n not in (None, 1), "One choice is what there is: n is 1.", "n")
        refuse(body.logprobs, "Log probabilities are not supported.", "logprobs")
        refuse(body.frequency_penalty or body.presence_penalty, "Penalties are not supported.", "frequency_penalty")
        refuse(body.logit_bias, "logit_bias is not supported.", "logit_bias")
        is_plain = is_text_format(body.response_format)
        refuse(not is_plain, "The model answers with plain text: response_format.type is text.", "response_format")
        tools = check_tools(body.tools, body.tool_choice, is_nested=True)
        self.finished, self.asked = service.interactions({}, from_chat(body.messages), tools)
        base, self.keys = await service.known_prefix(self.tenant, self.finished)
        if tools:
            base.about["tools"] = True
        await service.check_room(self.tenant)
        self.job = service.start(
            self.tenant,
            base,
            self.finished[base.about["known"] :],
            self.asked,
            thinks=body.reasoning_effort not in (None, "none"),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
            streams=bool(body.stream),
        )
        return self.job

    async def finish(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Message, finish reason and usage, once the memory after it is kept for the next request."""
        service, turn = self.service, self.job.turn
        answer = service.answer(self.job)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thoughts:
            message["reasoning_content"] = answer.thoughts
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": new_id("call"), "type": "function", "function": dict(call)} for call in answer.calls
            ]
        if self.body.store is not False and turn.finish_reason in ("stop", "length"):
            history = [*self.finished, [self.asked, answer.as_message()]]
            (key,) = service.chat_keys(history)[-1:]
            await service.keep(self.tenant, [service.record(self.tenant, key, {}, turn.memory_after)])
        count, said = self.job.input_tokens, len(turn.token_ids)
        usage = {
            "prompt_tokens": count,
            "completion_tokens": said,
            "total_tokens": count + said,
            "completion_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        }
        reason = "tool_calls" if answer.calls else "length" if turn.finish_reason == "length" else "stop"
        return message, reason, usage

    def as_json(self, kind: str, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created_at, "model": self.service.settings.name}
        return {**head, "choices": choices, "usage": usage}

    async def completion(self) -> dict[str, Any]:
        message, reason, usage = await self.finish()
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return self.as_json("chat.completion", [choice], usage)

    async def events(self) -> AsyncGenerator[bytes]:
        def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
            choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
            return b"data: " + to_json(self.as_json("chat.completion.chunk", choices)) + b"\n\n"

        yield chunk({"role": "assistant", "content": ""})
        is_open = False
        async for piece in self.job.pieces():
            is_open = True
            yield chunk({"content": piece})
        try:
            message, reason, usage = await self.finish()
        except Exception as error:
            # as for a streamed response: it has begun, and only an event is left to say it
            known = known_error(error)
            yield b"data: " + to_json(error_body(known.message, "server_error", known.code)) + b"\n\n"
            return
        rest = {name: message[name] for name in ("reasoning_content", "tool_calls") if name in message}
        if calls := rest.get("tool_calls"):
            rest["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        if message["content"] and not is_open:
            rest["content"] = message["content"]
        yield (chunk(rest) if rest else b"") + chunk({}, reason)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield b"data: " + to_json(self.as_json("chat.completion.chunk", [], usage)) + b"\n\n"
        yield b"data: [DONE]\n\n"


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
    The server as an ASGI application; its engine starts here and ends with the application's lifespan.

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
    add_conversation_routes(app, service)
    add_own_routes(app, service, metrics)
    memory_file = service.memory_bytes + FILE_SLACK
    # a sealed memory is base64; its client may send one beside the memory's own bytes of text
    limits = {"/v1/memories/": 2 * memory_file}
    return Guard(
        app,
        settings.tokens,
        lambda path: next(
            (size for start, size in limits.items() if path.startswith(start)), MAX_BODY + 2 * memory_file
        ),
    )


def add_generating_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """The two that let the model speak."""

    async def run(request: Request, asked: Any, conversation: str | None, finish: Callable[[], Any]) -> Response:
        tenant = request.scope["tenant"]
        check_model(service, asked.body.model)
        async with contextlib.AsyncExitStack() as held:
            await held.enter_async_context(service.lease(tenant, conversation))
            job = await held.enter_async_context(service.running(tenant, asked.id, await asked.start()))
            held.callback(metrics.observe, job)
            if asked.body.stream:
                answer = EventStream(asked.events(), job, held.pop_all(), service.settings.timeout_s)
            else:
                async with _hang_up(request.receive, job):
                    await job.finish()
                answer = answer_json(await finish())
        return answer

    @app.post("/v1/responses")
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        asked = Responses(service, request.scope["tenant"], body)
        return await run(request, asked, asked.conversation, asked.finish)

    @app.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        asked = Chat(service, request.scope["tenant"], body)
        return await run(request, asked, None, asked.completion)


def check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.settings.name:
        raise RequestError(
            f"There is no model {name[:80]!r}, this is {service.settings.name!r}.",
            status=404,
            code="model_not_found",
            param="model",
        )


def add_response_routes(app: FastAPI, service: Service) -> None:
    """What has been answered, and memories that clients keep."""

    @app.post("/v1/responses/compact")
    async def compact(body: CompactRequest, request: Request) -> Response:
        check_model(service, body.model)
        tenant = request.scope["tenant"]
        messages, sealed = from_items(body.input or [])
        base = await service.base(tenant, previous=body.previous_response_id, sealed=sealed)
        finished, asked = service.interactions(base.about, messages, None)
        ids = [service.codec.interaction(each) for each in finished]
        memory = await service.replay(base.memory, finished)
        # what is not answered yet is in no memory, and goes along with it
        base.about["pending"] = [] if asked is None else [asked]
        sealed = service.sealed(tenant, service.shared(base.about), memory)
        output = [{"id": new_id("cmp"), "type": "compaction", "encrypted_content": sealed}]
        count = sum(map(len, ids))
        usage = {
            "input_tokens": count,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": count,
        }
        head = {"id": new_id("resp"), "object": "response.compaction", "created_at": int(time.time())}
        return answer_json({**head, "output": output, "usage": usage})

    @app.get("/v1/responses/{response_id}")
    async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
        refuse(stream, "A response that is finished is not streamed.", "stream")
        about, _ = await service.load_about(request.scope["tenant"], response_id, "resp_")
        return answer_json(about["response"])

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> Response:
        tenant = request.scope["tenant"]
        if not (is_id(response_id, ("resp_",)) and await service.call(service.store.delete, tenant, [response_id])):
            raise not_found(response_id)
        return answer_json({"id": response_id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(response_id: str, request: Request) -> Response:
        tenant = request.scope["tenant"]
        job = service.jobs.get((tenant, response_id))
        if job is None:
            await service.load_about(tenant, response_id, "resp_")
            raise RequestError("The response is finished.", code="response_finished")
        job.cancel()
        await job.finish()
        return answer_json(job.describe("cancelled") if job.describe else {})

    @app.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        about, _ = await service.load_about(request.scope["tenant"], response_id, "resp_")
        return answer_json(page_of(about["input"], after, limit, order))


def add_conversation_routes(app: FastAPI, service: Service) -> None:
    """Conversations: a head that moves, where a response is a place that stays."""

    def as_json(key: str, about: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": key,
            "object": "conversation",
            "created_at": about["created_at"],
            "metadata": about["metadata"],
        }

    async def write(tenant: str, key: str, base: Base, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Writes finished interactions into the memory; what is not answered yet waits for the next turn."""
        messages, sealed = from_items(given)
        refuse(sealed is not None, "A conversation has its own memory: leave out the compaction item.", "items")
        finished, asked = service.interactions(base.about, messages, None)
        base.about["pending"] = [] if asked is None else [asked]
        base.memory = await service.replay(base.memory, finished)
        items = input_items(given)
        records = conversation_records(service, tenant, key, base, base.memory, items)
        await service.keep(tenant, records, key, base.version)
        return items

    @app.post("/v1/conversations")
    async def create_conversation(request: Request, body: ConversationRequest | None = None) -> Response:
        tenant, key = request.scope["tenant"], new_id("conv")
        await service.check_room(tenant)
        base = await service.base(tenant)
        base.about = {"created_at": int(time.time()), "metadata": (body and body.metadata) or {}}
        base.version = 0
        given = [] if body is None or body.items is None else body.items
        await write(tenant, key, base, given)
        return answer_json(as_json(key, base.about))

    @app.get("/v1/conversations/{conversation_id}")
    async def get_conversation(conversation_id: str, request: Request) -> Response:
        about, _ = await service.load_about(request.scope["tenant"], conversation_id, "conv_")
        return answer_json(as_json(conversation_id, about))

    @app.post("/v1/conversations/{conversation_id}")
    async def update_conversation(conversation_id: str, body: MetadataRequest, request: Request) -> Response:
        tenant = request.scope["tenant"]
        async with service.lease(tenant, conversation_id):
            base = await service.base(tenant, conversation=conversation_id)
            base.about["metadata"] = body.metadata or {}
            records = conversation_records(service, tenant, conversation_id, base, base.memory, [])
            await service.keep(tenant, records, conversation_id, base.version)
        return answer_json(as_json(conversation_id, base.about))

    @app.delete("/v1/conversations/{conversation_id}")
    async def delete_conversation(conversation_id: str, request: Request) -> Response:
        tenant = request.scope["tenant"]
        about, _ = await service.load_about(tenant, conversation_id, "conv_")
        parts = [f"items_{conversation_id}_{part}" for part in range(1, about.get("parts", 0) + 1)]
        await service.call(service.store.delete, tenant, [conversation_id, *parts])
        return answer_json({"id": conversation_id, "object": "conversation.deleted", "deleted": True})

    @app.post("/v1/conversations/{conversation_id}/items")
    async def create_items(conversation_id: str, body: ItemsRequest, request: Request) -> Response:
        tenant = request.scope["tenant"]
        async with service.lease(tenant, conversation_id):
            base = await service.base(tenant, conversation=conversation_id)
            items = await write(tenant, conversation_id, base, body.items)
        return answer_json(page_of(items, None, len(items), "asc"))

    @app.get("/v1/conversations/{conversation_id}/items")
    async def list_items(
        conversation_id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        items = await conversation_items(service, request.scope["tenant"], conversation_id)
        return answer_json(page_of(items, after, limit, order))

    @app.get("/v1/conversations/{conversation_id}/items/{item_id}")
    async def get_item(conversation_id: str, item_id: str, request: Request) -> Response:
        items = await conversation_items(service, request.scope["tenant"], conversation_id)
        for item in items:
            if item["id"] == item_id:
                return answer_json(item)
        raise not_found(item_id)

    @app.delete("/v1/conversations/{conversation_id}/items/{item_id}")
    async def delete_item(conversation_id: str, item_id: str, request: Request) -> Response:
        raise RequestError(
            "What has been written into a memory cannot be taken out alone: fork from a response before it, or delete "
            "the conversation."
        )


def add_own_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Models, memories as files, the page, and what an operator asks."""

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
        return answer_json({"object": "list", "data": [model_json()]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        check_model(service, name)
        return answer_json(model_json())

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
        return answer_json({"id": memory_id, "object": "memory", "bytes": memory.nbytes, "turns": turns})

    @app.delete("/v1/memories/{memory_id}")
    async def delete_memory(memory_id: str, request: Request) -> Response:
        tenant = request.scope["tenant"]
        if not (is_id(memory_id, ("mem_",)) and await service.call(service.store.delete, tenant, [memory_id])):
            raise not_found(memory_id)
        return answer_json({"id": memory_id, "object": "memory", "deleted": True})

    @app.get("/health")
    async def health() -> Response:
        return answer_json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = app.state.is_ready and service.engine.is_running
        return answer_json({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

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
