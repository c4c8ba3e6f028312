# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a memory holds, in bits, by its slots and their width: Remember (arXiv 2407.04841) with models of many shapes.

    OMP_NUM_THREADS=1 PYTHONPATH=examples python benchmarks/capacity.py out --shapes 2x48 8x48 32x48 8x80 \
        --output capacity.json --learning_rate 2e-3 --bf16 False

trains a model of each shape by the same recipe, on up to `SIZE` pairs of 64 keys and 64 values, and asks for every
pair of longer and longer lists. If a share `a` of the answers is right, a list of N pairs has left at least

    N (log2 64 - H(a) - (1 - a) log2 63)

bits in the memory (Fano's inequality: no wrong answer likelier than another); its capacity is taken as the most of
them over all N. This is what the model learned to hold in the steps that it had, not what its numbers could. Heads are
16 wide. Runs that are in `out` already are kept, and a stopped one goes on; further options go to all of them.
"""

import argparse
import json
from collections.abc import Mapping
from math import log2
from pathlib import Path
from typing import Any

from memory_tasks import train as memory_tasks
from tables import capacity_table

SYMBOLS = 64
SIZE = 40
TEST_SIZES = (5, 10, 20, 40, 64)


def kept_bits(share: float, pairs: int, values: int = SYMBOLS) -> float:
    """Bits that a memory holds at least of `pairs` pairs, if this share of the questions for their values is right."""
    if share <= 1 / values:
        return 0.0
    doubt = -sum(p * log2(p) for p in (share, 1 - share) if p > 0)
    return pairs * (log2(values) - doubt - (1 - share) * log2(values - 1))


def capacity(result: Mapping[str, Any]) -> float:
    return max(kept_bits(row["exact"], row["size"]) for row in result["exact"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run of each shape goes into it")
    parser.add_argument("--shapes", nargs="+", required=True, metavar="SLOTSxWIDTH")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args, more = parser.parse_known_args(argv)
    models, settings = [], {}
    for name in args.shapes:
        run, (slots, width) = args.folder / name, map(int, name.split("x"))
        shape = {"num_memory_slots": slots, "hidden_size": width}
        fields = shape | {"intermediate_size": 5 * width // 2, "num_attention_heads": width // 16}
        if not (run / "result.json").exists():
            symbols = {"key_length": 1, "num_symbols": SYMBOLS}
            task = f"--tasks remember --size {SIZE} --max_steps {args.steps} --hint 0.2".split()
            sizes = ["--test_sizes", *map(str, TEST_SIZES)]
            options = ["--generator", json.dumps(symbols), "--override", json.dumps(fields)]
            memory_tasks.main(["--output_dir", str(run), *task, *sizes, *options, *more])
        result = json.loads((run / "result.json").read_text())
        settings = {key: result[key] for key in ("environment", "seed", "steps")}
        # as that run had them, which may be one that was there already; the memory is of float32
        found = {"options": result["command"].partition(" --tasks ")[2], "memory_values": result["memory_bytes"] // 4}
        found["bits"] = round(capacity(result), 1)
        models.append(shape | found | {key: result[key] for key in ("parameters", "cpu_seconds", "exact")})
        report = settings | {"size": SIZE, "symbols": SYMBOLS, "models": models}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(capacity_table(report))


if __name__ == "__main__":
    main()
