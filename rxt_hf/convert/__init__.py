# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Other models' weights as a Reactive Transformer."""

from .adapted import load_adapted, save_adapted
from .llm import adapter_config, convert_tokenizer, freeze_base, from_llm
from .rxlm import from_rxlm
from .salience import fit_salience

__all__ = [
    "adapter_config",
    "convert_tokenizer",
    "fit_salience",
    "freeze_base",
    "from_llm",
    "from_rxlm",
    "load_adapted",
    "save_adapted",
]
