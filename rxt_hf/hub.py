# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A model folder that loads with `trust_remote_code=True` where this package is not installed."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .modeling_rxt import RxTForCausalLM

AUTO_MAP = {
    "AutoConfig": "configuration_rxt.RxTConfig",
    "AutoModel": "modeling_rxt.RxTForCausalLM",
    "AutoModelForCausalLM": "modeling_rxt.RxTForCausalLM",
}
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors")
CARD_NAME = "README.md"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- rxt
---

# {name}

A Reactive Transformer of {millions:.1f} million parameters. It reads one interaction at a time: what earlier turns
left behind is in a memory of {layers} layers of {slots} vectors of {width}, whose size never grows.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")

memory = model.init_stm(batch_size=1)
for text in ["My dog is called Rex.", "What is my dog called?"]:
    inputs = tokenizer.apply_chat_template(
        [{{"role": "user", "content": text}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, stm_cache=memory, max_new_tokens=32)
    memory = out.stm_cache  # what the next turn reads
    print(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The Reactive Transformer architecture is the subject of a pending patent application (P.453260, Reactive AI). The code
in this folder is an independent implementation from the papers arXiv:2510.03561 and arXiv:2510.01817; its licence
grants nothing in respect of third parties' patents.
"""


def export(
    model: RxTForCausalLM,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    card: str | None = None,
    push_to_hub: str | None = None,
    **save_kwargs: Any,
) -> Path:
    r"""
    Writes weights, configuration, tokenizer, model card and the model's code into a folder that `AutoConfig`,
    `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` load with `trust_remote_code=True`, without this package.

    Everything is written beside `folder` first: an error leaves a former export as it was. Then files of the same name
    are replaced, weights of a former export are removed, and other files stay.

    Args:
        model ([`RxTForCausalLM`]): nothing is registered on it or its class; ordinary saves stay ordinary.
        tokenizer (*optional*): saved with its chat template.
        card (`str`, *optional*): text of `README.md`. By default one that is there is kept, else a short one written.
        push_to_hub (`str`, *optional*): the Hub repository, `"owner/name"`, that the files are uploaded to. It is
            created if it does not exist.
        save_kwargs: go to [`~PreTrainedModel.save_pretrained`], for example `max_shard_size` or `token`.

    Returns: the folder.

    Raises: `TypeError` if `model` is of another class, `ValueError` if it still has adapters, `NotADirectoryError` if
    `folder` is a file.
    """
    if type(model).__name__ != RxTForCausalLM.__name__:
        raise TypeError(
            f"export needs an RxTForCausalLM, got {type(model).__name__}; unwrap the model first "
            "(adapters: merge_and_unload())."
        )
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("The model has adapters, which an export cannot hold: merge them first (merge_and_unload()).")
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder or nothing.")
    if card is None and not (folder / CARD_NAME).exists():
        card = default_card(model, push_to_hub or folder.name)

    # One fixed name per target: what a killed export left is overwritten by the next one.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(model, partial, tokenizer, card, save_kwargs)
        names = sorted(path.name for path in partial.iterdir())
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if push_to_hub is not None:
        _upload(folder, push_to_hub, names, save_kwargs.get("token"))
    return folder


def default_card(model: RxTForCausalLM, name: str) -> str:
    """A short model card; `name` is the repository or folder that its example loads."""
    config = model.config
    return CARD.format(
        name=name,
        millions=model.num_parameters() / 1e6,
        layers=config.num_memory_layers,
        slots=config.num_memory_slots,
        width=config.hidden_size,
    )


def code_files(model: RxTForCausalLM) -> list[Path]:
    """The file that defines the model's class, and all that it imports relatively."""
    modeling = sys.modules[type(model).__module__].__file__
    if modeling is None:
        raise ValueError(f"{type(model)} comes from no file, so its code cannot be exported.")
    return sorted({Path(modeling), *map(Path, get_relative_import_files(modeling))})


def _write(
    model: RxTForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerBase | None, card: str | None, save_kwargs: dict
) -> None:
    model.save_pretrained(folder, **save_kwargs)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    # In the file, not on the model: a later save_pretrained brings no code, and must not promise any.
    config["auto_map"] = AUTO_MAP
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in code_files(model):
        shutil.copyfile(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _move(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(partial, folder)
        return
    # `model.safetensors` of a former export would be loaded in place of new shards
    for path in {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}:
        path.unlink()
    for path in partial.iterdir():
        os.replace(path, folder / path.name)


def _upload(folder: Path, repo_id: str, names: list[str], token: str | bool | None) -> None:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Export of an RxT model",
        allow_patterns=names,
        delete_patterns=list(WEIGHT_FILES),
    )


__all__ = ["export"]
