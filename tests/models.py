# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny models with every parameter random, their inputs, and a counter of calls."""

from contextlib import contextmanager

import torch

from rxt_hf import RxTConfig, STMCache

from .reference_rxt import random_model

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_memory_slots": 5,
    "max_position_embeddings": 64,
}
# the forms of a converted language model
JOINT = {
    "memory_reading": "joint",
    "memory_positions": "rank",
    "memory_encoding": "decoder",
    "memory_writing": "selection",
}
IN_PASSING = JOINT | {"memory_encoding": "decoder_in_passing"}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "output_router_logits": True, "router_aux_loss_coef": 0.5}


def tiny_config(**options):
    return RxTConfig(**(SIZES | options))


def tiny_model(seed=0, **options):
    return random_model(tiny_config(**options), seed)


def random_ids(*shape, seed=0):
    """Token ids without padding, beginning or end of sequence."""
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def random_memory(model, batch_size=2):
    config = model.config
    shape = (batch_size, config.num_memory_layers, config.num_memory_slots, config.hidden_size)
    # another seed than the models', whose first parameter is the initial memory
    return STMCache(torch.randn(shape, generator=torch.Generator().manual_seed(99)), turns=3)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@contextmanager
def counted_calls(*modules):
    """A list with the number of calls of each module so far."""
    counts = [0] * len(modules)

    def count(index):
        def hook(module, arguments):
            counts[index] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(index)) for index, module in enumerate(modules)]
    yield counts
    for handle in handles:
        handle.remove()
