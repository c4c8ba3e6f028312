# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of a training step: what it compares, and how it measures memory."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64, "num_memory_slots": 4}


@pytest.fixture(scope="module")
def train_step():
    path = Path(__file__).parent.parent / "benchmarks" / "train_step.py"
    spec = importlib.util.spec_from_file_location("train_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(train_step, tmp_path):
    def parsed(*words):
        small = ["--override", json.dumps(SMALL), "--tokens", "5", "--output", str(tmp_path / "report.json")]
        return train_step.parser().parse_args([*small, *words])

    return parsed


def test_every_arm_steps_over_the_same_tokens_and_changes_its_model(train_step, options):
    given = options("--batch-size", "2")
    models = train_step.models_of(given)
    for arm, (kind, depth, recompute) in train_step.ARMS.items():
        step = train_step.Step(arm, models[kind], train_step.adamw(models[kind]), given)
        before = [parameter.clone() for parameter in models[kind].parameters()]
        assert step.ids(3).numel() == 2 * 3 * 5
        assert step.run(3)["step_s"] > 0
        assert any(not torch.equal(old, new) for old, new in zip(before, models[kind].parameters(), strict=True))
        if kind == "rxt":
            assert models[kind].model.gradient_checkpointing == bool(recompute)
            assert str(models[kind].model.bptt_turns or "all") == depth


def test_a_report_holds_medians_ratios_targets_and_where_it_was_measured(train_step, options, tmp_path, capsys):
    arms = ["llama", "llama_recompute", train_step.PLAIN, train_step.RECOMPUTED]
    given = options()
    words = [f"--{name}={getattr(given, name)}" for name in ("override", "tokens", "output")]
    train_step.main([*words, "--turns", "1", "2", "--repeats", "3", "--memory-repeats", "0", "--arms", *arms])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["steps"]) == set(arms)
    assert all(figures["rounds"] == 3 for found in report["steps"].values() for figures in found.values())
    figures = report["steps"][train_step.PLAIN]["2"]
    assert figures["tokens_per_s"] == pytest.approx(2 * 5 / figures["step_s"])
    assert {f"{train_step.RECOMPUTED}_step_over_llama_recompute_at_2"} < set(report["ratios"])
    assert_flops(report, train_step)
    assert report["targets"]["step_over_llama"]["limit"] == 2.0
    assert {"dtype", "threads", "command", "environment"} <= set(report)
    assert "tokens per second; turns | 1 | 2 |" in capsys.readouterr().out


def assert_flops(report, train_step):
    """Products of a Llama's step: each weight once forward and twice backward, two of attention and five."""
    tokens, width, layers = 2 * 5, SMALL["hidden_size"], report["size"]["num_hidden_layers"]
    weights = layers * (4 * width**2 + 3 * width * SMALL["intermediate_size"]) + width * SMALL["vocab_size"]
    attention = layers * tokens * 5 * width
    # 2 FLOPs a product; the embeddings are looked up, so that the first layer's input has a gradient too
    expected = 2 * tokens * 3 * weights + 2 * attention * 7
    found = {arm: by_turns["2"]["flops"] for arm, by_turns in report["steps"].items()}
    assert found["llama"] == expected
    assert found[train_step.PLAIN] > found["llama"]
    ratio = found[train_step.PLAIN] / found["llama"]
    assert report["ratios"][f"{train_step.PLAIN}_flops_over_llama_at_2"] == ratio


def test_targets_are_met_or_missed_by_the_slowest_step_and_the_longest_episode(train_step):
    ratios = {f"{train_step.PLAIN}_step_over_llama_at_{turns}": value for turns, value in ((8, 1.9), (64, 2.1))}
    ratios[f"{train_step.RECOMPUTED}_peak_bytes_at_64_over_8"] = 1.1
    found = train_step.targets(ratios, [8, 64])
    assert found["step_over_llama"] == {"limit": 2.0, "found": 2.1, "met": False}
    assert found["peak_over_fewest_turns"]["met"]


def test_peak_is_what_was_highest_since_the_step_began(train_step, options):
    before = train_step.highest_resident_bytes()
    held = torch.ones(2**25)
    assert train_step.highest_resident_bytes() > before + 2**26
    del held
    # the highest, not the present; the kernel's count is exact to some hundred KiB
    assert train_step.highest_resident_bytes() > before + 2**26
    found = train_step.measure_peak(train_step.RECOMPUTED, 2, options("--turns", "2"))
    # what was held before the step is not in it
    assert found["step_bytes"] < 2**25 < 2**27 < found["peak_bytes"]


@pytest.mark.slow
def test_each_figure_of_memory_comes_from_a_process_of_its_own(train_step, options):
    found = [
        train_step.peak_in_own_process(train_step.PLAIN, turns, options("--memory-repeats", "1", "--tokens", "32"))
        for turns in (1, 64)
    ]
    assert found[0].keys() == {"peak_bytes", "step_bytes"}
    assert found[1]["step_bytes"] > found[0]["step_bytes"]
