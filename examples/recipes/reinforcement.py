# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Stage 6 on the demo: memory reinforcement learning on whole dialogues, rewarded for exactly the right values.

    OMP_NUM_THREADS=1 PYTHONPATH=examples python examples/recipes/reinforcement.py --output_dir out

plays training dialogues, eight samples of each, first of 8 turns and then of 16, half of which come back to a topic
after others, and measures before and after on test dialogues (`out/result.json`): greedy, and sampled as in training,
which is what the reward is about. It resumes from the last checkpoint in `out`. Every argument of `TrainingArguments`
can be given, such as `--max_steps 20`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from demo.curriculum import FactCurriculum, fact_reward
from preference import loaded, measured, report
from transformers.trainer_utils import get_last_checkpoint

import rxt_hf
from rxt_hf.training.arguments import BudgetArguments
from rxt_hf.training.loop import CpuBudget, parse
from rxt_hf.training.reinforcement import ReinforcementArguments, ReinforcementTrainer

RECIPE = {
    "max_steps": 80,
    "per_device_train_batch_size": 8,
    "group_size": 8,
    "max_new_tokens": 24,
    "updates_per_sample": 1,
    # the wording of a right answer is chance, so it counts for little
    "bleu_weight": 0.1,
    "reference_similarity_weight": 0.05,
    "saved_similarity_weight": 0.05,
    "discount": 0.5,
    "scale_by_std": False,
    "learning_rate": 2e-4,
    "adam_beta2": 0.98,
    "warmup_steps": 5,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "sequential",
    "bf16": True,
    "use_cpu": True,
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 1,
}


@dataclass
class Recipe(BudgetArguments):
    model: str = field(default=str(rxt_hf.DEMO), metadata={"help": "the starting checkpoint"})
    test_dialogues: int = field(default=200, metadata={"help": "test dialogues of 16 turns, half as many of 32"})


def main() -> None:
    options, args = parse(Recipe, RECIPE, None, ReinforcementArguments)
    folder, start = Path(args.output_dir), time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = loaded(options.model)

    def measure() -> list[dict]:
        return [
            row
            for do_sample in (False, True)
            for row in measured(model, tokenizer, options.test_dialogues, do_sample=do_sample)
        ]

    before = measure()
    trainer = ReinforcementTrainer(
        model,
        args,
        train_dataset=FactCurriculum(args.max_steps, args.per_device_train_batch_size),
        processing_class=tokenizer,
        reward=fact_reward,
        callbacks=[CpuBudget(folder, options.cpu_seconds)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    trainer.save_model()
    report(
        folder / "result.json",
        before,
        measure(),
        cpu_seconds=round(time.process_time() - start, 1),
        log=trainer.state.log_history,
    )


if __name__ == "__main__":
    main()
