# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Recall of the demo, its controls and its baselines on held-out fact dialogues, greedy and closed loop.

    PYTHONPATH=examples python benchmarks/fact_recall.py --first-run DIR --full-history DIR --current-turn DIR

DIR are folders of `PYTHONPATH=examples python -m demo.train`: the demo's first run, to which `--arm full_history` and
`--arm current_turn` are compared, since the demo was trained further than they were. Without them only the demo is
measured. About 15 minutes on one core.
"""

import argparse
import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from demo.facts import ATTRIBUTES, contains_value, generate_dialogue, score_answer
from demo.recall import FIRST_TEST_SEED, answer_perplexity, make_arm, recall
from tables import demo_baselines, recall_by_turns
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rxt_hf
from rxt_hf.chat_template import encode_interactions
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.evaluation.memory import effective_rank, mean
from rxt_hf.evaluation.speed import environment

# turns of a dialogue, and how many dialogues give a few hundred questions
DIALOGUES = {4: 400, 8: 200, 16: 120, 32: 60, 64: 40}
ARMS = ("first_run", "full_history", "current_turn")
CASES = [("seen", turns) for turns in (8, 16, 32, 64)]
CASES += [("unseen", 8), ("unseen", 16), ("unseen", 32), ("open", 4), ("open", 8), ("open", 16)]
CASES += [("new", 4), ("new", 8), ("new", 16)]
# in phrases that training never sees
CASUAL_CASES = [("seen", turns) for turns in (8, 16, 32)]
# every statement tells two or three facts, joined as training never sees
INTRODUCTIONS = [("seen", turns) for turns in (8, 16)]


def measure(model, tokenizer, share: float, *, full_history: bool = False, cases=CASES, memory="own", **mix) -> dict:
    rows = []
    for split, turns in cases:
        row = recall(
            model,
            tokenizer,
            split=split,
            num_turns=turns,
            num_dialogues=max(2, int(DIALOGUES[turns] * share)),
            full_history=full_history,
            memory=memory,
            **mix,
        )
        print(f"  {split:7}{turns:3} turns  recall {row['recall']}  ({row['questions']} questions)", flush=True)
        rows.append(row)
    result = {"parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype), "recall": rows}
    if memory == "own" and not mix:
        result["answer_perplexity"] = {
            turns: round(answer_perplexity(model, tokenizer, num_turns=turns, full_history=full_history), 4)
            for turns in (8, 16, 32, 64)
        }
    return result


@torch.no_grad()
def measure_foreign(model, tokenizer, turns: int, share: float) -> dict:
    """
    What becomes of things that no attribute is about, of kinds that training never sees: how many are refused, and
    how many come back when all attributes are asked for after the dialogue.
    """
    number = max(2, int(DIALOGUES[turns] * share))
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + number)
    dialogues = [generate_dialogue(s, split="seen", num_turns=turns, p_foreign=0.3)["interactions"] for s in seeds]
    player, refused = make_arm(model, tokenizer), {"statements": [], "questions": []}
    for turn in range(turns):
        now = [dialogue[turn] for dialogue in dialogues]
        for interaction, said in zip(now, player.answer([each["query"] for each in now], 32), strict=True):
            if interaction["kind"] == "foreign":
                kind = "statements" if interaction["value"] else "questions"
                refused[kind].append(score_answer(interaction, said)["correct"])
    memory, filed, right = player.stm_cache, set(), []
    for name, attribute in ATTRIBUTES.items():
        player.stm_cache = memory
        answers = player.answer([attribute.questions[0]] * number, 32)
        for row, (dialogue, said) in enumerate(zip(dialogues, answers, strict=True)):
            told = [value for each in dialogue for key, value in told_facts(each) if key == name]
            right.append(contains_value(said, told[-1]) if told else "not told me" in said)
            values = {each["value"] for each in dialogue if each["kind"] == "foreign" and each["value"]}
            filed |= {(row, value) for value in values - {*told} if contains_value(said, value)}
    result = {"split": "seen", "turns": turns, "statements": len(refused["statements"])}
    result |= {f"{kind}_refused": mean(found) for kind, found in refused.items()}
    result |= {"filed": round(len(filed) / len(refused["statements"]), 4), "attributes_right": mean(right)}
    print(f"  foreign {turns:3} turns  {result}", flush=True)
    return result


def told_facts(interaction: dict) -> list[tuple[str, str]]:
    if interaction["kind"] not in ("state", "overwrite"):
        return []
    return [(interaction["attribute"], interaction["value"]), *interaction["also"]]


def training(folder: str) -> dict:
    """What the training run wrote down, if this is its folder or the demo's."""
    if Path(folder) == rxt_hf.DEMO:
        runs = json.loads(Path(__file__).with_name("results").joinpath("demo_training.json").read_text())["runs"]
        return {f"training_{name}": sum(run[name] for run in runs) for name in ("cpu_seconds", "steps")}
    if not Path(folder, "cpu_seconds.txt").exists():
        return {"training_cpu_seconds": None, "training_steps": None}
    state = json.loads(Path(folder, "trainer_state.json").read_text())
    seconds = float(Path(folder, "cpu_seconds.txt").read_text())
    return {"training_cpu_seconds": seconds, "training_steps": state["global_step"]}


@torch.no_grad()
def ranks(model, tokenizer, num_turns: int = 64, rows: int = 16) -> dict:
    """Effective rank of the memory after 0, 1, 8 and 64 turns of reference dialogues."""
    episodes = []
    for row in range(rows):
        turns = generate_dialogue(FIRST_TEST_SEED + row, split="seen", num_turns=num_turns)["interactions"]
        episodes.append(encode_interactions(tokenizer, *zip(*((t["query"], t["answer"]) for t in turns), strict=True)))
    batch = RxTEpisodeCollator(tokenizer.pad_token_id)(episodes)
    memory, found = model.init_stm(rows), {}
    for turn in range(num_turns + 1):
        if turn in (0, 1, 8, num_turns):
            found[turn] = [round(rank, 2) for rank in effective_rank(memory.states)]
        if turn < num_turns:
            memory = model.update_memory(memory, batch["input_ids"][:, turn], batch["attention_mask"][:, turn])
    return found


def measure_rxt(folder: str, share: float, held: Collection[str]) -> dict:
    """The model with its own memory, on several kinds of dialogues, and with a shuffled and a cleared one."""
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), load(folder)
    play = partial(measure, model, tokenizer, share)
    arms = {
        "rxt": lambda: (
            play() | {"memory_bytes": model.init_stm(1).nbytes, "effective_rank_by_turn": ranks(model, tokenizer)}
        ),
        "introductions": partial(play, cases=INTRODUCTIONS, p_introduction=1.0),
        "foreign": lambda: {"recall": [measure_foreign(model, tokenizer, turns, share) for turns in (8, 16, 32)]},
        "casual": partial(play, cases=CASUAL_CASES, p_casual=1.0),
    }
    for memory in ("shuffled", "cleared"):
        arms[memory] = partial(play, cases=[("seen", 8), ("seen", 32)], memory=memory)
    return {name: arm() for name, arm in arms.items() if name not in held}


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(rxt_hf.DEMO))
    parser.add_argument("--first-run", help="folder of the demo before it was trained further")
    parser.add_argument("--full-history", help="folder of the Llama that re-reads the whole dialogue")
    parser.add_argument("--current-turn", help="folder of the Llama that sees one turn only")
    parser.add_argument("--share", type=float, default=1.0, help="share of the dialogues to play")
    parser.add_argument("--output", default="fact_recall.json", help="arms that it holds already are kept")
    options = parser.parse_args()
    path = Path(options.output)
    report = json.loads(path.read_text()) if path.exists() else {}
    report["environment"] = environment("cpu")
    report["share_of_dialogues"] = options.share
    report |= measure_rxt(options.model, options.share, report)
    report["rxt"] |= training(options.model)
    for arm in ARMS:
        folder = getattr(options, arm)
        if folder is not None and arm not in report:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            report[arm] = measure(load(folder), tokenizer, options.share, full_history=arm == "full_history")
        if folder is not None:
            report[arm] |= training(folder)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(recall_by_turns(report))
    if report.keys() >= set(ARMS):
        print(demo_baselines(report))


if __name__ == "__main__":
    main()
