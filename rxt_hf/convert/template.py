# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The pieces that a pretrained language model's own chat template puts around the texts of one turn."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from ..chat_template import CUT, encode_interactions, use_pieces

_MARK = "@@text@@"
_SAMPLES = (("What is 7 plus 8?", "It is 15."), ("hello", "Yes, of course!\nAnd you?"))


class TurnPieces(NamedTuple):
    """
    What a chat template says around a user's and an assistant's text.

    Args:
        begin (`str`): at the start of a conversation only, without a default system message.
        query, answer (`str`): before the user's text, and between it and the assistant's.
        end (`str`): behind the assistant's text.
    """

    begin: str
    query: str
    answer: str
    end: str


def turn_pieces(tokenizer: Any) -> TurnPieces:
    """The pieces of a tokenizer's chat template; raises `ValueError` for one that they cannot be told from."""
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template.")
    parts = _rendered(tokenizer, "user", "assistant", "user", "assistant")
    if parts is None:
        raise ValueError("The chat template does not show the texts of two turns as they are.")
    head, answer, between, _, end = parts
    query = between.removeprefix(end)
    # what closes the last answer may lack a line break that stands between turns
    query = head if query.endswith(head) else query
    if not head.endswith(query):
        raise ValueError(f"The chat template puts {head!r} before the first query and {query!r} before others.")
    begin = tokenizer.bos_token or ""
    is_before = head != query and bool(begin) and head.startswith(begin) and not query.startswith(begin)
    return TurnPieces(begin if is_before else "", query, answer, end)


def source_tokenizer(tokenizer: PreTrainedTokenizerFast, max_length: int | None = None) -> PreTrainedTokenizerFast:
    r"""
    A copy of a pretrained model's tokenizer whose template of one interaction says what the model's own says of one
    turn alone, without the system message that some put before a conversation that has none. An interaction ends with
    the token that ends an answer.

    A system message, the result of a tool and thinking stand in the pieces that the model's template has for them.
    Where it has none they are text within the user's or the assistant's piece: the system message before the query,
    `<tool_response>` around a result, `<think>` around thinking. Calls of tools are JSON between `<tool_call>` and
    `</tool_call>` always. Such text, unlike special tokens, can be typed.

    Raises:
        `ValueError` where the template has no such pieces, or the tokenizer would not read the same turn alike.
    """
    found = turn_pieces(tokenizer)
    added = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
    special = [token.content for token in added if token.special]
    ends = [match.end() for text in special if (match := re.search(re.escape(text), found.end))]
    if not ends:
        raise ValueError(f"The chat template puts no special token behind an answer, but {found.end!r}.")
    tail, found = found.end, found._replace(end=found.end[: min(ends)])
    pieces = _of_queries(found) | _of_system(tokenizer, found)
    pieces |= _of_tools(tokenizer, pieces, found, tail) | _of_thinking(tokenizer, pieces)
    for token in added:
        # a token that takes in white space beside it; here it takes none, so that text stays as it is
        for name, piece in pieces.items():
            piece = re.sub(re.escape(token.content) + r"\s+", token.content, piece) if token.rstrip else piece
            pieces[name] = re.sub(r"\s+" + re.escape(token.content), token.content, piece) if token.lstrip else piece
    cut = _cut(pieces, [token.content for token in added if token.content.strip()])
    converted = use_pieces(tokenizer, cut, int(1e30))
    _check_samples(tokenizer, converted, found)
    converted.model_max_length = max_length or tokenizer.model_max_length
    return converted


def _rendered(tokenizer: Any, *roles: str, **fields: Any) -> list[str] | None:
    """What stands around the texts of these messages, or None if the template does not show each of them once."""
    messages: list[dict[str, Any]] = [{"role": role, "content": _MARK} for role in roles]
    messages[-1] |= fields
    try:
        parts = tokenizer.apply_chat_template(messages, tokenize=False).split(_MARK)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        # templates refuse what they do not know, or fail at it
        return None
    return parts if len(parts) == len(roles) + len(fields) + 1 else None


def _of_queries(found: TurnPieces) -> dict[str, str]:
    return {"query": found.begin + found.query, "query_end": found.answer, "end": found.end}


def _of_system(tokenizer: Any, found: TurnPieces) -> dict[str, str]:
    parts = _rendered(tokenizer, "system", "user")
    before, between = (found.begin + found.query, "\n\n") if parts is None else parts[:2]
    close, token, _ = between.partition(found.end.lstrip())
    alone = close + token if token else between.rstrip() + found.end
    return {"system": before, "system_query": between, "system_end": alone}


def _of_tools(tokenizer: Any, pieces: Mapping[str, str], found: TurnPieces, tail: str) -> dict[str, str]:
    calls = {"tool_call": "<tool_call>\n", "tool_call_end": "\n</tool_call>", "tool_call_separator": "\n"}
    # an answer before the last query is shown without the thinking that some templates put into the last one
    parts = _rendered(tokenizer, "user", "assistant", "tool", "assistant", "user", "assistant")
    between = pieces["system_query"]
    if parts is not None and between.endswith(found.query):
        tool = parts[2].removeprefix(tail)
        return calls | {
            "tool": found.begin + tool,
            "system_tool": between.removesuffix(found.query) + tool,
            "tool_end": parts[3],
        }
    opened = "<tool_response>\n"
    return calls | {
        "tool": pieces["query"] + opened,
        "system_tool": between + opened,
        "tool_end": "\n</tool_response>" + pieces["query_end"],
    }


def _of_thinking(tokenizer: Any, pieces: Mapping[str, str]) -> dict[str, str]:
    parts = _rendered(tokenizer, "user", "assistant", reasoning_content=_MARK)
    if parts is not None and parts[1].startswith(pieces["query_end"]):
        return {"thinking": parts[1].removeprefix(pieces["query_end"]), "thinking_end": parts[2]}
    return {"thinking": "<think>\n", "thinking_end": "\n</think>\n\n"}


def _cut(pieces: dict[str, str], tokens: Sequence[str]) -> dict[str, str]:
    """
    The pieces with a cut where a text follows, before spaces, which are of one token with the word behind them. Behind
    an added token there is nothing to cut.
    """

    def cut(piece: str) -> str:
        head = piece.rstrip(" ")
        return head + CUT * (not head.endswith(tuple(tokens))) + piece[len(head) :]

    names = ("query", "tool", "system", "system_query", "system_tool", "thinking_end", "tool_call")
    done = pieces | {name: cut(pieces[name]) for name in names}
    done |= {name: pieces[name].rstrip(" ") for name in ("query_end", "tool_end")}
    # what ends a prompt; spaces behind it are the answer's
    opened, space = done["query_end"], pieces["query_end"][len(done["query_end"]) :]
    done |= {"answer": cut(opened)[len(opened) :], "answer_start": space}
    return done | {"thinking": cut(opened + space + pieces["thinking"])[len(opened) :]}


def _check_samples(tokenizer: Any, converted: PreTrainedTokenizerFast, found: TurnPieces) -> None:
    """Raises `ValueError` unless a turn has the ids that the pretrained tokenizer gives it."""
    for query, answer in _SAMPLES:
        text = f"{found.begin}{found.query}{query}{found.answer}{answer}{found.end}"
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = encode_interactions(converted, [query], [answer])["input_ids"][0]
        if ids != expected:
            raise ValueError(f"The tokenizer reads {text!r} as {expected}, and as {ids} in pieces.")
