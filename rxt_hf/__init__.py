# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Reactive Transformer for Hugging Face Transformers."""

from importlib import import_module
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForPreTraining

from .cache_rxt import StateError, STMCache
from .configuration_rxt import RxTConfig
from .modeling_rxt import RxTForCausalLM, RxTModel, RxTPreTrainedModel
from .training.pretraining import RxTForPreTraining

__version__ = "0.1.0"
# folder of the shipped demo model; loads like any other
DEMO = Path(__file__).parent / "demo"

AutoConfig.register("rxt", RxTConfig, exist_ok=True)
AutoModel.register(RxTConfig, RxTForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(RxTConfig, RxTForCausalLM, exist_ok=True)
AutoModelForPreTraining.register(RxTConfig, RxTForPreTraining, exist_ok=True)

# applications, conversion and the like are imported at their first use; who only loads a model does not pay
PLACES = {
    "Episodes": "data.readers",
    "RxTEpisodeCollator": "data.collator",
    "RxTSession": "session",
    "read_episodes": "data.readers",
    "send_batch": "session",
}
__all__ = [
    "DEMO",
    "Episodes",
    "RxTConfig",
    "RxTEpisodeCollator",
    "RxTForCausalLM",
    "RxTForPreTraining",
    "RxTModel",
    "RxTPreTrainedModel",
    "RxTSession",
    "STMCache",
    "StateError",
    "__version__",
    "read_episodes",
    "send_batch",
]


def __getattr__(name: str):
    if name in PLACES:
        return getattr(import_module(f".{PLACES[name]}", __name__), name)
    if name in ("chat_template", "convert", "graphs", "hub", "presets", "session"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
