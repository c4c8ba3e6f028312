# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What models without a memory are measured with, the recipe that trains them on dialogues, and their benchmark."""

import json
import os
import runpy
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from demo.baselines import ARMS, SLIDING_WINDOW, build_model
from demo.facts import corpus_texts
from demo.train import FactDialogues
from histories import evaluate_history, history_losses, history_probes
from tables import dialogues_by_turn
from torch.nn import functional as F
from train_dialogues import CURRICULUM, FACTS, DialogueSteps, main, with_probes

from rxt_hf import RxTConfig
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.evaluation.memory import Dialogues

from ..models import SIZES, close
from ..reference_rxt import randomize

TURNS = [
    {"query": "A table for 7 people.", "answer": "It is booked."},
    {"query": "Thanks", "answer": "I want it.", "recall": []},
    {"query": "For how many?", "answer": "For 7 people.", "recall": [[4, 5, 2], [6, 12, 1]]},
]
PROBES = [
    {"query": "How many?", "answer": "7", "answers": ["7", "seven"], "slot": "people", "distance": 1},
    {"query": "Which table?", "answer": "It", "answers": ["It"], "slot": "table", "distance": 3},
]
DIALOGUES = [{"interactions": TURNS, "probes": PROBES}, {"interactions": TURNS[1:]}]
READERS = ("full_history", "sliding_window", "mamba", "current_turn")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["I want a table for 7 people. It is booked."] * 8, vocab_size=300, max_length=96)


@pytest.fixture(scope="module", params=READERS)
def arm(request, tokenizer):
    config = RxTConfig(**SIZES | {"vocab_size": len(tokenizer)})
    return request.param, randomize(build_model(request.param, config), seed=4).eval()


@pytest.fixture(scope="module")
def dialogues(tokenizer):
    return Dialogues(tokenizer, DIALOGUES, max_tokens=96)


def losses_one_by_one(model, batch, full_history):
    """Every turn's answer token by token, after the ids of the turns before or after nothing."""
    losses = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        history: list[int] = []
        for turn in range(len(ids)):
            real = ids[turn][mask[turn].bool()].tolist()
            for position in range(1, len(real)):
                if labels[turn, position] != -100:
                    seen = (history if full_history else []) + real[:position]
                    logits = model(torch.tensor([seen])).logits[0, -1]
                    losses.append(F.cross_entropy(logits, labels[turn, position]))
            history += real
    return torch.stack(losses)


@torch.no_grad()
def test_losses_are_those_of_each_turn_after_the_turns_before_it(arm, dialogues):
    name, model = arm
    full_history = name != "current_turn"
    for _, batch in dialogues.batches:
        found = history_losses(model, batch, full_history=full_history)
        close(found, losses_one_by_one(model, batch, full_history), 1e-4)
        other = history_losses(model, batch, full_history=not full_history)
        assert other.shape == found.shape and not torch.allclose(other, found, atol=1e-3)


def test_probes_are_asked_after_the_history_and_each_alone(arm, tokenizer, dialogues, monkeypatch):
    name, model = arm
    asked = []
    generate = model.generate

    def spy(input_ids, attention_mask, **options):
        sequences = generate(input_ids, attention_mask=attention_mask, **options)
        for ids, mask, whole in zip(input_ids, attention_mask, sequences, strict=True):
            prompt = ids[mask.bool()].unsqueeze(0)
            alone = generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
            answer = whole[input_ids.shape[1] :]
            asked.append(tokenizer.decode(prompt[0]))
            # padding on the left changes no answer
            assert answer.tolist() == alone[: len(answer)].tolist()
        return sequences

    monkeypatch.setattr(model, "generate", spy)
    full_history = name != "current_turn"
    before = (lambda turns: [*chain(*turns)]) if full_history else (lambda turns: [])
    found = history_probes(model, tokenizer, dialogues, before=before, max_new_tokens=4)
    assert found is not None and found["questions"] == 2 and set(found["exact_by_distance"]) == {"1", "3-4"}
    assert sorted("For 7 people." in prompt for prompt in asked) == [full_history] * 2
    assert sorted("Which table?" in prompt for prompt in asked) == [False, True]
    without = Dialogues(tokenizer, DIALOGUES[1:], max_tokens=96)
    assert evaluate_history(model, tokenizer, without, full_history=full_history, max_new_tokens=4)["probes"] is None


def test_a_sliding_window_does_not_see_what_left_it(tokenizer):
    config = RxTConfig(**SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "intermediate_size": 8})
    model = randomize(build_model("sliding_window", config), seed=4).double().eval()
    # information moves a window further in each layer
    reach = model.config.num_hidden_layers * (SLIDING_WINDOW - 1)
    ids = torch.randint(10, 200, (1, reach + 10), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 0] = 250
    before, after = model(ids).logits[0], model(changed).logits[0]
    assert not torch.allclose(before[SLIDING_WINDOW - 1], after[SLIDING_WINDOW - 1], atol=1e-6)
    close(before[reach + 1 :], after[reach + 1 :], 0)


def test_probes_become_the_last_turns_and_only_those_about_what_was_said():
    assert with_probes(DIALOGUES[0], 16)["interactions"] == [*TURNS, *PROBES]
    # the value of the first was last said in the turn that is cut
    (kept,) = with_probes(DIALOGUES[0], 2)["interactions"][2:]
    assert kept["query"] == "Which table?" and with_probes(DIALOGUES[1], 1)["interactions"] == TURNS[1:2]


def test_steps_are_the_same_for_every_arm_and_start_with_short_dialogues(tokenizer):
    dialogues = [*DIALOGUES * 8, {"interactions": TURNS * 3}]
    data = {arm: DialogueSteps(tokenizer, dialogues, 30, arm=arm, max_batch_tokens=400) for arm in ARMS}
    for number in range(30):
        rows = {}
        for arm, steps in data.items():
            parts = [part["input_ids"] for part in steps[number]]
            turns = chain.from_iterable(parts) if arm == "rxt" else parts
            rows[arm] = list(chain.from_iterable(turns))
        assert all(row == rows["rxt"] for row in rows.values())
    longest = [max(len(episode["labels"]) for episode in data["rxt"][number]) for number in range(30)]
    assert max(longest[: round(CURRICULUM[0][0] * 30)]) == 3 and max(longest) == 9
    again = DialogueSteps(tokenizer, dialogues, 30, max_batch_tokens=400)
    assert [again[number] for number in range(30)] == [data["rxt"][number] for number in range(30)]


def test_every_second_step_can_be_about_facts_the_same_for_every_arm():
    tokenizer = train_tokenizer(corpus_texts(300), vocab_size=1500, max_length=256)
    plain = DialogueSteps(tokenizer, DIALOGUES * 4, 10)
    steps = {arm: DialogueSteps(tokenizer, DIALOGUES * 4, 10, arm=arm, facts=16) for arm in ("rxt", "current_turn")}
    assert [steps["rxt"][number] for number in range(0, 10, 2)] == [plain[number] for number in range(0, 10, 2)]
    facts = FactDialogues(tokenizer, 5, 16, mix=FACTS)
    assert [steps["rxt"][number] for number in range(1, 10, 2)] == [facts[number] for number in range(5)]
    for number in range(10):
        turns = [turn for episode in steps["rxt"][number] for turn in episode["input_ids"]]
        assert [row["input_ids"] for row in steps["current_turn"][number]] == turns


def test_dialogues_without_anything_to_learn_are_refused(tokenizer):
    with pytest.raises(ValueError, match="No dialogue has an answer within the limits"):
        DialogueSteps(tokenizer, DIALOGUES, 10, tokens=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of an RxT and of a Llama after two steps, and the data."""
    root = tmp_path_factory.mktemp("dialogues")
    (root / "booking").mkdir()
    for split in ("train", "test"):
        lines = "\n".join(json.dumps(dialogue) for dialogue in DIALOGUES)
        (root / "booking" / f"{split}.jsonl").write_text(lines + "\n")
    override = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    for arm in ("rxt", "full_history"):
        options = {"arm": arm, "output_dir": root / arm, "max_steps": 2, "override": json.dumps(override)}
        options |= {"vocab_size": 300, "disable_tqdm": True, "data": root / "booking"}
        main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    return root


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "dialogues.py"))


@pytest.mark.filterwarnings("ignore:.*generation flags:UserWarning")
def test_the_benchmark_measures_every_arm_beside_the_floor(benchmark, trained, capsys, monkeypatch):
    output = trained / "found.json"
    arms = [word for arm in ("rxt", "full_history") for word in ("--arm", f"{arm}={trained / arm}")]
    # as if a run had gone on in another folder
    arms += ["--arm", f"full_history:more={trained / 'rxt'}+{trained / 'full_history'}"]
    benchmark["main"](["--data", str(trained / "booking"), *arms, "--output", str(output)])
    report = json.loads(output.read_text())
    more = report["arms"].pop("full_history:more")
    runs = list(report["arms"].values())
    assert more["sources"] == runs[1]["sources"] and more["training_steps"] == 4
    assert more["training_cpu_seconds"] == round(sum(run["training_cpu_seconds"] for run in runs), 1)
    # "7" and "It" are what training says of their slots
    assert report["floors"] == {"booking": {"all": 1.0, "3+": 1.0}}
    own, *controls = report["arms"]["rxt"]["sources"]["booking"]
    assert (own, set(controls)) == ("own", {"cleared", "shuffled"})
    for entry in report["arms"].values():
        found = entry["sources"]["booking"]["own"]
        assert entry["training_steps"] == 2 and entry["training_cpu_seconds"] > 0
        assert found["answer_perplexity"]["all"][1] == 34 and found["recall_loss"]["all"][1] == 4
        assert found["probes"]["questions"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines][2:] == [
        "RxT, fixed-size memory",
        "the same, memory shuffled",
        "the same, memory cleared",
        "Llama, full history, equal data",
        "a slot's most frequent value",
        "",
        "booking; turn",
        "---",
        "RxT, fixed-size memory",
        "Llama, full history, equal data",
    ]


def test_perplexity_of_a_group_of_turns_is_that_of_all_their_tokens():
    found = {"all": [9.0, 99], "1": [2.0, 10], "3": [2.0, 1], "4": [8.0, 1], "20": [3.0, 2]}
    report = {"arms": {"rxt": {"sources": {"booking": {"own": {"answer_perplexity": found}}}}}}
    head, _, row = dialogues_by_turn(report, "booking").splitlines()
    assert head == "| booking; turn | 1 | 2 | 3-4 | 5-8 | 9-12 | 13+ |"
    assert row == "| RxT, fixed-size memory | 2.00 |  | 4.00 |  |  | 3.00 |"


def test_the_recipe_trains_and_measures_the_sizes_of_the_paper(trained):
    root, size = Path(__file__).parents[2], {name: value for name, value in SIZES.items() if name != "vocab_size"}
    override = json.dumps(size | {"num_experts": 2, "head_dim": 8}, separators=(",", ":"))
    options = f"--max_steps 1 --max_batch_tokens 400 --warmup_steps 0 --disable_tqdm True --override {override}"
    environment = {"SIZE": "micro", "ARMS": "rxt full_history", "OPTIONS": options}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    command = ["sh", "examples/recipes/dialogues.sh", str(trained / "sizes"), str(trained / "booking")]
    done = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((trained / "sizes" / "dialogues.json").read_text())
    parameters = [entry["parameters"] for entry in report["arms"].values()]
    assert list(report["arms"]) == ["rxt", "full_history"]
    assert max(parameters) < 1.1 * min(parameters)


def test_the_benchmark_refuses_dialogues_without_probes(benchmark, trained, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"interactions": TURNS}) + "\n")
    words = ["--data", str(tmp_path), "--arm", f"rxt={trained / 'rxt'}", "--output", str(tmp_path / "found.json")]
    with pytest.raises(ValueError, match="have no probe about a value said 3 or more turns before"):
        benchmark["main"](words)
