# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
What each stage and each option of the memory is worth: many small models on the same generated fact dialogues.

    PYTHONPATH=examples python benchmarks/options.py --output benchmarks/results/options.json

Every model takes equally many steps over the same dialogues of its seed, and answers the same test dialogues, greedy
and closed loop. Models that the output holds already are kept, so that a stopped run goes on. Two minutes a model.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo.facts import MIX as FACT_MIX
from demo.facts import corpus_texts, generate_dialogue
from demo.recall import FIRST_TEST_SEED, recall
from demo.train import encode_dialogue
from tables import options_table
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from rxt_hf import RxTConfig, RxTForCausalLM
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.data.collator import RxTEpisodeCollator, RxTPreTrainingCollator
from rxt_hf.evaluation.memory import effective_rank
from rxt_hf.evaluation.speed import environment
from rxt_hf.training.loop import MuonAdamW, learning_rate_factor
from rxt_hf.training.pretraining import RxTForPreTraining
from rxt_hf.training.stages import set_training_stage

MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "num_memory_slots": 24,
    "memory_attention_type": "simple",
}
# by name: fields of the configuration, the writes that gradients flow back through, or the stages before stage 4 with
# their shares of the steps
OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "stages 1 + 2": {"stages": {"pretraining": 0.035, "finetuning": 0.035}},
    "stages 1 + 2 + 3": {"stages": {"pretraining": 0.035, "finetuning": 0.035, "memory_attention": 0.03}},
    "back-propagation through 1 write": {"bptt_turns": 1},
    "back-propagation through 4 writes": {"bptt_turns": 4},
    "memory attention: self": {"memory_attention_type": "self"},
    "memory attention: interlayer": {"memory_attention_type": "interlayer"},
    "memory attention: self_interlayer": {"memory_attention_type": "self_interlayer"},
    "gate: one for each slot": {"memory_gate_granularity": "slot"},
    "gate: static, each slot": {"memory_gate_type": "static", "memory_gate_granularity": "slot"},
    "gate: none, a plain sum": {"memory_gate_activation": "none"},
    "initial memory: random": {"memory_init": "random"},
    "initial memory: zeros": {"memory_init": "zeros"},
    "8 slots": {"num_memory_slots": 8},
    "64 slots": {"num_memory_slots": 64},
}
# (share of the steps, turns of a dialogue)
CURRICULUM = ((0.06, 2), (0.2, 4), (0.75, 8), (1.0, 16))
TURNS_PER_STEP = 64
MIX: dict[str, Any] = FACT_MIX | {"p_overwrite": 0.14, "p_ask": 0.45, "p_open": 0.0, "p_two": 0.0}
CASES = {"seen": {8: 60, 16: 40, 32: 20}, "unseen": {8: 60}}


class Steps(Dataset):
    """One item is one step's batch."""

    def __init__(self, features: list[list[dict]], collator: RxTEpisodeCollator):
        self.features, self.collator = features, collator

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(index)
        return self.collator(self.features[index])


def dialogues(tokenizer: Any, seed: int, steps: int) -> Iterator[list[dict]]:
    for step in range(steps):
        turns = next(turns for share, turns in CURRICULUM if step < share * steps)
        first = (seed * steps + step) * TURNS_PER_STEP
        yield [
            encode_dialogue(tokenizer, generate_dialogue(first + row, num_turns=turns, **MIX))
            for row in range(TURNS_PER_STEP // turns)
        ]


def as_interactions(episodes: list[dict]) -> list[dict]:
    return [
        {name: episode[name][turn] for name in episode}
        for episode in episodes
        for turn in range(len(episode["labels"]))
    ]


def train(model: Any, stage: str, data: Dataset, folder: str, seed: int) -> None:
    set_training_stage(model, stage)
    steps = len(data)  # ty: ignore[invalid-argument-type]
    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=3e-3,
        adam_beta2=0.98,
        weight_decay=0.01,
        max_grad_norm=0.5,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        seed=seed,
    )
    optimizer = MuonAdamW(model, args)
    factor = partial(learning_rate_factor, steps=steps, warmup_steps=min(50, steps // 4))
    Trainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=lambda batches: batches[0],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)),
    ).train()


def trained(tokenizer: Any, option: dict[str, Any], episodes: list[list[dict]], seed: int) -> tuple[Any, float]:
    """The model, and the CPU seconds that it took."""
    stages = option.get("stages", {})
    fields = {name: value for name, value in option.items() if name not in ("stages", "bptt_turns")}
    config = RxTConfig(**MODEL | fields | {"vocab_size": len(tokenizer)})
    torch.manual_seed(seed)
    model = RxTForPreTraining(config) if stages else RxTForCausalLM(config)
    model.set_bptt_turns(option.get("bptt_turns"))
    # at these sizes plain matrix products in bfloat16 are the fastest attention on a CPU
    model.set_attn_implementation("eager")
    plain = RxTEpisodeCollator(tokenizer.pad_token_id)
    masked = RxTPreTrainingCollator(tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id)
    start, done = time.process_time(), 0
    with TemporaryDirectory() as folder:
        for stage, share in stages.items():
            part = episodes[done : done + round(share * len(episodes))]
            done += len(part)
            if stage == "memory_attention":
                data = Steps(part, plain)
            else:
                rows = [as_interactions(step) for step in part]
                if stage == "pretraining":
                    rows = [[row | {"labels": row["input_ids"]} for row in step] for step in rows]
                data = Steps(rows, masked)
            train(model, stage, data, folder, seed)
        if stages:
            weights = model.state_dict()
            model = RxTForCausalLM(config)
            model.set_attn_implementation("eager")
            model.load_state_dict(weights)
        train(model, "memory_aware", Steps(episodes[done:], plain), folder, seed)
    return model.eval(), time.process_time() - start


@torch.no_grad()
def rank(model: Any, tokenizer: Any, num_turns: int = 8, rows: int = 16) -> float:
    """Effective rank of the slots after reference dialogues, mean over layers."""
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + rows)
    episodes = [
        encode_dialogue(tokenizer, generate_dialogue(seed, split="seen", num_turns=num_turns)) for seed in seeds
    ]
    batch = RxTEpisodeCollator(tokenizer.pad_token_id)(episodes)
    memory = model.init_stm(rows)
    for turn in range(num_turns):
        memory = model.update_memory(memory, batch["input_ids"][:, turn], batch["attention_mask"][:, turn])
    return mean(effective_rank(memory.states))


def measure(model: Any, tokenizer: Any) -> dict[str, float | None]:
    found = {
        (split, turns): recall(
            model, tokenizer, split=split, num_turns=turns, num_dialogues=number, p_two=0.0, p_open=0.0
        )
        for split, numbers in CASES.items()
        for turns, number in numbers.items()
    }
    figures = {f"{turns} turns": row["recall"] for (split, turns), row in found.items() if split == "seen"}
    figures["unseen pairs"] = found["unseen", 8]["recall"]
    figures["stale at 16"] = found["seen", 16]["stale"]
    figures["rank after 8"] = round(rank(model, tokenizer), 2)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", default="options.json", help="models that it holds already are kept")
    options = parser.parse_args(argv)
    path = Path(options.output)
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": options.steps, "options": {}}
    if report["steps"] != options.steps:
        raise ValueError(f"{path} holds models of {report['steps']} steps, not {options.steps}: use another output.")
    report["environment"] = environment("cpu")
    report["model"] = MODEL
    tokenizer = train_tokenizer(corpus_texts(10_000), vocab_size=1024, max_length=128)
    for seed in options.seeds:
        episodes = list(dialogues(tokenizer, seed, options.steps))
        for name in options.options:
            runs = report["options"].setdefault(name, {})
            if str(seed) in runs:
                continue
            model, seconds = trained(tokenizer, OPTIONS[name], episodes, seed)
            facts = {"CPU s": round(seconds, 1), "parameters": model.num_parameters()}
            runs[str(seed)] = measure(model, tokenizer) | facts
            print(f"seed {seed}  {name:40} {runs[str(seed)]}", flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(options_table(report))


if __name__ == "__main__":
    main()
