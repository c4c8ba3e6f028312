# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Stage 5 on the demo: DPO against the model's own wrong answers, and what it changes in recall, stale answers and
"You have not told me that yet.".

    OMP_NUM_THREADS=1 PYTHONPATH=examples python examples/recipes/preference.py --output_dir out

answers questions of training dialogues, keeps those that it got wrong (`out/pairs.json`), trains on them, and measures
before and after on test dialogues (`out/result.json`). It resumes from the last checkpoint in `out`. Every argument of
`TrainingArguments` can be given, such as `--max_steps 20`, or `--loss_type apo_zero`.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from demo.facts import MIX, UNKNOWN_ANSWER, generate_dialogue
from demo.recall import recall
from demo.write import wrong_answers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

import rxt_hf
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.evaluation.speed import environment
from rxt_hf.training.loop import parse
from rxt_hf.training.preference import (
    PreferenceArguments,
    PreferenceTrainer,
    encode_preferences,
)

FIRST_SEED = 200_000_000
# the loss of a pair fades where the chosen answer is some e^4 times as likely beside the rejected one as it was
RECIPE = {
    "beta": 0.5,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "adam_beta2": 0.98,
    "warmup_steps": 10,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "bf16": True,
    "use_cpu": True,
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 1,
}


@dataclass
class Recipe:
    model: str = field(default=str(rxt_hf.DEMO), metadata={"help": "the starting checkpoint"})
    rounds: int = field(default=12, metadata={"help": "batches of dialogues that mistakes are looked for in"})
    dialogues: int = field(default=128, metadata={"help": "dialogues in such a batch"})
    test_dialogues: int = field(default=200, metadata={"help": "test dialogues of 16 turns, half as many of 32"})


def with_contrast(turns: list[dict], rng: Random) -> list[dict]:
    """
    Beside its mistakes, answers that the model got right: all about changed facts, against the older value, and a
    third of the others, against "not told". Without them it would learn to abstain always.
    """
    for turn in turns:
        if turn["kind"] == "ask" and "rejected" not in turn:
            if turn["stale"]:
                turn["rejected"] = turn["answer"].replace(turn["value"], turn["stale"][-1])
            elif rng.random() < 1 / 3:
                turn["rejected"] = UNKNOWN_ANSWER
    return turns


def find_pairs(model, tokenizer, options: Recipe) -> list[list[dict]]:
    """Dialogues of 16 turns; in every third batch all values are names that no list holds."""
    pairs, rng = [], Random(0)
    for number in range(options.rounds):
        mix = MIX | ({"only_open": True, "p_open": 1.0} if number % 3 == 2 else {})
        first = FIRST_SEED + number * options.dialogues
        seeds = range(first, first + options.dialogues)
        found = wrong_answers(model, tokenizer, [generate_dialogue(seed, num_turns=16, **mix) for seed in seeds])
        pairs += [with_contrast(turns, rng) for turns in found]
    return pairs


def measured(model, tokenizer, count: int, do_sample: bool = False) -> list[dict]:
    """Closed loop, on test dialogues that no training sees; greedy, or sampled at temperature 1."""
    tests = (("seen", 16, count), ("seen", 32, count // 2), ("open", 8, count))
    return [
        recall(model, tokenizer, split=split, num_turns=turns, num_dialogues=max(1, dialogues), do_sample=do_sample)
        for split, turns, dialogues in tests
    ]


def loaded(folder: str):
    model = AutoModelForCausalLM.from_pretrained(folder)
    # at these sizes plain matrix products in bfloat16 are the fastest attention on a CPU
    model.set_attn_implementation("eager")
    return model, AutoTokenizer.from_pretrained(folder)


def report(path: Path, before: list[dict], after: list[dict], **facts) -> None:
    """Writes what was measured before and after, and prints it side by side."""
    content = {"environment": environment("cpu"), **facts, "before": before, "after": after}
    path.write_text(json.dumps(content, indent=1) + "\n")
    for old, new in zip(before, after, strict=True):
        for name in ("recall", "stale", "abstention"):
            how = "sampled" if old["do_sample"] else "greedy"
            print(f"{old['split']:5} {old['turns']:2} turns  {how:8} {name:10} {old[name]} -> {new[name]}")


def main() -> None:
    options, args = parse(Recipe, RECIPE, None, PreferenceArguments)
    folder, start = Path(args.output_dir), time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = loaded(options.model)
    if not (folder / "pairs.json").exists():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            found = find_pairs(model, tokenizer, options)
        if not found:
            raise SystemExit(
                f"{options.model} answered every question right in {options.rounds} rounds of {options.dialogues} "
                "dialogues, so that there is nothing to prefer: look in more of them, with --rounds or --dialogues."
            )
        (folder / "pairs.json").write_text(json.dumps(found))
    pairs = json.loads((folder / "pairs.json").read_text())
    before = measured(model, tokenizer, options.test_dialogues)
    trainer = PreferenceTrainer(
        model,
        args,
        train_dataset=[encode_preferences(tokenizer, turns) for turns in pairs],
        data_collator=RxTEpisodeCollator(tokenizer),
        processing_class=tokenizer,
        reference_model=copy.deepcopy(model),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    trainer.save_model()
    report(
        folder / "result.json",
        before,
        measured(model, tokenizer, options.test_dialogues),
        pairs=sum("rejected" in turn for turns in pairs for turn in turns),
        cpu_seconds=round(time.process_time() - start, 1),
        log=trainer.state.log_history,
    )


if __name__ == "__main__":
    main()
