# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Reactive Transformer for Hugging Face Transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_rxt import StateError, STMCache
from .configuration_rxt import RxTConfig
from .modeling_rxt import RxTForCausalLM, RxTModel, RxTPreTrainedModel

__version__ = "0.1.0"

AutoConfig.register("rxt", RxTConfig, exist_ok=True)
AutoModel.register(RxTConfig, RxTForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(RxTConfig, RxTForCausalLM, exist_ok=True)

__all__ = ["RxTConfig", "RxTForCausalLM", "RxTModel", "RxTPreTrainedModel", "STMCache", "StateError", "__version__"]
