# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
from demo.curriculum import FactCurriculum, fact_reward, long_range_dialogue
from demo.facts import UNKNOWN_ANSWER

from rxt_hf.training.reinforcement import saved_turn


def test_long_range_dialogues_ask_at_last_for_what_was_told_at_first():
    for seed in range(30):
        turns = long_range_dialogue(seed, num_turns=12, num_facts=3)["interactions"]
        assert [turn["kind"] for turn in turns[:3]] == ["state"] * 3
        assert [turn["kind"] for turn in turns[-3:]] == ["ask"] * 3
        first = {turn["attribute"]: turn["value"] for turn in turns[:3]}
        assert {turn["attribute"]: turn["value"] for turn in turns[-3:]} == first
        assert all(turn["distance"] == turn["distance_stated"] == 9 for turn in turns[-3:])
        assert not {turn["attribute"] for turn in turns[3:-3]} & set(first)
    assert long_range_dialogue(1) == long_range_dialogue(1) != long_range_dialogue(2)
    with pytest.raises(ValueError, match="got 5 turns"):
        long_range_dialogue(1, num_turns=5, num_facts=3)


def test_curriculum_goes_from_short_to_long_and_is_a_function_of_the_index():
    data = FactCurriculum(steps=40, dialogues_per_step=3)
    items = [data[index] for index in range(len(data))]
    assert len(items) == 120 and items[::-1] == [FactCurriculum(40, 3)[index] for index in reversed(range(120))]
    turns = [len(item["interactions"]) for item in items]
    assert all(len(set(turns[step : step + 3])) == 1 for step in range(0, 120, 3))
    assert turns == sorted(turns) and len(set(turns)) > 1
    is_long_range = [[turn["kind"] for turn in item["interactions"][-3:]] == ["ask"] * 3 for item in items]
    assert sum(is_long_range[78:]) > sum(is_long_range[:36]) + 5
    assert len({item["seed"] for item in items}) == 120 and min(item["seed"] for item in items) >= 300_000_000


def test_reward_wants_the_exact_value_and_nothing_of_turns_that_ask_for_nothing():
    ask = {"kind": "ask", "value": "Rex", "stale": ["Fido"], "answer": "Your dog is called Rex."}
    assert fact_reward(ask, "It is Rex.") == 1.0
    assert fact_reward(ask, "It is Rexy.") == fact_reward(ask, "Rex, not Fido.") == fact_reward(ask, "") == 0.0
    unknown = ask | {"kind": "unknown", "value": None, "stale": []}
    assert (fact_reward(unknown, UNKNOWN_ANSWER), fact_reward(unknown, "It is Rex.")) == (1.0, 0.0)
    assert all(math.isnan(fact_reward(ask | {"kind": kind}, "Rex")) for kind in ("state", "overwrite", "chat"))


def test_answers_draw_on_the_turn_that_stated_their_fact():
    asked = 0
    for turns in (FactCurriculum(4, 5)[index]["interactions"] for index in range(20)):
        for place, turn in enumerate(turns):
            stated = turn["distance_stated"]
            assert saved_turn(place, turn) == place - (1 if stated is None else stated)
            asked += stated is not None and stated > 1
    assert asked > 5
