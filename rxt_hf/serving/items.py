# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The items of OpenAI's Responses and Conversations as JSON."""

from typing import Any

from .messages import Answer, not_found
from .state import new_id


def text_part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, **({"annotations": [], "logprobs": []} if kind == "output_text" else {})}


def message_item(text: str, key: str, status: str = "completed") -> dict[str, Any]:
    content = [text_part("output_text", text)]
    return {"id": key, "type": "message", "role": "assistant", "status": status, "content": content}


def output_items(answer: Answer, status: str, message_id: str) -> list[dict[str, Any]]:
    """Returns the items of a response; without calls there is a message, even an empty one."""
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
    """Returns the items of an input as they are listed: with ids, and their content in parts."""
    items = []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given or []:
        kind = item.get("type") or "message"
        if kind == "compaction":
            continue
        item = {**item, "type": kind, "id": new_id({"message": "msg", "function_call": "fc"}.get(kind, "item"))}
        if kind == "message" and isinstance(item["content"], str):
            part = "output_text" if item["role"] == "assistant" else "input_text"
            item["content"] = [text_part(part, item["content"])]
        items.append({"status": "completed", **item})
    return items


def compaction_item(sealed: str) -> dict[str, Any]:
    return {"id": new_id("cmp"), "type": "compaction", "encrypted_content": sealed}


def usage(read: int, said: int = 0, reasoning: int = 0) -> dict[str, Any]:
    """Returns the tokens that were read and said."""
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": read + said,
    }


def page_of(items: list[dict[str, Any]], after: str | None, limit: int, order: str) -> dict[str, Any]:
    """Returns a page of a list that is in the order of time."""
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise not_found(after)
        items = items[places[0] + 1 :]
    data = items[:limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(items) > limit}
