# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's Chat Completions: the client sends all messages, the server knows how far it has read them."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from .guard import error_body
from .messages import from_chat, known_error
from .requests import ChatRequest
from .service import Job, Service
from .state import new_id, to_json


class Chat:
    """One request of Chat Completions."""

    conversation = None

    def __init__(self, service: Service, tenant: str, body: ChatRequest):
        self.service, self.tenant, self.body = service, tenant, body
        self.id, self.created_at = new_id("chatcmpl"), int(time.time())
        self.job: Any = None

    async def start(self) -> Job:
        """Finds the memory of the longest known beginning and hands the turn to the engine, which replays the rest."""
        body, service = self.body, self.service
        body.check()
        tools = body.functions(lambda tool: tool.get("function"))
        self.finished, self.asked = service.interactions({}, from_chat(body.messages), tools)
        base = await service.known_prefix(self.tenant, self.finished)
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
            **body.sampling(),
        )
        return self.job

    async def _end(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Returns message, finish reason and usage, once the memory is kept for the next request."""
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

    def _as_json(self, kind: str, choice: dict[str, Any] | None, reason: str | None, usage: Any) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, **choice, "finish_reason": reason, "logprobs": None}]
        head = {"id": self.id, "object": kind, "created": self.created_at, "model": self.service.settings.name}
        return {**head, "choices": choices, "usage": usage}

    async def finish(self) -> dict[str, Any]:
        """Returns the completion of the finished turn."""
        message, reason, usage = await self._end()
        return self._as_json("chat.completion", {"message": message}, reason, usage)

    async def events(self) -> AsyncGenerator[bytes]:
        """Yields the stream."""

        def chunk(delta: dict[str, Any] | None, reason: str | None = None, usage: Any = None) -> bytes:
            choice = None if delta is None else {"delta": delta}
            return b"data: %b\n\n" % to_json(self._as_json("chat.completion.chunk", choice, reason, usage))

        yield chunk({"role": "assistant", "content": ""})
        is_open = False
        async for piece in self.job.pieces():
            is_open = True
            yield chunk({"content": piece})
        try:
            message, reason, usage = await self._end()
        except Exception as error:
            # as for a streamed response: it has begun, and only an event is left to say it
            known = known_error(error)
            yield b"data: %b\n\n" % to_json(error_body(known.message, "server_error", known.code))
            return
        rest = {name: message[name] for name in ("reasoning_content", "tool_calls") if name in message}
        if calls := rest.get("tool_calls"):
            rest["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        if message["content"] and not is_open:
            rest["content"] = message["content"]
        last = chunk({}, reason)
        if self.body.stream_options and self.body.stream_options.include_usage:
            last += chunk(None, usage=usage)
        yield (chunk(rest) if rest else b"") + last + b"data: [DONE]\n\n"


__all__ = ["Chat"]
