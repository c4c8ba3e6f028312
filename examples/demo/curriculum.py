# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Reinforcement learning of the demo: dialogues from short to long, back to topics of long ago, and their reward."""

import math
from collections.abc import Mapping
from random import Random
from typing import Any, cast

from torch.utils.data import Dataset

from demo.facts import ATTRIBUTES, MIX, Dialogue, DialogueWriter, Interaction, generate_dialogue, score_answer
from demo.write import QUESTIONS, marked

# (share of the run, turns of a dialogue, share of dialogues that come back to a topic after others)
CURRICULUM = ((0.3, 8, 0.0), (0.65, 16, 0.25), (1.0, 16, 0.5))
FIRST_SEED = 300_000_000


def long_range_dialogue(seed: int, *, num_turns: int = 16, num_facts: int = 3, split: str = "train") -> Dialogue:
    """
    Returns a dialogue with a change of topic: `num_facts` statements, then small talk, statements and questions about
    other things, and finally a question about each of the first facts.
    """
    if num_turns < 2 * num_facts or num_facts < 1:
        raise ValueError(f"{num_facts} facts need at least {2 * num_facts} turns and one fact, got {num_turns} turns.")
    rng = Random(f"long_range:{split}:{seed}")
    writer = DialogueWriter(rng, split, p_open=0.5, p_noise=0.15, max_live=len(ATTRIBUTES), only_open=split == "open")
    turns, topic = [], []
    for writer.turn in range(num_turns):
        others = [fact for fact in writer.facts.values() if fact not in topic]
        choice = rng.random()
        if writer.turn < num_facts:
            turns.append(writer.state(p_two=0.0))
            topic = list(writer.facts.values())
        elif writer.turn >= num_turns - num_facts:
            turns.append(writer.ask(topic[writer.turn - num_turns]))
        elif choice < 0.4 and others:
            turns.append(writer.ask(others[int(rng.random() * len(others))]))
        elif choice < 0.7 and len(writer.facts) < writer.max_live:
            turns.append(writer.state(p_two=0.0))
        else:
            turns.append(writer.chat())
    return Dialogue(seed=seed, split=split, interactions=turns)


class FactCurriculum(Dataset):
    """
    Dialogues about facts. Item i depends only on i, so runs resume exactly. Later items are longer and return to
    earlier topics; the items of one step have equally many turns. Use it with `train_sampling_strategy="sequential"`.
    """

    def __init__(self, steps: int, dialogues_per_step: int, first_seed: int = FIRST_SEED):
        self.steps, self.dialogues_per_step, self.first_seed = steps, dialogues_per_step, first_seed

    def __len__(self) -> int:
        return self.steps * self.dialogues_per_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        step = index // self.dialogues_per_step
        stages = (stage for stage in CURRICULUM if step < stage[0] * self.steps or stage is CURRICULUM[-1])
        _, turns, long_range = next(stages)
        seed = self.first_seed + index
        if Random(f"curriculum:{seed}").random() < long_range:
            dialogue = long_range_dialogue(seed, num_turns=turns)
        else:
            # statements of two facts would pad all turns to their length
            mix: dict[str, Any] = MIX | {"p_two": 0.0}
            dialogue = generate_dialogue(seed, num_turns=turns, **mix)
        # an answer draws on the turn that stated its fact, not on those that said it again
        marked_turns = [{**turn, **marked(turn, "distance_stated")} for turn in dialogue["interactions"]]
        return {**dialogue, "interactions": marked_turns}


def fact_reward(turn: Mapping[str, Any], answer: str) -> float:
    """
    Returns 1 if the value asked for is in the answer exactly and no older one, or if the model says of an unknown fact
    that it was not told, else 0; NaN for turns that ask for nothing.
    """
    return float(score_answer(cast("Interaction", turn), answer)["correct"]) if turn["kind"] in QUESTIONS else math.nan
