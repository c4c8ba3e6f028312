# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What every example promises. `chat` runs in test_cli.py, the two `finetune_*` in test_training.py."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent.parent / "examples"
NAMES = ("chat", "finetune_peft", "finetune_trainer", "train_from_scratch", "upcycle_smollm2")


def source_and_docstring(name):
    source = (FOLDER / f"{name}.py").read_text()
    return source, ast.get_docstring(ast.parse(source))


def promised_line(docstring):
    """The last line that the docstring shows."""
    (line,) = re.findall(r"(?:last line|a line like).*\n\n    (.+)", docstring)
    return line


def test_every_example_is_listed_here():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_tells_its_command_and_its_last_line(name):
    source, docstring = source_and_docstring(name)
    assert len(source.splitlines()) <= 120
    commands = re.findall(rf"^    python examples/{name}\.py(.*)$", docstring, flags=re.MULTILINE)
    # the first command needs nothing but the package
    assert commands[0].partition("#")[0].strip() == ""
    options = re.findall(r"--[a-z-]+", " ".join(commands))
    assert all(f'add_argument("{option}"' in source for option in options)
    words = re.sub(r"[\d\W]+", " ", promised_line(docstring)).split()
    assert set(words) <= set(re.findall(r"[a-zA-Z]+", source.replace(docstring, ""))) | {"True"}


def test_training_from_scratch_ends_as_it_promises_and_leaves_a_model(tmp_path, monkeypatch, capsys):
    path, folder = FOLDER / "train_from_scratch.py", tmp_path / "model"
    monkeypatch.setattr(sys, "argv", [str(path), "--max-steps", "2", "--output-dir", str(folder)])
    runpy.run_path(str(path), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    _, docstring = source_and_docstring(path.stem)
    assert re.sub(r"\d+", "N", last) == re.sub(r"\d+", "N", promised_line(docstring))
    assert last.endswith("of 50") and promised_line(docstring).endswith("of 50")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "rxt" and model.config.vocab_size == len(tokenizer)
