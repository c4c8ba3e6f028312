# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import gzip
import json

import pytest
from demo import write
from demo.write import fact_dialogues, main

from rxt_hf import DEMO, read_episodes
from rxt_hf.training.run import RunArguments, preferences_of


def test_the_test_set_of_the_demo_is_what_its_command_writes(tmp_path):
    main(["--split", "seen", "--dialogues", "100", "--probes", "--output", str(tmp_path / "test.jsonl.gz")])
    rows = [gzip.decompress((folder / "test.jsonl.gz").read_bytes()) for folder in (tmp_path, DEMO)]
    assert rows[0] == rows[1]


def test_rows_are_read_as_they_were_written_and_mark_the_values_that_are_asked_for(tmp_path):
    main(["--dialogues", "40", "--turns", "5", "--output", str(tmp_path / "train.jsonl")])
    episodes = list(read_episodes(tmp_path, "train"))
    assert episodes == list(map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines()))
    assert len(episodes) == 40 and {len(episode["interactions"]) for episode in episodes} == {5}
    spans = [
        (turn["answer"][start:end], distance, [each["query"] for each in episode["interactions"][:number]])
        for episode in episodes
        for number, turn in enumerate(episode["interactions"])
        for start, end, distance in turn.get("recall", [])
    ]
    assert len(spans) > 20
    for value, distance, before in spans:
        # told, or asked for and then repeated, as many turns before
        assert any(value in query for query in before) and 1 <= distance <= len(before)


def test_probes_ask_for_the_last_value_of_every_fact():
    changed = 0
    for episode in fact_dialogues(60, split="seen", probes=True):
        turns = episode["interactions"]
        for probe in episode["probes"]:
            *sentences, value = probe["answers"]
            assert all(value in sentence for sentence in sentences)
            said = [len(turns) - place for place, turn in enumerate(turns) if value in turn["query"] + turn["answer"]]
            assert probe["distance"] in said
        values = {probe["answers"][-1] for probe in episode["probes"]}
        told = {turn["answer"][start:end] for turn in turns for start, end, _ in turn.get("recall", [])}
        changed += len(told - values)
    # what was asked for and then changed is no longer right
    assert 0 < changed < 30


def test_wrong_answers_of_a_model_are_preferences_to_train_on(tmp_path, monkeypatch):
    """The demo is right about most; what it says to a third of the questions is taken for wrong."""
    monkeypatch.setattr(write, "score_answer", lambda turn, answer: {"correct": len(turn["query"]) % 3 > 0})
    path = tmp_path / "preference.jsonl"
    main(["--dialogues", "70", "--turns", "4", "--output", str(path), "--wrong-answers-of", str(DEMO)])
    episodes = preferences_of(str(path), "train", RunArguments())
    assert len(episodes) > 10
    for turns in episodes:
        assert turns[-1]["rejected"] and all(turn.keys() <= {"query", "answer", "rejected"} for turn in turns)
    monkeypatch.setattr(write, "score_answer", lambda turn, answer: {"correct": True})
    with pytest.raises(SystemExit, match="answers every question right: use more --dialogues"):
        main(["--dialogues", "2", "--output", str(path), "--wrong-answers-of", str(DEMO)])
