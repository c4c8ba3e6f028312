# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of episodes and of single interactions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class RxTEpisodeCollator:
    r"""
    Pads a list of episodes to tensors of shape `(batch_size, turns, tokens)`, on the right in both directions.

    A feature is `{"input_ids": ..., "labels": ...}`, both a list of turns (an episode) or both one list of tokens (a
    single interaction; the tensors are then `(batch_size, tokens)`). Nothing is dropped but turns after `max_turns`.

    Args:
        pad_token_id (`int`): fills `input_ids`; `labels` are filled with -100.
        max_turns (`int`, *optional*): longer episodes are cut to their first `max_turns` turns.
        pad_to_multiple_of (`int`, *optional*): rounds the number of tokens up.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` (0 on padding, so all 0 in a padded turn), `labels`.

    Raises:
        `ValueError` for an empty batch, episode or turn, for `input_ids` and `labels` of different shapes, for a batch
        that mixes episodes with single interactions, and for features with other keys.
    """

    pad_token_id: int
    max_turns: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        for name in ("max_turns", "pad_to_multiple_of"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None.")

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not features:
            raise ValueError("The batch is empty: got 0 features, expected at least 1.")
        is_episode = [_check_feature(index, feature) for index, feature in enumerate(features)]
        if any(is_episode) and not all(is_episode):
            raise ValueError(
                f"A batch holds episodes or single interactions, not both: got {sum(is_episode)} episodes and "
                f"{len(is_episode) - sum(is_episode)} single interactions."
            )
        batch = {name: [self._turns(feature[name]) for feature in features] for name in ("input_ids", "labels")}
        batch["attention_mask"] = [[[1] * len(turn) for turn in turns] for turns in batch["input_ids"]]
        shape = self._padded_shape(batch["input_ids"])
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": -100}
        tensors = {name: _pad(batch[name], shape, value) for name, value in fill.items()}
        return tensors if is_episode[0] else {name: tensor.squeeze(1) for name, tensor in tensors.items()}

    def _turns(self, values: Sequence) -> Sequence:
        return values[: self.max_turns] if _is_nested(values) else [values]

    def _padded_shape(self, episodes: Sequence[Sequence]) -> tuple[int, int, int]:
        num_tokens = max(len(turn) for turns in episodes for turn in turns)
        multiple = self.pad_to_multiple_of or 1
        return len(episodes), max(map(len, episodes)), -(-num_tokens // multiple) * multiple


@dataclass
class RxTPreTrainingCollator(RxTEpisodeCollator):
    r"""
    Batches for [`RxTForPreTraining`]: what [`RxTEpisodeCollator`] gives, and for single interactions or rows of text
    also `masked_input_ids`, where a share of the tokens is replaced, and `mlm_targets`, those tokens (-100 elsewhere).

    Args:
        mask_token_id (`int`): takes the place of the masked tokens.
        mlm_probability (`float`): share of the tokens that are masked.
        special_token_ids (`Sequence[int]`): tokens that are never masked.
    """

    mask_token_id: int = 3
    mlm_probability: float = 0.3
    special_token_ids: Sequence[int] = ()

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must lie between 0 and 1, got {self.mlm_probability}.")

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        ids = batch["input_ids"]
        if ids.dim() == 3:
            return batch
        special = torch.tensor([*self.special_token_ids, self.mask_token_id])
        is_masked = (torch.rand(ids.shape) < self.mlm_probability) & (batch["attention_mask"] == 1)
        is_masked &= ~torch.isin(ids, special)
        masked = {"masked_input_ids": ids.masked_fill(is_masked, self.mask_token_id)}
        return batch | masked | {"mlm_targets": ids.masked_fill(~is_masked, -100)}


def _is_nested(values: Sequence) -> bool:
    return isinstance(values[0], list | tuple) or getattr(values[0], "ndim", 0) > 0


def _check_feature(index: int, feature: dict[str, Any]) -> bool:
    """Returns whether the feature is an episode; raises if it is neither an episode nor a single interaction."""
    if set(feature) != {"input_ids", "labels"}:
        raise ValueError(f"Feature {index} has the keys {sorted(feature)}, expected ['input_ids', 'labels'].")
    lengths = {}
    for name, values in feature.items():
        if len(values) == 0:
            raise ValueError(f"Feature {index} is empty: {name} has length 0, expected at least 1.")
        lengths[name] = [len(turn) for turn in values] if _is_nested(values) else len(values)
    if lengths["input_ids"] != lengths["labels"]:
        raise ValueError(
            f"Feature {index} has input_ids of length {lengths['input_ids']} but labels of length {lengths['labels']}."
        )
    is_episode = isinstance(lengths["labels"], list)
    if is_episode and 0 in lengths["labels"]:
        raise ValueError(f"Feature {index} has turns of {lengths['labels']} tokens, expected at least 1 in each.")
    return is_episode


def _pad(episodes: Sequence[Sequence], shape: tuple[int, int, int], value: int) -> torch.Tensor:
    padded = torch.full(shape, value, dtype=torch.long)
    for row, turns in enumerate(episodes):
        for column, turn in enumerate(turns):
            padded[row, column, : len(turn)] = torch.as_tensor(turn, dtype=torch.long)
    return padded
