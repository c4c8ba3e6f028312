# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
A conversation with a model that never reads the history: first by hand with `generate`, then with `RxTSession`.

    python examples/chat.py                 # the demo model that comes with the package
    python examples/chat.py path/to/model

It takes about ten seconds on a CPU, most of it for imports. Expected last line, whatever the model says before it:

    the saved memory goes on as the one in RAM: True
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import rxt_hf
from rxt_hf.session import RxTSession


def answer_by_hand(model, tokenizer, query, stm_cache):
    """One turn: the prompt holds this query alone, all that came before is in `stm_cache`."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": query}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **inputs, max_new_tokens=32, do_sample=False, stm_cache=stm_cache, return_dict_in_generate=True
    )
    answer = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"you> {query}\nrxt> {answer}")
    return out.stm_cache


def talk(session, query):
    print(f"you> {query}\nrxt> ", end="")
    for piece in session.stream(query):
        print(piece, end="", flush=True)
    print()


def main(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)

    print("-- by hand: the memory is a value that goes into generate and comes out of it")
    before = answer_by_hand(model, tokenizer, "My dog is called Mochi.", None)
    after = answer_by_hand(model, tokenizer, "I live in Oslo.", before)
    # the old value is still there: using it again is the undo
    moved = answer_by_hand(model, tokenizer, "I live in Lisbon.", before)
    for memory in (after, moved):
        answer_by_hand(model, tokenizer, "Where do I live?", memory)
    print(f"   {after.nbytes} bytes after {int(after.turns[0])} turns, {before.nbytes} after {int(before.turns[0])}")

    print("-- the same with a session, which keeps the memory and a log")
    session = RxTSession(model, tokenizer, max_new_tokens=32, do_sample=False)
    talk(session, "My dog is called Mochi.")
    fork = session.fork()
    talk(session, "I live in Oslo.")
    talk(fork, "I live in Lisbon.")
    for each in (session, fork):
        talk(each, "Where do I live?")
    session.undo()
    session.forget(0)
    print(f"   after undo and forget: {session.history}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.safetensors"
        fork.save(file)
        loaded = RxTSession.load(file, model, tokenizer, max_new_tokens=32, do_sample=False)
    same = loaded.send("What is my dog called?") == fork.send("What is my dog called?")
    print(f"the saved memory goes on as the one in RAM: {same}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else rxt_hf.DEMO)
