# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Time of the demo's training step (8 dialogues of 16 turns of 29 tokens, three of five turns with a label): all turns
decoded, with logits everywhere, against what forward does in training.

    OMP_NUM_THREADS=1 python benchmarks/labelled_turns.py --output benchmarks/results/labelled_turns.json

Forward and backward, CPU time of the process, medians of rounds in which both alternate.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import rxt_hf
from rxt_hf.evaluation.speed import environment

SHAPE, LABELLED = (8, 16, 29), 77


def batch(vocab_size: int) -> dict[str, torch.Tensor]:
    """Random ids; the second half of each labelled turn is its answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocab_size, SHAPE, generator=generator)
    is_labelled = torch.zeros(SHAPE[0] * SHAPE[1], dtype=torch.bool)
    is_labelled[torch.randperm(len(is_labelled), generator=generator)[:LABELLED]] = True
    labels = ids.masked_fill(~is_labelled.view(SHAPE[:2])[..., None], -100)
    labels[..., : SHAPE[2] // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", default="labelled_turns.json", metavar="FILE", help="the report, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = rxt_hf.RxTForCausalLM.from_pretrained(rxt_hf.DEMO, dtype=torch.float32).train()
    inputs = batch(model.config.vocab_size)
    unlabelled = {name: tensor for name, tensor in inputs.items() if name != "labels"}

    def all_turns() -> torch.Tensor:
        logits = model(**unlabelled).logits[..., :-1, :]
        return cross_entropy(logits.flatten(0, -2), inputs["labels"][..., 1:].flatten())

    arms = {"all_turns": all_turns, "labelled_turns": lambda: model(**inputs).loss}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    losses = {}
    for _ in range(options.rounds + 1):
        for arm, loss_of in arms.items():
            start = time.process_time()
            loss = loss_of()
            loss.backward()
            seconds[arm].append(time.process_time() - start)
            losses[arm] = loss.item()
            model.zero_grad()
    # the first round warms up
    medians = {arm: statistics.median(found[1:]) for arm, found in seconds.items()}
    report = {
        "environment": environment("cpu"),
        "shape": SHAPE,
        "labelled_turns": LABELLED,
        "rounds": options.rounds,
        "losses": losses,
        "median_cpu_seconds": medians,
        "saved_share": 1 - medians["labelled_turns"] / medians["all_turns"],
    }
    Path(options.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: report[name] for name in ("losses", "median_cpu_seconds", "saved_share")}))


if __name__ == "__main__":
    main()
