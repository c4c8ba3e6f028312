# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
The same as `finetune_trainer.py` with LoRA: the model stays as it is, and what was learned is a small adapter.

    python examples/finetune_peft.py                        # the demo model that comes with the package
    python examples/finetune_peft.py --model path/to/model --output-dir adapter

It needs `pip install ".[train]"`. It takes about half a minute on one CPU core. Expected last line:

    passwords recalled of 16: 0 before, 12 with the adapter, 0 with it switched off
"""

import argparse
import tempfile

from finetune_trainer import TEST_WORDS, ask, episodes, recalled
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import rxt_hf
from rxt_hf.data.collator import RxTEpisodeCollator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub repository; default: the demo")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--output-dir", help="where the adapter is saved; default: nowhere")
    options = parser.parse_args()

    path = options.model or rxt_hf.DEMO
    base, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    before = recalled(base, tokenizer)
    # These names are also those of the projections that read, encode and write the memory, so all of it is adapted;
    # exclude_modules=".*memory_.*" would leave the memory alone, target_modules=".*memory_.*_proj" the rest.
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            options.output_dir or scratch,
            max_steps=options.max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        Trainer(
            model,
            arguments,
            train_dataset=episodes(tokenizer, 512),
            data_collator=RxTEpisodeCollator(tokenizer.pad_token_id),
        ).train()
        folder = options.output_dir or scratch
        model.save_pretrained(folder)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), folder).merge_and_unload()
    ask(tuned, tokenizer, TEST_WORDS[0], show=True)
    counts = [before, recalled(tuned, tokenizer)]
    with model.disable_adapter():
        counts.append(recalled(base, tokenizer))
    found = "{} before, {} with the adapter, {} with it switched off".format(*counts)
    print(f"passwords recalled of {len(TEST_WORDS)}: {found}")


if __name__ == "__main__":
    main()
