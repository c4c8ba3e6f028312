# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Writes generated dialogues about facts as JSONL, which `rxt train` and `rxt eval` read.

    PYTHONPATH=examples python -m demo.write --split seen --dialogues 100 --probes --output rxt_hf/demo/test.jsonl.gz

wrote the test set of the demo. The values that an answer must recall are marked, and `--probes` adds a question about
each fact after the dialogue; `--wrong-answers-of MODEL` keeps the dialogues in which a model is wrong, with what it
says as the rejected answer. The default seeds of the split train are training seeds, those of all others test seeds.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.facts import (
    ATTRIBUTES,
    FIRST_TRAINING_SEED,
    SPLITS,
    Dialogue,
    Interaction,
    generate_dialogue,
    score_answer,
)
from demo.recall import FIRST_TEST_SEED
from rxt_hf.training.preference import add_own_mistakes

# kinds of turns that ask for something
QUESTIONS = ("ask", "unknown")


def generated(number: int, *, split: str = "train", turns: int = 8, first_seed: int | None = None) -> list[Dialogue]:
    """Returns dialogues of consecutive seeds, by default training seeds for the split train, else test seeds."""
    if first_seed is None:
        first_seed = FIRST_TRAINING_SEED if split == "train" else FIRST_TEST_SEED
    return [generate_dialogue(first_seed + row, split=split, num_turns=turns) for row in range(number)]


def fact_dialogues(number: int, *, probes: bool = False, **options: Any) -> Iterator[dict[str, Any]]:
    """Yields [`generated`] dialogues as `rxt_hf.data.readers` has them, with the values that are asked for marked."""
    for dialogue in generated(number, **options):
        episode: dict[str, Any] = {"interactions": [marked(turn) for turn in dialogue["interactions"]]}
        yield episode | ({"probes": probes_of(dialogue)} if probes else {})


def marked(turn: Interaction, distance: Literal["distance", "distance_stated"] = "distance") -> dict[str, Any]:
    """A turn in the schema of `rxt_hf.data.readers`; the value that it asks for is `recall`, at a `distance`."""
    found = {"query": turn["query"], "answer": turn["answer"]}
    if turn["kind"] != "ask":
        return found
    start = turn["answer"].rindex(str(turn["value"]))
    return found | {"recall": [[start, start + len(str(turn["value"])), turn[distance]]]}


def probes_of(dialogue: Dialogue) -> list[dict[str, Any]]:
    """A question about each fact of a dialogue, to be asked after its last turn."""
    rng, said = Random(f"probes:{dialogue['seed']}"), dict[str, tuple[str, int]]()
    for number, turn in enumerate(dialogue["interactions"]):
        told = [(turn["attribute"], turn["value"]), *turn["also"]]
        said |= {name: (value, number) for name, value in told if name is not None and value is not None}
    probes = []
    for name, (value, number) in said.items():
        attribute = ATTRIBUTES[name]
        questions = attribute.questions
        article = "an" if value[0].lower() in "aeiou" else "a"
        answers = [text.replace("{av}", f"{article} {value}").replace("{v}", value) for text in attribute.answers]
        query = questions[int(rng.random() * len(questions))]
        distance = len(dialogue["interactions"]) - number
        probes.append({"query": query, "answers": [*answers, value], "distance": distance})
    return probes


def wrong_answers(model: Any, tokenizer: Any, dialogues: Sequence[Dialogue]) -> list[list[dict[str, Any]]]:
    """Returns the turns of the dialogues with what the model answers wrongly as `rejected`."""
    return add_own_mistakes(
        model,
        tokenizer,
        dialogues,
        is_asked=lambda turn: turn["kind"] in QUESTIONS,
        is_right=lambda turn, answer: score_answer(cast("Interaction", turn), answer)["correct"],
    )


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSONL, packed if the name ends in .gz; equal rows give equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file, packed if it ends in .gz")
    parser.add_argument("--split", choices=SPLITS, default="train", help="values and phrases (default: train)")
    parser.add_argument("--dialogues", type=int, default=1000, help="number of dialogues (default: 1000)")
    parser.add_argument("--turns", type=int, default=8, help="turns of a dialogue (default: 8)")
    parser.add_argument("--first-seed", type=int, help="seed of the first dialogue (default: that of the split)")
    parser.add_argument("--probes", action="store_true", help="add questions that are asked after the dialogue")
    parser.add_argument("--wrong-answers-of", metavar="MODEL", help="folder of a model that answers the questions")
    options = parser.parse_args(argv)
    choices = {"split": options.split, "turns": options.turns, "first_seed": options.first_seed}
    if options.wrong_answers_of is None:
        write_rows(options.output, fact_dialogues(options.dialogues, probes=options.probes, **choices))
        return
    model, tokenizer = (
        auto.from_pretrained(options.wrong_answers_of) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    dialogues = iter(generated(options.dialogues, **choices))
    batches = iter(lambda: list(islice(dialogues, 64)), [])
    found = [turns for batch in batches for turns in wrong_answers(model, tokenizer, batch)]
    if not found:
        raise SystemExit(f"{options.wrong_answers_of} answers every question right: use more --dialogues.")
    # an answer of nothing is not read
    names = ("query", "answer", "rejected")
    rows = [[{name: turn[name] for name in names if turn.get(name)} for turn in turns] for turns in found]
    write_rows(options.output, ({"interactions": turns} for turns in rows))


if __name__ == "__main__":
    main()
