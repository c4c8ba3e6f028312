# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
A language model with a memory beside the same model that re-reads its history, on real dialogues: nats of the words
that only earlier turns tell, by the number of turns since, and of all other words of the answers.

    python benchmarks/upcycling.py --base smollm2 --data path/to/sgd --fit-salience
    python benchmarks/upcycling.py --base smollm2 --data path/to/sgd --upcycled 64_slots=path/to/run

Each arm is measured on the same tokens, and added to the JSON file beside those of former calls:

    query_only, full_history      the language model, untrained; full_history_lora with --history-adapter FOLDER
    day_one, salience             the converted model as it is, and with a salience fitted to training dialogues
    the names of --upcycled       what examples/upcycling/train.py wrote

`own`, `cleared` and `shuffled` say which memory is read: the dialogue's own, an empty one, or another dialogue's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rxt_hf import Episodes
from rxt_hf.convert import convert_tokenizer, fit_salience, from_llm, load_adapted
from rxt_hf.convert.smollm2 import load_smollm2
from rxt_hf.data.readers import sampled
from rxt_hf.evaluation.memory import Dialogues, figures_of, teacher_forced
from rxt_hf.evaluation.speed import environment

RESULTS = Path(__file__).parent / "results" / "upcycling.json"


def history_losses(model: Any, between: list[int], *, history: bool) -> Callable[[Mapping[str, torch.Tensor]], Any]:
    """
    Losses of the labelled tokens of a batch of episodes, in order, by a language model that reads all turns so far as
    one text, with the ids `between` behind each answer, or the current turn alone.
    """

    @torch.no_grad()
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def losses(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found = []
        for ids, mask, labels in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            turns = [(ids[turn][row], labels[turn][row]) for turn, row in enumerate(mask.bool()) if row.any()]
            gap = torch.tensor(between, dtype=ids.dtype)
            texts = [[(torch.cat([said, gap]), F.pad(label, (0, len(gap)), value=-100)) for said, label in turns]]
            for text in texts if history else [[turn] for turn in turns]:
                said, label = map(torch.cat, zip(*text, strict=True))
                is_target = label[1:] != -100
                hidden_states = model.model(said[None].to(model.device)).last_hidden_state[0, :-1][is_target]
                logits = model.lm_head(hidden_states).float().cpu()
                found.append(F.cross_entropy(logits, label[1:][is_target], reduction="none"))
        return torch.cat(found)

    return losses


def summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Nats of recalled words, over all and by distance, and of the other words; `[nats, tokens]` each."""
    (perplexity, tokens), recall = figures["answer_perplexity"]["all"], figures["recall_loss"]
    nats, recalled = recall["all"]
    ordinary = (torch.tensor(perplexity).log().item() * tokens - nats * recalled) / (tokens - recalled)
    rounded = {name: [round(mean, 4), number] for name, (mean, number) in recall.items()}
    return {"recalled": rounded, "ordinary": [round(ordinary, 4), tokens - recalled]}


@torch.no_grad()
@torch.autocast("cpu", dtype=torch.bfloat16)
def measured(model: Any, dialogues: Dialogues) -> dict[str, Any]:
    """[`summary`] of an RxT for each memory that is read."""
    found = teacher_forced(model, dialogues)
    return {
        memory: summary({name: values[memory] for name, values in found.items()}) for memory in found["recall_loss"]
    }


def loaded(base: str) -> tuple[Any, Any]:
    """The language model and its tokenizer, from a folder or, as `smollm2`, from the pip package that holds it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if base == "smollm2":
        return load_smollm2()
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)


def arms(options: argparse.Namespace, dialogues: Dialogues, tokenizer: Any, source: Any, source_tokenizer: Any) -> Any:
    """Yields the name of each arm that was asked for and its figures."""
    between = source_tokenizer("\n", add_special_tokens=False)["input_ids"]
    for name, history in (("query_only", False), ("full_history", True)):
        if name in options.arms:
            yield name, {"none": summary(figures_of(history_losses(source, between, history=history), dialogues))}
    if options.history_adapter is not None:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(source, options.history_adapter).merge_and_unload()
        yield (
            "full_history_lora",
            {"none": summary(figures_of(history_losses(adapted, between, history=True), dialogues))},
        )
    if "day_one" in options.arms or options.fit_salience:
        model = from_llm(source, num_memory_slots=options.slots, tokenizer=tokenizer)
        model.config.memory_positions = options.positions
        if "day_one" in options.arms:
            yield f"day_one, {options.slots} slots", measured(model, dialogues)
        if options.fit_salience:
            train = Episodes(tokenizer, sampled(options.data, "train", 400), max_tokens=options.tokens)
            fit_salience(model, train, topics=options.topics)
            yield f"salience, {options.slots} slots", measured(model, dialogues)
    for given in options.upcycled:
        name, _, folder = given.partition("=")
        model, _ = load_adapted(source, source_tokenizer, folder)
        yield name, measured(model, dialogues)


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
    parser.add_argument("--history-adapter", help="folder of a LoRA adapter of the model that re-reads its history")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file that the arms are added to")
    options = parser.parse_args()
    source, source_tokenizer = loaded(options.base)
    tokenizer = convert_tokenizer(source_tokenizer)
    dialogues = Dialogues(tokenizer, sampled(options.data, "test", options.dialogues), max_tokens=options.tokens)
    name = f"{Path(options.data).name}, {options.dialogues} dialogues"
    for arm, figures in arms(options, dialogues, tokenizer, source, source_tokenizer):
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
