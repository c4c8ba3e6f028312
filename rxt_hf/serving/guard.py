# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Who may speak to the server, and how much: tokens, hosts, the size of a body, and the time that it takes."""

import contextlib
import hashlib
import hmac
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.files import read_text
from .state import to_json

try:
    import anyio
except ImportError as error:
    raise ImportError(f"The server needs {error.name}: pip install 'rxt-hf[serve]'.") from None

# shown to everybody: they say nothing of anybody
OPEN_PATHS = ("/", "/page.js", "/health", "/ready", "/openapi.json")
BODY_TIMEOUT_S = 30.0


def read_tokens(path: str | Path) -> dict[bytes, str]:
    """
    Hashes of tokens and whose they are, from lines of `TOKEN TENANT`; `#` starts a comment line.

    Raises: `ValueError` for a line that is anything else.
    """
    tokens = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[0]) < 16 or not (words[1].isascii() and words[1].replace("-", "").isalnum()):
            raise ValueError(
                f"{path} line {number}: expected a token of at least 16 characters and a tenant of letters, digits "
                "and -."
            )
        tokens[hashlib.sha256(words[0].encode()).digest()] = words[1]
    if not tokens:
        raise ValueError(f"{path} holds no token: write lines of TOKEN TENANT.")
    return tokens


def check_address(host: str, has_tokens: bool) -> None:
    """
    Refuses to open the server to everybody.

    Raises: `ValueError` for an address that others can reach, if there are no tokens.
    """
    if not (has_tokens or is_loopback(host)):
        raise ValueError(
            f"Without tokens everybody who reaches {host} could read every conversation: give --tokens FILE, or bind "
            "to 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None):
    """Returns an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """
    An ASGI application around another one. It reads the body whole, within its limits, before anything looks at it,
    and puts the tenant into the scope.

    Args:
        tokens (`dict[bytes, str]`, *optional*): of `read_tokens`; without, everybody is the tenant `local`, and only
            pages of this machine may ask.
        max_body (`Callable[[str], int]`): bytes that a path takes.
    """

    def __init__(self, app: Any, tokens: dict[bytes, str] | None, max_body: Callable[[str], int]):
        self.app, self.tokens, self.max_body = app, tokens, max_body

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.tokens is None and not _is_from_here(headers):
            await _refuse(send, 403, error_body("Without tokens the server answers this machine's own pages alone."))
            return
        tenant = "local" if self.tokens is None else self._tenant(headers)
        if tenant is None and scope["path"] not in OPEN_PATHS:
            body = error_body("The bearer token is missing or wrong.", "authentication_error", "invalid_api_key")
            await _refuse(send, 401, body)
            return
        scope["tenant"] = tenant
        limit = self.max_body(scope["path"])
        try:
            # asyncio's own would make a task for every request
            with anyio.fail_after(BODY_TIMEOUT_S):
                body = await _read(headers, receive, limit)
        except TimeoutError:
            await _refuse(send, 408, error_body(f"The body did not come within {BODY_TIMEOUT_S:g} s."))
            return
        if isinstance(body, int):
            await _refuse(send, 413, error_body(f"The body is longer than {limit} bytes.", code="body_too_large"))
        elif body is not None:
            await self.app(scope, _once(body, receive), send)

    def _tenant(self, headers: dict[bytes, bytes]) -> str | None:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        digest, found = hashlib.sha256(token.strip()).digest(), None
        # all of them are compared, each in constant time: how long it takes says nothing
        for known, tenant in (self.tokens or {}).items():
            if hmac.compare_digest(known, digest) and scheme.lower() == b"bearer":
                found = tenant
        return found


def _is_from_here(headers: dict[bytes, bytes]) -> bool:
    """Tells this machine's own pages from those of other sites, and from names that these let point here."""
    host = headers.get(b"host", b"localhost").decode("latin-1")
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
    origin = headers.get(b"origin")
    return is_loopback(name) and origin in (None, f"http://{host}".encode("latin-1", "replace"))


async def _read(headers: dict[bytes, bytes], receive: Any, limit: int) -> bytes | int | None:
    """Returns the body, or how much of it there was if it is too long, or `None` if the client has gone."""
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > limit:
        return int(announced)
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            return size
        if not message.get("more_body", False):
            return b"".join(chunks)


def _once(body: bytes, receive: Any) -> Any:
    """Gives the body, and from then on what the connection says."""
    is_given = False

    async def receive_once() -> dict[str, Any]:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_once


def impatient(protocol: Any, idle_s: float = 30.0) -> Any:
    """Returns a protocol class of uvicorn that closes connections which no request has come through for so long."""

    class ImpatientProtocol(protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle_cycle: Any = ()
            self._look_later()

        def _look_later(self) -> None:
            self._idle_timer = self.loop.call_later(idle_s, self._look)

        def _look(self) -> None:
            is_idle = self.cycle is None or self.cycle.response_complete
            if is_idle and self._idle_cycle is self.cycle:
                self.transport.close()
                return
            self._idle_cycle = self.cycle if is_idle else ()
            self._look_later()

        def connection_lost(self, exc: Exception | None) -> None:
            self._idle_timer.cancel()
            super().connection_lost(exc)

    return ImpatientProtocol


async def _refuse(send: Any, status: int, body: dict[str, Any]) -> None:
    content = to_json(body)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        # what is left of the body is not read
        (b"connection", b"close"),
        *([(b"www-authenticate", b"Bearer")] if status == 401 else []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


__all__ = ["Guard", "check_address", "error_body", "impatient", "read_tokens"]
