# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The recipe of synthetic memory tasks: what is read, written, counted, and how it resumes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_tasks import train as memory_tasks
from memory_tasks.train import (
    MemoryTaskArguments,
    MemoryTasks,
    answer_logits,
    episode_batch,
    exact,
    generate,
)
from safetensors.torch import load_file
from torch.nn import functional as F

from rxt_hf.chat_template import train_tokenizer

from ..models import close, tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_memory_slots": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(memory_tasks.stories(["babi1", "babi8"], 100), vocab_size=400, max_length=128)


def batch_of(tokenizer, task, size=4, rows=3):
    return episode_batch(tokenizer, [generate(task, seed, size) for seed in range(rows)])


@pytest.mark.parametrize("task", ["remember", "rewrite", "mqar"])
def test_questions_in_token_ids_have_the_only_labels_and_are_not_written(task):
    episode = generate(task, 0, 4)
    batch = episode_batch(None, [episode])
    asked = [turn["kind"] == "ask" for turn in episode["interactions"]]
    assert any(asked) and not all(asked)
    assert (batch["labels"] != -100).any(-1)[0].tolist() == asked
    assert batch["write_mask"][0].tolist() == [int(not is_asked) for is_asked in asked]


def test_questions_in_words_are_written_as_every_turn_of_a_dialogue(tokenizer):
    batch = batch_of(tokenizer, "babi8")
    is_turn = batch["attention_mask"].any(-1)
    assert not is_turn.all(), "no row is shorter than another"
    assert torch.equal(batch["write_mask"] == 1, is_turn)


@pytest.mark.parametrize("task", ["remember", "mqar", "babi1"])
def test_logits_of_the_answers_are_those_of_the_whole_episode(tokenizer, task):
    model = tiny_model(vocab_size=400)
    batch = batch_of(tokenizer, task)
    logits, targets = answer_logits(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "write_mask")}
    expected = model(**inputs).logits[(batch["labels"] != -100).any(-1)][:, :-1]
    assert (targets != -100).any(-1).all()
    close(logits[targets != -100], expected[targets != -100])


def test_an_answer_counts_if_every_token_of_it_is_the_likeliest(tokenizer, monkeypatch):
    wrong = []

    def logits_of(model, batch):
        labels = batch["labels"][(batch["labels"] != -100).any(-1)][:, 1:]
        logits = F.one_hot(labels.clamp(min=0), 400).float()
        # every second question has its last token, the end, wrong
        for row in range(0, len(labels), 2):
            logits[row, (labels[row] != -100).nonzero().max(), 399] = 2.0
            wrong.append(row)
        return logits, labels

    monkeypatch.setattr(memory_tasks, "answer_logits", logits_of)
    result = exact(tiny_model(), tokenizer, "babi8", 3, episodes=30)
    assert result["questions"] == 90 and result["exact"] == round(1 - len(wrong) / 90, 4) < 0.6
    assert sum(count for _, count in result["by_distance"].values()) == 90
    assert exact(tiny_model(), None, "remember", 4, episodes=2)["bits"] == 16


def test_episodes_grow_over_the_run_and_are_a_function_of_the_step():
    options = MemoryTaskArguments(tasks=["remember", "rewrite"], size=20, max_batch_turns=80)
    data = MemoryTasks(None, options, 30)
    turns = [data[step]["input_ids"].shape[1] for step in range(0, 30, 2)]
    assert turns[0] == 4 and max(turns) == 40 and max(turns[:4]) < max(turns[4:8]) < 40
    first, again = data[7], MemoryTasks(None, options, 30)[7]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(data[28]["input_ids"][0, 0], data[29]["input_ids"][0, 0])


def test_values_are_typed_at_the_start_only_and_arguments_reach_the_generator(monkeypatch):
    asked = []

    def spy(task, seed, size, **more):
        asked.append((task, more))
        return generate(task, seed, size, **more)

    monkeypatch.setattr(memory_tasks, "generate", spy)
    options = MemoryTaskArguments(tasks=["remember", "mqar"], generator='{"num_symbols": 32}', max_batch_turns=40)
    data = MemoryTasks(None, options, 100)
    shares = []
    for step in (0, 4, 8, 10, 50):
        asked.clear()
        batch = data[step]
        shares += {more["p_typed"] for _, more in asked}
        assert batch["input_ids"].max() > 10 + 32
    assert shares == pytest.approx([1.0, 1 - 4 / 9, 1 / 9, 0.0, 0.0])
    for hint, expected in ((0.0, 0.0), (0.16, 0.5)):
        asked.clear()
        options.hint = hint
        data[8]
        assert {more["p_typed"] for _, more in asked} == {expected}
    asked.clear()
    data[1]
    assert {task for task, _ in asked} == {"mqar"} and all("p_typed" not in more for _, more in asked)


def test_an_episode_may_begin_with_the_memory_of_other_writes_which_get_no_gradient():
    options = MemoryTaskArguments(tasks=["rewrite"], size=6, history=20, max_batch_turns=40)
    data = MemoryTasks(None, options, 50)
    assert all("history" not in data[step] for step in range(30)), "binding is still to be learnt"
    lengths = [data[step]["history"].shape[1] for step in range(30, 50) if "history" in data[step]]
    assert len(lengths) > 15 and max(lengths) > 15 and min(lengths) < 6
    batch = next(data[step] for step in range(30, 50) if "history" in data[step])
    rows = len(batch["input_ids"])
    assert len(batch["history"]) == rows and not torch.equal(batch["history"][:, 0], batch["input_ids"][:, 0])
    model = tiny_model(vocab_size=60).double()
    logits, _ = answer_logits(model, batch)
    width, turns = batch["input_ids"].shape[-1], batch["history"].shape[1]
    history = F.pad(batch["history"], (0, width - batch["history"].shape[-1]))
    whole = {"input_ids": torch.cat([history, batch["input_ids"]], 1)}
    whole["attention_mask"] = torch.cat([(history != 0).long(), batch["attention_mask"]], 1)
    whole["write_mask"] = torch.cat([torch.ones(rows, turns, dtype=torch.long), batch["write_mask"]], 1)
    is_asked = (batch["labels"] != -100).any(-1)
    expected = model(**whole).logits[:, turns:][is_asked][:, :-1]
    targets = batch["labels"][is_asked][:, 1:]
    close(logits[targets != -100], expected[targets != -100], 1e-10)
    # the initial memory is read through what was written without gradient alone
    logits.sum().backward()
    assert model.model.initial_memory.grad is None or not model.model.initial_memory.grad.any()


def test_the_learning_rate_rises_stays_and_falls():
    factor = [memory_tasks.trapezoid(step, 1000, 100) for step in (0, 50, 100, 700, 850, 1000)]
    assert factor == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.02])


@pytest.mark.parametrize("task", ["remember", "babi1"])
def test_recipe_resumes_and_writes_down_what_it_measured(tmp_path, task):
    shared = ["--tasks", task, "--size", "3", "--test_sizes", "2", "3", "--test_episodes", "4", "--max_steps", "4"]
    shared += [
        "--save_steps",
        "2",
        "--max_batch_turns",
        "16",
        "--override",
        json.dumps(SIZES),
        "--disable_tqdm",
        "True",
    ]
    memory_tasks.main([*shared, "--output_dir", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    memory_tasks.main([*shared, "--output_dir", str(tmp_path / "resumed")])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert [row["size"] for row in result["exact"]] == [2, 3] and result["steps"] == 4
    with pytest.raises(ValueError, match="no task 'babi4'; the tasks are remember"):
        memory_tasks.main(["--tasks", "babi4", "--output_dir", str(tmp_path / "none")])


def test_the_recipe_of_the_results_runs(tmp_path):
    root = Path(__file__).parents[2]
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    # four processes, one thread each
    environment["OMP_NUM_THREADS"] = "1"
    options = ["--max_steps", "2", "--test_episodes", "2", "--override", json.dumps(SIZES)]
    options += ["--max_batch_turns", "60", "--bf16", "False"]
    command = ["sh", "examples/recipes/memory_tasks.sh", str(tmp_path), *options]
    done = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = {
        "remember": [10, 20, 30, 40, 50],
        "rewrite": [16, 50, 100, 200],
        "babi": [5] * 4,
        "babi_objects": [5] * 3,
    }
    for name, sizes in measured.items():
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert [row["size"] for row in result["exact"]] == sizes and result["steps"] == 2
