# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
A language model with a memory beside the same model that re-reads its history, on real dialogues: nats of the words
that only earlier turns tell, by the number of turns since, and of all other words of the answers.

    python benchmarks/upcycling.py --base smollm2 --data path/to/sgd --fit-salience
    python benchmarks/upcycling.py --base smollm2 --data path/to/sgd --upcycled 64_slots=path/to/run

Each arm is measured on the same tokens, and added to the JSON file beside those of former calls:

    query_only, full_history      the language model, untrained
    day_one, salience             the converted model as it is, and with a salience fitted to training dialogues
    the names of --upcycled       what examples/upcycling/train.py wrote
    the names of --baselines      what benchmarks/upcycling_baselines.py wrote

`own`, `cleared` and `shuffled` say which memory is read: the dialogue's own, an empty one, or another dialogue's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from upcycling_baselines import tokens_between

from rxt_hf import Episodes
from rxt_hf.convert import convert_tokenizer, fit_salience, from_llm, load_adapted
from rxt_hf.convert.smollm2 import load_smollm2
from rxt_hf.data.readers import sampled
from rxt_hf.evaluation.memory import Dialogues, Memory, figures_of, token_losses
from rxt_hf.evaluation.speed import environment

RESULTS = Path(__file__).parent / "results" / "upcycling.json"


def history_losses(
    model: Any, between: list[int], history: int | None = None
) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    """
    Losses of the labelled tokens of a batch of episodes, in order, by a language model that reads all turns so far as
    one text, with the ids `between` behind each answer; or only the last `history` tokens before the turn.
    """

    def texts(turns: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        gap = torch.tensor(between, dtype=torch.long)
        said = [(torch.cat([ids, gap]), F.pad(labels, (0, len(gap)), value=-100)) for ids, labels in turns]
        if history is None:
            ids, labels = map(torch.cat, zip(*said, strict=True))
            yield ids, labels
            return
        before = torch.empty(0, dtype=torch.long)
        for ids, labels in said:
            before = before[len(before) - min(history, len(before)) :]
            yield torch.cat([before, ids]), F.pad(labels, (len(before), 0), value=-100)
            before = torch.cat([before, ids])

    @torch.no_grad()
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def losses(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found = []
        for ids, mask, labels in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            turns = [(ids[turn][row], labels[turn][row]) for turn, row in enumerate(mask.bool()) if row.any()]
            for said, label in texts(turns):
                is_target = label[1:] != -100
                if is_target.any():
                    hidden_states = model.model(said[None].to(model.device)).last_hidden_state[0, :-1][is_target]
                    logits = model.lm_head(hidden_states).float().cpu()
                    found.append(F.cross_entropy(logits, label[1:][is_target], reduction="none"))
        return torch.cat(found)

    return losses


def told_before(dialogues: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Each dialogue behind `number` others, drawn at random, of which no word counts as recalled."""
    rng, found = Random(0), []
    for index, dialogue in enumerate(dialogues):
        others = rng.sample([place for place in range(len(dialogues)) if place != index], number)
        before = [dict(turn) | {"recall": []} for other in others for turn in dialogues[other]["interactions"]]
        found.append(dict(dialogue) | {"interactions": [*before, *dialogue["interactions"]]})
    return found


def summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Nats of recalled words, over all and by distance, and of the other words; `[nats, tokens]` each."""
    (perplexity, tokens), recall = figures["answer_perplexity"]["all"], figures["recall_loss"]
    nats, recalled = recall["all"]
    ordinary = (torch.tensor(perplexity).log().item() * tokens - nats * recalled) / (tokens - recalled)
    rounded = {name: [round(mean, 4), number] for name, (mean, number) in recall.items()}
    return {"recalled": rounded, "ordinary": [round(ordinary, 4), tokens - recalled]}


@torch.no_grad()
@torch.autocast("cpu", dtype=torch.bfloat16)
def measured(model: Any, dialogues: Dialogues, memories: Sequence[Memory]) -> dict[str, Any]:
    """[`summary`] of an RxT for each memory that is read."""
    return {
        memory: summary(figures_of(lambda batch, memory=memory: token_losses(model, batch, memory), dialogues))
        for memory in memories
    }


def loaded(base: str) -> tuple[Any, Any]:
    """The language model and its tokenizer, from a folder or, as `smollm2`, from the pip package that holds it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if base == "smollm2":
        return load_smollm2()
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)


def arms(options: argparse.Namespace, dialogues: Dialogues, tokenizer: Any, base: tuple[Any, Any]) -> Any:
    """Yields the name of each arm that was asked for and its figures."""
    between = tokens_between(base[1], tokenizer)
    untrained = {"query_only": 0, "full_history": None}
    for name in [name for name in untrained if name in options.arms]:
        yield name, {"none": summary(figures_of(history_losses(base[0], between, untrained[name]), dialogues))}
    if "day_one" in options.arms or options.fit_salience:
        model = from_llm(base[0], num_memory_slots=options.slots, tokenizer=tokenizer)
        model.config.memory_positions = options.positions
        if "day_one" in options.arms:
            yield f"day_one, {options.slots} slots", measured(model, dialogues, options.memories)
        if options.fit_salience:
            train = Episodes(tokenizer, sampled(options.data, "train", 400), max_tokens=options.tokens)
            fit_salience(model, train, topics=options.topics)
            yield f"salience, {options.slots} slots", measured(model, dialogues, options.memories)
    for name, _, folder in (given.partition("=") for given in options.upcycled):
        model, _ = load_adapted(*base, folder)
        report = json.loads((Path(folder) / "run.json").read_text())
        yield name, measured(model, dialogues, options.memories) | {"training": of_training(report)}
    for name, _, folder in (given.partition("=") for given in options.baselines):
        report = json.loads((Path(folder) / "run.json").read_text())
        model = PeftModel.from_pretrained(loaded(options.base)[0], folder).merge_and_unload()
        found = summary(figures_of(history_losses(model, between, report["history"]), dialogues))
        yield name, {"none": found, "training": of_training(report)}


def of_training(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: report[name] for name in ("command", "seed", "steps", "cpu_seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="folder of a language model, or smollm2")
    parser.add_argument("--data", required=True, help="folder with the splits train and test")
    parser.add_argument("--dialogues", type=int, default=200, help="test dialogues, drawn at random with a fixed seed")
    parser.add_argument("--tokens", type=int, default=70, help="a dialogue ends before a longer interaction")
    parser.add_argument("--slots", type=int, default=64, help="slots of the models that are not trained")
    parser.add_argument("--positions", choices=("none", "rank"), default="none", help="places of slots, untrained")
    parser.add_argument("--topics", type=int, default=4, help="dialogues in one memory when the salience is fitted")
    parser.add_argument("--arms", nargs="*", default=["query_only", "full_history", "day_one"], help="untrained arms")
    parser.add_argument("--fit-salience", action="store_true", help="measure with a fitted salience, too")
    parser.add_argument("--upcycled", nargs="*", default=[], help="NAME=FOLDER of trained models")
    parser.add_argument("--baselines", nargs="*", default=[], help="NAME=FOLDER from upcycling_baselines.py")
    parser.add_argument("--before", type=int, default=0, help="other dialogues told before each one")
    parser.add_argument("--memories", nargs="*", default=["own", "cleared", "shuffled"], help="memories that are read")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file that the arms are added to")
    options = parser.parse_args()
    base = loaded(options.base)
    tokenizer = convert_tokenizer(base[1], max_length=base[0].config.max_position_embeddings)
    told = sampled(options.data, "test", options.dialogues)
    name = f"{Path(options.data).name}, {options.dialogues} dialogues"
    if options.before:
        told, name = told_before(told, options.before), f"{name}, each behind {options.before} others"
    dialogues = Dialogues(tokenizer, told, max_tokens=options.tokens)
    for arm, figures in arms(options, dialogues, tokenizer, base):
        report = json.loads(options.output.read_text()) if options.output.exists() else {"arms": {}}
        report["arms"].setdefault(name, {})[arm] = figures | {
            "command": " ".join(["python", "benchmarks/upcycling.py", *sys.argv[1:]]),
            "cpu_seconds": round(time.process_time()),
        }
        report["environment"] = environment("cpu")
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(arm, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
