# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What a memory that is written by choosing keeps: a start without data, and a fit to dialogues in seconds."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from ..data.readers import Episodes, recall_masks
from ..memory_rxt import RxTMemorySelection
from ..modeling_rxt import RxTForCausalLM

# The start: how much of the vocabulary counts as frequent, and penalties beside a salience in logarithms of ranks.
FREQUENT_SHARE = 0.01
AGE_PENALTY, REPEAT_PENALTY = 0.04, 3.0
# The fit: numbers that it looks at, a vector for each candidate, and the weight decay of the salience's vector.
MAX_NUMBERS, WEIGHT_DECAY = 150_000_000, 3e-3


@torch.no_grad()
def start_salience(model: RxTForCausalLM) -> None:
    """
    Lets the memory prefer rare tokens, later ones, and of equal ones the last. Vocabularies are sorted by frequency,
    so a token's rarity is the logarithm of its id up to the first hundredth of the vocabulary; the salience is linear
    in the states of the first memory layer, to which it is fitted by ridge regression.
    """
    selection = _selection(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(model.config.vocab_size, generator=generator)[:16_384]
    width = min(len(ids), 128)
    rows = ids[: len(ids) // width * width].view(-1, width).to(model.device)
    states = F.rms_norm(_first_states(model, rows).flatten(0, 1).double(), (model.config.hidden_size,), eps=1e-6)
    frequent = max(int(FREQUENT_SHARE * model.config.vocab_size), 1)
    rarity = (rows.flatten().clamp(max=frequent) + 1).double().log()
    states, rarity = states - states.mean(dim=0), rarity - rarity.mean()
    ridge = 0.01 * torch.eye(states.shape[1], dtype=states.dtype, device=states.device)
    weight = torch.linalg.solve(states.T @ states / len(states) + ridge, states.T @ rarity / len(states))
    for parameter, value in zip(selection.parameters(), (weight, AGE_PENALTY, REPEAT_PENALTY), strict=True):
        parameter.copy_(torch.as_tensor(value))


def fit_salience(
    model: RxTForCausalLM, episodes: Episodes, *, topics: int = 4, rounds: int = 2, seed: int = 0
) -> dict:
    r"""
    Fits what a memory keeps to dialogues, in seconds on a CPU: by logistic regression on whether a token that could be
    kept will be recalled by a later answer. The candidates are those that the memory of the round before leaves and
    meets, over up to `topics` dialogues in a row, so that age counts for what it is worth.

    Recalled is what [`~data.readers.recall_masks`] says: the words that `episodes` marks (`recall`), or where a
    dialogue marks none, rare words of an answer that only earlier turns tell.

    Args:
        model ([`RxTForCausalLM`]): one with `memory_writing="selection"`; its `memory_selection` is changed.
        episodes ([`Episodes`]): dialogues to learn from; some hundred suffice.
        topics (`int`): dialogues that follow one another in one memory, at most.
        rounds (`int`): fits, each with the candidates of the one before.
        seed (`int`): of the order of dialogues.

    Returns: `{"candidates", "recalled", "held"}`: how many candidates the last fit saw, the share of them that is
    recalled, and the share of recalled tokens that the memory held when they were asked for, before the last fit.

    Raises: `ValueError` for a model that does not select, and where no token is ever recalled.
    """
    _selection(model)
    dialogues = list(_recalls(episodes))
    if not any(recalled for dialogue in dialogues for _, recalled in dialogue):
        raise ValueError("No answer recalls a word of an earlier turn: there is nothing to fit the salience to.")
    found = {}
    for _ in range(rounds):
        found = _fit(model, dialogues, topics, Random(seed))
    return found


def _recalls(episodes: Episodes) -> Iterator[list[tuple[list[int], list[int]]]]:
    """For each dialogue its turns: the ids, and those ids among its answer's that only earlier turns tell."""
    for index, masks in enumerate(recall_masks(episodes)):
        item = episodes[index]
        yield [
            (ids, [token for token, is_recalled in zip(ids, mask, strict=True) if is_recalled])
            for ids, mask in zip(item["input_ids"], masks, strict=True)
        ]


def _fit(model: RxTForCausalLM, dialogues: list, topics: int, rng: Random) -> dict:
    features: list[tuple[torch.Tensor, ...]] = []
    held = asked = candidates = 0
    while candidates * model.config.hidden_size < MAX_NUMBERS and len(features) < 40 * len(dialogues):
        for row, is_held in _play(model, rng.choices(dialogues, k=rng.randint(1, topics))):
            features.append(row)
            candidates += len(row[0])
            held, asked = held + sum(is_held), asked + len(is_held)
    states, later, repeated, recalled = (torch.cat(parts).float() for parts in zip(*features, strict=True))
    columns = torch.stack([torch.ones_like(later), -later / 100, -repeated], dim=1)
    selection = _selection(model)
    weight = selection.weight.detach().float().cpu().clone().requires_grad_()
    others = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, others], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = F.binary_cross_entropy_with_logits(states @ weight + columns @ others, recalled)
        (found + WEIGHT_DECAY * weight.square().sum()).backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        values = (weight, (others[1] / 100).clamp(min=0.0), others[2].clamp(min=0.0))
        for parameter, value in zip(selection.parameters(), values, strict=True):
            parameter.copy_(value.expand_as(parameter))
    return {"candidates": candidates, "recalled": recalled.mean().item(), "held": held / max(asked, 1)}


@torch.no_grad()
def _play(model: RxTForCausalLM, dialogues: Sequence[Any]) -> Iterator[tuple[tuple[torch.Tensor, ...], list[bool]]]:
    """
    Writes dialogues into one memory. For each turn: of all candidates the normalised states, the number of later ones,
    whether one of these is the same, and whether it will be recalled; and which tokens that it recalls were held.
    """
    selection = _selection(model)
    # a memory of one layer, and what each of its slots is: the token, and its dialogue
    states = torch.zeros(1, 0, model.config.hidden_size, device=model.device)
    kept: list[tuple[int, int]] = []
    for number, dialogue in enumerate(dialogues):
        for turn, (ids, recalled) in enumerate(dialogue):
            is_held = [(token, number) in kept for token in recalled]
            new = _first_states(model, torch.tensor([ids], device=model.device))[:, :-1].float()
            states, kept = torch.cat([states, new], dim=1), kept + [(token, number) for token in ids[:-1]]
            all_of_them = torch.ones(1, len(kept), dtype=torch.bool, device=model.device)
            normed, later, repeated = (part[0].cpu() for part in selection.features(states, all_of_them))
            coming = {(token, number) for _, tokens in dialogue[turn + 1 :] for token in tokens}
            # of equal tokens only the last is worth a slot
            is_recalled = torch.tensor([slot in coming for slot in kept]) & ~repeated
            yield (normed, later, repeated, is_recalled), is_held
            scores = selection.salience(states, all_of_them)[0]
            best = scores.topk(min(selection.num_slots, len(kept))).indices.sort().values
            states, kept = states[:, best], [kept[index] for index in best.tolist()]


def _selection(model: RxTForCausalLM) -> RxTMemorySelection:
    selection: Any = model.model.memory_selection
    if selection is None:
        raise ValueError(f'A salience needs memory_writing="selection", got {model.config.memory_writing!r}.')
    return selection


def _first_states(model: RxTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """What encodes tokens in the first memory layer; of the decoder's first layer, the embeddings."""
    embeds = model.model.embed_tokens(ids)
    memory_layers = model.config.memory_layers
    if model.config.memory_encoding != "encoder" and (memory_layers is None or memory_layers[0] == 0):
        return embeds
    nothing = model.model.initial_states(len(ids)).to(embeds.dtype)
    return model.model.encoded_states(embeds, None, nothing)[0][0]


__all__ = ["fit_salience", "start_salience"]
