# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What the recipes that train small models have in common: `train`, and the parts of it."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .arguments import RxTTrainingArguments

# the learning rate falls twice: from its peak to 5 %, and in the last fifth of the run from 30 % to 2 % of the peak
SECOND_FALL_FROM = 0.8
Options = TypeVar("Options")


def parse(
    options_class: type[Options],
    defaults: dict[str, Any],
    argv: list[str] | None,
    training_class: type[TrainingArguments] = RxTTrainingArguments,
) -> tuple[Options, TrainingArguments]:
    """Parses recipe options and those of training; `defaults` replaces defaults of both."""
    parser: Any = HfArgumentParser(cast("Any", (options_class, training_class)))
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)


class CountingTrainer(Trainer):
    """`Trainer` with a loss of its own: a sum, divided by what [`count`] finds in all batches of an optimizer step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True

    def count(self, inputs: Any) -> torch.Tensor:
        """What the loss of a batch is a mean over."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.stack([self.count(batch) for batch in samples]).sum() if samples else torch.zeros(())
        # processes average their gradients
        total = self.accelerator.gather(total.to(device)).sum() / self.accelerator.num_processes
        return samples, total.clamp(min=1e-9)


class MuonAdamW(torch.optim.Optimizer):
    """
    `torch.optim.Muon` for the weight matrices inside the layers, `torch.optim.AdamW` for everything else, as one
    optimizer with one learning rate (Muon's updates are scaled to the size of AdamW's).
    """

    def __init__(self, model: torch.nn.Module, args: TrainingArguments):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() == 2 and "layers." in name and name.endswith("weight")
            (matrices if is_matrix else others).append(parameter)
        self.inner = [
            torch.optim.Muon(
                matrices, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                others, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=0.0, fused=True
            ),
        ]
        super().__init__(matrices + others, {})
        self.param_groups = [group for inner in self.inner for group in inner.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for inner in self.inner:
            inner.step()

    def state_dict(self) -> dict:
        return {"inner": [inner.state_dict() for inner in self.inner]}

    def load_state_dict(self, state_dict: dict) -> None:
        for inner, state in zip(self.inner, state_dict["inner"], strict=True):
            inner.load_state_dict(state)
        self.param_groups = [group for inner in self.inner for group in inner.param_groups]


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the top learning rate at a step: a warm-up and two half cosines, see `SECOND_FALL_FROM`."""
    turn = SECOND_FALL_FROM * steps
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if step < turn:
        start, end, progress = 1.0, 0.05, (step - warmup_steps) / max(1, turn - warmup_steps)
    else:
        start, end, progress = 0.3, 0.02, (step - turn) / max(1, steps - turn)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


class CpuBudget(TrainerCallback):
    """Counts the CPU seconds of the first process over all resumed runs, and stops a run that has used them up."""

    def __init__(self, folder: Path, limit: float | None):
        self.path, self.limit = folder / "cpu_seconds.txt", limit
        self.before = float(self.path.read_text()) if self.path.exists() else 0.0
        self.start = time.process_time()

    def seconds(self) -> float:
        return self.before + time.process_time() - self.start

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.write_text(f"{self.seconds():.1f}")

    def on_step_end(self, args, state, control, **kwargs):
        if self.limit is not None and self.seconds() > self.limit:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None:
            logs["cpu_seconds"] = round(self.seconds(), 1)


def train(
    model: Any,
    args: TrainingArguments,
    data: Dataset,
    collator: Callable,
    budget: CpuBudget,
    *,
    factor: Callable[..., float] = learning_rate_factor,
    trainer_class: type[Trainer] = Trainer,
) -> Trainer:
    """Trains to the end with [`MuonAdamW`], or on from the last checkpoint in `args.output_dir`, and saves there."""
    if args.use_cpu:
        # at these sizes plain matrix products in bfloat16 are the fastest attention there
        model.set_attn_implementation("eager")
    optimizer = MuonAdamW(model, args)
    rate = partial(factor, steps=args.max_steps, warmup_steps=int(args.warmup_steps))
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=collator,
        callbacks=[budget],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.output_dir)))
    trainer.save_model()
    trainer.save_state()
    return trainer
