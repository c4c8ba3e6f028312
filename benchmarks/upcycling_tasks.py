# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
What a converted model does with its memory, beside the language model that re-reads its history: answers, greedy,
under the true turns before them; and what each costs.

    PYTHONPATH=examples python benchmarks/upcycling_tasks.py --data path/to/sgd --measures probes facts long cost \
        --upcycled 64_slots=path/to/run --baselines window=path/to/other

    probes   the questions of the test dialogues, each after the last turn: share that is exactly right
    facts    dialogues of 8, 32 and 64 turns in which facts are told and asked for, with values and names that no
             training has seen: share of the answers that hold the value
    long     conversations of 500, 1,000 and 4,000 tokens: codes told once among turns of the test dialogues
             (needle), and boxes that are carried about (tracking), asked for in the end
    text     perplexity of plain text without a memory, which nothing was trained on (`--text`)
    cost     CPU time of a turn and its decoding, the write's share, bytes of state; for models with a memory

`--untrained` names the arms that need no training, `--baselines` what benchmarks/upcycling_baselines.py wrote. Figures
are added to the JSON file beside those of former calls.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from demo.facts import contains_value, generate_dialogue
from histories import answers_to, history_probes
from tables import upcycling_cost, upcycling_long, upcycling_tasks
from torch.nn import functional as F
from transformers.generation.streamers import BaseStreamer
from upcycling import RESULTS, loaded
from upcycling_baselines import tokens_between

from rxt_hf.convert import convert_tokenizer, from_llm, load_adapted
from rxt_hf.data.readers import encode_turns, read_episodes, read_jsonl, sampled
from rxt_hf.evaluation.memory import Dialogues, probes
from rxt_hf.evaluation.rollout import GREEDY, UNANSWERED, play, texts
from rxt_hf.evaluation.speed import Turns, environment, interleaved, ratio

# the table that shows each measure
TABLES = dict.fromkeys(("probes", "facts", "text"), upcycling_tasks) | {"long": upcycling_long, "cost": upcycling_cost}
UNTRAINED = ("query_only", "full_history", "day_one")
NEW_TOKENS = 24
FACT_TURNS = (8, 32, 64)
LENGTHS = (500, 1000, 4000)
# turns of 64 tokens, half of them an answer; turn 9 is behind 512 tokens
QUERY_TOKENS, ANSWER_TOKENS, COST_TURNS = 32, 32, (9, 17, 63)
THINGS = ("locker", "gate", "alarm", "voucher", "safe", "bike lock", "suitcase", "garage", "printer", "mailbox")
BOXES = ("red", "blue", "green", "yellow", "white", "black")
ROOMS = ("kitchen", "cellar", "attic", "garage", "hall", "office", "bedroom", "bathroom", "garden", "shed", "library")


class Arm(NamedTuple):
    """A model to measure; one without a memory reads the last `window` tokens before a turn, or all of them."""

    name: str
    model: Any
    tokenizer: Any
    has_memory: bool
    window: int | None = None
    between: Sequence[int] = ()

    @property
    def memories(self) -> tuple[str, ...]:
        return ("own", "cleared") if self.has_memory else ("none",)

    def before(self, turns: Sequence[list[int]]) -> list[int]:
        """What stands before the next turn, of the turns so far."""
        told = [token for ids in turns for token in (*ids, *self.between)]
        return told if self.window is None else told[max(0, len(told) - self.window) :]


@contextmanager
def measuring() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


# What is answered


def played(arm: Arm, dialogues: Sequence[Mapping[str, Any]], memory: str) -> list[tuple[Mapping[str, Any], str]]:
    """The turns of the dialogues that are asked (`"asked": True`), with the greedy answers behind the true turns."""
    if arm.has_memory:
        found = []
        for start in range(0, len(dialogues), 8):
            chunk = dialogues[start : start + 8]
            options = {"max_new_tokens": NEW_TOKENS, "write_reference": True, "clear_memory": memory == "cleared"}
            turns = play(arm.model, arm.tokenizer, chunk, is_asked=is_asked, **options, **GREEDY)
            for dialogue, said in zip(chunk, turns, strict=True):
                pairs = zip(dialogue["interactions"], texts(arm.tokenizer, said), strict=True)
                found += [(turn, text) for turn, text in pairs if is_asked(turn)]
        return found
    asked, prompts = [], []
    for dialogue in dialogues:
        turns = dialogue["interactions"]
        told = [ids for ids, _ in encode_turns(arm.tokenizer, turns)]
        for number, turn in enumerate(turns):
            if is_asked(turn):
                ((prompt, _),) = encode_turns(arm.tokenizer, [turn | UNANSWERED])
                asked.append(turn)
                prompts.append(arm.before(told[:number]) + prompt)
    return list(zip(asked, answers_to(arm.model, arm.tokenizer, prompts, NEW_TOKENS), strict=True))


def is_asked(turn: Mapping[str, Any]) -> bool:
    return bool(turn.get("asked"))


def right(arm: Arm, dialogues: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each memory the share of the answers that hold the value, and of those that hold a former one instead."""
    found = {}
    for memory in arm.memories:
        is_right, is_stale = [], []
        for turn, text in played(arm, dialogues, memory):
            is_right.append(contains_value(text, turn["value"]))
            is_stale.append(not is_right[-1] and any(contains_value(text, value) for value in turn["stale"]))
        shares = {"right": statistics.mean(is_right), "stale": statistics.mean(is_stale)}
        found[memory] = {name: round(share, 4) for name, share in shares.items()} | {"questions": len(is_right)}
    return found


def measure_probes(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """By data set and memory, what [`rxt_hf.evaluation.memory.probe_scores`] gives."""
    found = {}
    for folder in options.data:
        test = sampled(folder, "test", options.dialogues)
        dialogues = Dialogues(arm.tokenizer, test, max_tokens=options.tokens)
        if arm.has_memory:
            scores: Any = probes(arm.model, arm.tokenizer, dialogues, max_new_tokens=NEW_TOKENS)
        else:
            read = {"before": arm.before, "max_new_tokens": NEW_TOKENS}
            scores = {"none": history_probes(arm.model, arm.tokenizer, dialogues, **read)}
        found[f"{Path(folder).name}, {len(dialogues)} dialogues"] = scores
    return found


def fact_dialogue(seed: int, turns: int) -> dict[str, Any]:
    """Values out of no list on even seeds, names out of none on odd ones."""
    split = ("new", "open")[seed % 2]
    interactions = generate_dialogue(seed, split=split, num_turns=turns)["interactions"]
    return {"interactions": [dict(turn) | {"asked": turn["kind"] == "ask"} for turn in interactions]}


def measure_facts(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """By turns of the dialogue."""
    number = options.conversations
    return {str(turns): right(arm, [fact_dialogue(seed, turns) for seed in range(number)]) for turns in FACT_TURNS}


# Long conversations


def needle(rng: Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Three codes, told once each, and the questions for them."""
    told, asked = [], []
    for thing in rng.sample(THINGS, 3):
        code = str(rng.randrange(1000, 10_000))
        told.append({"query": f"My {thing} code is {code}.", "answer": f"I will remember your {thing} code."})
        question = {"query": f"What is my {thing} code?", "answer": f"Your {thing} code is {code}."}
        asked.append(question | {"asked": True, "value": code, "stale": []})
    return told, asked


def tracking(rng: Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Three boxes that are in two rooms one after the other, and the questions where each is in the end."""
    rooms: dict[str, list[str]] = {box: rng.sample(ROOMS, 2) for box in rng.sample(BOXES, 3)}
    order = [box for box in rooms for _ in range(2)]
    rng.shuffle(order)
    told, moved = [], dict.fromkeys(rooms, 0)
    for box in order:
        room = rooms[box][moved[box]]
        moved[box] += 1
        told.append({"query": f"The {box} box is in the {room} now.", "answer": f"Okay, the {box} box was moved."})
    asked = []
    for box, (former, room) in rooms.items():
        question = {"query": f"Where is the {box} box now?", "answer": f"The {box} box is in the {room}."}
        asked.append(question | {"asked": True, "value": room, "stale": [former]})
    return told, asked


TASKS: dict[str, Callable[[Random], Any]] = {"needle": needle, "tracking": tracking}


def long_conversation(
    task: str, seed: int, others: Sequence[Mapping[str, Any]], sizes: Sequence[int], tokens: int, told_tokens: int = 25
) -> dict[str, Any]:
    """What a task tells, in order at random places among turns of other dialogues, and its questions in the end."""
    rng = Random(f"{task}:{tokens}:{seed}")
    told, asked = TASKS[task](rng)
    room, place, body = tokens - told_tokens * len(told), rng.randrange(len(others)), []
    while room >= sizes[place % len(others)]:
        room -= sizes[place % len(others)]
        body.append(others[place % len(others)])
        place += 1
    places = sorted(rng.choices(range(len(body) + 1), k=len(told)))
    for offset, (where, turn) in enumerate(zip(places, told, strict=True)):
        body.insert(where + offset, turn)
    return {"interactions": [*body, *asked]}


def measure_long(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """By tokens of the conversation and task."""
    dialogues = islice(read_episodes(options.data[0], "test"), 200)
    rows = [turn for dialogue in dialogues for turn in dialogue["interactions"]]
    turns = [{"query": turn["query"], "answer": turn["answer"]} for turn in rows if turn["query"] and turn["answer"]]
    lengths = [len(ids) for ids, _ in encode_turns(arm.tokenizer, turns)]
    kept = [place for place, length in enumerate(lengths) if length <= options.tokens]
    others, sizes = [turns[place] for place in kept], [lengths[place] for place in kept]
    found: dict[str, Any] = {}
    for tokens in options.lengths:
        found[str(tokens)] = {}
        for task in TASKS:
            told = [long_conversation(task, seed, others, sizes, tokens) for seed in range(options.conversations)]
            found[str(tokens)][task] = right(arm, told)
    return found


# What it is as a language model, and what it costs


def measure_text(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the first 256 tokens of pieces of plain text, read without a memory."""
    nats = []
    for row in islice(read_jsonl(options.text), options.conversations):
        ids = torch.tensor([arm.tokenizer(row["text"], add_special_tokens=False)["input_ids"][:256]])
        logits = arm.model(input_ids=ids.to(arm.model.device)).logits[0, :-1].float()
        nats.append(F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="none"))
    total = torch.cat(nats).double()
    return {"perplexity": round(math.exp(total.mean().item()), 4), "tokens": len(total)}


class CpuTimes(BaseStreamer):
    """The CPU time of the process at which `generate` handed out each token, without the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.process_time())

    def end(self) -> None:
        del self.times[:1]


def timed(model: Any, inputs: Mapping[str, Any], **options: Any) -> dict[str, float]:
    """CPU seconds of a turn, of a token after the first, and of what comes after the last: the write."""
    times, start = CpuTimes(), time.process_time()
    lengths = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS}
    model.generate(**inputs, **lengths, streamer=times, return_dict_in_generate=True, **options, **GREEDY)
    end = time.process_time()
    first, last = times.times[0], times.times[-1]
    return {"turn_s": end - start, "token_s": (last - first) / (ANSWER_TOKENS - 1), "write_s": end - last}


def timed_write(model: Any, inputs: Mapping[str, Any], encoding: str) -> dict[str, float]:
    """[`timed`] with a memory that is written in passing (`"decoder_in_passing"`) or apart (`"decoder"`)."""
    before, model.config.memory_encoding = model.config.memory_encoding, encoding
    try:
        return timed(model, inputs)
    finally:
        model.config.memory_encoding = before


def turns_of(model: Any, source: Any, batch_size: int, numbers: Sequence[int]) -> Turns:
    tokens = {"query_tokens": QUERY_TOKENS, "answer_tokens": ANSWER_TOKENS}
    return Turns(model, source, numbers, batch_size=batch_size, **tokens)


def fresh(turns: Turns, number: int, kind: str, model: Any) -> dict[str, float]:
    return timed(model, turns.inputs(kind, number))


def measure_cost(arm: Arm, options: argparse.Namespace, source: Any) -> dict[str, Any]:
    """Medians over rounds in which all arms alternate, one thread, in float32."""
    model, rounds = arm.model, options.rounds
    parameters = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, source)]
    found: dict[str, Any] = {"parameters_added": parameters[0] / parameters[1] - 1, "decode_share": {}}
    for batch_size in (1, 8):
        turns = turns_of(model, source, batch_size, [9])
        cells = {
            "memory": partial(timed, model, turns.inputs("rxt", 9)),
            "plain": partial(timed, source, turns.inputs("current_turn", 9)),
        }
        interleaved(cells, 1)
        samples = interleaved(cells, rounds, math.inf)
        found["decode_share"][str(batch_size)] = round(ratio(samples["plain"], samples["memory"], "token_s"), 4)
    turns = turns_of(model, source, 1, COST_TURNS)
    written = {
        name: partial(timed_write, model, turns.inputs("rxt", 9), encoding)
        for name, encoding in (("in_passing", "decoder_in_passing"), ("apart", "decoder"))
    }
    samples = interleaved(written, rounds, math.inf)
    found["write_share"] = {name: round(ratio(each, each, "write_s", "turn_s"), 4) for name, each in samples.items()}
    found["turns"] = {}
    kinds = {"memory": ("rxt", model), "kv_cache": ("persistent_cache", source), "re_read": ("full_history", source)}
    for number in COST_TURNS:
        # a cache grows as it is used, so each turn gets inputs of its own
        cells = {name: partial(fresh, turns, number, kind, each) for name, (kind, each) in kinds.items()}
        samples = interleaved(cells, max(1, min(rounds, 3)), math.inf)
        seconds = {name: round(statistics.median(row["turn_s"] for row in rows), 4) for name, rows in samples.items()}
        kept = turns.cache_before(number)
        states = {"memory": turns.memories[number].nbytes}
        states["kv_cache"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
        history = (number - 1) * (QUERY_TOKENS + ANSWER_TOKENS)
        found["turns"][str(history)] = {"turn_cpu_s": seconds, "state_bytes": states}
    return found


def arms(options: argparse.Namespace) -> Iterator[Arm]:
    """The arms that were asked for, one in memory at a time."""
    source, source_tokenizer = loaded(options.base)
    tokenizer = convert_tokenizer(source_tokenizer, max_length=source.config.max_position_embeddings)
    history = {"tokenizer": tokenizer, "has_memory": False, "between": tokens_between(source_tokenizer, tokenizer)}
    for name in options.untrained:
        if name == "day_one":
            model = from_llm(source, num_memory_slots=options.slots, tokenizer=tokenizer)
            yield Arm(f"day_one, {options.slots} slots", model, tokenizer, True)
        else:
            yield Arm(name, source, window=0 if name == "query_only" else None, **history)
    for name, _, folder in (given.partition("=") for given in options.upcycled):
        yield Arm(name, *load_adapted(source, source_tokenizer, folder), True)
    for name, _, folder in (given.partition("=") for given in options.baselines):
        from peft import PeftModel

        window = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["history"]
        # merging changes the model that it begins with
        adapted = PeftModel.from_pretrained(loaded(options.base)[0], folder).merge_and_unload()
        yield Arm(name, adapted.eval(), window=window, **history)


def measured(arm: Arm, measure: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a measure gives; None where it has no meaning."""
    if measure == "cost":
        return measure_cost(arm, options, loaded(options.base)[0]) if arm.has_memory else None
    measures = {"probes": measure_probes, "facts": measure_facts, "long": measure_long, "text": measure_text}
    with measuring():
        return measures[measure](arm, options)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="folder of a language model, or smollm2")
    parser.add_argument("--data", nargs="+", required=True, help="folders with the split test; long takes the first")
    parser.add_argument("--text", help="JSONL file of rows with a text, for the measure text")
    parser.add_argument("--measures", nargs="+", choices=tuple(TABLES), default=["probes", "facts", "long"])
    parser.add_argument("--untrained", nargs="*", choices=UNTRAINED, default=[], help="arms that need no training")
    parser.add_argument("--upcycled", nargs="*", default=[], help="NAME=FOLDER of trained models with a memory")
    parser.add_argument("--baselines", nargs="*", default=[], help="NAME=FOLDER of trained models without one")
    parser.add_argument("--slots", type=int, default=64, help="slots of day_one")
    parser.add_argument("--dialogues", type=int, default=100, help="test dialogues of each folder, for probes")
    parser.add_argument("--conversations", type=int, default=20, help="of each kind of facts, long and text")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the long conversations")
    parser.add_argument("--tokens", type=int, default=70, help="a dialogue ends before a longer interaction")
    parser.add_argument("--rounds", type=int, default=7, help="of the measure cost")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file that the figures are added to")
    options = parser.parse_args(argv)
    if "text" in options.measures and options.text is None:
        parser.error("the measure text needs --text FILE")
    torch.set_num_threads(1)
    for arm in arms(options):
        for measure in options.measures:
            start = time.process_time()
            if (figures := measured(arm, measure, options)) is None:
                continue
            report = json.loads(options.output.read_text()) if options.output.exists() else {"arms": {}}
            figures["command"] = " ".join(["python", "benchmarks/upcycling_tasks.py", *(argv or sys.argv[1:])])
            figures["cpu_seconds"] = round(time.process_time() - start)
            report.setdefault("tasks", {}).setdefault(measure, {}).setdefault(arm.name, {}).update(figures)
            report["environment"] = environment("cpu")
            options.output.write_text(json.dumps(report, indent=1) + "\n")
            print(TABLES[measure](report), flush=True)


if __name__ == "__main__":
    main()
