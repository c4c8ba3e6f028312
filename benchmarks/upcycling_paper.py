# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Trains a converted model in the paper's form on what the recipe for the form of today trains on: the same dialogues,
turns, LoRA, weights of the loss and optimizer.

    python benchmarks/upcycling_paper.py --model smollm2 --data sgd --output_dir out --per_device_train_batch_size 1

Every fifth layer has a cross-attention to the memory, which a bidirectional encoder and memory attention with gates
write; all of these are trained whole, through all writes. A row is everything that is told to one memory, and its
chosen turns are learned. Options are those of examples/upcycling/train.py; there are no rounds, no other dialogue's
memory and no salience. benchmarks/upcycling.py and upcycling_tasks.py measure the result (`--upcycled NAME=out`).
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint
from upcycling_baselines import RECIPE, ToldTurns, UpcyclingArguments, UpcyclingTrainer, load_source, told_turns

from rxt_hf import RxTEpisodeCollator
from rxt_hf.convert import adapter_config, convert_tokenizer, from_llm, save_adapted
from rxt_hf.evaluation.speed import environment
from rxt_hf.training.loop import CpuBudget, parse

PAPER = {"memory_reading": "cross_attention", "memory_encoding": "encoder", "memory_writing": "attention"}
LAYER_STEP = 5
OF_TOKENS = ("labels", "is_recalled")


class ToldEpisodes(Dataset):
    """What is told to each memory of [`ToldTurns`], as an episode in which only the chosen turns have labels."""

    def __init__(self, told: ToldTurns):
        self.rows = []
        for dialogues in (told_to_one for number in range(told.rounds) for told_to_one in told.told_in(number)):
            row: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "is_recalled": []}
            for index in dialogues:
                item = told.episodes[index]
                turns = zip(item["input_ids"], item["labels"], told.masks[index], told.is_kept[index], strict=True)
                for ids, labels, mask, is_kept in turns:
                    row["input_ids"].append(ids)
                    row["labels"].append(labels if is_kept else [-100] * len(ids))
                    row["is_recalled"].append([int(flag and is_kept) for flag in mask])
            if any(label != -100 for labels in row["labels"] for label in labels[1:]):
                self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[list[int]]]:
        return self.rows[index]


class EpisodeCollator(RxTEpisodeCollator):
    """Batches of episodes; labels and what is recalled are those of the turns that `read_mask` names, as rows."""

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        is_read = (batch["labels"][..., 1:] != -100).any(-1)
        return batch | {name: batch[name][is_read] for name in OF_TOKENS} | {"read_mask": is_read}


class EpisodeTrainer(UpcyclingTrainer):
    """The loss of the recipe over whole episodes: gradients reach the writes."""

    def hidden_states(self, model, inputs):
        read = {name: inputs[name] for name in ("input_ids", "attention_mask", "read_mask")}
        outputs = model(**read, logits_to_keep=1)
        return outputs, outputs.last_hidden_state[:, :-1][inputs["labels"][:, 1:] != -100]


def main(argv: list[str] | None = None) -> None:
    options, args = parse(UpcyclingArguments, RECIPE | {"train_sampling_strategy": "random"}, argv)
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    budget = CpuBudget(folder, options.cpu_seconds)
    source, source_tokenizer = load_source(options.model)
    tokenizer = convert_tokenizer(source_tokenizer, max_length=source.config.max_position_embeddings)
    rows = ToldEpisodes(told_turns((source, tokenizer), options, folder, args.seed))
    layers = list(range(0, source.config.num_hidden_layers, LAYER_STEP))
    conversion = {"num_memory_slots": options.slots, "memory_layers": layers, **PAPER}
    torch.manual_seed(args.seed)
    model = from_llm(source, tokenizer=tokenizer, **conversion)
    config = adapter_config(model, tokenizer, r=options.rank, lora_alpha=2 * options.rank)
    adapted: Any = get_peft_model(model, config)
    trainer = EpisodeTrainer(
        model=adapted, args=args, train_dataset=rows, data_collator=EpisodeCollator(tokenizer), callbacks=[budget]
    )
    trainer.recall_weight = options.recall_weight
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    command = ["python", "benchmarks/upcycling_paper.py", *(sys.argv[1:] if argv is None else argv)]
    report = {
        "command": shlex.join(command),
        "environment": environment("cpu"),
        "conversion": conversion,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "rows": len(rows),
        "cpu_seconds": round(budget.seconds(), 1),
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    save_adapted(adapted, folder, report)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
