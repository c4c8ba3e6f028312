# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Recall of facts over turns in closed loop: the memory, or the history, holds the model's own answers. Answers are
greedy, or sampled at temperature 1 from the whole vocabulary, as reinforcement learning samples them.

    PYTHONPATH=examples python -m demo.recall MODEL --split seen --turns 8 --dialogues 100
"""

import argparse
import json
import math
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from demo.facts import generate_dialogue, score_answer
from rxt_hf.cache_rxt import STMCache
from rxt_hf.chat_template import encode_interactions
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.evaluation.memory import Memory, by_bucket, mean
from rxt_hf.evaluation.rollout import GREEDY, SAMPLED, answer
from rxt_hf.modeling_rxt import RxTForCausalLM

FIRST_TEST_SEED = 1_000


class RxTArm:
    """Answers one turn of many dialogues from their memories."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        memory: Memory = "own",
        generation: dict[str, Any] = GREEDY,
    ):
        self.model, self.tokenizer, self.memory, self.generation = model, tokenizer, memory, generation
        self.stm_cache: STMCache | None = None

    def answer(self, queries: list[str], max_new_tokens: int) -> list[str]:
        prompts = encode_interactions(self.tokenizer, queries)["input_ids"]
        own = self.model.init_stm(len(queries)) if self.stm_cache is None else self.stm_cache
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **self.generation}
        said, self.stm_cache = answer(self.model, self.tokenizer, prompts, own, update_memory=True, **options)
        if self.memory != "own":
            # the memory is written as always; only this turn reads another memory, or the initial one
            read = self.model.init_stm(len(queries))
            if self.memory == "shuffled":
                read = own.select(torch.arange(len(queries)).roll(1))
            said, _ = answer(self.model, self.tokenizer, prompts, read, **options)
        return self.tokenizer.batch_decode(said, skip_special_tokens=True)


class HistoryArm:
    """Answers from the text of the whole conversation, or of the current turn only."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        full_history: bool,
        generation: dict[str, Any] = GREEDY,
    ):
        self.model, self.tokenizer, self.full_history, self.generation = model, tokenizer, full_history, generation
        self.histories: list[list[int]] | None = None

    def answer(self, queries: list[str], max_new_tokens: int) -> list[str]:
        histories = self.histories or [[] for _ in queries]
        prompts = encode_interactions(self.tokenizer, queries)["input_ids"]
        prompts = [history + prompt for history, prompt in zip(histories, prompts, strict=True)]
        said, _ = answer(self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, **self.generation)
        if self.full_history:
            self.histories = [prompt + ids for prompt, ids in zip(prompts, said, strict=True)]
        return self.tokenizer.batch_decode(said, skip_special_tokens=True)


def make_arm(
    model, tokenizer, memory: Memory = "own", *, full_history: bool = False, do_sample: bool = False
) -> RxTArm | HistoryArm:
    generation = SAMPLED if do_sample else GREEDY
    if isinstance(model, RxTForCausalLM):
        return RxTArm(model, tokenizer, memory, generation)
    if memory != "own":
        raise ValueError(f"memory={memory!r} needs a model with a memory, got {type(model).__name__}.")
    return HistoryArm(model, tokenizer, full_history, generation)


@torch.no_grad()
def recall(
    model: Any,
    tokenizer: Any,
    *,
    split: str = "seen",
    num_turns: int = 8,
    num_dialogues: int = 100,
    full_history: bool = False,
    memory: Memory = "own",
    do_sample: bool = False,
    first_seed: int = FIRST_TEST_SEED,
    max_new_tokens: int = 32,
    **dialogue_kwargs,
) -> dict:
    """
    Plays dialogues of a test split and scores every question. With `do_sample` the seed of torch's generator is set.

    Returns: recall (share of asked facts whose value is answered), its 95 % half-width, stale (share of questions
    about an overwritten fact answered with an older value), abstention on questions about facts not told, and recall
    by distance in turns and by number of live facts.
    """
    if memory == "shuffled" and num_dialogues < 2:
        raise ValueError(f"A shuffled memory is that of another dialogue: expected 2 or more, got {num_dialogues}.")
    model.eval()
    dialogues = [
        generate_dialogue(first_seed + row, split=split, num_turns=num_turns, **dialogue_kwargs)["interactions"]
        for row in range(num_dialogues)
    ]
    player = make_arm(model, tokenizer, memory, full_history=full_history, do_sample=do_sample)
    if do_sample:
        torch.manual_seed(first_seed)
    asked, stale, unknown, chat = [], [], [], []
    for turn in range(num_turns):
        interactions = [dialogue[turn] for dialogue in dialogues]
        answers = player.answer([interaction["query"] for interaction in interactions], max_new_tokens)
        for interaction, text in zip(interactions, answers, strict=True):
            score = score_answer(interaction, text)
            if interaction["kind"] == "ask":
                asked.append((score["correct"], interaction["distance"], interaction["live_facts"]))
                if interaction["stale"]:
                    stale.append(score["stale"])
            elif interaction["kind"] == "unknown":
                unknown.append(score["correct"])
            elif interaction["kind"] == "chat":
                chat.append(score["correct"])
    value = mean([correct for correct, _, _ in asked])
    error = None if value is None else round(1.96 * math.sqrt(value * (1 - value) / len(asked)), 4)
    return {
        "memory": memory,
        "do_sample": do_sample,
        "split": split,
        "turns": num_turns,
        "questions": len(asked),
        "recall": value,
        "recall_ci95": error,
        "stale": mean(stale),
        "stale_questions": len(stale),
        "abstention": mean(unknown),
        "chat": mean(chat),
        "by_distance": by_bucket((distance, correct) for correct, distance, _ in asked),
        "by_live_facts": by_bucket((live, correct) for correct, _, live in asked),
    }


@torch.no_grad()
def answer_perplexity(
    model: Any,
    tokenizer: Any,
    *,
    split: str = "seen",
    num_turns: int = 8,
    num_dialogues: int = 64,
    full_history: bool = False,
    first_seed: int = FIRST_TEST_SEED,
) -> float:
    """Returns the teacher-forced perplexity of the reference answers, with equal label masks for every model."""
    model.eval()
    collate = RxTEpisodeCollator(tokenizer.pad_token_id)
    total, count = 0.0, 0
    for row in range(num_dialogues):
        turns = generate_dialogue(first_seed + row, split=split, num_turns=num_turns)["interactions"]
        episode = encode_interactions(tokenizer, [turn["query"] for turn in turns], [turn["answer"] for turn in turns])
        if isinstance(model, RxTForCausalLM):
            features = [episode]
        elif not full_history:
            features = [{name: episode[name][turn] for name in episode} for turn in range(num_turns)]
        else:
            features = [{name: [token for turn in episode[name] for token in turn] for name in episode}]
        batch = collate(features)
        labels = batch.pop("labels")[..., 1:]
        logits = model(**batch).logits[..., :-1, :].float()
        real = labels != -100
        total += torch.nn.functional.cross_entropy(logits[real], labels[real], reduction="sum").item()
        count += int(real.sum())
    return math.exp(total / count)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Recall of facts over turns")
    parser.add_argument("model")
    parser.add_argument("--full-history", action="store_true", help="give a model without a memory the whole dialogue")
    parser.add_argument("--memory", default="own", choices=get_args(Memory), help="memory to read (default: own)")
    parser.add_argument("--split", nargs="+", default=["seen"])
    parser.add_argument("--turns", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--casual",
        type=float,
        default=0.0,
        help="share of casual phrases, which include those that training never sees (default: 0)",
    )
    parser.add_argument("--do-sample", action="store_true", help="sample at temperature 1 (default: greedy)")
    parser.add_argument("--dialogues", type=int, default=100)
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    for split in options.split:
        for turns in options.turns:
            result = recall(
                model,
                tokenizer,
                split=split,
                num_turns=turns,
                num_dialogues=options.dialogues,
                full_history=options.full_history,
                memory=options.memory,
                do_sample=options.do_sample,
                p_casual=options.casual,
            )
            print(json.dumps(result))


if __name__ == "__main__":
    main()
