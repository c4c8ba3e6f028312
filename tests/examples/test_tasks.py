# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The answers of the generated tasks are found again by solvers that read nothing but what is told."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from math import log2

import pytest
from demo.facts import CHAT
from memory_tasks.tasks import (
    BABI_TASKS,
    TASKS,
    generate_babi,
    generate_mqar,
    generate_needle,
    generate_remember,
    generate_rewrite,
    generate_variable_tracking,
)

NUMBERS = ("none", "one", "two", "three", "four")
MOVE = re.compile(r"(\w+(?: \w+)?) (?:went|walked|ran|moved) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:picked up|took|grabbed) the (\w+)\.")
DROP = re.compile(r"(\w+) (?:dropped|put down|let go of) the (\w+)\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")


def told_and_asked(episode):
    """For each question what was told before it, as (turn, text or ids), the question and its own turn."""
    told = []
    for turn, interaction in enumerate(episode["interactions"]):
        if interaction["kind"] == "ask":
            yield list(told), interaction, turn
        else:
            told.append((turn, interaction["query"]))


def events(told):
    """(turn, what, person, object or place, receiver) of each sentence, pronouns resolved."""
    found, named = [], None
    for turn, text in told:
        for sentence in re.findall(r"[^.]+\.", text):
            if match := GIVE.search(sentence):
                found.append((turn, "give", match[1], match[2], match[3]))
            elif match := TAKE.search(sentence):
                found.append((turn, "take", match[1], match[2], None))
            elif match := DROP.search(sentence):
                found.append((turn, "drop", match[1], match[2], None))
            else:
                match = MOVE.search(sentence)
                subject = match[1].split()[-1]
                named = named if subject in ("he", "she") else subject
                found.append((turn, "move", named, match[2], None))
    return found


def place_of_person(history, person):
    return next(((place, turn) for turn, what, who, place, _ in reversed(history) if (what, who) == ("move", person)))


def place_of_object(history, item):
    """Looks back: who had it last, and where that person was then or is now."""
    for index in range(len(history) - 1, -1, -1):
        _, what, who, thing, receiver = history[index]
        if what != "move" and thing == item:
            known = history[:index] if what == "drop" else history
            return place_of_person(known, receiver or who)
    return None


def places_of_object(history, item):
    """Where the object was after each sentence, without repetitions."""
    places = []
    for end in range(1, len(history) + 1):
        now = place_of_object(history[:end], item)
        if now and (not places or places[-1][0] != now[0]):
            places.append(now)
    return places


def carried_by(history, person):
    carried = {}
    for turn, what, who, thing, receiver in history:
        if what in ("drop", "give") and who == person:
            del carried[thing]
        if (what == "take" and who == person) or (what == "give" and receiver == person):
            carried[thing] = turn
    return carried


def last_change(history, person):
    return max(turn for turn, what, who, _, receiver in history if what != "move" and person in (who, receiver))


def solve_babi(told, question):
    """The answer, and the turn of the statement it rests on."""
    history = events(told)
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        places = places_of_object(history, match[1])
        return places[max(index for index, (place, _) in enumerate(places) if place == match[2]) - 1]
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return places_of_object(history, match[1])[-1]
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return place_of_person(history, match[1])
    if match := re.fullmatch(r"Is (\w+) in the (\w+)\?", question):
        place, turn = place_of_person(history, match[1])
        return "yes" if place == match[2] else "no", turn
    person = re.fullmatch(r"(?:How many objects|What) is (\w+) carrying\?", question)[1]
    carried = carried_by(history, person)
    turn = min(carried.values(), default=None)
    turn = last_change(history, person) if turn is None else turn
    return (NUMBERS[len(carried)] if question.startswith("How") else ", ".join(carried) or "nothing"), turn


@pytest.mark.parametrize("facts_per_turn", [1, 3])
@pytest.mark.parametrize("task", BABI_TASKS)
def test_the_world_of_a_story_answers_as_somebody_who_reads_it(task, facts_per_turn):
    answers = Counter()
    for seed in range(60):
        episode = generate_babi(seed, task=task, facts_per_turn=facts_per_turn)
        questions = list(told_and_asked(episode))
        assert len(questions) == 5
        for told, interaction, turn in questions:
            answer, told_in = solve_babi(told, interaction["query"])
            assert (interaction["answer"], interaction["distance"]) == (answer, turn - told_in)
            answers[answer] += 1
        assert all(turn["answer"] == "Okay." for turn in episode["interactions"] if turn["kind"] == "state")
    expected = {6: ("yes", "no"), 7: NUMBERS[:3], 8: ("nothing", "apple")}.get(task, ("kitchen", "office"))
    assert all(answers[answer] >= 10 for answer in expected), answers


def test_a_pronoun_follows_the_sentence_that_names_its_person():
    pronouns = 0
    for seed in range(50):
        before = None
        for turn in generate_babi(seed, task=11)["interactions"]:
            if re.match(r"(Then|After that|Afterwards) s?he ", turn["query"]):
                assert before["kind"] == "state"
                pronouns += 1
            before = turn
    assert pronouns > 50


def test_objects_are_taken_and_given_only_where_they_are():
    handled = Counter()
    for seed in range(60):
        turns = generate_babi(seed, task=3)["interactions"]
        history = events([(turn, said["query"]) for turn, said in enumerate(turns) if said["kind"] == "state"])
        for index, (_, what, who, thing, receiver) in enumerate(history):
            before = history[:index]
            if what == "move":
                continue
            handled[what] += 1
            here = place_of_person(before, who)[0]
            seen = place_of_object(before, thing)
            assert seen is None if seen is None and what == "take" else seen[0] == here
            assert (thing in carried_by(before, who)) == (what != "take")
            assert what != "give" or place_of_person(before, receiver)[0] == here
    assert min(handled[what] for what in ("take", "drop", "give")) > 20


def test_somebody_who_was_only_given_an_object_is_asked_about_too():
    asked = 0
    for seed in range(100):
        for told, question, _ in told_and_asked(generate_babi(seed, task=8)):
            person = question["query"].split()[2]
            asked += not any(what in ("take", "drop") and who == person for _, what, who, _, _ in events(told))
    assert asked > 5


def test_the_list_of_a_story_is_also_given_item_by_item():
    for seed in range(30):
        for turn in generate_babi(seed, task=8)["interactions"]:
            if turn["kind"] == "ask":
                assert turn["answer"] == (", ".join(turn["items"]) or "nothing")


@pytest.mark.parametrize("lengths", [(2, 1), (1, 3)])
def test_remember_asks_for_what_was_told_once(lengths):
    key_length, value_length = lengths
    for seed in range(40):
        episode = generate_remember(
            seed, num_pairs=12, num_questions=3, key_length=key_length, value_length=value_length, num_symbols=16
        )
        assert episode["bits"] == 12 * value_length * 4 and episode["vocab_size"] == 10 + 2 * 16
        questions = list(told_and_asked(episode))
        pairs = {tuple(ids[:key_length]): (ids[key_length:], turn) for turn, ids in questions[0][0]}
        assert len(pairs) == 12 and len({tuple(asked["query"]) for _, asked, _ in questions}) == 3
        for _, asked, turn in questions:
            value, told_in = pairs[tuple(asked["query"])]
            assert (asked["answer"], asked["distance"]) == (value, turn - told_in)
            assert len(value) == value_length


def test_rewrite_asks_for_the_last_value_of_a_key():
    overwritten = 0
    for seed in range(60):
        episode = generate_rewrite(seed, num_writes=20, num_keys=5, num_questions=2)
        assert episode["bits"] == 5 * log2(16) and len(episode["interactions"]) == 22
        for told, asked, turn in told_and_asked(episode):
            writes = defaultdict(list)
            for told_in, ids in told:
                writes[tuple(ids[:2])].append((ids[2:], told_in))
            assert len(writes) == 5
            *stale, (value, told_in) = writes[tuple(asked["query"])]
            writes_after = writes[tuple(asked["query"])][1:]
            assert (asked["answer"], asked["distance"]) == (value, turn - told_in)
            assert asked["stale"] == [old for old, _ in stale]
            assert all(old != new for (old, _), (new, _) in zip(stale, writes_after, strict=True))
            overwritten += bool(stale)
    assert overwritten > 80


@pytest.mark.parametrize("pairs_per_turn", [1, 3])
def test_mqar_asks_every_key_once_and_fills_the_rest_with_noise(pairs_per_turn):
    for seed in range(60):
        episode = generate_mqar(seed, num_pairs=7, num_turns=40, pairs_per_turn=pairs_per_turn, num_symbols=20)
        turns = episode["interactions"]
        pairs = {}
        for turn, told in enumerate(turns):
            if told["kind"] == "state":
                pairs |= {
                    key: (value, turn) for key, value in zip(told["query"][::2], told["query"][1::2], strict=True)
                }
            if told["kind"] == "chat":
                assert told["answer"] is None and all(30 <= symbol < 50 for symbol in told["query"])
        asked = [(turn, told) for turn, told in enumerate(turns) if told["kind"] == "ask"]
        assert len(turns) == 40 and sorted(told["query"][0] for _, told in asked) == sorted(pairs)
        assert all(10 <= key < 30 <= value < 50 for key, (value, _) in pairs.items())
        for turn, told in asked:
            value, told_in = pairs[told["query"][0]]
            assert (told["answer"], told["distance"]) == ([value], turn - told_in)


def test_mqar_asks_sooner_rather_than_later():
    def mean_distance(exponent):
        turns = [turn for seed in range(100) for turn in generate_mqar(seed, exponent=exponent)["interactions"]]
        distances = [turn["distance"] for turn in turns if turn["kind"] == "ask"]
        return sum(distances) / len(distances)

    # with exponent 1 every place is as likely: turns 8 to 31, asked for pairs of turns 0 to 7
    assert abs(mean_distance(1.0) - 16) < 0.7
    assert mean_distance(0.1) < 14.5


@pytest.mark.parametrize("num_values", [1, 2])
def test_needles_are_found_in_the_haystack(num_values):
    hay = [("Nice weather.", "Indeed."), ("Bye.", "Bye.")]
    for seed in range(40):
        episode = generate_needle(
            seed, num_turns=20, num_needles=4, num_values=num_values, num_questions=2, haystack=hay
        )
        assert len(episode["interactions"]) == 20
        assert [turn["kind"] for turn in episode["interactions"]][-2:] == ["ask", "ask"]
        for told, asked, turn in told_and_asked(episode):
            name = re.search(r"for the (.+)\?", asked["query"])[1]
            codes = [(told_in, text.split(": ")[1][:-1]) for told_in, text in told if f" for the {name}:" in text]
            assert asked["items"] == [code for _, code in codes] and len(codes) == num_values
            assert asked["answer"] == ", ".join(asked["items"]) and asked["distance"] == turn - codes[0][0]
        chat = [(turn["query"], turn["answer"]) for turn in episode["interactions"] if turn["kind"] == "chat"]
        assert len(chat) == 20 - 4 * num_values - 2 and set(chat) <= set(hay)


def test_variables_are_tracked_through_their_chain():
    for seed in range(40):
        episode = generate_variable_tracking(seed, num_turns=24, num_chains=3, num_hops=2)
        ((told, asked, turn),) = told_and_asked(episode)
        value_of, first = {}, {}
        for told_in, text in told:
            if match := re.fullmatch(r"Set variable (\w+) to (?:variable )?(\w+)\.", text):
                value_of[match[1]] = value_of.get(match[2], match[2])
                first.setdefault(value_of[match[1]], told_in)
        assert len(value_of) == 9 and len(set(value_of.values())) == 3
        number = re.search(r"\d+", asked["query"])[0]
        assert asked["items"] == [name for name, value in value_of.items() if value == number]
        assert len(asked["items"]) == 3 and asked["answer"] == ", ".join(asked["items"])
        assert asked["distance"] == turn - first[number] and turn == 23
        chat = {turn["query"] for turn in episode["interactions"] if turn["kind"] == "chat"}
        assert chat <= {query for query, _ in CHAT} and chat


def test_variables_and_numbers_of_many_chains_are_all_different():
    for seed in range(10):
        turns = generate_variable_tracking(seed, num_turns=301, num_chains=300, num_hops=0)["interactions"]
        pairs = [re.findall(r"[A-Z]{3}|[0-9]+", turn["query"]) for turn in turns[:-1]]
        assert len({name for name, _ in pairs}) == len({number for _, number in pairs}) == 300


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_one_episode_and_another_seed_another(name):
    generate = TASKS[name]
    assert generate(3) == generate(3)
    assert len({json.dumps(generate(seed)["interactions"]) for seed in range(20)}) == 20
    assert (generate(3)["task"], generate(3, split="test")["split"]) == (name, "test")


def test_episodes_stay_as_they_are_in_every_python_version():
    episodes = [generate(7, split=split) for generate in TASKS.values() for split in ("train", "test")]
    assert hashlib.sha256(json.dumps(episodes).encode()).hexdigest()[:16] == "4518d3a90fe0437f"


@pytest.mark.parametrize("options", [{"task": 1}, {"task": 6}, {"task": 11}])
def test_training_and_test_share_no_episode_whatever_their_seeds(options):
    # so short that equal stories come often
    short = {"num_questions": 1, "facts_per_question": 1, **options}
    said = {
        split: {json.dumps(generate_babi(seed, split=split, **short)["interactions"]) for seed in range(600)}
        for split in ("train", "test")
    }
    assert len(said["train"]) < 600 and len(said["test"]) < 600
    assert not said["train"] & said["test"]


@pytest.mark.parametrize(
    ("generate", "options", "reason"),
    [
        (generate_remember, {"num_pairs": 5, "key_length": 1, "num_symbols": 4}, "5 keys do not fit"),
        (generate_remember, {"num_pairs": 2, "num_questions": 3}, "num_questions=3"),
        (generate_remember, {"num_symbols": 1}, "num_symbols=1"),
        (generate_remember, {"value_length": 0}, "value_length=0"),
        (generate_mqar, {"pairs_per_turn": 0}, "pairs_per_turn=0"),
        (generate_rewrite, {"num_writes": 4, "num_keys": 5}, "num_keys=5 exceeds num_writes=4"),
        (generate_mqar, {"num_pairs": 20, "num_turns": 30}, "20 pairs need 40 turns"),
        (generate_mqar, {"num_pairs": 20, "num_symbols": 10}, "num_symbols=10"),
        (generate_babi, {"task": 4}, "task=4"),
        (generate_babi, {"facts_per_turn": 0}, "at least one"),
        (generate_babi, {"split": "dev"}, "'dev'"),
        (generate_needle, {"num_needles": 20}, "20 statements do not fit in 15 turns"),
        (generate_needle, {"num_questions": 2}, "num_questions=2"),
        (generate_variable_tracking, {"num_hops": 15}, "16 statements do not fit in 15 turns"),
    ],
)
def test_what_cannot_be_generated_is_refused(generate, options, reason):
    with pytest.raises(ValueError, match=reason):
        generate(1, **options)


def test_a_task_with_too_few_episodes_for_both_splits_says_so():
    with pytest.raises(ValueError, match="too few different episodes"):
        for split in ("train", "test"):
            generate_mqar(1, num_pairs=1, num_turns=2, num_symbols=1, split=split)


@pytest.mark.parametrize("task", ["remember", "rewrite"])
def test_a_typed_value_is_one_of_the_quarter_that_belongs_to_its_key(task):
    def kinds(p_typed):
        """First symbols of the values, by first symbol of the key."""
        found = {}
        for seed in range(100):
            episode = TASKS[task](seed, num_symbols=16, p_typed=p_typed)
            for turn in episode["interactions"]:
                if turn["kind"] == "state":
                    found.setdefault(turn["query"][0], set()).add(turn["query"][2])
        return found

    typed, free = kinds(1.0), kinds(0.0)
    assert len(typed) == 16 and all(len(values) == 4 for values in typed.values())
    assert len(set.union(*typed.values())) == 16, "kinds share their values, or leave some out"
    assert all(len(values) > 8 for values in free.values())
    with pytest.raises(ValueError, match=r"p_typed=1.5 must be a probability"):
        TASKS[task](0, p_typed=1.5)


@pytest.mark.parametrize(
    ("task", "told", "number"),
    [
        ("babi1", r"(\w+) (?:went|walked|ran|moved) to the (\w+)", 6),
        ("babi8", r"(\w+) (?:picked up|took|grabbed) the (\w+)", 4),
    ],
)
def test_people_of_a_typed_story_have_two_places_and_objects_of_their_own(task, told, number):
    def belongings(p_typed):
        found = {}
        for seed in range(100):
            for turn in TASKS[task](seed, p_typed=p_typed)["interactions"]:
                for person, thing in re.findall(told, turn["query"]):
                    found.setdefault(person, Counter())[thing] += 1
        return found

    typed, free = belongings(1.0), belongings(0.0)
    assert len(typed) == len(free) == 4
    assert all(len(things) == number for things in free.values())
    # where none of the two can be taken, another is
    assert all(sum(count for _, count in things.most_common(2)) > 0.7 * things.total() for things in typed.values())
    assert len({frozenset(dict(things.most_common(2))) for things in typed.values()}) >= 2
    assert set.union(*(set(things) for things in typed.values())) == set.union(*(set(x) for x in free.values()))
    if task == "babi1":
        assert all(len(things) == 2 for things in typed.values())
    with pytest.raises(ValueError, match=r"p_typed=-0.1 must be a probability"):
        TASKS[task](0, p_typed=-0.1)
