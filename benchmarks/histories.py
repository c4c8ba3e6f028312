# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
The figures of `rxt_hf.evaluation.memory` for causal language models without a memory, on the same dialogues and label
masks: with the whole dialogue before a turn (as much of it as the model sees), or with the turn alone.
"""

from collections.abc import Mapping
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


def history_probes(
    model: Any, tokenizer: Any, dialogues: Dialogues, *, full_history: bool, max_new_tokens: int
) -> dict[str, Any] | None:
    """[`probe_scores`] of the dialogues' probes, each asked alone after the last interaction; None without probes."""
    asked: list[Mapping[str, Any]] = []
    prompts: list[list[int]] = []
    for number, dialogue in enumerate(dialogues.episodes.dialogues):
        history = [token for turn in dialogues.episodes[number]["input_ids"] for token in turn]
        for probe in dialogue.get("probes") or []:
            ((prompt, _),) = encode_turns(tokenizer, [{"query": probe["query"], "answer": None}])
            asked.append(probe)
            prompts.append([*history, *prompt] if full_history else prompt)
    if not asked:
        return None
    answers: dict[int, str] = {}
    # prompts of about equal length together
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), ROWS):
        chunk = order[start : start + ROWS]
        questions = [prompts[index] for index in chunk]
        said, _ = answer(model, tokenizer, questions, max_new_tokens=max_new_tokens, **GREEDY)
        answers |= zip(chunk, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True)
    return probe_scores(asked, [answers[index] for index in range(len(asked))])


@torch.no_grad()
def evaluate_history(
    model: Any, tokenizer: Any, dialogues: Dialogues, *, full_history: bool, max_new_tokens: int
) -> dict[str, Any]:
    """`answer_perplexity` and `recall_loss` as [`figures_of`] says, and `probes` as [`probe_scores`] does."""
    model.eval()
    figures = figures_of(partial(history_losses, model, full_history=full_history), dialogues)
    return figures | {
        "probes": history_probes(model, tokenizer, dialogues, full_history=full_history, max_new_tokens=max_new_tokens)
    }
