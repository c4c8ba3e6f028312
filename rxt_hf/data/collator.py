# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of episodes and of single interactions."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch


@dataclass
class RxTEpisodeCollator:
    r"""
    Pads a list of episodes to tensors of shape `(batch_size, turns, tokens)`, on the right in both directions.

    A feature is `{"input_ids": ..., "labels": ...}`, both a list of turns (an episode) or both one list of tokens (a
    single interaction; the tensors are then `(batch_size, tokens)`). It may have an `attention_mask`, and any other
    key that holds one number for each token, or, in episodes, for each turn. All features have the same keys. Nothing
    is dropped but turns after `max_turns`.

    `Trainer` joins the predictions of all batches, as `predict` and `compute_metrics` need them, along the first
    dimension, and pads the second. For episodes give `pad_to_turns` and `pad_to_tokens`, so that all batches have one
    shape; `eval_do_concat_batches=False`, which keeps the batches apart, needs neither.

    Args:
        pad_token_id (`int` or a tokenizer): fills `input_ids`. `labels`, and keys that end in `_labels`, are filled
            with -100, all others with 0.
        max_turns (`int`, *optional*): longer episodes are cut to their first `max_turns` turns.
        pad_to_multiple_of (`int`, *optional*): rounds the number of tokens up.
        pad_to_turns (`int`, *optional*): number of turns that every episode is padded to.
        pad_to_tokens (`int`, *optional*): number of tokens that every turn is padded to.

    Returns:
        `dict[str, torch.Tensor]`: the features' keys, and `attention_mask` (0 on padding, so all 0 in a padded turn).

    Raises:
        `ValueError` for an empty batch, episode or turn, for keys of another shape than `input_ids`, for a batch that
        mixes episodes with single interactions, for features with other keys than the first, and for episodes and
        turns longer than `pad_to_turns` and `pad_to_tokens`.

    Example:

    ```python
    >>> from rxt_hf import RxTEpisodeCollator

    >>> short = {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]}
    >>> longer = {"input_ids": [[5, 8], [5, 9]], "labels": [[-100, 8], [-100, 9]]}
    >>> RxTEpisodeCollator(pad_token_id=0)([short, longer])["input_ids"]
    tensor([[[5, 6, 7],
             [0, 0, 0]],
    <BLANKLINE>
            [[5, 8, 0],
             [5, 9, 0]]])

    ```
    """

    pad_token_id: Any
    max_turns: int | None = None
    pad_to_multiple_of: int | None = None
    pad_to_turns: int | None = None
    pad_to_tokens: int | None = None

    def __post_init__(self):
        self.pad_token_id = getattr(self.pad_token_id, "pad_token_id", self.pad_token_id)
        if self.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token, or give pad_token_id.")
        for name in ("max_turns", "pad_to_multiple_of", "pad_to_turns", "pad_to_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None.")

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not features:
            raise ValueError("The batch is empty: got 0 features, expected at least 1.")
        is_episode = [_check_feature(index, feature, set(features[0])) for index, feature in enumerate(features)]
        if any(is_episode) and not all(is_episode):
            raise ValueError(
                f"A batch holds episodes or single interactions, not both: got {sum(is_episode)} episodes and "
                f"{len(is_episode) - sum(is_episode)} single interactions."
            )
        batch = {name: [self._turns(feature, name) for feature in features] for name in features[0]}
        batch.setdefault("attention_mask", [[[1] * len(turn) for turn in turns] for turns in batch["input_ids"]])
        shape = self._padded_shape(batch["input_ids"], is_episode[0])
        tensors = {name: _pad(episodes, shape, self._fill(name)) for name, episodes in batch.items()}
        return tensors if is_episode[0] else {name: tensor.squeeze(1) for name, tensor in tensors.items()}

    def _fill(self, name: str) -> int:
        if name == "input_ids":
            return self.pad_token_id
        return -100 if name == "labels" or name.endswith("_labels") else 0

    def _turns(self, feature: dict[str, Any], name: str) -> Sequence:
        return feature[name][: self.max_turns] if _is_nested(feature["input_ids"]) else [feature[name]]

    def _padded_shape(self, episodes: Sequence[Sequence], is_episode: bool) -> tuple[int, int, int]:
        num_turns, num_tokens = max(map(len, episodes)), max(len(turn) for turns in episodes for turn in turns)
        for name, found in (("turns", num_turns), ("tokens", num_tokens)):
            limit = getattr(self, f"pad_to_{name}")
            if limit is not None and found > limit:
                raise ValueError(f"The batch has {found} {name}, which is more than pad_to_{name}={limit}.")
        multiple = self.pad_to_multiple_of or 1
        num_tokens = self.pad_to_tokens or -(-num_tokens // multiple) * multiple
        return len(episodes), self.pad_to_turns if is_episode and self.pad_to_turns else num_turns, num_tokens


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

    _: KW_ONLY
    mask_token_id: int
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


def _check_feature(index: int, feature: dict[str, Any], names: set[str]) -> bool:
    """Returns whether the feature is an episode; raises if it is neither an episode nor a single interaction."""
    if set(feature) != names or not {"input_ids", "labels"} <= names:
        expected = sorted(names | {"input_ids", "labels"})
        raise ValueError(f"Feature {index} has the keys {sorted(feature)}, expected {expected}.")
    lengths = {name: _lengths(index, name, values) for name, values in feature.items()}
    is_episode = isinstance(lengths["input_ids"], list)
    if is_episode and 0 in lengths["input_ids"]:
        raise ValueError(f"Feature {index} has turns of {lengths['input_ids']} tokens, expected at least 1 in each.")
    for name, found in lengths.items():
        is_by_turn = is_episode and name != "labels" and found == len(lengths["input_ids"])
        if found != lengths["input_ids"] and not is_by_turn:
            raise ValueError(
                f"Feature {index} has input_ids of length {lengths['input_ids']} but {name} of length {found}."
            )
    return is_episode


def _lengths(index: int, name: str, values: Any) -> list[int] | int:
    """Tokens of each turn, or of a single interaction."""
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise ValueError(f"Feature {index} has {name!r}={values!r}, expected a number for each token or turn.")
    if len(values) == 0:
        raise ValueError(f"Feature {index} is empty: {name} has length 0, expected at least 1.")
    return [len(turn) for turn in values] if _is_nested(values) else len(values)


def _pad(episodes: Sequence[Sequence], shape: tuple[int, int, int], value: int) -> torch.Tensor:
    """Numbers of each token in a tensor of `shape`, or those of each turn in one of its first two dimensions."""
    rows = [[turn if torch.is_tensor(turn) else torch.tensor(turn) for turn in turns] for turns in episodes]
    by_token = rows[0][0].dim() == 1
    is_float = any(turn.is_floating_point() for turns in rows for turn in turns)
    padded = torch.full(shape if by_token else shape[:2], value, dtype=torch.float if is_float else torch.long)
    for row, turns in enumerate(rows):
        for column, turn in enumerate(turns):
            if by_token:
                padded[row, column, : len(turn)] = turn
            else:
                padded[row, column] = turn
    return padded
