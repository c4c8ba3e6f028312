# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Stage 5, preferences over a memory: DPO (arXiv 2305.18290) and its anchored forms (APO, arXiv 2408.06266).

An episode's turn may have a rejected answer beside the chosen one. Both are scored under the same memory, that of the
turns before, and only then the chosen one is written. To that end the rejected answer stands in the episode as a turn
of its own right before the chosen one, read and never written (`write_mask`): one forward scores all turns at once.

The reference writes a memory of its own, from the same chosen answers. Its probability of an answer given the dialogue
is then a constant, as DPO's derivation has it. Under the policy's memory it would move with the policy's writes, and
read a memory that it was never trained to read.

Gradients flow through the memory into the writes of the turns before, over the model's `bptt_turns` turns, where a
rejected answer counts as one. Freeze `memory_encoder`, `memory_attention` and `initial_memory` to leave the writes
alone.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from ..data.readers import encode_turns
from ..data.rows import split_messages
from ..evaluation.rollout import GREEDY, contains_words, play, recalled_words, texts
from ..layers_rxt import upcast
from ..losses_rxt import load_balancing_losses
from .arguments import RxTTrainingArguments
from .loop import CountingTrainer

LossType = Literal["dpo", "apo_zero", "apo_down"]


def preference_loss(chosen: torch.Tensor, rejected: torch.Tensor, loss_type: LossType = "dpo") -> torch.Tensor:
    r"""
    Returns the loss of each pair from the rewards `r = beta * log(policy / reference)` of its answers:

        dpo        -log sigmoid(r_chosen - r_rejected)                      arXiv 2305.18290, equation 7
        apo_zero   sigmoid(r_rejected) - sigmoid(r_chosen)                  arXiv 2408.06266
        apo_down   sigmoid(r_chosen) - sigmoid(r_chosen - r_rejected)       arXiv 2408.06266

    DPO sees the difference alone. `apo_zero` raises the chosen and lowers the rejected answer, for chosen answers that
    are better than the model's own; `apo_down` lowers both, the rejected one more.

    Args:
        chosen (`torch.Tensor` of shape `(pairs,)`): rewards of the chosen answers.
        rejected (`torch.Tensor` of shape `(pairs,)`): rewards of the rejected answers.
    """
    if loss_type == "dpo":
        return -F.logsigmoid(chosen - rejected)
    if loss_type == "apo_zero":
        return rejected.sigmoid() - chosen.sigmoid()
    if loss_type == "apo_down":
        return chosen.sigmoid() - (chosen - rejected).sigmoid()
    raise ValueError(f'loss_type must be "dpo", "apo_zero" or "apo_down", got {loss_type!r}.')


def answer_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Returns the log probability of each label of (..., tokens) under `logits` of (..., tokens, vocab_size), of shape
    (..., tokens - 1), in at least float32, and 0 where the label is -100.
    """
    logits, targets = upcast(logits[..., :-1, :]), labels[..., 1:]
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(targets.shape)


def encode_preferences(
    tokenizer: PreTrainedTokenizerFast | None,
    interactions: Sequence[Mapping[str, Any]],
    vocab_size: int | None = None,
) -> dict[str, list]:
    """
    A dialogue as [`RxTEpisodeCollator`] takes it: `input_ids` and `labels` of each turn, a rejected answer being a
    turn before the chosen one, and `write_mask`. Labels are -100 in turns without a rejected answer.

    Args:
        interactions (`Sequence[Mapping]`): `query`, `answer`, and in turns with a preference `rejected`, a text or
            token ids as `answer` is; see [`rxt_hf.data.readers`] for what else an interaction may have.
        vocab_size (`int`, *optional*): size of the model's vocabulary; token ids outside of it raise.
    """
    turns, is_written, is_scored = [], [], []
    for turn in interactions:
        has_pair = turn.get("rejected") is not None
        if has_pair:
            beside = ("thinking", "tool_calls")
            turns.append({name: turn[name] for name in turn if name not in beside} | {"answer": turn["rejected"]})
        turns.append(turn)
        is_written += [0, 1] if has_pair else [1]
        is_scored += [has_pair] * (1 + has_pair)
    encoded = encode_turns(tokenizer, turns, vocab_size)
    labels = [row if scored else [-100] * len(row) for (_, row), scored in zip(encoded, is_scored, strict=True)]
    return {"input_ids": [ids for ids, _ in encoded], "labels": labels, "write_mask": is_written}


def preference_interactions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    The interactions of a row of a preference data set: `chosen` and `rejected`, each the messages of a chat or the
    text of its last answer, and `prompt`, the messages or the text before, if they do not begin with them.

    Raises: `ValueError` if the two differ in more than their last answer, or in nothing.
    """
    before = _messages(row.get("prompt") or [], "prompt", "user")
    chosen, rejected = (
        split_messages(before + _messages(row.get(name), name, "assistant"), name) for name in ("chosen", "rejected")
    )
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1]["answer"] is None:
            raise ValueError(f"{name} has no answer.")
    if chosen[:-1] != rejected[:-1] or chosen[-1]["query"] != rejected[-1]["query"]:
        raise ValueError("chosen and rejected differ before their last answer.")
    if chosen[-1]["answer"] == rejected[-1]["answer"]:
        raise ValueError(f"chosen and rejected end in the same answer: {chosen[-1]['answer']!r:.80}.")
    return [*chosen[:-1], chosen[-1] | {"rejected": rejected[-1]["answer"]}]


def _messages(value: Any, name: str, role: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"{name} must be a text or a list of messages, got {type(value).__name__}.")
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def recalls_all(turn: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer contains all words that the turn marks as recalled."""
    return all(contains_words(answer, words) for words in recalled_words(turn))


@torch.no_grad()
def add_own_mistakes(
    model: Any,
    tokenizer: Any,
    dialogues: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 32,
    is_asked: Callable[[Mapping[str, Any]], bool] = lambda turn: bool(turn.get("recall")),
    is_right: Callable[[Mapping[str, Any], str], bool] = recalls_all,
) -> list[list[dict[str, Any]]]:
    """
    Finds preferences that the model needs: it answers the turns that are `is_asked`, by default those that mark
    recalled words, greedily and under the memory of the reference answers. `rejected` is what is not `is_right`. What
    comes after the last mistake is cut off, and dialogues without one are left out.
    """
    model.eval()
    played = play(
        model,
        tokenizer,
        dialogues,
        max_new_tokens=max_new_tokens,
        is_asked=is_asked,
        write_reference=True,
        **GREEDY,
    )
    episodes = [[dict(turn) for turn in dialogue["interactions"]] for dialogue in dialogues]
    for turns, said in zip(episodes, played, strict=True):
        for turn, text in zip(turns, texts(tokenizer, said), strict=True):
            if is_asked(turn) and not is_right(turn, text):
                turn["rejected"] = text
    last = [max((place for place, turn in enumerate(turns) if "rejected" in turn), default=-1) for turns in episodes]
    return [turns[: end + 1] for turns, end in zip(episodes, last, strict=True) if end >= 0]


@dataclass
class PreferenceArguments(RxTTrainingArguments):
    """
    [`RxTTrainingArguments`], and:

    Args:
        beta (`float`): weight of the log ratio of policy and reference; small ones allow the policy to go far.
        loss_type (`str`): `"dpo"`, `"apo_zero"` or `"apo_down"`, see [`preference_loss`].
    """

    beta: float = field(default=0.1, metadata={"help": "Weight of the log ratio of policy and reference."})
    loss_type: LossType = field(
        default="dpo", metadata={"help": "Loss of preference_loss: dpo, or an anchored variant."}
    )


def check_reference(model: Any, reference_model: Any) -> Any:
    """Returns the frozen reference model, or None if the policy is an adapter that can be switched off."""
    if reference_model is not None:
        return reference_model.requires_grad_(False).eval()
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"A reference is needed: pass reference_model=copy.deepcopy(model), or a PEFT model in place of "
            f"{type(model).__name__}, whose reference is itself with the adapter switched off."
        )
    return None


@contextmanager
def reference_of(policy: Any, reference_model: Any) -> Generator[Any, None, None]:
    """Yields the reference without gradients and dropout: the given model, or the policy without its adapter."""
    with torch.no_grad():
        if reference_model is not None:
            yield reference_model
            return
        is_training = policy.training
        with policy.disable_adapter():
            yield policy.eval()
        policy.train(is_training)


class PreferenceTrainer(CountingTrainer):
    r"""
    `Trainer` with the loss of [`preference_loss`], mean over the pairs of a step. Data sets hold what
    [`encode_preferences`] gives, batches come from an [`RxTEpisodeCollator`]. Logs `accuracy`, the share of pairs
    whose chosen answer has the larger reward, and `margin`, the mean difference of the rewards.

    Args:
        reference_model ([`RxTForCausalLM`], *optional*): is frozen. Without it the model must be a `PeftModel`, and
            the reference is the model with its adapter switched off.
    """

    args: PreferenceArguments

    def __init__(self, *args: Any, reference_model: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reference_model = check_reference(self.model, reference_model)
        if self.reference_model is not None:
            self.reference_model = self.accelerator.prepare_model(self.reference_model, evaluation_mode=True)
        # nothing but its inputs goes to the model
        self.model_accepts_loss_kwargs = False
        self._measured: list[torch.Tensor] = []

    def pairs(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """1 at the rejected answers, which stand before the chosen ones, of (batch_size, turns - 1)."""
        return ~inputs["write_mask"][:, :-1].bool() & inputs["labels"][:, :-1].ne(-100).any(-1)

    def count(self, inputs):
        return self.pairs(inputs).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        episode = {name: inputs[name] for name in ("input_ids", "attention_mask", "write_mask")}
        with reference_of(self.accelerator.unwrap_model(model), self.reference_model) as reference:
            expected = answer_log_probs(reference(**episode).logits, labels).sum(-1)
        outputs = model(**episode)
        rewards = self.args.beta * (answer_log_probs(outputs.logits, labels).sum(-1) - expected)
        is_pair = self.pairs(inputs)
        chosen, rejected = rewards[:, 1:][is_pair], rewards[:, :-1][is_pair]
        loss = preference_loss(chosen, rejected, self.args.loss_type).sum()
        total = is_pair.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if outputs.aux_loss is not None:
            config: Any = cast("Any", self.model).config
            weights = inputs["attention_mask"].flatten(1)
            # of the turns that forward adds where another process has more
            added = len(outputs.router_logits[0]) // len(weights) - weights.shape[1]
            weights = F.pad(weights, (0, added))
            balance = load_balancing_losses(outputs.router_logits, config.num_experts_per_tok, weights)
            loss = loss + config.router_aux_loss_coef * (balance * is_pair.sum(1)).sum()
        loss = loss / total
        margins = (chosen - rejected).detach()
        if model.training and len(margins):
            self._measured.append(torch.stack([(margins > 0).float().mean(), margins.float().mean()]))
        outputs = {"chosen_rewards": chosen.detach(), "rejected_rewards": rejected.detach()}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._measured and "loss" in logs:
            accuracy, margin = torch.stack(self._measured).mean(0).tolist()
            logs |= {"accuracy": round(accuracy, 4), "margin": round(margin, 4)}
            self._measured.clear()
        super().log(logs, *args, **kwargs)
