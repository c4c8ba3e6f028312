# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's Responses: one request from its checks to what is kept of it, and its events."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from .conversations import conversation_records
from .items import compaction_item, input_items, message_item, output_items, text_part, usage
from .messages import Answer, from_items, known_error
from .requests import CompactRequest, ConversationId, ResponseRequest
from .service import Job, Service
from .state import new_id, to_json


class Events:
    """Numbered events of one streamed response."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), to_json(event))

    def start_text(self, index: int, item: dict[str, Any]) -> bytes:
        begun = {**item, "status": "in_progress", "content": []}
        return self("response.output_item.added", output_index=index, item=begun) + self(
            "response.content_part.added", **text_place(index, item), part=text_part("output_text", "")
        )

    def text(self, index: int, item: dict[str, Any], piece: str) -> bytes:
        return self("response.output_text.delta", **text_place(index, item), delta=piece, logprobs=[])

    def end_text(self, index: int, item: dict[str, Any]) -> bytes:
        place, (part,) = text_place(index, item), item["content"]
        return (
            self("response.output_text.done", **place, text=part["text"], logprobs=[])
            + self("response.content_part.done", **place, part=part)
            + self("response.output_item.done", output_index=index, item=item)
        )

    def whole(self, index: int, item: dict[str, Any]) -> bytes:
        """Returns the events of an item that is known at once."""
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


def text_place(index: int, item: dict[str, Any]) -> dict[str, Any]:
    return {"item_id": item["id"], "output_index": index, "content_index": 0}


class Responses:
    """One request for a response."""

    def __init__(self, service: Service, tenant: str, body: ResponseRequest):
        self.service, self.tenant, self.body = service, tenant, body
        self.id, self.message_id, self.created_at = new_id("resp"), new_id("msg"), int(time.time())
        given = body.conversation
        self.conversation = given.id if isinstance(given, ConversationId) else given
        self.job: Any = None
        self.base: Any = None

    async def start(self) -> Job:
        """Finds the memory and hands the turn to the engine."""
        body, service = self.body, self.service
        tools = body.functions()
        body.check()
        messages, sealed = from_items(body.input or [])
        self.base = await service.base(
            self.tenant, previous=body.previous_response_id, conversation=self.conversation, sealed=sealed
        )
        if body.store is not False:
            await service.check_room(self.tenant)
        finished, asked = service.interactions(self.base.about, messages, tools)
        self.job = service.start(
            self.tenant,
            self.base,
            finished,
            asked,
            instructions=body.instructions,
            thinks=body.reasoning is not None and body.reasoning.effort not in (None, "none"),
            max_tokens=body.max_output_tokens,
            **body.sampling(),
        )
        self.job.describe = lambda status: self.as_json(status, [])
        return self.job

    def as_json(self, status: str, output: list[dict[str, Any]], answer: Answer | None = None) -> dict[str, Any]:
        """Returns the response in one of its states."""
        body, turn = self.body, self.job.turn
        counts = None
        if answer is not None:
            counts = usage(self.job.input_tokens, len(turn.token_ids), answer.reasoning_tokens)
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
            "usage": counts,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    async def finish(self) -> dict[str, Any]:
        """Returns the response of the finished turn, once what is to be kept of it is kept."""
        service, turn, body = self.service, self.job.turn, self.body
        answer = service.answer(self.job)
        status = {"stop": "completed", "length": "incomplete", "cancelled": "cancelled"}[turn.finish_reason]
        output = output_items(answer, "completed" if status == "completed" else "incomplete", self.message_id)
        response = self.as_json(status, output, answer)
        if status == "cancelled":
            return response
        memory, about = turn.memory_after, service.shared(self.base.about)
        keeps, records = service.settings.keeps_text, []
        given = input_items(body.input) if keeps else []
        if body.store is not False:
            kept = response if keeps else {**response, "output": [], "instructions": None, "tools": []}
            records.append(service.record(self.tenant, self.id, {**about, "response": kept, "input": given}, memory))
        if self.conversation is not None:
            records += conversation_records(service, self.tenant, self.conversation, self.base, memory, given + output)
        await service.keep(self.tenant, records, self.conversation, self.base.version)
        if body.context_management:
            response["output"] = [*output, compaction_item(service.sealed(self.tenant, about, memory))]
        if "memory.reads" in (body.include or ()):
            response["memory_reads"] = await asyncio.to_thread(service.reads, turn)
        return response

    async def events(self) -> AsyncGenerator[bytes]:
        """Yields the stream; the text is out before the memory is written, and `response.completed` comes after."""
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
        chunks = []
        for index, done in enumerate(response["output"]):
            is_begun = is_open and done["id"] == self.message_id
            chunks.append(event.end_text(index, done) if is_begun else event.whole(index, done))
        kind = "completed" if response["status"] == "completed" else "incomplete"
        yield b"".join(chunks) + event(f"response.{kind}", response=response)


async def compact(service: Service, tenant: str, body: CompactRequest) -> dict[str, Any]:
    """Writes a history into a memory and returns that, sealed."""
    messages, sealed = from_items(body.input or [])
    base = await service.base(tenant, previous=body.previous_response_id, sealed=sealed)
    count = await service.write(base, messages)
    item = compaction_item(service.sealed(tenant, service.shared(base.about), base.memory))
    head = {"id": new_id("resp"), "object": "response.compaction", "created_at": int(time.time())}
    return {**head, "output": [item], "usage": usage(count)}


__all__ = ["Responses", "compact"]
