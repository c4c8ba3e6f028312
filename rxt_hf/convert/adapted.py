# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What a converted language model learned, as a small folder beside the language model."""

import copy
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..modeling_rxt import RxTForCausalLM
from .llm import convert_tokenizer, from_llm

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER, REPORT = "adapter_model.safetensors", "run.json"


def save_adapted(adapted: "PeftModel", folder: str | os.PathLike, report: Mapping[str, Any]) -> None:
    r"""
    Writes a folder that `PeftModel.from_pretrained` and [`load_adapted`] read.

    Args:
        adapted (`PeftModel`): a converted model with the adapter of [`adapter_config`], and the salience among its
            `modules_to_save`. LoRA is stored in bfloat16, the salience as it is: a choice must not hang on rounding.
        folder (`str` or `os.PathLike`): where `adapter_config.json`, `adapter_model.safetensors` and `run.json` go.
        report (`Mapping`): how it came to be. `"conversion"` holds the arguments of [`from_llm`], and `"base_model"`
            the name of the language model.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = adapted.peft_config["default"]
    saved = copy.copy(config)
    saved.inference_mode, saved.base_model_name_or_path = True, report.get("base_model")
    saved.save_pretrained(str(folder))
    tensors = {
        name: (tensor.to(torch.bfloat16) if "lora_" in name else tensor).detach().contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(adapted).items()
    }
    save_file(tensors, folder / ADAPTER)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def load_adapted(
    source: PreTrainedModel,
    source_tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike,
    **config_overrides: Any,
) -> tuple[RxTForCausalLM, PreTrainedTokenizerFast]:
    r"""
    Converts a language model, and merges what [`save_adapted`] wrote into its weights.

    Args:
        source (`PreTrainedModel`): the language model that was adapted.
        source_tokenizer (`PreTrainedTokenizerFast`): its tokenizer.
        folder (`str` or `os.PathLike`): what [`save_adapted`] wrote.
        config_overrides: arguments of [`from_llm`] in place of those that the adapter was trained with.

    Returns: the model, in evaluation mode, and its tokenizer.

    Raises: `FileNotFoundError` for a folder without the files.
    """
    from peft import PeftModel

    folder = Path(folder)
    if missing := [name for name in (ADAPTER, REPORT) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: a training that ended leaves it there.")
    conversion = json.loads((folder / REPORT).read_text(encoding="utf-8"))["conversion"]
    limit = min(source_tokenizer.model_max_length, source.config.max_position_embeddings)
    tokenizer = convert_tokenizer(source_tokenizer, max_length=limit)
    model = from_llm(source, tokenizer=tokenizer, **conversion | config_overrides)
    with warnings.catch_warnings():
        # peft asks transformers by a former name
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        merged: Any = PeftModel.from_pretrained(model, str(folder))
    return merged.merge_and_unload().eval(), tokenizer


__all__ = ["load_adapted", "save_adapted"]
