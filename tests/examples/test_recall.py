# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import json
import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from demo import recall as evaluation
from demo.facts import UNKNOWN_ANSWER, corpus_texts, generate_dialogue
from demo.recall import HistoryArm, RxTArm, answer_perplexity, main, make_arm, recall
from transformers import LlamaConfig, LlamaForCausalLM

from rxt_hf.chat_template import encode_interactions, train_tokenizer
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.session import RxTSession

from ..models import tiny_model

# turns of three conversations
QUERIES = [
    ["My dog is called Rex.", "I live in Oslo.", "My name is Anna."],
    ["Hello!", "My cat is called Misty.", "I am tired."],
    ["What is my dog called?", "Where do I live?", "Do you remember my name?"],
]
LIMIT = 8
KINDS = {"rxt": (True, False), "full_history": (False, True), "current_turn": (False, False)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus_texts(50), vocab_size=300, max_length=96)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128).eval()


@pytest.fixture(scope="module")
def llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


def dialogues_of(first_seed, count, **options):
    return [generate_dialogue(first_seed + row, **options)["interactions"] for row in range(count)]


def encoded(tokenizer, turns):
    return encode_interactions(tokenizer, [turn["query"] for turn in turns], [turn["answer"] for turn in turns])


@pytest.fixture
def play(monkeypatch):
    """The result of a player that answers every turn by a rule, and the questions that it was asked."""

    def run(rule):
        options = {"split": "unseen", "num_turns": 16, "p_overwrite": 0.25}
        dialogues = dialogues_of(2_000, 20, **options)
        columns = zip(*dialogues, strict=True)

        def answer(queries, max_new_tokens):
            turns = next(columns)
            assert queries == [turn["query"] for turn in turns]
            return [rule(turn) for turn in turns]

        monkeypatch.setattr(evaluation, "make_arm", lambda *args, **kwargs: SimpleNamespace(answer=answer))
        evaluated = SimpleNamespace(eval=lambda: None)
        result = recall(evaluated, None, num_dialogues=20, first_seed=2_000, **options)
        asked = [turn for dialogue in dialogues for turn in dialogue if turn["kind"] == "ask"]
        overwritten = [turn for turn in asked if turn["stale"]]
        assert (result["questions"], result["stale_questions"]) == (len(asked), len(overwritten))
        assert 0 < len(overwritten) < len(asked)
        return result, asked

    return run


def test_a_player_who_knows_the_dialogue_recalls_everything(play):
    result, asked = play(lambda turn: turn["answer"])
    assert [result[name] for name in ("recall", "recall_ci95", "stale", "abstention", "chat")] == [1, 0, 0, 1, 1]
    for name in ("by_distance", "by_live_facts"):
        assert {share for share, _ in result[name].values()} == {1}
        assert sum(number for _, number in result[name].values()) == len(asked)


def test_a_player_who_knows_nothing_only_abstains(play):
    result, _ = play(lambda turn: UNKNOWN_ANSWER)
    assert [result[name] for name in ("recall", "stale", "abstention", "chat")] == [0, 0, 1, 0]


def test_a_player_who_keeps_the_first_value_is_stale_about_all_that_changed(play):
    result, asked = play(lambda turn: f"It is {[*turn['stale'], turn['value']][0]}.")
    unchanged = sum(not turn["stale"] for turn in asked) / len(asked)
    assert (result["stale"], result["abstention"]) == (1, 0)
    assert result["recall"] == pytest.approx(unchanged, abs=1e-4)
    error = 1.96 * math.sqrt(unchanged * (1 - unchanged) / len(asked))
    assert result["recall_ci95"] == pytest.approx(error, abs=1e-4)


def test_recall_is_told_by_distance_and_by_number_of_facts(play):
    result, asked = play(lambda turn: turn["answer"] if turn["distance"] and turn["distance"] <= 2 else "")
    near = [sum(turn["distance"] == distance for turn in asked) for distance in (1, 2)]
    shares = {name: share for name, (share, _) in result["by_distance"].items()}
    assert shares == {"1": 1, "2": 1, "3-4": 0, "5-8": 0, "9-16": 0}
    assert [result["by_distance"][name][1] for name in ("1", "2")] == near
    alone = [turn["distance"] <= 2 for turn in asked if turn["live_facts"] == 1]
    assert result["by_live_facts"]["1"] == [pytest.approx(sum(alone) / len(alone), abs=1e-4), len(alone)]


def test_shares_of_no_questions_are_none(model, tokenizer):
    result = recall(model, tokenizer, num_turns=1, num_dialogues=2, max_new_tokens=1, p_ask=0.0, p_chat=0.0)
    assert (result["questions"], result["stale_questions"]) == (0, 0)
    assert [result[name] for name in ("recall", "recall_ci95", "stale", "abstention", "chat")] == [None] * 5


def test_the_arm_follows_from_the_model(model, llama, tokenizer):
    arm = make_arm(model, tokenizer, "shuffled", full_history=True)
    assert isinstance(arm, RxTArm) and arm.memory == "shuffled"
    for full_history in (True, False):
        arm = make_arm(llama, tokenizer, full_history=full_history)
        assert isinstance(arm, HistoryArm) and arm.full_history is full_history


def test_an_rxt_answers_as_one_session_for_each_dialogue(model, tokenizer):
    arm = RxTArm(model, tokenizer)
    sessions = [RxTSession(model, tokenizer, max_new_tokens=LIMIT, do_sample=False) for _ in range(3)]
    for queries in QUERIES:
        answers = arm.answer(queries, LIMIT)
        assert answers == [session.send(query) for session, query in zip(sessions, queries, strict=True)]
        assert len(set(answers)) == 3, "a memory that is not read would give such answers too"
    expected = torch.cat([session.stm_cache.states for session in sessions])
    torch.testing.assert_close(arm.stm_cache.states, expected, atol=1e-5, rtol=0)
    assert arm.stm_cache.turns.tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", ["rxt", "llama"])
def test_samples_are_of_the_whole_distribution_and_the_same_each_time(model, llama, tokenizer, monkeypatch, kind):
    played = model if kind == "rxt" else llama
    answers = []

    def kept(interaction, answer):
        answers.append(answer)
        return {"correct": False, "stale": False}

    monkeypatch.setattr(evaluation, "score_answer", kept)
    # what the model's own settings would make of sampling: greedy answers
    for name, value in {"top_k": 1, "top_p": 0.01, "temperature": 0.01}.items():
        monkeypatch.setattr(played.generation_config, name, value)
    for do_sample in (False, True, True):
        torch.rand(1)
        result = recall(
            played,
            tokenizer,
            num_turns=2,
            num_dialogues=3,
            max_new_tokens=LIMIT,
            full_history=True,
            do_sample=do_sample,
        )
        assert result["do_sample"] is do_sample
    greedy, first, second = (answers[start : start + 6] for start in (0, 6, 12))
    assert first == second
    assert all(one != other for one, other in zip(greedy, first, strict=True))


@pytest.mark.parametrize("memory", ["shuffled", "cleared"])
def test_a_control_changes_what_a_turn_reads_and_nothing_of_what_is_written(model, tokenizer, memory):
    """By hand: every dialogue alone, without padding, each turn read once under that memory."""
    prompts = [encode_interactions(tokenizer, queries)["input_ids"] for queries in QUERIES]
    true, controlled = RxTArm(model, tokenizer), RxTArm(model, tokenizer, memory)
    memories = [model.init_stm(1) for _ in range(3)]
    for turn, queries in enumerate(QUERIES):
        read = [memories[-1], *memories[:-1]] if memory == "shuffled" else [model.init_stm(1)] * 3
        expected = []
        for row in range(3):
            ids = torch.tensor([prompts[turn][row]])
            out = model.generate(input_ids=ids, stm_cache=read[row], max_new_tokens=LIMIT, do_sample=False)
            expected.append(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
            out = model.generate(input_ids=ids, stm_cache=memories[row], max_new_tokens=LIMIT, do_sample=False)
            memories[row] = out.stm_cache
        true_answers = true.answer(queries, LIMIT)
        assert controlled.answer(queries, LIMIT) == expected
        # all memories are the same before the first turn
        assert all(a != b for a, b in zip(expected, true_answers, strict=True)) if turn else expected == true_answers
        assert torch.equal(controlled.stm_cache.states, true.stm_cache.states)
        written = torch.cat([each.states for each in memories])
        torch.testing.assert_close(controlled.stm_cache.states, written, atol=1e-5, rtol=0)


@pytest.mark.parametrize("full_history", [True, False])
def test_a_baseline_reads_all_interactions_with_its_own_answers_or_this_turn_alone(tokenizer, full_history):
    answers = [["Good.", "Nice to meet you.", "Hm."], ["Hi!", "So it is.", "You should rest now."], ["", "Oslo.", "?"]]
    prompts = []

    def generate(input_ids, attention_mask, max_new_tokens, do_sample):
        prompts.append([row[real.bool()].tolist() for row, real in zip(input_ids, attention_mask, strict=True)])
        ends = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in answers[len(prompts) - 1]]
        width = max(map(len, ends))
        padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in ends]
        assert not do_sample and attention_mask[:, -1].all()
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    arm = HistoryArm(SimpleNamespace(device="cpu", generate=generate), tokenizer, full_history)
    histories = [[], [], []]
    for turn, queries in enumerate(QUERIES):
        assert arm.answer(queries, LIMIT) == answers[turn]
        asked = encode_interactions(tokenizer, queries)["input_ids"]
        assert prompts[turn] == [history + prompt for history, prompt in zip(histories, asked, strict=True)]
        if full_history:
            written = encode_interactions(tokenizer, queries, answers[turn])["input_ids"]
            histories = [history + whole for history, whole in zip(histories, written, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_the_losses_of_all_dialogues(model, llama, tokenizer, kind):
    is_rxt, full_history = KINDS[kind]
    evaluated = model if is_rxt else llama
    total = count = 0
    for turns in dialogues_of(500, 3, split="open", num_turns=4):
        episode = encoded(tokenizer, turns)
        features = [episode]
        if kind == "full_history":
            features = [{name: list(chain(*rows)) for name, rows in episode.items()}]
        elif kind == "current_turn":
            rows = zip(*episode.values(), strict=True)
            features = [dict(zip(episode, row, strict=True)) for row in rows]
        batch = RxTEpisodeCollator(0)(features)
        labelled = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            loss = evaluated(**batch).loss.item()
        if not count:
            options = {"split": "open", "num_turns": 4, "first_seed": 500, "full_history": full_history}
            first = answer_perplexity(evaluated, tokenizer, num_dialogues=1, **options)
            assert first == pytest.approx(math.exp(loss), rel=1e-4)
        total, count = total + labelled * loss, count + labelled
    found = answer_perplexity(evaluated, tokenizer, num_dialogues=3, **options)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)
    assert abs(found - first) > 1e-3 * first


def test_perplexity_counts_the_same_tokens_for_every_arm(model, llama, tokenizer, monkeypatch):
    counted, original = [], torch.nn.functional.cross_entropy

    def cross_entropy(logits, labels, **kwargs):
        counted[-1] += labels.tolist()
        return original(logits, labels, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    for is_rxt, full_history in KINDS.values():
        counted.append([])
        answer_perplexity(model if is_rxt else llama, tokenizer, num_dialogues=3, full_history=full_history)
    dialogues = dialogues_of(1_000, 3, split="seen", num_turns=8)
    answers = [turn["answer"] for turns in dialogues for turn in turns]
    expected = [token for text in answers for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    assert counted == [expected] * 3


def test_the_command_prints_one_line_for_each_split_and_number_of_turns(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    options = ["--split", "seen", "open", "--turns", "2", "8", "--dialogues", "2", "--memory", "cleared"]
    main([str(tmp_path), *options])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["split"], line["turns"]) for line in lines] == [("seen", 2), ("seen", 8), ("open", 2), ("open", 8)]
    assert {line["memory"] for line in lines} == {"cleared"}
    expected = recall(model, tokenizer, split="open", num_turns=8, num_dialogues=2, memory="cleared")
    assert lines[-1] == expected


def test_controls_are_refused_where_there_is_no_other_memory(monkeypatch):
    with pytest.raises(ValueError, match="expected 2 or more, got 1"):
        recall(None, None, num_dialogues=1, memory="shuffled")
    with pytest.raises(ValueError, match="needs a model with a memory"):
        recall(torch.nn.Identity(), None, num_dialogues=2, memory="cleared")
