# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The result files say where they were measured, compare like with like, and are what the documents show."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import fact_recall
import pytest
import tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_result_files_say_where_they_were_measured(path):
    environment = json.loads(path.read_text())["environment"]
    assert {"python", "torch", "transformers", "device", "threads"} <= environment.keys()


def test_documents_show_what_was_measured(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_stale_block_is_named_and_written_anew(tmp_path, capsys):
    for name in tables.FIGURES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- recall -->\n| old |\n<!-- end -->\nafter\n")
    assert tables.main(["--check"], tmp_path) == 1
    assert "README.md is out of date" in capsys.readouterr().out and "| old |" in page.read_text()
    assert tables.main([], tmp_path) == 0
    assert tables.recall_by_turns(tables.load("fact_recall")) in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert tables.main(["--check"], tmp_path) == 0
    (tmp_path / next(iter(tables.FIGURES))).write_text("<svg/>")
    assert tables.main(["--check"], tmp_path) == 1


def test_block_without_a_function_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("<!-- sales -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"README.md has a block 'sales'"):
        tables.main([], tmp_path)


def test_every_table_is_in_a_document():
    text = "".join(path.read_text() for pattern in tables.PAGES for path in ROOT.glob(pattern))
    assert [name for name in tables.BLOCKS if f"<!-- {name} -->" not in text] == []


def test_baselines_of_the_demo_are_of_equal_size():
    report = tables.load("fact_recall")
    sizes = [report[arm]["parameters"] for arm in (*tables.DEMO_ARMS, "rxt")]
    assert max(sizes) <= 1.02 * min(sizes)


@pytest.mark.parametrize("name", ["dialogues", "dialogues_longer", "dialogues_facts_first"])
def test_models_of_real_dialogues_are_of_equal_size_and_budget(name):
    arms = tables.load(name)["arms"]
    rxt = arms["rxt"]
    for arm, found in arms.items():
        # whole layers of Mamba, and few slots, leave no closer sizes
        assert found["parameters"] == pytest.approx(rxt["parameters"], rel=0.07)
        if arm.endswith(":equal_compute"):
            assert found["training_cpu_seconds"] == pytest.approx(rxt["training_cpu_seconds"], rel=0.07)
        else:
            assert found["training_steps"] == rxt["training_steps"]


def test_recipe_of_the_memory_tasks_is_what_was_measured():
    recipe = " ".join((ROOT / "examples" / "recipes" / "memory_tasks.sh").read_text().replace("\\", " ").split())
    for name in ("remember", "rewrite", "babi", "babi_objects"):
        options = tables.load(name)["command"].partition(" --tasks ")[2].replace(" --disable_tqdm True", "")
        assert options in recipe, options


def test_memory_in_fewer_bits_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--share", "0.01", "--output", str(tmp_path / "report.json")])
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "quantized_recall.py"))
    arms = benchmark["ARMS"]
    for name in set(arms) - {"float32", "int8 memory"}:
        del arms[name]
    benchmark["main"]()
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["arms"]) == {"float32", "int8 memory"} and report["environment"]["threads"]
    assert "| int8 memory |" in capsys.readouterr().out


@pytest.mark.parametrize(("says", "refused", "filed"), [("everything", 0.0, 1.0), ("I cannot keep that.", 1.0, 0.0)])
def test_things_without_a_place_are_looked_for_under_every_attribute(monkeypatch, says, refused, filed):
    class Player:
        def __init__(self, *_):
            self.stm_cache = [""] * 4

        def answer(self, queries, max_new_tokens):
            self.stm_cache = [f"{heard} {query}" for heard, query in zip(self.stm_cache, queries, strict=True)]
            return self.stm_cache if says == "everything" else [says] * len(queries)

    monkeypatch.setattr(fact_recall, "make_arm", Player)
    found = fact_recall.measure_foreign(None, None, 8, 0.02)
    assert found["statements"] > 4
    assert (found["statements_refused"], found["filed"]) == (refused, filed)
    assert (found["attributes_right"] > 0) == (says == "everything")
