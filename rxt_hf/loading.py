# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Models whose files hold every tensor, no other ones, and finite numbers."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import find_adapter_config_file


def load_whole(model_class: Any, source: str | os.PathLike, *, may_drop: bool = False, **kwargs: Any) -> Any:
    """
    Loads the model of a name or folder by `from_pretrained` of a class; `kwargs` go there.

    Args:
        may_drop (`bool`): whether the files may hold tensors that the configuration has no place for.

    Raises: `ValueError`, by name, for tensors that the files lack, that the configuration has no place for, of other
    shapes, or that hold NaN or infinity; and for a folder that PEFT saved.
    """
    refuse_adapter(source)
    model, info = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    problems = {
        "lacks": sorted(info["missing_keys"]),
        "has no place in its configuration for": [] if may_drop else sorted(info["unexpected_keys"]),
        "has another shape than its configuration says for": [
            f"{name} {list(found)} in place of {list(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ],
        "failed to load:": info["error_msgs"],
    }
    if found := [f"{problem} {some(names)}" for problem, names in problems.items() if names]:
        raise ValueError(f"The checkpoint {source} {' and '.join(found)}.")
    refuse_broken(model, f"The checkpoint {source}")
    return model


def refuse_broken(model: torch.nn.Module, name: str) -> None:
    """Raises `ValueError` that begins with `name` for a model with tensors that hold NaN or infinity."""
    if broken := [key for key, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{name} holds NaN or infinity in {some(broken)}.")


def refuse_adapter(source: str | os.PathLike) -> None:
    """Raises `ValueError` for a folder that PEFT saved, which holds a change of weights and no model."""
    file = find_adapter_config_file(str(source))
    if file is not None:
        base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(
            f"{source} is a PEFT adapter, not a model: merge it into its base with merge_and_unload() and give the "
            f"result, or give its base{f' {base}' if base else ''}."
        )


def some(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
