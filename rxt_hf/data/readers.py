# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Readers that bring every source into one schema, and the data set that training takes.

An interaction is a mapping with `query` and `answer`, and optionally

    instruction   a system prompt; alone (`query` is None) it is an interaction of its own
    role          "tool" if `query` is the result of a tool
    thinking, tool_calls    what the assistant said beside `answer`
    train         False if the answer is written into the memory and not learned
    recall        `[[start, end, distance], ...]`: words of `answer`, as character spans, that only earlier turns tell

`query` and `answer` are texts, or lists of token ids. A turn without an answer (None) is
written into the memory, and nothing is learned from it. An episode is a mapping with `interactions`, and optionally
`probes`: questions asked after the last interaction, each from the same memory.
"""

import copy
import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ..chat_template import CONTROL_TOKENS, encode_chats, encode_texts, escape_texts, render_chats
from .files import decode, parse_json, read_rows
from .rows import to_episode

logger = logging.get_logger(__name__)

ENDINGS = (".jsonl", ".jsonl.gz", ".json")
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?")


class Episode(dict):
    """An episode that knows the file and line, or the row, that it was read from."""

    place = "An episode"


def converted_rows(
    source: Any, convert: Callable[[Any], Any], split: str | None = None, *, skip_bad_rows: bool = False
) -> Iterator[tuple[str, Any]]:
    """
    Yields the place of each row of a source of [`read_episodes`] and what `convert` makes of the row, unless it is
    None.

    Raises: `ValueError` that begins with the place for a row that is not JSON or that `convert` refuses.
    """
    if isinstance(source, str | os.PathLike):
        path = find_file(source, split)
        rows = _hub_rows(str(source), split) if path is None else read_rows(path)
    elif isinstance(source, Mapping):
        if split not in source:
            raise FileNotFoundError(f"There is no split {split!r}, only {sorted(source)}.")
        rows = ((f"Row {number}", row) for number, row in enumerate(source[split]))
    else:
        rows = ((f"Row {number}", row) for number, row in enumerate(source))
    total, refused, reasons = 0, 0, []
    try:
        for place, row in rows:
            total += 1
            try:
                found = convert(parse_json(decode(row).strip()) if isinstance(row, bytes) else row)
            except ValueError as error:
                if not skip_bad_rows:
                    raise ValueError(f"{place}: {error}") from error
                refused += 1
                reasons += [f"{place}: {error}"] if refused <= 3 else []
                continue
            if found is not None:
                yield place, found
        if refused and refused == total:
            raise ValueError(f"None of the {total} rows can be read; {reasons[0]}")
    finally:
        if refused:
            logger.warning(f"{refused} of {total} rows are left out: {' '.join(reasons)}")


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON or JSONL file, packed or not; raises `ValueError` with the line of a bad row."""
    for place, row in converted_rows(path, lambda row: row):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: this is a {type(row).__name__}, expected an object.")
        yield row


def read_episodes(source: Any, split: str | None = None, *, skip_bad_rows: bool = False) -> Iterator[dict[str, Any]]:
    r"""
    Reads episodes from a JSONL file or a JSON array, a folder of them, a data set of the Hub, or any rows.

    See [`rxt_hf.data.rows.to_episode`] for what a row may hold. Conversations in which nothing is answered are left
    out.

    Args:
        source (`str`, `os.PathLike`, `Mapping` or `Iterable[Mapping]`): a path; "owner/name" or "owner/name:subset"
            of the Hub; rows; or rows by split, as a `datasets.DatasetDict` has them.
        split (`str`, *optional*): in a folder, the name of the file: `train` reads `train.jsonl`, `train.jsonl.gz` or
            `train.json`.
        skip_bad_rows (`bool`): leaves out rows that cannot be read; a warning at the end says how many, and why.

    Raises:
        `FileNotFoundError` if the file or the split is missing; `ValueError`, with file, line and field, for a row of
        another layout, and for an empty file.

    Example:

    ```python
    >>> from rxt_hf import read_episodes

    >>> said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    >>> next(read_episodes([{"messages": said}]))
    {'interactions': [{'query': 'Hello', 'answer': 'Hi!'}]}

    ```
    """
    for place, found in converted_rows(source, to_episode, split, skip_bad_rows=skip_bad_rows):
        episode = Episode(found)
        episode.place = place
        yield episode


def sampled(
    source: str | os.PathLike, split: str, number: int | None, *, skip_bad_rows: bool = False
) -> list[dict[str, Any]]:
    """Returns `number` random dialogues of a split, the same ones every time, or all of them without a number."""
    dialogues = list(read_episodes(source, split, skip_bad_rows=skip_bad_rows))
    if not dialogues:
        raise ValueError(f"{source} holds no dialogue in which something is answered.")
    return dialogues if number is None else Random(0).sample(dialogues, min(number, len(dialogues)))


def find_file(source: str | os.PathLike, split: str | None, endings: Sequence[str] = ENDINGS) -> Path | None:
    """
    Returns the file of a source of [`read_episodes`], or None for a data set of the Hub.

    Raises: `FileNotFoundError` if there is neither, or if a folder has no file of the split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = [path / f"{split}{ending}" for ending in endings]
        if found := [file for file in files if file.is_file()]:
            return found[0]
        splits = sorted({file.name.split(".json")[0] for file in path.glob("*.json*")})
        raise FileNotFoundError(f"{path} has no split {split!r}, only {splits}.")
    if path.exists():
        return path
    if is_hub_name(source):
        return None
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source can only be a data set of the Hub: it is spelled like one, and no file or folder is there."""
    is_spelled_so = isinstance(source, str) and HUB_NAME.fullmatch(source) and not source.endswith((*ENDINGS, ".txt"))
    return bool(is_spelled_so) and not Path(source).exists()


def _hub_rows(source: str, split: str | None) -> Iterator[tuple[str, Any]]:
    if split is None:
        raise ValueError(f"{source} is a data set of the Hub: name the split to read.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source} is a data set of the Hub, which needs: pip install 'rxt-hf[train]'.") from error
    name, _, subset = source.partition(":")
    try:
        rows = load_dataset(name, subset or None, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} is no file or folder, and cannot be read from the Hub: {reason}") from error
    for number, row in enumerate(rows):
        yield f"{source}, {split}, row {number}", row


def cut_episode(episode: Mapping[str, Any], max_turns: int) -> dict[str, Any]:
    """Returns the first `max_turns` interactions, with the probes whose value is last said within them."""
    cut = max(0, len(episode["interactions"]) - max_turns)
    shorter = dict(episode, interactions=episode["interactions"][:max_turns])
    if cut and episode.get("probes"):
        shorter["probes"] = [
            dict(probe, distance=probe["distance"] - cut) for probe in episode["probes"] if probe["distance"] > cut
        ]
    return shorter


class Episodes(Dataset):
    r"""
    Encoded episodes, as [`RxTEpisodeCollator`] takes them: `{"input_ids", "labels"}`, each a list of turns.

    Labels are -100 outside of answers that are learned. Encoding is done once, at creation.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): a tokenizer with a chat template of RxT; None for dialogues of token
            ids.
        dialogues (`Iterable[Mapping]`): episodes, as [`read_episodes`] yields them.
        max_turns (`int`, *optional*): longer episodes are cut to their first `max_turns` interactions.
        max_tokens (`int`, *optional*): an episode ends before its first interaction of more tokens. Without it,
            interactions longer than `tokenizer.model_max_length` raise.
        vocab_size (`int`, *optional*): size of the model's vocabulary; token ids outside of it raise.

    Attributes:
        dialogues (`list`): the source of each item, cut as the item is.
        recall_distances (`list`): for each item None if its source marks no `recall`, else for each token of each
            turn the number of turns since the word was last said, and 0 outside of the marked words.
        sizes (`list[tuple[int, int]]`): turns of each item, and tokens of its longest turn.

    Dialogues without anything to learn are left out; a warning says how many.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        dialogues: Iterable[Mapping[str, Any]],
        *,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        vocab_size: int | None = None,
    ):
        for name, value in (("max_turns", max_turns), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None.")
        if tokenizer is not None and max_tokens is not None:
            # a view without limit: what is too long is cut here, where encode_interactions would raise
            tokenizer = copy.copy(tokenizer)
            tokenizer.model_max_length = int(1e30)
        self.dialogues: list[dict[str, Any]] = []
        self.recall_distances: list[list[list[int]] | None] = []
        self._features: list[dict[str, list[list[int]]]] = []
        left_out = 0
        for number, dialogue in enumerate(dialogues):
            try:
                rows = encode_turns(tokenizer, dialogue["interactions"][:max_turns], vocab_size)
            except ValueError as error:
                raise ValueError(f"{getattr(dialogue, 'place', f'Dialogue {number}')}: {error}") from error
            too_long = (turn for turn, (ids, _) in enumerate(rows) if max_tokens is not None and len(ids) > max_tokens)
            kept = next(too_long, len(rows))
            if all(label == -100 for _, labels in rows[:kept] for label in labels):
                left_out += 1
                continue
            input_ids, labels = map(list, zip(*rows[:kept], strict=True))
            self._features.append({"input_ids": input_ids, "labels": labels})
            self.dialogues.append(cut_episode(dialogue, kept))
            self.recall_distances.append(_recall_distances(tokenizer, self.dialogues[-1]["interactions"], input_ids))
        if left_out:
            logger.warning(f"{left_out} of {left_out + len(self)} dialogues have no answer within the limits.")

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> dict[str, list[list[int]]]:
        return self._features[index]

    @property
    def recall_labels(self) -> list[list[list[int]] | None]:
        """Labels of the marked words alone, -100 elsewhere: in place of `labels` they give the loss on recall."""
        return [
            distances
            and [
                [token if distance else -100 for token, distance in zip(*turn, strict=True)]
                for turn in zip(item["input_ids"], distances, strict=True)
            ]
            for item, distances in zip(self._features, self.recall_distances, strict=True)
        ]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(len(item["input_ids"]), max(map(len, item["input_ids"]))) for item in self._features]


def recall_masks(episodes: Episodes) -> list[list[list[bool]]]:
    r"""
    For each token of each turn of each episode whether it is recalled: a label that only earlier turns of its dialogue
    tell. Where a dialogue marks its recalled words (`recall`) it is those; elsewhere the tokens of an answer that an
    earlier turn has, its own query has not, and fewer than a twentieth of the dialogues have.
    """
    items = [episodes[index] for index in range(len(episodes))]
    spread = Counter(token for item in items for token in {token for ids in item["input_ids"] for token in ids})
    rare = {token for token, count in spread.items() if count < max(len(episodes) / 20, 2)}
    masks = []
    for item, marked in zip(items, episodes.recall_labels, strict=True):
        rows, earlier = [], set()
        for turn, (ids, labels) in enumerate(zip(item["input_ids"], item["labels"], strict=True)):
            if marked is not None:
                rows.append([token != -100 for token in marked[turn]])
            else:
                query = {token for token, label in zip(ids, labels, strict=True) if label == -100}
                rows.append([token in rare and token in earlier and token not in query for token in labels])
            earlier.update(ids)
        masks.append(rows)
    return masks


def said(turn: Mapping[str, Any]) -> list[str]:
    """Returns the texts of an interaction in order, without missing ones and lists of ids."""
    texts = (turn.get(name) for name in ("instruction", "query", "answer"))
    return [text for text in texts if text and isinstance(text, str)]


def encode_turns(
    tokenizer: PreTrainedTokenizerFast | None, turns: Sequence[Mapping[str, Any]], vocab_size: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """
    Encodes all turns in one call and returns ids and labels of each, all -100 where `train` is False; raises
    `ValueError` for token ids that a model with `vocab_size` does not have.
    """
    rows = _encode_all(tokenizer, turns)
    if vocab_size is not None and (beyond := [token for ids, _ in rows for token in ids if token >= vocab_size]):
        raise ValueError(f"The token id {beyond[0]} is outside of the model's vocabulary of {vocab_size} tokens.")
    return [
        (ids, [-100] * len(ids)) if turn.get("train") is False else (ids, labels)
        for turn, (ids, labels) in zip(turns, rows, strict=True)
    ]


def _encode_all(
    tokenizer: PreTrainedTokenizerFast | None, turns: Sequence[Mapping[str, Any]]
) -> list[tuple[list[int], list[int]]]:
    if any(isinstance(turn["query"], list) for turn in turns):
        return [_encode_ids(turn) for turn in turns]
    if tokenizer is None:
        raise ValueError("Dialogues of text need a tokenizer: only those of token ids are encoded without one.")
    encoded = encode_chats(tokenizer, [_messages(turn) for turn in turns])
    return list(zip(encoded["input_ids"], encoded["labels"], strict=True))


def _encode_ids(turn: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """`[BOS][Q]query[A]answer[EOS]`, where the control tokens have the first ids, as `train_tokenizer` gives them."""
    bos, query_id, answer_id, eos = (
        list(CONTROL_TOKENS).index(f"{name}_token") for name in ("bos", "query", "answer", "eos")
    )
    prompt = [bos, query_id, *turn["query"], answer_id]
    target = [] if turn["answer"] is None else [*turn["answer"], eos]
    return prompt + target, [-100] * len(prompt) + target


def _messages(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An interaction as the chat template takes it."""
    contents = {"system": turn.get("instruction"), turn.get("role") or "user": turn["query"]}
    messages = [{"role": role, "content": text} for role, text in contents.items() if text is not None]
    if turn["answer"] is not None:
        beside = {"reasoning_content": turn.get("thinking"), "tool_calls": turn.get("tool_calls")}
        answer = {"role": "assistant", "content": turn["answer"]}
        messages.append(answer | {name: value for name, value in beside.items() if value})
    return messages


def _recall_distances(
    tokenizer: PreTrainedTokenizerFast | None, turns: Sequence[Mapping[str, Any]], input_ids: Sequence[list[int]]
) -> list[list[int]] | None:
    if tokenizer is None or all(turn.get("recall") is None for turn in turns):
        return None
    rows = [[0] * len(ids) for ids in input_ids]
    for turn, row in zip(turns, rows, strict=True):
        if not turn.get("recall"):
            continue
        ((rendered, start),) = render_chats(tokenizer, [_messages(turn)])
        offsets = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        thoughts, said = escape_texts(tokenizer, [turn.get("thinking") or "", turn["answer"]])
        text_start = rendered.index(said, start + len(thoughts))
        places = _places(rendered[text_start:], turn["answer"])
        for position, span in enumerate(offsets):
            # a token may begin with the space that a template puts before the answer
            first, last = (places[max(offset - text_start, 0)] for offset in span)
            marked = [distance for begin, end, distance in turn["recall"] if begin < last and first < end]
            row[position] = max(1, min(marked)) if marked else 0
    return rows


def _places(rendered: str, text: str) -> list[int]:
    """Returns, for each character of the rendered text and for its end, the characters of `text` before it."""
    places = [0]
    for character in rendered:
        places.append(places[-1] + (text[places[-1] : places[-1] + 1] == character))
    return places


def pack_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], length: int
) -> Iterator[dict[str, list[int]]]:
    r"""
    Packs a corpus of plain text into rows of `length` tokens, for the stages before dialogues.

    The documents follow each other as `[BOS]text[EOS]` and are cut wherever a row is full: no token is lost or
    doubled, and only the last row may be shorter. Text that spells a control token stays text.

    Returns:
        `Iterator[dict]`: `{"input_ids", "labels"}`, equal lists, as [`RxTEpisodeCollator`] takes single interactions.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1.")
    documents, waiting = iter(texts), []
    while batch := list(islice(documents, 256)):
        for ids in encode_texts(tokenizer, batch):
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            waiting += [*begin, *ids, tokenizer.eos_token_id]
        full = len(waiting) - len(waiting) % length
        for start in range(0, full, length):
            row = waiting[start : start + length]
            yield {"input_ids": row, "labels": list(row)}
        del waiting[:full]
    if waiting:
        yield {"input_ids": waiting, "labels": list(waiting)}
