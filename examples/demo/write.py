# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Writes generated dialogues about facts as JSONL, which `rxt train` and `rxt eval` read.

    PYTHONPATH=examples python -m demo.write --split seen --dialogues 100 --probes --output rxt_hf/demo/test.jsonl.gz

wrote the test set of the demo. The values that an answer must recall are marked, and `--probes` adds a question about
each fact after the dialogue. The default seeds of the split train are training seeds, those of all others test seeds.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from demo.recall import FIRST_TEST_SEED
from rxt_hf.data.facts import ATTRIBUTES, FIRST_TRAINING_SEED, SPLITS, Dialogue, Interaction, generate_dialogue


def fact_dialogues(
    number: int, *, split: str = "train", turns: int = 8, first_seed: int | None = None, probes: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields episodes, see `rxt_hf.data.readers`; the values that are asked for are marked as recalled."""
    if first_seed is None:
        first_seed = FIRST_TRAINING_SEED if split == "train" else FIRST_TEST_SEED
    for seed in range(first_seed, first_seed + number):
        dialogue = generate_dialogue(seed, split=split, num_turns=turns)
        episode: dict[str, Any] = {"interactions": [marked(turn) for turn in dialogue["interactions"]]}
        yield episode | ({"probes": probes_of(dialogue)} if probes else {})


def marked(turn: Interaction) -> dict[str, Any]:
    """A turn in the schema of `rxt_hf.data.readers`; the value that it asks for is `recall`."""
    found = {"query": turn["query"], "answer": turn["answer"]}
    if turn["kind"] != "ask":
        return found
    start = turn["answer"].rindex(str(turn["value"]))
    return found | {"recall": [[start, start + len(str(turn["value"])), turn["distance"]]]}


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
    options = parser.parse_args(argv)
    rows = fact_dialogues(
        options.dialogues,
        split=options.split,
        turns=options.turns,
        first_seed=options.first_seed,
        probes=options.probes,
    )
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
