# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains the demo, and the baselines it is compared with, on generated fact dialogues with plain `transformers.Trainer`.

    PYTHONPATH=examples python -m demo.train --output_dir out

runs to the end, or resumes from the last checkpoint in `out`. More processes, on one machine or many, make each step
larger by as many times `--max_batch_turns`:

    PYTHONPATH=examples torchrun --nproc_per_node 2 -m demo.train --output_dir out --ddp_find_unused_parameters False

A finished run is trained further by

    PYTHONPATH=examples python -m demo.train --output_dir more --model out --skip 0.52 --seed 2

with new dialogues (they are a function of the seed), a learning rate that rises again, and without the first half of
the curriculum.
"""

import json
import random
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from demo.baselines import Arm, arranged, build_model
from demo.facts import (
    FIRST_TRAINING_SEED,
    MIX,
    Dialogue,
    Interaction,
    corpus_texts,
    generate_dialogue,
    open_name,
)
from rxt_hf.chat_template import encode_interactions, train_tokenizer
from rxt_hf.configuration_rxt import RxTConfig
from rxt_hf.data.batching import StepCollator
from rxt_hf.modeling_rxt import RxTForCausalLM
from rxt_hf.presets import PRESETS
from rxt_hf.training.arguments import BudgetArguments, ModelArguments, json_object
from rxt_hf.training.loop import SECOND_FALL_FROM, CpuBudget, parse, train

# (share of the run, turns of a dialogue): short dialogues first, so that writing and reading find each other
CURRICULUM = (
    (0.024, (2,)),
    (0.064, (4,)),
    (0.28, (8,)),
    (0.52, (8, 16)),
    (0.68, (8, 16, 32)),
    (0.8, (8, 16, 32, 64)),
    (1.0, (8, 16, 32)),
)
LABELLED_SHARE = 0.3
# from this share of the run, two steps of five have values out of no list: spelling an unknown one takes longest to
# learn. They are names, or in one of the two steps, where `p_new` is not 0, values of every attribute
OPEN_FROM = 4 / 15
ABOUT = (
    "This model was trained to remember what you tell it about yourself (names, pets, home, work, food, colours, "
    "hobbies, dates, numbers) and to make a little small talk, in English."
)
RECIPE: dict[str, Any] = {
    "max_steps": 15_000,
    "learning_rate": 3e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "warmup_steps": 200,
    "max_grad_norm": 0.5,
    # one item of the data set is one step
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "sequential",
    "bf16": True,
    "use_cpu": True,
    "logging_steps": 100,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 1,
}
MAX_TURN_TOKENS = 30


@dataclass
class FactDialogueArguments(ModelArguments, BudgetArguments):
    """What the recipe adds to `TrainingArguments`."""

    arm: Arm = field(
        default="rxt", metadata={"help": "Model to train: rxt (the demo), or a baseline of demo.baselines."}
    )
    max_batch_turns: int = field(
        default=128, metadata={"help": "Turns of a step; it holds max_batch_turns / turns dialogues."}
    )
    skip: float = field(default=0.0, metadata={"help": "Share of the curriculum that is left out at the start."})
    mix: dict | str | None = field(
        default=None, metadata={"help": "JSON object of probabilities of kinds of turns, over those of MIX."}
    )
    average: float = field(
        default=1.0,
        metadata={"help": "Share of the trained weights in the saved ones; the rest is model's (arXiv 2109.01903)."},
    )


class FactDialogues(Dataset):
    """One item is one step's list of episodes, a function of its index alone, so that a run resumes exactly."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        steps: int,
        max_batch_turns: int,
        arm: str = "rxt",
        *,
        seed: int = 1,
        skip: float = 0.0,
        mix: dict[str, Any] | None = None,
    ):
        if not 0.0 <= skip < 1.0:
            raise ValueError(f"skip must be a share of the curriculum, at least 0 and less than 1, got {skip}.")
        self.tokenizer, self.steps, self.max_batch_turns, self.arm = tokenizer, steps, max_batch_turns, arm
        self.skip, self.mix = skip, MIX | (mix or {})
        # a training seed for every dialogue of every step of every run
        self.first_seed = FIRST_TRAINING_SEED + (seed - 1) * 1_000_000_000

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> list[dict]:
        step, progress = index, self.skip + (1.0 - self.skip) * index / self.steps
        choices = next(turns for share, turns in CURRICULUM if progress < share or share == 1.0)
        turns = choices[step % len(choices)]
        # statements of several facts are long: they come together, so that other steps are not padded to their length
        every = 2 if self.mix["p_introduction"] else 6
        is_long = (step if progress < SECOND_FALL_FROM else step // len(choices)) % every == 0
        mix: dict[str, Any] = self.mix | ({"p_two": 0.35} if is_long else {"p_two": 0.0, "p_introduction": 0.0})
        if progress >= OPEN_FROM and step % 5 in (1, 3):
            mix |= {"p_open": 1.0} | ({"p_new": 1.0} if mix["p_new"] and step % 5 == 3 else {"only_open": True})
        seed, episodes = self.first_seed + step * 10_000, []
        while len(episodes) < max(1, self.max_batch_turns // turns):
            dialogue = generate_dialogue(seed, num_turns=turns, **mix)
            episode = encode_dialogue(self.tokenizer, dialogue)
            seed += 1
            if seed % 10_000 == 0:
                raise ValueError(
                    f"Hardly any dialogue of {turns} turns stays within {MAX_TURN_TOKENS} tokens a turn with a "
                    f"vocabulary of {len(self.tokenizer)}: use a larger one, 1024 or more."
                )
            if is_long or max(map(len, episode["labels"])) <= MAX_TURN_TOKENS:
                # the answer to an introduction says its facts apart, which is to be learned
                share = 1.0 if mix["p_introduction"] else LABELLED_SHARE
                labels = self._labels(episode["labels"], dialogue["interactions"], seed, share)
                episodes.append(episode | {"labels": labels})
        return list(arranged(episodes, self.arm))

    @staticmethod
    def _labels(labels: list[list[int]], interactions: list[Interaction], seed: int, share: float) -> list[list[int]]:
        """Every answer to a question counts, and a share of the others, whose wording is mostly chance."""
        rng = random.Random(seed)
        return [
            row if turn["kind"] in ("ask", "unknown", "foreign") or rng.random() < share else [-100] * len(row)
            for row, turn in zip(labels, interactions, strict=True)
        ]


def encode_dialogue(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> dict[str, list[list[int]]]:
    """An episode as [`RxTEpisodeCollator`] takes it."""
    turns = dialogue["interactions"]
    return encode_interactions(tokenizer, [turn["query"] for turn in turns], [turn["answer"] for turn in turns])


def main(argv: list[str] | None = None) -> None:
    from accelerate import PartialState

    options, args = parse(FactDialogueArguments, RECIPE, argv)
    if options.cpu_seconds is not None and args.world_size > 1:
        raise ValueError("cpu_seconds would stop one process before the others: use max_steps.")
    if not 0.0 <= options.average <= 1.0 or (options.average < 1.0 and options.model is None):
        raise ValueError(f"average must be a share, and less than 1 only with model, got {options.average}.")
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    override = options.config_fields
    with args.main_process_first():
        if options.model is not None or (folder / "tokenizer.json").exists():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model or folder)
        else:
            rng = random.Random(0)
            # a dialogue's names are few beside its words: without more, names would be spelt letter by letter
            names = (" " + open_name(rng, "train") for _ in range(200_000))
            length = RxTConfig(**{**PRESETS[options.preset], **override}).max_position_embeddings
            tokenizer = train_tokenizer(chain(corpus_texts(20_000), names), options.vocab_size, max_length=length)
        if args.process_index == 0:
            tokenizer.save_pretrained(folder)
    torch.manual_seed(args.seed)
    if options.model is None:
        settings: dict[str, Any] = {**PRESETS[options.preset], **override, "vocab_size": len(tokenizer)}
        model = build_model(options.arm, RxTConfig(**settings))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **override)
    if isinstance(model, RxTForCausalLM):
        model.set_bptt_turns(options.bptt_turns)
    data = FactDialogues(
        tokenizer,
        # each process takes an item of its own, and one for each batch that it accumulates
        args.max_steps * args.world_size * args.gradient_accumulation_steps,
        options.max_batch_turns,
        options.arm,
        seed=args.seed,
        skip=options.skip,
        mix=json_object("mix", options.mix),
    )
    trainer = train(model, args, data, StepCollator(tokenizer.pad_token_id), CpuBudget(folder, options.cpu_seconds))
    if isinstance(model, RxTForCausalLM) and trainer.is_world_process_zero():
        if options.model is not None and options.average < 1.0:
            start = RxTForCausalLM.from_pretrained(options.model, dtype=torch.float32, **override)
            mix_weights(model, start, options.average)
        save_compact(model, tokenizer, folder / "demo")
    # as in rxt_hf.training.run
    PartialState().destroy_process_group()


@torch.no_grad()
def mix_weights(model: torch.nn.Module, other: torch.nn.Module, share: float) -> None:
    """Leaves `share` of the model's weights, and takes the rest from another model of the same shape."""
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.copy_(torch.lerp(theirs.to(mine), mine, share))


def save_compact(model: RxTForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """
    Weights in bfloat16, half the bytes; the configuration says float32, which they are loaded in, and `use_cache`,
    which Trainer turns off.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32", "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    (folder / "about.txt").write_text(ABOUT + "\n")


if __name__ == "__main__":
    main()
