# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Rows of data sets, brought into the schema of `rxt_hf.data.readers`.

Each field is checked here, so that nothing behind it meets a wrong type; a `ValueError` begins with the field's name.
A column or field that is null is as good as not there.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

ROLES = ("system", "user", "tool", "assistant")
# names in `from` of what is called ShareGPT
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"} | {role: role for role in ROLES}
# columns that may be null, which counts as missing
COLUMNS = {"interactions", "messages", "conversations", "query", "answer", "instruction", "input", "output"}
COLUMNS |= {"system", "history", "probes"}
FIELDS = {"query", "answer", "answers", "instruction", "role", "thinking", "tool_calls", "recall", "rejected"}
FIELDS |= {"train", "weight"}
# what an interaction has no place for: left out, the answers would be learned without what they speak of
NO_PLACE = ("tools", "functions", "documents", "images", "videos", "audios")
LAYOUTS = "interactions, messages, conversations, query and answer, or instruction and output"


def to_episode(row: Any) -> dict[str, Any] | None:
    r"""
    An episode of a row of one of these layouts, whose other columns are kept:

        interactions                     see `rxt_hf.data.readers`
        messages                         a chat, see [`split_messages`]
        conversations                    the same with `from` (human, gpt, system, tool) and `value`
        query, answer                    one interaction
        instruction, (input,) output     one interaction, whose query is the lines of both

    All but the first take `system`, a system prompt; the last two take `history`, pairs of earlier queries and
    answers. With `weight` 0, or `train` false, beside the turns of a chat none of them is learned.

    Returns: None for a chat in which nothing is answered.
    Raises: `ValueError` for any other row, with the name of the field.
    """
    given = _object(row, "a row")
    columns = _without_null(given, COLUMNS)
    if found := [name for name in NO_PLACE if given.get(name) not in (None, "", "[]", [], {})]:
        raise ValueError(f"{found[0]} is not read: describe it in a system message, or leave the column out.")
    is_split = "interactions" in columns
    if is_split:
        interactions = _interactions(columns.pop("interactions"))
    elif "messages" in columns:
        interactions = split_messages(columns.pop("messages"))
    elif "conversations" in columns:
        interactions = _split_conversations(columns.pop("conversations"))
    elif "query" in columns and "answer" in given:
        beside = {name: columns.pop(name) for name in ("system", "history", "probes") if name in columns}
        turn = _interaction(columns | {"answer": given["answer"]}, "")
        interactions, columns = [*_history(beside.pop("history", [])), turn], beside
    elif {"instruction", "output"} <= set(columns):
        said = [checked_text(columns.pop(name), name) for name in ("instruction", "input") if name in columns]
        turn = dict[str, Any](query="\n".join(filter(None, said)), answer=_answer(columns.pop("output"), "output"))
        beside = {name: columns.pop(name) for name in ("train", "weight") if name in columns}
        turn |= {} if _is_learned(beside, "") else {"train": False}
        interactions = [*_history(columns.pop("history", [])), turn]
    else:
        raise ValueError(f"expected {LAYOUTS}; got the columns {sorted(map(str, columns))}.")
    for name in ("history", "system")[: 1 + is_split]:
        if columns.get(name):
            raise ValueError(f"{name} stands beside turns, among which it belongs: leave the column out.")
    if not _is_learned(columns, ""):
        interactions = [turn | {"train": False} for turn in interactions]
    if not is_split and (system := checked_text(columns.pop("system", ""), "system")):
        if interactions and interactions[0]["query"] is None:
            raise ValueError("system stands beside a system message: give one of them.")
        interactions.insert(0, {"query": None, "answer": None, "instruction": system})
    if not is_split and all(turn["answer"] is None for turn in interactions):
        return None
    _check_kind(interactions)
    if "probes" in columns:
        if isinstance(interactions[0]["query"], list):
            raise ValueError("probes are text, and interactions token ids.")
        columns["probes"] = [
            _probe(probe, f"probes[{n}]") for n, probe in enumerate(_list(columns["probes"], "probes"))
        ]
    return columns | {"interactions": interactions}


def split_messages(
    messages: Sequence[Mapping[str, Any]], name: str = "messages", content: str = "content"
) -> list[dict[str, Any]]:
    r"""
    Splits a chat into interactions, each of which the chat template renders alone.

    A system message becomes an interaction of its own, as the memory takes it. Consecutive messages of one role are
    joined by a line break. A user or tool message without an answer at the end is dropped; an assistant that speaks
    first answers an empty query. The result of a tool is the query of the next interaction (`role` "tool"). An
    assistant message with `weight` 0, or `train` false, is not learned.

    Args:
        name, content (`str`): what errors call the list and the text of a message.

    Raises:
        `ValueError` for what the template cannot say: other roles, content that is not text, an empty answer, a user,
        tool or system message straight after one of another role that is still unanswered, and a message that follows
        a tool call.
    """
    numbered = [(f"{name}[{n}]", _object(each, f"{name}[{n}]")) for n, each in enumerate(_list(messages, name))]
    interactions: list[dict[str, Any]] = []
    pending: dict[str, Any] | None = None
    for role, group in groupby(numbered, key=lambda item: item[1].get("role")):
        said = list(group)
        if role not in ROLES:
            raise ValueError(f"{said[0][0]}: the role {_shown(role)} is unknown: use system, user, assistant or tool.")
        text = "\n".join(filter(None, (_content(message, field, content) for field, message in said)))
        if role == "assistant":
            interactions.append((pending or {"query": ""}) | {"answer": text} | _beside_answer(said))
            pending = None
        elif pending is not None:
            before = pending.get("role", "user")
            raise ValueError(f"{said[0][0]}: a {role} message follows a {before} message that has no answer.")
        elif role == "system":
            interactions.append({"query": None, "answer": None, "instruction": text})
        else:
            pending = {"query": text, "answer": None} | ({"role": "tool"} if role == "tool" else {})
    return interactions


def _split_conversations(conversations: Any) -> list[dict[str, Any]]:
    messages, content = [], "value"
    for number, said in enumerate(_list(conversations, "conversations")):
        field = f"conversations[{number}]"
        speaker = _object(said, field).get("from", said.get("role"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"{field}.from is {_shown(speaker)}, expected one of {', '.join(SPEAKERS)}.")
        content = "value" if "value" in said else "content"
        messages.append({**said, "role": SPEAKERS[speaker], content: said.get(content)})
    return split_messages(messages, "conversations", content)


def _content(message: Mapping[str, Any], field: str, name: str) -> str:
    content, field = message.get(name), f"{field}.{name}"
    if isinstance(content, list):
        content = "".join(_part(part, f"{field}[{number}]") for number, part in enumerate(content))
    if message["role"] != "assistant":
        return checked_text(content, field)
    beside = any(message.get(each) for each in ("tool_calls", "reasoning_content", "thinking"))
    return "" if content is None and beside else _answer(content, field, beside=beside)


def _part(part: Any, field: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise ValueError(f"{field} must be text, {{'type': 'text', 'text': '...'}}, got {_shown(part)}.")
    return checked_text(part.get("text"), f"{field}.text")


def _beside_answer(said: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    thoughts = []
    for field, message in said:
        if message.get("function_call") is not None:
            raise ValueError(f"{field}.function_call is not read: use tool_calls.")
        for name in ("reasoning_content", "thinking"):
            if message.get(name) is not None:
                thoughts.append(checked_text(message[name], f"{field}.{name}"))
                break
    if any(message.get("tool_calls") for _, message in said[:-1]):
        raise ValueError(
            f"{said[-1][0]}: an assistant message follows a tool call: the result of the tool must come between."
        )
    if thinking := "\n".join(filter(None, thoughts)):
        found["thinking"] = thinking
    field, last = said[-1]
    if last.get("tool_calls"):
        found["tool_calls"] = _tool_calls(last["tool_calls"], f"{field}.tool_calls")
    learned = {_is_learned(message, f"{field}.") for field, message in said}
    if len(learned) > 1:
        raise ValueError(f"{said[0][0]}: this and the next assistant message are one answer, but differ in weight.")
    return found if learned == {True} else found | {"train": False}


def _interactions(turns: Any) -> list[dict[str, Any]]:
    found = [_interaction(turn, f"interactions[{number}]") for number, turn in enumerate(_list(turns, "interactions"))]
    if not found:
        raise ValueError("interactions is empty.")
    return found


def _check_kind(interactions: Sequence[Mapping[str, Any]]) -> None:
    """An episode is token ids throughout, or text."""
    fields = {
        f"interactions[{number}].{name}": isinstance(turn[name], list) and name != "tool_calls"
        for number, turn in enumerate(interactions)
        for name in ("query", "answer", "rejected", "instruction", "thinking", "tool_calls")
        if turn.get(name) is not None
    }
    if len(set(fields.values())) == 2:
        ids, text = (next(field for field in fields if fields[field] is kind) for kind in (True, False))
        raise ValueError(f"{ids} is token ids, and {text} is not.")


def _interaction(given: Any, field: str) -> dict[str, Any]:
    """The interaction without what is null and optional, and with `train` only if it is False."""
    turn = _without_null(_object(given, field), FIELDS)
    if missing := {"query", "answer"} - set(given):
        raise ValueError(f"{field} lacks {sorted(missing)}, it has {sorted(map(str, given))}.")
    inside = f"{field}." if field else ""
    for name in ("query", "instruction", "thinking"):
        if name in turn and not (name == "query" and isinstance(turn[name], list)):
            checked_text(turn[name], inside + name)
    if turn.get("role", "user") not in ("user", "tool"):
        raise ValueError(f"{inside}role is {_shown(turn['role'])}, expected user or tool.")
    if "tool_calls" in turn:
        _tool_calls(turn["tool_calls"], f"{inside}tool_calls")
    beside = bool(turn.get("thinking") or turn.get("tool_calls"))
    for name in ("query", "answer", "rejected"):
        if isinstance(turn.get(name), list):
            _token_ids(turn[name], inside + name, is_answer=name != "query")
        elif name in turn and name != "query":
            _answer(turn[name], inside + name, beside=beside and name == "answer")
    if "query" not in turn and ("answer" in turn or "instruction" not in turn):
        raise ValueError(f"{inside}query is null, which only a system prompt, an instruction alone, may have.")
    if turn.get("recall"):
        _check_recall(turn, inside)
    is_learned = _is_learned(turn, inside)
    turn = {"query": None, "answer": None} | {name: turn[name] for name in turn if name not in ("train", "weight")}
    return turn if is_learned else turn | {"train": False}


def _check_recall(turn: Mapping[str, Any], inside: str) -> None:
    if not isinstance(turn.get("answer"), str):
        raise ValueError(f"{inside}recall marks words of an answer, which is no text here.")
    for number, span in enumerate(_list(turn["recall"], f"{inside}recall")):
        if not isinstance(span, list | tuple) or len(span) != 3 or any(type(value) is not int for value in span):
            raise ValueError(f"{inside}recall[{number}] is {_shown(span)}, expected [start, end, distance].")


def _probe(given: Any, field: str) -> dict[str, Any]:
    probe = _without_null(_object(given, field), FIELDS)
    if missing := {"query", "distance"} - set(probe):
        raise ValueError(f"{field} lacks {sorted(missing)}, it has {sorted(map(str, probe))}.")
    answers = _list(probe.get("answers", [probe[name] for name in ("answer",) if name in probe]), f"{field}.answers")
    if not answers:
        raise ValueError(f"{field} has neither answer nor answers.")
    checked_text(probe["query"], f"{field}.query")
    for number, answer in enumerate(answers):
        checked_text(answer, f"{field}.answers[{number}]")
    checked_text(probe.setdefault("answer", answers[0]), f"{field}.answer")
    if type(probe["distance"]) is not int or probe["distance"] < 1:
        raise ValueError(f"{field}.distance is {_shown(probe['distance'])}, expected a number of turns from 1.")
    return probe | {"answers": list(answers)}


def _history(pairs: Any) -> list[dict[str, Any]]:
    turns = []
    for number, pair in enumerate(_list(pairs, "history")):
        field = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{field} is {_shown(pair)}, expected [query, answer].")
        turns.append({"query": checked_text(pair[0], f"{field}[0]"), "answer": _answer(pair[1], f"{field}[1]")})
    return turns


def _tool_calls(calls: Any, field: str) -> list[Any]:
    for number, call in enumerate(_list(calls, field)):
        function = _object(call, f"{field}[{number}]").get("function") or call
        inside = f"{field}[{number}].function"
        checked_text(_object(function, inside).get("name"), f"{inside}.name")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | Mapping):
            raise ValueError(f"{inside}.arguments must be an object or its JSON, got {_shown(arguments)}.")
        try:
            checked_text(json.dumps(arguments, ensure_ascii=False), f"{inside}.arguments")
        except (RecursionError, TypeError) as error:
            raise ValueError(f"{inside}.arguments cannot be written as JSON: {error}.") from error
    return list(calls)


def _is_learned(given: Mapping[str, Any], inside: str) -> bool:
    weight, train = given.get("weight"), given.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise ValueError(f"{inside}weight is {_shown(weight)}, expected 0 (not learned) or 1.")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{inside}train is {_shown(train)}, expected false (not learned) or true.")
    return weight != 0 and train is not False


def _answer(value: Any, field: str, *, beside: bool = False) -> str:
    if not checked_text(value, field).strip() and not beside:
        raise ValueError(f"{field} is empty, and an answer of nothing is not learned: leave the turn out.")
    return value


def checked_text(value: Any, field: str) -> str:
    """The value itself; raises `ValueError` if it is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text, got {_shown(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} holds {value[error.start]!a}, half of a surrogate pair, which is no text."
        ) from error
    return value


def _token_ids(value: Sequence[Any], field: str, *, is_answer: bool) -> None:
    if any(type(token) is not int or token < 0 for token in value):
        raise ValueError(f"{field} must be text, or token ids from 0, got {_shown(value)}.")
    if is_answer and not value:
        raise ValueError(f"{field} is empty, and an answer of nothing is not learned: leave the turn out.")


def _list(value: Any, field: str) -> Sequence[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        raise ValueError(f"{field} is a text that holds JSON: parse it, a list was expected.")
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(f"{field} must be a list, got {_shown(value)}.")
    return value


def _without_null(given: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None or name not in names}


def _object(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} must be an object, got {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value):.60}"
