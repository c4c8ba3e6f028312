# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's Conversations: a head that moves, where a response is a place that stays."""

import json
import time
from typing import Annotated, Any, Literal

from .items import input_items, page_of
from .messages import RequestError, from_items, not_found
from .requests import JSON, ConversationRequest, ItemsRequest, MetadataRequest, refuse
from .service import Base, Service
from .state import new_id, to_json
from .store import Record

try:
    from fastapi import APIRouter, Query, Request, Response
except ImportError as error:
    raise ImportError(f"The server needs {error.name}: pip install 'rxt-hf[serve]'.") from None

PageSize = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


def conversation_records(
    service: Service, tenant: str, key: str, base: Base, memory: Any, items: list[dict[str, Any]]
) -> list[Record]:
    """Returns the head of a conversation after a turn, and the turn's items; written together or not at all."""
    about = dict(base.about)
    records = []
    if service.settings.keeps_text and items:
        about["parts"] = about.get("parts", 0) + 1
        records.append(Record(tenant, f"items_{key}_{about['parts']}", to_json(items)))
    return [service.record(tenant, key, about, memory, ttl=False), *records]


async def conversation_items(service: Service, tenant: str, key: str) -> list[dict[str, Any]]:
    """Returns all that was said in a conversation, in the order of time."""
    about, _ = await service.load_about(tenant, key, "conv_")
    items: list[dict[str, Any]] = []
    for part in range(1, about.get("parts", 0) + 1):
        found = await service.call(service.store.get, tenant, f"items_{key}_{part}")
        items += json.loads(found[0]) if found else []
    return items


async def keep_conversation(
    service: Service, tenant: str, key: str, base: Base, given: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Writes items into the memory and keeps the conversation; returns the items as they are listed."""
    messages, sealed = from_items(given)
    refuse(sealed is not None, "A conversation has its own memory: leave out the compaction item.", "items")
    if given:
        await service.write(base, messages)
    items = input_items(given)
    await service.keep(tenant, conversation_records(service, tenant, key, base, base.memory, items), key, base.version)
    return items


def conversation_json(key: str, about: dict[str, Any]) -> dict[str, Any]:
    """Returns what a client sees of a conversation."""
    head = {"id": key, "object": "conversation"}
    return {**head, "created_at": about["created_at"], "metadata": about["metadata"]}


def conversation_routes(service: Service) -> APIRouter:
    """Returns the endpoints below `/v1/conversations`."""
    router = APIRouter(prefix="/v1/conversations")

    @router.post("")
    async def create_conversation(request: Request, body: ConversationRequest | None = None) -> Response:
        tenant, key = request.scope["tenant"], new_id("conv")
        body = body or ConversationRequest()
        await service.check_room(tenant)
        base = await service.base(tenant)
        base.about, base.version = {"created_at": int(time.time()), "metadata": body.metadata or {}}, 0
        await keep_conversation(service, tenant, key, base, body.items or [])
        return JSON(conversation_json(key, base.about))

    @router.get("/{conversation_id}")
    async def get_conversation(conversation_id: str, request: Request) -> Response:
        about, _ = await service.load_about(request.scope["tenant"], conversation_id, "conv_")
        return JSON(conversation_json(conversation_id, about))

    @router.post("/{conversation_id}")
    async def update_conversation(conversation_id: str, body: MetadataRequest, request: Request) -> Response:
        tenant = request.scope["tenant"]
        async with service.lease(tenant, conversation_id):
            base = await service.base(tenant, conversation=conversation_id)
            base.about["metadata"] = body.metadata or {}
            await keep_conversation(service, tenant, conversation_id, base, [])
        return JSON(conversation_json(conversation_id, base.about))

    @router.delete("/{conversation_id}")
    async def delete_conversation(conversation_id: str, request: Request) -> Response:
        tenant = request.scope["tenant"]
        about, _ = await service.load_about(tenant, conversation_id, "conv_")
        parts = [f"items_{conversation_id}_{part}" for part in range(1, about.get("parts", 0) + 1)]
        await service.call(service.store.delete, tenant, [conversation_id, *parts])
        return JSON({"id": conversation_id, "object": "conversation.deleted", "deleted": True})

    @router.post("/{conversation_id}/items")
    async def create_items(conversation_id: str, body: ItemsRequest, request: Request) -> Response:
        tenant = request.scope["tenant"]
        async with service.lease(tenant, conversation_id):
            base = await service.base(tenant, conversation=conversation_id)
            items = await keep_conversation(service, tenant, conversation_id, base, body.items)
        return JSON(page_of(items, None, len(items), "asc"))

    @router.get("/{conversation_id}/items")
    async def list_items(
        conversation_id: str, request: Request, after: str | None = None, limit: PageSize = 20, order: Order = "desc"
    ) -> Response:
        items = await conversation_items(service, request.scope["tenant"], conversation_id)
        return JSON(page_of(items, after, limit, order))

    @router.get("/{conversation_id}/items/{item_id}")
    async def get_item(conversation_id: str, item_id: str, request: Request) -> Response:
        for item in await conversation_items(service, request.scope["tenant"], conversation_id):
            if item["id"] == item_id:
                return JSON(item)
        raise not_found(item_id)

    @router.delete("/{conversation_id}/items/{item_id}")
    async def delete_item(conversation_id: str, item_id: str, request: Request) -> Response:
        raise RequestError(
            "What has been written into a memory cannot be taken out alone: fork from a response before it, or delete "
            "the conversation."
        )

    return router


__all__ = ["Order", "PageSize", "conversation_records", "conversation_routes"]
