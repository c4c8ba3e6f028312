# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What converted models and the language model are asked, and what is measured of both."""

import json
from random import Random

import pytest
import torch
from tables import far_probes, upcycling_cost, upcycling_long, upcycling_tasks
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("peft")

import upcycling_tasks as tasks

from rxt_hf.chat_template import train_tokenizer
from rxt_hf.convert import convert_tokenizer, from_llm
from rxt_hf.data.readers import encode_turns

from ..reference_rxt import randomize

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TURNS = [
    {"query": "My dog is Rex.", "answer": "A good dog."},
    {"query": "A table for 7.", "answer": "It is booked."},
    {"query": "My dog?", "answer": "Rex.", "asked": True, "value": "Rex", "stale": ["Tom"]},
    {"query": "Thank you.", "answer": "Bye."},
    {"query": "For how many?", "answer": "For 7.", "asked": True, "value": "7", "stale": []},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    backend = train_tokenizer(["user assistant I want a table for 7. It is booked."] * 8, 280).backend_tokenizer
    backend = Tokenizer.from_str(backend.to_str().replace("[BOS]", "<|im_start|>").replace("[EOS]", "<|im_end|>"))
    fields = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **fields, model_max_length=4096)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    source = randomize(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)), seed=3).eval()
    path = tmp_path_factory.mktemp("source")
    source.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, source, tokenizer


@pytest.fixture
def arms(base):
    _, source, source_tokenizer = base
    tokenizer = convert_tokenizer(source_tokenizer)
    between = tasks.tokens_between(source_tokenizer, tokenizer)
    model = from_llm(source, num_memory_slots=5, tokenizer=tokenizer)
    history = {"tokenizer": tokenizer, "has_memory": False, "between": between}
    found = {name: tasks.Arm(name, source, window=window, **history) for name, window in (("all", None), ("9", 9))}
    return found | {"memory": tasks.Arm("memory", model, tokenizer, True)}


@pytest.fixture
def data(tmp_path):
    probe = {"query": "My dog?", "answer": "Rex", "answers": ["Rex"], "slot": "dog", "distance": 4, "updated": False}
    turns = [{"query": turn["query"], "answer": turn["answer"], "recall": []} for turn in TURNS]
    row = json.dumps({"interactions": turns, "probes": [probe]})
    (tmp_path / "test.jsonl").write_text("\n".join([row] * 3))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "I want a table for 7. " * 5}))
    return tmp_path


def test_a_window_is_the_end_of_what_was_said(arms):
    turns = [ids for ids, _ in encode_turns(arms["all"].tokenizer, TURNS[:2])]
    said = arms["all"].tokenizer.decode(arms["all"].before(turns))
    chat = [{"role": role, "content": turn[name]} for turn in TURNS[:2] for role, name in
            (("user", "query"), ("assistant", "answer"))]  # fmt: skip
    assert said == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
    assert arms["9"].before(turns) == arms["all"].before(turns)[-9:]
    assert arms["9"]._replace(window=0).before(turns) == []
    assert arms["9"]._replace(window=10_000).before(turns) == arms["all"].before(turns)


@torch.no_grad()
def test_questions_are_answered_behind_the_true_turns(arms, monkeypatch):
    for name, arm in arms.items():
        generate, read = arm.model.generate, []

        def spy(input_ids, attention_mask, generate=generate, read=read, **options):
            for row, mask in zip(input_ids, attention_mask, strict=True):
                read.append((row[mask.bool()].tolist(), options.get("stm_cache")))
            return generate(input_ids, attention_mask=attention_mask, **options)

        monkeypatch.setattr(arm.model, "generate", spy)
        found = tasks.played(arm, [{"interactions": TURNS}], arm.memories[0])
        assert [turn["value"] for turn, _ in found] == ["Rex", "7"]
        rows = [ids for ids, _ in encode_turns(arm.tokenizer, TURNS)]
        for number, (prompt, memory) in zip((2, 4), read, strict=True):
            ((question, _),) = encode_turns(arm.tokenizer, [dict(TURNS[number], answer=None)])
            if name == "memory":
                assert prompt == question
                expected = arm.model.replay(None, rows[:number]).states
                torch.testing.assert_close(memory.states, expected, rtol=0, atol=1e-4)
            else:
                assert prompt == arm.before(rows[:number]) + question


def test_answers_are_right_stale_or_neither(arms, monkeypatch):
    said = iter(["It is Rex, not Tom.", "8", "Tom.", "7"])
    monkeypatch.setattr(tasks, "played", lambda *_: [(turn, next(said)) for turn in TURNS if turn.get("asked")])
    found = tasks.right(arms["memory"], [])
    assert found == {
        "own": {"right": 0.5, "stale": 0.0, "questions": 2},
        "cleared": {"right": 0.5, "stale": 0.5, "questions": 2},
    }


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_long_conversations_tell_all_once_and_ask_in_the_end(task):
    others = [{"query": f"other {index}", "answer": "Yes."} for index in range(50)]
    for seed in range(5):
        turns = tasks.long_conversation(task, seed, others, [20] * 50, 600)["interactions"]
        assert turns == tasks.long_conversation(task, seed, others, [20] * 50, 600)["interactions"]
        told, asked = tasks.TASKS[task](Random(f"{task}:600:{seed}"))
        assert turns[-3:] == asked and [turn for turn in turns if turn in told] == told
        assert 580 < 20 * sum(turn in others for turn in turns) + 25 * len(told) <= 600
        for question in asked:
            name = question["answer"].split(" is ")[0].removeprefix("Your ").removeprefix("The ")
            about = [turn for turn in turns[:-3] if name in turn["query"]]
            # what was told last counts
            assert question["value"] in about[-1]["query"]
            assert len(about) == 1 + len(question["stale"]) == (1 if task == "needle" else 2)
            assert all(value in about[0]["query"] for value in question["stale"])


def test_facts_are_of_names_and_values_that_training_never_sees():
    for seed in range(6):
        turns = tasks.fact_dialogue(seed, 16)["interactions"]
        asked = [turn for turn in turns if turn["asked"]]
        assert asked and all(turn["value"] for turn in asked) and len(turns) == 16


def run(base, data, *options):
    output = data / "report.json"
    sizes = ["--conversations", "2", "--lengths", "150", "--slots", "5", "--rounds", "1", "--output", str(output)]
    tasks.main(["--base", str(base[0]), "--data", str(data), *sizes, *options])
    return json.loads(output.read_text())["tasks"]


def test_measures_are_added_to_what_is_there(base, data, monkeypatch):
    monkeypatch.setattr(tasks, "FACT_TURNS", (6,))
    monkeypatch.setattr(tasks, "NEW_TOKENS", 3)
    first = run(base, data, "--measures", "probes", "--untrained", "query_only", "day_one")
    assert list(first) == ["probes"] and list(first["probes"]) == ["query_only", "day_one, 5 slots"]
    (scores,) = (value for name, value in first["probes"]["day_one, 5 slots"].items() if "dialogues" in name)
    assert scores.keys() == {"own", "cleared", "shuffled"} and scores["own"]["questions"] == 3
    found = run(
        base, data, "--measures", "facts", "long", "text", "--text", str(data / "text.jsonl"), "--untrained",
        "full_history", "day_one",
    )  # fmt: skip
    assert found["probes"] == first["probes"]
    assert found["facts"]["full_history"]["6"].keys() == {"none"}
    assert found["long"]["day_one, 5 slots"]["150"]["tracking"]["own"]["questions"] == 6
    report = {"tasks": found}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in upcycling_tasks(report).splitlines()]
    assert rows[0][2] == "facts, 6 turns" and rows[3][0] == "day_one, 5 slots, own memory"
    probes = found["probes"]["day_one, 5 slots"]
    assert far_probes(next(iter(probes.values()))["own"]) == pytest.approx(float(rows[3][1]), abs=0.005)
    lines = upcycling_long(report).splitlines()
    assert lines[2].startswith("| SmolLM2-135M-Instruct, the whole dialogue |") and len(lines) == 5
    # without a memory the converted model is the language model
    texts = [arm["perplexity"] for arm in found["text"].values()]
    assert texts[0] == texts[1] > 1


def test_cost_counts_what_is_added(base, data, monkeypatch):
    monkeypatch.setattr(tasks, "COST_TURNS", (9,))
    found = run(base, data, "--measures", "cost", "--untrained", "query_only", "day_one")["cost"]
    assert list(found) == ["day_one, 5 slots"]
    (cost,) = found.values()
    parameters = sum(parameter.numel() for parameter in base[1].parameters())
    assert cost["parameters_added"] == pytest.approx(34 / parameters)
    states = cost["turns"]["512"]["state_bytes"]
    # a slot is a vector a layer, a token of the cache two of half its size
    assert states["memory"] == 5 * 2 * 32 * 4 and states["kv_cache"] == 511 * 2 * 32 * 4
    assert all(0 < share < 1 for share in cost["write_share"].values())
    assert all(seconds > 0 for seconds in cost["turns"]["512"]["turn_cpu_s"].values())
    lines = upcycling_cost({"tasks": {"cost": found}}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| day_one, 5 slots",
        "| day_one, 5 slots, language model with its KV cache",
        "| day_one, 5 slots, language model re-reading",
    ]
    assert set(cost["decode_share"]) == {"1", "8"} and min(cost["decode_share"].values()) > 0
