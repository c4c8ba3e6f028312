# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of episodes of similar length, and data sets whose item is a whole batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset

from .collator import RxTEpisodeCollator


def bucket_by_turns(
    sizes: Sequence[tuple[int, int]],
    *,
    max_batch_tokens: int,
    max_turn_difference: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> list[list[int]]:
    r"""
    Returns batches of indices for `DataLoader(batch_sampler=...)`: every episode once, episodes of similar turns and
    tokens together, in an order that depends on `seed` and `epoch` only.

    Args:
        sizes (`Sequence[tuple[int, int]]`): turns, and tokens of the longest turn, of each episode: `Episodes.sizes`.
        max_batch_tokens (`int`): upper bound of batch size x turns x tokens of a padded batch.
        max_turn_difference (`int`): largest difference in turns within a batch.

    Raises:
        `ValueError` if an episode alone is larger than `max_batch_tokens`.
    """
    random = Random(f"{seed}:{epoch}").random
    batches: list[list[int]] = []
    batch: list[int] = []
    width = 0
    # tokens are compared coarsely, so that batches differ from epoch to epoch
    for index in sorted(range(len(sizes)), key=lambda index: (sizes[index][0], sizes[index][1] // 8, random())):
        turns, tokens = sizes[index]
        if turns * tokens > max_batch_tokens:
            raise ValueError(
                f"Episode {index} has {turns} turns of up to {tokens} tokens, more than "
                f"max_batch_tokens={max_batch_tokens}: cut it with max_turns or max_tokens of Episodes."
            )
        width = max(width, tokens)
        is_full = (len(batch) + 1) * turns * width > max_batch_tokens
        if batch and (is_full or turns - sizes[batch[0]][0] > max_turn_difference):
            batches.append(batch)
            batch, width = [], tokens
        batch.append(index)
    if batch:
        batches.append(batch)
    return sorted(batches, key=lambda _: random())


def endless_batches(episodes: Any, max_batch_tokens: int) -> Iterator[list[int]]:
    """[`bucket_by_turns`], epoch after epoch; raises `ValueError` if there is no episode to begin with."""
    if not len(episodes):
        raise ValueError("No dialogue has an answer within the limits on turns and tokens: raise them.")
    epochs = (bucket_by_turns(episodes.sizes, max_batch_tokens=max_batch_tokens, epoch=epoch) for epoch in count())
    return chain.from_iterable(epochs)


class StepDataset(Dataset):
    """
    One item is the list of features of one step. It follows from its index alone, so that a run resumes exactly.

    Args:
        features: what the indices point to, such as [`Episodes`].
        steps (`Sequence[Sequence[int]]`): indices of each step, such as [`bucket_by_turns`] gives them.
    """

    def __init__(self, features: Any, steps: Sequence[Sequence[int]]):
        self.features, self.steps = features, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.features[number] for number in self.steps[index]]


@dataclass
class StepCollator:
    """
    Collates a batch of one item that is a batch itself, as a data set of steps has them.

    Args:
        collate (`Callable` or `int`): what makes tensors of the features; a padding token stands for an
            [`RxTEpisodeCollator`] with it.
    """

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]] | int

    def __call__(self, items: Sequence[Sequence[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        if len(items) != 1:
            raise ValueError(f"An item is a whole step: expected a batch size of 1, got {len(items)}.")
        collate = RxTEpisodeCollator(self.collate) if isinstance(self.collate, int) else self.collate
        return collate(items[0])
