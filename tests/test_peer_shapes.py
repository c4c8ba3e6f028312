# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What `rxt bench --peer-shapes` times is what it says, in units that a table can hold."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from rxt_hf.cli import main
from rxt_hf.evaluation import peer_shapes
from rxt_hf.evaluation.peer_shapes import PEER, SHAPES, Cases, compare, in_units

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "before_after.py"
SMALL = {"num_hidden_layers": 1, "vocab_size": 64, "num_memory_slots": 4, "hidden_size": 32}


@pytest.fixture
def small(monkeypatch):
    for name, shape in SHAPES.items():
        monkeypatch.setitem(peer_shapes.SHAPES, name, shape | SMALL)
    monkeypatch.setattr(peer_shapes, "TRAINING", (1, 2, 8))
    monkeypatch.setattr(peer_shapes, "ANSWER", 3)


def test_every_recorded_figure_is_measured_and_nothing_else(small):
    for shape, figures in PEER["figures"].items():
        assert list(Cases(shape).cases) == list(figures)


def test_each_case_runs_the_model_at_its_shape(small, monkeypatch):
    cases, seen = Cases("micro"), []
    original = type(cases.model).update_memory

    def recorded(self, memory, ids, *args, **kwargs):
        seen.append(tuple(ids.shape))
        return original(self, memory, ids, *args, **kwargs)

    monkeypatch.setattr(type(cases.model), "update_memory", recorded)
    seconds = {name: run() for name, run in cases.cases.items()}
    # decoding writes nothing
    assert seen == [(1, 64), (1, 128), (1, 256), (8, 128)]
    assert all(found > 0 for found in seconds.values())
    assert not cases.model.training and all(each.grad is None for each in cases.model.parameters())


def test_units_and_ratios_have_the_right_direction():
    assert in_units("decode 8", 0.02) == 50 and in_units("write 1 x 64", 0.02) == 20
    assert in_units("training step", 2.5) == 2.5
    before, after = [[{"cpu_s": seconds}] for seconds in (3.0, 1.5)]
    assert compare("decode 1", before, after) == 2 and compare("write 1 x 64", before, after) == 0.5


def test_report_shows_the_recorded_figures_beside_the_measured_ones(small, tmp_path, capsys):
    threads, file = torch.get_num_threads(), tmp_path / "report.json"
    assert main(["bench", "--peer-shapes", "--repeats", "1", "--output", str(file)]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert torch.get_num_threads() == threads and report["environment"]["threads"] == 1
    assert "| decode 8, tokens/s | 245 to 253 | 367 to 444 |" in out and "| training step, s | 4.1 to 4.3 |" in out
    assert report["shapes"]["100m"].keys() == PEER["figures"]["100m"].keys()


def test_a_plot_of_turns_is_refused(tmp_path, capsys):
    argv = ["bench", "--peer-shapes", "--plot", str(tmp_path / "p.png"), "--output", str(tmp_path / "r.json")]
    assert main(argv) == 2
    assert "--peer-shapes does not measure" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_two_checkouts_take_turns(tmp_path, monkeypatch):
    """The two are the same one here, and a stand-in answers for each process."""
    spec = importlib.util.spec_from_file_location("before_after", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = []

    class Side:
        cases = ("decode 1", "write 1 x 64")

        def __init__(self, tree, shape):
            self.tree = tree

        def run(self, case):
            asked.append((self.tree, case))
            return {"cpu_s": 1.0 if self.tree == Path("old") else 0.25}

        def end(self):
            asked.append((self.tree, "end"))

    monkeypatch.setattr(script, "Side", Side)
    monkeypatch.setattr(script, "commit", str)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # which the script replaces by modules of its own
    for name in ("speed", "peer_shapes"):
        monkeypatch.setitem(sys.modules, f"rxt_hf.evaluation.{name}", sys.modules[f"rxt_hf.evaluation.{name}"])
    file = tmp_path / "found.json"
    script.main(["--before", "old", "--shapes", "micro", "--repeats", "2", "--output", str(file)])
    found = json.loads(file.read_text())["shapes"]["micro"]
    old, new = Path("old"), script.ROOT
    assert asked[:6] == [(old, "decode 1"), (new, "decode 1")] * 3 and asked[-1] == (new, "end")
    assert found["decode 1"]["after_by_before"] == 4 and found["write 1 x 64"]["after_by_before"] == 0.25
    assert found["write 1 x 64"]["after_by_peer"] == pytest.approx(0.25 * 32 / 28)
