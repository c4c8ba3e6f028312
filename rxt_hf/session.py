# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""One conversation: a model, a tokenizer, a memory, and the log of what was written into it."""

import contextlib
import os
import threading
from array import array
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList

from .cache_rxt import PendingSTMCache, STMCache, as_stm_cache, check_fingerprint
from .chat_template import refuse_unguarded
from .generation_rxt import answer_mask
from .modeling_rxt import RxTForCausalLM, refuse_unknown_memory
from .session_log import Interaction, read_log, tokenizer_fingerprint, write_log
from .streaming import AnswerStream, Cancel, Pieces

MAX_ANSWER_TOKENS = 128
# A query that leaves less than this of the context could be read, but not be answered.
MIN_ANSWER_TOKENS = 16


class _State(NamedTuple):
    """Everything that a turn changes. It is replaced as a whole, so nobody sees half a turn."""

    base: STMCache
    memory: STMCache
    log: tuple[Interaction, ...] = ()
    previous: STMCache | None = None


class RxTSession:
    r"""
    One conversation with a Reactive Transformer. The model reads the query of this turn and the memory, never the
    history, which is kept for display and for `forget` only. Any number of sessions and threads may share one model.

    A call that fails or is cancelled leaves the session as it was before. Calls from several threads run one after the
    other.

    Args:
        model ([`RxTForCausalLM`]): the model; it is not changed.
        tokenizer (`PreTrainedTokenizerFast`): a tokenizer with the chat template of RxT.
        stm_cache ([`STMCache`] or `torch.Tensor` with one row, *optional*): the memory to start from, which is copied
            (default: the initial one).
        system (`str`, *optional*): a system prompt. It is written into the memory once, before the first turn.
        generate_defaults (*optional*): arguments of [`~RxTForCausalLM.generate`] for every turn.

    Raises: `ValueError` for an empty or too long `system` and for a memory of another shape, [`StateError`] for the
    memory of another model.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> import rxt_hf

    >>> model, tokenizer = (auto.from_pretrained(rxt_hf.DEMO) for auto in (AutoModelForCausalLM, AutoTokenizer))
    >>> session = rxt_hf.RxTSession(model, tokenizer)
    >>> session.send("My dog is called Rex.")
    "Okay, your dog's name is Rex."
    >>> other = session.fork()
    >>> other.send("My dog is called Mochi now.")
    "Thanks, now your dog's name is Mochi."
    >>> session.send("What is my dog called?")
    "Your dog's name is Rex."

    ```"""

    def __init__(
        self,
        model: RxTForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        *,
        stm_cache: STMCache | torch.Tensor | None = None,
        system: str | None = None,
        **generate_defaults: Any,
    ):
        # any class with this interface will do, also one that was loaded from the Hub with its own code
        self.model: Any = model
        self.tokenizer = tokenizer
        refuse_unguarded(tokenizer)
        self.generate_defaults = generate_defaults
        known = {"update_memory", *vars(model.generation_config)}
        refuse_unknown_memory("RxTSession", {name: generate_defaults[name] for name in {*generate_defaults} - known})
        self._lock = threading.Lock()
        # ids of the threads that have a turn here or wait for one
        self._threads: set[int] = set()
        memory = _own_memory(model, stm_cache)
        if system is not None:
            memory = self._write(memory, self._encode("system", system).tolist())
        self._state = _State(base=memory, memory=memory)

    @property
    def stm_cache(self) -> STMCache:
        """The memory after the last finished turn, a value with one row."""
        return self._state.memory

    @property
    def turns(self) -> int:
        """Interactions written into the memory, a system prompt and the turns before this session included."""
        return int(self._state.memory.turns[0])

    @property
    def history(self) -> list[dict[str, str]]:
        """Returns the logged turns as `{"query": ..., "answer": ...}`, in a new list."""
        return [{"query": turn.query, "answer": turn.answer} for turn in self._state.log]

    def send(self, text: str, **generate_kwargs: Any) -> str:
        r"""
        Plays one turn and returns the answer to `text`. With `update_memory=False` neither memory nor history keep it.

        Args:
            generate_kwargs (*optional*): arguments of [`~RxTForCausalLM.generate`]. `max_new_tokens` defaults to that
                of the generation config, or else to 128; it is cut to the room that the query leaves.

        Raises: `ValueError` for a text that is empty, is not valid Unicode, or leaves no room for an answer in
        `max_position_embeddings`.
        """
        prompt, kwargs = self._prepare(text, generate_kwargs)
        with self._one_turn():
            answer, self._state = self._generate(text, prompt, kwargs)
        return answer

    def stream(self, text: str, **generate_kwargs: Any) -> "AnswerStream":
        """
        Plays one turn like `send`, but returns an iterator over pieces of the answer, which a thread generates. `for`
        and `async for` take it; `async for` does not block its event loop. The turn counts once the iterator has
        ended. Closing the iterator earlier cancels the turn, and so does cancelling the task that waits for a piece.
        Errors are raised at the iterator.
        """
        prompt, kwargs = self._prepare(text, generate_kwargs)
        return AnswerStream(self._stream(text, prompt, kwargs))

    def fork(self) -> "RxTSession":
        """Returns an independent session that goes on from here, as `copy.deepcopy` does; the model is shared."""
        session = object.__new__(type(self))
        session.__setstate__({**self.__getstate__(), "generate_defaults": dict(self.generate_defaults)})
        return session

    def undo(self) -> None:
        """
        Takes the last turn back. The first call restores the memory of before bit by bit; further calls, and all calls
        after `load`, compute the memory again from the log.

        Raises: `ValueError` if there is no logged turn.
        """
        with self._one_turn():
            state = self._state
            if not state.log:
                raise ValueError("There is no turn to undo: the log of this session is empty.")
            if state.previous is None:
                self._state = self._replayed(state.log[:-1])
            else:
                self._state = _State(state.base, state.previous, state.log[:-1])

    def forget(self, turn: int) -> None:
        """
        Makes the memory what it would be if one turn had never been written. All other turns are written again, in
        order, from the logged token ids; nothing is generated. What later answers said about the turn stays.

        Args:
            turn (`int`): index into `history`; 0 is the first, -1 the last.

        Raises: `ValueError` if `history` has no such turn.
        """
        with self._one_turn():
            log = self._state.log
            if not -len(log) <= turn < len(log):
                raise ValueError(f"There is no turn {turn} to forget: the log of this session has {len(log)} turns.")
            turn %= len(log)
            self._state = self._replayed(log[:turn] + log[turn + 1 :])

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes the memory to `path`, an [`STMCache`] file that is complete by itself, and the log to `path` + ".json".
        After any interruption, each of the two is the complete old file or the complete new one. The log carries a
        checksum over itself and its memory, so a log is never used with another memory.

        Raises: [`StateError`] if the memory cannot be saved.
        """
        state = self._state
        state.memory.save(path)
        write_log(path, state.memory, state.base, state.log, self.tokenizer)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: RxTForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        *,
        allow_other_weights: bool = False,
        **generate_defaults: Any,
    ) -> "RxTSession":
        """
        Loads the conversation that `save` wrote, with a bit-identical memory. Without its log the conversation still
        goes on, but its history starts empty, and `undo` and `forget` do not reach back before the load.
        `allow_other_weights` takes a memory of other weights as one of `model`, as in [`STMCache.load`].

        Raises: [`StateError`] if the memory is damaged or another model's, or the log another tokenizer's;
        `FileNotFoundError` if there is no memory.
        """
        memory = STMCache.load(path, model, model.device, allow_other_weights=allow_other_weights)
        session = cls(model, tokenizer, stm_cache=memory, **generate_defaults)
        if (found := read_log(path, memory, model, tokenizer)) is not None:
            base, turns = found
            session._state = _State(base, session.stm_cache, turns)
        return session

    def __deepcopy__(self, memo: dict) -> "RxTSession":
        # a conversation is copied, as `fork` does it, and its model is not
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        """Returns everything, model and tokenizer included, except the lock and the threads that wait for it."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_threads")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), _threads=set())

    def _prepare(self, text: str, generate_kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        prompt = self._encode("user", text)
        kwargs = {**self.generate_defaults, **generate_kwargs}
        wanted = kwargs.get("max_new_tokens")
        if wanted is None:
            config = kwargs.get("generation_config") or self.model.generation_config
            wanted = config.max_new_tokens or MAX_ANSWER_TOKENS
        left = self.model.config.max_position_embeddings - prompt.shape[1]
        return prompt, {**kwargs, "max_new_tokens": min(wanted, left)}

    def _encode(self, role: str, text: str) -> torch.Tensor:
        """Returns the token ids of a prompt, or of a system prompt as a whole interaction, of shape (1, tokens)."""
        if not isinstance(text, str):
            raise TypeError(f"The text must be a str, got {type(text).__name__}.")
        if not text.strip():
            raise ValueError(f"The text of the {role} is empty: {text[:20]!r} has no character but white space.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"The text is no valid Unicode: {error.reason} at character {error.start}.") from None
        encoded: Any = self.tokenizer.apply_chat_template(
            [{"role": role, "content": text}],
            add_generation_prompt=role == "user",
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )
        tokens, limit = encoded["input_ids"].shape[1], self.model.config.max_position_embeddings
        room = min(MIN_ANSWER_TOKENS, limit // 2) if role == "user" else 0
        if tokens > limit - room:
            raise ValueError(
                f"The text has {tokens} tokens with its control tokens, at most {limit - room} fit into "
                f"max_position_embeddings={limit} with {room} for the answer: split it into several turns."
            )
        return encoded["input_ids"].to(self.model.device)

    @contextlib.contextmanager
    def _one_turn(self) -> Generator[None, None, None]:
        """Waits for other threads."""
        with self._only_turn_of_thread(), self._lock:
            yield

    @contextlib.contextmanager
    def _only_turn_of_thread(self) -> Generator[None, None, None]:
        """Raises an error in the thread that streams a turn, which would otherwise wait for itself."""
        thread = threading.get_ident()
        if thread in self._threads:
            raise RuntimeError("A turn of this session is being streamed: finish or close its iterator first.")
        self._threads.add(thread)
        try:
            yield
        finally:
            self._threads.discard(thread)

    def _settle(self) -> _State:
        """Waits for an asynchronous write. If it failed, the turn is rolled back and the error re-raised."""
        state = self._state
        try:
            state.memory.wait()
        except Exception:
            # the write itself failed, and the memory before it is good. An interrupt of this wait is no Exception: it
            # says nothing about the write, so the turn stays
            self._state = _State(state.base, state.previous or state.base, state.log[:-1])
            raise
        return state

    def _generate(self, text: str, prompt: torch.Tensor, kwargs: dict[str, Any]) -> tuple[str, _State]:
        state = self._settle()
        output = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), stm_cache=state.memory, **kwargs
        )
        if len(output.sequences) != 1:
            raise ValueError(f"A session takes one answer a turn, got num_return_sequences={len(output.sequences)}.")
        token_ids = output.sequences[0].tolist()
        answer = _decode(self.tokenizer, token_ids[prompt.shape[1] :])
        if output.stm_cache is state.memory:
            return answer, state
        return answer, _after_turn(state, output.stm_cache, Interaction(text, answer, array("i", token_ids)))

    def _stream(self, text: str, prompt: torch.Tensor, kwargs: dict[str, Any]) -> Generator[Future, None, None]:
        """Generates in a thread and yields what to wait for next, so that threads and event loops can wait alike."""
        pieces, cancel = Pieces(self.tokenizer), Cancel()
        criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), cancel])
        kwargs = {**kwargs, "streamer": pieces, "stopping_criteria": criteria}

        def turn() -> tuple[str, _State]:
            while not self._lock.acquire(timeout=0.05):
                cancel.check()
            release.callback(self._lock.release)
            return self._generate(text, prompt, kwargs)

        with (
            self._only_turn_of_thread(),
            contextlib.ExitStack() as release,
            ThreadPoolExecutor(max_workers=1) as executor,
        ):
            future = executor.submit(turn)
            future.add_done_callback(lambda _: pieces.append(None))
            try:
                yield from pieces.arriving()
                self._state = future.result()[1]
            finally:
                cancel.requested.set()

    def _write(self, memory: STMCache, interactions: Iterable[Iterable[int]]) -> STMCache:
        with torch.no_grad():
            for token_ids in interactions:
                input_ids = torch.tensor([list(token_ids)], device=self.model.device)
                memory = self.model.update_memory(memory, input_ids, torch.ones_like(input_ids))
        return memory

    def _replayed(self, log: tuple[Interaction, ...]) -> _State:
        base = self._state.base
        return _State(base, self._write(base, (turn.token_ids for turn in log)), log)


def send_batch(sessions: Sequence[RxTSession], texts: Sequence[str], **generate_kwargs: Any) -> list[str]:
    r"""
    Plays one turn of each of many sessions in one `generate`. Greedy answers equal those of separate `send`s, and so
    do the memories up to rounding. Each row keeps the `max_new_tokens` that it would have alone. All sessions take
    their turn, or none does.

    Args:
        sessions (`Sequence[RxTSession]`): different sessions with one model object and equal tokenizers.
        texts (`Sequence[str]`): one text for each session.
        generate_kwargs (*optional*): as in [`RxTSession.send`]. The sessions' own defaults must agree, except for
            `max_new_tokens`.

    Returns: the answers, in the order of `sessions`.

    Raises: the errors of [`RxTSession.send`], and `ValueError` for sessions that cannot be a batch.
    """
    sessions, texts = list(sessions), list(texts)
    _check_batch(sessions, texts)
    prompts, kwargs = [], []
    for session, text in zip(sessions, texts, strict=True):
        prompt, row_kwargs = session._prepare(text, generate_kwargs)
        prompts.append(prompt[0])
        kwargs.append(row_kwargs)
    limits = [row_kwargs.pop("max_new_tokens") for row_kwargs in kwargs]
    for row_kwargs in kwargs[1:]:
        if row_kwargs != kwargs[0]:
            raise ValueError(f"send_batch needs equal defaults for generate, got {kwargs[0]} and {row_kwargs}.")
    with contextlib.ExitStack() as turns:
        # in one order for all callers, so that two of them never wait for each other
        for session in sorted(sessions, key=id):
            turns.enter_context(session._one_turn())
        states = [session._settle() for session in sessions]
        memory = STMCache.cat([state.memory for state in states])
        model, (ids, mask) = sessions[0].model, _left_padded(prompts, sessions[0].tokenizer.pad_token_id or 0)
        output = model.generate(
            input_ids=ids, attention_mask=mask, stm_cache=memory, max_new_tokens=max(limits), **kwargs[0]
        )
        if len(output.sequences) != len(sessions):
            raise ValueError(f"send_batch takes one answer a session, got {len(output.sequences)} sequences.")
        config, _ = model._prepare_generation_config(**{"generation_config": None, **kwargs[0]})
        spoken = answer_mask(output.sequences[:, mask.shape[1] :], config, kwargs[0].get("stopping_criteria"))
        written = torch.cat([mask, spoken], dim=1).bool()
        answers, after = [], []
        for row, (session, state) in enumerate(zip(sessions, states, strict=True)):
            token_ids = output.sequences[row][written[row]].tolist()
            length, start = len(token_ids), len(prompts[row])
            del token_ids[start + limits[row] :]
            answers.append(_decode(session.tokenizer, token_ids[start:]))
            if output.stm_cache is not memory:
                # a row that went past its own limit, because others still spoke, is written again without the excess
                is_cut = len(token_ids) < length
                new = session._write(state.memory, [token_ids]) if is_cut else _row_of(output.stm_cache, row)
                state = _after_turn(state, new, Interaction(texts[row], answers[row], array("i", token_ids)))
            after.append(state)
        for session, state in zip(sessions, after, strict=True):
            session._state = state
    return answers


def _check_batch(sessions: list[RxTSession], texts: list[str]) -> None:
    if not sessions or len(sessions) != len(texts):
        raise ValueError(
            f"send_batch needs a text for each session, got {len(sessions)} sessions, {len(texts)} texts."
        )
    if len({id(session) for session in sessions}) < len(sessions):
        raise ValueError("send_batch got a session twice: one session takes one turn after the other.")
    if any(session.model is not sessions[0].model for session in sessions):
        raise ValueError("send_batch needs sessions on one model object.")
    tokenizers = {id(session.tokenizer): session.tokenizer for session in sessions}
    if len(tokenizers) > 1 and len({tokenizer_fingerprint(each) for each in tokenizers.values()}) > 1:
        raise ValueError("send_batch needs equal tokenizers, got some with different fingerprints.")


def _left_padded(rows: list[torch.Tensor], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask of shape (rows, longest row)."""
    mask = [torch.ones_like(row) for row in rows]
    return (
        pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side="left"),
        pad_sequence(mask, batch_first=True, padding_side="left"),
    )


def _row_of(batch: STMCache, row: int) -> STMCache:
    return _PendingRow(batch, row) if isinstance(batch, PendingSTMCache) else batch.select(row)


class _PendingRow(PendingSTMCache):
    """One row of a batch that is still being written, cut out at its first use: then it no longer keeps the others."""

    def __init__(self, batch: PendingSTMCache, row: int):
        self._row = row
        # one of the two is set
        self._batch: Any = batch
        self._written: Any = None

    def wait(self, timeout_s: float | None = None) -> STMCache:
        # read the batch first: a thread that finds it gone finds the row written
        batch = self._batch
        if self._written is None:
            self._written = batch.wait(timeout_s).select(self._row)
        self._batch = None
        return self._written

    @property
    def is_pending(self) -> bool:
        batch = self._batch
        return batch is not None and batch.is_pending


def _after_turn(state: _State, memory: STMCache, interaction: Interaction) -> _State:
    return _State(state.base, memory, (*state.log, interaction), previous=state.memory)


def _decode(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _own_memory(model: RxTForCausalLM, stm_cache: STMCache | torch.Tensor | None) -> STMCache:
    with torch.no_grad():
        if stm_cache is None:
            return model.init_stm(1)
        cache = as_stm_cache(stm_cache, batch_size=1, config=model.config).detach()
        expected = model.memory_fingerprint()
        if cache.fingerprint is not None:
            check_fingerprint("The memory", cache.fingerprint, expected)
        return STMCache(cache.states, cache.turns, expected).to(model.device).fork()


__all__ = ["AnswerStream", "RxTSession", "send_batch", "tokenizer_fingerprint"]
