# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Between OpenAI's lists of items or messages and the interactions that an RxT reads and writes."""

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers.utils import logging

from ..chat_template import CUT, encode_prompt, source_pieces
from ..session import MIN_ANSWER_TOKENS
from .engine import decode

logger = logging.get_logger(__name__)

Message = dict[str, Any]
_PLAIN = (["user"], ["user", "assistant"])
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class RequestError(Exception):
    """A request that cannot be answered, as the API says it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.code, self.param, self.headers = message, status, code, param, headers or {}


def known_error(error: Exception) -> RequestError:
    """Returns what a client may know of an error: of one that nobody expected nothing of the inside."""
    if isinstance(error, RequestError):
        return error
    logger.exception("A request has failed.", exc_info=error)
    return RequestError("The server has failed; the memory is as before.", status=500, code="server_error")


def not_found(key: str) -> RequestError:
    return RequestError(f"There is no {key[:80]!r}.", status=404, code="not_found")


def text_of(content: Any, param: str) -> str:
    """Returns the text of a string or of a list of text parts."""
    if isinstance(content, str):
        text = content
    elif isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)):
                raise RequestError("This model reads text only: each part must be text.", param=param)
        text = "".join(part["text"] for part in content)
    else:
        raise RequestError("The content must be a string or a list of text parts.", param=param)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("The text is no valid Unicode.", param=param) from None
    return text


def role_of(message: Message, param: str, has_tools: bool = True) -> str:
    """Returns the role of a message by its name here, whatever JSON a client gave as one."""
    known = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
    if has_tools:
        known |= {"tool": "tool", "function": "tool"}
    role = message.get("role")
    if not isinstance(role, str) or role not in known:
        raise RequestError(f"There is no role {str(role)[:40]!r}.", param=param)
    return known[role]


def from_items(items: str | Sequence[Message]) -> tuple[list[Message], str | None]:
    """Messages of a Responses input, and the sealed memory before them if there is one."""
    if isinstance(items, str):
        return [{"role": "user", "content": text_of(items, "input")}], None
    sealed = None
    messages: list[Message] = []
    for item in items:
        kind = item.get("type") or "message"
        if kind == "compaction":
            # it stands for all that came before it
            sealed, messages = item.get("encrypted_content"), []
            if not isinstance(sealed, str):
                raise RequestError("A compaction item needs encrypted_content.", param="input")
        elif kind == "message":
            role = role_of(item, "input", has_tools=False)
            messages.append({"role": role, "content": text_of(item.get("content"), "input")})
        elif kind == "function_call":
            call = {name: text_of(item.get(name), "input") for name in ("name", "arguments")}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": text_of(item.get("output"), "input")})
        elif kind == "reasoning":
            thoughts = text_of(item.get("content") or [], "input")
            messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})
        else:
            raise RequestError(f"Items of type {str(kind)[:40]!r} are not supported.", param="input")
    return messages, sealed


def from_chat(given: Sequence[Message]) -> list[Message]:
    """Messages of a Chat Completions request."""
    messages = []
    for each in given:
        role, calls = role_of(each, "messages"), each.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RequestError("tool_calls is a list.", param="messages")
        content = each.get("content")
        message: Message = {"role": role, "content": "" if calls and content is None else text_of(content, "messages")}
        if calls:
            functions = [call.get("function") if isinstance(call, dict) else None for call in calls]
            if role != "assistant" or not all(isinstance(function, dict) for function in functions):
                raise RequestError("tool_calls are functions that an assistant called.", param="messages")
            message["tool_calls"] = [
                {name: text_of((function or {}).get(name), "messages") for name in ("name", "arguments")}
                for function in functions
            ]
        messages.append(message)
    return messages


def into_interactions(messages: Iterable[Message]) -> tuple[list[list[Message]], Message | None]:
    """
    Returns the finished interactions, and what is asked last and not answered yet. A system message is an
    interaction of its own; what one side says in several messages is joined.
    """
    finished: list[list[Message]] = []
    asked: Message | None = None
    for message in messages:
        role = message["role"]
        if role == "system":
            finished.append([message])
        elif role != "assistant":
            text = message["content"] if asked is None else f"{asked['content']}\n{message['content']}"
            asked = {"role": role, "content": text}
        elif asked is not None:
            finished.append([asked, message])
            asked = None
        elif finished and len(finished[-1]) == 2:
            finished[-1][1] = _joined(finished[-1][1], message)
        else:
            raise RequestError("A message of the assistant needs one of the user before it.")
    return finished, asked


def _joined(first: Message, second: Message) -> Message:
    joined = {**first, **second, "content": "\n".join(text for m in (first, second) if (text := m["content"]))}
    if calls := first.get("tool_calls", []) + second.get("tool_calls", []):
        joined["tool_calls"] = calls
    return joined


class Answer(NamedTuple):
    """What the tokens of an answer say."""

    text: str
    thoughts: str = ""
    # name and arguments of each, the latter JSON as the model wrote it
    calls: tuple[dict[str, str], ...] = ()
    reasoning_tokens: int = 0

    def as_message(self) -> Message:
        """As a client sends it back later."""
        return {
            "role": "assistant",
            "content": self.text,
            **({"tool_calls": list(self.calls)} if self.calls else {}),
        }


class Codec:
    """Token ids of interactions and prompts by the tokenizer's template, and answers from token ids."""

    def __init__(self, tokenizer: Any, max_tokens: int):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._room = min(MIN_ANSWER_TOKENS, max_tokens // 2)
        self._pieces = source_pieces(tokenizer)

    def _encode(self, messages: list[Message], room: int, **kwargs: Any) -> list[int]:
        for message in messages:
            if not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")):
                raise RequestError(f"The text of the {message['role']} is empty.")
        # without the template, which takes most of what a request costs, where it would be asked for the same
        if [message["role"] for message in messages] in _PLAIN and not kwargs.get("thinking"):
            ids = encode_prompt(self.tokenizer, messages)
        else:
            encoded = self.tokenizer.apply_chat_template(
                messages, return_dict=True, tokenizer_kwargs={"verbose": False}, **kwargs
            )
            ids = encoded["input_ids"]
        if len(ids) > self.max_tokens - room:
            raise RequestError(
                f"One interaction has at most {self.max_tokens - room} tokens here, this one {len(ids)}: earlier "
                "turns live in the memory, so send a long text in several turns.",
                code="context_length_exceeded",
            )
        return ids

    def interaction(self, messages: list[Message]) -> list[int]:
        """Encodes a finished interaction, to be written."""
        return self._encode(messages, 0)

    def prompt(self, asked: Message, instructions: str | None, thinks: bool) -> tuple[list[int], list[int]]:
        """Encodes the prompt, and what of it is written: without the instructions, which are of this turn."""
        kwargs = {"add_generation_prompt": True, "thinking": thinks}
        written = self._encode([asked], self._room, **kwargs)
        if instructions is None:
            return written, written
        return self._encode([{"role": "system", "content": instructions}, asked], self._room, **kwargs), written

    def answer(self, token_ids: Sequence[int], text: str, *, thinks: bool, has_tools: bool) -> Answer:
        """Tells thoughts, text and calls apart; `text` is that of all the tokens, cut before a stop string."""
        if not (thinks or has_tools):
            return Answer(text)
        ids, thoughts, cut = list(token_ids), "", 0
        if self._pieces is not None:
            return self._answer_in_text(ids, self._pieces, thinks, has_tools)
        if thinks:
            answer_id = self.tokenizer.answer_token_id
            cut = ids.index(answer_id) if answer_id in ids else len(ids)
            thoughts, ids = decode(self.tokenizer, ids[:cut]), ids[cut + 1 :]
        call_id = self.tokenizer.tool_call_token_id
        starts = [place for place, token_id in enumerate(ids) if token_id == call_id] if has_tools else []
        parts = [ids[start:end] for start, end in zip([0, *starts], [*starts, len(ids)], strict=True)]
        said, *spelled = [decode(self.tokenizer, part) for part in parts]
        calls = [_parse_call(call) for call in spelled]
        # what is no call is text, so that nothing that the model said is lost
        said += "".join(raw for raw, call in zip(spelled, calls, strict=True) if call is None)
        return Answer(said, thoughts, tuple(call for call in calls if call is not None), cut)

    def _answer_in_text(self, ids: list[int], pieces: dict[str, str], thinks: bool, has_tools: bool) -> Answer:
        """Does the same for a model whose thoughts and calls stand between words of its own template."""
        names = ("thinking_end", "tool_call", "tool_call_end")
        closed, opened, ended = (pieces[name].replace(CUT, "").strip() for name in names)
        said, thoughts, cut = decode(self.tokenizer, ids), "", 0
        if thinks:
            thoughts, _, said = (part.strip() for part in said.partition(closed))
            cut = bisect_left(range(len(ids)), True, key=lambda end: closed in decode(self.tokenizer, ids[:end]))
        said, *spelled = said.split(opened) if has_tools else [said]
        calls = []
        for raw in spelled:
            call, _, rest = raw.partition(ended)
            parsed = _parse_call(call)
            calls += [] if parsed is None else [parsed]
            said += opened + raw if parsed is None else rest
        return Answer(said.strip() if calls else said, thoughts, tuple(calls), cut)


def _parse_call(text: str) -> dict[str, str] | None:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    return {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}


__all__ = [
    "Answer",
    "Codec",
    "RequestError",
    "from_chat",
    "from_items",
    "into_interactions",
    "known_error",
    "not_found",
    "text_of",
]
