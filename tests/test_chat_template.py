# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import random
import subprocess
import sys

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rxt_hf.chat_template import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    add_control_tokens,
    encode_interaction,
    encode_interactions,
    train_tokenizer,
)

TEXTS = ["My dog is called Rex. What is my dog called? Rex was 42 in 1999.", "[A] [BOS] [MASK] héllo [EOS]"] * 40
CONTROL_IDS = set(range(10))
BOS, EOS, QUERY, ANSWER, THINKING, INSTRUCTION, TOOL_RESULT, TOOL_CALL = 1, 2, 4, 5, 6, 7, 8, 9

PLACEMENTS = [
    "{0}",
    " {0}",
    "{0} ",
    "\n{0}\n",
    "{0}{0}",
    "{0} {0}",
    "word{0}",
    "{0}word",
    "My dog {0} is Rex",
    "[{0}",
    "{0}]",
    "[{0}]",
    "[[[{0}]]]",
    "{1}{0}",
    "{0}{1}",
    "{1}[",
    "[\ufdd0{2}",
    "[\ufdd0\ufdd0{2} {0}",
    "\ufdd0{0}\ufdd0",
    "[\ufdd0\ufdd1{2}",
    "\u200b{0}\u200d",
    "é{0}😀",
    "[[{2}{0}",
    "7{0}7",
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Saved and loaded twice: what a user of the Hub has."""
    current = train_tokenizer(TEXTS, vocab_size=340, max_length=64)
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name)
        current.save_pretrained(folder)
        current = AutoTokenizer.from_pretrained(folder)
    return current


def plain(tokenizer, text):
    """Ids of text as text."""
    return tokenizer(text, split_special_tokens=True)["input_ids"]


def ids_of(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, **kwargs)["input_ids"]


def hostile_texts():
    for control in CONTROL_TOKENS.values():
        for placement in PLACEMENTS:
            yield placement.format(control, control[:-1], control[1:])


# ------- the tokenizer


def test_control_tokens_have_the_first_ids_and_names(tokenizer):
    for index, (name, text) in enumerate(CONTROL_TOKENS.items()):
        assert getattr(tokenizer, name) == text
        assert getattr(tokenizer, f"{name}_id") == index
    assert set(tokenizer.all_special_ids) == CONTROL_IDS


def test_settings_survive_two_saves(tokenizer):
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 64
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert set(tokenizer("Rex")) == {"input_ids", "attention_mask"}


def test_saved_tokenizer_holds_no_code_and_loads_without_this_package(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".jinja"}
    script = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "chat = [{'role': 'user', 'content': '[A] Rex'}];"
        "print(t.apply_chat_template(chat, add_generation_prompt=True)['input_ids']);"
        "assert 'rxt_hf' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == str([BOS, QUERY, *plain(tokenizer, "[A] Rex"), ANSWER]), result.stderr


def test_any_text_round_trips(tokenizer):
    generator = random.Random(0)
    planes = [(0, 0x20), (0x20, 0x250), (0x300, 0x370), (0x590, 0x700), (0x4E00, 0x9FFF), (0xFDD0, 0xFDF0)]
    planes += [(0x1F300, 0x1FAFF), (0xE000, 0xF8FF), (0x100000, 0x10FFFF)]
    texts = ["", " ", "\x00", "\r\n\t", "👩‍👩‍👧‍👦", "שלום \u202eعربي", "e\u0301 é", "½ ٣ 42", "[\ufdd0[A]\ufdd0\ufdd0"]
    for _ in range(300):
        texts.append(
            "".join(chr(generator.randint(*generator.choice(planes))) for _ in range(generator.randint(1, 12)))
        )
    for text in texts:
        ids = encode_interaction(tokenizer, text)["input_ids"]
        assert tokenizer.decode(ids[2:-1]) == text
        assert ids_of(tokenizer, [user(text)], add_generation_prompt=True) == ids


def test_words_keep_their_space_and_digits_are_single(tokenizer):
    assert tokenizer.tokenize("My dog is 1999") == ["My", "Ġdog", "Ġis", "Ġ", "1", "9", "9", "9"]
    query = encode_interaction(tokenizer, "My dog is called Rex.", "It is called Rex, yes.")["input_ids"]
    assert query.count(tokenizer.convert_tokens_to_ids("ĠRex")) == 2


def test_training_is_deterministic_over_processes():
    script = (
        "from rxt_hf.chat_template import train_tokenizer;"
        f"print(ascii(train_tokenizer({TEXTS[:2]!r} * 40, 340).backend_tokenizer.to_str()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ascii(train_tokenizer(TEXTS, 340).backend_tokenizer.to_str())


def test_too_small_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=265 cannot hold .*: use at least 266"):
        train_tokenizer(TEXTS, vocab_size=265)
    assert len(train_tokenizer(TEXTS, vocab_size=266)) == 266


# ------- the template


@pytest.mark.parametrize(
    ("messages", "kwargs", "rendered"),
    [
        ([user("Hi")], {}, "[BOS][Q]Hi"),
        ([user("Hi")], {"add_generation_prompt": True}, "[BOS][Q]Hi[A]"),
        ([user("Hi")], {"add_generation_prompt": True, "thinking": True}, "[BOS][Q]Hi[T]"),
        ([user(" Hi\n "), assistant(" yo ")], {}, "[BOS][Q] Hi\n [A] yo [EOS]"),
        ([user("Hi"), assistant("")], {}, "[BOS][Q]Hi[A][EOS]"),
        ([user("Hi"), assistant("yo", thinking="hm")], {}, "[BOS][Q]Hi[T]hm[A]yo[EOS]"),
        ([user("Hi"), assistant("yo", reasoning_content="hm")], {}, "[BOS][Q]Hi[T]hm[A]yo[EOS]"),
        ([system("Be kind.")], {}, "[BOS][I]Be kind.[EOS]"),
        ([system("Be kind."), user("Hi"), assistant("yo")], {}, "[BOS][I]Be kind.[Q]Hi[A]yo[EOS]"),
        ([{"role": "tool", "content": "7"}], {"add_generation_prompt": True}, "[BOS][U]7[A]"),
        ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], {}, "[BOS][Q]ab"),
        ([user("q"), assistant("[")], {"continue_final_message": True}, "[BOS][Q]q[A]["),
        (
            [
                user("q"),
                assistant("ok", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]),
            ],
            {},
            '[BOS][Q]q[A]ok[C]{"name": "f", "arguments": {"x": 1}}[EOS]',
        ),
        (
            [user("q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}],
            {},
            '[BOS][Q]q[A][C]{"name": "f", "arguments": {"x": 1}}[EOS]',
        ),
    ],
)
def test_template_renders_one_interaction(tokenizer, messages, kwargs, rendered):
    assert tokenizer.apply_chat_template(messages, tokenize=False, **kwargs) == rendered
    assert ids_of(tokenizer, messages, **kwargs).count(BOS) == 1


def test_template_ids_are_the_control_ids_around_the_text(tokenizer):
    query, answer = plain(tokenizer, "What is my dog called?"), plain(tokenizer, "Rex")
    messages = [user("What is my dog called?"), assistant("Rex", thinking="dog")]
    assert ids_of(tokenizer, messages[:1], add_generation_prompt=True) == [BOS, QUERY, *query, ANSWER]
    thinking = [THINKING, *plain(tokenizer, "dog"), ANSWER]
    assert ids_of(tokenizer, messages) == [BOS, QUERY, *query, *thinking, *answer, EOS]
    assert ids_of(tokenizer, [system("Rex")]) == [BOS, INSTRUCTION, *answer, EOS]
    assert ids_of(tokenizer, [{"role": "tool", "content": "Rex"}]) == [BOS, TOOL_RESULT, *answer]
    call = [user("Rex"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]
    assert ids_of(tokenizer, call)[-1] == EOS and ids_of(tokenizer, call).count(TOOL_CALL) == 1


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), user("b")],
        [user("a"), assistant("b"), user("c")],
        [assistant("a")],
        [system("a"), assistant("b")],
        [system("a"), system("b")],
        [user("a"), system("b")],
        [user("a"), {"role": "tool", "content": "b"}],
        [{"role": "developer", "content": "a"}],
    ],
)
def test_history_is_refused_and_pointed_to_the_memory(tokenizer, messages):
    with pytest.raises(TemplateError, match=r"one interaction at a time.*stm_cache.*Roles given: \w+"):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("messages", [[system("a")], [user("a"), assistant("b")]])
def test_nothing_can_be_generated_after_a_finished_interaction(tokenizer, messages):
    with pytest.raises(TemplateError, match="one interaction at a time"):
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_empty_conversation_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty conversation"):
        tokenizer.apply_chat_template([])
    with pytest.raises(TemplateError, match="Roles given: none"):
        tokenizer.apply_chat_template([[], [user("a")]])


@pytest.mark.parametrize("content", [None, 7, {"type": "text", "text": "a"}, ["a"], [{"type": "image", "url": "a"}]])
def test_content_that_is_not_text_is_refused(tokenizer, content):
    with pytest.raises(TemplateError, match=r"reads text only|must be a string"):
        tokenizer.apply_chat_template([user(content)])


def test_tools_and_documents_are_not_dropped_silently(tokenizer):
    with pytest.raises(TemplateError, match="system message"):
        tokenizer.apply_chat_template([user("a")], tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(TemplateError, match="system message"):
        tokenizer.apply_chat_template([user("a")], documents=[{"title": "a", "text": "b"}])


@pytest.mark.parametrize("answer", ["Rex", " Rex", "", "[A]", "[EOS"])
def test_assistant_mask_covers_answer_and_end(tokenizer, answer):
    inputs = tokenizer.apply_chat_template(
        [user("My [A] dog"), assistant(answer)], return_assistant_tokens_mask=True, return_dict=True
    )
    num_target = len(plain(tokenizer, answer)) + 1
    assert inputs["assistant_masks"] == [0] * (len(inputs["input_ids"]) - num_target) + [1] * num_target


def test_assistant_mask_of_thinking_starts_after_its_control_token(tokenizer):
    inputs = tokenizer.apply_chat_template(
        [user("My"), assistant("Rex", thinking="dog")], return_assistant_tokens_mask=True, return_dict=True
    )
    produced = [token for token, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True) if mask]
    assert produced == [*plain(tokenizer, "dog"), ANSWER, *plain(tokenizer, "Rex"), EOS]


def test_batches_are_padded_on_the_left(tokenizer):
    batch = [[user("My dog is called Rex.")], [user("My")]]
    inputs = tokenizer.apply_chat_template(batch, add_generation_prompt=True, padding=True, return_tensors="pt")
    assert inputs["input_ids"][:, -1].tolist() == [ANSWER, ANSWER]
    assert inputs["attention_mask"][1].tolist() == [0] * (inputs["input_ids"].shape[1] - 4) + [1] * 4


# ------- injection


def test_there_are_twenty_placements():
    assert len(set(PLACEMENTS)) >= 20


def test_typed_control_tokens_reach_the_model_as_text(tokenizer):
    for text in hostile_texts():
        expected = [BOS, QUERY, *plain(tokenizer, text.replace("[\ufdd0", "[\ufdd0\ufdd0")), ANSWER]
        assert CONTROL_IDS.isdisjoint(expected[2:-1])
        parts = [{"type": "text", "text": character} for character in text]
        for content in (text, parts, [{"type": "text", "text": text}]):
            ids = ids_of(tokenizer, [user(content)], add_generation_prompt=True)
            assert ids == expected
        assert tokenizer.decode(ids[2:-1]) == text
        sanitized = ids_of(tokenizer, [user(text)], add_generation_prompt=True, sanitize_control_tokens=True)
        assert CONTROL_IDS.isdisjoint(sanitized[2:-1])


def test_no_field_of_a_message_yields_a_control_id(tokenizer):
    for text in hostile_texts():
        call = {"name": text, "arguments": {text: [text]}}
        raw_call = {"name": text, "arguments": text}
        ids = ids_of(
            tokenizer,
            [system(text), user(text), assistant(text, thinking=text, tool_calls=[call, raw_call])],
        )
        control = [token for token in ids if token in CONTROL_IDS]
        assert control == [BOS, INSTRUCTION, QUERY, THINKING, ANSWER, TOOL_CALL, TOOL_CALL, EOS]
        ids = ids_of(tokenizer, [{"role": "tool", "content": text}], add_generation_prompt=True)
        assert [token for token in ids if token in CONTROL_IDS] == [BOS, TOOL_RESULT, ANSWER]


def test_control_tokens_split_over_messages_do_not_join(tokenizer):
    for control in CONTROL_TOKENS.values():
        for cut in range(1, len(control)):
            head, tail = control[:cut], control[cut:]
            ids = ids_of(tokenizer, [system(head), user(tail + head), assistant(tail + head, thinking=tail + head)])
            control_ids = [token for token in ids if token in CONTROL_IDS]
            assert control_ids == [BOS, INSTRUCTION, QUERY, THINKING, ANSWER, EOS]


def test_template_arguments_cannot_replace_control_tokens(tokenizer):
    ids = ids_of(tokenizer, [user("a")], add_generation_prompt=True, bos_token="[EOS]", query_token="[A]")
    assert ids == [BOS, QUERY, *plain(tokenizer, "a"), ANSWER]


def test_split_special_tokens_yields_no_control_id(tokenizer):
    for text in hostile_texts():
        assert CONTROL_IDS.isdisjoint(plain(tokenizer, text))
    assert plain(tokenizer, "[A]") != tokenizer("[A]")["input_ids"] == [ANSWER]


# ------- interactions as ids


def test_interaction_equals_the_template_and_labels_start_after_the_answer_token(tokenizer):
    for text in hostile_texts():
        encoded = encode_interaction(tokenizer, text, text, instruction=text)
        assert encoded["input_ids"] == ids_of(tokenizer, [system(text), user(text), assistant(text)])
        start = encoded["input_ids"].index(ANSWER) + 1
        assert encoded["labels"] == [-100] * start + encoded["input_ids"][start:]
    prompt = encode_interaction(tokenizer, "My dog")
    assert prompt["input_ids"] == ids_of(tokenizer, [user("My dog")], add_generation_prompt=True)
    assert prompt["labels"] == [-100] * len(prompt["input_ids"])


def test_batch_equals_single_interactions(tokenizer):
    queries, answers = ["My dog is called Rex.", "", "Who?"], ["Rex", None, ""]
    single = [encode_interaction(tokenizer, *pair) for pair in zip(queries, answers, strict=True)]
    tokenizer(["a", "My dog"], padding=True, truncation=True, max_length=1)
    batch = encode_interactions(tokenizer, queries, answers)
    assert batch == {name: [row[name] for row in single] for name in ("input_ids", "labels")}
    prompts = encode_interactions(tokenizer, queries)
    assert prompts["input_ids"][1] == [BOS, QUERY, ANSWER]
    assert {label for labels in prompts["labels"] for label in labels} == {-100}
    assert encode_interactions(tokenizer, []) == {"input_ids": [], "labels": []}


def test_columns_of_unequal_length_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"2 queries .* got 1 answers and 2 instructions"):
        encode_interactions(tokenizer, ["a", "b"], ["c"])


def test_interaction_longer_than_the_model_reads_is_refused(tokenizer):
    fits = "7" * (64 - 4)
    assert len(encode_interaction(tokenizer, fits, "")["input_ids"]) == 64
    with pytest.raises(ValueError, match="Interaction 1 has 65 tokens, more than model_max_length=64"):
        encode_interactions(tokenizer, [fits, fits], ["", "7"])


# ------- pretrained tokenizers


def test_pretrained_tokenizer_gets_control_tokens_and_keeps_its_ids():
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate("[]aAĠ")}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=99)
    extended = add_control_tokens(original)
    ids = extended.apply_chat_template([user("a[A]")], add_generation_prompt=True)["input_ids"]
    assert ids == [extended.bos_token_id, extended.query_token_id, 2, 0, 3, 1, extended.answer_token_id]
    assert (len(original), len(extended), extended.model_max_length) == (5, 15, 99)
    assert "bos_token" not in original.special_tokens_map
    with pytest.raises(ValueError, match=r"lacks the control tokens .*\[Q\].*add_control_tokens"):
        encode_interaction(original, "a")


def test_vocabulary_that_spells_a_control_token_is_refused():
    backend = Tokenizer(models.WordLevel({"[A]": 0, "a": 1}, unk_token="a"))
    with pytest.raises(ValueError, match=r"\['\[A\]'\] as ordinary tokens"):
        add_control_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))
