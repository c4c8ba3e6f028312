# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Real dialogues are not part of this repository: RXT_DATA names their folder, or it is `../shared/data` beside it.
"""

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from demo.facts import generate_dialogue
from memory_tasks.tasks import generate_remember
from torch.utils.data import DataLoader
from train_dialogues import texts

from rxt_hf.chat_template import encode_interactions, train_tokenizer
from rxt_hf.data.batching import bucket_by_turns
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.readers import (
    Episodes,
    cut_episode,
    pack_texts,
    read_episodes,
    read_jsonl,
)
from rxt_hf.data.rows import split_messages
from rxt_hf.training.run import _as_text

from .models import tiny_model

DATA = Path(os.environ.get("RXT_DATA") or Path(__file__).parents[2] / "shared" / "data")
# in the form of the real sets: character spans of recalled words, and probes to be asked after the last turn
BOOKING = {
    "id": "sample-1",
    "interactions": [
        {"query": "A table at Benissimo [A] please.", "answer": "For how many?", "recall": []},
        {"query": "For two.", "answer": "Benissimo [A], for two, at noon?", "recall": [[0, 9, 1]]},
        {
            "query": "At noon, in Lima.",
            "answer": "[EOS][EOS][EOS][EOS] Yes, Benissimo in Lima.",
            "recall": [[26, 35, 1]],
        },
        {"query": "Thanks.", "answer": "Goodbye.", "recall": []},
    ],
    "probes": [
        {"query": "Name?", "answer": "Benissimo", "answers": ["Benissimo"], "distance": 2, "updated": False},
        {"query": "Seats?", "answer": "two", "answers": ["two", "2"], "distance": 3, "updated": False},
        {"query": "City?", "answer": "Lima", "answers": ["Lima"], "distance": 2, "updated": False},
    ],
}
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CHAT = [
    {"role": "system", "content": "Be [A] kind."},
    {"role": "user", "content": "Hi!"},
    {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "are you?"}]},
    {"role": "assistant", "content": "Fine."},
    {"role": "assistant", "content": "And you?"},
    {"role": "user", "content": "Is it cold in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "-3"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Minus is cold."},
    {"role": "user", "content": "Are you still there?"},
]
SPLIT = [
    {"query": None, "answer": None, "instruction": "Be [A] kind."},
    {"query": "Hi!\nHow are you?", "answer": "Fine.\nAnd you?"},
    {"query": "Is it cold in Oslo?", "answer": "", "tool_calls": [CALL]},
    {"query": "-3", "answer": "Yes.", "role": "tool", "thinking": "Minus is cold."},
]
RENDERED = [
    "[BOS][I]Be [A] kind.[EOS]",
    "[BOS][Q]Hi!\nHow are you?[A]Fine.\nAnd you?[EOS]",
    '[BOS][Q]Is it cold in Oslo?[A][C]{"name": "weather", "arguments": {"city": "Oslo"}}[EOS]',
    "[BOS][U]-3[T]Minus is cold.[A]Yes.[EOS]",
]
LEARNED = ["", "Fine.\nAnd you?[EOS]", RENDERED[2].split("[A]")[1], "Minus is cold.[A]Yes.[EOS]"]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn[side] for turn in BOOKING["interactions"] for side in ("query", "answer")]
    return train_tokenizer([*texts, "Benissimo in Lima, Benissimo in Oslo."], vocab_size=400)


def write_lines(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def learned_text(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_jsonl_is_read_packed_or_not_from_a_file_or_a_folder(tmp_path, name):
    path = write_lines(tmp_path / name, [BOOKING, {"text": "é"}])
    assert list(read_jsonl(path)) == [BOOKING, {"text": "é"}]
    write_lines(path, [BOOKING])
    assert list(read_episodes(str(path))) == list(read_episodes(tmp_path, "train")) == [BOOKING]


def test_a_broken_line_and_a_missing_split_are_named(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"query": "a", "answer": "b"}\n\n{"query"\n')
    with pytest.raises(ValueError, match=r"test.jsonl, line 3: this is not JSON: .*column 9"):
        list(read_jsonl(path))
    path.write_text("1\n")
    with pytest.raises(ValueError, match=r"line 1: this is a int"):
        list(read_jsonl(path))
    with pytest.raises(FileNotFoundError, match=r"no split 'train', only \['test'\]"):
        list(read_episodes(tmp_path, "train"))
    with pytest.raises(FileNotFoundError, match=r"no split None, only \['dev'\]"):
        list(read_episodes({"dev": []}))


def test_a_data_set_gives_the_episodes_of_its_rows(tokenizer):
    datasets = pytest.importorskip("datasets")
    single = {"query": "Hi!", "answer": "Hello.", "source": "x"}
    rows = datasets.Dataset.from_list([single])
    assert list(read_episodes(rows)) == list(read_episodes(datasets.DatasetDict(train=rows), "train"))
    assert list(read_episodes(rows)) == [{"interactions": [single]}]
    # a column of structs fills what one of them lacks with None
    chat = [CHAT[0], {"role": "user", "content": SPLIT[1]["query"]}, *CHAT[3:]]
    (episode,) = read_episodes(datasets.Dataset.from_list([{"id": 7, "messages": chat}, {"id": 8, "messages": []}]))
    assert episode["id"] == 7
    assert [turn["answer"] for turn in episode["interactions"]] == [turn["answer"] for turn in SPLIT]
    assert Episodes(tokenizer, [episode])[0] == Episodes(tokenizer, [{"interactions": SPLIT}])[0]


def test_a_data_set_of_the_hub_is_read_by_name(tmp_path, monkeypatch):
    def load_dataset(name, subset, split):
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\".\nShould be one of ['train'].")
        return [{"query": name, "answer": str(subset)}, {"query": 3}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    first = next(read_episodes("some-one/chats:small", "train"))
    assert first == {"interactions": [{"query": "some-one/chats", "answer": "small"}]}
    with pytest.raises(ValueError, match="some-one/chats, train, row 1: expected interactions"):
        list(read_episodes("some-one/chats", "train"))
    with pytest.raises(ValueError, match=r"no file or folder, and cannot .*: Unknown split \"dev\"\. Should be"):
        list(read_episodes("some-one/chats", "dev"))
    with pytest.raises(ValueError, match="name the split"):
        list(read_episodes("some-one/chats"))
    # what is there, or ends as files do, is a file
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"some-one/train.jsonl"):
        list(read_episodes("some-one/train.jsonl", "train"))
    (tmp_path / "some-one" / "chats").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"some-one/chats has no split 'train', only \[\]"):
        list(read_episodes("some-one/chats", "train"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs: pip install 'rxt-hf\[train\]'"):
        list(read_episodes("no-one/chats", "train"))


def test_generated_dialogues_are_episodes_as_they_are(tokenizer):
    dialogue = generate_dialogue(1)
    assert list(read_episodes([dialogue])) == [dialogue]
    assert len(Episodes(tokenizer, [dialogue])[0]["labels"]) == 8


@pytest.mark.parametrize("row", [{"text": "a"}, {"interactions": [{"query": "a"}]}, "a", {"messages": [{}]}])
def test_a_row_that_is_no_episode_is_named(row):
    with pytest.raises(ValueError, match=r"Row 1: "):
        list(read_episodes([BOOKING, row]))


def test_a_chat_becomes_interactions_and_loses_only_its_unanswered_end():
    assert split_messages(CHAT) == SPLIT
    assert split_messages(CHAT[3:5]) == [{"query": "", "answer": "Fine.\nAnd you?"}]
    assert list(read_episodes([{"messages": CHAT[:2]}])) == []


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "critic", "content": "a"}], "role 'critic' is unknown"),
        ([CHAT[1], CHAT[0]], "system message follows a user message"),
        ([CHAT[7], CHAT[1]], "user message follows a tool message"),
        ([CHAT[1], CHAT[6], CHAT[3]], "follows a tool call"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be text"),
        ([{"role": "user", "content": None}], "must be text"),
    ],
)
def test_a_chat_that_the_template_cannot_say_is_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        split_messages(messages)


def test_interactions_of_every_kind_are_encoded_as_the_template_renders_them(tokenizer):
    item = Episodes(tokenizer, [{"interactions": SPLIT}])[0]
    assert [tokenizer.decode(ids) for ids in item["input_ids"]] == RENDERED
    assert [learned_text(tokenizer, labels) for labels in item["labels"]] == LEARNED
    # the brackets that were typed stay text
    assert tokenizer.answer_token_id not in item["input_ids"][0]
    for ids, labels in zip(item["input_ids"], item["labels"], strict=True):
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_plain_interactions_are_encoded_as_everywhere_else(tokenizer):
    turns = [*BOOKING["interactions"], {"query": "And now?", "answer": None, "instruction": "Be brief."}]
    queries, answers = ([turn[side] for turn in turns] for side in ("query", "answer"))
    expected = encode_interactions(tokenizer, queries, answers, instructions=[None] * 4 + ["Be brief."])
    assert Episodes(tokenizer, [{"interactions": turns}])[0] == expected


def test_a_tokenizer_is_trained_on_what_is_said_and_not_on_the_word_for_nothing():
    turns = [
        {"query": None, "answer": None, "instruction": "Be kind."},
        {"query": "Hi", "answer": None},
        {"query": [1], "answer": "yo"},
    ]
    dialogue = {"interactions": turns, "probes": [{"query": "q", "answer": "a"}]}
    assert list(texts([dialogue])) == ["Be kind.", "Hi", "yo", "q a"]
    assert list(texts([dialogue | {"probes": None}])) == ["Be kind.", "Hi", "yo"]
    assert _as_text(dialogue) == "Be kind.\nHi\nyo"


def test_recall_labels_are_the_marked_words_and_nothing_else(tokenizer):
    episodes = Episodes(tokenizer, [BOOKING, {"interactions": SPLIT}])
    words = [learned_text(tokenizer, labels).strip() for labels in episodes.recall_labels[0]]
    assert words == ["", "Benissimo", "Benissimo", ""]
    for recall, labels in zip(episodes.recall_labels[0], episodes[0]["labels"], strict=True):
        assert all(word in (-100, label) for word, label in zip(recall, labels, strict=True))
    assert episodes.recall_labels[1] is None


def test_a_cut_episode_keeps_the_probes_that_its_turns_can_answer():
    kept = [(probe["query"], probe["distance"]) for probe in cut_episode(BOOKING, 3)["probes"]]
    assert kept == [("Name?", 1), ("Seats?", 2), ("City?", 1)]
    assert [probe["query"] for probe in cut_episode(BOOKING, 2)["probes"]] == ["Seats?"]
    assert cut_episode(BOOKING, 4) == BOOKING
    assert len(cut_episode(BOOKING, 2)["interactions"]) == 2 and len(BOOKING["interactions"]) == 4


def test_episodes_are_cut_to_turns_and_before_an_interaction_that_is_too_long(tokenizer, caplog):
    lengths = [len(ids) for ids in Episodes(tokenizer, [BOOKING])[0]["input_ids"]]
    assert lengths[2] > max(lengths[:2])
    episodes = Episodes(tokenizer, [BOOKING, {"interactions": BOOKING["interactions"][2:]}], max_tokens=lengths[2] - 1)
    assert episodes.sizes == [(2, max(lengths[:2]))]
    assert [len(episodes.dialogues[0][name]) for name in ("interactions", "probes")] == [2, 1]
    assert len(episodes.recall_labels[0]) == 2
    assert Episodes(tokenizer, [BOOKING], max_turns=1).sizes == [(1, lengths[0])]
    assert Episodes(tokenizer, [BOOKING], max_tokens=lengths[2]).sizes == [(4, lengths[2])]
    with pytest.raises(ValueError, match="max_turns=0"):
        Episodes(tokenizer, [BOOKING], max_turns=0)


@pytest.mark.parametrize("extra", [{}, {"thinking": "Hm."}])
def test_what_is_longer_than_the_tokenizer_allows_raises_unless_it_is_to_be_cut(tokenizer, extra):
    long = {"interactions": [BOOKING["interactions"][0], {"query": "7" * 2000, "answer": "8"} | extra]}
    with pytest.raises(ValueError, match="more than model_max_length=1024"):
        Episodes(tokenizer, [long])
    assert Episodes(tokenizer, [long], max_tokens=1024).sizes[0][0] == 1
    assert tokenizer.model_max_length == 1024


def test_every_episode_comes_once_in_batches_of_bounded_size_and_like_turns():
    sizes = [(1 + index % 7, 5 + index % 11) for index in range(200)]
    batches = bucket_by_turns(sizes, max_batch_tokens=300, seed=1, epoch=2)
    assert Counter(index for batch in batches for index in batch) == Counter(range(200))
    padded = [
        len(batch) * max(sizes[index][0] for index in batch) * max(sizes[index][1] for index in batch)
        for batch in batches
    ]
    assert max(padded) <= 300 and sum(padded) < 1.35 * sum(turns * tokens for turns, tokens in sizes)
    spread = [max(turns) - min(turns) for turns in ([sizes[index][0] for index in batch] for batch in batches)]
    assert max(spread) == 1
    alike = bucket_by_turns(sizes, max_batch_tokens=300, max_turn_difference=0)
    assert all(len({sizes[index][0] for index in batch}) == 1 for batch in alike)


def test_batches_depend_on_seed_and_epoch_alone():
    sizes = [(1 + index % 3, 5) for index in range(60)]
    orders = [bucket_by_turns(sizes, max_batch_tokens=60, seed=seed, epoch=epoch) for seed, epoch in [(1, 0)] * 2]
    assert orders[0] == orders[1]
    others = [bucket_by_turns(sizes, max_batch_tokens=60, seed=seed, epoch=epoch) for seed, epoch in [(1, 1), (2, 0)]]
    composed = [sorted(sorted(batch) for batch in batches) for batches in (orders[0], *others)]
    assert composed[0] != composed[1] and composed[0] != composed[2]
    # long and short come mixed, not in the order of their turns
    assert [sizes[batch[0]][0] for batch in orders[0]] != sorted(sizes[batch[0]][0] for batch in orders[0])
    with pytest.raises(ValueError, match="Episode 0 has 9 turns of up to 9 tokens, more than max_batch_tokens=80"):
        bucket_by_turns([(9, 9)], max_batch_tokens=80)
    assert bucket_by_turns([], max_batch_tokens=1) == []


def test_batches_of_text_and_of_token_ids_go_into_the_model(tokenizer):
    remembered = [generate_remember(seed, num_pairs=2 + seed % 3, num_symbols=8) for seed in range(6)]
    episodes = Episodes(None, remembered)
    batches = bucket_by_turns(episodes.sizes, max_batch_tokens=64)
    loader = DataLoader(episodes, batch_sampler=batches, collate_fn=RxTEpisodeCollator(pad_token_id=0))
    model = tiny_model()
    for batch in loader:
        assert batch["input_ids"].max() < remembered[0]["vocab_size"] <= model.config.vocab_size
        loss = model(**batch).loss
        assert loss.isfinite() and loss > 0
    with pytest.raises(ValueError, match="need a tokenizer"):
        Episodes(None, [BOOKING])


def test_token_ids_are_wrapped_as_the_tokenizer_wraps_text(tokenizer):
    turns = [{"query": [20, 30], "answer": None}, {"query": [20], "answer": [30]}]
    bos, query, answer, eos = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "query", "answer", "eos"))
    assert Episodes(None, [{"interactions": turns}])[0] == {
        "input_ids": [[bos, query, 20, 30, answer], [bos, query, 20, answer, 30, eos]],
        "labels": [[-100] * 5, [-100, -100, -100, -100, 30, eos]],
    }


@pytest.mark.parametrize("length", [7, 16])
def test_packing_neither_loses_nor_doubles_a_token(tokenizer, length):
    texts = ["Benissimo in Lima.", "", "[EOS] is text " * 40, "é\n", *["Oslo"] * 300]
    rows = list(pack_texts(tokenizer, iter(texts), length))
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert [len(row["input_ids"]) for row in rows[:-1]] == [length] * (len(rows) - 1)
    assert 0 < len(rows[-1]["input_ids"]) <= length
    tokens = [token for row in rows for token in row["input_ids"]]
    documents = []
    for token in tokens:
        if token == tokenizer.bos_token_id:
            documents.append([])
        documents[-1].append(token)
    assert all(document.pop() == tokenizer.eos_token_id for document in documents)
    assert tokens.count(tokenizer.eos_token_id) == len(texts)
    assert [tokenizer.decode(document[1:]) for document in documents] == texts
    with pytest.raises(ValueError, match="length=0"):
        list(pack_texts(tokenizer, texts, 0))


@pytest.mark.parametrize("name", ["sgd", "star"])
def test_real_dialogues_are_read_with_their_probes_and_recalled_words(tokenizer, name):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there: these dialogues lie beside the repository, not in it")
    dialogues = [episode for episode, _ in zip(read_episodes(DATA / name, "test"), range(100), strict=False)]
    episodes = Episodes(tokenizer, dialogues, max_turns=8, max_tokens=256)
    assert len(episodes) == 100 and sum(len(dialogue["probes"]) for dialogue in episodes.dialogues) > 100
    marked = 0
    for dialogue, recall in zip(episodes.dialogues, episodes.recall_labels, strict=True):
        said = " ".join(turn[side] for turn in dialogue["interactions"] for side in ("query", "answer")).lower()
        assert all(1 <= probe["distance"] <= len(dialogue["interactions"]) for probe in dialogue["probes"])
        assert all(any(form.lower() in said for form in probe["answers"]) for probe in dialogue["probes"])
        for turn, labels in zip(dialogue["interactions"], recall, strict=True):
            text = learned_text(tokenizer, labels)
            assert all(turn["answer"][start:end] in text for start, end, _ in turn["recall"])
            assert len(text) <= sum(end - start + 4 for start, end, _ in turn["recall"])
            marked += len(turn["recall"])
    assert marked > 50
