# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The same for what `from_llm` makes of a language model by default: joint reading, and writing by selection."""

from dataclasses import replace

from conformance_adapter import adapter as plain
from transformers import LlamaConfig, LlamaForCausalLM

from rxt_hf.convert import from_llm


def converted_config(sizes):
    others = ("batch_size", "seq_length")
    fields = {name: size for name, size in sizes.items() if name not in others}
    source = LlamaForCausalLM(LlamaConfig(**fields, tie_word_embeddings=True))
    return from_llm(source, num_memory_slots=5).config


adapter = replace(plain, name="rxt_converted", config=converted_config)
