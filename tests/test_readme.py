# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The Python of the README and of the guides runs as it stands, one block after the other."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
ROLES = ("user", "assistant")
GUIDES = sorted(path for path in (ROOT / "docs" / "guides").glob("*.md") if BLOCK.search(path.read_text()))


def run_blocks(path: Path, names: dict) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in BLOCK.findall(path.read_text(encoding="utf-8")):
            exec(compile(block, path.name, "exec"), names)
    return printed.getvalue()


def test_python_of_the_readme_runs_and_recalls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [("My dog is called Rex.", "Thanks."), ("And my cat?", "You have not told me that yet.")]
    messages = [{"role": role, "content": text} for turn in said for role, text in zip(ROLES, turn, strict=True)]
    Path("dialogues.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    names = {"Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments}
    answers = run_blocks(ROOT / "README.md", names).splitlines()
    assert answers[-1] == "Your dog's name is Mochi."
    assert f"# the last answer: {answers[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert names["memory"].turns.tolist() == [1]
    assert [len(batch["input_ids"]) for batch in names["trainer"].get_train_dataloader()] == [1]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_python_of_a_guide_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(path, {})
