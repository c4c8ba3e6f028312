# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Whether a linear map finds a value in the memory: it is told in the first turn, and probed for after each turn.

    PYTHONPATH=examples python benchmarks/linear_probes.py --output linear_probes.json
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from demo.facts import ATTRIBUTES, DialogueWriter
from demo.recall import FIRST_TEST_SEED
from tables import markdown_table, show
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import rxt_hf
from rxt_hf import RxTForCausalLM
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.readers import encode_turns
from rxt_hf.evaluation.memory import ROWS, on_device
from rxt_hf.evaluation.speed import environment
from rxt_hf.layers_rxt import upcast

TURNS, RIDGE = 4, 0.01
# weights of statements, changes, questions and small talk after the first turn: nothing is overwritten or asked
KINDS = (0.6, 0.0, 0.0, 0.4)


@torch.no_grad()
def linear_probes(
    model: RxTForCausalLM,
    tokenizer: Any,
    attributes: Sequence[str],
    number: int,
) -> dict[str, dict[str, Any]]:
    r"""
    Measures whether a linear map finds the value of an attribute in the memory, by ridge regression on one-hot values.
    The value is stated in the first turn; later turns say other things.

    Returns: for each attribute `majority` (the accuracy of the most frequent value), `values`, `held_out` (dialogues)
    and `accuracy` by memory layer, and of `all`: one figure after each turn, on dialogues that the map has not seen.
    """
    found = {}
    for attribute in attributes:
        dialogues, values = _probing_dialogues(attribute, number)
        names = sorted(set(values))
        classes = torch.tensor([names.index(value) for value in values])
        train, held_out = slice(0, number * 3 // 4), slice(number * 3 // 4, None)
        one_hot = F.one_hot(classes, len(names))[train].double()
        majority = int(classes[train].bincount().argmax())
        accuracy: dict[str, list[float]] = defaultdict(list)
        for states in _memories_by_turn(model, tokenizer, dialogues):
            kernels = {str(layer): _kernel(part, train) for layer, part in enumerate(states.unbind(1))}
            kernels["all"] = torch.stack(list(kernels.values())).sum(0)
            for name, kernel in kernels.items():
                scores = _ridge(kernel[train, train], one_hot, kernel[held_out, train])
                accuracy[name].append((scores.argmax(-1) == classes[held_out]).double().mean().item())
        found[attribute] = {
            "values": len(names),
            "held_out": len(classes[held_out]),
            "majority": (classes[held_out] == majority).double().mean().item(),
            "accuracy": dict(accuracy),
        }
    return found


def _probing_dialogues(attribute: str, number: int) -> tuple[list[list[Mapping[str, Any]]], list[str]]:
    dialogues, values = [], []
    for seed in range(FIRST_TEST_SEED, FIRST_TEST_SEED + number):
        writer = DialogueWriter(
            Random(f"{attribute}:{seed}"), "seen", p_open=0.0, p_noise=0.15, max_live=len(ATTRIBUTES), only_open=False
        )
        writer.names = (attribute,)
        turns = [writer.state(p_two=0.0)]
        values.append(str(turns[0]["value"]))
        writer.names = tuple(ATTRIBUTES)
        for writer.turn in range(1, TURNS):
            turns.append(writer.next(KINDS, p_unknown=0.0, p_two=0.0))
        dialogues.append(turns)
    return dialogues, values


def _memories_by_turn(model: RxTForCausalLM, tokenizer: Any, dialogues: list) -> Iterator[torch.Tensor]:
    """Yields the states of all dialogues after each turn; only one turn's states are kept at a time."""
    pad = RxTEpisodeCollator(tokenizer.pad_token_id)
    states = list(model.model.initial_states(len(dialogues)).split(ROWS))
    for number in range(TURNS):
        encoded = encode_turns(tokenizer, [turns[number] for turns in dialogues])
        features = [{"input_ids": ids, "labels": labels} for ids, labels in encoded]
        for place, old in enumerate(states):
            batch = on_device(model, pad(features[place * ROWS : (place + 1) * ROWS]))
            embeds = model.model.embed_tokens(batch["input_ids"])
            states[place] = model.model.write(old, embeds, batch["attention_mask"])
        yield torch.cat(states)


def _kernel(features: torch.Tensor, train: slice) -> torch.Tensor:
    """Returns the inner products of the rows, centred on the mean of the training rows."""
    rows = upcast(features.flatten(1))
    rows = rows - rows[train].mean(0)
    return (rows @ rows.T).cpu().double()


def _ridge(kernel: torch.Tensor, targets: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Ridge regression in its dual form, `K_test (K + a I)^-1 (Y - mean Y) + mean Y`, `a` in units of K's diagonal."""
    mean = targets.mean(0)
    ridge = RIDGE * kernel.diagonal().mean().clamp(min=torch.finfo(kernel.dtype).tiny)
    return products @ torch.linalg.solve(kernel + ridge * torch.eye(len(kernel)), targets - mean) + mean


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["attribute; accuracy after turn", *range(1, TURNS + 1), "majority", "values", "held out"]
    rows = [
        [name, *map(show, part["accuracy"]["all"]), show(part["majority"]), part["values"], part["held_out"]]
        for name, part in found.items()
    ]
    return markdown_table(head, *rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(rxt_hf.DEMO), help="folder of the model (default: the demo)")
    parser.add_argument(
        "--attributes",
        nargs="+",
        choices=list(ATTRIBUTES),
        metavar="NAME",
        default=["favourite_colour", "job", "gym_day"],
        help="what is told in the first turn",
    )
    parser.add_argument("--dialogues", type=int, default=256, help="for each attribute; a quarter is held out")
    parser.add_argument("--output", type=Path, default=Path("linear_probes.json"), help="JSON file of the figures")
    options = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    found = linear_probes(model, AutoTokenizer.from_pretrained(options.model), options.attributes, options.dialogues)
    options.output.write_text(json.dumps({"environment": environment("cpu"), "attributes": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
