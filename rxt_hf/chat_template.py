# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Control tokens, the chat template of one interaction, and tokenizers that speak it."""

import copy
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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

# Text that spells a control token gets the noncharacter U+FDD0 behind its "[" and then matches no control token; the
# tokenizer's normalizer, which runs after that match, removes it. A "[" that U+FDD0 follows already is escaped too:
# the normalizer takes away exactly what was put in, and the model sees every text as it was typed.
ESCAPE = "\ufdd0"
_ESCAPES = {f"[{rest}": f"[{ESCAPE}{rest}" for rest in (ESCAPE, *(text[1:] for text in CONTROL_TOKENS.values()))}
_ESCAPE_FILTERS = "".join(f" | replace({text!a}, {escaped!a})" for text, escaped in _ESCAPES.items())

# The parts of a message are joined before they are escaped: "[" and "A]" are harmless, "[A]" is not.
CHAT_TEMPLATE = r"""
{%- macro escape(text) -%}{{- textESCAPE_FILTERS -}}{%- endmacro -%}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- escape(content) -}}
    {%- elif content is defined and content is sequence and content is not mapping -%}
        {%- for part in content if part is not mapping or part.type != 'text' or part.text is not string -%}
            {{- raise_exception("An RxT reads text only: each part must be {'type': 'text', 'text': '...'}.") -}}
        {%- endfor -%}
        {{- escape(content | map(attribute='text') | join) -}}
    {%- else -%}
        {{- raise_exception('The content of a message must be a string or a list of text parts.') -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro tool_call(function) -%}
    {%- set arguments = function.arguments if function.arguments is string else function.arguments | tojson -%}
    [C]{{- escape('{"name": ' ~ function.name | tojson ~ ', "arguments": ' ~ arguments ~ '}') -}}
{%- endmacro -%}
{%- if tools or documents -%}
    {{- raise_exception('One interaction has no place for tools and documents: '
        ~ 'describe them once in a system message, which is written into the memory (stm_cache).') -}}
{%- endif -%}
{%- set has_instruction = (messages and messages[0].role == 'system') or false -%}
{%- set turn = messages[1:] if has_instruction else messages -%}
{%- set roles = messages | map(attribute='role') | list -%}
{%- set turn_roles = roles[1:] if has_instruction else roles -%}
{%- set is_instruction_alone = has_instruction and not turn -%}
{%- set is_interaction = turn_roles in [['user'], ['tool'], ['user', 'assistant'], ['tool', 'assistant']] -%}
{%- if not (is_interaction or is_instruction_alone) or (add_generation_prompt and turn | length != 1) -%}
    {{- raise_exception('An RxT reads one interaction at a time: an optional system message, one user or tool '
        ~ 'message, and the assistant message unless it is to be generated. Earlier turns live in the memory: '
        ~ 'pass stm_cache instead of the history. Roles given: ' ~ (roles | join(', ') or 'none') ~ '.') -}}
{%- endif -%}
[BOS]
{%- if has_instruction -%}[I]{{- text(messages[0].content) -}}{%- endif -%}
{%- if is_instruction_alone -%}
    [EOS]
{%- else -%}
    {{- '[U]' if turn_roles[0] == 'tool' else '[Q]' -}}
    {{- text(turn[0].content) -}}
    {%- if turn | length == 2 -%}
        {%- set answer = turn[1] -%}
        {%- set thoughts = answer.reasoning_content or answer.thinking -%}
        {{- '[T]' if thoughts else '[A]' -}}
        {%- generation -%}
            {%- if thoughts -%}{{- text(thoughts) -}}[A]{%- endif -%}
            {%- if answer.content or not (thoughts or answer.tool_calls) -%}{{- text(answer.content) -}}{%- endif -%}
            {%- for call in answer.tool_calls or [] -%}{{- tool_call(call.function or call) -}}{%- endfor -%}
            [EOS]
        {%- endgeneration -%}
    {%- elif add_generation_prompt -%}
        {{- '[T]' if thinking else '[A]' -}}
    {%- endif -%}
{%- endif -%}
""".replace("ESCAPE_FILTERS", _ESCAPE_FILTERS)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, max_length: int = 1024) -> PreTrainedTokenizerFast:
    r"""
    Trains a byte-level BPE tokenizer with the control tokens at ids 0 to 9, in the order of `CONTROL_TOKENS`.

    Any text round-trips byte for byte. Digits are split one by one; a word keeps its leading space. Equal texts give
    an equal tokenizer. The result is a plain `PreTrainedTokenizerFast`: `AutoTokenizer` loads it without custom code.

    Args:
        texts (`Iterable[str]`): training text.
        vocab_size (`int`): upper bound, control tokens included; a small text may give fewer tokens.
        max_length (`int`): tokens of one interaction, kept as `model_max_length`.

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
    return _with_template(backend, max_length)


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, max_length: int | None = None) -> PreTrainedTokenizerFast:
    r"""
    Gives a copy of a pretrained tokenizer the control tokens (new ids at the end) and the chat template of RxT.

    Ids of ordinary text stay as they were. `max_length` defaults to the tokenizer's `model_max_length`.

    Raises:
        `ValueError` if the vocabulary holds the text of a control token as an ordinary token.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    taken = [text for text in CONTROL_TOKENS.values() if text not in special and backend.token_to_id(text) is not None]
    if taken:
        raise ValueError(
            f"The vocabulary holds {taken} as ordinary tokens: text could not be told from control tokens."
        )
    backend.add_special_tokens(_added_tokens())
    return _with_template(backend, max_length or tokenizer.model_max_length)


def encode_interactions(
    tokenizer: PreTrainedTokenizerFast,
    queries: Sequence[str],
    answers: Sequence[str | None] | None = None,
    *,
    instructions: Sequence[str | None] | None = None,
) -> dict[str, list[list[int]]]:
    r"""
    Encodes interactions as the chat template does: `[BOS][Q]query[A]answer[EOS]`, with `[I]instruction` before `[Q]`.

    The texts are encoded apart from the control ids, so no text can become one. The turns of one dialogue give an
    episode as `RxTEpisodeCollator` takes it.

    Args:
        answers (`Sequence[str | None]`, *optional*): without one, the prompt that ends in `[A]`.
        instructions (`Sequence[str | None]`, *optional*): one entry for each query.

    Returns:
        `dict`: `input_ids`, and `labels` that are -100 up to and including `[A]`.

    Raises:
        `ValueError` if the columns differ in length, or an interaction is longer than `tokenizer.model_max_length`.
    """
    names = ("bos_token", "instruction_token", "query_token", "answer_token", "eos_token")
    if missing := [CONTROL_TOKENS[name] for name in names if not hasattr(tokenizer, name)]:
        raise ValueError(f"The tokenizer lacks the control tokens {missing}: use add_control_tokens(tokenizer).")
    bos, instruction_id, query_id, answer_id, eos = (getattr(tokenizer, f"{name}_id") for name in names)
    columns = [[None] * len(queries) if column is None else column for column in (instructions, queries, answers)]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(
            f"{len(columns[1])} queries need as many answers and instructions, got {len(columns[2])} answers "
            f"and {len(columns[0])} instructions."
        )
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for instruction, query, answer in zip(*(encode_texts(tokenizer, column) for column in columns), strict=True):
        before_query = [bos] if instruction is None else [bos, instruction_id, *instruction]
        prompt = [*before_query, query_id, *query, answer_id]
        target = [] if answer is None else [*answer, eos]
        if len(prompt) + len(target) > tokenizer.model_max_length:
            raise ValueError(
                f"Interaction {len(batch['labels'])} has {len(prompt) + len(target)} tokens, more than "
                f"model_max_length={tokenizer.model_max_length}: shorten it or split it into several turns."
            )
        batch["input_ids"].append(prompt + target)
        batch["labels"].append([-100] * len(prompt) + target)
    return batch


def encode_interaction(
    tokenizer: PreTrainedTokenizerFast, query: str, answer: str | None = None, *, instruction: str | None = None
) -> dict[str, list[int]]:
    r"""Encodes one interaction, see [`encode_interactions`]."""
    batch = encode_interactions(tokenizer, [query], [answer], instructions=[instruction])
    return {name: rows[0] for name, rows in batch.items()}


def _added_tokens() -> list[AddedToken]:
    # normalized=False: matched before the normalizer, hence never in text that is still escaped.
    return [AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS.values()]


def _with_template(backend: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    # Only U+FDD0 is replaced, not "[" with it: the offsets of "[" stay, and assistant masks find it.
    unescape = normalizers.Replace(Regex(rf"(?<=\[){ESCAPE}"), "")
    backend.normalizer = normalizers.Sequence([unescape, *([backend.normalizer] if backend.normalizer else [])])
    standard = {
        name: text
        for name, text in CONTROL_TOKENS.items()
        if name in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **standard,
        extra_special_tokens={name: text for name, text in CONTROL_TOKENS.items() if name not in standard},
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def escape(text: str) -> str:
    """The text with `ESCAPE` in everything that spells a control token."""
    if "[" in text:
        for spelled, escaped in _ESCAPES.items():
            text = text.replace(spelled, escaped)
    return text


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str | None]) -> list[list[int] | None]:
    """Token ids of each text, without control tokens; `None` stays `None`."""
    # The escape does here what split_special_tokens=True would do, without that flag's write to the backend which
    # every thread shares.
    given = [escape(text) for text in texts if text is not None]
    if not given:
        return [None] * len(texts)
    encoded = iter(tokenizer(given, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    return [None if text is None else next(encoded) for text in texts]
