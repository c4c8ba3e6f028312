# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of capacity: the bits that right answers prove, and that runs are kept."""

import importlib.util
import json
from math import log2
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def capacity():
    spec = importlib.util.spec_from_file_location("capacity_script", ROOT / "benchmarks" / "capacity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("share", [0.25, 0.4, 0.9, 1.0])
def test_bits_are_the_information_of_a_channel_with_that_share_of_right_answers(capacity, share):
    values = 4
    joint = [
        [(share if a == b else (1 - share) / (values - 1)) / values for a in range(values)] for b in range(values)
    ]
    information = sum(p * log2(p * values**2) for row in joint for p in row if p > 0)
    assert capacity.kept_bits(share, 10, values) == pytest.approx(10 * information, abs=1e-9)


def test_answers_no_better_than_guessing_prove_nothing(capacity):
    assert capacity.kept_bits(1 / 64, 40) == capacity.kept_bits(0.0, 40) == 0.0
    assert capacity.kept_bits(1.0, 40) == 240.0


def test_capacity_is_the_most_bits_of_all_lengths(capacity):
    rows = [{"size": size, "exact": share} for size, share in ((5, 1.0), (10, 0.9), (40, 0.1))]
    assert capacity.capacity({"exact": rows}) == capacity.kept_bits(0.9, 10) > 30


def test_a_model_of_each_shape_is_trained_once_and_shown(capacity, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "TEST_SIZES", (2, 3))
    words = [str(tmp_path), "--shapes", "1x16", "3x16", "--steps", "2", "--output", str(tmp_path / "out.json")]
    options = ["--test_episodes", "3", "--max_batch_turns", "60", "--bf16", "False", "--learning_rate", "3e-3"]
    capacity.main([*words, *options])
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["num_memory_slots"], row["hidden_size"]) for row in report["models"]] == [(1, 16), (3, 16)]
    # two layers of slots of 16 values
    assert [row["memory_values"] for row in report["models"]] == [32, 96]
    assert all(" ".join(options) in row["options"] for row in report["models"])
    assert capacity.capacity_table(report) in capsys.readouterr().out
    monkeypatch.setattr(capacity.memory_tasks, "main", lambda argv: pytest.fail("trained again"))
    capacity.main([*words, *options])
    assert json.loads((tmp_path / "out.json").read_text()) == report
