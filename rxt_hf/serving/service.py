# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What the server does, without HTTP: finds the memory of a turn, lets the engine answer, keeps what came of it."""

import asyncio
import copy
import functools
import hashlib
import json
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache_rxt import StateError, STMCache
from .engine import Engine, QueueFullError, Turn
from .messages import Answer, Codec, Message, RequestError, into_interactions, not_found
from .state import OtherWeightsError, Seal, pack, prefix_keys, unpack, unpack_about
from .store import Record, StateStore

DAY_S = 24 * 3600.0


@dataclass
class Settings:
    """
    Args:
        name (`str`): of the model, as clients know it.
        tokens (`dict[bytes, str]`, *optional*): of `read_tokens`.
        keeps_text (`bool`): whether stored responses and conversations hold what was said; a memory needs no text.
        max_rows, max_waiting, compiles: of the engine.
        max_bytes (`int`, *optional*): size of the store; the least recently used goes first.
        max_new_tokens (`int`): longest answer that a client may ask for.
        max_records_per_tenant (`int`): states that a tenant may keep.
        max_turns_per_tenant (`int`, *optional*): turns of a tenant that run or wait at once; by default all rows.
        timeout_s (`float`): longest time of a request.
        ttl_s (`float`): how long responses and the memories of Chat Completions are kept; conversations stay.
        sweep_s (`float`): seconds between two sweeps of the store.
        lease_s (`float`): how long a conversation stays locked after its server was killed within a turn.
    """

    name: str = "rxt"
    tokens: dict[bytes, str] | None = None
    keeps_text: bool = False
    max_rows: int | None = None
    max_waiting: int | None = None
    compiles: bool = False
    max_bytes: int | None = None
    max_new_tokens: int = 4096
    max_records_per_tenant: int = 1_000_000
    max_turns_per_tenant: int | None = None
    timeout_s: float = 600.0
    ttl_s: float = 30 * DAY_S
    sweep_s: float = 60.0
    lease_s: float = 15.0


@dataclass
class Base:
    """The memory that a turn starts from, and what is known of it."""

    about: dict[str, Any]
    memory: STMCache
    # of a conversation
    version: int | None = None


@dataclass
class Job:
    """One turn on its way, with what the event loop waits on."""

    turn: Turn
    thinks: bool
    has_tools: bool
    input_tokens: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    # the response as JSON in a given status
    describe: Callable[[str], dict[str, Any]] | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """Yields the text as it comes; ends with the turn, its memory written."""
        while True:
            self.changed.clear()
            is_done = self.turn.is_done
            if self.turn.streams and (piece := self.turn.take()):
                yield piece
            if is_done:
                return
            await self.changed.wait()

    async def finish(self) -> Turn:
        """Returns the turn, once it has ended."""
        while not self.turn.is_done:
            self.changed.clear()
            if not self.turn.is_done:
                await self.changed.wait()
        return self.turn

    def cancel(self) -> None:
        self.turn.cancel()


class Changes:
    """
    Tells the event loop which jobs have news. The engine changes many in one step: the loop is woken once for all that
    it has not looked at yet.
    """

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._is_told = False

    def add(self, loop: asyncio.AbstractEventLoop, job: Job) -> None:
        """Takes a job from any thread."""
        self._jobs.append(job)
        if not self._is_told:
            self._is_told = True
            loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        # first, so that what is added from here on has a wake-up of its own
        self._is_told = False
        while self._jobs:
            self._jobs.popleft().changed.set()


class Service:
    """
    The server's state and its rules; one for each process.

    Raises: `ValueError` if the tokenizer lacks a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, store: StateStore, settings: Settings):
        if not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template: use rxt_hf.chat_template.add_control_tokens.")
        self.model, self.tokenizer, self.store, self.settings = model, tokenizer, store, settings
        self.engine = Engine(
            model,
            tokenizer,
            max_rows=settings.max_rows,
            max_waiting=settings.max_waiting,
            compiles=settings.compiles,
        )
        self.fingerprint = self.engine.fingerprint
        self.codec = Codec(tokenizer, model.config.max_position_embeddings)
        self.seal = Seal(self._seal_keys())
        self.created_at = int(time.time())
        # turns by tenant, and those that `cancel` finds, by tenant and id
        self.load: Counter[str] = Counter()
        self.jobs: dict[tuple[str, str], Job] = {}
        self._writes, self._changes = asyncio.Semaphore(1), Changes()
        self.max_turns = settings.max_turns_per_tenant or self.engine.max_rows + self.engine.max_waiting
        config = model.config
        self.memory_bytes = self._initial().nbytes
        self.bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.bytes_per_token *= model.dtype.itemsize

    def _seal_keys(self) -> list[bytes]:
        """Returns the keys of all servers on this store; the first of them makes one."""
        self.store.put([Record("", "seal", os.urandom(32))], ("", "seal", 0))
        found = self.store.get("", "seal")
        if found is None:
            raise RuntimeError("The store does not keep what it is given.")
        return [found[0]]

    async def call(self, method: Any, *args: Any) -> Any:
        """Calls the store, in a thread if it may wait for a network."""
        return await asyncio.to_thread(method, *args) if self.store.is_remote else method(*args)

    def _initial(self) -> STMCache:
        with torch.no_grad():
            return STMCache(self.model.model.initial_states(1).detach().clone(), 0, self.fingerprint)

    def _unpack(self, value: bytes) -> tuple[dict[str, Any], STMCache]:
        try:
            return unpack(value, self.model, self.fingerprint)
        except OtherWeightsError as error:
            raise RequestError(str(error), status=409, code="weights_changed") from None

    async def base(
        self, tenant: str, *, previous: str | None = None, conversation: str | None = None, sealed: str | None = None
    ) -> Base:
        """
        Finds the memory that a turn starts from: that of one of these, else the initial one.

        Raises: [`RequestError`] if there is none (404), other weights wrote it (409), or two are given.
        """
        if sum(given is not None for given in (previous, conversation, sealed)) > 1:
            raise RequestError("A turn goes on from one of previous_response_id, conversation, or a compaction item.")
        if sealed is not None:
            try:
                about, memory = self._unpack(self.seal.unseal(sealed, tenant, self.fingerprint))
            except StateError as error:
                raise RequestError(str(error), param="input", code="invalid_compaction_item") from None
            return Base(about, memory)
        key = conversation if previous is None else previous
        if key is None:
            return Base({}, self._initial())
        kinds = ("conv_",) if previous is None else ("resp_", "mem_")
        about, memory, version = await self.load_state(tenant, key, kinds)
        return Base(about, memory, version if previous is None else None)

    async def load_state(self, tenant: str, key: str, kinds: Sequence[str]) -> tuple[dict[str, Any], STMCache, int]:
        """Loads what is kept under an id of one of these kinds."""
        found = await self.call(self.store.get, tenant, key) if is_id(key, kinds) else None
        if found is None:
            raise not_found(key)
        about, memory = self._unpack(found[0])
        return about, memory, found[1]

    async def load_about(self, tenant: str, key: str, kind: str) -> tuple[dict[str, Any], int]:
        """Loads the same without the memory, whatever weights wrote it."""
        found = await self.call(self.store.get, tenant, key) if is_id(key, (kind,)) else None
        if found is None:
            raise not_found(key)
        return unpack_about(found[0]), found[1]

    async def delete(self, tenant: str, key: str, kind: str) -> None:
        """Removes one state. Raises: [`RequestError`] if there is none."""
        if not (is_id(key, (kind,)) and await self.call(self.store.delete, tenant, [key])):
            raise not_found(key)

    def interactions(self, about: dict[str, Any], messages: Sequence[Message], tools: Any) -> tuple[list, Any]:
        """
        Returns what is to be written before the turn, and what is asked, if anything is. Tools that the memory has
        not heard of are written as an instruction of their own. `about`, which goes with the memory, is changed.
        """
        told = []
        if tools:
            text = json.dumps(tools, sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if about.get("tools") != digest:
                told, about["tools"] = [[{"role": "system", "content": f"Tools: {text}"}]], digest
        finished, asked = into_interactions([*about.get("pending", ()), *messages])
        about["pending"] = []
        return told + finished, asked

    async def write(self, base: Base, messages: Sequence[Message]) -> int:
        """
        Writes finished interactions into a memory, outside any turn. What is not answered yet goes along with it, and
        waits for the next turn. Returns the number of tokens that were written.
        """
        finished, asked = self.interactions(base.about, messages, None)
        base.about["pending"] = [] if asked is None else [asked]
        ids = [self.codec.interaction(each) for each in finished]
        if ids:
            async with self._writes:
                written = await asyncio.to_thread(self.model.replay, base.memory.to(self.model.device), ids)
            base.memory = STMCache(written.states, written.turns, self.fingerprint)
        return sum(map(len, ids))

    def start(
        self,
        tenant: str,
        base: Base,
        finished: Sequence[list[Message]],
        asked: Message | None,
        *,
        instructions: str | None = None,
        thinks: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        streams: bool = False,
    ) -> Job:
        """Hands one turn to the engine."""
        if asked is None:
            raise RequestError("The last message must be one of the user, or the output of a function.")
        if self.load[tenant] >= self.max_turns:
            raise busy(f"{self.load[tenant]} turns of this token run already.", QueueFullError.retry_after_s)
        prompt, written = self.codec.prompt(asked, instructions, thinks)
        defaults = self.model.generation_config
        limit = max_tokens or defaults.max_new_tokens or 128
        has_tools = "tools" in base.about
        turn = Turn(
            prompt,
            base.memory,
            min(limit, self.settings.max_new_tokens),
            written_prompt=written,
            replay=[self.codec.interaction(each) for each in finished],
            temperature=self.temperature(temperature),
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
            stop=stop,
            # thoughts and calls are told from text at the end
            streams=streams and not (thinks or has_tools),
            timeout_s=self.settings.timeout_s,
        )
        job = Job(turn, thinks, has_tools, len(prompt) + sum(map(len, turn.replay)))
        turn.on_change = functools.partial(self._changes.add, asyncio.get_running_loop(), job)
        try:
            self.engine.submit(turn)
        except QueueFullError as error:
            raise busy(str(error), error.retry_after_s) from None
        return job

    def temperature(self, given: float | None) -> float:
        """Returns what is given, or the model's own."""
        if given is not None:
            return given
        config = self.model.generation_config
        return float(config.temperature or 1.0) if config.do_sample else 0.0

    @asynccontextmanager
    async def running(self, tenant: str, key: str, job: Job) -> AsyncGenerator[Job]:
        """Counts the turn and lets `cancel` find it; whoever leaves early cancels it."""
        self.load[tenant] += 1
        self.jobs[tenant, key] = job
        try:
            yield job
        finally:
            job.cancel()
            del self.jobs[tenant, key]
            self.load[tenant] -= 1
            if not self.load[tenant]:
                del self.load[tenant]

    def answer(self, job: Job) -> Answer:
        """
        Reads what a finished turn says.

        Raises: [`RequestError`] for one that failed.
        """
        error = job.turn.error
        if isinstance(error, TimeoutError):
            raise RequestError(str(error), status=408, code="timeout", headers={"x-should-retry": "false"})
        if isinstance(error, StateError):
            raise RequestError(str(error), code="memory_not_finite")
        if error is not None:
            raise RequestError("The turn failed; its memory is as before.", status=500, code="server_error")
        turn = job.turn
        return self.codec.answer(turn.token_ids, turn.text, thinks=job.thinks, has_tools=job.has_tools)

    @asynccontextmanager
    async def lease(self, tenant: str, conversation: str | None) -> AsyncGenerator[None]:
        """
        Keeps others from generating what compare-and-set would refuse at the end.

        Raises: [`RequestError`] (409) if the conversation has a turn already.
        """
        if conversation is None:
            yield
            return
        owner, seconds = secrets.token_hex(8), self.settings.lease_s
        if not await self.call(self.store.lease, tenant, conversation, owner, seconds):
            raise locked(conversation)

        async def renew() -> None:
            while True:
                await asyncio.sleep(seconds / 3)
                await self.call(self.store.lease, tenant, conversation, owner, seconds)

        renewal = asyncio.ensure_future(renew())
        try:
            yield
        finally:
            renewal.cancel()
            await self.call(self.store.release, tenant, conversation, owner)

    async def check_room(self, tenant: str) -> None:
        """Refuses (429) a tenant that keeps too much already."""
        usage = await self.call(self.store.usage, tenant)
        if usage.records >= self.settings.max_records_per_tenant:
            raise RequestError(
                f"This token keeps {usage.records} states already: delete some.", status=429, code="state_limit"
            )

    async def keep(
        self, tenant: str, records: Sequence[Record], conversation: str | None = None, version: int | None = None
    ) -> None:
        """
        Writes what a turn leaves, all or nothing.

        Raises: [`RequestError`] (409) if the conversation has gone on meanwhile.
        """
        expect = None if conversation is None or version is None else (tenant, conversation, version)
        if records and not await self.call(self.store.put, records, expect):
            raise locked(conversation)

    def record(self, tenant: str, key: str, about: dict[str, Any], memory: STMCache | None, ttl: bool = True):
        """Packs the record of a state; `about` is told apart from what belongs to one response."""
        return Record(tenant, key, pack(about, memory), self.settings.ttl_s if ttl else None)

    def sealed(self, tenant: str, about: dict[str, Any], memory: STMCache) -> str:
        """Seals a memory as a client keeps it."""
        return self.seal.seal(pack(about, memory), tenant, self.fingerprint)

    def chat_keys(self, interactions: Sequence[list[Message]]) -> list[str]:
        """Returns the keys of the memories after each of them."""
        return [f"chat_{key}" for key in prefix_keys(self.fingerprint, interactions)]

    async def known_prefix(self, tenant: str, finished: Sequence[list[Message]]) -> Base:
        """
        Returns the memory after the longest known beginning of a history, with the number of its interactions as
        `about["known"]`.
        """
        keys = self.chat_keys(finished)
        versions = await self.call(self.store.head, tenant, keys) if keys else []
        for index in reversed(range(len(keys))):
            if versions[index]:
                # it may have gone since
                found = await self.call(self.store.get, tenant, keys[index])
                if found is not None:
                    return Base({"known": index + 1}, self._unpack(found[0])[1])
        return Base({"known": 0}, self._initial())

    @functools.cached_property
    def _observer(self) -> Any:
        """Builds a model of the same parameters whose attention gives its weights, which the engine's does not."""
        twin = copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})
        twin.set_attn_implementation("eager")
        return twin

    def reads(self, turn: Turn) -> list[list[float]] | None:
        """
        Computes how much of its attention to the memory the answer gave each slot of each layer, the mean over its
        tokens and heads; `None` if the model's attention does not tell memory from tokens.
        """
        ids = torch.tensor([turn.prompt + turn.token_ids], device=self.model.device)
        with torch.no_grad():
            output = self._observer.model(input_ids=ids, stm_cache=turn.memory, output_attentions=True)
        if not output.cross_attentions:
            return None
        # the token at a place is chosen by what is read at the place before it
        said = slice(len(turn.prompt) - 1, -1)
        return [weights[0, :, said].float().mean((0, 1)).tolist() for weights in output.cross_attentions]

    def shared(self, about: dict[str, Any]) -> dict[str, Any]:
        """Returns what a memory takes along into its next turn."""
        return {name: about[name] for name in ("tools", "pending") if about.get(name)}

    async def sweep(self) -> None:
        """Keeps the store within its bounds, forever."""
        while True:
            await asyncio.sleep(self.settings.sweep_s)
            await asyncio.to_thread(self.store.sweep, self.settings.max_bytes)


def is_id(key: str, kinds: Sequence[str]) -> bool:
    """Says whether a client's text is an id of one of these kinds, and nothing else."""
    rest = next((key[len(kind) :] for kind in kinds if key.startswith(kind)), "")
    return 0 < len(rest) <= 64 and rest.isascii() and rest.replace("-", "").isalnum()


def busy(message: str, seconds: int) -> RequestError:
    return RequestError(message, status=429, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})


def locked(conversation: str | None) -> RequestError:
    # a client that simply asked again would speak into a conversation that has gone on without it
    return RequestError(
        f"The conversation {conversation} has another turn: read it, then ask again.",
        status=409,
        code="conversation_locked",
        headers={"x-should-retry": "false"},
    )


__all__ = ["Base", "Job", "Service", "Settings", "is_id"]
