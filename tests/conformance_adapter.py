# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What transformers' own test mixins must know of this model; `.ci/run` shows how they are run."""

from adapters.base import Adapter, random_ids

from rxt_hf import RxTConfig, RxTForCausalLM, RxTModel


def tiny_config(sizes):
    others = ("batch_size", "seq_length")
    fields = {name: size for name, size in sizes.items() if name not in others}
    # a dense layer, a layer of experts, and output gates: every module that a plan or a switch may name
    experts = {"num_experts": 4, "moe_layers": [1], "moe_intermediate_size": 16, "num_shared_experts": 1}
    return RxTConfig(num_memory_slots=5, use_gated_attention=True, **experts, **fields)


def inputs(config, tester):
    ids = random_ids((tester.batch_size, tester.seq_length), tester.vocab_size)
    return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape).tril()}


adapter = Adapter(
    name="rxt",
    config_class=RxTConfig,
    base_model_class=RxTModel,
    causal_lm_class=RxTForCausalLM,
    # AutoModel loads the complete model, so that AutoModel and generate() go together
    auto_model_class=RxTForCausalLM,
    config=tiny_config,
    inputs=inputs,
    # one turn only reads the memory: the modules that write it have a gradient in episodes alone
    mixin_attributes={"test_all_params_have_gradient": False},
    expected={
        "test_past_key_values_format": "past_key_values is an EncoderDecoderCache: its self part is the usual "
        "DynamicCache, its cross part holds the keys and values of the memory",
        "test_fsdp2_plan_vs_ddp*": "it resumes an optimizer that has a state for every parameter, and one turn gives "
        "the modules that write the memory no gradient; the episodes that do are in test_training.py",
    },
)
