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
    "PreferenceArguments": "training.preference",
    "PreferenceTrainer": "training.preference",
    "ReinforcementArguments": "training.reinforcement",
    "ReinforcementTrainer": "training.reinforcement",
    "RxTEpisodeCollator": "data.collator",
    "RxTPreTrainingCollator": "data.collator",
    "RxTSession": "session",
    "SMOLLM2_DEMO": "convert.smollm2",
    "add_control_tokens": "chat_template",
    "convert_tokenizer": "convert",
    "encode_interactions": "chat_template",
    "export": "hub",
    "from_llm": "convert",
    "from_rxlm": "convert",
    "read_episodes": "data.readers",
    "send_batch": "session",
    "set_training_stage": "training.stages",
    "train_tokenizer": "chat_template",
}
__all__ = [
    "DEMO",
    "SMOLLM2_DEMO",
    "Episodes",
    "PreferenceArguments",
    "PreferenceTrainer",
    "ReinforcementArguments",
    "ReinforcementTrainer",
    "RxTConfig",
    "RxTEpisodeCollator",
    "RxTForCausalLM",
    "RxTForPreTraining",
    "RxTModel",
    "RxTPreTrainedModel",
    "RxTPreTrainingCollator",
    "RxTSession",
    "STMCache",
    "StateError",
    "__version__",
    "add_control_tokens",
    "convert_tokenizer",
    "encode_interactions",
    "export",
    "from_llm",
    "from_rxlm",
    "read_episodes",
    "send_batch",
    "set_training_stage",
    "train_tokenizer",
]


def __getattr__(name: str):
    if name in PLACES:
        return getattr(import_module(f".{PLACES[name]}", __name__), name)
    if name in ("chat_template", "convert", "graphs", "hub", "presets", "session"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
