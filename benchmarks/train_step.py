# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Cost of a training step by the number of turns: tokens per second and peak memory of RxT, with and without recomputing
activations and by depth of back-propagation, against a Llama of the same decoder over the same turns as single rows.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --size tiny --output benchmarks/results/train_step_tiny.json

A step is forward, backward and AdamW on random ids. Times are medians of one run in which all cases alternate, ratios
medians over its rounds. FLOPs, of the arms that recompute nothing, are those of all matrix products, attention without
regard to its mask. Peak memory is measured in a process of its own for each case, for the first step:

    peak_bytes   highest resident memory of the process during the step
    step_bytes   of it above what was there before the step: activations, gradients, AdamW's moments
"""

import argparse
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from concurrency import count

from rxt_hf.evaluation.speed import (
    SIZES,
    build_models,
    count_flops,
    environment,
    interleaved,
    markdown_table,
    ratio,
    shown,
)

DEPTHS = ("all", "1", "4")
# keeps every activation, or recomputes as `Trainer` does with gradient_checkpointing=True, or as it does with
# gradient_checkpointing_kwargs={"use_reentrant": True} besides, which builds no graph before the backward pass
Recompute = Literal["", "recompute", "reentrant"]
# name of an arm: model, depth of back-propagation, recomputation
ARMS: dict[str, tuple[str, str, Recompute]] = {
    "llama": ("llama", "all", ""),
    "llama_recompute": ("llama", "all", "recompute"),
    **{
        f"rxt_bptt_{depth}{'_' * bool(recompute)}{recompute}": ("rxt", depth, recompute)
        for depth in DEPTHS
        for recompute in get_args(Recompute)
    },
}
# the two that the targets are about
PLAIN, RECOMPUTED = "rxt_bptt_all", "rxt_bptt_all_reentrant"
TARGETS = {"step_over_llama": 2.0, "peak_over_fewest_turns": 1.15}


def models_of(options: argparse.Namespace) -> dict[str, Any]:
    """The two models of a size, by the names that `ARMS` has for them."""
    size = SIZES[options.size] | json.loads(options.override)
    size["max_position_embeddings"] = max(size["max_position_embeddings"], options.tokens)
    models = build_models(size, getattr(torch, options.dtype), "cpu", options.attn_implementation)
    return dict(zip(("rxt", "llama"), models, strict=True))


class Step:
    """Training steps of one arm, over turns of `options.tokens` tokens."""

    def __init__(self, arm: str, model: Any, optimizer: torch.optim.Optimizer, options: argparse.Namespace):
        kind, depth, self.recompute = ARMS[arm]
        self.model, self.optimizer = model, optimizer
        self.is_episode, self.depth = kind == "rxt", None if depth == "all" else int(depth)
        self.shape = (options.batch_size, options.tokens)

    def ids(self, turns: int) -> torch.Tensor:
        rows, tokens = self.shape
        shape = (rows, turns, tokens) if self.is_episode else (rows * turns, tokens)
        return torch.randint(self.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def run(self, turns: int) -> dict[str, float]:
        self.model.train()
        if self.is_episode:
            self.model.set_bptt_turns(self.depth)
        if self.recompute:
            self.model.activation_checkpointing_enable({"use_reentrant": self.recompute == "reentrant"})
        else:
            self.model.activation_checkpointing_disable()
        ids = self.ids(turns)
        start = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        # kept as zeros, as if the next batch were accumulated: no step pays for their pages again
        self.optimizer.zero_grad(set_to_none=False)
        return {"step_s": time.perf_counter() - start}


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


def highest_resident_bytes() -> int:
    """Of this process. Linux' ru_maxrss would begin with that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def measure_peak(arm: str, turns: int, options: argparse.Namespace) -> dict[str, int]:
    """To be called in a fresh process: what the first step takes."""
    # both models stay: what one of them left behind would be room for the step
    models = models_of(options)
    model = models[ARMS[arm][0]]
    step = Step(arm, model, adamw(model), options)
    before = psutil.Process().memory_info().rss
    # whatever was higher for a moment before would hide what the step takes
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    step.run(turns)
    peak = highest_resident_bytes()
    return {"peak_bytes": peak, "step_bytes": peak - before}


def peak_in_own_process(arm: str, turns: int, options: argparse.Namespace) -> dict[str, int]:
    """The least of `options.memory_repeats` processes: what else lies in a process only adds."""
    base = [sys.executable, __file__, "--child", arm, "--turns", str(turns)]
    for name in ("size", "override", "tokens", "batch_size", "dtype", "attn_implementation", "threads"):
        base += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    found = []
    for _ in range(options.memory_repeats):
        answer = subprocess.run(base, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(answer.splitlines()[-1]))
    return {name: min(each[name] for each in found) for name in found[0]}


def measure_times(options: argparse.Namespace) -> tuple[dict[str, dict[str, dict]], dict[str, float]]:
    """Medians by arm and turns, and the ratios of the step's time to the Llama's of the same round."""
    models = models_of(options)
    optimizers = {kind: adamw(model) for kind, model in models.items()}
    arms = {arm: Step(arm, models[ARMS[arm][0]], optimizers[ARMS[arm][0]], options) for arm in options.arms}
    cells = {f"{arm} {turns}": partial(step.run, turns) for turns in options.turns for arm, step in arms.items()}
    interleaved(cells, 1)
    # the counter's hooks and reentrant recomputation do not go together
    flops = {name: count_flops(cell)[0] for name, cell in cells.items() if not ARMS[name.split()[0]][2]}
    samples = interleaved(cells, options.repeats, options.limit_s)
    table: dict[str, dict[str, dict]] = {}
    ratios = {}
    for name, found in samples.items():
        arm, turns = name.split()
        seconds = [sample["step_s"] for sample in found]
        tokens = options.batch_size * int(turns) * options.tokens
        table.setdefault(arm, {})[turns] = {
            "step_s": statistics.median(seconds),
            "step_s_range": [min(seconds), max(seconds)],
            "tokens_per_s": tokens / statistics.median(seconds),
            "rounds": len(found),
            "flops": flops.get(name),
        }
        base = "llama_recompute" if ARMS[arm][2] else "llama"
        if ARMS[arm][0] == "rxt" and base in arms:
            ratios[f"{arm}_step_over_{base}_at_{turns}"] = ratio(found, samples[f"{base} {turns}"], "step_s")
            if name in flops:
                ratios[f"{arm}_flops_over_{base}_at_{turns}"] = flops[name] / flops[f"{base} {turns}"]
    return table, ratios


def bench(options: argparse.Namespace) -> dict[str, Any]:
    table, ratios = measure_times(options)
    first = str(min(options.turns))
    for arm, by_turns in table.items():
        for turns, figures in by_turns.items():
            if options.memory_repeats:
                figures |= peak_in_own_process(arm, int(turns), options)
        for name in ("peak_bytes", "step_bytes") if options.memory_repeats else ():
            for turns, figures in by_turns.items():
                if turns != first:
                    ratios[f"{arm}_{name}_at_{turns}_over_{first}"] = figures[name] / by_turns[first][name]
    return {
        "environment": environment("cpu"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "dtype": options.dtype,
        "threads": options.threads,
        "options": {name: value for name, value in vars(options).items() if name != "child"},
        "size": SIZES[options.size] | json.loads(options.override),
        "steps": table,
        "ratios": ratios,
        "targets": targets(ratios, options.turns),
    }


def targets(ratios: dict[str, float], turns: list[int]) -> dict[str, dict[str, Any]]:
    """What was wanted of the step's time and memory, and what was found."""
    span = f"{max(turns)}_over_{min(turns)}"
    slowest = [value for name, value in ratios.items() if name.startswith(f"{PLAIN}_step_over_llama_at_")]
    found = {
        "step_over_llama": max(slowest) if slowest else None,
        "peak_over_fewest_turns": ratios.get(f"{RECOMPUTED}_peak_bytes_at_{span}"),
    }
    return {
        name: {"limit": TARGETS[name], "found": value, "met": value <= TARGETS[name]}
        for name, value in found.items()
        if value is not None
    }


def markdown(report: dict[str, Any]) -> str:
    """Tokens per second, peak and activations by arm and turns; the ratios; the targets."""
    turns = [str(number) for number in report["options"]["turns"]]
    blocks = []
    for field, title, scale in (
        ("tokens_per_s", "tokens per second", 1.0),
        ("peak_bytes", "peak of the process, MiB", 2**-20),
        ("step_bytes", "of it the step's, MiB", 2**-20),
    ):
        rows = [
            [arm, *(shown(found[number][field] * scale) for number in turns)]
            for arm, found in report["steps"].items()
            if all(field in found[number] for number in turns)
        ]
        blocks.append([[f"{title}; turns", *turns], *rows])
    blocks.append([["ratio", ""], *([name, shown(value)] for name, value in report["ratios"].items())])
    blocks.append(
        [
            ["target", "limit", "found", "met"],
            *(
                [name, str(each["limit"]), shown(each["found"]), "yes" if each["met"] else "no"]
                for name, each in report["targets"].items()
            ),
        ]
    )
    return "\n\n".join(markdown_table(*block) for block in blocks if len(block) > 1)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--size", choices=SIZES, default="tiny")
    found.add_argument("--override", default="{}", help="JSON object of other fields of the size")
    found.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    found.add_argument("--turns", nargs="+", type=count, default=[8, 16, 32, 64])
    found.add_argument("--tokens", type=count, default=64, help="of a turn")
    found.add_argument("--batch-size", type=count, default=1, help="episodes in a step")
    found.add_argument("--repeats", type=count, default=7, help="rounds, each of which runs every case once")
    found.add_argument("--limit-s", type=float, default=600.0, help="no fourth or later round begins after this")
    found.add_argument("--memory-repeats", type=int, default=2, help="processes for each figure of memory; 0: none")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--attn-implementation", default="sdpa")
    found.add_argument("--threads", type=count, default=1)
    found.add_argument("--output", default="train_step.json", metavar="FILE", help="the report, as JSON")
    found.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    return found


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.child is not None:
        print(json.dumps(measure_peak(options.child, options.turns[0], options)))
        return
    report = bench(options)
    Path(options.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    main()
