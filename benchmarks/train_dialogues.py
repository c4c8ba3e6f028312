# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains a small model on dialogues of your own, or one that it is compared with (`demo.baselines`).

    PYTHONPATH=examples python benchmarks/train_dialogues.py --data path/to/sgd path/to/star --arm rxt --output_dir out

runs to the end, or resumes from the last checkpoint in `out`. Data are folders with `train.jsonl.gz`, see
`rxt_hf.data.readers`; the probes of a dialogue are asked as its last interactions. All arms take the same dialogues in
the same order, cut at the same interactions, with the same labels: every answer. `benchmarks/dialogues.py` measures.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from demo.baselines import Arm, arranged, build_model
from demo.train import RECIPE as FACT_RECIPE
from demo.train import FactDialogues
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rxt_hf.chat_template import train_tokenizer
from rxt_hf.configuration_rxt import RxTConfig
from rxt_hf.data.batching import StepCollator, endless_batches
from rxt_hf.data.readers import Episodes, cut_episode, said, sampled
from rxt_hf.presets import PRESETS
from rxt_hf.training.arguments import BudgetArguments, DataArguments, ModelArguments
from rxt_hf.training.loop import CpuBudget, parse, train

# (share of the run, turns that dialogues are cut to): short ones first, so that writing and reading find each other
CURRICULUM = ((0.1, 2), (0.25, 5), (1.0, 16))
# half of the values are words that no other dialogue has
FACTS: dict[str, Any] = {"p_open": 0.5, "p_new": 0.5}
RECIPE: dict[str, Any] = FACT_RECIPE | {
    "max_steps": 1500,
    "warmup_steps": 100,
    "learning_rate": 2e-3,
    "tokens": 64,
    "max_batch_tokens": 3072,
    "vocab_size": 4096,
    # asked for by name, or bf16 is refused
    "use_cpu": not torch.accelerator.is_available(),
}


@dataclass
class DialogueArguments(ModelArguments, DataArguments, BudgetArguments):
    """What the recipe adds to `TrainingArguments`."""

    arm: Arm = field(default="rxt", metadata={"help": "Model to train: rxt, or a baseline of demo.baselines."})
    facts: int = field(
        default=0,
        metadata={"help": "If > 0, every second step trains on generated facts with this many turns in all."},
    )

    def __post_init__(self) -> None:
        ModelArguments.__post_init__(self)
        DataArguments.__post_init__(self)


def with_probes(dialogue: Mapping[str, Any], max_turns: int) -> dict[str, Any]:
    """The first turns of a dialogue, and then its probes as far as they are about them."""
    cut = cut_episode(dialogue, max_turns)
    return cut | {"interactions": [*cut["interactions"], *(cut.get("probes") or [])]}


class DialogueSteps(Dataset):
    """One item is one step's list of episodes, a function of its index alone, so that a run resumes exactly."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        dialogues: Sequence[Mapping[str, Any]],
        steps: int,
        *,
        arm: str = "rxt",
        tokens: int = 64,
        max_batch_tokens: int = 3072,
        facts: int = 0,
    ):
        self.arm = arm
        self.facts = FactDialogues(tokenizer, (steps + 1) // 2, facts, arm, mix=FACTS) if facts else None
        self.steps: list[tuple[Episodes, list[int]]] = []
        for share, turns in CURRICULUM:
            cut = (with_probes(dialogue, turns) for dialogue in dialogues)
            episodes = Episodes(tokenizer, cut, max_tokens=tokens)
            batches = endless_batches(episodes, max_batch_tokens)
            self.steps += [(episodes, batch) for batch in islice(batches, round(share * steps) - len(self.steps))]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if self.facts is not None and index % 2:
            return self.facts[index // 2]
        episodes, batch = self.steps[index]
        return list(arranged((episodes[number] for number in batch), self.arm))


def texts(dialogues: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for dialogue in dialogues:
        for turn in [*dialogue["interactions"], *(dialogue.get("probes") or [])]:
            yield " ".join(said(turn))


def main(argv: list[str] | None = None) -> None:
    options, args = parse(DialogueArguments, RECIPE, argv)
    options.check_data()
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    each = (sampled(path, "train", options.dialogues, skip_bad_rows=options.skip_bad_rows) for path in options.data)
    dialogues = list(chain.from_iterable(each))
    if options.model is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    else:
        tokenizer = train_tokenizer(texts(dialogues), vocab_size=options.vocab_size, max_length=256)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(args.seed)
    if options.model is not None:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        settings: dict[str, Any] = {**PRESETS[options.preset], **options.config_fields}
        settings["vocab_size"] = len(tokenizer)
        model = build_model(options.arm, RxTConfig(**settings))
    choices: dict[str, Any] = {name: getattr(options, name) for name in ("arm", "tokens", "max_batch_tokens", "facts")}
    data = DialogueSteps(tokenizer, dialogues, args.max_steps, **choices)
    train(model, args, data, StepCollator(tokenizer.pad_token_id), CpuBudget(folder, options.cpu_seconds))


if __name__ == "__main__":
    main()
