# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The figures that README and model card show are those of the benchmark files."""

import importlib.util
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from rxt_hf import RxTConfig, RxTForCausalLM
from rxt_hf.data.facts import generate_dialogue
from rxt_hf.evaluation.recall import FIRST_TEST_SEED
from rxt_hf.presets import PRESETS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DECODE_SHARES = (
    "Decoding reaches {} of the current-turn Llama's tokens per second at batch 1 and {} at batch 8 "
    "([JSON](benchmarks/results/decode_100m.json)); with the paper's sparse attention to the memory "
    "(`--size 100m-sqa`, [JSON](benchmarks/results/decode_100m_sqa.json)) {} and {}."
)
CONVERSATIONS = (
    "In {} GiB the states of {} conversations fit at every length, of the KV cache {} after turn 8 and {} after turn "
    "64; eight conversations at turn 8 get {} tokens per second in one batch, with the KV cache {}"
)


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fact_recall():
    return script("fact_recall")


@pytest.mark.parametrize("page", ["README.md", "model_cards/rxt-tiny-facts.md"])
def test_recall_of_the_demo_is_shown_as_it_was_measured(fact_recall, page):
    report = json.loads((RESULTS / "fact_recall.json").read_text())
    assert fact_recall.table(report) in (ROOT / page).read_text()


def test_baselines_are_shown_as_they_were_measured(fact_recall):
    report = json.loads((RESULTS / "fact_recall.json").read_text())
    card = (ROOT / "model_cards" / "rxt-tiny-facts.md").read_text()
    assert fact_recall.arms_table(report) in card
    text, readme = " ".join(card.split()), " ".join((ROOT / "README.md").read_text().split())
    at_16 = {
        arm: next(
            f"{row['recall']:.3f}" for row in report[arm]["recall"] if (row["split"], row["turns"]) == ("seen", 16)
        )
        for arm in fact_recall.ARMS
    }
    assert (
        "recalls {full_history} at 16 turns if it re-reads the whole history (the RxT then: {first_run}) and "
        "{current_turn} if it sees the current turn only".format(**at_16)
        in readme
    )
    open_recall = {
        arm: next(
            f"{row['recall']:.3f}" for row in report[arm]["recall"] if (row["split"], row["turns"]) == ("open", 4)
        )
        for arm in fact_recall.ARMS
    }
    assert "({full_history} against {first_run} at 4 turns)".format(**open_recall) in text
    steps = {arm: report[arm]["training_steps"] for arm in fact_recall.ARMS}
    assert steps["first_run"] == steps["current_turn"]
    assert f"{steps['first_run']:,}" in text and str(steps["full_history"]) in text.replace(",", "")
    # of equal size, and trained with what the demo had before it was trained further
    sizes = [report[arm]["parameters"] for arm in (*fact_recall.ARMS, "rxt")]
    assert max(sizes) <= 1.02 * min(sizes)
    more = report["rxt"]["training_cpu_seconds"] - report["first_run"]["training_cpu_seconds"]
    assert f"{more:,.0f} CPU seconds" in text and f"{more:,.0f} CPU seconds" in readme


def test_card_shows_training_losses_ranks_and_perplexities_as_they_were_measured():
    card = (ROOT / "model_cards" / "rxt-tiny-facts.md").read_text()
    for run, every in zip(
        json.loads((RESULTS / "demo_training.json").read_text())["runs"], (1500, 1000, 1600, 1600, 800), strict=True
    ):
        losses = [f"{entry['loss']:.3f}" for entry in run["log"] if entry["step"] % every == 0]
        assert len(losses) == 10 and f"| training loss | {' | '.join(losses)} |" in card
        assert f"{run['cpu_seconds']:,.0f} CPU seconds" in card and f"{run['steps']:,} steps" in card
    rxt = json.loads((RESULTS / "fact_recall.json").read_text())["rxt"]
    wrong = {
        (row["split"], row["turns"]): round(1 / (1 - row["recall"])) for row in rxt["recall"] if row["recall"] < 1
    }
    assert [wrong["open", 4], wrong["new", 8], wrong["new", 16]] == [22, 12, 7]
    assert "one unknown name in twenty-two" in card
    assert "one in twelve at 8 turns and one in seven at 16" in " ".join(card.split())
    casual = json.loads((RESULTS / "fact_recall.json").read_text())["casual"]["recall"]
    assert f"in them {casual[0]['recall']:.3f} are right at {casual[0]['turns']} turns" in card
    for turns, (first, second) in rxt["effective_rank_by_turn"].items():
        assert f"{first:.1f} and {second:.1f} after {turns} turns" in card
    for turns, perplexity in rxt["answer_perplexity"].items():
        assert f"{perplexity:.3f} at {turns}" in card


def test_card_of_the_converted_model_says_what_was_measured():
    report = json.loads((RESULTS / "upcycle_smollm2.json").read_text())
    text = " ".join((ROOT / "model_cards" / "rxt-smollm2-135m-sgd.md").read_text().split())
    nats = {arm: found["all"][0] for arm, found in report["nats"]["sgd"].items() if arm != "gap_closed"}
    assert len(nats) == 5
    for arm, value in nats.items():
        assert re.search(
            rf"\| nats per recalled token, {arm.replace('_', ' ')}[ \w]* \| sgd, test \| {value} \|", text
        )
    falls = f"falls from {nats['source_query_only']:.2f} nats (the language model, query alone) to {nats['own']:.2f}"
    assert falls in text and f"has {nats['cleared']:.2f}, with another dialogue's {nats['shuffled']:.2f}" in text
    assert f"after {report['steps']} steps, {report['cpu_seconds']:,.0f} CPU seconds" in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"after {report['cpu_seconds'] / 60:.0f} CPU minutes" in readme
    assert (
        f"{nats['source_query_only']:.2f} nats" in readme
        and f"({nats['cleared']:.2f} with the memory cleared)" in readme
    )


def test_what_preferences_change_is_shown_as_it_was_measured():
    report = json.loads((RESULTS / "preference.json").read_text())
    before, after = ({(row["split"], row["turns"]): row for row in report[name]} for name in ("before", "after"))
    figures = [f"{rows['seen', 32]['stale']:.3f}" for rows in (before, after)]
    figures += [f"{rows['open', 8]['recall']:.3f}" for rows in (before, after)]
    sentence = (
        "DPO takes stale answers in 32 turns from {} to {} and costs a little recall of unknown names, {} to {}."
    )
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert sentence.format(*figures) in page


def test_what_rewards_change_is_shown_as_it_was_measured():
    report = json.loads((RESULTS / "reinforcement.json").read_text())
    before, after = (
        {(row["do_sample"], row["split"], row["turns"]): row for row in report[name]} for name in ("before", "after")
    )

    def figures(figure, *case):
        return before[case][figure], after[case][figure]

    for turns in (16, 32):
        old, new = figures("recall", True, "seen", turns)
        assert new - old > math.hypot(*figures("recall_ci95", True, "seen", turns))
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    for words, case in {
        "in 32 turns {:.3f} are right before and {:.3f} after": ("recall", True, "seen", 32),
        "in 16 turns {:.3f} and {:.3f}": ("recall", True, "seen", 16),
        "greedy answers do not gain ({:.3f} and {:.3f} in 32 turns)": ("recall", False, "seen", 32),
        "(sampled, 8 turns: {:.3f} and {:.3f})": ("recall", True, "open", 8),
        "(sampled, 32 turns: {:.3f} and {:.3f})": ("abstention", True, "seen", 32),
    }.items():
        assert words.format(*figures(*case)) in page


def test_a_memory_in_fewer_bits_is_measured(fact_recall, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fact_recall", fact_recall)
    monkeypatch.setattr(sys, "argv", ["x", "--share", "0.01", "--output", str(tmp_path / "report.json")])
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "quantized_recall.py"))
    arms = benchmark["ARMS"]
    for name in set(arms) - {"float32", "int8 memory"}:
        del arms[name]
    benchmark["main"]()
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["arms"]) == {"float32", "int8 memory"} and report["environment"]["threads"]
    assert "| int8 memory |" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "model_cards/rxt-tiny-facts.md"])
def test_size_of_the_memory_is_shown_as_it_was_measured(page):
    report = json.loads((RESULTS / "fact_recall.json").read_text())
    assert f"{report['rxt']['memory_bytes']:,} bytes" in (ROOT / page).read_text()


@pytest.mark.parametrize("page", ["README.md", "model_cards/rxt-tiny-facts.md"])
def test_recall_by_live_facts_is_shown_as_it_was_measured(page):
    report = json.loads((RESULTS / "fact_recall.json").read_text())
    (row,) = (row for row in report["rxt"]["recall"] if (row["split"], row["turns"]) == ("seen", 64))
    text = " ".join((ROOT / page).read_text().split())
    for facts in ("3-4", "9-16", "17-32"):
        share = f"{row['by_live_facts'][facts][0]:.3f}"
        assert re.search(rf"{share} [^.]*?{facts}\b", text), (facts, share)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_benchmark_files_say_where_they_were_measured(path):
    environment = json.loads(path.read_text())["environment"]
    assert {"python", "torch", "transformers", "device", "threads"} <= environment.keys()


def test_costs_of_a_turn_are_shown_as_they_were_measured():
    report = json.loads((RESULTS / "turn_cost_100m.json").read_text())
    readme, ratios = " ".join((ROOT / "README.md").read_text().split()), report["ratios"]
    for kind in (
        "first_token_speedup_over_full_history",
        "turn_speedup_over_persistent_cache",
        "turn_slowdown_over_current_turn",
        "async_turn_slowdown_over_current_turn",
    ):
        by_turn = [ratios.get(f"{kind}_at_{turn}") for turn in (1, 2, 8, 32, 64)]
        cells = " | ".join("" if value is None else f"{value:.3g}" for value in by_turn)
        assert " ".join(f"| {cells} |".split()) in readme, kind
    assert f"takes {ratios['rxt_turn_at_64_over_2']:.2f} times turn 2" in readme
    assert f"takes {ratios['async_write_s']:.2f} s" in readme
    states = {
        arm: {figures["state_bytes"] // 1024 for figures in found.values()} for arm, found in report["turns"].items()
    }
    assert len(states["rxt"]) == 1 and f"stays at {states['rxt'].pop():,} KiB" in readme
    assert f"{max(states['persistent_cache']):,} KiB after turn 64" in readme
    files = [RESULTS / name for name in ("decode_100m.json", "decode_100m_sqa.json")]
    decoded = [json.loads(file.read_text())["ratios"] for file in files]
    names = [f"decode_share_of_current_turn_at_batch_{rows}_eager" for rows in (1, 8)]
    shares = [f"{found[name]:.2f}" for found in decoded for name in names]
    assert DECODE_SHARES.format(*shares) in readme


def test_conversations_in_a_budget_are_shown_as_they_were_measured():
    report = json.loads((RESULTS / "concurrency_100m.json").read_text())
    (ours,) = {found["conversations"] for found in report["states"]["rxt"].values()}
    others = report["states"]["persistent_cache"]
    counts = (f"{report['options']['budget_gib']:g}", ours, *(others[turn]["conversations"] for turn in ("8", "64")))
    rates = report["tokens_per_s"]["batched"]["8"]
    assert report["options"]["at_turn"] == 8
    assert CONVERSATIONS.format(*counts, *(f"{rates[arm]:.3g}" for arm in ("rxt", "persistent_cache"))) in " ".join(
        (ROOT / "README.md").read_text().split()
    )


def test_recall_in_fewer_bits_is_shown_as_it_was_measured():
    arms = json.loads((RESULTS / "quantized_recall.json").read_text())["arms"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    shown = {"float32": "{} in float32", "int8 weights (torchao)": "{} with int8 weights (torchao)"}
    shown |= {
        "nf4 weights (bitsandbytes)": "{} with nf4 weights",
        "int8 memory": "{} with a memory that goes through int8",
    }
    for arm, words in shown.items():
        (recall,) = (row["recall"] for row in arms[arm]["recall"] if row["turns"] == 8)
        assert words.format(f"{recall:.3f}") in readme, arm
    # "in a quarter of its bytes": and the file's header
    assert arms["int8 memory"]["memory_file_bytes"] < 0.27 * arms["float32"]["memory_file_bytes"]


def test_real_dialogues_are_shown_as_they_were_measured():
    report = json.loads((RESULTS / "dialogues.json").read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(script("dialogues").table(report, source) in page for source in report["floors"])
    # equal data and, within what whole layers of Mamba allow, equal size
    arms = dict(report["arms"])
    more = arms.pop("full_history:equal_compute")
    assert len({arm["training_steps"] for arm in arms.values()}) == 1
    assert more["training_cpu_seconds"] == pytest.approx(arms["rxt"]["training_cpu_seconds"], rel=0.05)
    sizes = {name: arm["parameters"] for name, arm in report["arms"].items()}
    assert all(
        size == pytest.approx(sizes["rxt"], rel=0.07 if "mamba" in name else 0.02) for name, size in sizes.items()
    )


def test_what_is_said_of_real_dialogues_is_what_was_measured():
    report = json.loads((RESULTS / "dialogues.json").read_text())
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    found = {
        source: {name: arm["sources"][source]["own"] for name, arm in report["arms"].items()}
        for source in report["floors"]
    }
    far = script("dialogues").far_probes
    best = {source: max(far(each["probes"]) for each in arms.values()) for source, arms in found.items()}
    guess = report["floors"]["sgd"]["3+"]
    assert f"of SGD's probes at most {best['sgd']:.3f} are answered where guessing gives {guess:.3f}" in page
    assert best["star"] < report["floors"]["star"]["3+"] and "of STAR's fewer than guessing gives" in page
    perplexity = {
        source: {name: each["answer_perplexity"]["all"][0] for name, each in arms.items()}
        for source, arms in found.items()
    }
    assert perplexity["sgd"]["current_turn"] < min(perplexity["sgd"][name] for name in ("rxt", "full_history"))
    for figures in perplexity.values():
        assert figures["rxt"] == pytest.approx(figures["full_history"], rel=0.03)
    sizes = {name: f"{arm['parameters']:,}" for name, arm in report["arms"].items()}
    assert f"Models of {sizes['rxt']} parameters (Mamba-2: {sizes['mamba']})" in page
    assert f"{report['arms']['full_history:equal_compute']['training_steps']:,}) on the same tokens" in page


def test_longer_runs_on_real_dialogues_are_shown_as_they_were_measured():
    report, module = json.loads((RESULTS / "dialogues_longer.json").read_text()), script("dialogues")
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(module.table(report, source) in page for source in ("sgd", "star"))
    arms, page = report["arms"], " ".join(page.split())
    assert {arm["training_steps"] for arm in arms.values()} == {8000}
    assert f"the RxT ({arms['rxt']['parameters']:,} parameters)" in page
    assert f"the Llamas {arms['current_turn']['parameters']:,}" in page
    assert {arm["parameters"] for name, arm in arms.items() if name != "rxt"} == {arms["current_turn"]["parameters"]}
    assert 1.0 < arms["current_turn"]["parameters"] / arms["rxt"]["parameters"] < 1.07

    def figure(name, arm, source, memory="own"):
        return arms[arm]["sources"][source][memory][name]["all"][0]

    pairs = [
        (figure(name, "rxt", source), figure(name, "current_turn", source))
        for name, source in (
            ("recall_loss", "sgd"),
            ("recall_loss", "star"),
            ("answer_perplexity", "star"),
            ("answer_perplexity", "sgd"),
        )
    ]
    assert [ours < theirs for ours, theirs in pairs] == [True, True, True, False]
    words = [f"{ours:.2f} against {theirs:.2f}" for ours, theirs in pairs]
    sentence = "{} nats on SGD, {} on STAR; so do STAR's answers (perplexity {}), and SGD's not yet ({})."
    assert sentence.format(*words) in page
    others = [figure("recall_loss", "rxt", source, "shuffled") for source in ("sgd", "star")]
    assert "those words cost {:.2f} and {:.2f} nats".format(*others) in page
    full = [
        figure(name, "full_history", source)
        for source in ("sgd", "star")
        for name in ("answer_perplexity", "recall_loss")
    ]
    assert "has {:.2f} and {:.2f} on SGD, {:.2f} and {:.2f} on STAR".format(*full) in page
    copied = [
        module.far_probes(arms["full_history"]["sources"][source]["own"]["probes"]) for source in ("sgd", "star")
    ]
    assert "and answers {:.3f} and {:.3f} of the probes".format(*copied) in page
    far = {source: module.far_probes(arms["rxt"]["sources"][source]["own"]["probes"]) for source in report["floors"]}
    assert all(share < 2 * report["floors"][source]["3+"] for source, share in far.items())


def test_what_a_memory_keeps_after_facts_first_is_shown_as_it_was_measured():
    report, module = json.loads((RESULTS / "dialogues_facts_first.json").read_text()), script("dialogues")
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(module.table(report, source) in page for source in ("sgd", "star"))
    assert all(module.by_turn(report, source) in page for source in ("sgd", "star"))
    arms, page = report["arms"], " ".join(page.split())
    readme = " ".join((ROOT / "README.md").read_text().split())
    copying = arms["full_history:equal_compute"]
    assert [arms[arm]["training_steps"] for arm in ("rxt", "current_turn")] == [22000, 22000]
    assert f"after {copying['training_steps']:,} steps in all" in page
    assert 1 < copying["training_cpu_seconds"] / arms["rxt"]["training_cpu_seconds"] < 1.07

    def far(memory, arms=arms, arm="rxt"):
        return [module.far_probes(arms[arm]["sources"][source][memory]["probes"]) for source in ("sgd", "star")]

    floor = [report["floors"][source]["3+"] for source in ("sgd", "star")]
    assert all(share > 2 * guess for share, guess in zip(far("own"), floor, strict=True))
    assert all(max(shares) < guess for *shares, guess in zip(far("shuffled"), far("cleared"), floor, strict=True))
    words = "{:.3f} of SGD's questions and {:.3f} of STAR's are answered exactly, where guessing gives {:.3f} and "
    words += "{:.3f}; with another dialogue's memory {:.3f} and {:.3f}, with none {:.3f} and {:.3f}."
    assert words.format(*far("own"), *floor, *far("shuffled"), *far("cleared")) in page
    words = "{:.3f} and {:.3f} of the questions about values said three or more turns before"
    assert words.format(*far("own")) in readme
    words = (
        "(guessing: {:.3f} and {:.3f}; a Llama of equal size and CPU time that re-reads everything: {:.3f} and {:.3f})"
    )
    assert words.format(*floor, *far("own", arm="full_history:equal_compute")) in readme
    assert f"{arms['rxt']['training_cpu_seconds'] / 60:.0f} minutes of a core" in readme
    figures = [
        tuple(arms[arm]["sources"][source]["own"][name]["all"][0] for arm in ("rxt", "current_turn"))
        for name in ("answer_perplexity", "recall_loss")
        for source in ("sgd", "star")
    ]
    assert all(ours < theirs for ours, theirs in figures)
    words = "a perplexity of {} for the Llama of the current turn on SGD and of {} on STAR, words that only earlier "
    words += "turns tell cost {} nats and {}."
    assert words.format(*(f"{ours:.2f} against {theirs:.2f}" for ours, theirs in figures)) in page
    longer = json.loads((RESULTS / "dialogues_longer.json").read_text())["arms"]
    words = "it answered {:.3f} and {:.3f}. Whether"
    assert words.format(*far("own", longer, "full_history")) in page
    ahead = far("own", arm="full_history:equal_compute")
    nats = [copying["sources"][source]["own"]["recall_loss"]["all"][0] for source in ("sgd", "star")]
    words = "it answers {:.3f} and {:.3f} of these questions, and has those words at {:.2f} and {:.2f} nats"
    assert words.format(*ahead, *nats) in page
    assert all(theirs > ours for ours, theirs in zip(far("own"), ahead, strict=True))
    theirs = copying["sources"]["star"]["own"]["answer_perplexity"]["all"][0]
    assert f"the RxT less ({figures[1][0]:.2f} against {theirs:.2f})" in page and figures[1][0] < theirs


def test_options_are_shown_as_they_were_measured():
    report = json.loads((RESULTS / "options.json").read_text())
    module, page = script("options"), (ROOT / "benchmarks" / "README.md").read_text()
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + module.CASES["seen"][8])
    dialogues = [generate_dialogue(seed, split="seen", num_turns=8, p_two=0.0, p_open=0.0) for seed in seeds]
    asked = sum(turn["kind"] == "ask" for dialogue in dialogues for turn in dialogue["interactions"])
    assert f"At 8 turns {asked} questions were asked" in page
    assert {*report["options"]} == {*module.OPTIONS}
    assert all(runs.keys() == {"1", "2", "3"} for runs in report["options"].values())
    assert module.table(report) in page
    # what is said of every seed
    found = {
        name: {figure: sorted(run[figure] for run in runs.values()) for figure in module.FIGURES}
        for name, runs in report["options"].items()
    }
    base = found.pop("base")
    better = {name for name, figures in found.items() if figures["8 turns"][0] > base["8 turns"][-1]}
    assert better == {"8 slots", "gate: one for each slot", "memory attention: self"}
    assert found["gate: none, a plain sum"]["unseen pairs"][-1] < base["unseen pairs"][0]
    assert found["stages 1 + 2"]["stale at 16"][-1] < base["stale at 16"][0]
    assert found["initial memory: zeros"]["rank after 8"][-1] < 2 < base["rank after 8"][0]
    turns = sum(run["turns"] for run in json.loads((RESULTS / "demo_training.json").read_text())["runs"])
    ours = report["steps"] * module.TURNS_PER_STEP
    assert f"seen {ours:,} turns, the demo {turns / 1e6:.1f} million" in " ".join(page.split())


def test_memory_tasks_are_shown_as_they_were_measured():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    recipe = " ".join((ROOT / "examples" / "recipes" / "memory_tasks.sh").read_text().replace("\\", " ").split())
    for name in ("remember", "rewrite", "babi", "babi_objects"):
        report = json.loads((RESULTS / f"{name}.json").read_text())
        cells = " | ".join(f"{row['exact']:.3f}" for row in report["exact"])
        heads = " | ".join(row["task"][4:] if "babi" in name else str(row["size"]) for row in report["exact"])
        assert f" | {heads} |\n|---|" in page
        assert f"| {name}, {report['parameters']:,} parameters, {report['cpu_seconds']:.0f} CPU s | {cells} |" in page
        # the recipe is the command that was measured
        options = report["command"].partition(" --tasks ")[2].replace(" --disable_tqdm True", "")
        assert options in recipe, options
    (largest,) = (row for row in json.loads((RESULTS / "remember.json").read_text())["exact"] if row["size"] == 50)
    assert largest["exact"] == 1.0


def test_capacity_is_shown_as_it_was_measured():
    report, module = json.loads((RESULTS / "capacity.json").read_text()), script("capacity")
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert module.table(report) in page
    found = {(row["num_memory_slots"], row["hidden_size"]): row for row in report["models"]}
    assert all(row["bits"] == round(module.capacity(row), 1) for row in report["models"])
    assert "--shapes " + " ".join(f"{slots}x{width}" for slots, width in found) + " --output" in page
    for row in report["models"]:
        assert all(option in row["options"] for option in ("--learning_rate 2e-3", "--bf16 False", "--hint 0.2"))
    assert "--learning_rate 2e-3 --bf16 False\n```" in page
    page = " ".join(page.split())
    assert f"on up to {report['size']} pairs and in {report['steps']:,} steps" in page
    few, more, wide = (found[shape] for shape in ((2, 48), (32, 48), (8, 80)))
    assert f"16 times the slots hold {more['bits'] / few['bits']:.0f} times the bits" in page
    narrow = found[8, 48]
    assert f"hold {wide['bits'] / narrow['bits']:.1f} times what 8 of 48 do" in page
    assert f"in {wide['memory_values'] / narrow['memory_values']:.1f} times the values" in page
    largest = json.loads((RESULTS / "remember.json").read_text())
    assert (largest["memory_bytes"], largest["steps"]) == (2 * 64 * 80 * 4, 9000)
    assert "with 64 slots of 80 and 9,000 steps, answers all of 50 pairs" in page


def test_cost_of_a_training_step_is_shown_as_it_was_measured():
    ratios = json.loads((RESULTS / "train_step_tiny.json").read_text())["ratios"]
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    peaks = [ratios[f"rxt_bptt_all_{name}_peak_bytes_at_64_over_8"] for name in ("recompute", "reentrant")]
    words = '{:.2f} times that at 8, with `gradient_checkpointing_kwargs={{"use_reentrant": True}}` {:.2f} times'
    assert words.format(*peaks) in page

    def most(ratios, name):
        return max(found for key, found in ratios.items() if key.startswith(f"rxt_bptt_all_{name}_over_llama_at_"))

    words = f"A step costs up to {most(ratios, 'step'):.2f} times that of a Llama with the same decoder over the same "
    assert words + f"tokens; its matrix products alone are up to {most(ratios, 'flops'):.2f} times as many" in page
    with torch.device("meta"):
        model = RxTForCausalLM(RxTConfig(**PRESETS["tiny"]))
    sizes = {name: weights.numel() for name, weights in model.named_parameters() if "layers" in name}
    memory = sum(size for name, size in sizes.items() if "memory" in name)
    assert f"has {memory / (sum(sizes.values()) - memory):.1f} times the weights of the decoder's own layers" in page
    larger = json.loads((RESULTS / "train_step_vocab_8192.json").read_text())["ratios"]
    words = "a step costs up to {:.2f} times, the products are {:.2f} times as many."
    assert words.format(most(larger, "step"), most(larger, "flops")) in page
    report = json.loads((RESULTS / "train_step_depth.json").read_text())
    arms = [f"rxt_bptt_{depth}" for depth in ("1", "4", "all")]
    words = (
        "take {:.0f}, {:.0f} and {:.0f} MiB at their peak without recomputation, and {:.2f}, {:.2f} and {:.2f} times"
    )
    peaks = [report["steps"][arm]["64"]["peak_bytes"] / 2**20 for arm in arms]
    assert words.format(*peaks, *(report["ratios"][f"{arm}_step_over_llama_at_64"] for arm in arms)) in page
