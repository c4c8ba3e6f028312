# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Trains a tiny model in every stage, for test_distributed.py: in one process by `main`, in two by

    torchrun --standalone --nproc_per_node 2 -m tests.distributed_run ddp False start out

where the first argument is a key of `WRAPPERS`, the second says whether activations are recomputed, and `start` holds
the model to start from. Each stage, and a resumed run, leave a folder in `out` with the model as the Trainer saves it
and `run.json`.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rxt_hf import RxTForCausalLM
from rxt_hf.data.collator import RxTEpisodeCollator, RxTPreTrainingCollator
from rxt_hf.training.preference import PreferenceArguments, PreferenceTrainer, encode_preferences
from rxt_hf.training.stages import STAGES, set_training_stage

from .models import random_ids

ALL = [*STAGES, "preference"]
STEPS, BATCH_SIZE, MASK_TOKEN = 5, 4, 3
# what wraps the model: arguments of the Trainer and of from_pretrained
ZERO = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_clipping": "auto"}
ZERO |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
WRAPPERS = {
    "none": ({}, {}),
    "ddp": ({"ddp_find_unused_parameters": False}, {}),
    "fsdp2": ({}, {"distributed_config": DistributedConfig(fsdp_size=2)}),
    "zero2": ({"deepspeed": ZERO | {"zero_optimization": {"stage": 2}}}, {}),
    "zero3": (
        {"deepspeed": ZERO | {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}},
        {},
    ),
}


class MaskingByRow(RxTPreTrainingCollator):
    """Masks one to four tokens of a row, how many and which ones being a function of the row: no chance."""

    def __call__(self, features):
        batch = RxTEpisodeCollator.__call__(self, features)
        is_masked = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, feature in enumerate(features):
            ids = feature["input_ids"]
            count = 1 + ids[1] % 4
            is_masked[row, [(ids[0] + 2 * place) % len(ids) for place in range(count)]] = True
        masked = {"masked_input_ids": batch["input_ids"].masked_fill(is_masked, MASK_TOKEN)}
        return batch | masked | {"mlm_targets": batch["input_ids"].masked_fill(~is_masked, -100)}


def labelled(ids, count):
    """Tokens whose last `count` ones are learned."""
    return {"input_ids": ids, "labels": [-100] * (len(ids) - count) + ids[-count:]}


def rows_of(stage):
    """Ragged data: rows differ in tokens, turns, labels and masked tokens."""
    ids = random_ids(32, 4, 16, seed=2).tolist()
    if stage == "pretraining":
        return [labelled(row[0][: 9 + index % 8], 9 + index % 8) for index, row in enumerate(ids)]
    if stage == "finetuning":
        return [labelled(row[0][: 9 + index % 5], 4 + 2 * (index % 3)) for index, row in enumerate(ids)]
    if stage == "preference":
        return [encode_preferences(None, preferences(row, index)) for index, row in enumerate(ids)]
    rows = []
    for index, row in enumerate(ids):
        turns = [turn[: 7 + (index + place) % 5] for place, turn in enumerate(row[: 2 + index % 3])]
        counts = [2 + (index + place) % 4 for place in range(len(turns))]
        pairs = [labelled(turn, count) for turn, count in zip(turns, counts, strict=True)]
        rows.append({name: [pair[name] for pair in pairs] for name in pairs[0]})
    return rows


def preferences(turns, index):
    """Two or three turns, of which the last has a rejected answer: one pair in each dialogue."""
    turns = [{"query": turn[:3], "answer": turn[3 : 6 + index % 3]} for turn in turns[: 2 + index % 2]]
    turns[-1]["rejected"] = list(reversed(turns[-1]["answer"]))[: 2 + index % 2]
    return turns


def collator_for(stage):
    classes = {"pretraining": MaskingByRow, "finetuning": MaskingByRow}
    return classes[stage](0, mask_token_id=MASK_TOKEN) if stage in classes else RxTEpisodeCollator(0)


def trainer_for(stage, start, folder, wrapper="none", **arguments):
    of_trainer, of_model = WRAPPERS[wrapper]
    settings = {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.1, "optim": "sgd"}
    settings |= {"max_grad_norm": 0.5, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": BATCH_SIZE if wrapper == "none" else BATCH_SIZE // 2}
    settings |= of_trainer | arguments
    # one accelerator for each trainer: DeepSpeed's settings would be those of the first
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    if stage == "preference":
        # before the arguments, which under ZeRO-3 make every model that is loaded a sharded one
        reference = RxTForCausalLM.from_pretrained(start)
        args = PreferenceArguments(str(folder), **settings)
        model = RxTForCausalLM.from_pretrained(start, **of_model)
        options = {"data_collator": collator_for(stage), "reference_model": reference}
        return PreferenceTrainer(model, args, train_dataset=rows_of(stage), **options)
    args = TrainingArguments(str(folder), **settings)
    model = set_training_stage(STAGES[stage][0].from_pretrained(start, **of_model), stage)
    # which is another in each process
    model.memory_noise_std = 0.0
    return Trainer(model, args, train_dataset=rows_of(stage), data_collator=collator_for(stage))


def train(stage, start, folder, wrapper="none", resume=None, **arguments):
    """Trains, saves the model, and writes the losses of the steps and the class that wrapped the model."""
    trainer = trainer_for(stage, start, folder, wrapper, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        found = {"losses": losses, "wrapped": type(trainer.model_wrapped).__name__}
        Path(folder, "run.json").write_text(json.dumps(found))


def main(wrapper: str, checkpointing: str, start: str, out: str) -> None:
    if wrapper == "zero3":
        # on CPUs accelerate does not, and a model is sharded as it is loaded
        import_module("deepspeed").init_distributed("gloo")
    options = {"activation_checkpointing": checkpointing == "True"}
    for stage in ALL:
        train(stage, start, Path(out, stage), wrapper, **options)
    # Adam's state has to come back too
    options |= {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    if wrapper == "fsdp2":
        # transformers does not resume what it sharded as it was loaded
        return
    train("memory_aware", start, Path(out, "whole"), wrapper, **options)
    if wrapper != "none":
        train("memory_aware", start, Path(out, "resumed"), wrapper, resume=f"{out}/whole/checkpoint-2", **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
    # as in rxt_hf.training.run
    PartialState().destroy_process_group()
