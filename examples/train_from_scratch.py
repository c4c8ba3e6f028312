# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
A Reactive Transformer from nothing: tokenizer, model, `transformers.Trainer`, and a memory that works.

    python examples/train_from_scratch.py

takes about a minute on one core and ends with a line like

    colours recalled after one other turn: 50 of 50

A feature is an episode, a list of turns, and `labels` are the answers. One forward trains the memory through all its
turns. The shipped demo was trained in the same way on far richer dialogues: see examples/demo/train.py.
"""

import argparse
import random

import torch
from transformers import Trainer, TrainingArguments

from rxt_hf import RxTConfig, RxTForCausalLM
from rxt_hf.chat_template import encode_interactions, train_tokenizer
from rxt_hf.data.collator import RxTEpisodeCollator

THINGS = ["car", "house", "bike", "boat"]
COLOURS = ["red", "blue", "green", "black", "white", "yellow", "brown", "pink", "grey", "violet"]
CHAT = [("Hello!", "Hi there."), ("How are you?", "I am fine."), ("Thanks.", "You are welcome.")]


def dialogue(rng: random.Random) -> list[tuple[str, str]]:
    """A fact, something else, and a question about the fact; sometimes the fact changes on the way."""
    thing, colour, other = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(COLOURS)
    turns = [(f"My {thing} is {colour}.", "Good.")] + [rng.choice(CHAT)] * rng.randrange(2)
    if rng.random() < 0.3:
        turns, colour = [*turns, (f"My {thing} is {other}.", "Good.")], other
    return [*turns, (f"What colour is my {thing}?", f"It is {colour}.")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--output-dir", default="rxt-from-scratch")
    options = parser.parse_args()

    rng = random.Random(0)
    dialogues = [dialogue(rng) for _ in range(4000)]
    tokenizer = train_tokenizer((f" {text}" for turns in dialogues for turn in turns for text in turn), vocab_size=400)
    episodes = [
        encode_interactions(tokenizer, [query for query, _ in turns], [answer for _, answer in turns])
        for turns in dialogues
    ]
    torch.manual_seed(0)
    model = RxTForCausalLM(
        RxTConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_memory_slots=8,
            initializer_range=0.05,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=episodes,
        data_collator=RxTEpisodeCollator(tokenizer.pad_token_id),
    )
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(options.output_dir)

    model.eval()
    recalled = 0
    for _ in range(50):
        thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
        memory = None
        for query in (f"My {thing} is {colour}.", "Hello!", f"What colour is my {thing}?"):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": query}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**inputs, stm_cache=memory, max_new_tokens=16, return_dict_in_generate=True)
            memory = out.stm_cache
        answer = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        recalled += answer == f"It is {colour}."
    print(f"colours recalled after one other turn: {recalled} of 50")


if __name__ == "__main__":
    main()
