# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
The shapes of `rxt bench --peer-shapes` with the packages of two commits, one run of each in turn.

    git worktree add ../before COMMIT
    OMP_NUM_THREADS=1 python benchmarks/before_after.py --before ../before --output benchmarks/results/peer_shapes.json

Each commit has a process of its own, and both are measured by this checkout's code. A ratio is the median over rounds.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def measuring_code() -> Any:
    """The module `peer_shapes` of this checkout, over the package that `PYTHONPATH` begins with."""
    for name in ("speed", "peer_shapes"):
        full = f"rxt_hf.evaluation.{name}"
        spec: Any = importlib.util.spec_from_file_location(full, ROOT / "rxt_hf" / "evaluation" / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def answer(shape: str) -> None:
    """To be called in a process of its own: CPU seconds of each case whose name comes in."""
    import torch

    torch.set_num_threads(1)
    cases = measuring_code().Cases(shape).cases
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        print(cases[line.strip()](), flush=True)


class Side:
    """The process of one commit."""

    def __init__(self, tree: Path, shape: str):
        command = [sys.executable, __file__, "--shape", shape]
        environ = os.environ | {"PYTHONPATH": str(tree.resolve())}
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ)
        self.cases: list[str] = json.loads(self.process.stdout.readline())

    def run(self, case: str) -> dict[str, float]:
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return {"cpu_s": float(self.process.stdout.readline())}

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure(peer: Any, shape: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    sides = [Side(tree, shape) for tree in (options.before, ROOT)]
    found = {}
    for case in sides[0].cases if options.cases is None else options.cases:
        if case not in sides[0].cases:
            continue
        for side in sides:
            side.run(case)
        rounds = [[side.run(case) for side in sides] for _ in range(options.repeats)]
        before, after = (list(each) for each in zip(*rounds, strict=True))
        found[case] = {
            "before": peer.spread(case, before),
            "after": peer.spread(case, after),
            "after_by_before": peer.compare(case, before, after),
        }
        # what this ratio makes of the quotient that was recorded on another core
        recorded = peer.PEER["figures"][shape].get(case)
        if recorded is not None:
            theirs, ours = (statistics.mean(recorded[package]) for package in ("rxlm", "rxt_hf"))
            found[case]["after_by_peer"] = found[case]["after_by_before"] * ours / theirs
        print(shape, case, json.dumps(found[case]), flush=True)
    for side in sides:
        side.end()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--shapes", nargs="+", default=["micro", "100m"])
    parser.add_argument("--cases", nargs="+", help='such as "write 1 x 64" (default: all)')
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="peer_shapes.json", metavar="FILE")
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.shape is not None:
        answer(options.shape)
        return
    if options.before is None:
        parser.error("--before names the checkout to compare with")
    sys.path.insert(0, str(ROOT))
    peer = measuring_code()
    report = {
        "environment": peer.environment("cpu"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "dtype": "float32",
        "commits": {"before": commit(options.before), "after": commit(ROOT)},
        "peer": peer.PEER,
        "shapes": {shape: measure(peer, shape, options) for shape in options.shapes},
    }
    Path(options.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
