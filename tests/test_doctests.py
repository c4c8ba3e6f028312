# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The examples in docstrings run as they stand, as `pytest --doctest-modules rxt_hf` runs them."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rxt_hf"
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert attempted > 0 and failed == 0


def test_public_classes_have_an_example_that_runs():
    assert {"rxt_hf.configuration_rxt", "rxt_hf.modeling_rxt", "rxt_hf.session"} <= set(MODULES)
