# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Writes every table and figure of the documents from the files in `results/`.

    python benchmarks/tables.py            # write them
    python benchmarks/tables.py --check    # exit with 1, and name the files, if one of them is out of date

A block stands between `<!-- NAME -->` and `<!-- end -->` in README.md, docs or model_cards; NAME is a key of `BLOCKS`.
`FIGURES` are files of their own. Text outside of blocks holds no measured number. The script needs no package.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import ceil, exp, log
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/*.md", "docs/guides/*.md", "model_cards/*.md")
BLOCK = re.compile(r"(<!-- (?!end -->)([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

DIALOGUE_TITLES = {
    "rxt": "RxT, fixed-size memory",
    "rxt, shuffled": "the same, memory shuffled",
    "rxt, cleared": "the same, memory cleared",
    "current_turn": "Llama, current turn only",
    "sliding_window": "Mistral, sliding window",
    "mamba": "Mamba-2, state carried on",
    "full_history": "Llama, full history, equal data",
    "full_history:equal_compute": "Llama, full history, equal CPU",
}
# first turns of the groups that are shown
DIALOGUE_TURNS = (1, 2, 3, 5, 9, 13)
OPTION_FIGURES = ("8 turns", "16 turns", "32 turns", "unseen pairs", "stale at 16", "rank after 8", "CPU s")
DEMO_ARMS = {
    "first_run": "RxT, fixed-size memory",
    "full_history": "Llama, re-reads the whole history",
    "current_turn": "Llama, current turn only",
}
COST_ARMS = {
    "rxt": ("RxT", "#1f6feb"),
    "persistent_cache": ("Llama that keeps its KV cache", "#d1690e"),
    "full_history": ("Llama that re-reads the history", "#b3348a"),
    "current_turn": ("Llama, current turn only", "#7a6a52"),
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown_table(head: Iterable[Any], *rows: Iterable[Any]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def show(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def by_turns(rows: Iterable[Mapping[str, Any]], figure: str, split: str = "seen") -> dict[int, float]:
    return {row["turns"]: row[figure] for row in rows if row["split"] == split}


def recall_by_turns(report: Mapping[str, Any]) -> str:
    lengths = (4, 8, 16, 32, 64)
    lines = [
        ("facts of trained pairs", "rxt", "seen", "recall"),
        ("pairs of attribute and value never trained together", "rxt", "unseen", "recall"),
        ("names never seen in training", "rxt", "open", "recall"),
        ("jobs, towns, food ... never seen in training", "rxt", "new", "recall"),
        ("trained pairs, in phrases never seen in training", "casual", "seen", "recall"),
        ("two or three facts told in a sentence", "introductions", "seen", "recall"),
        ("stale answers about overwritten facts", "rxt", "seen", "stale"),
        ('"You have not told me that yet." where it is due', "rxt", "seen", "abstention"),
        ('"I cannot keep that." to kinds of things never trained', "foreign", "seen", "statements_refused"),
        ("such things, filed under an attribute", "foreign", "seen", "filed"),
        ("with the memory shuffled", "shuffled", "seen", "recall"),
        ("with the memory cleared", "cleared", "seen", "recall"),
    ]
    rows = []
    for title, arm, split, figure in lines:
        found = by_turns(report[arm]["recall"], figure, split)
        rows.append([title, *(show(found.get(turns)) for turns in lengths)])
    return markdown_table(["turns of the dialogue", *lengths], *rows)


def live_facts(report: Mapping[str, Any]) -> str:
    (row,) = (row for row in report["rxt"]["recall"] if (row["split"], row["turns"]) == ("seen", 64))
    found = row["by_live_facts"]
    return markdown_table(
        ["facts alive in a dialogue of 64 turns", *found],
        ["share of questions answered right", *(show(share) for share, _ in found.values())],
        ["questions", *(number for _, number in found.values())],
    )


def demo_baselines(report: Mapping[str, Any]) -> str:
    lengths, rows = (8, 16, 32, 64), []
    for arm, title in DEMO_ARMS.items():
        right, names = (by_turns(report[arm]["recall"], "recall", split) for split in ("seen", "open"))
        perplexity = report[arm]["answer_perplexity"]
        cells = [f"{right[turns]:.3f} / {perplexity[str(turns)]:.3f}" for turns in lengths]
        trained = [f"{report[arm]['training_steps']:,}", f"{report[arm]['training_cpu_seconds']:,.0f}"]
        rows.append([title, *cells, show(names[4]), *trained])
    head = ["recall / perplexity by turns", *lengths, "unknown names, 4 turns", "steps", "CPU s"]
    return markdown_table(head, *rows)


def demo_facts(report: Mapping[str, Any]) -> str:
    rxt, runs = report["rxt"], load("demo_training")["runs"]
    ranks = rxt["effective_rank_by_turn"]
    return markdown_table(
        ["", ""],
        ["parameters", f"{rxt['parameters']:,}"],
        ["memory of one conversation, bytes of float32", f"{rxt['memory_bytes']:,}"],
        ["training, CPU seconds of one core", f"{rxt['training_cpu_seconds']:,.0f}"],
        ["training, turns", f"{sum(run['turns'] for run in runs):,}"],
        [
            f"effective rank of the slots after {', '.join(ranks)} turns, by layer",
            ", ".join(" and ".join(f"{rank:.1f}" for rank in layers) for layers in ranks.values()),
        ],
        [
            f"answer perplexity at {', '.join(rxt['answer_perplexity'])} turns, teacher forced",
            ", ".join(show(value) for value in rxt["answer_perplexity"].values()),
        ],
    )


def demo_runs(report: Mapping[str, Any]) -> str:
    rows = []
    for number, run in enumerate(report["runs"], 1):
        losses = {entry["step"]: entry["loss"] for entry in run["log"]}
        tenths = [show(losses.get(run["steps"] * tenth // 10)) for tenth in range(1, 11)]
        rows.append([number, f"{run['steps']:,}", f"{run['turns']:,}", f"{run['cpu_seconds']:,.0f}", *tenths])
    head = ["run", "steps", "turns", "CPU s", *(f"loss at {tenth}0 %" for tenth in range(1, 11))]
    return markdown_table(head, *rows)


def turn_cost(report: Mapping[str, Any]) -> str:
    ratios, turns = report["ratios"], report["options"]["turns"]
    kinds = {
        "time to first token, Llama that re-reads the history / RxT": "first_token_speedup_over_full_history",
        "turn, Llama with a persistent KV cache / RxT": "turn_speedup_over_persistent_cache",
        "turn, RxT / Llama that sees the current turn only": "turn_slowdown_over_current_turn",
        "the same with the asynchronous write": "async_turn_slowdown_over_current_turn",
    }
    rows = []
    for title, kind in kinds.items():
        found = (ratios.get(f"{kind}_at_{turn}") for turn in turns)
        rows.append([title, *("" if ratio is None else f"{ratio:.3g}" for ratio in found)])
    return markdown_table(["ratio of times; turn", *turns], *rows)


def state_cost(report: Mapping[str, Any]) -> str:
    turns, rows = report["options"]["turns"], []
    for arm, title in (("rxt", "RxT, its memory"), ("persistent_cache", "Llama, its KV cache")):
        sizes = [report["turns"][arm][str(turn)]["state_bytes"] for turn in turns]
        rows.append([title, *(f"{size // 1024:,}" for size in sizes)])
    return markdown_table(["KiB kept until the next turn; turn", *turns], *rows)


def decoding(dense: Mapping[str, Any], sparse: Mapping[str, Any]) -> str:
    rows = []
    for title, report in (("`100m`", dense), ("`100m-sqa`, sparse attention to the memory", sparse)):
        names = (f"decode_share_of_current_turn_at_batch_{rows}_eager" for rows in (1, 8))
        rows.append([title, *(show(report["ratios"][name], 2) for name in names)])
    return markdown_table(["tokens per second, RxT / Llama of the current turn", "batch 1", "batch 8"], *rows)


def conversations(report: Mapping[str, Any]) -> str:
    turns, rows = list(report["states"]["rxt"]), []
    at, batch = report["options"]["at_turn"], "8"
    for arm, title in (("rxt", "RxT"), ("persistent_cache", "Llama with a persistent KV cache")):
        found = report["states"][arm]
        rate = report["tokens_per_s"]["batched"][batch][arm]
        rows.append([title, *(f"{found[turn]['conversations']:,}" for turn in turns), f"{rate:.3g}"])
    budget = f"{report['options']['budget_gib']:g} GiB"
    head = [f"conversations in {budget} after turn", *turns, f"tokens/s of {batch} in a batch, turn {at}"]
    return markdown_table(head, *rows)


def training_step(tiny: Mapping[str, Any], larger: Mapping[str, Any]) -> str:
    def most(report: Mapping[str, Any], name: str) -> str:
        found = report["ratios"].items()
        return show(max(ratio for key, ratio in found if key.startswith(f"rxt_bptt_all_{name}_over_llama_at_")), 2)

    peaks = (tiny["ratios"][f"rxt_bptt_all_{name}_peak_bytes_at_64_over_8"] for name in ("recompute", "reentrant"))
    vocabularies = [report["size"]["vocab_size"] for report in (tiny, larger)]
    first, second = (f"vocabulary of {size:,}" for size in vocabularies)
    return markdown_table(
        ["ratio", first, second],
        ["step of an RxT / of a Llama with the same decoder, at most", most(tiny, "step"), most(larger, "step")],
        ["the same of its matrix products", most(tiny, "flops"), most(larger, "flops")],
        ["peak memory at 64 / at 8 turns, with recomputation", show(next(peaks), 2), ""],
        ["the same with `use_reentrant`", show(next(peaks), 2), ""],
    )


def training_depth(report: Mapping[str, Any]) -> str:
    rows = []
    for depth in ("1", "4", "all"):
        arm = f"rxt_bptt_{depth}"
        peak = report["steps"][arm]["64"]["peak_bytes"] / 2**20
        rows.append([depth, f"{peak:.0f}", show(report["ratios"][f"{arm}_step_over_llama_at_64"], 2)])
    head = ["writes that gradients go through, 64 turns", "peak, MiB", "step / Llama's step"]
    return markdown_table(head, *rows)


def fewer_bits(report: Mapping[str, Any]) -> str:
    lengths = [row["turns"] for row in next(iter(report["arms"].values()))["recall"]]
    rows = []
    for name, arm in report["arms"].items():
        sizes = (f"{arm[key]:,}" for key in ("weight_bytes", "memory_file_bytes"))
        rows.append([name, *sizes, *(f"{row['recall']:.3f} ± {row['recall_ci95']:.3f}" for row in arm["recall"])])
    return markdown_table(
        ["in fewer bits", "weights, bytes", "memory, bytes", *(f"recall, {turns} turns" for turns in lengths)], *rows
    )


def memory_task(report: Mapping[str, Any], head: str) -> str:
    names = [row["task"].removeprefix("babi") if "babi" in row["task"] else row["size"] for row in report["exact"]]
    return markdown_table(
        [head, *names, "parameters", "CPU s"],
        [
            "share right",
            *(show(row["exact"]) for row in report["exact"]),
            f"{report['parameters']:,}",
            f"{report['cpu_seconds']:,.0f}",
        ],
    )


def capacity_table(report: Mapping[str, Any]) -> str:
    sizes = [found["size"] for found in report["models"][0]["exact"]]
    rows = [
        [
            *(row[name] for name in ("num_memory_slots", "hidden_size", "memory_values")),
            *(show(found["exact"]) for found in row["exact"]),
            *(show(row["bits"], 0), show(row["bits"] / row["memory_values"]), show(row["cpu_seconds"], 0)),
        ]
        for row in report["models"]
    ]
    head = ["slots", "width", "values in both layers", *(f"{size} pairs" for size in sizes)]
    return markdown_table([*head, "bits", "bits per value", "CPU s"], *rows)


def preference(report: Mapping[str, Any]) -> str:
    rows = []
    for name in ("before", "after"):
        found = {(row["split"], row["turns"]): row for row in report[name]}
        figures = (found["seen", 32]["recall"], found["seen", 32]["stale"], found["open", 8]["recall"])
        rows.append([name, *map(show, figures)])
    return markdown_table(["", "recall, 32 turns", "stale answers, 32 turns", "unknown names, 8 turns"], *rows)


def reinforcement(report: Mapping[str, Any]) -> str:
    head, rows = ["answers", "dialogues", "turns"], []
    head += [f"{figure}, {name}" for figure in ("right", "abstains where due") for name in ("before", "after")]
    for before, after in zip(report["before"], report["after"], strict=True):
        kinds = ["sampled" if before["do_sample"] else "greedy", before["split"], before["turns"]]
        rows.append(kinds + [show(row[figure]) for figure in ("recall", "abstention") for row in (before, after)])
    return markdown_table(head, *rows)


def far_probes(found: Mapping[str, Any]) -> float:
    """Share of the probes answered exactly whose value was said three or more turns before."""
    rows = [row for bucket, row in found["exact_by_distance"].items() if bucket not in ("1", "2")]
    return sum(share * number for share, number in rows) / sum(number for _, number in rows)


def dialogues_table(report: Mapping[str, Any], source: str) -> str:
    rows = []
    for key, title in DIALOGUE_TITLES.items():
        arm, _, memory = key.partition(", ")
        if arm not in report["arms"]:
            continue
        entry = report["arms"][arm]
        found = entry["sources"][source][memory or "own"]
        losses = found["recall_loss"]
        cells = [show(found["answer_perplexity"]["all"][0], 2)]
        cells += [show(losses[name][0], 2) if name in losses else "" for name in ("all", "3-4", "5-8", "9-1000")]
        cells.append(show(far_probes(found["probes"])))
        trained = [f"{entry[key]:,.0f}" for key in ("parameters", "training_steps", "training_cpu_seconds")]
        rows.append([title, *cells, *(trained if not memory else [""] * 3)])
    rows.append(["a slot's most frequent value", *[""] * 5, show(report["floors"][source]["3+"]), *[""] * 3])
    head = [source, "answer perplexity", "nats per recalled token", "at distance 3-4", "5-8", "9+"]
    return markdown_table([*head, "probes, distance 3+", "parameters", "training steps", "CPU s"], *rows)


def dialogues_by_turn(report: Mapping[str, Any], source: str) -> str:
    """Answer perplexity by the number of the turn."""
    groups = list(zip(DIALOGUE_TURNS, [*DIALOGUE_TURNS[1:], 1000], strict=True))
    rows = []
    for arm in (arm for arm in DIALOGUE_TITLES if arm in report["arms"]):
        found = report["arms"][arm]["sources"][source]["own"]["answer_perplexity"]
        cells = []
        for low, high in groups:
            group = [found[turn] for turn in found if turn != "all" and low <= int(turn) < high]
            tokens = sum(number for _, number in group)
            total = sum(log(perplexity) * number for perplexity, number in group)
            cells.append(show(exp(total / max(1, tokens)), 2) if group else "")
        rows.append([DIALOGUE_TITLES[arm], *cells])
    names = [str(low) if low == high - 1 else f"{low}-{high - 1}" for low, high in groups[:-1]]
    return markdown_table([f"{source}; turn", *names, f"{groups[-1][0]}+"], *rows)


def both_sources(render: Callable[[Mapping[str, Any], str], str], report: Mapping[str, Any]) -> str:
    return "\n\n".join(render(report, source) for source in report["floors"])


def options_table(report: Mapping[str, Any]) -> str:
    """Means over seeds, with the smallest and the largest if there are several."""
    rows = []
    for name, runs in report["options"].items():
        cells = []
        for figure in OPTION_FIGURES:
            values = [run[figure] for run in runs.values() if run[figure] is not None]
            digits = 0 if figure == "CPU s" else 1 if figure.startswith("rank") else 2
            cells.append(show(mean(values), digits) if values else "")
            if len(values) > 1:
                cells[-1] += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
        rows.append([name, *cells])
    return markdown_table(["option", *OPTION_FIGURES], *rows)


def summary() -> str:
    demo, cost, real = load("fact_recall"), load("turn_cost_100m"), load("dialogues_facts_first")
    right = {arm: by_turns(demo[arm]["recall"], "recall") for arm in ("rxt", "cleared", *DEMO_ARMS)}
    shares = " / ".join(show(right["rxt"][turns]) for turns in (8, 16, 32, 64))
    others = (f"{title.partition(', ')[2]}: {show(right[arm][16])}" for arm, title in list(DEMO_ARMS.items())[1:])
    rows = [
        [
            "demo, questions answered right in 8 / 16 / 32 / 64 turns",
            shares,
            f"memory cleared: {show(right['cleared'][8])}",
        ],
        [
            "the demo's first run, 16 turns",
            show(right["first_run"][16]),
            f"Llama of equal size and CPU time, {'; '.join(others)}",
        ],
    ]
    for source, name in (("sgd", "Schema-Guided Dialogue"), ("star", "STAR")):
        ours, theirs = (
            far_probes(real["arms"][arm]["sources"][source]["own"]["probes"])
            for arm in ("rxt", "full_history:equal_compute")
        )
        guess = show(real["floors"][source]["3+"])
        rows.append([f"{name}, questions about values said three or more turns before", show(ours)])
        rows[-1].append(f"Llama of equal size and CPU time that re-reads: {show(theirs)}; guessing: {guess}")
    found, ratios = cost["turns"], cost["ratios"]
    times = {arm: found[arm]["64"]["turn_s"] / found[arm]["2"]["turn_s"] for arm in ("rxt", "persistent_cache")}
    state = {arm: f"{found[arm]['64']['state_bytes'] // 1024:,}" for arm in times}
    rows += [
        [
            "decoder of 110M parameters, time of turn 64 / of turn 2",
            show(times["rxt"], 2),
            f"Llama that keeps its KV cache: {times['persistent_cache']:.3g}",
        ],
        ["the same, KiB kept after turn 64", state["rxt"], f"KV cache: {state['persistent_cache']}"],
        [
            "the same, time of turn 8 / of a Llama that sees that turn only",
            f"{ratios['turn_slowdown_over_current_turn_at_8']:.3g}",
            f"asynchronous write: {ratios['async_turn_slowdown_over_current_turn_at_8']:.3g}",
        ],
    ]
    return markdown_table(["measured", "RxT", "compared with"], *rows)


def cost_figure(report: Mapping[str, Any]) -> str:
    """Seconds of a turn by its number, as SVG that needs no font, script or background of its own."""
    turns, left, top, width, height = report["options"]["turns"], 62, 34, 540, 220
    most = 5 * ceil(max(found["turn_s"] for found in report["turns"]["persistent_cache"].values()) / 5)

    def at(turn: int, seconds: float) -> tuple[float, float]:
        x = left + width * turns.index(turn) / (len(turns) - 1)
        return round(x, 1), round(top + height * (1 - seconds / most), 1)

    def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#52606f") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    parts = []
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        y = round(top + height * (1 - share), 1)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#d8dee6"/>')
        parts.append(text(left - 8, y + 4, f"{share * most:.0f} s", "end"))
    parts += [text(at(turn, 0)[0], top + height + 20, f"{turn}") for turn in turns]
    axes, labels = len(parts), []
    for number, (arm, (title, colour)) in enumerate(COST_ARMS.items()):
        points = [at(int(turn), found["turn_s"]) for turn, found in report["turns"][arm].items()]
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
        y = top + 18 + 20 * number
        labels.append(f'<line x1="{left + 14}" x2="{left + 36}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}"/>')
        labels.append(text(left + 42, y, title, "start", colour))
    curves, parts = parts[axes:], parts[:axes]
    parts.append(text(left + width / 2, top + height + 42, "number of the turn"))
    parts.append(text(left + width / 2, 18, "time of a turn (decoder of 110 million parameters, one CPU core)"))
    panel = f'<rect x="0" y="{top - 6}" width="100%" height="100%"/>'
    size = f"{left + width + 24} {top + height + 52}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="13">',
        f'<clipPath id="panel">{panel}</clipPath>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *parts,
        '<g clip-path="url(#panel)">',
        *curves,
        "</g>",
        *labels,
        "</svg>\n",
    ]
    return "\n".join(lines)


SERVING_ARMS = {
    "session": "`RxTSession.send`, one by one",
    "engine": "the engine, in process",
    "http, one row": "HTTP, one row",
    "http": "HTTP",
    "http, streamed": "HTTP, streamed",
}


def serving(*reports: Mapping[str, Any]) -> str:
    """Tokens per CPU second, and the first token's time, by model and number of clients."""
    head = ["clients", "1", "8", "32", "first token of 32, p50 / p95"]
    tables = []
    for report in reports:
        rows = []
        for arm, title in SERVING_ARMS.items():
            found = report["arms"][arm]
            first = found["32"].get("first_token")
            times = "" if first is None else f"{first['p50_ms']:.0f} / {first['p95_ms']:.0f} ms"
            rows.append([title, *(f"{found[count]['tokens_per_cpu_s']:.0f}" for count in ("1", "8", "32")), times])
        size = f"{report['parameters'] / 1e6:.1f} million parameters; clients"
        tables.append(markdown_table([size, *head[1:]], *rows))
    return "\n\n".join(tables)


UPCYCLING_ARMS = {
    "query_only": "SmolLM2-135M-Instruct, the query alone",
    "full_history": "SmolLM2-135M-Instruct, the whole dialogue",
}
UPCYCLING_MEMORIES = {
    "none": "",
    "own": ", own memory",
    "cleared": ", memory cleared",
    "shuffled": ", memory shuffled",
}


def upcycling(report: Mapping[str, Any]) -> str:
    """Nats of recalled words, by turns since they were told, and of the other words, for each data set."""
    tables = []
    for data, arms in report["arms"].items():
        distances = list(next(iter(next(iter(arms.values())).values()))["recalled"])
        turns = [f"{distance} turns" for distance in distances[1:]]
        head = [f"{data}; nats a token", "recalled", *turns, "other words"]
        rows = []
        for arm, memories in arms.items():
            for memory, found in memories.items():
                if memory not in UPCYCLING_MEMORIES:
                    continue
                recalled = [show(found["recalled"].get(distance, (None,))[0], 2) for distance in distances]
                title = upcycling_titles(arm, memory)
                rows.append([title, *recalled, show(found["ordinary"][0], 2)])
        tables.append(markdown_table(head, *rows))
    return "\n\n".join(tables)


def upcycling_titles(arm: str, memory: str) -> str:
    return UPCYCLING_ARMS.get(arm, arm) + UPCYCLING_MEMORIES[memory]


def upcycling_tasks(report: Mapping[str, Any]) -> str:
    """Shares of the questions that were answered right: probes of dialogues, facts by turns; and text without them."""
    tasks = report["tasks"]
    asked = {name: tasks.get(name, {}) for name in ("probes", "facts", "text")}
    sources = list(dict.fromkeys(name for arm in asked["probes"].values() for name in arm if " dialogues" in name))
    turns = list(dict.fromkeys(name for arm in asked["facts"].values() for name in arm if name.isdigit()))
    head = ["", *(f"probes, {source}" for source in sources), *(f"facts, {number} turns" for number in turns)]
    rows = []
    for arm in dict.fromkeys(name for found in asked.values() for name in found):
        probes, facts = asked["probes"].get(arm, {}), asked["facts"].get(arm, {})
        for memory in UPCYCLING_MEMORIES:
            of_probes = [probes.get(source, {}).get(memory) for source in sources]
            shares = [None if each is None else far_probes(each) for each in of_probes]
            shares += [facts.get(number, {}).get(memory, {}).get("right") for number in turns]
            if any(share is not None for share in shares):
                text = asked["text"].get(arm, {}).get("perplexity") if memory in ("none", "cleared") else None
                rows.append([upcycling_titles(arm, memory), *(show(share, 2) for share in shares), show(text, 2)])
    return markdown_table([*head, "perplexity of plain text"], *rows)


def upcycling_long(report: Mapping[str, Any]) -> str:
    """Shares of right answers by tokens of the conversation, and of those that name a former value."""
    arms = report["tasks"].get("long", {})
    lengths = list(dict.fromkeys(name for arm in arms.values() for name in arm if name.isdigit()))
    figures = [("needle", "right", "codes"), ("tracking", "right", "boxes"), ("tracking", "stale", "boxes, stale")]
    rows = []
    for arm, found in arms.items():
        for memory in UPCYCLING_MEMORIES:
            each = [
                found.get(length, {}).get(task, {}).get(memory, {}).get(figure)
                for task, figure, _ in figures
                for length in lengths
            ]
            if any(share is not None for share in each):
                rows.append([upcycling_titles(arm, memory), *(show(share, 2) for share in each)])
    head = [f"{title}, {int(length):,} tokens" for _, _, title in figures for length in lengths]
    return markdown_table(["", *head], *rows)


def upcycling_cost(report: Mapping[str, Any]) -> str:
    """CPU time and state of a turn, by tokens told before it, and how fast it decodes."""
    rows = []
    ways = {"memory": "", "kv_cache": ", language model with its KV cache", "re_read": ", language model re-reading"}
    for arm, cost in report["tasks"].get("cost", {}).items():
        for way, title in ways.items():
            cells = []
            for found in cost["turns"].values():
                size = found["state_bytes"].get(way)
                cells += [show(found["turn_cpu_s"][way], 2), "" if size is None else f"{size / 2**20:.1f}"]
            shares = [cost["decode_share"][number] for number in ("1", "8")]
            shares += [cost["write_share"][name] for name in ("in_passing", "apart")]
            rows.append([arm + title, *cells, *(show(share, 2) if way == "memory" else "" for share in shares)])
    lengths = list(dict.fromkeys(name for cost in report["tasks"].get("cost", {}).values() for name in cost["turns"]))
    head = [text for length in lengths for text in (f"CPU s behind {int(length):,} tokens", "state, MiB")]
    shares = ["decoding, share of the plain model's speed", "in a batch of 8"]
    return markdown_table(["", *head, *shares, "write in passing, share of a turn", "apart"], *rows)


def smollm2_facts(run: Mapping[str, Any]) -> str:
    folder, slots = ROOT / "rxt_hf" / "demo_smollm2", run["conversion"]["num_memory_slots"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # layers and width of SmolLM2-135M
    states = slots * 30 * 576
    return markdown_table(
        ["", ""],
        ["adapter and salience, bytes", f"{size:,}"],
        ["memory of one conversation, bytes of float32", f"{4 * states:,}"],
        ["training, CPU seconds of one core, with what it computes before", f"{run['cpu_seconds']:,.0f}"],
        ["training, dialogues and kept turns", f"{run['data']['dialogues']:,} and {run['data']['turns']:,}"],
        ["recalled tokens that the memory held when the salience was fitted", show(run["salience"]["held"])],
    )


def smollm2_training(run: Mapping[str, Any]) -> str:
    entries = run["losses"][::4]
    head = [f"step {entry['step']}" for entry in entries]
    losses = markdown_table(["", *head], ["loss", *(show(entry["loss"], 2) for entry in entries)])
    return f"```bash\n{run['command']}\n```\n\n{losses}"


BLOCKS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "recall": lambda: recall_by_turns(load("fact_recall")),
    "live-facts": lambda: live_facts(load("fact_recall")),
    "demo-baselines": lambda: demo_baselines(load("fact_recall")),
    "demo-facts": lambda: demo_facts(load("fact_recall")),
    "demo-runs": lambda: demo_runs(load("demo_training")),
    "turn-cost": lambda: turn_cost(load("turn_cost_100m")),
    "state-cost": lambda: state_cost(load("turn_cost_100m")),
    "decoding": lambda: decoding(load("decode_100m"), load("decode_100m_sqa")),
    "conversations": lambda: conversations(load("concurrency_100m")),
    "serving": lambda: serving(load("serving"), load("serving_wider")),
    "fewer-bits": lambda: fewer_bits(load("quantized_recall")),
    "remember": lambda: memory_task(load("remember"), "pairs told"),
    "rewrite": lambda: memory_task(load("rewrite"), "writes"),
    "babi": lambda: memory_task(load("babi"), "bAbI task"),
    "babi-objects": lambda: memory_task(load("babi_objects"), "bAbI task"),
    "capacity": lambda: capacity_table(load("capacity")),
    "training-step": lambda: training_step(load("train_step_tiny"), load("train_step_vocab_8192")),
    "training-depth": lambda: training_depth(load("train_step_depth")),
    "preference": lambda: preference(load("preference")),
    "reinforcement": lambda: reinforcement(load("reinforcement")),
    "dialogues": lambda: both_sources(dialogues_table, load("dialogues")),
    "dialogues-longer": lambda: both_sources(dialogues_table, load("dialogues_longer")),
    "dialogues-facts-first": lambda: both_sources(dialogues_table, load("dialogues_facts_first")),
    "dialogues-by-turn": lambda: both_sources(dialogues_by_turn, load("dialogues_facts_first")),
    "upcycling": lambda: upcycling(load("upcycling")),
    "upcycling-cost": lambda: upcycling_cost(load("upcycling")),
    "smollm2-facts": lambda: smollm2_facts(load("../../rxt_hf/demo_smollm2/run")),
    "smollm2-training": lambda: smollm2_training(load("../../rxt_hf/demo_smollm2/run")),
    "options": lambda: options_table(load("options")),
}
FIGURES: dict[str, Callable[[], str]] = {
    "docs/images/cost_by_turn.svg": lambda: cost_figure(load("turn_cost_100m")),
}


def filled(text: str, page: str) -> str:
    """The text with every block written anew; raises `ValueError` for a block that no function writes."""

    def block(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"{page} has a block {name!r}, expected one of {sorted(BLOCKS)}.")
        return f"{start}{BLOCKS[name]()}\n{end}"

    return BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    args = parser.parse_args(argv)
    pages = sorted(path for pattern in PAGES for path in root.glob(pattern))
    written = {path: partial(filled, path.read_text(encoding="utf-8"), path.name) for path in pages}
    written |= {root / name: figure for name, figure in FIGURES.items()}
    old = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in written}
    stale = {path: text for path, write in written.items() if (text := write()) != old[path]}
    for path, text in stale.items():
        print(f"{path.relative_to(root)} {'is out of date: run python benchmarks/tables.py' if args.check else ''}")
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
