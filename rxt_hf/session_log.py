# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The file beside a saved memory: what was said and written, so that `undo` and `forget` go on after a load."""

import base64
import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from .cache_rxt import StateError, STMCache
from .memory_file_rxt import write_atomically
from .modeling_rxt import RxTForCausalLM

logger = logging.get_logger(__name__)

LOG_FORMAT = "rxt_hf.RxTSession"
LOG_FORMAT_VERSION = 1


class Interaction(NamedTuple):
    query: str
    answer: str
    # four bytes a token: the log is all of a session that grows
    token_ids: array


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of the tokenizer's vocabulary and rules; what a call left as its padding and truncation is no part."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return _sha256(json.dumps({**rules, "padding": None, "truncation": None}, sort_keys=True).encode())


def write_log(
    path: str | os.PathLike,
    memory: STMCache,
    base: STMCache,
    turns: Sequence[Interaction],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Writes `path` + ".json": the turns that made `memory` of `base`, with a checksum over both."""
    log = {
        "format": LOG_FORMAT,
        "format_version": LOG_FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "base": base64.b64encode(_raw(base.states)).decode(),
        "base_turns": int(base.turns[0]),
        "turns": [[turn.query, turn.answer, turn.token_ids.tolist()] for turn in turns],
    }
    log["checksum"] = _checksum(memory, log)
    write_atomically(_log_path(path), json.dumps(log).encode())


def read_log(
    path: str | os.PathLike, memory: STMCache, model: RxTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[STMCache, tuple[Interaction, ...]] | None:
    """
    Returns the memory before the first turn, and the turns; None without a log that belongs to `memory`.

    Raises: [`StateError`] for a log of another tokenizer, and for tokens that the model does not have.
    """
    log = _read(_log_path(path), memory)
    if log is None:
        return None
    found, expected = log["tokenizer"], tokenizer_fingerprint(tokenizer)
    if found != expected:
        raise StateError(f"{path} is refused: the fingerprint of the tokenizer is {found!r}, expected {expected!r}.")
    return _base(log, memory), _turns(log, model)


def _log_path(path: str | os.PathLike) -> Path:
    return Path(os.path.realpath(f"{os.path.realpath(path)}.json"))


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _checksum(memory: STMCache, log: dict[str, Any]) -> str:
    return _sha256(_raw(memory.states), _raw(memory.turns), json.dumps(log, sort_keys=True).encode())


def _read(path: Path, memory: STMCache) -> dict[str, Any] | None:
    """Returns the log, or None if there is none that belongs to the memory."""
    try:
        log = json.loads(path.read_bytes())
        if log.pop("checksum") == _checksum(memory, log):
            return log
        reason = "its checksum does not fit"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning(f"{path} is no log of the memory beside it ({reason}): undo and forget start from here.")
    return None


def _base(log: dict[str, Any], memory: STMCache) -> STMCache:
    raw = bytearray(base64.b64decode(log["base"]))
    states = torch.frombuffer(raw, dtype=memory.dtype).reshape(memory.states.shape)
    return memory.replace(states.to(memory.device), turns=log["base_turns"])


def _turns(log: dict[str, Any], model: RxTForCausalLM) -> tuple[Interaction, ...]:
    turns = tuple(Interaction(query, answer, array("i", token_ids)) for query, answer, token_ids in log["turns"])
    if any(not 0 <= token_id < model.config.vocab_size for turn in turns for token_id in turn.token_ids):
        raise StateError("The log holds token ids outside the model's vocabulary.")
    return turns


__all__ = ["Interaction", "read_log", "tokenizer_fingerprint", "write_log"]
