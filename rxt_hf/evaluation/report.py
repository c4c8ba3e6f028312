# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The report of `rxt eval` as one HTML page that loads nothing: a function of the JSON alone, all of whose text is
escaped."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

MAPS = {
    "change": "Written: relative change of each slot",
    "read": "Read by the answer: weight of each slot",
    "cosine_to_before": "Drift: cosine to the slot before the turn",
    "cosine_to_initial": "Drift: cosine to the initial slot",
    "norm": "Norm of each slot",
}
COLOURS = ("#1f6feb", "#d1690e", "#2a9d4e", "#b3348a", "#6b5bd6", "#7a6a52")
# its variables are escaped, but for charts, which escape their own text
PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("report.jinja")


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shown_range(name: str) -> str:
    """How a range of distances is written: "1-1" as 1, "9-1000" as 9+."""
    low, _, high = name.partition("-")
    return low if low == high else f"{low}+" if high == "1000" else name


def by_memory(title: str, found: Mapping[str, Mapping[str, Sequence]]) -> list[list[str]]:
    """A head, a row of figures for each memory, and one of how many there are."""
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    rows = [[memory, *(shown(figures.get(name, [None])[0]) for name in names)] for memory, figures in found.items()]
    counts = next(iter(found.values()))
    return [
        [title, *map(shown_range, names)],
        *rows,
        ["number", *(str(counts.get(name, [0, 0])[1]) for name in names)],
    ]


def tables(report: Mapping[str, Any], source: str) -> list[tuple[str, list[list[str]]]]:
    """Returns a title and rows, the head first, for each table of a source; the inside of memories is left out."""
    found = report["sources"][source]
    blocks = [
        (f"{source}: perplexity of true answers", by_memory("memory; turn", found["answer_perplexity"])),
        (f"{source}: loss on recalled words", by_memory("memory; nats, distance", found["recall_loss"])),
    ]
    if probes := found.get("probes"):
        asked = {
            memory: {"all": [part["exact"], part["questions"]], **part["exact_by_distance"]}
            for memory, part in probes.items()
        }
        blocks.append((f"{source}: probes, exact answers", by_memory("memory; share, distance", asked)))
        contained = [[memory, shown(part["contains"])] for memory, part in probes.items()]
        blocks.append((f"{source}: probes", [["memory", "answer contains the value"], *contained]))
    if bleu := found.get("bleu"):
        rows = [[memory, shown(bleu[memory])] for memory in ("own", "cleared")]
        blocks.append(
            (f"{source}: greedy answers, closed loop", [["memory", f"BLEU, {bleu['answers']} answers"], *rows])
        )
    return [(title, rows) for title, rows in blocks if len(rows[0]) > 1]


def line_chart(title: str, series: Mapping[str, Mapping[str, float | None]], x_title: str) -> str:
    """A polyline with points for each series of figures by name; names are spaced evenly, missing figures left out."""
    names = list(dict.fromkeys(name for figures in series.values() for name in figures))
    values = [value for figures in series.values() for value in figures.values() if value is not None]
    if not values:
        return ""
    low, high = min(0.0, *values), max(values)
    width, height, left, top = 360, 170, 44, 8
    scale = (high - low) or 1.0

    def at(name: str, value: float) -> tuple[float, float]:
        x = left + (width * (names.index(name) + 0.5)) / len(names)
        return round(x, 1), round(top + height * (high - value) / scale, 1)

    parts = [
        f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#d8dee6"/>'
        f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{shown(value)}</text>'
        for value, y in ((high, top), ((high + low) / 2, top + height / 2), (low, top + height))
    ]
    every = -(-len(names) // 16)
    parts += [
        f'<text x="{at(name, low)[0]}" y="{top + height + 14}" text-anchor="middle">{escape(name)}</text>'
        for name in names[::every]
    ]
    for number, (label, figures) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [at(name, value) for name, value in figures.items() if value is not None]
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.4" fill="{colour}"/>' for x, y in points]
        y = top + 12 + 15 * number
        parts.append(f'<line x1="{left + width + 8}" x2="{left + width + 24}" y1="{y}" y2="{y}" stroke="{colour}"/>')
        parts.append(f'<text x="{left + width + 28}" y="{y + 4}">{escape(label)}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 30}" text-anchor="middle">{escape(x_title)}</text>')
    size = (left + width + 130, max(top + height + 36, top + 20 + 15 * len(series)))
    return figure(title, size, "".join(parts))


def heatmap(title: str, rows: Sequence[Sequence[float | None]]) -> str:
    """A rectangle for each figure, white for the least and dark for the largest; red where there is none."""
    values = [value for row in rows for value in row if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    cells: dict[str, list[str]] = defaultdict(list)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            # rectangles of one shade are one path: sixteen shades, however many slots
            shade = "#c00" if value is None else _shade(round(15 * (value - low) / ((high - low) or 1.0)))
            cells[shade].append(f"M{x} {y}h1v1h-1z")
    paths = "".join(f'<path fill="{shade}" d="{"".join(marks)}"/>' for shade, marks in cells.items())
    columns, left = max(map(len, rows)), 24
    scale = max(3, min(14, 420 // columns))
    labels = "".join(
        f'<text x="{left - 5}" y="{14 * y + 11}" text-anchor="end">{y + 1}</text>' for y in range(len(rows))
    )
    body = f'{labels}<g transform="translate({left} 0) scale({scale} 14)" shape-rendering="crispEdges">{paths}</g>'
    return figure(f"{title}: {shown(low)} to {shown(high)}", (left + scale * columns + 2, 14 * len(rows) + 2), body)


def _shade(level: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(round(255 + (dark - 255) * level / 15) for dark in (8, 48, 107)))


def figure(title: str, size: tuple[float, float], body: str) -> str:
    width, height = size
    picture = f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
    return Markup(f"<figure>{picture}<figcaption>{escape(title)}</figcaption></figure>")


def _charts(found: Mapping[str, Any]) -> list[str]:
    charts = []
    for title, x_title, part in (
        ("Perplexity of true answers", "turn", found["answer_perplexity"]),
        ("Loss on recalled words, nats", "turns since the word was said", found["recall_loss"]),
        (
            "Probes",
            "distance",
            {name: part["exact_by_distance"] for name, part in (found.get("probes") or {}).items()},
        ),
    ):
        series = {
            memory: {shown_range(name): value for name, (value, _) in figures.items() if name != "all"}
            for memory, figures in part.items()
        }
        charts.append(line_chart(title, series, x_title))
    return charts


def _inside(inside: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """A dialogue, and for each layer of its memory maps with a row for each turn and a column for each slot."""
    said = [["turn", "instruction", "query", "answer"]] + [
        [str(turn), *(str(each.get(name) or "") for name in ("instruction", "query", "answer"))]
        for turn, each in enumerate(inside["turns"], 1)
    ]
    maps = {title: inside[name] for name, title in MAPS.items()}
    maps |= {f"{kind}: weight of the update": values for kind, values in inside["gates"].items()}
    charts = []
    for title, turns in maps.items():
        for layer in range(len(turns[0])):
            charts.append(heatmap(f"{title}, layer {layer}", [turn[layer] for turn in turns]))
    ranks = inside["effective_rank"]
    series = {
        f"layer {layer}": {str(turn): None if row is None else row[layer] for turn, row in enumerate(ranks, 1)}
        for layer in range(len(inside["change"][0]))
    }
    return said, [*charts, line_chart("Effective rank of the slots", series, "turn")]


def page(report: Mapping[str, Any]) -> str:
    """Returns the whole page. Dialogues, names and the command come from other people, so all text is escaped."""
    layers, slots, width = report["memory"]
    facts = report["environment"] | {
        "command": report["command"],
        "parameters": f"{report['parameters']:,}",
        "memory": f"{layers} layers of {slots} slots of {width}",
    }
    sources = [
        found
        | {
            "name": source,
            "charts": _charts(found),
            "tables": tables(report, source),
            "inside": [_inside(inside) for inside in found["inside"]],
        }
        for source, found in report["sources"].items()
    ]
    return PAGE.render(facts=[["", ""], *facts.items()], sources=sources)
