# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import random
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from demo import train as fact_dialogues
from demo.baselines import ARMS, build_model
from demo.facts import ATTRIBUTES, HELD_OUT_PAIRS, OPEN_REAL_NAMES, VALUES, corpus_texts, generate_dialogue
from demo.recall import FIRST_TEST_SEED
from demo.train import MAX_TURN_TOKENS, FactDialogues, main
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from rxt_hf import RxTConfig, RxTForCausalLM
from rxt_hf.chat_template import encode_interaction, train_tokenizer
from rxt_hf.data.batching import StepCollator
from rxt_hf.presets import PRESETS
from rxt_hf.training import loop
from rxt_hf.training.loop import CpuBudget, MuonAdamW, learning_rate_factor

from ..models import random_ids, tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_memory_slots": 5}


@pytest.fixture(scope="module")
def tokenizer():
    """Large enough for turns that the recipe does not leave out as too long."""
    return train_tokenizer(corpus_texts(300), vocab_size=1500, max_length=256)


@pytest.fixture
def recipe(tokenizer, tmp_path):
    """Runs the recipe in a folder that has a tokenizer, so that none is trained; gives back the folder."""

    def run(name="run", **options):
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        options = {"output_dir": folder, "max_steps": 4, "max_batch_turns": 8, "override": json.dumps(SIZES)} | options
        options |= {"warmup_steps": 1, "logging_steps": 1, "disable_tqdm": True}
        main([word for option, value in options.items() for word in (f"--{option}", str(value))])
        return folder

    return run


@pytest.fixture
def generated(monkeypatch):
    """Every dialogue that the recipe asks for: (seed, options, dialogue)."""
    calls = []

    def generate(seed, **options):
        calls.append((seed, options, generate_dialogue(seed, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(fact_dialogues, "generate_dialogue", generate)
    return calls


def optimizer_of(model, **options):
    return MuonAdamW(model, TrainingArguments("unused", use_cpu=True, report_to="none", **options))


def add_gradients(model, seed=0):
    model.zero_grad()
    ids = random_ids(2, 3, 6, seed=seed)
    model(ids, labels=ids).loss.backward()


def copied(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_run_stopped_twice_ends_bit_identical_to_one_that_was_not(recipe):
    whole = recipe("whole")
    for step in (1, 2):
        stopped = recipe("stopped", cpu_seconds=0)
        assert (stopped / f"checkpoint-{step}").exists() and not (stopped / f"checkpoint-{step + 1}").exists()
    before = load_file(stopped / "model.safetensors")
    recipe("stopped")
    weights, expected = (load_file(folder / "model.safetensors") for folder in (stopped, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not any(torch.equal(before[name], expected[name]) for name in expected)
    assert len(losses(whole)) == 4
    assert losses(stopped) == losses(whole)


def test_the_cpu_budget_counts_over_resumed_runs_and_stops_with_a_checkpoint(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "process_time", lambda: now[0])

    def step(budget, seconds):
        now[0] += seconds
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        budget.on_step_end(None, None, control)
        return control.should_save, control.should_training_stop

    first = CpuBudget(tmp_path, 10.0)
    assert step(first, 4.0) == (False, False)
    first.on_save(None, SimpleNamespace(is_world_process_zero=True), None)
    now[0] = 7.0
    second = CpuBudget(tmp_path, 10.0)
    assert step(second, 5.5) == (False, False)
    assert step(second, 1.0) == (True, True)
    second.on_log(None, None, None, logs=(logs := {}))
    assert logs == {"cpu_seconds": 10.5}
    assert step(CpuBudget(tmp_path, None), 1e9) == (False, False)


@pytest.mark.parametrize("arm", ARMS[1:])
def test_the_baselines_train_with_the_same_recipe(recipe, arm):
    folder = recipe(arm=arm, max_steps=2)
    config = json.loads((folder / "config.json").read_text())
    kind = {"sliding_window": "mistral", "mamba": "mamba2"}.get(arm, "llama")
    assert (config["model_type"], config["vocab_size"]) == (kind, 1500)
    # a random model is as good as a guess among all tokens
    assert losses(folder) == pytest.approx([7.3, 7.3], abs=0.7)


def test_an_item_is_a_function_of_its_index_alone(tokenizer):
    data = FactDialogues(tokenizer, 12, 16)
    items = [data[index] for index in range(12)]
    random.seed(5)
    other = FactDialogues(tokenizer, 12, 16)
    assert [other[index] for index in reversed(range(12))] == items[::-1]
    assert all(items.count(item) == 1 for item in items)
    assert len(data) == 12


@pytest.mark.parametrize("step", [0, 3, 8, 10, 11])
def test_all_arms_see_the_same_tokens_under_the_same_label_masks(tokenizer, step):
    seen, shapes = [], []
    for arm in ARMS:
        batch = StepCollator(tokenizer.pad_token_id)([FactDialogues(tokenizer, 12, 32, arm)[step]])
        real = batch["attention_mask"].bool()
        assert (batch["labels"][~real] == -100).all()
        seen.append(list(zip(batch["input_ids"][real].tolist(), batch["labels"][real].tolist(), strict=True)))
        shapes.append(batch["labels"].shape[:-1])
    assert all(tokens == seen[0] for tokens in seen)
    assert 0 < sum(label != -100 for _, label in seen[0]) < len(seen[0]) / 2
    dialogues, turns = shapes[0]
    expected = dict.fromkeys(ARMS[1:], (dialogues,)) | {"current_turn": (dialogues * turns,)}
    assert shapes[1:] == list(expected.values())
    assert dialogues == max(1, 32 // turns)


def test_every_answer_to_a_question_is_learned_and_three_tenths_of_the_others(tokenizer, generated):
    episodes = FactDialogues(tokenizer, 1200, 2048)[600]
    learned = {True: [], False: []}
    for episode, (_, _, dialogue) in zip(episodes, generated, strict=True):
        for row, turn in zip(episode["labels"], dialogue["interactions"], strict=True):
            whole = encode_interaction(tokenizer, turn["query"], turn["answer"])["labels"]
            assert row in (whole, [-100] * len(whole))
            learned[turn["kind"] in ("ask", "unknown")].append(row == whole)
    assert all(learned[True]) and len(learned[True]) > 500
    assert sum(learned[False]) / len(learned[False]) == pytest.approx(0.3, abs=0.05)


def test_dialogues_grow_and_seeds_are_those_of_training_over_a_whole_run(monkeypatch):
    calls = []

    def generate(seed, *, num_turns, **options):
        calls.append((seed, num_turns, options))
        return {"interactions": [{"kind": "ask"}] * num_turns}

    def encode(tokenizer, dialogue):
        return {name: [[1]] * len(dialogue["interactions"]) for name in ("input_ids", "labels")}

    monkeypatch.setattr(fact_dialogues, "generate_dialogue", generate)
    monkeypatch.setattr(fact_dialogues, "encode_dialogue", encode)
    data = FactDialogues(None, 15_000, 1)
    assert all(len(data[step]) == 1 for step in range(15_000))
    seeds, turns, options = zip(*calls, strict=True)
    assert seeds == tuple(range(1_000_000, 151_000_000, 10_000))
    assert Counter(turns) == {2: 360, 4: 600, 8: 7290, 16: 4050, 32: 2250, 64: 450}
    first = {length: turns.index(length) for length in (2, 4, 8, 16, 32, 64)}
    assert first == {2: 0, 4: 360, 8: 960, 16: 4201, 32: 7802, 64: 10203}
    assert turns[11_996:12_003] == (8, 16, 32, 64, 8, 16, 32)
    only_open = [step for step, each in enumerate(options) if each.get("only_open")]
    assert (len(only_open), only_open[0]) == (4400, 4001)
    assert all(each["p_open"] == (1.0 if step in set(only_open) else 0.6) for step, each in enumerate(options))
    calls.clear()
    widened = FactDialogues(None, 15_000, 1, mix={"p_new": 0.3})
    assert all(len(widened[step]) == 1 for step in range(4000, 4010))
    assert [(each["p_open"], each["p_new"], "only_open" in each) for _, _, each in calls] == 2 * [
        (0.6, 0.3, False), (1.0, 0.3, True), (0.6, 0.3, False), (1.0, 1.0, False), (0.6, 0.3, False)
    ]  # fmt: skip
    long = [step for step, each in enumerate(options) if each["p_two"] > 0]
    assert long == [*range(0, 12_000, 6), *(step for step in range(12_000, 15_000) if step // 3 % 6 == 0)]
    assert not any("split" in each for each in options)


def held_out_sentences():
    """The answers that would tell a pair of attribute and value that training must not see."""
    for name, value in HELD_OUT_PAIRS:
        article = "an" if value[0] in "aeiou" else "a"
        for answer in ATTRIBUTES[name].answers:
            yield answer.replace("{av}", f"{article} {value}").replace("{v}", value).lower()


def test_no_episode_tells_a_held_out_pair_or_a_test_name(tokenizer):
    def tested(split):
        dialogues = (generate_dialogue(FIRST_TEST_SEED + row, split=split) for row in range(300))
        return [turn for dialogue in dialogues for turn in dialogue["interactions"]]

    data = FactDialogues(tokenizer, 320, 64)
    rows = [row for step in range(320) for episode in data[step] for row in episode["input_ids"]]
    text = re.sub(r"\[\w+\]", " ", " ".join(tokenizer.batch_decode(rows))).lower()
    words = set(re.findall(r"\w+", text))
    listed = {value for values in VALUES.values() for value in values}
    names = {turn["value"] for turn in tested("open") if turn["value"]} | set(OPEN_REAL_NAMES)
    assert len(names) > 500 and not names & listed
    assert not {name.lower() for name in names} & words
    sentences = list(held_out_sentences())
    assert not [sentence for sentence in sentences if sentence in text]
    # both ways of looking do find what they look for
    assert {value.lower() for value in listed if " " not in value} <= words
    asked = " ".join(turn["answer"] for turn in tested("unseen")).lower()
    assert sum(sentence in asked for sentence in sentences) > len(sentences) / 2


def test_each_parameter_belongs_to_one_of_the_two_optimizers():
    model = tiny_model()
    optimizer = optimizer_of(model, weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ([names[id(p)] for g in inner.param_groups for p in g["params"]] for inner in optimizer.inner)
    assert sorted(muon + adamw) == sorted(names.values())
    assert {"model.layers.0.mlp.up_proj.weight", "model.memory_attention.layers.1.write_attn.q_proj.weight"} <= {*muon}
    assert {"model.embed_tokens.weight", "model.initial_memory", "model.layers.0.input_layernorm.weight"} <= {*adamw}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_one_step_changes_every_parameter_that_has_a_gradient_and_no_other():
    model = tiny_model()
    optimizer = optimizer_of(model, learning_rate=1e-2)
    add_gradients(model)
    still = {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"}
    for name in still:
        model.get_parameter(name).grad = None
    before = copied(model)
    optimizer.step()
    assert {name for name, old in before.items() if torch.equal(old, model.get_parameter(name))} == still
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("resumed", [False, True])
def test_the_schedule_of_the_learning_rate_reaches_both_optimizers(resumed):
    model = tiny_model()
    optimizer = optimizer_of(model, learning_rate=1e-2, weight_decay=0.1)
    schedule = LambdaLR(optimizer, [1.0, 0.25, 0.0].__getitem__)
    add_gradients(model)
    optimizer.step()
    if resumed:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule.step()
    assert [group["lr"] for inner in optimizer.inner for group in inner.param_groups] == [0.0025, 0.0025]
    schedule.step()
    before = copied(model)
    optimizer.step()
    assert all(torch.equal(old, model.get_parameter(name)) for name, old in before.items())


def test_an_optimizer_goes_on_from_its_saved_state_bit_by_bit(tmp_path):
    model = tiny_model()
    optimizer = optimizer_of(model, learning_rate=1e-2)
    add_gradients(model)
    optimizer.step()
    twin = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = optimizer_of(twin, learning_rate=0.5)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    fresh = copy.deepcopy(model)
    for each, steps in ((model, optimizer), (twin, second), (fresh, optimizer_of(fresh, learning_rate=1e-2))):
        add_gradients(each, seed=1)
        steps.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))
        assert not torch.equal(parameter, fresh.get_parameter(name)), "the state of the optimizer would not matter"


@pytest.mark.parametrize(
    "fields",
    [{}, {"hidden_size": 256, "num_hidden_layers": 4}, {"num_experts": 4}, {"use_gated_attention": True}],
    ids=str,
)
def test_a_baseline_has_as_many_parameters_as_the_demo_within_two_percent(fields):
    config = RxTConfig(**PRESETS["tiny"] | fields)
    with torch.device("meta"):
        rxt, *baselines = (build_model(arm, config) for arm in ARMS)
    for baseline in baselines:
        # Mamba's width follows from its heads, so that only whole layers can be added
        tolerance = 0.07 if baseline.config.model_type == "mamba2" else 0.02
        assert baseline.num_parameters() == pytest.approx(rxt.num_parameters(), rel=tolerance)
        assert baseline.config.tie_word_embeddings and baseline.config.vocab_size == config.vocab_size


def test_learning_rate_falls_twice():
    factor = partial(learning_rate_factor, steps=1000, warmup_steps=100)
    assert [factor(step) for step in (0, 50, 100)] == [0.0, 0.5, 1.0]
    assert factor(450) == pytest.approx(0.525)
    assert factor(799) == pytest.approx(0.05, abs=1e-4)
    assert factor(800) == pytest.approx(0.3)
    assert factor(1000) == pytest.approx(0.02)
    assert all(factor(step) > factor(step + 1) for step in range(100, 1000) if step != 799)


def test_introductions_come_in_every_second_step_and_all_answers_there_count(tokenizer):
    data = FactDialogues(tokenizer, 48, 64, skip=0.52, mix={"p_introduction": 0.6})
    for step in range(4):
        rows = [row for episode in data[step] for row in episode["labels"]]
        counted = [any(token != -100 for token in row) for row in rows]
        assert all(counted) == (step % 2 == 0)
        assert (max(map(len, rows)) > MAX_TURN_TOKENS) == (step % 2 == 0)


def test_a_skipped_share_of_the_curriculum_and_another_seed_give_other_dialogues(tokenizer, generated):
    FactDialogues(tokenizer, 48, 32)[0]
    FactDialogues(tokenizer, 48, 32, skip=0.52)[0]
    FactDialogues(tokenizer, 48, 32, seed=2, mix={"p_overwrite": 0.3})[0]
    first = fact_dialogues.FIRST_TRAINING_SEED
    plain = [options for seed, options, _ in generated if seed == first]
    (other,) = [options for seed, options, _ in generated if seed == first + 1_000_000_000]
    assert [options["num_turns"] for options in plain] == [2, 8]
    assert other["p_overwrite"] == 0.3 and other["p_ask"] == plain[0]["p_ask"]
    turns = {len(FactDialogues(tokenizer, 48, 64, skip=0.52)[step][0]["labels"]) for step in range(6)}
    assert turns == {8, 16, 32}
    with pytest.raises(ValueError, match=r"skip must be a share .* got 1\.0"):
        FactDialogues(tokenizer, 48, 16, skip=1.0)


def test_a_finished_run_is_trained_further_with_its_tokenizer(recipe, tmp_path, monkeypatch):
    first, depths = recipe(), []
    monkeypatch.setattr(RxTForCausalLM, "set_bptt_turns", lambda model, turns: depths.append(turns))
    before = load_file(first / "model.safetensors")
    options = {"output_dir": str(tmp_path / "more"), "model": str(first), "seed": 2, "max_steps": 1, "skip": 0.52}
    options |= {"max_batch_turns": 32, "learning_rate": 0.0, "bptt_turns": 4, "disable_tqdm": True}
    main([word for option, value in options.items() for word in (f"--{option}", str(value))])
    after = load_file(tmp_path / "more" / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert (tmp_path / "more" / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    assert depths == [4]


def test_the_demo_of_a_further_run_holds_a_mean_of_the_weights_before_and_after(recipe, tmp_path):
    first = recipe()
    options = {"model": str(first), "seed": 2, "max_steps": 2, "warmup_steps": 0, "max_batch_turns": 32}
    options |= {"output_dir": str(tmp_path / "more"), "learning_rate": 0.05, "average": 0.25, "disable_tqdm": True}
    main([word for option, value in options.items() for word in (f"--{option}", str(value))])
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "more"))
    mean = load_file(tmp_path / "more" / "demo" / "model.safetensors")
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (0.75 * before[name] + 0.25 * after[name]).bfloat16())
    moved = max((after[name] - before[name]).abs().max() for name in before)
    assert moved > 0.01
    with pytest.raises(ValueError, match=r"less than 1 only with model, got 0\.5"):
        main(["--output_dir", str(tmp_path / "new"), "--average", "0.5"])
