# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
What models of equal size recall of real dialogues: an RxT, and the baselines of `examples/demo/baselines.py`.

    python benchmarks/dialogues.py --data path/to/sgd path/to/star --arm rxt=DIR --arm full_history=DIR \
        --output dialogues.json

DIR are folders of `train_dialogues.py --arm ...`; `NAME:more=DIR` is a second model of an arm, and `NAME=DIR+DIR` one
whose training went on in another folder: the last one's model, the steps and seconds of all.
Measured on test dialogues, teacher forced: perplexity of all answers, and nats per token of the words that only
earlier turns tell. Then the probes, greedy, each asked after the last turn: share that is exactly right, for values
said three or more turns before, and beside it the floor: each slot's most frequent value in training.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from histories import evaluate_history
from tables import both_sources, dialogues_by_turn, dialogues_table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rxt_hf import RxTForCausalLM
from rxt_hf.data.readers import read_episodes, sampled
from rxt_hf.evaluation.memory import Dialogues, probes, teacher_forced
from rxt_hf.evaluation.speed import environment


def floors(folder: str, dialogues: Dialogues) -> dict[str, float]:
    """Share of the probes, by distance, whose answer is the slot's most frequent one in training."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for dialogue in read_episodes(folder, "train"):
        for probe in dialogue.get("probes", []):
            counts[probe["slot"]][probe["answer"].lower()] += 1
    guess = {slot: found.most_common(1)[0][0] for slot, found in counts.items()}
    asked = [probe for dialogue in dialogues.episodes.dialogues for probe in dialogue.get("probes", [])]
    right = [guess.get(probe["slot"]) in [text.lower() for text in probe["answers"]] for probe in asked]
    far = [is_right for is_right, probe in zip(right, asked, strict=True) if probe["distance"] >= 3]
    if not far:
        raise ValueError(f"The test dialogues of {folder} have no probe about a value said 3 or more turns before.")
    return {"all": sum(right) / len(right), "3+": sum(far) / len(far)}


@torch.no_grad()
def measure(folders: list[str], arm: str, sources: Mapping[str, Sequence[Any]], tokens: int) -> dict[str, Any]:
    folder = folders[-1]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states = [json.loads(Path(each, "trainer_state.json").read_text()) for each in folders]
    result: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "training_steps": sum(state["global_step"] for state in states),
        "training_cpu_seconds": round(sum(float(Path(each, "cpu_seconds.txt").read_text()) for each in folders), 1),
        "sources": {},
    }
    for name, test in sources.items():
        dialogues = Dialogues(tokenizer, test, max_tokens=tokens)
        if isinstance(model, RxTForCausalLM):
            result["memory_bytes"] = model.init_stm(1).nbytes
            found = teacher_forced(model, dialogues)
            found["probes"] = probes(model, tokenizer, dialogues, max_new_tokens=24)
            by_memory = {
                memory: {figure: rows[memory] for figure, rows in found.items()} for memory in found["probes"]
            }
        else:
            full_history = arm.split(":")[0] != "current_turn"
            by_memory = {
                "own": evaluate_history(model, tokenizer, dialogues, full_history=full_history, max_new_tokens=24)
            }
        result["sources"][name] = by_memory
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="folders with the splits train and test")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=DIR", help="a trained model")
    parser.add_argument("--dialogues", type=int, default=200, help="of each folder's test split")
    parser.add_argument("--tokens", type=int, default=64, help="a dialogue ends before a longer interaction")
    parser.add_argument("--output", default="dialogues.json", help="arms that it holds already are kept")
    options = parser.parse_args(argv)
    path = Path(options.output)
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"arms": {}, "floors": {}}
    sources = {Path(folder).name: sampled(folder, "test", options.dialogues) for folder in options.data}
    report |= {"environment": environment("cpu"), "dialogues": options.dialogues, "tokens": options.tokens}
    for arm, _, found in (each.partition("=") for each in options.arm):
        folders = found.split("+")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[-1])
        for each in options.data:
            name = Path(each).name
            report["floors"][name] = floors(each, Dialogues(tokenizer, sources[name], max_tokens=options.tokens))
        if arm not in report["arms"]:
            report["arms"][arm] = measure(folders, arm, sources, options.tokens)
            path.write_text(json.dumps(report, indent=1) + "\n")
    print("\n\n".join(both_sources(render, report) for render in (dialogues_table, dialogues_by_turn)))


if __name__ == "__main__":
    main()
