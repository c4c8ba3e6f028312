# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The figures of `rxt eval` against plain loops, its controls, what it sees inside, and its page."""

import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rxt_hf import DEMO
from rxt_hf.chat_template import encode_interactions, train_tokenizer
from rxt_hf.data import readers
from rxt_hf.evaluation import memory as evaluation
from rxt_hf.evaluation import report as reporting
from rxt_hf.evaluation.memory import (
    Dialogues,
    by_bucket,
    closed_loop,
    evaluate_dialogues,
    gate_values,
    look_inside,
    probes,
    teacher_forced,
    token_losses,
)

from .models import close, random_memory, tiny_model

HOSTILE = "<script>alert('&\"')</script>"
TURNS = [
    {"query": "A table for 7 people.", "answer": "It is booked."},
    {"query": "Thanks", "answer": "I want it.", "recall": []},
    {"query": "For how many?", "answer": "For 7 people.", "recall": [[4, 5, 2], [6, 12, 1]]},
]
PROBES = [
    {"query": "How many?", "answers": ["7", "seven"], "distance": 1},
    {"query": "Which table?", "answers": ["It"], "distance": 3},
]
DIALOGUES = [
    {"interactions": TURNS, "probes": PROBES},
    {"interactions": TURNS[1:]},
    {"interactions": [{"query": HOSTILE, "answer": "It is {0} 7."}, *TURNS], "probes": [PROBES[0] | {"distance": 2}]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["I want a table for 7 people. It is booked."] * 8, vocab_size=300, max_length=96)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), max_position_embeddings=96).double()


@pytest.fixture(scope="module")
def dialogues(tokenizer):
    return Dialogues(tokenizer, DIALOGUES, max_tokens=64)


def loop_losses(model, tokenizer, read):
    """`(turn, is recalled, loss)` of every answer token, turn by turn under `read(all memories, dialogue, turn)`."""
    written, found = [], []
    for dialogue in DIALOGUES:
        turns = dialogue["interactions"]
        columns = [[turn[name] for turn in turns] for name in ("query", "answer")]
        episode = encode_interactions(tokenizer, *columns)
        memories = [model.init_stm(1)]
        for ids in episode["input_ids"]:
            memories.append(model.update_memory(memories[-1], torch.tensor([ids])))
        written.append((turns, episode, memories))
    for number, (turns, episode, _) in enumerate(written):
        for turn, (ids, labels) in enumerate(zip(*episode.values(), strict=True)):
            ids, labels = torch.tensor([ids]), torch.tensor(labels)
            logits = model(input_ids=ids, stm_cache=read(written, number, turn)).logits[0, :-1]
            losses = F.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] != -100]
            answer = tokenizer.encode(turns[turn]["answer"], add_special_tokens=False)
            words = [tokenizer.decode([token]).strip() for token in answer] + [""]
            for word, loss in zip(words, losses.tolist(), strict=True):
                is_recalled = bool(turns[turn].get("recall")) and (word == "7" or word == "people")
                found.append((turn + 1, is_recalled, loss))
    return found


READS = {
    "own": lambda written, number, turn: written[number][2][turn],
    "cleared": lambda written, number, turn: written[number][2][0],
}


@torch.no_grad()
@pytest.mark.parametrize("memory", READS)
def test_teacher_forced_figures_are_those_of_a_loop_over_turns(model, tokenizer, dialogues, memory):
    found = teacher_forced(model, dialogues)
    expected = loop_losses(model, tokenizer, READS[memory])
    for name in ("all", "1", "2", "3", "4"):
        losses = [loss for turn, _, loss in expected if name in ("all", str(turn))]
        perplexity, number = found["answer_perplexity"][memory][name]
        assert number == len(losses)
        assert perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    recalled = [loss for _, is_recalled, loss in expected if is_recalled]
    nats, number = found["recall_loss"][memory]["all"]
    assert number == len(recalled) == 6
    assert nats == pytest.approx(sum(recalled) / 6, rel=1e-6)
    assert {name: number for name, (_, number) in found["recall_loss"][memory].items()} == {
        "all": 6,
        "1-1": 3,
        "2-2": 3,
    }


def test_each_dialogue_is_encoded_once_whatever_its_distances(tokenizer, monkeypatch):
    """One integer for each token says how long ago its word was said; turns without a mark have zeros."""
    calls, encode = [], readers.encode_turns
    monkeypatch.setattr(readers, "encode_turns", lambda *args: calls.append(args) or encode(*args))
    ((indices, batch),) = Dialogues(tokenizer, DIALOGUES, max_tokens=64).batches
    assert len(calls) == len(DIALOGUES)
    row = indices.index(0)
    assert batch["distances"].shape == batch["labels"].shape
    assert not batch["distances"][row, :2].any()
    is_marked = batch["distances"][row, 2] > 0
    assert tokenizer.decode(batch["input_ids"][row, 2][is_marked]).split() == ["7", "people"]
    assert set(batch["distances"][row, 2][is_marked].tolist()) == {1, 2}


@torch.no_grad()
def test_shuffled_reads_what_the_row_before_has_written_and_counts_the_same_tokens(model, tokenizer, dialogues):
    (indices, _), *others = dialogues.batches
    assert not others
    before = {index: indices[place - 1] for place, index in enumerate(indices)}

    def read(written, number, turn):
        memories = written[before[number]][2]
        # a dialogue that has ended keeps its last memory
        return memories[min(turn, len(memories) - 1)]

    found = teacher_forced(model, dialogues)["answer_perplexity"]
    losses = [loss for _, _, loss in loop_losses(model, tokenizer, read)]
    assert found["shuffled"]["all"][0] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    counts = [{name: number for name, (_, number) in figures.items()} for figures in found.values()]
    assert counts[0] == counts[1] == counts[2]
    assert found["shuffled"]["1"] == [pytest.approx(found["own"]["1"][0], rel=1e-9), found["own"]["1"][1]]
    assert abs(found["shuffled"]["all"][0] / found["own"]["all"][0] - 1) > 1e-3


def test_one_dialogue_has_no_other_memory(model, tokenizer):
    alone = Dialogues(tokenizer, DIALOGUES[:1], max_tokens=64)
    assert set(teacher_forced(model, alone)["recall_loss"]) == {"own", "cleared"}
    with pytest.raises(ValueError, match="expected 2 rows or more, got 1"):
        token_losses(model, alone.batches[0][1], "shuffled")


def test_no_batch_of_many_dialogues_has_one_row(tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS", 3)
    found = Dialogues(tokenizer, DIALOGUES[:1] * 7, max_tokens=64).batches
    assert sorted(len(indices) for indices, _ in found) == [2, 2, 3]
    assert sorted(index for indices, _ in found for index in indices) == list(range(7))


def test_dialogues_without_an_answer_in_the_limit_or_without_text_are_refused(tokenizer):
    with pytest.raises(ValueError, match="up to 3 tokens: use --tokens"):
        Dialogues(tokenizer, DIALOGUES, max_tokens=3)
    with pytest.raises(ValueError, match="token ids, expected text"):
        Dialogues(tokenizer, [{"interactions": [{"query": [1], "answer": [2]}]}], max_tokens=3)


@pytest.fixture
def knowing(model, tokenizer, monkeypatch):
    """A model that answers a question about a number by 7 if the memory is that of the first dialogue."""
    first = Dialogues(tokenizer, DIALOGUES[:1], max_tokens=64)
    episode = first.episodes[0]["input_ids"]
    memory = model.init_stm(1)
    for ids in episode:
        memory = model.update_memory(memory, torch.tensor([ids]))

    def generate(input_ids, attention_mask, stm_cache, update_memory, **_):
        assert not update_memory and len(stm_cache) == len(input_ids)
        texts = []
        for ids, states in zip(input_ids, stm_cache.states, strict=True):
            is_first = torch.allclose(states, memory.states[0], atol=1e-9)
            text = " 7" if is_first and "many" in tokenizer.decode(ids) else "They are 7."
            texts.append([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])
        width = max(map(len, texts))
        rows = [[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in texts]
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor(rows)], dim=1), stm_cache=stm_cache)

    monkeypatch.setattr(model, "generate", generate)
    return model


def test_probes_are_asked_from_the_last_memory_and_scored_exactly(knowing, tokenizer):
    found = probes(knowing, tokenizer, Dialogues(tokenizer, DIALOGUES, max_tokens=64), max_new_tokens=4)
    # the first dialogue's memory answers its own question, or the same one of the last dialogue, which is before it
    expected = {"own": (1 / 3, 1.0, 0.0), "cleared": (0.0, 0.0, 0.0), "shuffled": (1 / 3, 0.0, 1.0)}
    for memory, (exact, first, last) in expected.items():
        assert found[memory]["questions"] == 3
        assert found[memory]["exact"] == pytest.approx(exact)
        assert found[memory]["exact_by_distance"] == {"1": [first, 1], "2": [last, 1], "3-4": [0.0, 1]}
        assert found[memory]["contains"] == pytest.approx(2 / 3)


@torch.no_grad()
def test_greedy_answers_are_those_of_generate_turn_by_turn(model, tokenizer, dialogues):
    instruction = {"query": None, "answer": None, "instruction": "Book it."}
    mixed = [*DIALOGUES, {"interactions": [instruction, *TURNS]}]
    encoded = Dialogues(tokenizer, mixed, max_tokens=64)
    for memory in ("own", "cleared"):
        expected = []
        for dialogue, episode in zip(mixed, encoded.episodes, strict=True):
            states = model.init_stm(1)
            for turn, ids in zip(dialogue["interactions"], episode["input_ids"], strict=True):
                if turn["query"] is None:
                    states = model.update_memory(states, torch.tensor([ids]))
                    continue
                prompt = torch.tensor(encode_interactions(tokenizer, [turn["query"]])["input_ids"])
                read = states if memory == "own" else model.init_stm(1)
                out = model.generate(input_ids=prompt, stm_cache=read, max_new_tokens=6, do_sample=False)
                states = out.stm_cache
                text = tokenizer.decode(out.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
                expected.append((text, turn["answer"]))
        assert sorted(closed_loop(model, tokenizer, encoded, memory, max_new_tokens=6)) == sorted(expected)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_a_gate_is_seen_once_at_each_write_with_the_weight_it_blends_by(activation):
    model = tiny_model(memory_attention_type="interlayer", memory_gate_activation=activation)
    old = random_memory(model)
    ids = torch.arange(3, 9).repeat(2, 1)
    blended = []
    gate = model.model.memory_attention.layers[1].write_gate
    handle = gate.register_forward_hook(lambda module, states, output: blended.append((*states, output)))
    with torch.no_grad(), gate_values(model) as values:
        for _ in range(3):
            old = model.update_memory(old, ids)
    handle.remove()
    assert set(values) == {f"layers.{layer}.{kind}_gate" for layer in (0, 1) for kind in ("pre", "write")}
    assert [len(each) for each in values.values()] == [3] * 4
    for weights, (before, update, after) in zip(values["layers.1.write_gate"], blended, strict=True):
        assert weights.shape == (2, 5)
        # out = keep * old + write * new, with keep = 1 - write, or for tanh 2 - write
        total = 1.0 if activation == "sigmoid" else 2.0
        share = ((after - total * before) / (update - before)).mean(-1)
        close(weights, share, 1e-3)
    model.update_memory(old, ids)
    assert len(values["layers.1.write_gate"]) == 3


@torch.no_grad()
def test_inside_shows_what_each_turn_wrote_and_what_its_answer_read(model, tokenizer, dialogues):
    inside = look_inside(model, dialogues.episodes[0], TURNS)
    memories = [model.init_stm(1)]
    for ids in dialogues.episodes[0]["input_ids"]:
        memories.append(model.update_memory(memories[-1], torch.tensor([ids])))
    old, new = (torch.cat([memory.states for memory in part]) for part in (memories[:-1], memories[1:]))
    expected = {
        "change": (new - old).norm(dim=-1) / old.norm(dim=-1),
        "cosine_to_before": F.cosine_similarity(new, old, dim=-1),
        "cosine_to_initial": F.cosine_similarity(new, old[:1], dim=-1),
        "norm": new.norm(dim=-1),
    }
    for name, values in expected.items():
        close(torch.tensor(inside[name], dtype=torch.double), values, 1e-5)
    close(torch.tensor(inside["read"]).sum(-1), torch.ones(3, 2), 1e-3)
    # the last turn by hand: the answer's tokens are predicted by those before them
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([dialogues.episodes[0]["input_ids"][2]])
    weights = model(input_ids=ids, stm_cache=memories[2], output_attentions=True).cross_attentions
    model.set_attn_implementation(before)
    start = dialogues.episodes[0]["labels"][2].count(-100) - 1
    by_hand = torch.stack([layer[0, :, start:-1].mean((0, 1)) for layer in weights])
    close(torch.tensor(inside["read"][2], dtype=torch.double), by_hand.double(), 1e-5)
    assert torch.tensor(inside["gates"]["write_gate"]).shape == (3, 2, 5)
    assert evaluation.alarms_of(inside, 5) == []


@torch.no_grad()
def test_collapsed_unwritten_and_broken_memories_raise_an_alarm(tokenizer, dialogues):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=96)
    initial = model.model.initial_memory
    initial[:] = initial[:, :1]
    for layer in model.model.memory_attention.layers:
        # nothing passes the gate
        for parameter in layer.write_gate.parameters():
            parameter.zero_()
        (layer.write_gate.gate_bias if layer.write_gate.gate_bias is not None else layer.write_gate.gate.bias).fill_(
            -1e4
        )
        if hasattr(layer, "pre_gate"):
            layer.pre_gate.load_state_dict(layer.write_gate.state_dict())
    alarms = evaluation.alarms_of(look_inside(model, dialogues.episodes[0], TURNS), 5)
    assert "turn 1, layer 0: effective rank 1.00 of 5 slots" in alarms
    assert "turn 3, layer 1: nothing was written" in alarms
    model.model.memory_attention.layers[1].write_attn.o_proj.weight.fill_(math.nan)
    broken = look_inside(model, dialogues.episodes[0], TURNS)
    assert evaluation.alarms_of(broken, 5)[-1] == "turn 1: the memory is not finite"
    found = evaluate_dialogues(model, tokenizer, DIALOGUES, inside=1)
    assert "not finite" in found["alarms"][-1] and "bleu" not in found


def options(tmp_path, **given):
    settings = {"data": [str(DEMO)], "dialogues": 50, "skip_bad_rows": False, "tokens": 64, "inside": 4}
    files = {"output": str(tmp_path / "eval.json"), "report": str(tmp_path / "eval.html")}
    return SimpleNamespace(**(settings | files | given))


class Texts(HTMLParser):
    """All tags and attributes of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_the_command_writes_figures_and_a_page_that_loads_nothing_and_escapes_all_text(tokenizer, tmp_path):
    folder = tmp_path / "a<b>&c"
    folder.mkdir()
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, DIALOGUES)))
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=96)
    printed = evaluation.run(options(tmp_path, data=[str(folder)], tokens=60), model, tokenizer)
    report = json.loads((tmp_path / "eval.json").read_text())
    assert set(report["sources"]) == {"a<b>&c"}
    found = report["sources"]["a<b>&c"]
    assert (found["dialogues"], found["turns"], len(found["inside"])) == (3, 9, 3)
    assert found["bleu"]["answers"] == 9 and found["probes"]["shuffled"]["questions"] == 3
    perplexity = reporting.shown(found["answer_perplexity"]["own"]["all"][0])
    assert f"| own | {perplexity} |" in printed and "probes, exact answers" in printed

    html = (tmp_path / "eval.html").read_text()
    assert html == reporting.page(report)
    assert HOSTILE not in html and "<b>" not in html and "http" not in html
    page = Texts(html)
    allowed = "html head meta title style body h1 h2 h3 p table tr th td figure figcaption svg g path line polyline"
    assert page.tags <= {*allowed.split(), "circle", "text"}
    assert not page.attributes & {"src", "href", "onload"}
    assert HOSTILE in page.text and "a<b>&c" in page.text and "It is {0} 7." in page.text and perplexity in page.text


def test_without_data_the_demo_is_measured_on_its_test_set(tmp_path):
    model, tokenizer = (auto.from_pretrained(DEMO) for auto in (AutoModelForCausalLM, AutoTokenizer))
    printed = evaluation.run(options(tmp_path, dialogues=4, inside=1), model, tokenizer)
    found = json.loads((tmp_path / "eval.json").read_text())["sources"]["demo"]
    assert found["probes"]["own"]["contains"] > 0.9 and found["probes"]["cleared"]["contains"] < 0.1
    assert found["recall_loss"]["own"]["all"][0] < 0.5 < 3 < found["recall_loss"]["cleared"]["all"][0]
    assert "demo: probes, exact answers" in printed


def test_a_missing_folder_is_refused_before_anything_is_measured(tmp_path):
    given = options(tmp_path)
    given.report = str(tmp_path / "missing" / "eval.html")
    with pytest.raises(FileNotFoundError, match=re.escape(given.report)):
        evaluation.run(given, None, None)


def test_buckets_are_the_powers_of_two():
    pairs = [(1, True), (2, False), (3, True), (4, False), (5, True), (8, True), (9, False), (16, False)]
    pairs += [(17, True), (32, False), (32, False), (33, True), (64, True)]
    assert by_bucket(iter(pairs)) == {
        "1": [1.0, 1],
        "2": [0.0, 1],
        "3-4": [0.5, 2],
        "5-8": [1.0, 2],
        "9-16": [0.0, 2],
        "17-32": [0.3333, 3],
        "33-64": [1.0, 2],
    }
    assert by_bucket([]) == {}


def test_charts_have_a_point_for_each_figure_and_leave_out_what_is_missing():
    chart = reporting.line_chart("<t>", {"own": {"1": 2.0, "2": None, "3": 4.0}, "x": {}}, "turn")
    assert chart.count("<circle") == 2 and "&lt;t&gt;" in chart
    tops = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart)]
    assert tops == [93.0, 8.0]
    drawn = reporting.heatmap("m", [[0.0, 1.0], [None, 1.0]])
    assert '<path fill="#ffffff" d="M0 0h1v1h-1z"/>' in drawn
    assert '<path fill="#08306b" d="M1 0h1v1h-1zM1 1h1v1h-1z"/>' in drawn
    assert '<path fill="#c00" d="M0 1h1v1h-1z"/>' in drawn and "m: 0 to 1" in drawn
