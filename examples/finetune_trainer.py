# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Teaches a model a new kind of fact with plain `transformers.Trainer`: whole dialogues, gradients through the memory.

    python examples/finetune_trainer.py                        # the demo model that comes with the package
    python examples/finetune_trainer.py --model path/to/model --output-dir tuned

It takes about half a minute on one CPU core. Expected last line:

    passwords recalled: 0 of 16 before, 13 of 16 after
"""

import argparse
import tempfile
from random import Random

from demo.facts import CHAT, VALUES
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import rxt_hf
from rxt_hf.chat_template import encode_interactions
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.session import RxTSession

STATEMENT, QUESTION = "The password of the tower is {}.", "What is the password of the tower?"
TEST_WORDS = VALUES["word"]
TRAINING_WORDS = sorted({word for words in VALUES.values() for word in words} - set(TEST_WORDS))


def dialogue(word: str, rng: Random) -> list[tuple[str, str]]:
    """(query, answer) of each turn; replace it by your own dialogues."""
    small_talk = [(query, answers[0]) for query, answers in rng.sample(CHAT, k=rng.randint(0, 2))]
    return [
        (STATEMENT.format(word), f"The password of the tower is {word}. I will remember it."),
        *small_talk,
        (QUESTION, f"The password is {word}."),
    ]


def episodes(tokenizer, count: int) -> list[dict]:
    """One row for each dialogue: the token ids of its turns, and labels that are -100 outside of the answers."""
    rng = Random(0)
    dialogues = [dialogue(rng.choice(TRAINING_WORDS), rng) for _ in range(count)]
    return [encode_interactions(tokenizer, *zip(*turns, strict=True)) for turns in dialogues]


def ask(model, tokenizer, word: str, *, show: bool = False) -> str:
    """The last answer of a short conversation about a word that is in no training dialogue."""
    session = RxTSession(model.eval(), tokenizer, max_new_tokens=32, do_sample=False)
    for query in (STATEMENT.format(word), "How are you?", QUESTION):
        answer = session.send(query)
        if show:
            print(f"you> {query}\nrxt> {answer}")
    return answer


def recalled(model, tokenizer) -> int:
    return sum(word in ask(model, tokenizer, word) for word in TEST_WORDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub repository; default: the demo")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--output-dir", help="where the tuned model is saved; default: nowhere")
    options = parser.parse_args()

    path = options.model or rxt_hf.DEMO
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    before = recalled(model, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            options.output_dir or scratch,
            max_steps=options.max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=episodes(tokenizer, 512),
            # batches of shape (dialogues, turns, tokens): the model goes through the memory by itself
            data_collator=RxTEpisodeCollator(tokenizer.pad_token_id),
            processing_class=tokenizer,
        )
        trainer.train()
        if options.output_dir:
            trainer.save_model()
    ask(trainer.model, tokenizer, TEST_WORDS[0], show=True)
    after = recalled(trainer.model, tokenizer)
    print(f"passwords recalled: {before} of {len(TEST_WORDS)} before, {after} of {len(TEST_WORDS)} after")


if __name__ == "__main__":
    main()
