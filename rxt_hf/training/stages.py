# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
The stages of the supervised curriculum (arXiv 2510.03561), each a model, a collator and plain `transformers.Trainer`:

    pretraining       RxTForPreTraining, rows of text with RxTPreTrainingCollator: decoder, and encoder on masked text
    finetuning        RxTForPreTraining, interactions with RxTPreTrainingCollator: the same, answers only
    memory_attention  RxTForPreTraining, episodes with RxTEpisodeCollator: the write, self-supervised
    memory_aware      RxTForCausalLM, episodes with RxTEpisodeCollator: everything, through the memory
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..modeling_rxt import RxTForCausalLM
from .pretraining import RxTForPreTraining

# what a stage trains, by the start of the parameter's name; a name that does not start so gets no gradient in it
WRITE = ("model.memory_attention.", "model.initial_memory")
READ = ("model.embed_tokens.", "model.layers.", "model.norm.", "model.memory_encoder.", "lm_head.")
STAGES: dict[str, tuple[type[RxTForCausalLM], tuple[str, ...]]] = {
    "pretraining": (RxTForPreTraining, READ),
    "finetuning": (RxTForPreTraining, READ),
    "memory_attention": (RxTForPreTraining, WRITE),
    "memory_aware": (RxTForCausalLM, READ + WRITE),
}


def set_training_stage(model: RxTForCausalLM, stage: str) -> RxTForCausalLM:
    """
    Leaves exactly those parameters trainable that get a gradient in the stage, as DDP and FSDP2 want it, and returns
    the model. A single turn writes nothing that is read: episodes of `"memory_aware"` need two turns or more.

    Raises: `ValueError` for an unknown stage, and for a model whose class does not have the stage's loss.
    """
    if stage not in STAGES:
        raise ValueError(f"There is no training stage {stage!r}; the stages are {list(STAGES)}.")
    model_class, trained = STAGES[stage]
    is_pretraining = isinstance(model, RxTForPreTraining)
    if is_pretraining != (model_class is RxTForPreTraining):
        raise ValueError(
            f"The stage {stage!r} trains a {model_class.__name__}, got a {type(model).__name__}: load it by "
            f"{model_class.__name__}.from_pretrained, the weights are the same."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model


def unfreezing_optimizer(
    model: torch.nn.Module,
    schedule: Mapping[str, int],
    factor: Callable[[int], float],
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **optimizer_kwargs: Any,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    r"""
    Optimizer and scheduler for `Trainer(optimizers=...)` that keep parts of the model still until a given step. Their
    learning rate is 0 until then, and their gradient is computed all the same, so that DDP and FSDP2 see one graph
    from the first step to the last.

    Args:
        schedule (`Mapping[str, int]`): start of a parameter's name, such as `"model.layers."`, to the optimizer step
            that it moves from; the longest start that fits counts, and what no start fits moves from step 0.
        factor (`Callable`): share of the learning rate at a step.
        optimizer_kwargs (*optional*): of `optimizer_class`, such as `lr`.

    Raises: `ValueError` for a start that no trainable parameter has.
    """
    groups: dict[int, list[torch.nn.Parameter]] = {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for start in schedule:
        if not any(name.startswith(start) for name in names):
            raise ValueError(f"No trainable parameter starts with {start!r}; they start with {_starts(names)}.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fits = [start for start in schedule if name.startswith(start)]
            groups.setdefault(schedule[max(fits, key=len)] if fits else 0, []).append(parameter)
    optimizer = optimizer_class([{"params": parameters} for parameters in groups.values()], **optimizer_kwargs)
    return optimizer, LambdaLR(optimizer, [partial(_from_step, factor, first) for first in groups])


def _from_step(factor: Callable[[int], float], first_step: int, step: int) -> float:
    return factor(step) if step >= first_step else 0.0


def _starts(names: Sequence[str]) -> list[str]:
    return sorted({".".join(name.split(".")[:2]) for name in names})
