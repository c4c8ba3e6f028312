# Copyright 2026 the rxt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The Short-Term Memory of an RxT model between two turns, as a value."""

import hashlib
import os
import reprlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree
from transformers.cache_utils import Cache, EncoderDecoderCache

from .fingerprint_rxt import fingerprints_match
from .memory_file_rxt import StateError, check_header_length, decode, encode, expect, write_atomically

DIMENSIONS = "(batch_size, num_memory_layers, num_memory_slots, hidden_size)"


class STMCache:
    r"""
    The Short-Term Memory of a batch of conversations between two turns. It is a value: every method gives a new object
    and leaves this one unchanged. Only `fork`, `select`, `cat` and `repeat` promise storage of their own.

    Args:
        states (`torch.Tensor` of shape `(batch_size, num_memory_layers, num_memory_slots, hidden_size)`):
            The memory; a floating-point tensor.
        turns (`torch.LongTensor` of shape `(batch_size,)`, `list[int]` or `int`, *optional*, defaults to zeros):
            The number of interactions written into each row. It is kept on the device of `states`.
        fingerprint (`str`, *optional*):
            Names the weights that wrote the memory; two are compared by [`fingerprints_match`].

    Raises:
        `ValueError`: if `states` or `turns` has another shape or kind of number.
        `TypeError`: if `states` is no tensor or `fingerprint` is no string.

    Example:

    ```python
    >>> import torch
    >>> from rxt_hf import STMCache

    >>> memory = STMCache(torch.zeros(2, 4, 32, 64), turns=[3, 5])
    >>> memory.select([1]).turns
    tensor([5])
    >>> STMCache.cat([memory, memory]).batch_size
    4

    ```
    """

    def __init__(
        self,
        states: torch.Tensor,
        turns: torch.Tensor | Sequence[int] | int | None = None,
        fingerprint: str | None = None,
    ):
        if not isinstance(states, torch.Tensor):
            raise TypeError(f"states must be a tensor of shape {DIMENSIONS}, got {type(states).__name__}.")
        if states.dim() != 4 or not states.is_floating_point():
            raise ValueError(
                f"states must be a floating-point tensor of shape {DIMENSIONS}, "
                f"got {states.dtype} of shape {tuple(states.shape)}."
            )
        if not (fingerprint is None or isinstance(fingerprint, str)):
            raise TypeError(f"fingerprint must be a str or None, got {type(fingerprint).__name__}.")
        self.states = states
        self.turns = _as_turns(turns, states)
        self.fingerprint = fingerprint

    @property
    def batch_size(self) -> int:
        return self.states.shape[0]

    @property
    def num_memory_layers(self) -> int:
        return self.states.shape[1]

    @property
    def num_memory_slots(self) -> int:
        return self.states.shape[2]

    @property
    def hidden_size(self) -> int:
        return self.states.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.states.dtype

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def nbytes(self) -> int:
        """Bytes of `states`; the same after every turn."""
        return self.states.numel() * self.states.element_size()

    def wait(self) -> "STMCache":
        """Waits for a pending write (`update_memory="async"`) and returns the memory; returns at once otherwise."""
        return self

    def __len__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        shape = f"{tuple(self.states.shape)}, dtype={self.dtype}, device={str(self.device)!r}"
        return f"STMCache(shape={shape}, fingerprint={reprlib.repr(self.fingerprint)})"

    def __deepcopy__(self, memo: dict) -> "STMCache":
        # torch refuses to deep-copy a tensor that is part of a graph; a clone stays in it.
        return self.fork()

    def fork(self) -> "STMCache":
        """Returns an independent copy with storage of its own; gradients flow through it."""
        return self.replace(self.states.clone(), self.turns.clone())

    def select(self, rows: int | slice | Sequence[int] | Sequence[bool] | torch.Tensor) -> "STMCache":
        """Returns a copy of the given rows in the given order. A single `int` gives a batch of one."""
        if isinstance(rows, torch.Tensor):
            rows = rows.to(self.device)
        elif not isinstance(rows, (int, slice)):
            rows = list(rows)
        index = torch.arange(self.batch_size, device=self.device)[rows].reshape(-1)
        return self.replace(self.states[index], self.turns[index])

    @classmethod
    def cat(cls, caches: Sequence["STMCache"]) -> "STMCache":
        """
        Joins the rows of several memories in one batch.

        Raises:
            `ValueError`: if the list is empty, or if layers, slots, width, dtype or the writer's weights differ.
        """
        caches = list(caches)
        if not caches:
            raise ValueError("STMCache.cat needs at least one STMCache, got an empty list.")
        first = caches[0]
        for cache in caches[1:]:
            for name, found, expected in (
                ("(layers, slots, hidden_size)", tuple(cache.states.shape[1:]), tuple(first.states.shape[1:])),
                ("dtype", cache.dtype, first.dtype),
            ):
                if found != expected:
                    raise ValueError(f"STMCache.cat needs equal {name}, got {expected} and {found}.")
            if not fingerprints_match(cache.fingerprint, first.fingerprint):
                found, expected = _short(cache.fingerprint), _short(first.fingerprint)
                raise ValueError(f"STMCache.cat needs equal weights, got the fingerprints {expected} and {found}.")
        return first.replace(torch.cat([c.states for c in caches]), torch.cat([c.turns for c in caches]))

    def repeat(self, n: int) -> "STMCache":
        """Repeats each row `n` times, as `torch.repeat_interleave` does: the layout of `num_return_sequences`."""
        if n < 1:
            raise ValueError(f"STMCache.repeat needs n >= 1, got {n}.")
        return self.replace(self.states.repeat_interleave(n, dim=0), self.turns.repeat_interleave(n, dim=0))

    def to(self, *args: Any, **kwargs: Any) -> "STMCache":
        """Moves or casts the states with the arguments of `torch.Tensor.to`; `turns` follow the device only."""
        return self.replace(self.states.to(*args, **kwargs))

    def detach(self) -> "STMCache":
        """Returns the same numbers, detached from the graph."""
        return self.replace(self.states.detach())

    def replace(self, states: torch.Tensor, turns: torch.Tensor | Sequence[int] | int | None = None) -> "STMCache":
        """Returns the memory with other states, and other turns if given; the fingerprint stays."""
        return STMCache(states, self.turns if turns is None else turns, self.fingerprint)

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """
        Writes one safetensors file. After any interruption (an error, a full disk, a killed process) `path` holds the
        complete old file or the complete new one. The next save removes what a killed one left behind.

        Args:
            path: The file.
            dtype (`torch.dtype`, *optional*): Dtype of the stored states (default: their own). `load` gives `float32`,
                `float16` and `bfloat16` back as stored. `int8` has one scale for each slot:

                    scale = max|slot| / 127,  code = round(slot / scale)

                `load` gives it back in the dtype of now, each number to within about half a scale. A second save of
                what such a file gave back loses nothing more.

        Raises:
            `StateError`: if the states are empty, not finite (in `dtype`), or neither float32, float16 nor bfloat16.
        """
        write_atomically(Path(os.path.realpath(path)), *encode(self.states, self.turns, self.fingerprint, dtype))

    def to_bytes(self, dtype: torch.dtype | None = None) -> bytes:
        """
        Returns the content that `save` writes into a file, for a database or a network.

        Args:
            dtype (`torch.dtype`, *optional*): as in `save`.

        Raises: [`StateError`] as `save` does.
        """
        return b"".join(encode(self.states, self.turns, self.fingerprint, dtype))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: Any = None,
        device: torch.device | str | None = None,
        *,
        allow_other_weights: bool = False,
    ) -> "STMCache":
        """
        Reads a file written by `save`: bit-identical and in its dtype (see `save` for int8). Nothing in the file is
        executed, and no more memory is taken than a few times the size of the file.

        Args:
            path: The file.
            model (*optional*): Refuses a memory of another shape (by `model.config`) or of other weights (by
                `model.memory_fingerprint()`).
            device (*optional*, defaults to the CPU): Where the tensors go.
            allow_other_weights (`bool`): Accepts a memory that other weights wrote, as if `model` had written it. A
                memory of another shape is still refused.

        Raises:
            `StateError`: if the file is damaged, foreign, of a newer version, or does not belong to `model`.
            `FileNotFoundError`: if there is no file.
        """
        if os.path.exists(path) and not os.path.isfile(path):
            raise StateError(f"{path} is not a regular file, expected an STMCache file.")
        with open(path, "rb") as file:
            start, size = file.read(8), os.fstat(file.fileno()).st_size
            check_header_length(start, size, str(path))
            return cls._read(start + file.read(size - 8), str(path), model, device, allow_other_weights)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        model: Any = None,
        device: torch.device | str | None = None,
        *,
        allow_other_weights: bool = False,
    ) -> "STMCache":
        """
        Reads the content of a file, or what `to_bytes` returned, with all checks of `load`.

        Args:
            data (`bytes`): The whole content of a file.
            model (*optional*): as in `load`.
            device (*optional*, defaults to the CPU): Where the tensors go.
            allow_other_weights (`bool`): as in `load`.

        Raises: [`StateError`] as `load` does.
        """
        check_header_length(data[:8], len(data), "The memory")
        return cls._read(bytes(data), "The memory", model, device, allow_other_weights)

    @classmethod
    def _read(cls, content: bytes, name: str, model: Any, device: Any, allow_other_weights: bool) -> "STMCache":
        states, turns, fingerprint = decode(content, name)
        if model is not None:
            found, expected = tuple(states.shape[1:]), _memory_shape(model.config)
            expect(name, "(num_memory_layers, num_memory_slots, hidden_size)", found, expected)
            own = model.memory_fingerprint()
            if allow_other_weights:
                fingerprint = own
            else:
                check_fingerprint(name, fingerprint, own)
        return cls(states.to(device), turns, fingerprint)


class PendingSTMCache(STMCache):
    """
    A memory that is still being written. It is used like any other: the first use waits for the write. If the write
    failed, this and every later use raises its error.

    Args:
        future (`concurrent.futures.Future`): gives the written [`STMCache`].
    """

    def __init__(self, future: Future):
        self._future = future

    def wait(self, timeout_s: float | None = None) -> STMCache:
        """
        Waits for the write and returns the written memory.

        Args:
            timeout_s (`float`, *optional*): longest wait in seconds (default: no limit).

        Raises: `TimeoutError` after `timeout_s`, and the error of the write if it failed.
        """
        return self._future.result(timeout_s)

    @property
    def is_pending(self) -> bool:
        """Whether the write is still under way."""
        return not self._future.done()

    states = property(lambda self: self.wait().states)
    turns = property(lambda self: self.wait().turns)
    fingerprint = property(lambda self: self.wait().fingerprint)

    def __repr__(self) -> str:
        return "PendingSTMCache(being written)" if self.is_pending else f"PendingSTMCache({self.wait()})"

    def __reduce__(self):
        written = self.wait()
        return STMCache, (written.states, written.turns, written.fingerprint)


def as_stm_cache(value: Any, *, batch_size: int | None = None, config: Any = None) -> STMCache:
    """
    Returns the `STMCache` that a caller passed as such or as a plain tensor, checked before any forward.

    Args:
        value (`STMCache` or `torch.Tensor` of shape `(batch_size, num_memory_layers, num_memory_slots, hidden_size)`):
            The memory. An `STMCache` comes back as the same object, a pending one as what was written.
        batch_size (`int`, *optional*): The number of rows it must have.
        config (`RxTConfig`, *optional*): The layers, slots and width that it must have.

    Raises:
        `ValueError`: naming both shapes, if they differ.
        `TypeError`: if `value` is anything else.
    """
    if type(value).__name__ == "STMCache" and not isinstance(value, STMCache):
        # made by this same file, loaded a second time from a Hub folder or from the package
        value = STMCache(value.states, value.turns, value.fingerprint)
    value = value.wait() if isinstance(value, STMCache) else value
    if not isinstance(value, (STMCache, torch.Tensor)):
        raise TypeError(f"stm_cache must be an STMCache or a tensor {DIMENSIONS}, got {type(value).__name__}.")
    states = value.states if isinstance(value, STMCache) else value
    found = tuple(states.shape)
    expected: tuple = (None,) * 4 if config is None else (None, *_memory_shape(config))
    expected = (batch_size, *expected[1:])
    if len(found) != 4 or any(want is not None and got != want for got, want in zip(found, expected, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"stm_cache has shape {found}, expected ({wanted}) = {DIMENSIONS}.")
    return value if isinstance(value, STMCache) else STMCache(value)


def _as_turns(turns: torch.Tensor | Sequence[int] | int | None, states: torch.Tensor) -> torch.Tensor:
    batch_size = states.shape[0]
    if turns is None or isinstance(turns, int):
        return torch.full((batch_size,), turns or 0, dtype=torch.long, device=states.device)
    if not isinstance(turns, torch.Tensor):
        turns = torch.as_tensor(turns, device=states.device)
    if tuple(turns.shape) != (batch_size,) or (turns.is_floating_point() and batch_size):
        raise ValueError(f"turns must be integers of shape ({batch_size},), got {turns.dtype}, {tuple(turns.shape)}.")
    return turns.to(states.device, torch.long)


def _memory_shape(config: Any) -> tuple[int, int, int]:
    return config.num_memory_layers, config.num_memory_slots, config.hidden_size


def check_fingerprint(name: str, found: str | None, expected: str) -> None:
    """Raises [`StateError`] if other weights than those of the fingerprint `expected` wrote the memory."""
    if not fingerprints_match(found, expected):
        raise StateError(
            f"{name} is refused: the fingerprint {_short(found)!r}, expected {_short(expected)!r}, says that other "
            "weights wrote it."
        )


def _short(fingerprint: str | None) -> str | None:
    """Returns a short fingerprint as it is, and the start of the hash of a long one."""
    if fingerprint is None or len(fingerprint) <= 64:
        return fingerprint
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


def _flatten(cache: STMCache) -> tuple[list[torch.Tensor], str | None]:
    return [cache.states, cache.turns], cache.fingerprint


def _flatten_with_keys(cache: STMCache) -> tuple[list[tuple[Any, torch.Tensor]], str | None]:
    children, fingerprint = _flatten(cache)
    return list(zip(map(_pytree.GetAttrKey, ("states", "turns")), children, strict=True)), fingerprint


def _unflatten(children: Any, fingerprint: str | None) -> STMCache:
    # Leaves may be anything while a tree is mapped, so the constructor's checks do not apply.
    cache = object.__new__(STMCache)
    cache.states, cache.turns = children
    cache.fingerprint = fingerprint
    return cache


# for `torch.load`, which by itself takes tensors and plain containers only
torch.serialization.add_safe_globals([STMCache])

# the module's name keeps a copy loaded from the Hub apart from the installed one
if STMCache not in _pytree.SUPPORTED_NODES:
    _pytree.register_pytree_node(
        STMCache,
        _flatten,
        _unflatten,
        serialized_type_name=f"{STMCache.__module__}.{STMCache.__qualname__}",
        flatten_with_keys_fn=_flatten_with_keys,
    )


class TurnCache(EncoderDecoderCache):
    """
    Keys and values of one turn: those of its tokens, and those of the memory that the turn started with. The cache
    also keeps that memory, so that a change of memory within the turn is noticed.
    """

    def __init__(self, *caches: Any):
        super().__init__(*caches)
        self.memory_given: STMCache | torch.Tensor | None = None
        self.memory_states: torch.Tensor | None = None

    @classmethod
    def of(cls, cache: Cache | None) -> Cache | None:
        """Returns a `TurnCache` that shares all parts of an `EncoderDecoderCache`, and any other cache as it is."""
        if not isinstance(cache, EncoderDecoderCache) or isinstance(cache, cls):
            return cache
        shared = cls(cache.self_attention_cache, cache.cross_attention_cache)
        shared.is_updated = cache.is_updated
        return shared


__all__ = ["STMCache", "StateError", "TurnCache", "as_stm_cache"]
