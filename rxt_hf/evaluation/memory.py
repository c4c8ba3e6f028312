# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
What a model's memory holds over dialogues, as figures and as one page to look at.

    rxt eval MODEL --data path/to/dialogues --output eval.json --report eval.html

Everything is measured under three memories: the dialogue's `own`, a `cleared` one (the initial memory at every turn),
and a `shuffled` one (that of another dialogue). What only `own` does well comes from remembering. Without `--data` the
dialogues are the test set of the demo, which training never sees.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F

from ..cache_rxt import StateError
from ..data.collator import RxTEpisodeCollator
from ..data.readers import Episodes, encode_turns, sampled
from ..layers_rxt import upcast
from ..memory_rxt import RxTResidualGate, filled_slots
from ..modeling_rxt import RxTForCausalLM
from .report import page, tables
from .rollout import GREEDY, answer, contains_words, is_answered, play, texts
from .speed import environment, markdown_table
from .text_scores import corpus_bleu, word_ids

Memory = Literal["own", "cleared", "shuffled"]
# the shipped model, whose folder holds a test set
DEMO = Path(__file__).parent.parent / "demo"
# turns since the word was last said
DISTANCES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 1000))
# rows of a batch; what is shuffled is shuffled within one
ROWS = 16
# slots that are nearly one vector
COLLAPSED_RANK = 1.5


def token_losses(model: RxTForCausalLM, batch: Mapping[str, torch.Tensor], memory: Memory = "own") -> torch.Tensor:
    r"""
    Returns the cross-entropy of each labelled token of a batch of episodes, in order. Every turn is written into the
    memory, but only turns with a label are decoded, since decoding is most of the cost.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` of shape `(batch_size, turns, tokens)`.
        memory: the memory to read: the row's own, the initial one (cleared), or the previous row's (shuffled).

    Raises: `ValueError` for a shuffled batch of one row, which has no other memory.
    """
    inner, mask, labels = model.model, batch["attention_mask"], batch["labels"]
    if memory == "shuffled" and len(labels) < 2:
        raise ValueError(f"A shuffled memory is that of another dialogue: expected 2 rows or more, got {len(labels)}.")
    embeds = inner.embed_tokens(batch["input_ids"])
    states = inner.initial_states(len(embeds))
    if memory == "cleared":
        read = states.unsqueeze(1).expand(-1, embeds.shape[1], -1, -1, -1)
    else:
        read, _ = inner.read_states(embeds, mask, mask, states)
    if memory == "shuffled":
        read = read.roll(1, 0)
    is_target = labels[..., 1:] != -100
    is_read = is_target.any(-1)
    hidden_states = inner.decode(embeds[is_read], read[is_read], mask[is_read])
    logits = model.lm_head(hidden_states[:, :-1][is_target[is_read]])
    return F.cross_entropy(upcast(logits), labels[..., 1:][is_target], reduction="none")


class Dialogues:
    r"""
    Encoded dialogues in batches of similar length; each has at least two rows if there are two dialogues.

    Attributes:
        episodes ([`Episodes`]): the dialogues, cut before their first interaction of more than `max_tokens` tokens.
        batches: pairs of indices into `episodes`, and their padded `input_ids`, `attention_mask`, `labels`, and
            `distances`: for recalled words the number of turns since they were last said, 0 elsewhere.
    """

    def __init__(self, tokenizer: Any, dialogues: Sequence[Mapping[str, Any]], *, max_tokens: int):
        if any(isinstance(turn["query"], list) for dialogue in dialogues for turn in dialogue["interactions"]):
            raise ValueError("The dialogues hold token ids, expected text.")
        self.episodes = Episodes(tokenizer, dialogues, max_tokens=max_tokens)
        sizes = self.episodes.sizes
        if not sizes:
            raise ValueError(
                f"No dialogue has an answer in an interaction of up to {max_tokens} tokens: use --tokens."
            )
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        groups = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
        if len(groups) > 1 and len(groups[-1]) == 1:
            groups[-1].insert(0, groups[-2].pop())
        pad = RxTEpisodeCollator(tokenizer.pad_token_id)
        self.batches: list[tuple[list[int], dict[str, torch.Tensor]]] = []
        for indices in groups:
            features = [self.episodes[index] | {"distances": self._distances(index)} for index in indices]
            self.batches.append((indices, pad(features)))

    def _distances(self, index: int) -> list[list[int]]:
        marked = self.episodes.recall_distances[index]
        return [[0] * len(ids) for ids in self.episodes[index]["input_ids"]] if marked is None else marked

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def memories(self) -> list[Memory]:
        return [memory for memory in get_args(Memory) if memory != "shuffled" or len(self) > 1]


def on_device(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def figures_of(losses_of: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], dialogues: Dialogues) -> dict:
    """
    Summarises the losses of the labelled tokens.

    Returns: `answer_perplexity`, `[perplexity, tokens]` of the answers, over all and by turn from 1; and
    `recall_loss`, `[nats per token, tokens]` of recalled words, over all and by distance.
    """
    losses, turns, distances = [], [], []
    for _, batch in dialogues.batches:
        losses.append(losses_of(batch).cpu().double())
        is_target = batch["labels"][..., 1:] != -100
        turns.append(is_target.nonzero()[:, 1] + 1)
        distances.append(batch["distances"][..., 1:][is_target])
    nats, turn, distance = map(torch.cat, (losses, turns, distances))
    means = _means(nats, {"all": turn > 0} | {str(number): turn == number for number in turn.unique().tolist()})
    by_distance = {f"{low}-{high}": (distance >= low) & (distance <= high) for low, high in DISTANCES}
    return {
        "answer_perplexity": {name: [math.exp(min(mean, 700.0)), number] for name, (mean, number) in means.items()},
        "recall_loss": _means(nats, {"all": distance > 0} | by_distance),
    }


def teacher_forced(model: RxTForCausalLM, dialogues: Dialogues) -> dict[str, dict[str, dict[str, list]]]:
    """Returns [`figures_of`] for each memory, on the same tokens."""
    found: dict[str, dict[str, dict[str, list]]] = {"answer_perplexity": {}, "recall_loss": {}}
    for memory in dialogues.memories:
        figures = figures_of(
            lambda batch, memory=memory: token_losses(model, on_device(model, batch), memory), dialogues
        )
        for name, values in figures.items():
            found[name][memory] = values
    return found


def _means(values: torch.Tensor, chosen: Mapping[str, torch.Tensor]) -> dict[str, list]:
    return {name: [values[rows].mean().item(), int(rows.sum())] for name, rows in chosen.items() if rows.any()}


def closed_loop(
    model: Any, tokenizer: Any, dialogues: Dialogues, memory: Memory = "own", *, max_new_tokens: int
) -> list[tuple[str, str]]:
    """Returns `(answer, reference)` of every answered turn; the own memory holds the model's answers."""
    if memory == "shuffled":
        raise ValueError('closed_loop reads the memory "own" or "cleared", got "shuffled".')
    pairs = []
    for indices, _ in dialogues.batches:
        batch = [dialogues.episodes.dialogues[index] for index in indices]
        played = play(
            model, tokenizer, batch, max_new_tokens=max_new_tokens, clear_memory=memory == "cleared", **GREEDY
        )
        for dialogue, turns in zip(batch, played, strict=True):
            answers = zip(dialogue["interactions"], texts(tokenizer, turns), strict=True)
            pairs += [(text, turn["answer"]) for turn, text in answers if is_answered(turn)]
    return pairs


def bleu(model: Any, tokenizer: Any, dialogues: Dialogues, *, max_new_tokens: int) -> dict[str, Any]:
    """Returns the word-level BLEU of all greedy answers, with the own memory and with a cleared one."""
    scores: dict[str, Any] = {}
    for memory in ("own", "cleared"):
        pairs = closed_loop(model, tokenizer, dialogues, memory, max_new_tokens=max_new_tokens)
        scores["answers"] = len(pairs)
        scores[memory] = corpus_bleu(*word_ids(*zip(*pairs, strict=True))) if pairs else None
    return scores


@torch.no_grad()
def probes(
    model: RxTForCausalLM, tokenizer: Any, dialogues: Dialogues, *, max_new_tokens: int
) -> dict[str, Any] | None:
    r"""
    Asks the probes of the dialogues, each from the memory of all true interactions, which the probe does not change.
    The same with a cleared memory and with another dialogue's gives the floor.

    Returns: None if there are no probes; else, for each memory, `questions`, `exact` (share of answers equal to an
    accepted one, ignoring case), `contains` (share that contains an accepted one as whole words) and
    `exact_by_distance`.
    """
    last: dict[int, torch.Tensor] = {}
    for indices, batch in dialogues.batches:
        inputs = on_device(model, batch)
        embeds, mask = model.model.embed_tokens(inputs["input_ids"]), inputs["attention_mask"]
        _, states = model.model.read_states(embeds, mask, mask, model.model.initial_states(len(embeds)))
        last |= zip(indices, states, strict=True)
    asked = [
        (index, probe)
        for index, dialogue in enumerate(dialogues.episodes.dialogues)
        for probe in dialogue.get("probes") or []
    ]
    if not asked:
        return None
    found = {}
    for memory in dialogues.memories:
        answers = []
        for start in range(0, len(asked), ROWS):
            chunk = asked[start : start + ROWS]
            read = model.init_stm(len(chunk))
            if memory != "cleared":
                step = memory == "shuffled"
                read = read.replace(torch.stack([last[(index + step) % len(last)] for index, _ in chunk]))
            queries = [{"query": probe["query"], "answer": None} for _, probe in chunk]
            prompts = [ids for ids, _ in encode_turns(tokenizer, queries)]
            said, _ = answer(model, tokenizer, prompts, read, max_new_tokens=max_new_tokens, **GREEDY)
            answers += tokenizer.batch_decode(said, skip_special_tokens=True)
        found[memory] = probe_scores([probe for _, probe in asked], answers)
    return found


def probe_scores(asked: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Any]:
    """Returns the figures of [`probes`] for one memory."""
    exact, contains = [], []
    for probe, said in zip(asked, answers, strict=True):
        accepted, given = [text.lower() for text in probe["answers"]], said.strip().lower()
        exact.append(given in accepted)
        contains.append(any(contains_words(given, text) for text in accepted))
    distances = [probe["distance"] for probe in asked]
    return {
        "questions": len(asked),
        "exact": sum(exact) / len(asked),
        "contains": sum(contains) / len(asked),
        "exact_by_distance": by_bucket(zip(distances, exact, strict=True)),
    }


def mean(values: list[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def by_bucket(pairs) -> dict[str, list]:
    """[share correct, number] for the ranges 1, 2, 3-4, 5-8, 9-16, 17-32, 33-64."""
    buckets = defaultdict(list)
    for size, correct in pairs:
        top = 1 << max(0, (size - 1).bit_length())
        buckets[top].append(correct)
    return {
        (f"{top // 2 + 1}-{top}" if top > 2 else str(top)): [mean(values), len(values)]
        for top, values in sorted(buckets.items())
    }


def effective_rank(states: torch.Tensor) -> list[float]:
    """
    Exponential of the entropy of the singular values of each memory layer's slots, mean over rows: 1 if all slots are
    one vector, `num_memory_slots` if they are orthogonal and equally long (Roy and Vetterli, 2007).
    """
    values = torch.linalg.svdvals(states.double())
    shares = values / values.sum(dim=-1, keepdim=True)
    return torch.exp(-torch.special.xlogy(shares, shares).sum(dim=-1)).mean(dim=0).tolist()


@contextlib.contextmanager
def gate_values(model: RxTForCausalLM) -> Generator[dict[str, list[torch.Tensor]], None, None]:
    """
    Collects, for each gate, the weight of the update at each write, of shape `(batch_size, num_memory_slots)`:
    `sigmoid(g)` or `1 + tanh(g)`, mean over elements. Gates without an activation have no weight and are left out.
    """
    values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def hook_of(name: str):
        def hook(gate, states, output):
            logits = upcast(gate.logits(*states))
            weights = torch.sigmoid(logits) if gate.activation == "sigmoid" else 1.0 + torch.tanh(logits)
            values[name].append(weights.expand(output.shape).mean(-1))

        return hook

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in (model.model.memory_attention or torch.nn.Module()).named_modules()
        if isinstance(module, RxTResidualGate) and module.activation != "none"
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def eager_attention(model: Any) -> Generator[None, None, None]:
    """Switches to eager attention for a while: no other implementation returns its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def look_inside(
    model: RxTForCausalLM, feature: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    r"""
    Follows the memory of one dialogue, written with its true answers.

    Returns: `turns` (what was said), and nested lists of `(turns, layers, slots)`: `change` (norm of the difference to
    the slot before, divided by the norm of the slot before; 1 for one that was empty), `cosine_to_before`,
    `cosine_to_initial`, `norm`, `read` (weights of the slots in the attention that reads them, mean over heads and
    the tokens of the answer; zeros where there is none) and, by kind of gate, `gates`, of which a write by choice has
    none; `effective_rank` is of `(turns, layers)`, None at a turn whose memory is not finite.
    """
    inner = model.model
    batch = on_device(model, RxTEpisodeCollator(0)([dict(feature)]))
    embeds, mask = inner.embed_tokens(batch["input_ids"]), batch["attention_mask"]
    with gate_values(model) as gates:
        read, last = inner.read_states(embeds, mask, mask, inner.initial_states(1))
    states = upcast(torch.cat([read[0], last]))
    old, new = states[:-1], states[1:]
    with eager_attention(model):
        output = inner(input_ids=batch["input_ids"], attention_mask=mask, output_attentions=True)
    weights = output.cross_attentions
    if model.config.memory_reading == "joint":
        # slots stand before the tokens
        layers = [layer.memory_idx is not None for layer in inner.layers]
        weights = [part[..., : -mask.shape[-1]] for part in itertools.compress(output.attentions, layers)]
    if not weights or not weights[0].shape[-1]:
        # no slot was filled in any turn
        weights = [embeds.new_zeros(*embeds.shape[1:3], old.shape[2]).unsqueeze(1)] * old.shape[1]
    # the token before each token of the answer predicts it
    predicts = F.pad(batch["labels"][0, :, 1:] != -100, (0, 1)).unsqueeze(-1)
    by_layer = [(layer.float().mean(1) * predicts).sum(1) / predicts.sum(1).clamp(min=1) for layer in weights]
    if inner.leaves_out_empty_slots:
        by_layer = [layer * filled_slots(read[0]) for layer in by_layer]
    by_kind: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, values in gates.items():
        by_kind[name.rpartition(".")[2]].append(torch.cat(values))
    change, before = (new - old).norm(dim=-1), old.norm(dim=-1)
    change = change / before.where(before > 0, change).clamp(min=torch.finfo(old.dtype).tiny)
    return {
        "turns": [{name: turn.get(name) for name in ("instruction", "query", "answer")} for turn in turns],
        "change": _rounded(change),
        "cosine_to_before": _rounded(F.cosine_similarity(new, old, dim=-1)),
        "cosine_to_initial": _rounded(F.cosine_similarity(new, states[:1], dim=-1)),
        "norm": _rounded(new.norm(dim=-1)),
        "read": _rounded(torch.stack(by_layer, dim=1)),
        "gates": {kind: _rounded(torch.stack(layers, dim=1)) for kind, layers in by_kind.items()},
        "effective_rank": [
            [round(rank, 4) for rank in effective_rank(turn.unsqueeze(0))] if turn.isfinite().all() else None
            for turn in new
        ],
    }


def _rounded(values: torch.Tensor) -> list:
    """Returns nested lists of numbers, rounded to five decimals for display."""
    return values.cpu().double().mul(1e5).round().div(1e5).tolist()


def alarms_of(inside: Mapping[str, Any], slots: int) -> list[str]:
    """Returns a sentence for each memory that is not finite, has collapsed slots, or was left unchanged by a turn."""
    found = []
    for turn, (ranks, change) in enumerate(zip(inside["effective_rank"], inside["change"], strict=True), 1):
        if ranks is None:
            return [*found, f"turn {turn}: the memory is not finite"]
        for layer, rank in enumerate(ranks):
            if slots > 1 and rank < COLLAPSED_RANK:
                found.append(f"turn {turn}, layer {layer}: effective rank {rank:.2f} of {slots} slots")
            if max(change[layer]) == 0:
                found.append(f"turn {turn}, layer {layer}: nothing was written")
    return found


def evaluate_dialogues(
    model: RxTForCausalLM,
    tokenizer: Any,
    dialogues: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int = 64,
    inside: int = 4,
) -> dict[str, Any]:
    """Measures all that any dialogues allow; the memories of the first `inside` of them are shown turn by turn."""
    model.eval()
    encoded = Dialogues(tokenizer, dialogues, max_tokens=min(max_tokens, model.config.max_position_embeddings))
    episodes = encoded.episodes
    found: dict[str, Any] = {"dialogues": len(encoded), "turns": sum(turns for turns, _ in episodes.sizes)}
    found |= teacher_forced(model, encoded)
    found["inside"] = [
        look_inside(model, episodes[index], episodes.dialogues[index]["interactions"])
        for index in range(min(inside, len(encoded)))
    ]
    found["alarms"] = [
        f"dialogue {number}, {alarm}"
        for number, each in enumerate(found["inside"], 1)
        for alarm in alarms_of(each, model.config.num_memory_slots)
    ]
    # what generates refuses a memory that is not finite; what was found before it should not be lost
    try:
        found["probes"] = probes(model, tokenizer, encoded, max_new_tokens=max_tokens)
        found["bleu"] = bleu(model, tokenizer, encoded, max_new_tokens=max_tokens)
    except StateError as error:
        found["alarms"].append(str(error))
    return found


def evaluate(model: RxTForCausalLM, tokenizer: Any, options: SimpleNamespace) -> dict[str, Any]:
    """The report that `rxt eval` writes, for options of its command line."""
    limits = {"max_tokens": options.tokens, "inside": options.inside}
    # what is not there should be found out before hours of measuring
    folders = {
        folder: sampled(folder, "test", options.dialogues, skip_bad_rows=options.skip_bad_rows)
        for folder in options.data
    }
    sources: dict[str, Any] = {}
    for folder, dialogues in folders.items():
        name = Path(folder).name if Path(folder).name not in sources else folder
        sources[name] = evaluate_dialogues(model, tokenizer, dialogues, **limits)
    return {
        "environment": environment(str(model.device)) | {"dtype": str(model.dtype).removeprefix("torch.")},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "memory": [model.config.num_memory_layers, model.config.num_memory_slots, model.config.hidden_size],
        "parameters": model.num_parameters(),
        "sources": _without_nan(sources),
    }


def _without_nan(value: Any) -> Any:
    """JSON has no number that is not finite: None stands for it."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(report: Mapping[str, Any]) -> str:
    """The report's figures as tables."""
    return "\n\n".join(
        f"{title}\n\n{markdown_table(*rows)}" for name in report["sources"] for title, rows in tables(report, name)
    )


def run(options: SimpleNamespace, model: RxTForCausalLM, tokenizer: Any) -> str:
    """Measures what `rxt eval` does, writes its files and returns its tables."""
    # a missing folder should not cost the wait for the report
    for path in filter(None, (options.output, options.report)):
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    report = evaluate(model, tokenizer, options)
    Path(options.output).write_text(json.dumps(report) + "\n", encoding="utf-8")
    if options.report is not None:
        Path(options.report).write_text(page(report), encoding="utf-8")
    return markdown(report)
