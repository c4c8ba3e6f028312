# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import linear_probes
import pytest
import torch
from torch.nn import functional as F


def test_a_linear_probe_finds_what_is_in_the_memory_alone(monkeypatch):
    def memories(values_in):
        def by_turn(*_):
            states = torch.randn(60, 2, 5, 32, generator=torch.Generator().manual_seed(0))
            for turn in range(2):
                told = states.clone()
                if turn < values_in:
                    told[:, 1, 0, : len(codes)] += 20 * F.one_hot(classes, len(codes))
                yield told

        return by_turn

    _, values = linear_probes._probing_dialogues("gym_day", 60)
    codes = sorted(set(values))
    classes = torch.tensor([codes.index(value) for value in values])
    monkeypatch.setattr(linear_probes, "_memories_by_turn", memories(1))
    found = linear_probes.linear_probes(None, None, ["gym_day"], 60)["gym_day"]
    assert found["held_out"] == 15 and found["values"] == len(codes)
    assert found["accuracy"]["1"][0] == found["accuracy"]["all"][0] == 1.0
    assert max(found["accuracy"]["0"] + found["accuracy"]["1"][1:]) < 0.6
    counted = classes[:45].bincount()
    assert found["majority"] == pytest.approx((classes[45:] == counted.argmax()).float().mean().item())
