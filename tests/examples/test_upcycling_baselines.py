# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The language model without a memory that a converted one is compared with."""

import json
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

pytest.importorskip("peft")

import upcycling
import upcycling_baselines as baselines
import upcycling_paper as paper

from rxt_hf.chat_template import train_tokenizer
from rxt_hf.convert import convert_tokenizer, from_llm, load_adapted
from rxt_hf.data.readers import Episodes
from rxt_hf.evaluation.memory import Dialogues

from ..models import close
from ..reference_rxt import randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:Could not find")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
DIALOGUES = [
    {
        "interactions": [
            {"query": f"I want {word}", "answer": "It is booked.", "recall": []},
            {"query": "a table for 7 people", "answer": "It is booked.", "recall": []},
            {"query": "for I want?", "answer": word, "recall": [[0, len(word), 2]]},
        ]
    }
    for word in ("ab1", "cd2", "ef3", "gh4", "ij5", "kl6")
]


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    backend = train_tokenizer(["user assistant I want a table for 7. It is booked."] * 8, 280).backend_tokenizer
    text = backend.to_str().replace("[BOS]", "<|im_start|>").replace("[EOS]", "<|im_end|>")
    fields = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(text), **fields, model_max_length=512)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    randomize(LlamaForCausalLM(config), seed=3).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def told(source_folder, tmp_path_factory):
    source, source_tokenizer = baselines.load_source(str(source_folder))
    tokenizer = convert_tokenizer(source_tokenizer)
    episodes = Episodes(tokenizer, DIALOGUES)
    model = from_llm(source, tokenizer=tokenizer, num_memory_slots=5)
    folder = tmp_path_factory.mktemp("turns")
    turns = baselines.ToldTurns(model, episodes, folder, 1, rounds=2, topics=2, ordinary_share=0.3, seed=3)
    return source, source_tokenizer, tokenizer, turns


def options(**fields):
    return baselines.BaselineArguments(model="", data=[], **fields)


def test_rows_are_the_turns_of_the_recipe_behind_what_was_told_before(told):
    _, source_tokenizer, tokenizer, turns = told
    between = baselines.tokens_between(source_tokenizer, tokenizer)
    assert tokenizer.decode(between) == "\n"
    kept = sum(map(sum, turns.is_kept))
    whole = baselines.Texts(turns, between, options())
    windows = baselines.Texts(turns, between, options(history=4))
    alone = baselines.Texts(turns, between, options(history=0))
    assert 6 < kept < 18 and len(alone) == len(windows) == kept and 3 <= len(whole) < 6
    for rows in (whole, windows, alone):
        # the same labels, whatever stands before them
        assert sum(sum(row["is_recalled"]) for row in rows) == sum(sum(row["is_recalled"]) for row in alone) > 6
        assert sum(label != -100 for row in rows for label in row["labels"]) == sum(
            label != -100 for row in alone for label in row["labels"]
        )
    for long, short in zip(windows, alone, strict=True):
        cut = len(long["labels"]) - len(short["labels"])
        assert cut in (0, 4) and all(long[name][cut:] == short[name] for name in short)
        length, found = len(long["labels"]), long["input_ids"]
        starts = [(row["input_ids"], start) for row in whole for start in range(len(row["labels"]))]
        assert any(ids[start : start + length] == found for ids, start in starts)


def test_language_model_trains_and_is_measured(source_folder, told, tmp_path, monkeypatch):
    path = tmp_path / "dialogues"
    path.mkdir()
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, DIALOGUES)))
    out = tmp_path / "out"
    command = ["--model", str(source_folder), "--data", str(path), "--output_dir", str(out), "--max_steps", "3"]
    command += ["--rounds", "1", "--learning_rate", "0.05", "--warmup_steps", "0", "--logging_steps", "1"]
    baselines.main([*command, "--history", "9", "--bf16", "False", "--disable_tqdm", "True"])
    report = json.loads((out / "run.json").read_text())
    assert report["history"] == 9 and report["steps"] == 3 and (out / "adapter_model.safetensors").is_file()

    output = tmp_path / "report.json"
    call = [
        "upcycling.py",
        "--base",
        str(source_folder),
        "--data",
        str(path),
        "--dialogues",
        "6",
        "--output",
        str(output),
    ]
    call += ["--arms", "query_only", "full_history", "--baselines", f"window={out}", "--before", "2"]
    monkeypatch.setattr(sys, "argv", call)
    upcycling.main()
    arms = json.loads(output.read_text())["arms"]["dialogues, 6 dialogues, each behind 2 others"]
    assert set(arms) == {"query_only", "full_history", "window"}
    nats = [arms[name]["none"]["recalled"]["all"][0] for name in arms]
    assert len(set(nats)) == 3
    # of the last dialogue alone
    assert len({arms[name]["none"]["recalled"]["all"][1] for name in arms}) == 1
    assert arms["window"]["training"]["steps"] == 3


@torch.no_grad()
@pytest.mark.parametrize("history", [None, 11, 0])
def test_history_is_what_stands_before_a_turn(told, history):
    source, _, tokenizer, _ = told
    batch = Dialogues(tokenizer, DIALOGUES[:2], max_tokens=60).batches[0][1]
    found = upcycling.history_losses(source, [9], history)(batch)
    expected = []
    for ids, mask, labels in zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        before: list[int] = []
        for turn in range(3):
            said = ids[turn][mask[turn].bool()].tolist()
            context = before if history is None else before[len(before) - history :] if history else []
            logits = source(torch.tensor([context + said])).logits[0]
            for place in range(1, len(said)):
                if labels[turn, place] != -100:
                    expected.append(F.cross_entropy(logits[len(context) + place - 1], ids[turn, place]))
            before = before + said + [9]
    # autocast to bfloat16
    close(found, torch.stack(expected), 0.1)


@torch.no_grad()
def test_loss_of_the_papers_form_is_of_the_chosen_turns_behind_all_that_was_told(told, tmp_path):
    source, _, tokenizer, turns = told
    rows = paper.ToldEpisodes(turns)
    assert len(rows) > 1 and sum(len(row["labels"]) for row in rows) <= 3 * len(DIALOGUES)
    model = from_llm(source, tokenizer=tokenizer, num_memory_slots=5, **paper.PAPER)
    # the gate of the cross-attention starts closed
    randomize(model, seed=5)
    total = weights = 0.0
    for row in rows:
        memory = model.init_stm(1)
        for ids, labels, recalled in zip(row["input_ids"], row["labels"], row["is_recalled"], strict=True):
            said = model(torch.tensor([ids]), stm_cache=memory).logits[0].log_softmax(-1)
            for place in range(1, len(ids)):
                if labels[place] != -100:
                    weight = 3.0 if recalled[place] else 1.0
                    total, weights = total - weight * said[place - 1, labels[place]].item(), weights + weight
            memory = model.update_memory(memory, torch.tensor([ids]))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = paper.EpisodeTrainer(model, args, train_dataset=rows)
    trainer.recall_weight = 3.0
    batch = paper.EpisodeCollator(tokenizer)(list(rows))
    assert not batch["read_mask"].all() and any(any(map(any, row["is_recalled"])) for row in rows)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / weights, rel=1e-4)


def test_the_papers_form_is_trained_as_a_whole_and_loads_as_any_other(source_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, DIALOGUES)))
    out = tmp_path / "out"
    paths = ["--model", str(source_folder), "--data", str(tmp_path), "--output_dir", str(out)]
    steps = ["--max_steps", "3", "--warmup_steps", "0", "--logging_steps", "1", "--disable_tqdm", "True"]
    paper.main([*paths, *steps, "--slots", "5", "--rounds", "1", "--per_device_train_batch_size", "2"])
    base = baselines.load_source(str(source_folder))
    model, tokenizer = load_adapted(*base, out)
    report = json.loads((out / "run.json").read_text())
    assert report["steps"] == 3 and len({entry["loss"] for entry in report["losses"]}) == 3
    start = from_llm(base[0], tokenizer=tokenizer, **report["conversion"]).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    for part in ("memory_encoder.layers.0", "memory_attention.layers.0", "layers.0.memory_cross_attn", "mlp.up_proj"):
        assert any(part in name for name in moved), part
    assert "model.embed_tokens.weight" not in moved
    dialogues = Dialogues(tokenizer, DIALOGUES, max_tokens=96)
    found = upcycling.measured(model, dialogues, ["own", "cleared"])
    assert found["own"]["recalled"] != found["cleared"]["recalled"]
