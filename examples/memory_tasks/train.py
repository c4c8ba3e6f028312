# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains a small model on synthetic memory tasks (`memory_tasks.tasks`) and measures how many answers are exactly right.

    PYTHONPATH=examples python -m memory_tasks.train --tasks remember --size 40 --test_sizes 10 20 40 --output_dir out

runs to the end, or resumes from the last checkpoint in `out`, and writes `out/result.json`. The size of an episode
(see `SIZES`) stays at `--first_size` until a value is bound to its key, then it grows. In tasks of token ids questions
are read and not written, so that all of an episode's questions ask one and the same memory.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer

from memory_tasks.tasks import TASKS
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.configuration_rxt import RxTConfig
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.readers import encode_turns, said
from rxt_hf.evaluation.speed import environment
from rxt_hf.modeling_rxt import RxTForCausalLM
from rxt_hf.training.arguments import BudgetArguments, json_object
from rxt_hf.training.loop import CpuBudget, parse, train

# what the size of an episode of a task says, as arguments of its generator; of the others: the number of questions
SIZES: dict[str, Any] = {
    "remember": lambda size: {"num_pairs": size, "num_questions": size},
    "rewrite": lambda size: {"num_writes": size, "num_keys": min(size, 8), "num_questions": min(size, 8)},
    "mqar": lambda size: {"num_pairs": size, "num_turns": 4 * size},
    "needle": lambda size: {"num_turns": size + 1},
    "variable_tracking": lambda size: {"num_turns": size + 1, "num_hops": min(size - 1, 4)},
}
TEST_SEED = 1_000_000_000
# shares of the run: the size grows from here to there, and the learning rate falls over the last one
GROWTH, FALL = (0.2, 0.6), 0.3
# their values cannot be told from the kind of their key
UNHINTED = ("mqar", "needle", "variable_tracking")
RECIPE: dict[str, Any] = {
    "max_steps": 9000,
    "learning_rate": 1e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "warmup_steps": 100,
    "max_grad_norm": 0.5,
    # one item of the data set is one step
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "sequential",
    "bf16": True,
    "use_cpu": True,
    "logging_steps": 50,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 1,
}
# half a million parameters
MODEL: dict[str, Any] = {
    "hidden_size": 80,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "num_memory_slots": 64,
    "memory_attention_type": "simple",
}


@dataclass(kw_only=True)
class MemoryTaskArguments(BudgetArguments):
    """What the recipe adds to `TrainingArguments`."""

    tasks: list[str] = field(metadata={"help": f"Tasks, trained in turn, of {', '.join(TASKS)}."})
    size: int = field(default=16, metadata={"help": "Size of the largest training episodes."})
    first_size: int = field(default=2, metadata={"help": "Size of the largest episodes at the start of training."})
    test_sizes: list[int] = field(
        default_factory=list, metadata={"help": "Sizes of the test episodes (default: size)."}
    )
    test_episodes: int = field(default=200, metadata={"help": "Test episodes per task and size."})
    generator: dict | str | None = field(
        default=None, metadata={"help": "JSON object of arguments of the tasks' generators."}
    )
    history: int = field(
        default=0,
        metadata={"help": "Most earlier writes (without gradient) before a full-size episode; token-id tasks only."},
    )
    hint: float = field(
        default=0.09,
        metadata={"help": "Share of the run during which the hint (a key's kind tells its value) fades out."},
    )
    max_batch_turns: int = field(default=240, metadata={"help": "Turns of a step, over all its episodes."})
    override: dict | str | None = field(default=None, metadata={"help": "JSON object of configuration fields."})


def generate(task: str, seed: int, size: int, **more: Any) -> dict[str, Any]:
    arguments = SIZES.get(task, lambda questions: {"num_questions": questions})(size)
    return TASKS[task](seed, **arguments | more)


def episode_batch(tokenizer: PreTrainedTokenizerFast | None, episodes: list[dict]) -> dict[str, torch.Tensor]:
    """A batch in which only the answers to questions have labels, and what is to be written."""
    features: list[dict[str, list]] = []
    for episode in episodes:
        turns = episode["interactions"]
        rows = encode_turns(tokenizer, turns)
        labels = [
            row if turn["kind"] == "ask" else [-100] * len(row) for (_, row), turn in zip(rows, turns, strict=True)
        ]
        features.append({"input_ids": [ids for ids, _ in rows], "labels": labels})
        # a dialogue in words goes on after a question
        written = [int(turn["kind"] != "ask" or isinstance(turn["query"], str)) for turn in turns]
        features[-1]["write_mask"] = written
    return RxTEpisodeCollator(pad_token_id=0)(features)


class MemoryTasks(Dataset):
    """One item is one step's batch, a function of its index alone, so that a run resumes exactly."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None, options: MemoryTaskArguments, steps: int):
        self.tokenizer, self.options, self.steps = tokenizer, options, steps
        self.arguments = json_object("generator", options.generator)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        options, rng = self.options, Random(index)
        task = options.tasks[index % len(options.tasks)]
        # few pairs are what teaches to bind a value to its key, then the size grows by equal factors. A third of the
        # steps are smaller still, so that what was learnt stays
        start, end = (share * self.steps for share in GROWTH)
        growth = min(1.0, max(0.0, (index - start) / (end - start)))
        size = round(options.first_size * (options.size / options.first_size) ** growth)
        if rng.random() < 1 / 3:
            size = options.first_size + int(rng.random() * (size - options.first_size + 1))
        arguments = dict(self.arguments)
        if task not in UNHINTED:
            # that is how binding begins
            arguments["p_typed"] = max(0.0, 1.0 - index / (options.hint * self.steps)) if options.hint else 0.0
        episodes, turns = [], 0
        for seed in count(index * 10_000):
            episodes.append(generate(task, seed, size, **arguments))
            turns += len(episodes[-1]["interactions"])
            if turns + turns / len(episodes) > options.max_batch_turns:
                break
        batch = episode_batch(self.tokenizer, episodes)
        length = int(rng.random() * (options.history + 1))
        if length and self.tokenizer is None and index >= end:
            seeds = range(index * 10_000 + 5_000, index * 10_000 + 5_000 + len(episodes))
            before = episode_batch(None, [generate(task, seed, length, **arguments) for seed in seeds])
            batch["history"] = before["input_ids"][:, :length]
        return batch


def after_history(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with the memory of `history`, if it has one: bound things must be found wherever writes move them."""
    if "history" not in batch:
        return batch
    inputs = dict(batch)
    history = inputs.pop("history")
    # something has to be read
    read_mask = torch.zeros_like(history[..., 0])
    read_mask[0, 0] = 1
    with torch.no_grad():
        before = model(history, attention_mask=(history != 0).long(), read_mask=read_mask)
    return inputs | {"stm_cache": before.stm_cache}


def answer_logits(model: RxTForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets (-100 elsewhere) of the turns with labels, in order: only they are decoded."""
    is_read = (batch["labels"] != -100).any(-1)
    inputs = {name: tensor for name, tensor in after_history(model, batch).items() if name != "labels"}
    return model(**inputs, read_mask=is_read).logits[:, :-1], batch["labels"][is_read][:, 1:]


class TaskTrainer(Trainer):
    """`Trainer` that writes the column `history` first, without gradient."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, after_history(model, inputs), return_outputs, num_items_in_batch)


@torch.no_grad()
def exact(
    model: RxTForCausalLM,
    tokenizer: PreTrainedTokenizerFast | None,
    task: str,
    size: int,
    episodes: int,
    **arguments: Any,
) -> dict:
    """
    Share of the answers that are right in every token, end token included, given the right tokens before: what greedy
    decoding answers. Episodes of the split "test".
    """
    model.eval()
    right: list[bool] = []
    by_distance: dict[int, list[bool]] = {}
    for first in range(0, episodes, 20):
        seeds = range(TEST_SEED + first, TEST_SEED + min(first + 20, episodes))
        rows = [generate(task, seed, size, split="test", **arguments) for seed in seeds]
        batch = episode_batch(tokenizer, rows)
        logits, targets = answer_logits(model, batch)
        is_right = iter(((logits.argmax(-1) == targets) | (targets == -100)).all(-1).tolist())
        for turn in (turn for row in rows for turn in row["interactions"] if turn["kind"] == "ask"):
            right.append(next(is_right))
            by_distance.setdefault((turn["distance"] - 1) // 10 * 10 + 1, []).append(right[-1])
    shares = {f"{low}-{low + 9}": [round(sum(x) / len(x), 4), len(x)] for low, x in sorted(by_distance.items())}
    result = {"task": task, "size": size, "questions": len(right), "exact": round(sum(right) / len(right), 4)}
    if "bits" in rows[0]:
        result["bits"] = rows[0]["bits"]
    return result | {"by_distance": shares}


def trapezoid(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the learning rate at a step: it rises, stays, as nothing tells when binding is found, and falls."""
    return min(1.0, step / max(1, warmup_steps), max(0.02, (steps - step) / (FALL * steps)))


def stories(tasks: list[str], number: int = 2000) -> Iterator[str]:
    for task in tasks:
        for seed in range(ceil(number / len(tasks))):
            for turn in generate(task, seed, 4)["interactions"]:
                yield " ".join(said(turn))


def main(argv: list[str] | None = None) -> None:
    options, args = parse(MemoryTaskArguments, RECIPE, argv)
    if unknown := [task for task in options.tasks if task not in TASKS]:
        raise ValueError(f"There is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}.")
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    arguments = json_object("generator", options.generator)
    first = generate(options.tasks[0], 0, options.size, **arguments)
    tokenizer = None
    if "vocab_size" not in first:
        tokenizer = train_tokenizer(stories(options.tasks), vocab_size=600, max_length=128)
        tokenizer.save_pretrained(folder)
    vocab_size = first["vocab_size"] if tokenizer is None else len(tokenizer)
    torch.manual_seed(args.seed)
    model = RxTForCausalLM(RxTConfig(**MODEL | {"vocab_size": vocab_size} | json_object("override", options.override)))
    budget = CpuBudget(folder, options.cpu_seconds)
    data = MemoryTasks(tokenizer, options, args.max_steps)
    trainer = train(model, args, data, lambda batches: batches[0], budget, factor=trapezoid, trainer_class=TaskTrainer)
    sizes = options.test_sizes or [options.size]
    result = {
        "environment": environment("cpu"),
        "command": shlex.join(["python", "-m", "memory_tasks.train", *(sys.argv[1:] if argv is None else argv)]),
        "tasks": options.tasks,
        "parameters": model.num_parameters(),
        "memory_bytes": model.init_stm(1).nbytes,
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "cpu_seconds": round(budget.seconds(), 1),
        "exact": [
            exact(model, tokenizer, task, size, options.test_episodes, **arguments)
            for task in options.tasks
            for size in sizes
        ],
        "log": list(islice(trainer.state.log_history, 0, None, 5)),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in result["exact"]:
        print(f"{row['task']:18} size {row['size']:4}  exact {row['exact']}  ({row['questions']} questions)")


if __name__ == "__main__":
    main()
