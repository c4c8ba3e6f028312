# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains the demo, and the baselines it is compared with, on generated fact dialogues with plain `transformers.Trainer`.

    python -m rxt_hf.training.fact_dialogues --output_dir out

runs to the end, or resumes from the last checkpoint in `out`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from ..chat_template import encode_interactions, train_tokenizer
from ..data.collator import RxTEpisodeCollator
from ..data.facts import corpus_texts, generate_dialogue
from ..modeling_rxt import RxTConfig, RxTForCausalLM
from ..presets import PRESETS

# (share of the run, turns of a dialogue): short dialogues first, so that writing and reading find each other
CURRICULUM = ((0.04, (2,)), (0.10, (4,)), (0.45, (8, 8, 4)), (0.85, (8, 16)), (1.0, (8, 16, 32)))
FIRST_TRAINING_SEED = 1_000_000


@dataclass
class FactDialogueArguments:
    """What the recipe adds to `TrainingArguments`."""

    arm: Literal["rxt", "full_history", "current_turn"] = field(
        default="rxt", metadata={"help": "the demo, or a Llama that re-reads the history or sees one turn only"}
    )
    turns_per_step: int = field(default=128, metadata={"help": "dialogues in a step = turns_per_step / turns"})
    cpu_seconds: float | None = field(default=None, metadata={"help": "stops the run at this many CPU seconds"})
    vocab_size: int = field(default=1024, metadata={"help": "vocabulary of the tokenizer"})
    preset: str = field(default="tiny", metadata={"help": "a name of rxt_hf.presets.PRESETS"})
    override: str = field(default="", metadata={"help": "JSON object of further config fields"})


class FactDialogues(Dataset):
    """One item is one step's list of episodes, a function of its index alone, so that a run resumes exactly."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, steps: int, turns_per_step: int, arm: str = "rxt"):
        self.tokenizer, self.steps, self.turns_per_step, self.arm = tokenizer, steps, turns_per_step, arm

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[dict]:
        choices = next(turns for share, turns in CURRICULUM if step < share * self.steps or share == 1.0)
        turns = choices[step % len(choices)]
        # statements of two facts are long: they come together, so that other steps are not padded to their length
        p_two = 0.35 if step % 6 == 0 else 0.0
        first = FIRST_TRAINING_SEED + step * self.turns_per_step
        episodes = []
        for row in range(max(1, self.turns_per_step // turns)):
            dialogue = generate_dialogue(
                first + row, num_turns=turns, p_two=p_two, p_state=0.36, p_overwrite=0.12, p_ask=0.42, p_chat=0.10
            )
            episodes.append(encode_dialogue(self.tokenizer, dialogue))
        return list(self._arranged(episodes))

    def _arranged(self, episodes: list[dict]) -> Iterator[dict]:
        """The same tokens and label masks for every arm; only what can be seen from a turn differs."""
        for episode in episodes:
            if self.arm == "rxt":
                yield episode
            elif self.arm == "current_turn":
                yield from ({name: episode[name][turn] for name in episode} for turn in range(len(episode["labels"])))
            else:
                yield {name: [token for turn in episode[name] for token in turn] for name in episode}


def encode_dialogue(tokenizer: PreTrainedTokenizerFast, dialogue: dict) -> dict[str, list[list[int]]]:
    """An episode as [`RxTEpisodeCollator`] takes it."""
    turns = dialogue["interactions"]
    return encode_interactions(tokenizer, [turn["query"] for turn in turns], [turn["answer"] for turn in turns])


class StepCollator(RxTEpisodeCollator):
    """A batch of one item, which is a list of episodes."""

    def __call__(self, features):
        (episodes,) = features
        return super().__call__(episodes)


class CpuBudget(TrainerCallback):
    """Counts the process's CPU seconds over all resumed runs, and stops training when they are used up."""

    def __init__(self, folder: Path, limit: float | None):
        self.path, self.limit = folder / "cpu_seconds.txt", limit
        self.before = float(self.path.read_text()) if self.path.exists() else 0.0
        self.start = time.process_time()

    def seconds(self) -> float:
        return self.before + time.process_time() - self.start

    def on_save(self, args, state, control, **kwargs):
        self.path.write_text(f"{self.seconds():.1f}")

    def on_step_end(self, args, state, control, **kwargs):
        if self.limit is not None and self.seconds() > self.limit:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None:
            logs["cpu_seconds"] = round(self.seconds(), 1)


def build_model(arm: str, config: RxTConfig) -> RxTForCausalLM | LlamaForCausalLM:
    """The RxT, or a Llama of about as many parameters."""
    if arm == "rxt":
        return RxTForCausalLM(config)
    target = sum(p.numel() for p in RxTForCausalLM(config).parameters())
    shared = {
        name: getattr(config, name)
        for name in [
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "head_dim",
            "initializer_range",
            "rms_norm_eps",
        ]
    }
    embedding = config.vocab_size * config.hidden_size
    # as many decoder layers as fit, then the feed-forward takes the rest
    attention = 4 * config.hidden_size**2
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    layers = max(1, round((target - embedding) / layer))
    width = ((target - embedding) / layers - attention) / (3 * config.hidden_size)
    return LlamaForCausalLM(
        LlamaConfig(
            **shared,
            num_hidden_layers=layers,
            intermediate_size=round(width),
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=config.pad_token_id,
            attn_implementation=config._attn_implementation,
        )
    )


def main(argv: list[str] | None = None) -> None:
    import json

    options, args = HfArgumentParser((FactDialogueArguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = train_tokenizer(corpus_texts(20_000), vocab_size=options.vocab_size)
        tokenizer.save_pretrained(folder)
    torch.manual_seed(args.seed)
    settings = {**PRESETS[options.preset], **json.loads(options.override or "{}"), "vocab_size": len(tokenizer)}
    model = build_model(options.arm, RxTConfig(**settings, attn_implementation="eager"))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=FactDialogues(tokenizer, args.max_steps, options.turns_per_step, options.arm),
        data_collator=StepCollator(tokenizer.pad_token_id),
        callbacks=[CpuBudget(folder, options.cpu_seconds)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
