# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import hashlib
import itertools
import json
import re
from collections import Counter
from random import Random

import pytest
from demo import facts
from demo.facts import ATTRIBUTES, CHAT, HELD_OUT_PAIRS, OPEN_REAL_NAMES, UNKNOWN_ANSWER

NEWCOMER = {"p_introduction": 0.6, "p_foreign": 0.2, "p_casual": 0.5}


@pytest.fixture(scope="module")
def training():
    return list(itertools.islice(facts.iterate_dialogues(1_000_000), 3000))


def turns_of(split, count=300, **kwargs):
    return [
        turn for seed in range(count) for turn in facts.generate_dialogue(seed, split=split, **kwargs)["interactions"]
    ]


def told(turn):
    return [(turn["attribute"], turn["value"]), *turn["also"]] if turn["kind"] in ("state", "overwrite") else []


def test_a_seed_always_gives_the_same_dialogue():
    dialogues = [facts.generate_dialogue(seed, split=split, num_turns=16) for split in facts.SPLITS for seed in (7, 8)]
    digest = hashlib.sha256(json.dumps(dialogues).encode()).hexdigest()
    assert digest[:16] == "5337ddc5000c370d"
    assert dialogues[0] != dialogues[1]
    later = [facts.generate_dialogue(7, split=split, num_turns=16, **NEWCOMER) for split in facts.SPLITS]
    assert hashlib.sha256(json.dumps(later).encode()).hexdigest()[:16] == "51c141a6494d82ac"


def test_the_registry_is_large_enough():
    assert len(ATTRIBUTES) >= 32
    assert len(facts.value_pairs()) == len(set(facts.value_pairs())) >= 640
    assert sum(attribute.is_open for attribute in ATTRIBUTES.values()) >= 14
    assert len({query for query, _ in CHAT}) == len(CHAT) >= 60
    assert len({name.lower() for name in OPEN_REAL_NAMES}) == len(OPEN_REAL_NAMES) >= 150
    values = [value for values in facts.VALUES.values() for value in values]
    assert len(values) == len(set(values))
    assert not any(
        facts.contains_value(text, value) for query, answers in CHAT for text in (query, *answers) for value in values
    )


def test_every_attribute_has_its_own_questions():
    owners = {}
    for attribute in ATTRIBUTES.values():
        for text in attribute.questions + attribute.noun_phrases + attribute.statements:
            assert owners.setdefault(text, attribute.name) == attribute.name
        assert all(answer.endswith((" {v}.", " {av}.")) for answer in attribute.answers)


def test_held_out_pairs_are_an_eighth_and_leave_every_value_and_attribute_for_training():
    pairs = facts.value_pairs()
    assert set(pairs) >= HELD_OUT_PAIRS
    assert 0.10 < len(HELD_OUT_PAIRS) / len(pairs) < 0.14
    for name, attribute in ATTRIBUTES.items():
        assert sum(pair[0] == name for pair in HELD_OUT_PAIRS) in range(1, len(attribute.values) // 4 + 1)


def test_training_never_states_a_held_out_pair_but_states_all_others(training):
    stated = {pair for dialogue in training for turn in dialogue["interactions"] for pair in told(turn)}
    assert not stated & HELD_OUT_PAIRS
    assert len(set(facts.value_pairs()) - HELD_OUT_PAIRS - stated) < 10
    known = {(ATTRIBUTES[name].value_type, value) for name, value in stated}
    assert {(ATTRIBUTES[name].value_type, value) for name, value in HELD_OUT_PAIRS} <= known


def test_training_text_has_no_test_name(training):
    texts = [turn[side] for dialogue in training for turn in dialogue["interactions"] for side in ("query", "answer")]
    words = set(re.findall(r"\w+", " ".join(texts).lower()))
    assert not words & {name.lower() for name in OPEN_REAL_NAMES}
    listed = {value for values in facts.VALUES.values() for value in values}
    names = {v for d in training for t in d["interactions"] for _, v in told(t) if v not in listed}
    assert len(names) > 1500
    assert not any(facts.is_test_name(name) for name in names)


def test_open_names_of_the_two_parts_are_disjoint_and_varied():
    rng = Random(0)
    train = {facts.open_name(rng, "train") for _ in range(3000)}
    test = {facts.open_name(rng, "open") for _ in range(1000)}
    assert not train & test
    assert len(train) > 2500
    assert all(re.fullmatch(r"[A-Z][a-z]{2,8}", name) for name in train | test)
    assert {name[0] for name in train} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_the_open_split_uses_only_names_unknown_to_training():
    values = [value for turn in turns_of("open") for _, value in told(turn)]
    real = sum(value.lower() in {name.lower() for name in OPEN_REAL_NAMES} for value in values)
    assert 0.4 < real / len(values) < 0.6
    listed = {value for values in facts.VALUES.values() for value in values}
    assert not listed & set(values)


def test_the_new_split_tells_values_of_other_attributes_that_no_list_and_no_training_dialogue_has():
    turns = turns_of("new")
    stated = [pair for turn in turns for pair in told(turn)]
    kinds = {ATTRIBUTES[name].value_type for name, _ in stated}
    assert kinds == set(facts.VALUES) - set(facts.OPEN_TYPES) - {"month", "weekday"} == set(facts.NEW_TYPES)
    real = {value for values in facts.NEW_REAL_VALUES.values() for value in values}
    words = [value for name, value in stated if ATTRIBUTES[name].value_type != "number"]
    assert 0.4 < sum(value in real for value in words) / len(words) < 0.6
    training = turns_of("train", 2000, num_turns=16, p_open=1.0, p_new=1.0)
    text = " ".join(turn[side] for turn in training for side in ("query", "answer"))
    assert not {value.lower() for _, value in stated} & set(re.findall(r"\w+", text.lower()))
    for name, value in stated:
        kind = ATTRIBUTES[name].value_type
        assert value.isdecimal() == (kind == "number")
        assert value.istitle() == (kind in ("city", "language"))
        assert value.endswith("s") or kind != "animal"


def test_a_made_up_value_is_none_of_the_listed_ones_nor_a_real_word_of_the_tests(monkeypatch):
    rng = Random(0)
    numbers = {facts.new_value(rng, "number", "train") for _ in range(3000)}
    assert len(numbers) > 500 and not numbers & set(facts.VALUES["number"])
    names = iter(["Bat", "Owl", "Rat", "Rumo"])
    monkeypatch.setattr(facts, "open_name", lambda rng, split: next(names))
    # bats and owls are listed, rats are for the tests
    assert facts.new_value(rng, "animal", "train") == "rumos"


def test_training_can_tell_values_out_of_no_list_but_no_held_out_pair_and_leaves_the_dialogues_as_they_are_without():
    assert turns_of("train", 50) == turns_of("train", 50, p_new=0.0)
    pairs = [pair for turn in turns_of("train", 2000, num_turns=16, p_new=0.5) for pair in told(turn)]
    assert not HELD_OUT_PAIRS & set(pairs)
    listed = {value for values in facts.VALUES.values() for value in values}
    drawn = [value in listed for name, value in pairs if ATTRIBUTES[name].value_type in facts.NEW_TYPES]
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.02)
    assert all(value in listed for name, value in pairs if ATTRIBUTES[name].value_type in ("month", "weekday"))


def asked_and_told(turns):
    """What is said of facts, without the values, in lower case and without apostrophes and points."""
    found = []
    for turn in turns:
        text = turn["query"]
        for value in [turn["value"], *(value for _, value in turn["also"])]:
            text = text if value is None else re.sub(rf"(an? )?(?<!\w){re.escape(value)}(?!\w)", "{v}", text)
        found.append(text.lower().replace("'", "").rstrip(".?!"))
    return found


def test_every_attribute_has_casual_phrases_of_its_own_of_which_one_statement_and_one_question_are_for_tests():
    owners = {text: a.name for a in ATTRIBUTES.values() for text in a.questions + a.noun_phrases + a.statements}
    for is_test, phrases in facts._CASUAL.items():
        assert phrases.keys() == ATTRIBUTES.keys()
        for name, (statements, questions) in phrases.items():
            sizes = (len(statements), len(questions))
            assert sizes == (1, 1) if is_test else min(sizes) > 1
            for text in statements + questions:
                # a town or a month
                assert owners.setdefault(text, name) == name or text == "I was born in {v}."
            assert all(re.search(r"{a?v}", text) for text in statements) and not any("{" in text for text in questions)


def test_training_has_no_casual_phrase_of_the_tests_and_test_dialogues_have_no_other():
    held, trained = (
        {
            text.lower().replace("'", "").replace("{av}", "{v}").rstrip(".?!"): name
            for name, lists in found.items()
            for texts in lists
            for text in texts
        }
        for found in (facts._CASUAL[True], facts._CASUAL[False])
    )
    # a question whose words another phrase of the same dialogue contains is still one of its own
    training = asked_and_told(turns_of("train", 600, num_turns=16, p_casual=1.0, p_two=0.3))
    whole = [re.sub(r"^.*?(?:! |\. |, |: )", "", text) for text in training]
    assert not held.keys() & {*training, *whole}
    assert len(trained.keys() - {*training, *whole}) < 0.05 * len(trained)
    tests = [turn for turn in turns_of("seen", 100, num_turns=16, p_casual=1.0, p_two=0.0) if turn["kind"] == "ask"]
    assert all(any(text.endswith(phrase) for phrase in held) for text in asked_and_told(tests))


def test_casual_dialogues_tell_no_test_value_and_are_off_by_default():
    assert turns_of("train", 50) == turns_of("train", 50, p_casual=0.0) != turns_of("train", 50, p_casual=0.5)
    turns = turns_of("train", 1000, num_turns=16, p_casual=1.0, p_new=0.5)
    assert not HELD_OUT_PAIRS & {pair for turn in turns for pair in told(turn)}
    text = " ".join(turn[side] for turn in turns for side in ("query", "answer"))
    words = set(re.findall(r"\w+", text.lower()))
    assert not words & {name.lower() for names in (OPEN_REAL_NAMES, *facts.NEW_REAL_VALUES.values()) for name in names}
    beyond = {turn["query"] for turn in turns if turn["answer"] == facts.BEYOND_ANSWER}
    assert any(re.fullmatch(r"What is \d+ plus \d+\?", query) for query in beyond)
    assert not any("{" in turn["query"] for turn in turns)


def test_introductions_tell_up_to_three_facts_in_one_turn_and_are_off_by_default():
    assert turns_of("train", 50) == turns_of("train", 50, p_introduction=0.0)
    turns = turns_of("train", 500, p_introduction=1.0, p_two=0.0)
    counts = Counter(len(told(turn)) for turn in turns if turn["kind"] == "state")
    assert counts.keys() == {1, 2, 3} and counts[2] > counts[3] > counts[1] > 20
    assert any(turn["query"].startswith(("I'm", "My name is")) and len(turn["also"]) == 2 for turn in turns)
    assert not HELD_OUT_PAIRS & {pair for turn in turns for pair in told(turn)}
    for turn in turns:
        if turn["kind"] == "state":
            assert all(facts.contains_value(turn["query"], value) for _, value in told(turn))
            assert all(facts.contains_value(turn["answer"], value) for _, value in told(turn))
            assert not re.search(r"[{}&]", turn["query"])


def test_two_of_a_kind_are_told_asked_for_and_changed_together():
    turns = turns_of("train", 1000, p_introduction=1.0)
    pairs = [turn for turn in turns if " and " in (turn["value"] or "")]
    assert {turn["attribute"] for turn in pairs} == set(facts.PLURALS)
    assert {turn["kind"] for turn in pairs} == {"state", "overwrite", "ask"}
    assert all(len(set(turn["value"].split(" and "))) == 2 for turn in pairs)
    asked = [turn for turn in pairs if turn["kind"] == "ask"]
    assert all(re.match(r"Your \w+s are called ", turn["answer"]) for turn in asked)


def masked(turn):
    """The words of a statement, without its values."""
    return re.sub(r"(an? )?" + "|".join(rf"\b{re.escape(v)}\b" for _, v in told(turn)), "", turn["query"]).lower()


def test_introductions_of_the_tests_are_worded_as_training_never_sees():
    training, tests = (
        [masked(turn) for turn in turns_of(split, 600, p_introduction=1.0, p_two=0.0, num_turns=12) if turn["also"]]
        for split in ("train", "seen")
    )
    assert len(tests) > 500
    assert not set(training) & set(tests)
    joints = re.compile(r"; |, plus |\. also, | and [^.;]*, and ")
    assert not any(joints.search(text) for text in training if "; " in text or ", plus " in text or ". also, " in text)
    assert sum(bool(joints.search(text)) for text in tests) > len(tests) / 2


def test_what_no_attribute_is_about_is_refused_and_leaves_the_facts_as_they_are():
    assert turns_of("train", 50) == turns_of("train", 50, p_foreign=0.0)
    for split in ("train", "seen"):
        foreign = [turn for turn in turns_of(split, 300, p_foreign=0.3) if turn["kind"] == "foreign"]
        assert {turn["answer"] for turn in foreign} == set(facts.FOREIGN_ANSWERS[:2])
        for turn in foreign:
            assert (turn["value"] is None) == (turn["answer"] == facts.FOREIGN_ANSWERS[1])
            assert turn["value"] is None or facts.contains_value(turn["query"], turn["value"])
    mixed = [turn for turn in turns_of("train", 500, **NEWCOMER) if facts.FOREIGN_ANSWERS[2] in turn["answer"]]
    assert len(mixed) > 30 and all(turn["kind"] == "state" for turn in mixed)


def test_kinds_of_the_tests_never_occur_in_training_and_are_no_attributes(monkeypatch):
    train, held = ({noun for kind in facts.FOREIGN for noun in kind.nouns[part]} for part in (0, 1))
    assert len(train) > 300 and len(held) > 120 and not train & held
    drawn = {"train": set(), "seen": set()}
    draw = facts.DialogueWriter.foreign_kind

    def recorded(writer):
        kind, noun = draw(writer)
        drawn[writer.split].add(noun)
        return kind, noun

    monkeypatch.setattr(facts.DialogueWriter, "foreign_kind", recorded)
    for split in drawn:
        turns_of(split, 2000, **NEWCOMER)
    assert len(drawn["train"] & train) > 250 and not drawn["train"] & held
    assert len(drawn["seen"] & held) > 100 and not drawn["seen"] & train
    # in training three of ten are out of no list
    assert len([noun for noun in drawn["train"] - train if "'" not in noun]) > 500
    # what is told of things that the demo does have a place for is something else
    own = {text for a in ATTRIBUTES.values() for text in a.statements + a.questions + a.noun_phrases}
    own |= {text for found in facts._CASUAL.values() for lists in found.values() for texts in lists for text in texts}
    for kind in facts.FOREIGN:
        texts = kind.statements + kind.questions + kind.noun_phrases
        said = {text.replace("{s}", noun) for text in texts for nouns in kind.nouns for noun in nouns}
        assert not said & own


def test_the_seen_split_uses_training_pairs_and_the_unseen_split_asks_held_out_ones():
    trained = set(facts.value_pairs()) - HELD_OUT_PAIRS
    assert {pair for turn in turns_of("seen") for pair in told(turn)} <= trained
    unseen = turns_of("unseen", num_turns=16)
    asked = [(turn["attribute"], turn["value"]) for turn in unseen if turn["kind"] == "ask"]
    assert len(asked) > 500 and set(asked) <= HELD_OUT_PAIRS
    stated = [pair for turn in unseen for pair in told(turn)]
    assert sum(pair in HELD_OUT_PAIRS for pair in stated) / len(stated) > 0.8


@pytest.mark.parametrize("options", [{}, NEWCOMER | {"p_casual": 0.0}], ids=["plain", "newcomer"])
@pytest.mark.parametrize("split", facts.SPLITS)
def test_turns_agree_with_the_facts_told_so_far(split, options):
    for seed in range(60):
        past, stated, said = {}, {}, {}
        dialogue = facts.generate_dialogue(seed, split=split, num_turns=64, **options)
        for index, turn in enumerate(dialogue["interactions"]):
            name, value = turn["attribute"], turn["value"]
            if turn["kind"] == "state":
                assert not any(attribute in past for attribute, _ in told(turn))
            if turn["kind"] == "overwrite":
                assert past[name][-1] != value
            for attribute, new in told(turn):
                past.setdefault(attribute, []).append(new)
                stated[attribute] = said[attribute] = index
                assert facts.contains_value(turn["query"], new)
            if turn["kind"] == "unknown":
                assert name not in past and turn["answer"] == UNKNOWN_ANSWER
            if turn["kind"] == "ask":
                assert value == past[name][-1]
                assert set(turn["stale"]) == set(past[name]) - {value}
                assert (turn["distance"], turn["distance_stated"]) == (index - said[name], index - stated[name])
                assert turn["answer"].endswith(f" {value}.") and not facts.contains_value(turn["query"], value)
                said[name] = index
            assert turn["live_facts"] == len(past)


def test_the_mix_of_turns_follows_the_parameters():
    turns = turns_of("train", 200, num_turns=32)
    kinds = Counter(turn["kind"] for turn in turns)
    share = {kind: count / len(turns) for kind, count in kinds.items()}
    assert share["state"] == pytest.approx(0.38 + 0.02, abs=0.03)
    assert share["overwrite"] == pytest.approx(0.10, abs=0.02)
    assert share["ask"] + share["unknown"] == pytest.approx(0.36, abs=0.03)
    assert share["chat"] == pytest.approx(0.15, abs=0.02)
    assert kinds["unknown"] / (kinds["unknown"] + kinds["ask"]) == pytest.approx(0.12, abs=0.03)
    assert sum(bool(turn["also"]) for turn in turns) / kinds["state"] == pytest.approx(0.1, abs=0.03)
    assert {turn["kind"] for turn in turns_of("train", 20, p_overwrite=0, p_chat=0, p_unknown=0)} == {"state", "ask"}


def test_live_facts_can_be_limited():
    turns = turns_of("train", 50, num_turns=32, max_live_facts=2)
    assert max(turn["live_facts"] for turn in turns) == 2


def test_texts_are_short():
    turns = turns_of("train", 1000)
    assert max(len(turn["query"].split()) for turn in turns) <= 20
    assert max(len(turn["answer"].split()) for turn in turns if not turn["also"]) <= 12
    assert max(len(turn["answer"].split()) for turn in turns) <= 16


def test_hurried_queries_keep_the_case_of_values():
    turns = [turn for turn in turns_of("seen", p_noise=1.0) if turn["kind"] == "state" and not turn["also"]]
    for turn in turns:
        assert facts.contains_value(turn["query"], turn["value"])
        rest = turn["query"].replace(turn["value"], "")
        assert rest == rest.lower() and not rest.endswith((".", "?")) and "'" not in rest


def test_articles_fit_their_word():
    texts = " ".join(turn[side] for turn in turns_of("train", 1000, p_open=0.0) for side in ("query", "answer"))
    assert " an accountant" in texts and " a nurse" in texts
    assert not re.search(r"\b(a [aeio]|an [^aeio])", texts)


def test_answers_are_scored_by_whole_words():
    ask = facts.Interaction(
        query="What is my dog called?", answer="Your dog is called Max.", kind="ask", attribute="dog", value="Max",
        also=[], stale=["Rex"], distance=1, distance_stated=1, live_facts=1,
    )  # fmt: skip
    assert facts.score_answer(ask, "It is Max.") == {"correct": True, "stale": False, "abstained": False}
    assert facts.score_answer(ask, "It is Rex.") == {"correct": False, "stale": True, "abstained": False}
    assert facts.score_answer(ask, "Rex or Max.") == {"correct": False, "stale": False, "abstained": False}
    assert not facts.score_answer(ask, "It is Maxi.")["correct"]
    assert not facts.score_answer(ask, "It is max.")["correct"]
    assert facts.score_answer(ask, UNKNOWN_ANSWER) == {"correct": False, "stale": False, "abstained": True}
    unknown = {**ask, "kind": "unknown", "value": None, "stale": []}
    assert facts.score_answer(unknown, UNKNOWN_ANSWER)["correct"]
    assert not facts.score_answer(unknown, "It is Max.")["correct"]
    foreign = {**ask, "kind": "foreign", "stale": []}
    assert all(facts.score_answer(foreign, answer)["correct"] for answer in facts.FOREIGN_ANSWERS)
    assert not facts.score_answer(foreign, "Okay, your dog is called Max.")["correct"]


def test_reference_answers_score_as_correct():
    for split in facts.SPLITS:
        for turn in turns_of(split, 100, num_turns=32, **NEWCOMER):
            score = facts.score_answer(turn, turn["answer"])
            assert score["correct"] and not score["stale"]


def test_corpus_texts_are_those_of_the_training_split():
    texts = list(facts.corpus_texts(3, 1_000_000))
    first = facts.generate_dialogue(1_000_000)["interactions"][0]
    assert len(texts) == 3 * 8 * 2
    assert texts[:2] == [first["query"], first["answer"]]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        facts.generate_dialogue(0, split="test")
