# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What trainings can be told beside transformers' `TrainingArguments`: one name for each idea, whatever trains."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..presets import PRESETS


@dataclass
class RxTTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] of data sets whose items are episodes or dialogues."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the items of the data are no columns."}
    )


@dataclass
class ModelArguments:
    """The model that a training starts from, and how gradients flow in it."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the model to start from (default: a new model)."}
    )
    preset: str = field(default="tiny", metadata={"help": f"Size of a new model: {', '.join(PRESETS)}."})
    override: dict | str | None = field(
        default=None, metadata={"help": "JSON object of configuration fields of the model."}
    )
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary size of a new tokenizer."})
    bptt_turns: int | None = field(
        default=None, metadata={"help": "Writes that gradients flow back through (default: all; 0: none)."}
    )

    @property
    def config_fields(self) -> dict[str, Any]:
        return json_object("override", self.override)

    def __post_init__(self) -> None:
        self.override = self.config_fields
        check_lowest(self, 0, "bptt_turns")


@dataclass
class DataArguments:
    """The dialogues that a training reads, and how many of them are one step."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Training data: JSONL files, folders, or data sets of the Hub (owner/name)."},
    )
    dialogues: int | None = field(default=None, metadata={"help": "Dialogues sampled per source (default: all)."})
    tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest text row or interaction in tokens; longer ones are cut off (default: the model's limit)."
        },
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows that cannot be read, and report how many and why."}
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most padded tokens of a batch of dialogues of similar length; replaces per_device_*_batch_size."
        },
    )

    def __post_init__(self) -> None:
        self.data = as_list(self.data)
        check_lowest(self, 1, "dialogues", "tokens", "max_batch_tokens")

    def check_data(self) -> None:
        """Raises `ValueError` without data."""
        if not self.data:
            raise ValueError("data is missing: name files, folders or data sets of the Hub.")


@dataclass
class BudgetArguments:
    """How long a training may take."""

    cpu_seconds: float | None = field(
        default=None, metadata={"help": "Budget of the run in CPU seconds, over all its parts (default: none)."}
    )


def as_list(value: Any) -> list[str]:
    """Returns one source, as a YAML file may name it, as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def json_object(name: str, value: dict | str | None) -> dict[str, Any]:
    """Returns the object that an argument is, or is the JSON of; raises `ValueError` for anything else."""
    try:
        found = json.loads(value) if isinstance(value, str) and value else value or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be an object, got {value!r}.")
    return found


def check_lowest(arguments: Any, lowest: float, *names: str) -> None:
    """Raises `ValueError` for a named argument that is given and smaller."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}.")
