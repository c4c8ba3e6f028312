# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""`rxt train STAGE --config FILE`: the curriculum from files, and what a wrong file costs."""

import json
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from demo import write
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from rxt_hf import DEMO
from rxt_hf.data.readers import read_jsonl
from rxt_hf.training.run import (
    RUN_NAME,
    STAGE_NAMES,
    RunArguments,
    check,
    in_batches,
    load_model,
    parse,
    run,
)
from rxt_hf.training.stages import STAGES

from .models import tiny_config

RECIPES = Path(__file__).parent.parent / "examples" / "recipes" / "curriculum"
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_memory_slots": 6}
FIELDS = {
    "data": str(DEMO / "test.jsonl.gz"),
    "dialogues": 24,
    "turns": 3,
    "max_steps": 3,
    "max_batch_tokens": 512,
    "learning_rate": "5e-3",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "disable_tqdm": True,
}
PAIRS = [
    {"interactions": [{"query": "Hi.", "answer": "Hello."}, {"query": "Who?", "answer": "Me.", "rejected": "You."}]},
    {"prompt": "Where?", "chosen": "Here.", "rejected": "There."},
]


def train(stage, folder, *words, **fields):
    """Runs a stage as the command line does, and returns the folder of the result."""
    config = folder / f"{stage}.yaml"
    config.write_text(yaml.safe_dump(FIELDS | {"output_dir": str(folder / stage)} | fields))
    run(stage, list(map(str, words)), config)
    return folder / stage


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_settings_of_training_reach_the_model():
    settings = {"bptt_turns": 4, "mlm_loss_coef": 0.7, "memory_noise_std": 0.1}
    model = load_model("pretraining", RunArguments(**settings), None, tiny_config())
    assert (model.model.bptt_turns, model.mlm_loss_coef, model.memory_noise_std) == tuple(settings.values())
    for name in settings:
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            RunArguments(**{name: -1})


def test_tensorboard_gets_the_losses(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train("pretraining", tmp_path, "--report_to", "tensorboard", override=SIZE, vocab_size=300, tokens=64)
    (events,) = folder.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert {event.step: pytest.approx(event.value, abs=1e-4) for event in written} == losses(folder)


class Warned(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folders of four stages, each from the one before, and what was warned of on the way."""
    folder, handler, folders, start = tmp_path_factory.mktemp("chain"), Warned(), {}, {}
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    new = {"override": SIZE, "vocab_size": 300, "tokens": 64}
    special = {
        "pretraining": new | {"eval_data": str(DEMO), "eval_dialogues": 4},
        "memory_aware": {"max_steps": 12, "unfreeze": {"model.layers.": 2}},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stage in STAGES:
            folders[stage] = train(stage, folder, **start, **special.get(stage, {}))
            start = {"model": str(folders[stage])}
    for logger in loggers:
        logger.removeHandler(handler)
    return folders, handler.messages + [str(each.message) for each in caught]


def test_four_stages_follow_each_other_without_a_warning_and_the_last_one_learns(chain):
    folders, warned = chain
    assert warned == []
    found = losses(folders["memory_aware"])
    assert list(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.5


def test_a_stage_starts_from_the_weights_before_and_moves_only_what_it_trains(chain):
    folders, _ = chain
    before, after = (load_file(folders[stage] / "model.safetensors") for stage in ("finetuning", "memory_attention"))
    trained = STAGES["memory_attention"][1]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith(trained), name


def test_the_folder_of_a_run_loads_by_the_auto_classes_and_carries_its_code(chain):
    folders, _ = chain
    for folder in folders.values():
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert type(model).__name__ == "RxTForCausalLM"
        assert model.config.vocab_size == len(tokenizer) and tokenizer.chat_template
        assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"].endswith("RxTForCausalLM")
        assert (folder / "modeling_rxt.py").is_file()


def test_the_card_tells_stage_start_data_steps_and_losses(chain):
    folders, _ = chain
    first, last = ((folders[stage] / "README.md").read_text() for stage in ("pretraining", "memory_aware"))
    assert "Stage `pretraining` of the curriculum, 3 steps, started from random weights; " in first
    assert "Stage `memory_aware` of the curriculum, 12 steps, started from memory_attention; " in last
    assert "base_model: memory_attention" in last and "- test.jsonl.gz" in last and " s on 1 x cpu. Data:" in last
    loss = round(losses(folders["memory_aware"])[12], 4)
    assert f"| training loss, as last logged | test.jsonl.gz, train | {loss} |" in last
    history = json.loads((folders["pretraining"] / "trainer_state.json").read_text())["log_history"]
    (eval_loss,) = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert f"| evaluation loss | demo, test | {round(eval_loss, 4)} |" in first


def test_a_run_goes_on_from_its_last_checkpoint_as_if_it_had_not_ended(chain, tmp_path):
    start = {"model": str(chain[0]["memory_attention"]), "save_steps": 2}
    (tmp_path / "whole").mkdir()
    whole = train("memory_aware", tmp_path / "whole", **start, max_steps=6)
    folder = train("memory_aware", tmp_path, "--max_steps", 2, **start)
    # a mark that only the checkpoint can have passed on
    state = folder / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"step": 1\n', '"marked": 1,\n      "step": 1\n'))
    train("memory_aware", tmp_path, "--max_steps", 6, **start)
    assert list(losses(folder)) == list(range(1, 7)) and '"marked": 1' in (folder / "trainer_state.json").read_text()
    expected, found = (load_file(each / "model.safetensors") for each in (whole, folder))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert "from step 2 on" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="holds a run of the stage memory_aware: name another output_dir"):
        train("finetuning", tmp_path, "--output_dir", folder, **start)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_preferences_are_learned_from_rows_with_an_adapter(chain, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    folder = train(
        "preference", tmp_path, model=str(chain[0]["memory_aware"]), data=[str(tmp_path)], lora_rank=2, beta=0.5
    )
    assert losses(folder)[3] < losses(folder)[1] == pytest.approx(0.6931, abs=1e-3)
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    assert "with LoRA of rank 2, 3 steps" in (folder / "README.md").read_text()


def test_data_sets_of_the_hub_are_read_by_name(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return list(read_jsonl(DEMO / "test.jsonl.gz"))[:8]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    new = {"override": SIZE, "vocab_size": 300, "max_steps": 1, "max_batch_tokens": 2048}
    folder = train("memory_aware", tmp_path, **new, data="some-one/chats:small", eval_data=["some-one/chats"])
    # the tokenizer is trained on the data first
    assert asked == [
        ("some-one/chats", "small", "train"),
        ("some-one/chats", "small", "train"),
        ("some-one/chats", None, "test"),
    ]
    card = (folder / "README.md").read_text()
    assert "- some-one/chats:small" not in card and "- some-one/chats\n" in card


def test_pretraining_reads_plain_text_and_rows_of_text_and_dialogues(tmp_path):
    (tmp_path / "train.txt").write_text("One document.\n\nAnother one.\n")
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [{"text": "A third."}, {"query": "4", "answer": "5"}]))
    )
    folder = train(
        "pretraining",
        tmp_path,
        data=[str(tmp_path), str(tmp_path / "rows.jsonl")],
        override=SIZE,
        vocab_size=300,
        tokens=7,
        max_steps=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["One document.", "Another one.", "A third.", "4\n5"]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 for text in texts)
    state = json.loads((folder / "trainer_state.json").read_text())
    # one step of one epoch: all rows of 7 tokens are one batch
    assert tokens < FIELDS["max_batch_tokens"] and state["epoch"] == 1.0


def test_the_command_line_overrides_the_file_and_the_file_our_defaults(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "data: some.jsonl\nlearning_rate: 1e-3\nmax_steps: 5\nlogging_steps: 7\nunfreeze: {model.layers.: 2}\n"
    )
    options, args = parse("memory_aware", ["--max_steps", "9", "--turns", "4"], config)
    assert (args.max_steps, args.learning_rate, args.logging_steps, args.save_steps) == (9, 1e-3, 7, 100)
    assert (options.data, options.turns, options.unfreeze) == (["some.jsonl"], 4, {"model.layers.": 2})
    assert parse("preference", ["--beta", "0.3"])[1].beta == 0.3


BAD_FILES = {
    "max_stpes: 3": r"run.yaml has the unknown key 'max_stpes' \(did you mean 'max_steps'\?\)",
    "beta: 0.3": "run.yaml has the unknown key 'beta'",
    "max_steps: many": "--max_steps.*invalid int value: 'many'",
    "turns: 2.5": "--turns.*invalid int value: '2.5'",
    "turns: 0": "turns must be at least 1, got 0",
    "data: [": "run.yaml is not YAML",
    "[1]": "run.yaml holds a list",
    "override: 3": "override must be an object",
    "override: {hiden_size: 3}": "override has 'hiden_size', which is no field",
    "preset: giant": "no preset 'giant'",
    "lora_rank: 4": "LoRA needs a model to start from",
    "unfreeze: {model.: 2}": "unfreeze needs max_steps",
    "fp16: true": "fp16 needs a GPU",
    "label_smoothing_factor: 0.1\ntorch_compile: true": "label_smoothing_factor=0.1 is for memory_aware without",
    "turns: 1": "needs dialogues of two turns or more, got turns=1",
    "data: nowhere": "No such file or directory.*nowhere",
    "data: []": "data is missing",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_wrong_file_costs_one_sentence_before_anything_is_loaded(text, tmp_path, monkeypatch):
    monkeypatch.setattr("rxt_hf.training.run.load_tokenizer", lambda *_: pytest.fail("too late"))
    config = tmp_path / "run.yaml"
    config.write_text(text if text.startswith(("data", "[")) else f"data: {DEMO}/test.jsonl.gz\n{text}")
    with pytest.raises((ValueError, OSError), match=BAD_FILES[text]) as caught:
        run("memory_aware", ["--output_dir", str(tmp_path / "out")], config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["pretraining", "finetuning", "memory_attention", "preference"])
def test_labels_of_a_stage_with_losses_of_its_own_are_not_smoothed(stage, tmp_path):
    words = [
        "--data",
        DEMO / "test.jsonl.gz",
        "--model",
        "somewhere",
        "--output_dir",
        tmp_path,
        "--label_smoothing_factor",
        "0.1",
    ]
    with pytest.raises(ValueError, match="is for memory_aware without torch_compile"):
        run(stage, list(map(str, words)))


def test_data_that_do_not_fit_the_stage_are_refused(chain, tmp_path):
    turn = {"query": "Hi.", "answer": "Hello."}
    (tmp_path / "train.jsonl").write_text(json.dumps(turn))
    (tmp_path / "plain.txt").write_text("Text.")
    start = {"model": str(chain[0]["memory_aware"]), "data": str(tmp_path)}
    with pytest.raises(ValueError, match=r"no dialogue of two turns or more in .*for the stage memory_aware"):
        train("memory_aware", tmp_path, **start)
    with pytest.raises(ValueError, match="no rejected answer in"):
        train("preference", tmp_path, **start)
    with pytest.raises(ValueError, match="plain text: the stage finetuning needs dialogues"):
        train("finetuning", tmp_path, **start | {"data": str(tmp_path / "plain.txt")})
    with pytest.raises(FileNotFoundError, match=r"has no split 'test', only"):
        train("finetuning", tmp_path, **start, eval_data=str(tmp_path))
    with pytest.raises(ValueError, match=r"both .*name another folder"):
        train("finetuning", tmp_path, **start | {"output_dir": start["model"]})
    (tmp_path / "two.jsonl").write_text(json.dumps({"interactions": [turn, turn]}))
    with pytest.raises(ValueError, match=r"max_batch_tokens=9 does not hold the largest item"):
        train("memory_aware", tmp_path, **start | {"data": str(tmp_path / "two.jsonl")}, max_batch_tokens=9)
    with pytest.raises(ValueError, match=r"No trainable parameter starts with 'model.layers.'"):
        train("memory_attention", tmp_path, **start, unfreeze={"model.layers.": 2})


def test_batches_hold_every_feature_once_and_no_more_tokens_than_asked_for():
    features = [{"input_ids": [[1] * (2 + row % 5)] * (1 + row % 3), "row": row} for row in range(40)]
    batches = in_batches(features, 40)
    assert sorted(feature["row"] for index in range(len(batches)) for feature in batches[index]) == list(range(40))
    for index in range(len(batches)):
        turns = [feature["input_ids"] for feature in batches[index]]
        assert len(turns) * max(map(len, turns)) * max(len(ids) for rows in turns for ids in rows) <= 40


def test_recipes_of_the_curriculum_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(STAGE_NAMES)
    for name in ("train", "test", "preference"):
        write.main(["--output", f"runs/data/{name}.jsonl", "--dialogues", "1"])
    before = None
    for stage in STAGE_NAMES:
        options, args = parse(stage, config=RECIPES / f"{stage}.yaml")
        check(stage, options, args)
        assert options.model == before and 0 < args.max_steps <= 200
        before = args.output_dir


def test_a_run_says_what_it_was_given(chain):
    said = json.loads((chain[0]["memory_aware"] / RUN_NAME).read_text())
    assert said["stage"] == "memory_aware" and said["unfreeze"] == {"model.layers.": 2}
