# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The answer of a turn piece by piece, for threads and event loops alike, and how a turn is cancelled."""

import asyncio
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, StoppingCriteria, TextStreamer


class AnswerStream(Iterator[str], AsyncIterator[str]):
    """
    Iterator over the pieces of one answer, from [`RxTSession.stream`], for `for` or `async for`. Call `close` or
    `aclose` (`contextlib.closing`, `contextlib.aclosing`) when you leave it early: a stream that is only dropped is
    closed too, but then `async for` blocks its event loop for one token.
    """

    def __init__(self, arriving: Generator[Future, None, None]):
        self._arriving = arriving

    def __next__(self) -> str:
        for future in self._arriving:
            try:
                piece = future.result()
            except BaseException:
                # the user's interrupt: it cancels the turn
                self.close()
                raise
            if piece is not None:
                return piece
        raise StopIteration

    async def __anext__(self) -> str:
        for future in self._arriving:
            try:
                piece = await asyncio.shield(asyncio.wrap_future(future))
            except asyncio.CancelledError:
                await self.aclose()
                raise
            if piece is not None:
                return piece
        raise StopAsyncIteration

    def close(self) -> None:
        """Cancels a turn that has not ended; its thread has ended when this returns."""
        self._arriving.close()

    async def aclose(self) -> None:
        """Cancels a turn like `close`, without blocking. Cancelling this wait does not save the turn."""
        await asyncio.to_thread(self._arriving.close)


class Pieces(TextStreamer):
    """Holds each piece of a growing answer as a future; `None` is the end of the turn, memory write included."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._futures: list[Future] = [Future()]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.append(text)

    def append(self, piece: str | None) -> None:
        self._futures.append(Future())
        self._futures[-2].set_result(piece)

    def arriving(self) -> Generator[Future, None, None]:
        for future in self._futures:
            yield future
            if future.result() is None:
                return


class Cancel(StoppingCriteria):
    """Ends `generate` by an exception, so that a cancelled turn computes no memory write."""

    def __init__(self) -> None:
        self.requested = threading.Event()

    def check(self) -> None:
        if self.requested.is_set():
            raise CancelledError("The turn was cancelled.")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


__all__ = ["AnswerStream", "Cancel", "Pieces"]
