# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Trains the language model without a memory on what the recipe for converted models trains on: the same dialogues and
turns, adapter, weights of the loss and optimizer. Only what stands before a turn differs:

    python benchmarks/upcycling_baselines.py --model smollm2 --data sgd --output_dir out                # all of it
    python benchmarks/upcycling_baselines.py --model smollm2 --data sgd --output_dir out --history 96   # a window
    python benchmarks/upcycling_baselines.py --model smollm2 --data sgd --output_dir out --history 0    # nothing

Options are those of examples/upcycling/train.py. With all of the history a row is everything that is told in a row,
and all its chosen turns are learned in one pass, which is the most that such a model can learn in that time.
benchmarks/upcycling.py measures the result (`--baselines NAME=out`).
"""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "upcycling"))
from train import (
    RECIPE,
    ToldTurns,
    UpcyclingArguments,
    UpcyclingTrainer,
    load_source,
    read_dialogues,
)

from rxt_hf import RxTEpisodeCollator
from rxt_hf.chat_template import source_pieces
from rxt_hf.convert import adapter_config, convert_tokenizer, from_llm
from rxt_hf.convert.template import turn_pieces
from rxt_hf.data.readers import Episodes
from rxt_hf.evaluation.speed import environment
from rxt_hf.training.loop import CpuBudget, parse

OF_TOKENS = ("input_ids", "labels", "is_recalled")


@dataclass
class BaselineArguments(UpcyclingArguments):
    history: int | None = field(default=None, metadata={"help": "tokens before a turn that are read; default: all"})
    longest: int = field(default=1024, metadata={"help": "tokens of a row; what is told earlier is left out"})


def tokens_between(source_tokenizer: Any, tokenizer: Any) -> list[int]:
    """What the language model's chat template says behind the end of a turn; nothing, if its pieces are not in use."""
    if source_pieces(tokenizer) is None:
        return []
    _, _, rest = turn_pieces(source_tokenizer).end.partition(tokenizer.eos_token)
    return source_tokenizer(rest, add_special_tokens=False)["input_ids"]


class Texts(Dataset):
    """The rows of [`ToldTurns`] with text in place of memories: what was told before, and then the turn."""

    def __init__(self, told: ToldTurns, between: list[int], options: BaselineArguments):
        self.told, self.between, self.options = told, between, options
        self.rows: list[dict[str, list[int]]] = []
        for number in range(told.rounds):
            for dialogues in told.told_in(number):
                self.rows += self.of_one(dialogues)

    def of_one(self, dialogues: list[int]) -> list[dict[str, list[int]]]:
        """The rows of what is told to one memory."""
        history, rows = self.options.history, []
        text: dict[str, list[int]] = {name: [] for name in OF_TOKENS}
        for index in dialogues:
            item = self.told.episodes[index]
            for turn, mask in enumerate(self.told.masks[index]):
                is_kept = self.told.is_kept[index][turn]
                labels = item["labels"][turn] if is_kept else [-100] * len(mask)
                said = {
                    "input_ids": item["input_ids"][turn] + self.between,
                    "labels": labels + [-100] * len(self.between),
                    "is_recalled": [int(flag and is_kept) for flag in mask] + [0] * len(self.between),
                }
                if history is not None and is_kept:
                    before = text["input_ids"][len(text["input_ids"]) - min(history, len(text["input_ids"])) :]
                    nothing = {"input_ids": before, "labels": [-100] * len(before), "is_recalled": [0] * len(before)}
                    rows.append({name: nothing[name] + said[name] for name in OF_TOKENS})
                text = {name: text[name] + said[name] for name in OF_TOKENS}
        if history is None:
            rows = [{name: values[-self.options.longest :] for name, values in text.items()}]
        return [row for row in rows if any(label != -100 for label in row["labels"][1:])]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def told_turns(base: tuple[Any, Any], options: UpcyclingArguments, folder: Path, seed: int) -> ToldTurns:
    """Which turns the recipe tells and keeps. No memory is computed."""
    episodes = Episodes(base[1], read_dialogues(options), max_tokens=options.tokens)
    model = from_llm(base[0], tokenizer=base[1], num_memory_slots=options.slots)
    which = {name: getattr(options, name) for name in ("rounds", "topics", "ordinary_share")}
    return ToldTurns(model, episodes, folder, 1, seed=seed, **which)


class TextTrainer(UpcyclingTrainer):
    """The same loss of a model that reads text."""

    def hidden_states(self, model, inputs):
        turn = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**turn, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        return outputs, outputs.hidden_states[-1][:, :-1][inputs["labels"][:, 1:] != -100]


def main(argv: list[str] | None = None) -> None:
    # rows in random order: there is no telling in rounds
    defaults = RECIPE | {"train_sampling_strategy": "random"}
    options, args = parse(BaselineArguments, defaults, argv)
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    budget = CpuBudget(folder, options.cpu_seconds)
    source, source_tokenizer = load_source(options.model)
    tokenizer = convert_tokenizer(source_tokenizer, max_length=source.config.max_position_embeddings)
    told = told_turns((source, tokenizer), options, folder, args.seed)
    lora: Any = adapter_config(told.model, tokenizer, r=options.rank, lora_alpha=2 * options.rank)
    fields = {"target_modules": lora.target_modules, "r": lora.r, "lora_alpha": lora.lora_alpha}
    torch.manual_seed(args.seed)
    adapted = get_peft_model(source, LoraConfig(task_type="CAUSAL_LM", **fields))
    rows = Texts(told, tokens_between(source_tokenizer, tokenizer), options)
    trainer = TextTrainer(
        model=adapted, args=args, train_dataset=rows, data_collator=RxTEpisodeCollator(tokenizer), callbacks=[budget]
    )
    trainer.recall_weight = options.recall_weight
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    adapted.save_pretrained(str(folder))
    report = {
        "command": shlex.join(
            ["python", "benchmarks/upcycling_baselines.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        "environment": environment("cpu"),
        "history": options.history,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "rows": len(rows),
        "cpu_seconds": round(budget.seconds(), 1),
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    (folder / "run.json").write_text(json.dumps(report, indent=1) + "\n")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
