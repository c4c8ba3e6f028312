# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Cost of decoding, writing and training at the shapes that the authors' own package was timed at.

    rxt bench --peer-shapes --output peer_shapes.json

Weights and tokens are random, answers greedy and of a fixed length, all in float32 on one thread. A figure is CPU
time, which other processes on the machine disturb less than they do the clock; all of them are medians over rounds in
which every case runs once.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..configuration_rxt import RxTConfig
from ..modeling_rxt import RxTForCausalLM
from .speed import compiled_decoding, environment, interleaved, markdown_table, ratio, shown
from .speed import run as run_bench

_ROLES = ("", "memory_encoder_", "memory_attention_", "interlayer_attention_", "cross_attention_")


def _heads(number: int) -> dict[str, int]:
    return {f"{role}num_{kind}_heads": number for role in _ROLES for kind in ("attention", "key_value")}


_SHARED = {
    "memory_attention_type": "interlayer",
    "memory_gate_status": "mean",
    "memory_gate_granularity": "slot",
    "memory_gate_init": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "micro": {
        "vocab_size": 7500,
        "hidden_size": 128,
        "head_dim": 16,
        "num_hidden_layers": 6,
        "num_experts": 12,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "intermediate_size": 256,
        "memory_encoder_intermediate_size": 384,
        "max_position_embeddings": 256,
        "num_memory_slots": 256,
        **_heads(4),
        **_SHARED,
    },
    "100m": {
        "vocab_size": 20_000,
        "hidden_size": 512,
        "head_dim": 32,
        "num_hidden_layers": 10,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
        "num_memory_slots": 512,
        **_heads(8),
        **_SHARED,
    },
}
PROMPT, ANSWER = 32, 64
WRITES = ((1, 64), (1, 128), (1, 256), (8, 128))
TRAINING = (8, 4, 128)
# The smallest and largest figure of some runs, both packages in turn on one core, in the units of `UNITS`: tokens per
# second of decoding, milliseconds of a write, seconds of a training step. Another core gives other figures, so what is
# compared between machines is the quotient of the two.
PEER: dict[str, Any] = {
    "package": "rxlm 0.3.80",
    "source": "side by side with version 0.1.0 of this package, one thread, CPU time, float32",
    "figures": {
        "micro": {
            "decode 1": {"rxlm": [67, 75], "rxt_hf": [58, 70]},
            "decode 8": {"rxlm": [245, 253], "rxt_hf": [367, 444]},
            "write 1 x 64": {"rxlm": [24, 32], "rxt_hf": [25, 39]},
            "write 1 x 128": {"rxlm": [27, 36], "rxt_hf": [31, 41]},
            "write 1 x 256": {"rxlm": [46, 52], "rxt_hf": [38, 54]},
            "write 8 x 128": {"rxlm": [159, 168], "rxt_hf": [175, 205]},
            "training step": {"rxlm": [4.1, 4.3], "rxt_hf": [4.2, 4.9]},
        },
        "100m": {
            "decode 1": {"rxlm": [21.9, 21.9], "rxt_hf": [33.6, 33.6]},
            "decode 8": {"rxlm": [50.4, 50.4], "rxt_hf": [115, 115]},
            "write 1 x 64": {"rxlm": [324, 324], "rxt_hf": [361, 361]},
            "write 1 x 128": {"rxlm": [359, 359], "rxt_hf": [464, 464]},
            "write 1 x 256": {"rxlm": [508, 508], "rxt_hf": [600, 600]},
            "write 8 x 128": {"rxlm": [3200, 3200], "rxt_hf": [3200, 3200]},
        },
    },
}
UNITS = {"decode": "tokens/s", "write": "ms", "training": "s"}


def build(shape: str) -> Any:
    """An RxT of a shape in `SHAPES`, with random weights and no end token."""
    torch.manual_seed(0)
    return RxTForCausalLM(RxTConfig(**SHAPES[shape])).eval()


class _CPUTimes(BaseStreamer):
    """CPU time at which `generate` handed out each token, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.process_time())

    def end(self) -> None:
        pass


class Cases:
    """What is timed at one shape: each case, by name, gives the CPU seconds of one run."""

    def __init__(self, shape: str, *, compiles: bool = False, trains: bool = True):
        self.model = build(shape)
        self.generator = torch.Generator().manual_seed(1)
        self.cases: dict[str, Callable[[], float]] = {}
        for rows in (1, 8):
            self.cases[f"decode {rows}"] = lambda rows=rows: self.decode(rows)
            if compiles:
                self.cases[f"decode {rows}, compiled"] = lambda rows=rows: self.decode(rows, **compiled_decoding())
        for rows, tokens in WRITES:
            self.cases[f"write {rows} x {tokens}"] = lambda rows=rows, tokens=tokens: self.write(rows, tokens)
        # only the small shape was trained
        if trains and "training step" in PEER["figures"][shape]:
            self.cases["training step"] = self.train

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(7, self.model.config.vocab_size, shape, generator=self.generator)

    def decode(self, rows: int, **kwargs: Any) -> float:
        """Seconds of a token after the first, by row."""
        times = _CPUTimes()
        ids, memory = self.ids(rows, PROMPT), self.model.init_stm(rows)
        kwargs |= {"attention_mask": torch.ones_like(ids), "stm_cache": memory, "update_memory": False}
        self.model.generate(ids, max_new_tokens=ANSWER, do_sample=False, streamer=times, **kwargs)
        return (times.times[ANSWER] - times.times[1]) / (ANSWER - 1) / rows

    def write(self, rows: int, tokens: int) -> float:
        ids, memory = self.ids(rows, tokens), self.model.init_stm(rows)
        start = time.process_time()
        self.model.update_memory(memory, ids, torch.ones_like(ids))
        return time.process_time() - start

    def train(self) -> float:
        """Forward and backward of a batch of episodes, without a label on each turn's first quarter."""
        ids = self.ids(*TRAINING)
        labels = ids.clone()
        labels[..., : ids.shape[-1] // 4] = -100
        self.model.train()
        start = time.process_time()
        self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        self.model.zero_grad(set_to_none=True)
        seconds = time.process_time() - start
        self.model.eval()
        return seconds


def in_units(case: str, seconds: float) -> float:
    """The figure that stands in a table: tokens per second, milliseconds or seconds."""
    unit = UNITS[case.split()[0]]
    return 1 / seconds if unit == "tokens/s" else seconds * (1e3 if unit == "ms" else 1.0)


def measure(shape: str, rounds: int, limit_s: float, *, compiles: bool = False) -> dict[str, dict[str, Any]]:
    """Median and range of each case, in its unit."""
    cases = Cases(shape, compiles=compiles).cases
    runs = {name: lambda run=run: {"cpu_s": run()} for name, run in cases.items()}
    # compilation takes two runs
    interleaved(runs, 1 + compiles)
    return {name: spread(name, found) for name, found in interleaved(runs, rounds, limit_s).items()}


def spread(case: str, samples: list[dict[str, float]]) -> dict[str, Any]:
    figures = [in_units(case, sample["cpu_s"]) for sample in samples]
    return {"median": statistics.median(figures), "range": [min(figures), max(figures)], "rounds": len(figures)}


def compare(case: str, before: list[dict[str, float]], after: list[dict[str, float]]) -> float:
    """Median over rounds of the figure after by the figure before."""
    quotient = ratio(after, before, "cpu_s")
    return 1 / quotient if case.startswith("decode") else quotient


def run(options: SimpleNamespace) -> str:
    """Measures what `rxt bench --peer-shapes` does, writes its file and returns its tables."""
    if options.plot is not None:
        raise ValueError("--plot draws turns, which --peer-shapes does not measure: leave out one of them.")
    return run_bench(options, peer_bench, peer_markdown)


def peer_bench(options: SimpleNamespace) -> dict[str, Any]:
    """The report of `rxt bench --peer-shapes`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {shape: measure(shape, options.repeats, options.limit_s, compiles=options.compile) for shape in SHAPES}
        where = environment("cpu")
    finally:
        torch.set_num_threads(threads)
    return {"environment": where, "dtype": "float32", "peer": PEER, "shapes": found}


def peer_markdown(report: dict[str, Any]) -> str:
    """Each case's figure here, beside what was recorded of the two packages on another core."""
    tables = []
    for shape, cases in report["shapes"].items():
        recorded, rows = report["peer"]["figures"][shape], []
        for case, figures in cases.items():
            cells = [
                " to ".join(dict.fromkeys(map(shown, recorded[case][package]))) if case in recorded else ""
                for package in ("rxlm", "rxt_hf")
            ]
            rows.append([f"{case}, {UNITS[case.split()[0]]}", *cells, shown(figures["median"])])
        head = [shape, f"{report['peer']['package']}, recorded", "rxt_hf 0.1.0, recorded with it", "here, now"]
        tables.append(markdown_table(head, *rows))
    return "\n\n".join(tables)
