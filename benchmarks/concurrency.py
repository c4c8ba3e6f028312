# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Many conversations on one machine, RxT against a Llama that keeps every conversation's keys and values.

    python benchmarks/concurrency.py --size tiny --output benchmarks/results/concurrency_tiny.json

How many conversations' states fit into a budget of bytes, and the answers' tokens per second of 1, 8 and 64
conversations at one turn: each in a `generate` of its own, one after the other, and all in one `generate`. RxT's time
includes the memory write. The weights are no part of the budget.
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from rxt_hf.evaluation.speed import (
    ARMS,
    SIZES,
    Turns,
    build_models,
    cache_bytes,
    environment,
    interleaved,
    markdown_table,
    medians,
    ratio,
    shown,
)

COMPARED = ("rxt", "persistent_cache")


def states_by_turn(models, numbers: list[int], budget: int, **tokens) -> dict[str, dict]:
    """Bytes of state of one conversation after each turn, and how many such states the budget holds."""
    turns = Turns(*models, [number + 1 for number in numbers], **tokens)
    found = {arm: {} for arm in COMPARED}
    for number in numbers:
        sizes = (turns.memories[number + 1].nbytes, cache_bytes(turns.cache_before(number + 1)))
        for arm, size in zip(COMPARED, sizes, strict=True):
            found[arm][str(number)] = {"state_bytes": size, "conversations": budget // size}
    return found


def one_after_the_other(turns: Turns, number: int, conversations: int, arm: str) -> dict[str, float]:
    """Every conversation's state is in memory while each has its turn."""
    waiting = [turns.inputs(arm, number) for _ in range(conversations)]
    for inputs in waiting:
        if arm == "rxt":
            inputs["stm_cache"] = inputs["stm_cache"].fork()
    return {"seconds": sum(turns.timed(arm, inputs)[0]["turn_s"] for inputs in waiting)}


def batched(turns: Turns, number: int, arm: str) -> dict[str, float]:
    return {"seconds": turns.play(arm, number)["turn_s"]}


def throughput(models, options: argparse.Namespace, bytes_per_state: dict[str, int], **tokens) -> dict[str, dict]:
    """Tokens per second by mode, number of conversations and arm; `None` where the states exceed the budget."""
    found = {"one_after_the_other": {}, "batched": {}}
    single = Turns(*models, [options.at_turn], **tokens)
    for conversations in options.conversations:
        arms = [arm for arm in COMPARED if conversations * bytes_per_state[arm] <= options.budget_gib * 2**30]
        batch = Turns(*models, [options.at_turn], batch_size=conversations, **tokens)
        for arm in arms:
            single.play(arm, options.at_turn)
        modes = {
            "one_after_the_other": partial(one_after_the_other, single, options.at_turn, conversations),
            "batched": partial(batched, batch, options.at_turn),
        }
        for mode, run in modes.items():
            cells = {arm: partial(run, arm) for arm in arms}
            samples = interleaved(cells, options.repeats, options.limit_s)
            answered = conversations * options.answer_tokens
            rates = {arm: answered / medians(samples[arm])["seconds"] if arm in arms else None for arm in COMPARED}
            if len(arms) == len(COMPARED):
                rates["rxt_by_persistent_cache"] = ratio(samples["persistent_cache"], samples["rxt"], "seconds")
            found[mode][str(conversations)] = rates
    return found


def measure(options: argparse.Namespace) -> dict:
    tokens = {"query_tokens": options.query_tokens, "answer_tokens": options.answer_tokens}
    size = dict(SIZES[options.size])
    size["max_position_embeddings"] = max(size["max_position_embeddings"], sum(tokens.values()))
    models = build_models(size, getattr(torch, options.dtype), options.device)
    numbers = sorted({*options.turns, options.at_turn})
    states = states_by_turn(models, numbers, int(options.budget_gib * 2**30), **tokens)
    bytes_per_state = {arm: by_turn[str(options.at_turn)]["state_bytes"] for arm, by_turn in states.items()}
    rxt, llama = (states[arm] for arm in COMPARED)
    return {
        "environment": environment(options.device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "options": vars(options),
        "sizes": size,
        "parameters": dict(zip(("rxt", "llama"), (model.num_parameters() for model in models), strict=True)),
        "states": states,
        "tokens_per_s": throughput(models, options, bytes_per_state, **tokens),
        "ratios": {
            f"conversations_over_persistent_cache_at_{number}": llama[number]["state_bytes"]
            / rxt[number]["state_bytes"]
            for number in rxt
        },
    }


def markdown(report: dict) -> str:
    numbers = list(report["states"]["rxt"])
    budget = report["options"]["budget_gib"]
    blocks = [
        markdown_table(
            [f"conversations in {budget:g} GiB after turn", *numbers],
            *(
                [ARMS[arm], *(f"{states[n]['conversations']:,}" for n in numbers)]
                for arm, states in report["states"].items()
            ),
        )
    ]
    for mode, by_number in report["tokens_per_s"].items():
        rows = []
        for arm in COMPARED:
            rates = [rates[arm] for rates in by_number.values()]
            rows.append([ARMS[arm], *("does not fit" if rate is None else shown(rate) for rate in rates)])
        title = f"tokens per second, {mode.replace('_', ' ')}; conversations"
        blocks.append(markdown_table([title, *by_number], *rows))
    return "\n\n".join(blocks)


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


count.__name__ = "whole number"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--turns", nargs="+", type=count, default=[1, 2, 4, 8, 16, 32, 64], help="for the states")
    parser.add_argument("--at-turn", type=count, default=8, help="for the tokens per second")
    parser.add_argument("--conversations", nargs="+", type=count, default=[1, 8, 64])
    parser.add_argument("--budget-gib", type=float, default=4.0, help="bytes for the states of all conversations")
    parser.add_argument("--query-tokens", type=count, default=192)
    parser.add_argument("--answer-tokens", type=count, default=64)
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--limit-s", type=float, default=120.0, help="no fourth or later round begins after this")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="concurrency.json", metavar="FILE")
    options = parser.parse_args(argv)
    report = measure(options)
    Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
