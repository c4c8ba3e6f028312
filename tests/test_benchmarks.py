# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The figures that README and model card show are those of the benchmark files."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def fact_recall():
    spec = importlib.util.spec_from_file_location("fact_recall", ROOT / "benchmarks" / "fact_recall.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "model_cards/rxt-tiny-facts.md"])
def test_recall_of_the_demo_is_shown_as_it_was_measured(fact_recall, page):
    report = json.loads((RESULTS / "fact_recall.json").read_text())
    assert fact_recall.table(report) in (ROOT / page).read_text()


@pytest.mark.parametrize("page", ["README.md", "model_cards/rxt-tiny-facts.md"])
def test_recall_by_live_facts_is_shown_as_it_was_measured(page):
    report = json.loads((RESULTS / "fact_recall.json").read_text())
    (row,) = (row for row in report["rxt"]["recall"] if (row["split"], row["turns"]) == ("seen", 64))
    text = " ".join((ROOT / page).read_text().split())
    for facts in ("3-4", "9-16", "17-32"):
        share = f"{row['by_live_facts'][facts][0]:.3f}"
        assert re.search(rf"{share} [^.]*?{facts}\b", text), (facts, share)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_benchmark_files_say_where_they_were_measured(path):
    environment = json.loads(path.read_text())["environment"]
    assert {"python", "torch", "transformers", "device", "threads"} <= environment.keys()
