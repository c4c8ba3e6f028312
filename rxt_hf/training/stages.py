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

# prefixes of the parameters trained in each stage; all others are frozen
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
    Freezes all parameters that get no gradient in the stage, as DDP and FSDP2 require, and returns the model. Episodes
    of `"memory_aware"` need two turns or more: a single turn reads nothing that was written.

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
    Returns an optimizer and a scheduler for `Trainer(optimizers=...)` that freeze parts of the model until a given
    step. The learning rate of these parts is 0 until then. Their gradients are still computed, so DDP and FSDP2 see
    one graph throughout.

    Args:
        schedule (`Mapping[str, int]`): prefixes of parameter names, such as `"model.layers."`, and the optimizer step
            from which they are trained. The longest matching prefix counts; without one it is step 0.
        factor (`Callable`): share of the learning rate at a step.
        optimizer_kwargs (*optional*): of `optimizer_class`, such as `lr`.

    Raises: `ValueError` for a prefix that matches no trainable parameter.
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
