# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from rxt_hf import RxTConfig, RxTForCausalLM
from rxt_hf.presets import PRESETS


@pytest.mark.parametrize(("name", "millions"), [("nano", 12), ("micro", 26), ("mini", 100), ("synthetic", 160)])
def test_presets_meet_the_papers_totals_within_five_percent(name, millions):
    with torch.device("meta"):
        model = RxTForCausalLM(RxTConfig(**PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.05)
    assert model.config.num_attention_heads * model.config.head_dim < model.config.hidden_size, "not SQA"


def test_tiny_preset_fits_into_four_megabytes_as_bfloat16():
    with torch.device("meta"):
        model = RxTForCausalLM(RxTConfig(**PRESETS["tiny"]))
    assert sum(p.numel() for p in model.parameters()) * 2 < 4e6
