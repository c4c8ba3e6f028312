# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The README's Python runs as it stands, and the shipped demo answers what the README shows."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_of_the_readme_prints_what_the_readme_shows_and_the_second_block_follows_it(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    shown = re.search(r"```python\n.*?```\s+prints\s+```\n(.*?)```", text, flags=re.S).group(1)
    monkeypatch.chdir(tmp_path)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks[0], names)
    assert printed.getvalue() == shown
    exec(blocks[1], names)
    assert names["memory"].turns.tolist() == [1]
    assert names["other"].send("What is my dog called?").endswith("Mochi.")
