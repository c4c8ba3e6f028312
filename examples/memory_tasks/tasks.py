# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Synthetic memory tasks, written anew from their papers and spread over the turns of an episode.

    remember, rewrite   arXiv 2407.04841      mqar      arXiv 2312.04927      in token ids
    babi                arXiv 1502.05698      needle, variable tracking   arXiv 2404.06654      in text

Each `generate_*(seed, ...)` returns `{"task", "seed", "split", "interactions"}` in the schema of
`rxt_hf.data.readers`. An interaction has a `kind`: "state" (something is told), "ask" (its answer is what only the
memory knows) or "chat" (neither). Questions have a `distance`, the turns since the statement that their answer rests
on (the oldest one, if there are several; for the place of an object, the move that brought it there), and `items`,
where the answer is a list.

Equal arguments give an equal episode in every Python version. Whether an episode belongs to split "train" or "test"
is a checksum of what is said in it, so the splits share no episode, whatever the seeds; a quarter is for tests.

Tasks in token ids need no tokenizer. Their vocabulary: ids 0 to 9 are the control tokens in the order of
`CONTROL_TOKENS`, then `num_symbols` symbols of keys, then `num_symbols` symbols of values; the episode's `vocab_size`
is the sum. Its `bits` are what a memory holds that could answer any question: log2 of the possible values of each key.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from math import log2
from random import Random
from typing import Any
from zlib import crc32

from demo.facts import CHAT, VALUES

from rxt_hf.chat_template import CONTROL_TOKENS

Turn = dict[str, Any]
ACKNOWLEDGEMENT = "Okay."
TEST_SHARE = 4
PEOPLE = {"Emma": "she", "Julia": "she", "David": "he", "Peter": "he"}
PLACES = ("bedroom", "cellar", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "book", "lamp", "milk")
BABI_TASKS = (1, 2, 3, 6, 7, 8, 11)
CHAT_TURNS = tuple((query, answers[0]) for query, answers in CHAT)


def _episode(task: str, seed: int, split: str, write: Callable[[Random], list[Turn]], **more: Any) -> dict[str, Any]:
    """The first episode of the seed's random sequence that belongs to the split."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    rng = Random(f"{task}:{split}:{seed}")
    for _ in range(1000):
        turns = write(rng)
        said = json.dumps([[turn["query"], turn["answer"]] for turn in turns])
        if (crc32(said.encode()) % TEST_SHARE == 0) == (split == "test"):
            return {"task": task, "seed": seed, "split": split, "interactions": turns, **more}
    raise ValueError(f"Task {task} has too few different episodes of this size for a split {split!r}: make it larger.")


def _state(query: str | list[int], answer: str | None = ACKNOWLEDGEMENT) -> Turn:
    return {"query": query, "answer": answer, "kind": "state"}


def _ask(query: str | list[int], answer: str | list[int], distance: int, items: list[str] | None = None) -> Turn:
    turn = {"query": query, "answer": answer, "kind": "ask", "distance": distance}
    return turn if items is None else turn | {"items": items}


def _pick(rng: Random, items: Sequence[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def _sample(rng: Random, items: Iterable[Any], count: int) -> list[Any]:
    return sorted(items, key=lambda _: rng.random())[:count]


def _require(is_possible: bool, demand: str) -> None:
    if not is_possible:
        raise ValueError(f"{demand}.")


def generate_remember(seed: int, *, num_pairs: int = 10, **options: Any) -> dict[str, Any]:
    r"""
    Remember (arXiv 2407.04841, the experiments on associative retrieval): pairs with different keys are told one after
    the other, then the value of one key is asked. How many pairs are kept exactly measures the memory's capacity.

    What differs: a segment is a turn, so that telling takes no answer; keys and values have symbols of their own;
    `num_questions` keys may be asked, in turns of their own, each once. With probability `p_typed` a value starts with
    one of a quarter of the symbols that belongs to the first symbol of its key, as a colour answers the question for a
    colour: to begin to learn with, not to test.
    """
    return _associative("remember", seed, num_writes=num_pairs, num_keys=None, **options)


def generate_rewrite(seed: int, *, num_writes: int = 16, num_keys: int = 8, **options: Any) -> dict[str, Any]:
    r"""
    Rewrite (arXiv 2407.04841, the experiments on associative retrieval): keys come back with other values, and the
    last one is asked. Longer episodes with equally many keys ask whether the memory forgets what is outdated.

    What differs: as in [`generate_remember`]; every one of the `num_keys` keys is told at least once, and a rewritten
    value is never the one it replaces. Questions list the outdated values as `stale`.
    """
    return _associative("rewrite", seed, num_writes=num_writes, num_keys=num_keys, **options)


def _associative(
    task: str,
    seed: int,
    *,
    num_writes: int,
    num_keys: int | None,
    num_questions: int = 1,
    key_length: int = 2,
    value_length: int = 1,
    num_symbols: int = 16,
    p_typed: float = 0.0,
    split: str = "train",
) -> dict[str, Any]:
    """Keys and values that are told one after the other: what both tasks are made of, and all of their options."""
    key_symbols, value_symbols, vocab_size = _vocabulary(num_symbols)
    wanted = num_writes if num_keys is None else num_keys
    _require(num_symbols >= 2, f"num_symbols={num_symbols} must be at least 2")
    _require(
        min(key_length, value_length) >= 1, f"key_length={key_length}, value_length={value_length}: use 1 or more"
    )
    _require(wanted <= num_symbols**key_length, f"{wanted} keys do not fit in {num_symbols}**{key_length} words")
    _require(wanted <= num_writes, f"num_keys={wanted} exceeds num_writes={num_writes}: every key is told")
    _require(0.0 <= p_typed <= 1.0, f"p_typed={p_typed} must be a probability")
    _require(1 <= num_questions <= wanted, f"num_questions={num_questions} must be between 1 and the {wanted} keys")

    kind = max(1, num_symbols // 4)

    def value_of(rng: Random, key: tuple[int, ...]) -> tuple[int, ...]:
        first, *rest = _word(rng, value_symbols, value_length)
        if p_typed and rng.random() < p_typed:
            place = (key[0] * kind + first % kind) % num_symbols
            first = value_symbols[place]
        return (first, *rest)

    def write(rng: Random) -> list[Turn]:
        keys: list[tuple[int, ...]] = []
        while len(keys) < wanted:
            key = _word(rng, key_symbols, key_length)
            keys += [] if key in keys else [key]
        order = keys + [_pick(rng, keys) for _ in range(num_writes - len(keys))]
        told: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
        turns = []
        for key in _sample(rng, order, num_writes):
            value = value_of(rng, key)
            while key in told and value == told[key][-1][0]:
                value = value_of(rng, key)
            told.setdefault(key, []).append((value, len(turns)))
            turns.append(_state([*key, *value], None))
        for key in _sample(rng, told, num_questions):
            *stale, (value, turn) = told[key]
            question = _ask([*key], [*value], len(turns) - turn)
            turns.append(question if num_keys is None else question | {"stale": [[*old] for old, _ in stale]})
        return turns

    bits = wanted * value_length * log2(num_symbols)
    return _episode(task, seed, split, write, vocab_size=vocab_size, bits=bits)


def _vocabulary(num_symbols: int) -> tuple[range, range, int]:
    first = len(CONTROL_TOKENS)
    return (
        range(first, first + num_symbols),
        range(first + num_symbols, first + 2 * num_symbols),
        first + 2 * num_symbols,
    )


def _word(rng: Random, symbols: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(_pick(rng, symbols) for _ in range(length))


def generate_mqar(
    seed: int,
    *,
    num_pairs: int = 8,
    num_turns: int = 32,
    pairs_per_turn: int = 1,
    exponent: float = 0.1,
    num_symbols: int = 64,
    split: str = "train",
) -> dict[str, Any]:
    r"""
    Multi-query associative recall (arXiv 2312.04927, definition 3.1 and the appendix on synthetic data): pairs of one
    key and one value are told first, then every key comes once more, sooner rather than later: its place is drawn with
    a probability proportional to gap ** (exponent - 1). Half of the symbols are keys, half are values.

    What differs: positions are turns, the pairs fill the first ones, `pairs_per_turn` in each; the places that no
    question takes hold one random value each, which tells nothing.
    """
    key_symbols, value_symbols, vocab_size = _vocabulary(num_symbols)
    _require(
        min(num_pairs, pairs_per_turn) >= 1, f"num_pairs={num_pairs}, pairs_per_turn={pairs_per_turn}: use 1 or more"
    )
    _require(num_pairs <= num_symbols, f"num_pairs={num_pairs} exceeds num_symbols={num_symbols}")
    num_told = -(-num_pairs // pairs_per_turn)
    _require(
        num_told + num_pairs <= num_turns, f"{num_pairs} pairs need {num_told + num_pairs} turns, not {num_turns}"
    )

    def write(rng: Random) -> list[Turn]:
        pairs = [(key, _pick(rng, value_symbols)) for key in _sample(rng, key_symbols, num_pairs)]
        asked: dict[int, int] = {}
        for index in _sample(rng, range(num_pairs), num_pairs):
            free = [turn for turn in range(num_told, num_turns) if turn not in asked]
            reach = list(accumulate((turn - index // pairs_per_turn) ** (exponent - 1) for turn in free))
            mark = rng.random() * reach[-1]
            asked[next(turn for turn, weight in zip(free, reach, strict=True) if mark < weight)] = index
        told = [pairs[start : start + pairs_per_turn] for start in range(0, num_pairs, pairs_per_turn)]
        turns = [_state([symbol for pair in group for symbol in pair], None) for group in told]
        for turn in range(num_told, num_turns):
            if turn in asked:
                key, value = pairs[asked[turn]]
                turns.append(_ask([key], [value], turn - asked[turn] // pairs_per_turn))
            else:
                turns.append({"query": [_pick(rng, value_symbols)], "answer": None, "kind": "chat"})
        return turns

    return _episode("mqar", seed, split, write, vocab_size=vocab_size, bits=num_pairs * log2(num_symbols))


def generate_babi(
    seed: int,
    *,
    task: int = 1,
    num_questions: int = 5,
    facts_per_question: int | None = None,
    facts_per_turn: int = 1,
    p_typed: float = 0.0,
    split: str = "train",
) -> dict[str, Any]:
    r"""
    A story in the manner of bAbI (arXiv 1502.05698, section 3, tasks 1, 2, 3, 6, 7, 8 and 11), told by a small
    simulated world (its section 4) that also answers the questions:

        1   where a person is                       7   how many objects a person carries
        2   where an object is                      8   which objects, in the order they were taken
        3   where an object was before a place      11  where a person is, with pronouns
        6   whether a person is at a place

    What differs: own names, places and phrases; statements are turns of `facts_per_turn` sentences that are answered
    "Okay."; questions come after `facts_per_question` sentences (2 to 8 by task), more where nothing can be asked yet;
    an object may be given to somebody at the same place in every task with objects. A pronoun stands only in the
    sentence after the one that names the person, never after a question. With probability `p_typed` a person goes to
    one of two places, or takes one of two objects, that belong to them: to begin to learn with, not to test.
    """
    _require(task in BABI_TASKS, f"task={task} must be one of {BABI_TASKS}")
    _require(0.0 <= p_typed <= 1.0, f"p_typed={p_typed} must be a probability")
    defaults = {2: 4, 3: 8, 7: 4, 8: 4}
    facts = defaults.get(task, 2) if facts_per_question is None else facts_per_question
    _require(min(facts, facts_per_turn, num_questions) >= 1, "a story needs at least one fact, turn and question")

    def write(rng: Random) -> list[Turn]:
        world, turns = _World(rng, task, p_typed), []
        for _ in range(num_questions):
            sentences: list[str] = []
            question = None
            world.last_person = None
            while question is None:
                world.turn = len(turns) + len(sentences) // facts_per_turn
                sentences.append(world.happen())
                if len(sentences) >= facts and len(sentences) % facts_per_turn == 0:
                    question = world.question(world.turn + 1)
            starts = range(0, len(sentences), facts_per_turn)
            turns += [_state(" ".join(sentences[start : start + facts_per_turn])) for start in starts]
            turns.append(question)
        return turns

    return _episode(f"babi{task}", seed, split, write)


class _World:
    """Who is where and has what, with the turn in which that was told."""

    def __init__(self, rng: Random, task: int, p_typed: float):
        self.rng, self.task, self.p_typed, self.turn = rng, task, p_typed, 0
        self.place: dict[str, tuple[str, int]] = {}
        self.carried: dict[str, dict[str, int]] = {person: {} for person in PEOPLE}
        self.changed: dict[str, int] = {}
        # places of an object one after the other; a person can take only what is here or was never seen
        self.trail: dict[str, list[tuple[str, int]]] = {}
        self.last_person: str | None = None

    def happen(self) -> str:
        person = _pick(self.rng, list(PEOPLE))
        if self.task in (2, 3, 7, 8) and person in self.place and self.rng.random() < 0.5:
            return self.handle(person)
        return self.move(person)

    def move(self, person: str) -> str:
        subject = person
        if self.task == 11 and self.last_person is not None and self.rng.random() < 0.5:
            person = self.last_person
            subject = f"{_pick(self.rng, ('Then', 'After that', 'Afterwards'))} {PEOPLE[person]}"
        self.last_person = person
        here = self.place.get(person, ("", 0))[0]
        there = _pick(self.rng, self.belonging(person, PLACES, [place for place in PLACES if place != here]))
        self.place[person] = (there, self.turn)
        for item in self.carried[person]:
            self.trail[item].append((there, self.turn))
        return f"{subject} {_pick(self.rng, ('went', 'walked', 'ran', 'moved'))} to the {there}."

    def handle(self, person: str) -> str:
        """Takes, puts down or gives an object; moves if there is nothing at hand."""
        here = self.place[person][0]
        taken = {item for items in self.carried.values() for item in items}
        free = [item for item in OBJECTS if item not in taken and (item not in self.trail or self.lies(item, here))]
        others = [other for other in self.place if other != person and self.place[other][0] == here]
        has = list(self.carried[person])
        possible = ["take"] * (2 if free else 0) + ["drop"] * bool(has) + ["give"] * bool(has and others)
        if not possible:
            return self.move(person)
        action = _pick(self.rng, possible)
        item = _pick(self.rng, self.belonging(person, OBJECTS, free) if action == "take" else has)
        self.changed[person] = self.turn
        if action == "take":
            self.trail.setdefault(item, [self.place[person]])
            self.carried[person][item] = self.turn
            return f"{person} {_pick(self.rng, ('picked up', 'took', 'grabbed'))} the {item}."
        del self.carried[person][item]
        if action == "drop":
            return f"{person} {_pick(self.rng, ('dropped', 'put down', 'let go of'))} the {item}."
        other = _pick(self.rng, others)
        self.carried[other][item] = self.changed[other] = self.turn
        return f"{person} {_pick(self.rng, ('gave', 'handed', 'passed'))} the {item} to {other}."

    def belonging(self, person: str, things: tuple[str, ...], possible: list[str]) -> list[str]:
        """With probability `p_typed` those of the possible things that are this person's, if there are any."""
        if not self.p_typed or self.rng.random() >= self.p_typed:
            return possible
        first = list(PEOPLE).index(person)
        own = [things[index % len(things)] for index in (first, first + 2)]
        return [thing for thing in possible if thing in own] or possible

    def lies(self, item: str, here: str) -> bool:
        return self.trail[item][-1][0] == here

    def question(self, turn: int) -> Turn | None:
        """The question asked in this turn, or None while nothing can be asked."""
        if self.task in (1, 6, 11):
            person = _pick(self.rng, list(self.place))
            place, told = self.place[person]
            if self.task != 6:
                return _ask(f"Where is {person}?", place, turn - told)
            asked = place if self.rng.random() < 0.5 else _pick(self.rng, [name for name in PLACES if name != place])
            return _ask(f"Is {person} in the {asked}?", "yes" if asked == place else "no", turn - told)
        if self.task in (7, 8):
            return self.question_of_carried(turn) if self.changed else None
        # a place that comes twice is meant the last time
        known = [
            (item, index)
            for item, trail in self.trail.items()
            for index in range(len(trail))
            if trail[index][0] not in [place for place, _ in trail[index + 1 :]]
            and (index > 0 if self.task == 3 else index == len(trail) - 1)
        ]
        if not known:
            return None
        item, index = _pick(self.rng, known)
        if self.task == 2:
            place, told = self.trail[item][-1]
            return _ask(f"Where is the {item}?", place, turn - told)
        place, told = self.trail[item][index - 1]
        return _ask(f"Where was the {item} before the {self.trail[item][index][0]}?", place, turn - told)

    def question_of_carried(self, turn: int) -> Turn:
        person = _pick(self.rng, list(self.changed))
        items = list(self.carried[person])
        distance = turn - min(self.carried[person].values(), default=self.changed[person])
        if self.task == 7:
            number = ("none", "one", "two", "three", "four")[len(items)]
            return _ask(f"How many objects is {person} carrying?", number, distance)
        return _ask(f"What is {person} carrying?", ", ".join(items) or "nothing", distance, items)


def generate_needle(
    seed: int,
    *,
    num_turns: int = 16,
    num_needles: int = 1,
    num_values: int = 1,
    num_questions: int = 1,
    num_digits: int = 7,
    haystack: Sequence[tuple[str, str]] = CHAT_TURNS,
    split: str = "train",
) -> dict[str, Any]:
    r"""
    Needles in a haystack (RULER, arXiv 2404.06654, section 3.1): codes are noted for things in some turns, all others
    are of the haystack, and the last turns ask. More needles than questions is its multi-key form, more values its
    multi-value and more questions its multi-query form.

    What differs: the haystack is `haystack`, pairs of query and answer (small talk, or a real dialogue), in place of
    essays; its length counts in turns, the questions included; each question is a turn and asks one thing.
    """
    num_told = num_needles * num_values
    _require(
        1 <= num_questions <= num_needles, f"num_questions={num_questions} must be 1 to num_needles={num_needles}"
    )

    def write(rng: Random) -> list[Turn]:
        names = [f"{colour} {word}" for colour in VALUES["colour"] for word in VALUES["word"]]
        codes: dict[str, list[str]] = {name: [] for name in _sample(rng, names, num_needles)}
        needles = []
        for name in _sample(rng, list(codes) * num_values, num_told):
            codes[name].append("".join(_pick(rng, "0123456789") for _ in range(num_digits)))
            needles.append((name, f"Please note a code for the {name}: {codes[name][-1]}."))
        turns, told = _in_haystack(rng, needles, num_turns - num_questions, haystack)
        for name in _sample(rng, codes, num_questions):
            query = f"Which codes did I note for the {name}?" if num_values > 1 else f"Which code is for the {name}?"
            turns.append(_ask(query, ", ".join(codes[name]), len(turns) - told[name], codes[name]))
        return turns

    return _episode("needle", seed, split, write)


def generate_variable_tracking(
    seed: int,
    *,
    num_turns: int = 16,
    num_chains: int = 1,
    num_hops: int = 4,
    haystack: Sequence[tuple[str, str]] = CHAT_TURNS,
    split: str = "train",
) -> dict[str, Any]:
    r"""
    Variable tracking (RULER, arXiv 2404.06654, section 3.2 on multi-hop tracing): one variable gets a number, others
    are set to it and to each other, `num_hops` in each chain, and all that hold the number of one chain are asked.

    What differs: as in [`generate_needle`]; own phrases; the chains are interleaved; the answer names the variables in
    the order of their assignment.
    """

    def write(rng: Random) -> list[Turn]:
        numbers: list[str] = []
        while len(numbers) < num_chains:
            number = "".join(_pick(rng, "123456789") for _ in range(5))
            numbers += [] if number in numbers else [number]
        chains: list[list[str]] = [[] for _ in numbers]
        used: set[str] = set()
        assignments = []
        for index in _sample(rng, [*range(num_chains)] * (num_hops + 1), num_chains * (num_hops + 1)):
            name = ""
            while not name or name in used:
                name = "".join(_pick(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(3))
            used.add(name)
            source = f"variable {chains[index][-1]}" if chains[index] else numbers[index]
            chains[index].append(name)
            assignments.append((numbers[index], f"Set variable {name} to {source}."))
        turns, told = _in_haystack(rng, assignments, num_turns - 1, haystack)
        index = _pick(rng, range(num_chains))
        query = f"Which variables hold {numbers[index]}?"
        turns.append(_ask(query, ", ".join(chains[index]), len(turns) - told[numbers[index]], chains[index]))
        return turns

    return _episode("variable_tracking", seed, split, write)


def _in_haystack(
    rng: Random, needles: list[tuple[str, str]], num_turns: int, haystack: Sequence[tuple[str, str]]
) -> tuple[list[Turn], dict[str, int]]:
    """The needles' sentences in their order at random turns, and for each name the turn of its first one."""
    _require(
        len(needles) <= num_turns, f"{len(needles)} statements do not fit in {num_turns} turns before the question"
    )
    places = sorted(_sample(rng, range(num_turns), len(needles)))
    told: dict[str, int] = {}
    for (name, _), turn in zip(needles, places, strict=True):
        told.setdefault(name, turn)
    sentences = dict(zip(places, (sentence for _, sentence in needles), strict=True))
    turns = []
    for turn in range(num_turns):
        if turn in sentences:
            turns.append(_state(sentences[turn]))
        else:
            query, answer = _pick(rng, haystack)
            turns.append({"query": query, "answer": answer, "kind": "chat"})
    return turns, told


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "remember": generate_remember,
    "rewrite": generate_rewrite,
    "mqar": generate_mqar,
    **{f"babi{task}": partial(generate_babi, task=task) for task in BABI_TASKS},
    "needle": generate_needle,
    "variable_tracking": generate_variable_tracking,
}
