# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Stage 6, memory reinforcement learning (arXiv 2510.03561) with group-relative advantages (GRPO, arXiv 2402.03300).

The model plays whole dialogues, each `group_size` times: it samples every answer, and what it said is written into its
memory. An answer's rewards are compared with those of the same turn in the group. One forward then scores the sampled
episodes in parallel over their turns, under memories written anew, so that gradients flow through the memory into what
earlier turns wrote (over the model's `bptt_turns` turns).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import Trainer

from ..data.collator import RxTEpisodeCollator
from ..data.readers import encode_turns
from ..evaluation.rollout import SAMPLED, contains_words, play, recalled_words, texts
from ..evaluation.text_scores import sentence_bleu
from .arguments import RxTTrainingArguments
from .preference import answer_log_probs, check_reference, reference_of


@torch.no_grad()
def sample_episodes(
    model: Any,
    tokenizer: Any,
    dialogues: Sequence[Mapping[str, Any]],
    *,
    group_size: int = 1,
    max_new_tokens: int = 32,
) -> tuple[list[dict[str, list[list[int]]]], list[list[str]]]:
    """
    Plays the queries of each dialogue `group_size` times, sampling at temperature 1 from the whole distribution, which
    the loss differentiates. Turns whose `answer` is None are written and not answered.

    Returns:
        For each sample, those of one dialogue next to each other: an episode as [`RxTEpisodeCollator`] takes it, with
        labels at the sampled tokens, and the texts of its answers.
    """
    repeated = [dialogue for dialogue in dialogues for _ in range(group_size)]
    played = play(model, tokenizer, repeated, max_new_tokens=max_new_tokens, **SAMPLED)
    features = [
        {
            "input_ids": [turn.prompt + turn.answer for turn in turns],
            "labels": [[-100] * len(turn.prompt) + turn.answer for turn in turns],
        }
        for turns in played
    ]
    return features, [texts(tokenizer, turns) for turns in played]


def recall_reward(turn: Mapping[str, Any], answer: str) -> float:
    """Returns the share of a turn's recalled words that an answer contains; NaN for turns that mark none."""
    found = [contains_words(answer, words) for words in recalled_words(turn)]
    return sum(found) / len(found) if found else math.nan


def saved_turn(place: int, turn: Mapping[str, Any]) -> int:
    """Returns the oldest turn that the recalled words of an answer come from, else the turn before, or -1 if none."""
    return place - max((distance for _, _, distance in turn.get("recall") or []), default=1)


def mean_embeddings(embeddings: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean of the embeddings of each row's tokens, zeros without any; ids of (..., tokens), negative for no token."""
    is_token = (ids >= 0).unsqueeze(-1)
    total = (F.embedding(ids.clamp(min=0), embeddings) * is_token).sum(-2)
    return total / is_token.sum(-2).clamp(min=1)


def group_advantages(
    rewards: torch.Tensor, *, group_size: int, discount: float = 1.0, scale_by_std: bool = True
) -> torch.Tensor:
    r"""
    The process-supervised advantages of GRPO (arXiv 2402.03300, section 4.1.3), a turn being a step:

        normalised_t = (reward_t - mean of the group) / (std of the group + 1e-4)
        advantage_t  = sum over s >= t of discount ** (s - t) * normalised_s

    so an answer also gets credit for later turns. Advantages sum to zero over a group.

    Args:
        rewards (`torch.Tensor` of shape `(rows, turns)`): `group_size` rows of each dialogue next to each other.
        discount (`float`): 1 in the paper; 0 counts the turn alone.
        scale_by_std (`bool`): False keeps the rewards' scale (arXiv 2503.20783), so that chance differences between
            answers that are equally good stay small.
    """
    groups = rewards.unflatten(0, (-1, group_size))
    normalised = groups - groups.mean(1, keepdim=True)
    if scale_by_std:
        normalised = normalised / (groups.std(1, keepdim=True, correction=0) + 1e-4)
    advantages, later = [], torch.zeros_like(normalised[..., 0])
    for step in normalised.flip(-1).unbind(-1):
        later = step + discount * later
        advantages.append(later)
    return torch.stack(advantages[::-1], dim=-1).flatten(0, 1)


def clipped_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float = 0.2,
    reference_log_probs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> torch.Tensor:
    r"""
    The loss of GRPO (arXiv 2402.03300, equations 3 and 4), a mean over tokens, then over answers:

        - min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A) + kl_coef * (q - log q - 1)

    with `ratio = exp(log_probs - old_log_probs)` and `q = exp(reference_log_probs - log_probs)`.

    Args:
        log_probs, old_log_probs, reference_log_probs (`torch.Tensor` of shape `(rows, turns, tokens)`): of the sampled
            tokens under the policy, the policy that sampled them, and the reference.
        advantages (`torch.Tensor` of shape `(rows, turns)`).
        mask (`torch.Tensor` of shape `(rows, turns, tokens)`): 1 at sampled tokens.
    """
    ratio, advantages = (log_probs - old_log_probs).exp(), advantages.unsqueeze(-1)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    if reference_log_probs is not None:
        log_quotient = reference_log_probs - log_probs
        gain = gain - kl_coef * (log_quotient.exp() - log_quotient - 1)
    by_answer = (gain * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return -by_answer.sum() / mask.any(-1).sum().clamp(min=1)


class RepeatedSampler(Sampler):
    """Repeats each chunk of `chunk` indices of another sampler `times` times; an incomplete chunk is dropped."""

    def __init__(self, sampler: Any, chunk: int, times: int):
        self.sampler, self.chunk, self.times = sampler, chunk, times

    def __len__(self) -> int:
        return len(cast(Sized, self.sampler)) // self.chunk * self.chunk * self.times

    def __iter__(self) -> Iterator[int]:
        chunk: list[int] = []
        for index in self.sampler:
            chunk.append(index)
            if len(chunk) == self.chunk:
                yield from chunk * self.times
                chunk = []


@dataclass
class ReinforcementArguments(RxTTrainingArguments):
    """
    [`RxTTrainingArguments`], where a batch size counts dialogues, and:

    Args:
        group_size (`int`): samples of each dialogue.
        max_new_tokens (`int`): of an answer.
        updates_per_sample (`int`): optimizer steps with the same samples; the ratio differs from 1 from the second on.
        clip_range (`float`): see [`clipped_loss`].
        kl_coef (`float`): weight of the divergence from the reference; 0 needs none.
        discount (`float`), scale_by_std (`bool`): see [`group_advantages`].
        recall_weight (`float`): of the trainer's `reward`.
        bleu_weight (`float`): of BLEU of the answer's tokens against the reference answer.
        reference_similarity_weight (`float`): of the cosine of mean token embeddings, answer and reference answer.
        saved_similarity_weight (`float`): of the same, answer and the interaction in memory that it should draw on.
    """

    group_size: int = field(default=8, metadata={"help": "Samples of each dialogue."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer in tokens."})
    updates_per_sample: int = field(default=1, metadata={"help": "Optimizer steps per batch of samples."})
    clip_range: float = field(
        default=0.2, metadata={"help": "Largest relative change of a token's probability that counts."}
    )
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of the KL divergence from the reference."})
    discount: float = field(default=1.0, metadata={"help": "Discount of the next turn's rewards in an advantage."})
    scale_by_std: bool = field(
        default=True, metadata={"help": "Divide advantages by the standard deviation of their group."}
    )
    recall_weight: float = field(
        default=1.0, metadata={"help": "Weight of the reward for recalled words in the answer."}
    )
    bleu_weight: float = field(default=0.2, metadata={"help": "Weight of BLEU against the reference answer."})
    reference_similarity_weight: float = field(
        default=0.1, metadata={"help": "Weight of the cosine to the reference answer."}
    )
    saved_similarity_weight: float = field(
        default=0.1, metadata={"help": "Weight of the cosine to the saved interaction."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.group_size < 2 or self.updates_per_sample < 1:
            raise ValueError(
                f"group_size must be at least 2 and updates_per_sample at least 1, got {self.group_size} and "
                f"{self.updates_per_sample}: an answer is compared with the others of its group."
            )


class ReinforcementTrainer(Trainer):
    r"""
    `Trainer` that samples its episodes. Data sets hold dialogues, `{"interactions": [...]}` as in
    [`rxt_hf.data.readers`]; `processing_class` is the tokenizer. Logs the mean of every reward over answered turns.

    A run resumes exactly with `train_sampling_strategy="sequential"` and `save_steps` a multiple of
    `updates_per_sample`. Under FSDP and DeepSpeed-3, whose weights are in pieces, it does not sample.

    Args:
        reward (`Callable`): of a turn and an answer, NaN where the turn asks for nothing; by default
            [`recall_reward`].
        reference_model ([`RxTForCausalLM`], *optional*): is frozen; needed if `kl_coef` is not 0 and the model is no
            `PeftModel`, whose reference is itself with the adapter switched off.
    """

    args: ReinforcementArguments

    def __init__(
        self,
        *args: Any,
        reward: Callable[[Mapping[str, Any], str], float] = recall_reward,
        reference_model: Any = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **{"data_collator": as_dialogues} | kwargs)
        self.reward = reward
        if self.processing_class is None:
            raise ValueError("processing_class is needed: the tokenizer that the dialogues are encoded with.")
        self.reference_model = None
        if self.args.kl_coef:
            self.reference_model = check_reference(self.model, reference_model)
        if self.reference_model is not None:
            self.reference_model = self.accelerator.prepare_model(self.reference_model, evaluation_mode=True)
        # the loss is a mean over this batch: to be divided by the number of accumulated batches
        self.model_accepts_loss_kwargs = False
        self._batches: dict[int, dict[str, torch.Tensor]] = {}
        self._calls = 0
        self._measured: list[dict[str, float]] = []

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        chunk = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        times = self.args.updates_per_sample
        return RepeatedSampler(sampler, chunk, times) if times > 1 else sampler

    def training_step(self, model, inputs, num_items_in_batch=None):
        place = self._calls % self.args.gradient_accumulation_steps
        self._calls += 1
        if self.state.global_step % self.args.updates_per_sample == 0 or place not in self._batches:
            self._batches[place] = self.sample(model, inputs["dialogues"])
        return super().training_step(model, self._batches[place], num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: most of the work is sampling."""
        return 0

    @torch.no_grad()
    def sample(self, model: Any, dialogues: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Sampled episodes as tensors, with the advantages of their turns and what else the loss needs."""
        args, policy = self.args, self.accelerator.unwrap_model(model).eval()
        with self.accelerator.autocast():
            features, answers = sample_episodes(
                policy,
                self.processing_class,
                dialogues,
                group_size=args.group_size,
                max_new_tokens=args.max_new_tokens,
            )
            collate = RxTEpisodeCollator(cast(Any, self.processing_class).pad_token_id)
            batch = {name: tensor.to(args.device) for name, tensor in collate(features).items()}
            episode = {name: batch[name] for name in ("input_ids", "attention_mask")}
            if args.updates_per_sample > 1:
                batch["old_log_probs"] = answer_log_probs(policy(**episode).logits, batch["labels"])
            if args.kl_coef:
                with reference_of(policy, self.reference_model) as reference:
                    batch["reference_log_probs"] = answer_log_probs(reference(**episode).logits, batch["labels"])
        rewards = self.rewards(policy, dialogues, batch, answers)
        total = torch.zeros_like(batch["labels"][..., 0], dtype=torch.float)
        for name, reward in rewards.items():
            total += getattr(args, f"{name}_weight") * reward.nan_to_num()
        batch["advantages"] = group_advantages(
            total,
            group_size=args.group_size,
            discount=args.discount,
            scale_by_std=args.scale_by_std,
        )
        answered = batch["labels"].ne(-100).any(-1)
        means = {name: reward[answered].nanmean() for name, reward in (rewards | {"total": total}).items()}
        self._measured.append({f"reward/{name}": mean.item() for name, mean in means.items()})
        return batch

    def rewards(
        self,
        model: Any,
        dialogues: Sequence[Mapping[str, Any]],
        batch: Mapping[str, torch.Tensor],
        answers: Sequence[Sequence[str]],
    ) -> dict[str, torch.Tensor]:
        """
        The rewards of every answer, each of shape (rows, turns) and NaN where a turn has none, by the name that its
        weight has in the arguments. Override it for rewards of your own.
        """
        group, device = self.args.group_size, batch["labels"].device
        episodes = [dialogue["interactions"] for dialogue in dialogues]
        recall = torch.full(batch["labels"].shape[:2], math.nan, device=device)
        saved = torch.full(recall.shape, -1, device=device)
        for row, said in enumerate(answers):
            for place, (turn, answer) in enumerate(zip(episodes[row // group], said, strict=True)):
                recall[row, place] = self.reward(turn, answer)
                saved[row, place] = saved_turn(place, turn)
        references = [encode_turns(cast(Any, self.processing_class), turns) for turns in episodes]
        features = [{"input_ids": [ids for ids, _ in each], "labels": [row for _, row in each]} for each in references]
        reference = RxTEpisodeCollator(0)(features)["labels"].to(device).repeat_interleave(group, dim=0)
        bleu = sentence_bleu(batch["labels"].flatten(0, 1), reference.flatten(0, 1)).view(recall.shape)

        embeddings = model.get_input_embeddings().weight
        interactions = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        answer, expected, written = (
            mean_embeddings(embeddings, ids) for ids in (batch["labels"], reference, interactions)
        )
        source = saved.clamp(min=0).unsqueeze(-1).expand_as(written)
        drawn_on = written.gather(1, source) * (saved >= 0).unsqueeze(-1)
        return {
            "recall": recall,
            "bleu": bleu,
            "reference_similarity": F.cosine_similarity(answer, expected, dim=-1),
            "saved_similarity": F.cosine_similarity(answer, drawn_on, dim=-1),
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        log_probs = answer_log_probs(outputs.logits, inputs["labels"])
        loss = clipped_loss(
            log_probs,
            inputs.get("old_log_probs", log_probs.detach()),
            inputs["advantages"],
            inputs["labels"][..., 1:] != -100,
            clip_range=self.args.clip_range,
            reference_log_probs=inputs.get("reference_log_probs"),
            kl_coef=self.args.kl_coef,
        )
        if outputs.aux_loss is not None:
            loss = loss + cast(Any, self.model).config.router_aux_loss_coef * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._measured and "loss" in logs:
            names = self._measured[0]
            logs |= {
                name: round(sum(step[name] for step in self._measured) / len(self._measured), 4) for name in names
            }
            self._measured.clear()
        super().log(logs, *args, **kwargs)


def as_dialogues(features: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Collates dialogues as they are; they become tensors when they have been played."""
    return {"dialogues": list(features)}
