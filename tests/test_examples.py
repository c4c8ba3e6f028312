# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Examples that no other test runs: `chat` runs in test_cli.py, the two `finetune_*` in test_training.py."""

import runpy
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent.parent / "examples"


def test_training_from_scratch_leaves_a_model(tmp_path, monkeypatch, capsys):
    path, folder = FOLDER / "train_from_scratch.py", tmp_path / "model"
    monkeypatch.setattr(sys, "argv", [str(path), "--max-steps", "2", "--output-dir", str(folder)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].endswith("of 50")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "rxt" and model.config.vocab_size == len(tokenizer)
