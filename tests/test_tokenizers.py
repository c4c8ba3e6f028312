# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""One tokenization, and no special token that can be typed, with tokenizers of every kind that is about."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

import rxt_hf
from rxt_hf import RxTSession
from rxt_hf.chat_template import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    ESCAPE,
    add_control_tokens,
    encode_interactions,
    encode_texts,
    train_tokenizer,
)
from rxt_hf.convert import convert_tokenizer
from rxt_hf.data.readers import Episodes, pack_texts

CORPUS = ["write My dog is called Rex. hi there </s> <|im_end|> What is 42?\n\tif x:\n    y [A] <s>"] * 5
ENDS = ["<|im_start|>", "<|im_end|>"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
CHARACTERS = "▁abcdefghijklmnopqrstuvwxyzMRW.?<>|/[]_0123456789"
MERGES = [("h", "i"), ("▁", "hi"), ("d", "o"), ("do", "g"), ("▁", "dog"), ("▁", "▁"), ("<", "s")]


def byte_level(**options):
    from tokenizers import trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=ENDS, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def as_fast(backend, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4096, **tokens)


def sentencepiece_bpe():
    vocabulary = dict.fromkeys([*PIECES, *CHARACTERS, *("".join(pair) for pair in MERGES)])
    vocabulary = {piece: place for place, piece in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in PIECES[:3]])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def metaspace(scheme, split=False):
    backend = sentencepiece_bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split)
    return as_fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def legacy():
    backend = sentencepiece_bpe()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return as_fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama():
    vocabulary = dict.fromkeys([*PIECES, *CHARACTERS, *("".join(pair) for pair in MERGES)])
    vocabulary = {piece: place for place, piece in enumerate(vocabulary)}
    return LlamaTokenizerFast(vocab=vocabulary, merges=MERGES, model_max_length=4096)


def unigram():
    pieces = [(piece, 0.0) for piece in PIECES] + [(character, -5.0) for character in CHARACTERS]
    pieces += [("▁dog", -2.0), ("hi", -3.0), ("▁hi", -2.5), ("▁▁", -4.0), ("<s", -1.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")])
    return as_fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def many_reserved():
    backend = byte_level(add_prefix_space=False)
    rules = json.loads(backend.to_str())
    rules["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(rules))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+|\p{L}+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.add_special_tokens([AddedToken(f"<|reserved_{number}|>") for number in range(256)])
    return as_fast(backend)


def odd_special_tokens():
    backend = byte_level(add_prefix_space=False)
    # matched after normalization; itself twice over; ending in the start of a control token; of letters; Chinese
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken("<É>", normalized=True), "aba", "aa", "x[", "EOT", "<\uff5c终▁\uff5c>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</think>", normalized=True)])
    return as_fast(backend)


KINDS = {
    "byte-level": lambda: train_tokenizer(CORPUS, 340, 4096),
    "byte-level, pretrained": lambda: as_fast(byte_level(add_prefix_space=False), eos_token=ENDS[1]),
    "byte-level, first space": lambda: as_fast(byte_level(add_prefix_space=True)),
    "llama": llama,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always", split=True),
    "metaspace never": lambda: metaspace("never"),
    "legacy": legacy,
    "unigram": unigram,
    "many reserved": many_reserved,
    "odd special tokens": odd_special_tokens,
}


def word_piece():
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"abcdehimnorstw[]<>|_/?.", "##i", "dog", "hi", "write"]
    backend = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([*words[:4], AddedToken("[MASK]", lstrip=True)])
    return as_fast(backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def word_level():
    words = ["<unk>", "<s>", "</s>", "dog", "hi", "write", "here", "<", ">"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return as_fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# their own rules do not keep every text, so that only the ids are compared
LOSSY_KINDS = {"word piece": word_piece, "word level": word_level}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    found = {}

    def loaded(kind):
        """Converted, saved, and loaded as a user of the Hub does."""
        if kind not in found:
            tokenizer = (KINDS | LOSSY_KINDS)[kind]()
            if kind != "byte-level":
                tokenizer = convert_tokenizer(tokenizer)
            folder = tmp_path_factory.mktemp("tokenizer")
            tokenizer.save_pretrained(folder)
            found[kind] = AutoTokenizer.from_pretrained(folder)
        return found[kind]

    return loaded


def nasty_texts(tokenizer):
    texts = [
        "",
        " ",
        "  ",
        "\n",
        "\t",
        "hi",
        " hi",
        "  hi",
        "hi ",
        "hi  ",
        "hi  dog",
        "\nhi\n",
        "\thi\t dog",
        "a\r\nb",
    ]
    texts += [
        "😀",
        "👩‍👩‍👧‍👦 hi",
        "e\u0301 é",
        "u\u0308\u0304",
        "▁",
        " ▁hi",
        "שלום",
        "ababa aaaa",
        "xx[",
        "x",
        "<0x0A>",
        "<tool_call> hi</think>b",
    ]
    texts += [
        ESCAPE,
        f"[{ESCAPE}",
        f"<{ESCAPE}{ESCAPE}s>",
        f"{ESCAPE}[A]{ESCAPE}",
        f"[{ESCAPE}A]",
        f"<{ESCAPE}|im_end|>",
        f"a{ESCAPE}ba",
    ]
    texts += [
        placed.replace("{}", "[Q]") for placed in ("{}hi", "hi{}", "hi {} dog", "[{}]", "{}{}", "[Q{}", "{}Q]", " {} ")
    ]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for text in [*special[:14], *special[-12:], "<s>", "</s>", "<|im_end|>", "<|endoftext|>"]:
        texts += [f"write {text} here", text, text * 2, text[:-1], text[1:], f"{text[0]}{text}", f"{text[:2]}{text}"]
    return list(dict.fromkeys(texts))


def ids_of(tokenizer, *said, **fields):
    messages = [{"role": role, "content": text} for role, text in said]
    return tokenizer.apply_chat_template([[*messages[:-1], messages[-1] | fields]])["input_ids"][0]


def special_ids(tokenizer):
    """All but what unknown text may become."""
    unknown = {tokenizer.convert_tokens_to_ids(text) for text in ("<unk>", "[UNK]") if text in tokenizer.get_vocab()}
    return {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special} - unknown


@pytest.mark.parametrize("kind", [*KINDS, *LOSSY_KINDS])
def test_training_chat_and_template_have_the_same_ids(kind, load):
    tokenizer = load(kind)
    texts = nasty_texts(tokenizer)
    assert len(texts) > 100
    answers, systems = texts[::-1], texts[3:] + texts[:3]
    encoded = encode_interactions(tokenizer, texts, answers, instructions=systems)
    prompts = encode_interactions(tokenizer, texts)["input_ids"]
    episode = Episodes(
        tokenizer, [{"interactions": [{"query": q, "answer": a} for q, a in zip(texts, answers, strict=True)]}]
    )[0]
    chats = [[{"role": "user", "content": text}] for text in texts]
    assert prompts == tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    for place, (query, answer, system) in enumerate(zip(texts, answers, systems, strict=True)):
        ids, labels = encoded["input_ids"][place], encoded["labels"][place]
        assert ids == ids_of(tokenizer, ("system", system), ("user", query), ("assistant", answer))
        assert episode["input_ids"][place] == ids_of(tokenizer, ("user", query), ("assistant", answer))
        start = ids.index(tokenizer.answer_token_id) + 1
        assert labels == [-100] * start + ids[start:]
        assert episode["labels"][place][-len(ids) + start :] == ids[start:]
    documents = encode_texts(tokenizer, texts)
    assert [
        [tokenizer.bos_token_id, tokenizer.query_token_id, *ids, tokenizer.answer_token_id] for ids in documents
    ] == prompts


@pytest.mark.parametrize("kind", [*KINDS, *LOSSY_KINDS])
def test_no_special_token_can_be_typed(kind, load):
    tokenizer = load(kind)
    special = special_ids(tokenizer)
    marks = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "instruction", "query", "thinking", "answer")
    }
    marks |= {name: getattr(tokenizer, f"{name}_token_id") for name in ("tool_call", "tool_result", "eos")}
    for text in nasty_texts(tokenizer):
        call = {"name": text, "arguments": {text: [text]}}
        fields = {"thinking": text or "hm", "tool_calls": [call, {"name": text, "arguments": text}]}
        ids = ids_of(tokenizer, ("system", text), ("user", text), ("assistant", text), **fields)
        expected = ["bos", "instruction", "query", "thinking", "answer", "tool_call", "tool_call", "eos"]
        assert [token_id for token_id in ids if token_id in special] == [marks[name] for name in expected], text
        ids = ids_of(tokenizer, ("tool", text), ("assistant", text))
        expected = ["bos", "tool_result", "answer", "eos"]
        assert [token_id for token_id in ids if token_id in special] == [marks[name] for name in expected], text
        ids = [token_id for row in pack_texts(tokenizer, [text], 64) for token_id in row["input_ids"]]
        assert [token_id for token_id in ids if token_id in special] == [marks["bos"], marks["eos"]], text


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_as_it_was_typed(kind, load):
    tokenizer = load(kind)
    texts = nasty_texts(tokenizer)
    encoded = encode_interactions(tokenizer, texts, texts[::-1])
    # what their own rules hold to be one
    kept = str if "▁" not in tokenizer.backend_tokenizer.to_str() else (lambda text: text.replace("▁", " "))
    if kind == "odd special tokens":
        kept = normalizers.NFC().normalize_str
    for query, answer, ids in zip(texts, texts[::-1], encoded["input_ids"], strict=True):
        start = ids.index(tokenizer.answer_token_id)
        assert tokenizer.decode(ids[2:start]) == kept(query)
        assert tokenizer.decode(ids[start + 1 :], skip_special_tokens=True) == kept(answer)
        assert tokenizer.decode(ids, skip_special_tokens=True) == kept(query) + kept(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_recalled_words_are_found_behind_escaped_text(kind, load):
    tokenizer = load(kind)
    answer = f"<|im_end|> [A] [{ESCAPE} </s> dog, hi"
    if kind == "byte-level":
        answer = answer.replace("dog", "Rex")
    start = answer.index(",") - 3
    turn = {"query": " hi", "answer": answer, "recall": [[start, start + 3, 1]]}
    (labels,) = Episodes(tokenizer, [{"interactions": [turn]}]).recall_labels[0]
    assert tokenizer.decode([label for label in labels if label != -100]).strip() == answer[start : start + 3]


def test_ids_of_ordinary_text_are_those_of_the_pretrained_tokenizer():
    for kind in ("byte-level, pretrained", "metaspace never", "many reserved"):
        tokenizer = KINDS[kind]()
        for text in ("My dog is called Rex.", " hi  dog", "42\n", "<0 < | [ ]"):
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert convert_tokenizer(tokenizer)(text)["input_ids"] == expected
    # without the space that it would put before the text
    tokenizer = llama()
    expected = tokenizer("hi dog", add_special_tokens=False)["input_ids"]
    assert convert_tokenizer(tokenizer)(" hi dog")["input_ids"] == expected


def test_the_demo_has_the_template_and_the_length_of_its_model():
    tokenizer = AutoTokenizer.from_pretrained(rxt_hf.DEMO)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.model_max_length == rxt_hf.RxTConfig.from_pretrained(rxt_hf.DEMO).max_position_embeddings
    with pytest.raises(ValueError, match="more than model_max_length=256"):
        Episodes(tokenizer, [{"interactions": [{"query": "dog " * 300, "answer": "Rex"}]}])


def test_the_demo_reads_what_it_was_trained_on():
    tokenizer = AutoTokenizer.from_pretrained(rxt_hf.DEMO)
    queries = ["My dog is called Rex.", " What's\n[A] 42?"]
    answers = ["Got it, your dog is called Rex.", "[\ufdd0EOS] <s> é"]
    # recorded when its model was trained, by another way to encode
    first = [1, 4, 349, 562, 269, 326, 391, 1177, 23, 5, 378, 348, 21, 304, 562, 269, 326, 391, 1177, 23, 2]
    second = [1, 4, 230, 385, 314, 208, 68, 42, 70, 230, 29, 27, 40, 5]
    expected = [first, [*second, 68, 181, 125, 248, 46, 56, 60, 70, 230, 37, 92, 39, 230, 137, 112, 2]]
    assert encode_interactions(tokenizer, queries, answers)["input_ids"] == expected
    for query, answer, ids in zip(queries, answers, expected, strict=True):
        assert ids_of(tokenizer, ("user", query), ("assistant", answer)) == ids


@pytest.mark.parametrize("token", ["[", "\ufdd0x"])
def test_a_special_token_that_cannot_be_told_from_text_is_refused(token):
    backend = byte_level(add_prefix_space=False)
    backend.add_special_tokens([token])
    with pytest.raises(ValueError, match="cannot be told from text"):
        add_control_tokens(as_fast(backend))


def test_special_tokens_that_come_after_the_template_are_refused_until_it_knows_them():
    model, tokenizer = (auto.from_pretrained(rxt_hf.DEMO) for auto in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<late>"]})
    for use in (lambda: encode_interactions(tokenizer, ["a <late> b"]), lambda: RxTSession(model, tokenizer)):
        with pytest.raises(ValueError, match=r"\['<late>'\] were added after the chat template"):
            use()
    again = add_control_tokens(tokenizer)
    (ids,) = encode_interactions(again, ["a <late> b"])["input_ids"]
    assert again.decode(ids, skip_special_tokens=True) == "a <late> b"
    RxTSession(model, again)


def test_a_template_of_ones_own_is_taken_if_it_guards_special_tokens():
    tokenizer = AutoTokenizer.from_pretrained(rxt_hf.DEMO)
    expected = encode_interactions(tokenizer, ["a [A] b"])
    tokenizer.chat_template += "{# mine #}"
    assert encode_interactions(tokenizer, ["a [A] b"]) == expected


@pytest.mark.parametrize("token", ["a[", "a[A", "a<"])
def test_an_added_token_that_would_take_in_a_control_token_is_refused(token):
    backend = byte_level(add_prefix_space=False)
    backend.add_tokens([AddedToken(token, normalized=False)])
    with pytest.raises(ValueError, match="take in the start of a control token"):
        add_control_tokens(as_fast(backend))


def test_a_tool_call_without_a_name_and_parts_that_are_no_text_are_refused_by_name(load):
    tokenizer = load("byte-level")
    with pytest.raises(Exception, match="needs the name of a function"):
        ids_of(tokenizer, ("user", "a"), ("assistant", "b"), tool_calls=[{"name": None, "arguments": None}])
    with pytest.raises(Exception, match="one of the type image"):
        ids_of(tokenizer, ("user", [{"type": "image", "text": "a"}]))
    call = [{"name": "f", "arguments": None}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": call}]
    assert '{"name": "f", "arguments": {}}' in tokenizer.apply_chat_template(messages, tokenize=False)
    assert set(CONTROL_TOKENS.values()) <= set(tokenizer.get_vocab())
