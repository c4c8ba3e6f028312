# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
One conversation of very many turns, and very many conversations mixed on one model.

    PYTHONPATH=examples python benchmarks/endurance.py --output benchmarks/results/endurance.json

The first keeps a plain `STMCache` and says how time, RSS and bytes of state go with the turns. The second compares
each conversation, played in random order among the others, with the same one played alone. The third figure is what
the log of an `RxTSession`, the one thing that grows, costs in bytes a turn. About 12 minutes on one core.
"""

import argparse
import gc
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from demo.facts import generate_dialogue
from demo.recall import FIRST_TEST_SEED
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rxt_hf
from rxt_hf import RxTSession, STMCache
from rxt_hf.chat_template import encode_interactions
from rxt_hf.evaluation.speed import environment


def play(model: Any, memory: STMCache, prompt: torch.Tensor, **kwargs: Any) -> tuple[STMCache, list[int]]:
    """One greedy turn: the memory after it, and all its token ids."""
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), stm_cache=memory, do_sample=False, **kwargs)
    return out.stm_cache, out.sequences[0].tolist()


def one_conversation(model: Any, prompts: list[torch.Tensor], turns: int, **kwargs: Any) -> dict[str, Any]:
    """A tenth of the turns is warm-up for the RSS, a hundredth for the time."""
    memory, seconds, tenth = model.init_stm(1), array("d", bytes(8 * turns)), turns // 10
    rss, state_bytes = {}, {memory.nbytes}
    for turn in range(turns):
        start = time.perf_counter()
        memory, _ = play(model, memory, prompts[turn % len(prompts)], **kwargs)
        seconds[turn] = time.perf_counter() - start
        state_bytes.add(memory.nbytes)
        if (turn + 1) % tenth == 0:
            gc.collect()
            rss[turn + 1] = psutil.Process().memory_info().rss
    early, late = statistics.median(seconds[turns // 100 : tenth]), statistics.median(seconds[-tenth:])
    return {
        "turns": int(memory.turns[0]),
        "state_bytes": sorted(state_bytes),
        "largest_value": float(memory.states.abs().max()),
        "is_finite": bool(memory.states.isfinite().all()),
        "rss_bytes_by_turn": rss,
        "rss_growth": max(rss.values()) / rss[tenth] - 1,
        "early_turn_s": early,
        "late_turn_s": late,
        "late_by_early": late / early,
    }


def many_conversations(
    model: Any, prompts: list[torch.Tensor], conversations: int, turns: int, **kwargs: Any
) -> dict[str, int]:
    """Conversation n asks `prompts[n]` and those behind it. In random order on one model, then each alone."""
    memories, said = [model.init_stm(1)] * conversations, [[] for _ in range(conversations)]
    order = list(range(conversations)) * turns
    Random(0).shuffle(order)
    for number in order:
        prompt = prompts[number + len(said[number])]
        memories[number], token_ids = play(model, memories[number], prompt, **kwargs)
        said[number].append(token_ids)
    equal = 0
    for number in range(conversations):
        memory, alone = model.init_stm(1), []
        for prompt in prompts[number : number + turns]:
            memory, token_ids = play(model, memory, prompt, **kwargs)
            alone.append(token_ids)
        equal += torch.equal(memory.states, memories[number].states) and alone == said[number]
    distinct = len({memory.states.cpu().float().numpy().tobytes() for memory in memories})
    return {"conversations": conversations, "turns": turns, "bit_equal": equal, "distinct": distinct}


def session_log(model: Any, tokenizer: PreTrainedTokenizerFast, queries: list[str], **kwargs: Any) -> dict[str, Any]:
    """Bytes that the log of a session holds, and those it writes, for each turn."""
    session = RxTSession(model, tokenizer, **kwargs)
    for query in queries:
        session.send(query)
    log = session._state.log
    held = sum(sys.getsizeof(turn) + 8 + sum(map(sys.getsizeof, turn)) for turn in log)
    with tempfile.TemporaryDirectory() as folder:
        session.save(Path(folder, "memory"))
        written = Path(folder, "memory.json").stat().st_size
    return {
        "turns": len(log),
        "tokens_per_turn": sum(len(turn.token_ids) for turn in log) / len(log),
        "bytes_per_turn": held / len(log),
        "file_bytes_per_turn": written / len(log),
    }


def held_out_queries(count: int) -> list[str]:
    dialogues = (generate_dialogue(FIRST_TEST_SEED + n, split="seen", num_turns=64) for n in itertools.count())
    queries = (turn["query"] for dialogue in dialogues for turn in dialogue["interactions"])
    return list(itertools.islice(queries, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(rxt_hf.DEMO))
    parser.add_argument("--turns", type=int, default=10_000, help="of the one conversation; at least 200")
    parser.add_argument("--conversations", type=int, default=1_000, help="mixed on one model, ten turns each")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", default="endurance.json")
    options = parser.parse_args()
    if options.turns < 200:
        parser.error("--turns: a hundredth and a tenth of less than 200 turns have no median")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    queries = held_out_queries(max(1_000, options.conversations + 10))
    rows = encode_interactions(tokenizer, queries)["input_ids"]
    prompts = [torch.tensor([row], device=options.device) for row in rows]
    kwargs = {"max_new_tokens": options.max_new_tokens}
    report = {
        "environment": environment(options.device) | {"dtype": options.dtype},
        "command": shlex.join(["python", *sys.argv]),
        "options": vars(options) | {"model": Path(options.model).name},
        "one_conversation": one_conversation(model, prompts, options.turns, **kwargs),
        "many_conversations": many_conversations(model, prompts, options.conversations, 10, **kwargs),
        "session_log": session_log(model, tokenizer, queries[: min(1_000, options.turns)], **kwargs),
    }
    text = json.dumps(report, indent=1)
    Path(options.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
