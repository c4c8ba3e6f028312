# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Ten thousand turns of one conversation, and a thousand conversations mixed on one model."""

import importlib.util
from pathlib import Path

import pytest

from .models import random_ids, tiny_model

# each takes about a minute and a half on one idle core, far more beside other work
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CONVERSATIONS, TURNS = 1_000, 10


@pytest.fixture(scope="module")
def endurance():
    path = Path(__file__).parent.parent / "benchmarks" / "endurance.py"
    spec = importlib.util.spec_from_file_location("endurance", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prompts():
    return [random_ids(1, 3 + seed % 10, seed=seed) for seed in range(CONVERSATIONS + TURNS)]


def test_ten_thousand_turns_keep_the_state_finite_and_the_process_at_its_size(endurance, prompts):
    model = tiny_model(0)
    found = endurance.one_conversation(model, prompts, 10_000, max_new_tokens=2)
    assert found["turns"] == 10_000
    assert found["state_bytes"] == [model.init_stm(1).nbytes]
    assert found["is_finite"]
    assert len(found["rss_bytes_by_turn"]) == 10
    assert found["rss_growth"] < 0.01, found["rss_bytes_by_turn"]


def test_a_thousand_conversations_in_random_order_equal_their_solo_replays_bit_for_bit(endurance, prompts):
    found = endurance.many_conversations(tiny_model(0), prompts, CONVERSATIONS, TURNS, max_new_tokens=1)
    assert found["bit_equal"] == CONVERSATIONS
    assert found["distinct"] == CONVERSATIONS
