# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
The figures of `rxt_hf.evaluation.memory` for causal language models without a memory, on the same dialogues and label
masks: with the whole dialogue before a turn (as much of it as the model sees), or with the turn alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.readers import encode_turns
from rxt_hf.evaluation.memory import ROWS, Dialogues, figures_of, on_device, probe_scores
from rxt_hf.evaluation.rollout import GREEDY, answer
from rxt_hf.layers_rxt import upcast


def history_losses(model: Any, batch: Mapping[str, torch.Tensor], *, full_history: bool) -> torch.Tensor:
    """Cross-entropy of each labelled token of a batch of episodes, in the order of `token_losses`."""
    is_real = batch["attention_mask"].bool()
    rows = range(len(is_real)) if full_history else list(map(tuple, is_real.any(-1).nonzero().tolist()))
    columns = {name: [batch[name][row][is_real[row]].tolist() for row in rows] for name in ("input_ids", "labels")}
    features = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    inputs = on_device(model, RxTEpisodeCollator(0)(features))
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1][labels != -100]
    return F.cross_entropy(upcast(logits), labels[labels != -100], reduction="none")


def answers_to(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """The greedy answers of a model without a memory; prompts of about equal length are computed together."""
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), ROWS):
        chunk = order[start : start + ROWS]
        questions = [prompts[index] for index in chunk]
        said, _ = answer(model, tokenizer, questions, max_new_tokens=max_new_tokens, **GREEDY)
        answers |= zip(chunk, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True)
    return [answers[index] for index in range(len(prompts))]


def history_probes(
    model: Any,
    tokenizer: Any,
    dialogues: Dialogues,
    *,
    before: Callable[[Sequence[list[int]]], list[int]],
    max_new_tokens: int,
) -> dict[str, Any] | None:
    """
    [`probe_scores`] of the dialogues' probes, each asked alone after the last interaction; None without probes. What
    stands before a probe is made of the turns of its dialogue by `before`.
    """
    asked: list[Mapping[str, Any]] = []
    prompts: list[list[int]] = []
    for number, dialogue in enumerate(dialogues.episodes.dialogues):
        history = before(dialogues.episodes[number]["input_ids"])
        for probe in dialogue.get("probes") or []:
            ((prompt, _),) = encode_turns(tokenizer, [{"query": probe["query"], "answer": None}])
            asked.append(probe)
            prompts.append([*history, *prompt])
    return probe_scores(asked, answers_to(model, tokenizer, prompts, max_new_tokens)) if asked else None


@torch.no_grad()
def evaluate_history(
    model: Any, tokenizer: Any, dialogues: Dialogues, *, full_history: bool, max_new_tokens: int
) -> dict[str, Any]:
    """`answer_perplexity` and `recall_loss` as [`figures_of`] says, and `probes` as [`probe_scores`] does."""
    model.eval()
    figures = figures_of(partial(history_losses, model, full_history=full_history), dialogues)

    def before(turns: Sequence[list[int]]) -> list[int]:
        return [token for ids in turns for token in ids] if full_history else []

    asked = history_probes(model, tokenizer, dialogues, before=before, max_new_tokens=max_new_tokens)
    return figures | {"probes": asked}
