# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Continuous batching of turns, each with its own memory, limit, sampling and end."""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch.nn.utils.rnn import pad_sequence
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.utils import logging

from ..cache_rxt import StateError, STMCache, as_stm_cache, check_fingerprint

logger = logging.get_logger(__name__)


class QueueFullError(RuntimeError):
    """No more turns can wait; `retry_after_s` says when to ask again."""

    retry_after_s = 1


class Turn:
    r"""
    One turn of one conversation: what is asked, and what came of it so far. The engine's thread fills it.

    Args:
        prompt (`list[int]`): token ids up to where the answer starts.
        memory ([`STMCache`] with one row): what is read; not changed.
        max_new_tokens (`int`): longest answer.
        written_prompt (`list[int]`, *optional*, defaults to `prompt`): what is written in place of the prompt, for an
            instruction that is of this turn alone.
        replay (`Sequence[list[int]]`): finished interactions that are written into the memory before the turn.
        temperature (`float`, defaults to 0): 0 takes the likeliest token.
        top_p (`float`, defaults to 1): samples from the likeliest share.
        seed (`int`, *optional*): makes sampling repeatable, whatever else is in the batch.
        stop (`Sequence[str]`): the answer ends before the first of these.
        streams (`bool`): whether `take` gives pieces before the end.
        updates_memory (`bool`): whether the turn is written; if not, `memory_after` is `memory`.
        timeout_s (`float`, *optional*): ends the turn with a `TimeoutError`.
        on_change (`Callable[[], None]`, *optional*): is called from the engine's thread when there is something new.

    Attributes:
        token_ids (`list[int]`): the answer.
        finish_reason (`str`): "stop", "length", "cancelled" or "error"; `None` while it is generated.
        memory_after ([`STMCache`]): set before `is_done`.
        error (`Exception`): why the turn failed.
    """

    def __init__(
        self,
        prompt: list[int],
        memory: STMCache,
        max_new_tokens: int,
        *,
        written_prompt: list[int] | None = None,
        replay: Sequence[list[int]] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        streams: bool = False,
        updates_memory: bool = True,
        timeout_s: float | None = None,
        on_change: Callable[[], None] | None = None,
    ):
        self.prompt, self.memory, self.max_new_tokens = prompt, memory, max_new_tokens
        self.written_prompt = prompt if written_prompt is None else written_prompt
        self.replay, self.stop, self.streams, self.updates_memory = replay, tuple(stop), streams, updates_memory
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.on_change = on_change
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None
        self.memory_after: STMCache | None = None
        self.error: Exception | None = None
        self.started_at = time.monotonic()
        self.first_token_at: float | None = None
        self.text = ""
        self._taken = 0
        self._may_take = 0
        # of a model that writes in passing: what its memory layers read, (memory layers, tokens, hidden_size)
        self._layer_inputs: torch.Tensor | None = None
        self._done = threading.Event()
        self._is_cancelled = False

    @property
    def is_done(self) -> bool:
        """Says whether the answer is complete and the memory written, or the turn failed."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Lets the engine drop the turn before its next step; nothing is written."""
        self._is_cancelled = True

    def take(self) -> str:
        """Returns the text since the last call; what could become a stop string is held back."""
        end = self._may_take
        piece, self._taken = self.text[self._taken : end], end
        return piece

    def result(self, timeout_s: float | None = None) -> "Turn":
        """
        Waits for the end of the turn.

        Raises: the error of the turn, and `TimeoutError` after `timeout_s`.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"The turn has not ended within {timeout_s} s.")
        if self.error is not None:
            raise self.error
        return self


class _Text:
    """The growing text of one answer: whole characters only, cut before a stop string."""

    def __init__(self, turn: Turn, tokenizer: Any):
        self.turn, self.tokenizer = turn, tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.is_incremental = turn.streams or bool(turn.stop)

    def add(self, token_id: int) -> bool:
        """Takes one token; whether a stop string is complete."""
        if not self.is_incremental:
            return False
        piece = self.stream.step(self.tokenizer.backend_tokenizer, token_id)
        return bool(piece) and self._append(piece)

    def end(self) -> None:
        """Adds what the last token left open, such as half a character."""
        whole = decode(self.tokenizer, self.turn.token_ids)
        self.turn.text = whole[: min(self._ends(whole, 0), default=len(whole))]
        self.turn._may_take = len(self.turn.text)

    def _append(self, piece: str) -> bool:
        turn, stops = self.turn, self.turn.stop
        start = max(0, len(turn.text) - max(map(len, stops), default=0))
        turn.text += piece
        if ends := self._ends(turn.text, start):
            turn.text = turn.text[: min(ends)]
            return True
        # the end of the text may be the start of a stop string
        held = [n for stop in stops for n in range(1, len(stop)) if turn.text.endswith(stop[:n])]
        turn._may_take = len(turn.text) - max(held, default=0)
        return False

    def _ends(self, text: str, start: int) -> list[int]:
        return [place for stop in self.turn.stop if (place := text.find(stop, start)) >= 0]


class _Tables(Cache):
    """
    Keys and values of all rows within their turns, (layers, rows, heads, max_position_embeddings, head_dim), made
    once. Before a forward `place` says which rows and positions its tokens have.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[])
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.first, self.positions, self.longest = 0, None, 0

    def place(self, first: int, positions: torch.Tensor | None, longest: int) -> None:
        self.first, self.positions, self.longest = first, positions, longest

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        end = self.first + len(key_states)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.positions is None:
            # a prefill attends to itself alone
            keys[self.first : end, :, : key_states.shape[2]] = key_states
            values[self.first : end, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        rows = torch.arange(self.first, end, device=keys.device)
        keys[rows, :, self.positions] = key_states[:, :, 0]
        values[rows, :, self.positions] = value_states[:, :, 0]
        return keys[self.first : end, :, : self.longest], values[self.first : end, :, : self.longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def move(self, source: int, target: int, length: int) -> None:
        for table in (self.keys, self.values):
            table[:, target, :, :length] = table[:, source, :, :length]


class _Row:
    """What the engine keeps of a turn while it is generated."""

    def __init__(self, turn: Turn, text: _Text, generator: torch.Generator | None):
        self.turn, self.text, self.generator = turn, text, generator
        self.length = len(turn.prompt)


class Engine:
    r"""
    Generates many turns at once, in a thread of its own. Rows are compact: row `i` of every table belongs to the
    `i`-th active turn. A step is one forward of one token of every active row; turns that wait join by one
    right-padded prefill; a finished turn leaves at once, the last row takes its place, and its memory is written in
    one batch with those that end beside it. Tokens are those of `generate`, row by row. With
    `memory_encoding="decoder_in_passing"` the states that the steps computed are kept and written, as by `generate`.

    It stands on the model's `memory_keys_values`, `decode`, `update_memory` and `replay`, and knows nothing else of
    its layers.

    Args:
        model ([`RxTForCausalLM`]): with eager or sdpa attention; is not changed.
        tokenizer (`PreTrainedTokenizerFast`): for the text of the answers.
        max_rows (`int`, *optional*): turns that are generated at once; by default what half of the free memory holds,
            at most 256. All of it is allocated here, so that no turn that is admitted can lack memory.
        max_waiting (`int`, *optional*, defaults to four times `max_rows`, at least 64): turns that may wait.
        compiles (`bool`): whether the step is compiled by `torch.compile`, for powers of two of rows.

    Raises: `ValueError` for an attention implementation without a mask of its own choice.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_rows: int | None = None,
        max_waiting: int | None = None,
        compiles: bool = False,
    ):
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(f"The engine needs attention by sdpa or eager, got {implementation!r}.")
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.compiles = compiles
        layers = range(self.config.num_hidden_layers)
        self._memory_layers = layers if self.config.memory_layers is None else self.config.memory_layers
        self._writes_in_passing = self.config.memory_encoding == "decoder_in_passing"
        self._step_of_model = torch.compile(self._decode) if compiles else self._decode
        self._end_ids = end_token_ids(model)
        self.fingerprint = model.memory_fingerprint()
        with torch.no_grad():
            states = model.model.initial_states(1)
            example = model.model.memory_keys_values(states)
        self._dtype = states.dtype
        self.max_rows = max_rows or min(256, max(1, free_bytes(model.device) // 2 // bytes_of_row(model, example)))
        self.max_waiting = max(64, 4 * self.max_rows) if max_waiting is None else max_waiting
        config, dtype, device = self.config, example[0][0].dtype, example[0][0].device
        shape = (config.num_key_value_heads, config.max_position_embeddings, config.head_dim)
        self._within = _Tables((config.num_hidden_layers, self.max_rows, *shape), dtype, device)
        self._across = [tuple(part.new_zeros(self.max_rows, *part.shape[1:]) for part in pair) for pair in example]
        kept = self._writes_in_passing * len(self._memory_layers)
        kept = (kept, self.max_rows, config.max_position_embeddings, config.hidden_size)
        self._layer_inputs = torch.zeros(kept, dtype=dtype, device=device)
        self._rows: list[_Row] = []
        self._waiting: deque[Turn] = deque()
        self._joining: list[Turn] = []
        self._holds = False
        # turns whose answer is complete and whose memory is not written yet
        self._finished: list[Turn] = []
        self._wake = threading.Condition()
        self._is_closing = False
        self.steps = self.tokens = self.turns = self.prefills = self.writes = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._writer = None if self._stream is None else ThreadPoolExecutor(1, thread_name_prefix="rxt-engine-write")
        self._thread = threading.Thread(target=self._run, name="rxt-engine", daemon=True)
        self._thread.start()

    def submit(self, turn: Turn) -> Turn:
        """
        Lets a turn wait for a row.

        Raises: [`QueueFullError`] if too many wait already, `ValueError` for a prompt that leaves no room and a memory
        of another shape, [`StateError`] for the memory of other weights, `RuntimeError` after `close`.
        """
        room = self.config.max_position_embeddings - len(turn.prompt)
        if not turn.prompt or room < 1 or turn.max_new_tokens < 1:
            raise ValueError(
                f"A turn of {len(turn.prompt)} prompt tokens and {turn.max_new_tokens} new ones does not fit "
                f"max_position_embeddings={self.config.max_position_embeddings}."
            )
        turn.max_new_tokens = min(turn.max_new_tokens, room)
        turn.memory = as_stm_cache(turn.memory, batch_size=1, config=self.config)
        if turn.memory.fingerprint is not None:
            check_fingerprint("The memory", turn.memory.fingerprint, self.fingerprint)
        with self._wake:
            if self._is_closing:
                raise RuntimeError("The engine is closed.")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} turns wait already, at most {self.max_waiting} may.")
            self._waiting.append(turn)
            self._wake.notify()
        return turn

    @property
    def active(self) -> int:
        """Turns that are generated now."""
        return len(self._rows)

    @property
    def is_running(self) -> bool:
        """Says whether turns are taken and answered."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def waiting(self) -> int:
        """Turns that wait for a row."""
        return len(self._waiting)

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends when all turns have ended; after `timeout_s` those that have not are cancelled."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            for turn in [row.turn for row in list(self._rows)] + list(self._waiting):
                turn.cancel()
            self._thread.join(timeout_s)
        if self._writer is not None:
            self._writer.shutdown()

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._wake:
                    while not (self._waiting or self._rows or self._finished or self._is_closing):
                        self._wake.wait()
                    if self._is_closing and not (self._waiting or self._rows or self._finished):
                        return
                try:
                    self._step()
                except Exception as error:
                    # nothing of the batch can be trusted; the engine goes on with the next turns
                    logger.exception("A step of the engine failed.")
                    for turn in [row.turn for row in self._rows] + self._joining + self._finished:
                        if not turn.is_done:
                            self._fail(turn, error)
                    self._rows, self._joining, self._finished = [], [], []

    def _step(self) -> None:
        now, held = time.monotonic(), list(self._finished)
        for index in reversed(range(len(self._rows))):
            if self._is_dropped(self._rows[index].turn, now):
                self._leave(index)
        with self._wake:
            waiting = [turn for turn in self._waiting if not self._is_dropped(turn, now)]
            room = self.max_rows - len(self._rows)
            # few that wait beside many that run wait a step for others: a prefill costs more than the step
            self._holds = bool(waiting) and 4 * len(waiting) < len(self._rows) and not self._holds
            room = 0 if self._holds else room
            joining, self._waiting = waiting[:room], deque(waiting[room:])
        self._joining = [turn for turn in joining if self._is_ready(turn)]
        if self._rows:
            self._advance()
        if self._joining:
            self._join(self._joining)
            self._joining = []
        # memories are written two or more at once; a lone one waits a step for another, unless nothing else runs
        if self._finished and (len(self._finished) > 1 or held or not self._rows):
            finished, self._finished = self._finished, []
            self._write(finished)

    def _is_dropped(self, turn: Turn, now: float) -> bool:
        if turn._is_cancelled:
            turn.finish_reason = "cancelled"
            turn.memory_after = turn.memory
            self._finish(turn)
            return True
        if turn.deadline is not None and now > turn.deadline:
            self._fail(turn, TimeoutError("The turn took longer than its time limit."))
            return True
        return False

    def _is_ready(self, turn: Turn) -> bool:
        """Replays what the turn brings; one that fails does not concern the others."""
        try:
            turn.memory = STMCache(turn.memory.states, turn.memory.turns, self.fingerprint)
            turn.memory = turn.memory.to(self.model.device, self._dtype).detach()
            if turn.replay:
                turn.memory = self.model.replay(turn.memory, turn.replay)
        except Exception as error:
            # given to the caller of this turn; let through, it would take the other rows with it
            self._fail(turn, error)
        return not turn.is_done

    def _join(self, turns: list[Turn]) -> None:
        """Adds rows behind the active ones by one right-padded prefill, and takes their first tokens."""
        first, device = len(self._rows), self.model.device
        states = torch.cat([turn.memory.states for turn in turns])
        for pair, tables in zip(self.model.model.memory_keys_values(states), self._across, strict=True):
            for part, table in zip(pair, tables, strict=True):
                table[first : first + len(turns)] = part
        ids = pad_sequence([torch.tensor(turn.prompt) for turn in turns], batch_first=True).to(device)
        length = ids.shape[1]
        places = torch.arange(length, device=device)
        distance = places[:, None] - places[None, :]
        self._within.place(first, None, length)
        hidden, inputs = self._forward(self._decode, ids, places[None], distance[None, None], first)
        for table, states in zip(self._layer_inputs, inputs, strict=True):
            table[first : first + len(turns), :length] = states
        last = torch.tensor([len(turn.prompt) - 1 for turn in turns], device=device)
        logits = self.model.lm_head(hidden[torch.arange(len(turns), device=device), last])
        for turn in turns:
            sampled = turn.temperature > 0
            generator = torch.Generator(device) if sampled else None
            if generator is not None:
                generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1 if turn.seed is None else turn.seed)
            self._rows.append(_Row(turn, _Text(turn, self.tokenizer), generator))
        self.prefills += 1
        self._take(first, logits)

    def _advance(self) -> None:
        """Generates one token of every active row."""
        rows, device = self._rows, self.model.device
        # a compiled step is made for few shapes; the rows beyond the active ones compute what nobody reads
        count = min(self.max_rows, 1 << (len(rows) - 1).bit_length()) if self.compiles else len(rows)
        idle = count - len(rows)
        ids = torch.tensor([[row.turn.token_ids[-1]] for row in rows] + [[0]] * idle, device=device)
        positions = torch.tensor([row.length for row in rows] + [0] * idle, device=device)
        longest = max(row.length for row in rows) + 1
        if self.compiles:
            longest = min(-(-longest // 64) * 64, self.config.max_position_embeddings)
        distance = positions[:, None] - torch.arange(longest, device=device)[None, :]
        self._within.place(0, positions, longest)
        hidden, inputs = self._forward(self._step_of_model, ids, positions[:, None], distance[:, None, None], 0)
        for table, states in zip(self._layer_inputs, inputs, strict=True):
            table[torch.arange(count, device=device), positions] = states[:, 0]
        for row in rows:
            row.length += 1
        self.steps += 1
        self._take(0, self.model.lm_head(hidden[: len(rows), -1]))

    def _decode(self, embeds, masks, positions, cache) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the hidden states, and what the memory layers read if that is written."""
        model = self.model.model
        if not self._writes_in_passing:
            return model.decode(embeds, None, masks, position_ids=positions, cache=cache), []
        given = {"attention_mask": masks, "position_ids": positions, "cache": cache, "output_hidden_states": True}
        output = model(inputs_embeds=embeds, **given)
        return output.last_hidden_state, [output.hidden_states[layer] for layer in self._memory_layers]

    def _forward(self, decode, ids, positions, distance, first) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Decodes `ids` in the rows from `first`; a token reads those `distance` >= 0 before it."""
        across = DynamicCache()
        cache = EncoderDecoderCache(self._within, across)
        end = first + len(ids)
        for index, (keys, values) in enumerate(self._across):
            layer = _filled_layer(keys[first:end], values[first:end])
            across.layers.append(layer)
            cache.is_updated[index] = True
        masks = {"full_attention": distance >= 0}
        if self.config.sliding_window is not None:
            masks["sliding_attention"] = (distance >= 0) & (distance < self.config.sliding_window)
        embeds = self.model.model.embed_tokens(ids)
        if self.config._attn_implementation == "eager":
            lowest = torch.finfo(embeds.dtype).min
            masks = {kind: torch.where(mask, 0.0, lowest).to(embeds.dtype) for kind, mask in masks.items()}
        masks = {kind: mask.expand(len(ids), *mask.shape[1:]) for kind, mask in masks.items()}
        return decode(embeds, masks, positions, cache)

    def _take(self, first: int, logits: torch.Tensor) -> None:
        """Chooses the next token of the rows from `first`; those that have ended leave."""
        chosen = logits.argmax(-1).tolist()
        now = time.monotonic()
        ended = []
        for index, row in enumerate(self._rows[first:], start=first):
            turn, token_id = row.turn, chosen[index - first]
            if row.generator is not None:
                token_id = sample(logits[index - first], turn.temperature, turn.top_p, row.generator)
            turn.token_ids.append(token_id)
            turn.first_token_at = turn.first_token_at or now
            is_stopped = row.text.add(token_id)
            if token_id in self._end_ids or is_stopped:
                turn.finish_reason = "stop"
            elif len(turn.token_ids) >= turn.max_new_tokens:
                turn.finish_reason = "length"
            if turn.finish_reason is not None:
                row.text.end()
                ended.append(index)
            if turn.streams and turn.on_change is not None and turn._may_take > turn._taken:
                turn.on_change()
        self.tokens += len(self._rows) - first
        for index in reversed(ended):
            row, turn = self._rows[index], self._rows[index].turn
            if self._writes_in_passing and turn.updates_memory and turn.written_prompt == turn.prompt:
                turn._layer_inputs = self._layer_inputs[:, index, : row.length].clone()
            self._leave(index)
            if turn.updates_memory:
                self._finished.append(turn)
            else:
                turn.memory_after = turn.memory
                self._finish(turn)

    def _leave(self, index: int) -> None:
        """Takes one row out; the last one moves into its place."""
        row, last = self._rows[index], self._rows[-1]
        self._rows[index] = last
        self._rows.pop()
        if last is not row:
            source = len(self._rows)
            self._within.move(source, index, last.length)
            for table in (table for tables in self._across for table in tables):
                table[index] = table[source]
            self._layer_inputs[:, index, : last.length] = self._layer_inputs[:, source, : last.length]

    def _write(self, turns: list[Turn]) -> None:
        # an instruction that is not written is in the states of its turn: these are computed again, without it
        again = [turn for turn in turns if turn._layer_inputs is None]
        for batch in (again, [turn for turn in turns if turn._layer_inputs is not None]):
            if not batch:
                continue
            if self._writer is None:
                self._write_now(batch)
            else:
                reader = torch.cuda.current_stream()
                self._writer.submit(self._write_beside, batch, reader, reader.record_event())

    def _write_beside(self, turns: list[Turn], reader: Any, before: Any) -> None:
        """Writes on a stream of its own: other conversations go on while this one's memory is written."""

        def settle(memory: STMCache) -> None:
            torch.cuda.current_stream().synchronize()
            memory.states.record_stream(reader)

        with torch.no_grad(), torch.cuda.stream(self._stream):
            torch.cuda.current_stream().wait_event(before)
            self._write_now(turns, settle)

    def _write_now(self, turns: list[Turn], settle: Callable[[STMCache], Any] | None = None) -> None:
        """Writes the interactions of these turns in one batch; one that fails does not concern the others."""
        try:
            rows = [torch.tensor(turn.written_prompt + turn.token_ids) for turn in turns]
            ids = pad_sequence(rows, batch_first=True).to(self.model.device)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.model.device)
            inputs = [turn._layer_inputs.transpose(0, 1) for turn in turns if turn._layer_inputs is not None]
            inputs = list(pad_sequence(inputs, batch_first=True).unbind(2)) if inputs else None
            memories = STMCache.cat([turn.memory for turn in turns])
            written = self.model.update_memory(memories, ids, mask, layer_inputs=inputs)
            if settle is not None:
                settle(written)
            self.writes += 1
            for index, turn in enumerate(turns):
                turn.memory_after = written.select(index)
                self._finish(turn)
        except Exception as error:
            # given to the caller of the turn that causes it, which writing one by one finds out
            if len(turns) == 1:
                self._fail(turns[0], error)
                return
            if not isinstance(error, StateError):
                logger.warning(f"A batch of {len(turns)} writes failed, they are written one by one: {error}")
            for turn in turns:
                if not turn.is_done:
                    self._write_now([turn], settle)

    def _fail(self, turn: Turn, error: Exception) -> None:
        turn.error, turn.finish_reason = error, "error"
        self._finish(turn)

    def _finish(self, turn: Turn) -> None:
        self.turns += 1
        turn._layer_inputs = None
        turn._done.set()
        if turn.on_change is not None:
            # the other end may be an event loop that has closed
            with contextlib.suppress(RuntimeError):
                turn.on_change()


def _filled_layer(keys: torch.Tensor, values: torch.Tensor) -> Any:
    """Returns a layer of a cache that holds these keys and values, without a copy."""
    layer: Any = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token from logits of shape (vocab_size,), as `generate` does."""
    scores = logits[None].float()
    if temperature != 1.0:
        scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return int(torch.multinomial(scores.softmax(-1), num_samples=1, generator=generator))


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Returns the text of an answer."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_token_ids(model: Any) -> frozenset[int]:
    """Returns the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    ends = model.config.eos_token_id if ends is None else ends
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def bytes_of_row(model: Any, memory_keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """
    Returns the bytes that one active turn takes: its keys and values, those of its memory, the memory before and
    after, and what is kept of its states for a write in passing.
    """
    config, (keys, _) = model.config, memory_keys_values[0]
    within = 2 * config.num_hidden_layers * config.num_key_value_heads * config.max_position_embeddings
    across = sum(part[0].numel() for pair in memory_keys_values for part in pair)
    states = 2 * config.num_memory_layers * config.num_memory_slots * config.hidden_size
    kept = config.num_memory_layers * config.max_position_embeddings * config.hidden_size
    kept = kept if config.memory_encoding == "decoder_in_passing" else 0
    return (within * config.head_dim + across + states + kept) * keys.element_size()


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


__all__ = ["Engine", "QueueFullError", "Turn"]
