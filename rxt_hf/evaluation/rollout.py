# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Dialogues played by a model: it answers turn after turn, and its memory is written with what was said."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..cache_rxt import STMCache
from ..data.collator import RxTEpisodeCollator
from ..data.readers import encode_turns

GREEDY: dict[str, Any] = {"do_sample": False}
# temperature 1, and every token of the vocabulary
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
# of an answer, only its text is asked for: no thinking, no call of a tool
UNANSWERED = {"answer": None, "thinking": None, "tool_calls": None}


class Played(NamedTuple):
    """A turn that was played: token ids of its prompt, and of the answer with its end token (none if not asked)."""

    prompt: list[int]
    answer: list[int]


def left_padded(
    rows: Sequence[list[int]], pad_token_id: int, device: torch.device | str | None = None
) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask` of shape (rows, longest row)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    memory: STMCache | None = None,
    *,
    max_new_tokens: int,
    update_memory: bool = False,
    **generation: Any,
) -> tuple[list[list[int]], STMCache | None]:
    """
    Continues prompts of token ids, one for each row of the memory, or by a model without one. Returns the tokens of
    each answer, up to and including its first end token, and the memory after, written if `update_memory`.
    """
    inputs = left_padded(prompts, tokenizer.pad_token_id, model.device)
    width = inputs["input_ids"].shape[1]
    if memory is not None:
        generation |= {"stm_cache": memory, "update_memory": update_memory}
        max_new_tokens = max(1, min(max_new_tokens, model.config.max_position_embeddings - width))
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **generation)
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    answers = getattr(out, "sequences", out)[:, width:].tolist()
    # behind its end, an answer is filled up to the longest
    lengths = [next((place for place, token in enumerate(row, 1) if token in ends), len(row)) for row in answers]
    answers = [row[:length] for row, length in zip(answers, lengths, strict=True)]
    return answers, None if memory is None else out.stm_cache


def contains_words(text: str, words: str) -> bool:
    """Whether the words stand in the text as whole words, in exactly this case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def recalled_words(turn: Mapping[str, Any]) -> list[str]:
    """Returns what an answer must recall: the words that `recall` marks, see `rxt_hf.data.readers`."""
    return [turn["answer"][start:end] for start, end, _ in turn.get("recall") or []]


def is_answered(turn: Mapping[str, Any]) -> bool:
    """Whether something was said, and answered, in an interaction."""
    return turn["query"] is not None and turn["answer"] is not None


@torch.no_grad()
def play(
    model: Any,
    tokenizer: Any,
    dialogues: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    is_asked: Callable[[Mapping[str, Any]], bool] = is_answered,
    write_reference: bool = False,
    clear_memory: bool = False,
    **generation: Any,
) -> list[list[Played]]:
    r"""
    Plays the turns of many dialogues at once, each with a memory of its own; they may differ in length.

    Args:
        is_asked (`Callable`): tells the turns that the model answers. All turns are written into the memory.
        write_reference (`bool`): writes the dialogue's own answers in place of the model's.
        clear_memory (`bool`): every turn reads the initial memory.
        generation: of `generate`, such as [`GREEDY`] or [`SAMPLED`].

    Returns: [`Played`] turns of each dialogue.
    """
    episodes = [dialogue["interactions"] for dialogue in dialogues]
    played: list[list[Played]] = [[] for _ in episodes]
    collate = RxTEpisodeCollator(tokenizer.pad_token_id)
    rows, memory = list(range(len(episodes))), model.init_stm(len(episodes))
    for number in range(max(map(len, episodes))):
        kept = [place for place, row in enumerate(rows) if number < len(episodes[row])]
        rows, memory = [rows[place] for place in kept], memory.select(kept)
        turns = [episodes[row][number] for row in rows]
        prompts = [ids for ids, _ in encode_turns(tokenizer, [turn | UNANSWERED for turn in turns])]
        asked = [place for place, turn in enumerate(turns) if is_asked(turn)]
        said: list[list[int]] = [[] for _ in rows]
        if asked:
            read = model.init_stm(len(asked)) if clear_memory else memory.select(asked)
            questions = [prompts[place] for place in asked]
            answers, _ = answer(model, tokenizer, questions, read, max_new_tokens=max_new_tokens, **generation)
            for place, ids in zip(asked, answers, strict=True):
                said[place] = ids
        for row, prompt, ids in zip(rows, prompts, said, strict=True):
            played[row].append(Played(prompt, ids))
        if not clear_memory:
            written = [prompt + ids for prompt, ids in zip(prompts, said, strict=True)]
            if write_reference:
                written = [ids for ids, _ in encode_turns(tokenizer, turns)]
            batch = collate([{"input_ids": ids, "labels": ids} for ids in written])
            ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
            memory = model.update_memory(memory, ids, mask)
    return played


def texts(tokenizer: Any, dialogue: Sequence[Played]) -> list[str]:
    """The texts of the answers of a played dialogue."""
    return tokenizer.batch_decode([turn.answer for turn in dialogue], skip_special_tokens=True)
