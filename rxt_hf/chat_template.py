# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The chat template of one interaction, its control tokens or other pieces, and tokenizers that speak it."""

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

CONTROL_TOKENS: dict[str, str] = {
    "pad_token": "[PAD]",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "mask_token": "[MASK]",
    "query_token": "[Q]",
    "answer_token": "[A]",
    "thinking_token": "[T]",
    "instruction_token": "[I]",
    "tool_result_token": "[U]",
    "tool_call_token": "[C]",
}

_NEEDED = ("bos_token", "instruction_token", "query_token", "answer_token", "eos_token")
# what stands before, between and behind the texts of an interaction; `answer` or `thinking` ends a prompt
CONTROL_PIECES: dict[str, str] = {
    "query": "[BOS][Q]",
    "tool": "[BOS][U]",
    "system": "[BOS][I]",
    "system_query": "[Q]",
    "system_tool": "[U]",
    "system_end": "[EOS]",
    "query_end": "",
    "tool_end": "",
    "answer": "[A]",
    "answer_start": "",
    "thinking": "[T]",
    "thinking_end": "[A]",
    "tool_call": "[C]",
    "tool_call_end": "",
    "tool_call_separator": "",
    "end": "[EOS]",
}
_BEFORE_TEXT = ("query", "tool", "system", "system_query", "system_tool", "thinking_end", "tool_call")
# the roles of interactions that have nothing beside their texts
_PLAIN = (("user",), ("user", "assistant"), ("system",), ("system", "user"), ("system", "user", "assistant"))

# A character that stands for nothing (U+FDD0 is a noncharacter). In text that spells a special token it is put behind
# the first character, so that no special token matches, and the first step of the pre-tokenizer takes it away: it
# comes after that match, and cuts there, so that no vocabulary can hold the whole either. Where U+FDD0 follows such
# a character already, another one is put in: exactly what was put in is taken away again.
ESCAPE = "\ufdd0"
# It is taken away wherever it stands, and the text is cut there. Texts hold no two of these characters in a row: an
# ESCAPE is put behind each. So no token reaches over the end of a prompt, whatever the answer begins with.
CUT = "\ufdd1\ufdd1"

# The parts of a message are joined before they are escaped: "[" and "A]" are harmless, "[A]" is not.
_TEMPLATE = (Path(__file__).parent / "templates" / "chat_template.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=16)
def _escapes(special: tuple[str, ...], behind: str) -> list[tuple[str, list[str]]]:
    """
    For each first character what must not be read as it stands: ESCAPE is put behind the first character of it.
    `behind` are the characters that pieces behind a text begin with.
    """
    spellings: dict[str, list[str]] = {}
    for text in sorted(special):
        spellings.setdefault(text[0], [text[0] + ESCAPE]).append(text)
    for first, texts in spellings.items():
        # occurrences of "aba" can overlap, and replacing would miss one; "a[" may end in a control token behind the
        # text: then every "a" is escaped
        if any(
            _reaches_into(text, behind) or any(text.startswith(text[-n:]) for n in range(1, len(text)))
            for text in texts
        ):
            spellings[first] = [first]
    return list(spellings.items())


def _reaches_into(text: str, behind: str) -> bool:
    """Whether a token of this text can end in one of the pieces that begin with the characters `behind`."""
    return any(character in text[1:] for character in behind)


def _behind(pieces: Mapping[str, str]) -> str:
    """The first characters of all pieces that follow a text."""
    names = set(pieces) - {"query", "tool", "system", "answer_start"}
    return "".join(sorted({pieces[name][0] for name in names if pieces[name]} - {CUT[0]}))


def _guarded(tokens: Iterable[AddedToken], pieces: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the strings that no text may be read as: special tokens, added tokens of the pieces, and the cut."""
    parts = "" if pieces == CONTROL_PIECES else "\n".join(pieces.values())
    texts = [token.content for token in tokens if token.special or (token.content.strip() and token.content in parts)]
    return tuple(texts + [CUT] * (CUT in parts))


@lru_cache(maxsize=16)
def _template(guarded: tuple[str, ...], pieces: tuple[tuple[str, str], ...]) -> str:
    """Returns the chat template of these pieces; no text can be read as one of the guarded strings."""
    escapes = ascii([list(escape) for escape in _escapes(guarded, _behind(dict(pieces)))])
    template = _TEMPLATE.replace("ESCAPES", escapes).replace("ESCAPE", ascii(ESCAPE)[1:-1])
    return template.replace("PIECES", ascii(dict(pieces)))


def _pieces_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, str] | None:
    """Returns the pieces of the tokenizer's template, if this module made it."""
    template = cast(Any, tokenizer.chat_template)
    # other tokenizers may have many templates by name
    return _pieces_in(template) if isinstance(template, str) else None


@lru_cache(maxsize=16)
def _pieces_in(template: str) -> dict[str, str] | None:
    found = re.match(r"\n\{%- set pieces = (\{.*\}) -%\}\n", template)
    return ast.literal_eval(found[1]) if found else None


def source_pieces(tokenizer: PreTrainedTokenizerFast) -> dict[str, str] | None:
    """Returns the pieces of interactions if they come from a pretrained model's chat template, else None."""
    pieces = _pieces_of(tokenizer)
    return None if pieces == CONTROL_PIECES else pieces


CHAT_TEMPLATE = _template(tuple(CONTROL_TOKENS.values()), tuple(CONTROL_PIECES.items()))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, max_length: int = 1024) -> PreTrainedTokenizerFast:
    r"""
    Trains a byte-level BPE tokenizer with the control tokens at ids 0 to 9, in the order of `CONTROL_TOKENS`.

    Any text round-trips byte for byte. Digits are split one by one; a word keeps its leading space. Equal texts give
    an equal tokenizer. The result is a plain `PreTrainedTokenizerFast`: `AutoTokenizer` loads it without custom code.

    Args:
        texts (`Iterable[str]`): training text.
        vocab_size (`int`): upper bound, control tokens included; a small text may give fewer tokens.
        max_length (`int`): longest interaction in tokens, kept as `model_max_length`.

    Raises:
        `ValueError` if `vocab_size` cannot hold the control tokens and the 256 bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(CONTROL_TOKENS) + len(alphabet):
        raise ValueError(
            f"vocab_size={vocab_size} cannot hold {len(CONTROL_TOKENS)} control tokens and {len(alphabet)} bytes: "
            f"use at least {len(CONTROL_TOKENS) + len(alphabet)}."
        )
    backend = Tokenizer(models.BPE())
    # Both splits keep "[", letters and "]" apart, so that no merge of the BPE can spell a control token.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=_added_tokens(), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return _with_template(backend, max_length, CONTROL_PIECES, _control_names())


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, max_length: int | None = None) -> PreTrainedTokenizerFast:
    r"""
    Gives a copy of a pretrained tokenizer the control tokens (new ids at the end) and the chat template of RxT.

    Ids of ordinary text stay as they were, but for the space that SentencePiece puts before a text: it is left out, as
    transformers does behind a special token, and so every text comes back as it was given. No special token of the
    pretrained tokenizer can be typed either. `max_length` defaults to the tokenizer's `model_max_length`.

    Raises:
        `ValueError` if the vocabulary holds the text of a control token as an ordinary token, or a special token that
        text could not be told from.
    """
    rules = _rules(tokenizer)
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        rules[step] = _without_added_spaces(rules[step])
    backend = Tokenizer.from_str(json.dumps(rules))
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    taken = [text for text in CONTROL_TOKENS.values() if text not in special and backend.token_to_id(text) is not None]
    if taken:
        raise ValueError(
            f"The vocabulary holds {taken} as ordinary tokens: text could not be told from control tokens."
        )
    backend.add_special_tokens(_added_tokens())
    return _checked(backend, max_length or tokenizer.model_max_length, CONTROL_PIECES, _control_names())


def use_pieces(
    tokenizer: PreTrainedTokenizerFast, pieces: Mapping[str, str], max_length: int | None = None
) -> PreTrainedTokenizerFast:
    r"""
    A copy of a pretrained tokenizer with the template of RxT, in which these pieces, made of the tokens that it has,
    stand in the place of control tokens: see `CONTROL_PIECES`. No token is added, and text within an interaction is
    tokenized as the pretrained tokenizer does, but that the answer is cut off from its prompt.

    Special tokens cannot be typed. What a piece says in ordinary text ("[INST]", say, of a model that has no such
    token) is text for such a model: a user who types it gives the same ids, as in the pretrained model's own chat.

    Raises:
        `ValueError` for a special token that text could not be told from.
    """
    rules = _rules(tokenizer)
    # what is decoded alone keeps its first space
    rules["decoder"] = _without_added_spaces(rules["decoder"])
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "unk_token", "pad_token")}
    ends = [token for token in _special(tokenizer) if pieces["end"].endswith(token)]
    names["eos_token"] = max(ends, key=len)
    names["pad_token"] = names["pad_token"] or names["eos_token"]
    names = {name: text for name, text in names.items() if text is not None}
    backend = Tokenizer.from_str(json.dumps(rules))
    return _checked(backend, max_length or tokenizer.model_max_length, pieces, names)


def _special(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _rules(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in rules["added_tokens"]:
        if token["special"]:
            # matched as it is written and nowhere else, so that escaped text holds none
            token |= {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    return rules


def _checked(
    backend: Tokenizer, max_length: int, pieces: Mapping[str, str], names: dict[str, str]
) -> PreTrainedTokenizerFast:
    """Returns the tokenizer with its template; raises `ValueError` for special tokens that could be typed."""
    added = list(backend.get_added_tokens_decoder().values())
    guarded = _guarded(added, pieces)
    if short := sorted(text for text in guarded if len(text) < 2 or text[0] == ESCAPE):
        raise ValueError(f"The special tokens {short} cannot be told from text: they are single characters.")
    first = {text[0] for text in guarded}
    behind = "".join(_behind({name: piece for name, piece in pieces.items() if piece.startswith(guarded)}))
    texts = [token.content for token in added if token.content not in guarded]
    if greedy := sorted(text for text in texts if text[-1] in first or _reaches_into(text, behind)):
        raise ValueError(f"The added tokens {greedy} would take in the start of a control token that follows them.")
    extended = _with_template(backend, max_length, pieces, names)
    _check_special_tokens(extended)
    return extended


def _without_added_spaces(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """
    A step of a tokenizer that puts no space before a text and takes none away. SentencePiece's first space is put in
    at the start of a document or of each part: text that follows a control token would read otherwise than it stands.
    """
    if step is None or step["type"] == "Prepend" or (step["type"] == "Strip" and step.get("content") == " "):
        return None
    changed = dict(step)
    if step["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
    if step["type"] == "ByteLevel":
        changed["add_prefix_space"] = False
    for parts in ("normalizers", "pretokenizers", "decoders"):
        if parts in step:
            changed[parts] = [part for part in map(_without_added_spaces, step[parts]) if part is not None]
    return changed


def _check_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tries each special token as text; an unknown token is what unknown text may become."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    special = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    typed = encode_texts(tokenizer, list(special.values()))
    found = {special[token_id] for ids in typed for token_id in ids if token_id in special} - {unknown}
    if found:
        raise ValueError(f"The tokenizer reads {sorted(found)} in text that spells them, whatever is put between.")


def encode_interactions(
    tokenizer: PreTrainedTokenizerFast,
    queries: Sequence[str],
    answers: Sequence[str | None] | None = None,
    *,
    instructions: Sequence[str | None] | None = None,
) -> dict[str, list[list[int]]]:
    r"""
    Encodes interactions as the chat template does: `[BOS][Q]query[A]answer[EOS]`, with `[I]instruction` before `[Q]`.

    No text can become a control id. The turns of one dialogue give an episode as `RxTEpisodeCollator` takes it.

    Args:
        answers (`Sequence[str | None]`, *optional*): one answer for each query; without it, the prompt up to `[A]`.
        instructions (`Sequence[str | None]`, *optional*): one instruction for each query, or None.

    Returns:
        `dict`: `input_ids`, and `labels` that are -100 up to and including `[A]`.

    Raises:
        `ValueError` if the columns differ in length, or an interaction is longer than `tokenizer.model_max_length`.
    """
    columns = [[None] * len(queries) if column is None else column for column in (instructions, queries, answers)]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(
            f"{len(columns[1])} queries need as many answers and instructions, got {len(columns[2])} answers "
            f"and {len(columns[0])} instructions."
        )
    roles = ("system", "user", "assistant")
    return encode_chats(
        tokenizer,
        [
            [{"role": role, "content": text} for role, text in zip(roles, row, strict=True) if text is not None]
            for row in zip(*columns, strict=True)
        ],
    )


def encode_interaction(
    tokenizer: PreTrainedTokenizerFast, query: str, answer: str | None = None, *, instruction: str | None = None
) -> dict[str, list[int]]:
    r"""Encodes one interaction, see [`encode_interactions`]."""
    batch = encode_interactions(tokenizer, [query], [answer], instructions=[instruction])
    return {name: rows[0] for name, rows in batch.items()}


def encode_chats(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, list[list[int]]]:
    r"""
    Encodes interactions given as messages. All ids of interactions come from here or from `apply_chat_template`, which
    tokenizes the same text as a whole.

    Args:
        chats (`Sequence[Sequence[Mapping]]`): the messages of each interaction. Without a message of the assistant,
            the
            interaction is a prompt.

    Returns:
        `dict`: `input_ids`, and `labels` that are -100 up to and including the first `[A]` or `[T]`, or the piece in
        its place.

    Raises:
        `ValueError` for messages that the template refuses, and for an interaction longer than
        `tokenizer.model_max_length`.
    """
    is_source = source_pieces(tokenizer) is not None
    missing = [text for name, text in CONTROL_TOKENS.items() if name in _NEEDED and not hasattr(tokenizer, name)]
    if missing and not is_source:
        raise ValueError(f"The tokenizer lacks the control tokens {missing}: use add_control_tokens(tokenizer).")
    rendered = render_chats(tokenizer, chats)
    texts = [text for text, _ in rendered]
    if is_source:
        # the ids of a prompt are the first ids of the whole, since both are cut at its end
        ids_of_all = _tokenize(tokenizer, texts + [text[:start] for text, start in rendered])
        rows, starts = ids_of_all[: len(texts)], [len(ids) for ids in ids_of_all[len(texts) :]]
    else:
        rows = _tokenize(tokenizer, texts)
        answers = {tokenizer.convert_tokens_to_ids(CONTROL_TOKENS[f"{name}_token"]) for name in ("answer", "thinking")}
        starts = [
            next((place for place, token_id in enumerate(ids, 1) if token_id in answers), len(ids)) for ids in rows
        ]
    for place, ids in enumerate(rows):
        if len(ids) > tokenizer.model_max_length:
            raise ValueError(
                f"Interaction {place} has {len(ids)} tokens, more than "
                f"model_max_length={tokenizer.model_max_length}: shorten it or split it into several turns."
            )
    labels = [[-100] * start + ids[start:] for ids, start in zip(rows, starts, strict=True)]
    return {"input_ids": rows, "labels": labels}


def render_chats(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[str, int]]:
    """
    The text of each interaction as the tokenizer's template has it, and the character at which what is to be generated
    begins; what has no answer yet ends there.
    """
    pieces, guarded = _rendering(tokenizer)
    is_known = refuse_unguarded(tokenizer)
    escapes = _escapes(guarded, _behind(pieces)) if pieces is not None and is_known else None
    return [_render(tokenizer, chat, pieces or {}, escapes) for chat in chats]


def refuse_unguarded(tokenizer: PreTrainedTokenizerFast) -> bool:
    """
    Returns whether the tokenizer's template is the one that this module makes for it. Raises `ValueError` if a special
    token that came later can be typed, since a template of this module does not know it.
    """
    pieces, guarded = _rendering(tokenizer)
    if pieces is None:
        return False
    if tokenizer.chat_template == _template(guarded, tuple(pieces.items())):
        return True
    without, typed = (
        _render(tokenizer, [{"role": "system", "content": text}], pieces, None)[0]
        for text in (".", "\n".join(guarded))
    )
    if late := [text for text in guarded if typed.count(text) > without.count(text)]:
        raise ValueError(
            f"The special tokens {late} were added after the chat template was made, and could be typed: give the "
            "tokenizer to add_control_tokens again."
        )
    return False


def _rendering(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """The pieces of the tokenizer's template, if it is of this module, and what no text may be read as."""
    pieces = _pieces_of(tokenizer)
    return pieces, _guarded(tokenizer.added_tokens_decoder.values(), pieces or CONTROL_PIECES)


def _render(
    tokenizer: PreTrainedTokenizerFast, chat: Sequence[Mapping[str, Any]], pieces: Mapping[str, str], escapes: Any
) -> tuple[str, int]:
    """The template's text; of a plain interaction and the template of this module, without the cost of Jinja."""
    roles = tuple(message.get("role") for message in chat)
    is_plain = roles in _PLAIN and all(
        isinstance(message.get("content"), str) and len(message) == 2 for message in chat
    )
    if escapes is not None and is_plain:
        said = {message["role"]: _escape(message["content"], escapes) for message in chat}
        start = pieces["system"] + said["system"] if "system" in said else ""
        if "user" not in said:
            text = start + pieces["system_end"]
            return text, len(text)
        start += pieces["system_query" if "system" in said else "query"] + said["user"]
        start += pieces["query_end"] + pieces["answer"]
        answer = f"{pieces['answer_start']}{said['assistant']}{pieces['end']}" if "assistant" in said else ""
        return start + answer, len(start)
    try:
        # what apply_chat_template does, which keeps to itself where the answer begins
        (text,), (spans,) = cast(Any, render_jinja_template)(
            [list(chat)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            add_generation_prompt=roles[-1:] in (("user",), ("tool",)),
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise ValueError(str(error)) from error
    return text, spans[0][0] if spans else len(text)


def _escape(text: str, escapes: Sequence[tuple[str, Sequence[str]]]) -> str:
    for first, spellings in escapes:
        if first in text:
            for spelling in spellings:
                text = text.replace(spelling, first + ESCAPE + spelling[1:])
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of one interaction, or of its prompt, whatever its length."""
    ((text, _),) = render_chats(tokenizer, [messages])
    return _tokenize(tokenizer, [text])[0]


def _tokenize(tokenizer: PreTrainedTokenizerFast, rendered: list[str]) -> list[list[int]]:
    if not rendered:
        return []
    encoded = tokenizer(rendered, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


def _added_tokens() -> list[AddedToken]:
    # normalized=False: matched before the normalizer, hence never in text that is still escaped.
    return [AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS.values()]


def _control_names() -> dict[str, str]:
    """The control tokens that transformers has a name for."""
    names = PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES
    return {name: text for name, text in CONTROL_TOKENS.items() if name in names}


def _with_template(
    backend: Tokenizer, max_length: int, pieces: Mapping[str, str], names: dict[str, str]
) -> PreTrainedTokenizerFast:
    guarded = _guarded(backend.get_added_tokens_decoder().values(), pieces)
    first = "".join(re.escape(first) for first, _ in _escapes(guarded, _behind(pieces)))
    steps: list[Any] = [pre_tokenizers.Split(CUT, "removed")] if CUT in guarded else []
    steps.append(pre_tokenizers.Split(Regex(f"(?<=[{first}]){ESCAPE}"), "removed"))
    rules = json.loads(backend.to_str())
    if rules["model"].get("byte_fallback"):
        # "<0x0A>" stands for a byte: text that spells it is cut, so that it stays text
        steps.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated"))
    if backend.pre_tokenizer:
        # Metaspace puts a space before each part that it is given: it comes first unless it was told to put none
        is_first = (rules["pre_tokenizer"] or {}).get("prepend_scheme", "never") != "never"
        steps = [backend.pre_tokenizer, *steps] if is_first else [*steps, backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    is_control = pieces == CONTROL_PIECES
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        extra_special_tokens={k: v for k, v in CONTROL_TOKENS.items() if k not in names} if is_control else {},
        chat_template=_template(guarded, tuple(pieces.items())),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def escape_texts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[str]:
    """The texts as they stand in rendered interactions."""
    pieces, guarded = _rendering(tokenizer)
    escapes = _escapes(guarded, _behind(pieces or CONTROL_PIECES))
    return [_escape(text, escapes) for text in texts]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as they stand between special tokens."""
    end = tokenizer.eos_token
    rendered = [f"{end}{text}{end}" for text in escape_texts(tokenizer, texts)]
    return [ids[1:-1] for ids in _tokenize(tokenizer, rendered)]
