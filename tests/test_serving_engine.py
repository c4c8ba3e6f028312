# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Turns that are generated together come out as they do alone."""

import threading
import time

import pytest
import torch

from rxt_hf import RxTSession, STMCache
from rxt_hf.serving.engine import Engine, QueueFullError, Turn, _Text, bytes_of_row, decode

from . import serving
from .models import close, random_ids, random_memory, tiny_model
from .serving import scripted

FACTS = ["My dog is called Mochi.", "I live in Lisbon.", "My favourite colour is green.", "I work as a baker."]
QUESTIONS = ["What is my dog called?", "Where do I live?", "What is my favourite colour?", "What is my job?"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demo():
    return serving.demo()


@pytest.fixture
def engine(demo):
    engine = Engine(*demo, max_rows=4)
    yield engine
    engine.close()


def prompt_of(demo, text):
    return RxTSession(*demo)._prepare(text, {})[0][0].tolist()


def small_engine(model, demo, **options):
    """An engine on a tiny random model; what its ids spell does not matter."""
    return Engine(model, demo[1], **options)


def alone(model, turn, **kwargs):
    """The answer and the memory that `generate` gives one turn."""
    ids = torch.tensor([turn.prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), stm_cache=turn.memory, max_new_tokens=turn.max_new_tokens, **kwargs
    )
    return output.sequences[0, ids.shape[1] :].tolist(), output.stm_cache


def test_more_conversations_than_rows_are_each_what_a_session_says(demo, engine):
    sessions = [RxTSession(*demo) for _ in range(9)]
    memories = [demo[0].init_stm(1) for _ in sessions]
    for round_of in range(3):
        texts = [(FACTS + QUESTIONS)[(index + 4 * (round_of == 2)) % 8] for index in range(len(sessions))]
        turns = [
            engine.submit(Turn(prompt_of(demo, text), memory, 64))
            for text, memory in zip(texts, memories, strict=True)
        ]
        for index, (turn, session, text) in enumerate(zip(turns, sessions, texts, strict=True)):
            assert turn.result(60).text == session.send(text)
            close(turn.memory_after.states, session.stm_cache.states, 1e-4)
            assert turn.memory_after.turns.tolist() == [session.turns]
            assert turn.memory_after.fingerprint == session.stm_cache.fingerprint
            memories[index] = turn.memory_after
    assert engine.prefills < engine.turns and engine.steps < engine.tokens and engine.writes < engine.turns


MODELS = {
    "some layers with memory": {"memory_layers": [1], "num_hidden_layers": 3},
    "fewer heads": {"num_key_value_heads": 2, "cross_attention_num_key_value_heads": 1},
    "sliding": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "experts": {"num_experts": 4, "moe_intermediate_size": 16},
    "without rotation": {"no_rope_layers": [0]},
    "read jointly": {"memory_reading": "joint"},
    "read jointly, by rank": {"memory_reading": "joint", "memory_positions": "rank"},
    "selected slots": {
        "memory_reading": "joint",
        "memory_encoding": "decoder",
        "memory_writing": "selection",
        "memory_init": "zeros",
    },
    "selected slots, written in passing": {
        "memory_reading": "joint",
        "memory_positions": "rank",
        "memory_encoding": "decoder_in_passing",
        "memory_writing": "selection",
        "sliding_window": 4,
    },
    "selected slots, read apart": {"memory_encoding": "decoder", "memory_writing": "selection"},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_tokens_of_every_architecture_are_those_of_generate(demo, options, attention):
    model = tiny_model(**options)
    model.set_attn_implementation(attention)
    memories = random_memory(model, batch_size=6)
    if model.config.memory_writing == "selection":
        # rows that are half filled, filled with one slot, and empty
        memories.states[1:3, :, 3:], memories.states[3, :, 1:], memories.states[4] = 0, 0, 0
    engine = small_engine(model, demo, max_rows=3)
    turns = [Turn(random_ids(3 + 4 * row, seed=row).tolist(), memories.select(row), 5 + 3 * row) for row in range(6)]
    for turn in turns:
        engine.submit(turn)
    for turn in turns:
        turn.result(60)
        answer, memory = alone(model, turn)
        assert turn.token_ids == answer
        close(turn.memory_after.states, memory.states)
        assert turn.memory_after.turns.tolist() == [4]
    engine.close()


PASSING = {
    "joint": {"memory_reading": "joint", "memory_positions": "rank", "memory_writing": "selection"},
    "apart": {"memory_writing": "selection", "num_hidden_layers": 3, "memory_layers": [0, 2]},
    "attended": {"memory_reading": "joint"},
}


@pytest.mark.parametrize("options", PASSING.values(), ids=PASSING)
def test_a_model_that_writes_in_passing_computes_no_states_again(demo, options, monkeypatch):
    """Rows of several lengths over three turns, one of them stopped in the middle and one cancelled."""
    model = tiny_model(**options, memory_encoding="decoder_in_passing")
    # every row goes on to its limit
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    engine = SlowEngine(model, demo[1], max_rows=3)
    memories = [random_memory(model).select(0) if row % 2 else model.init_stm(1) for row in range(6)]
    for number in range(3):
        while engine.gate.acquire(blocking=False):
            pass
        turns = [
            Turn(random_ids(3 + 4 * row, seed=10 * number + row).tolist(), memory, 5 + 3 * row)
            for row, memory in enumerate(memories)
        ]
        expected = [alone(model, turn) for turn in turns]
        with monkeypatch.context() as patch:
            patch.setattr(model.model, "encode", None)
            # as if the third token of one row ended a stop string; what these ids spell is no text
            stopped, first = turns[4], turns[0]
            patch.setattr(_Text, "add", lambda text, _, it=stopped: text.turn is it and len(it.token_ids) == 3)
            for turn in turns:
                engine.submit(turn)
            engine.gate.release(2)
            wait_for(lambda it=first: len(it.token_ids) == 2)
            first.cancel()
            engine.gate.release(100)
            for turn, (answer, memory) in zip(turns[1:4] + turns[5:], expected[1:4] + expected[5:], strict=True):
                assert turn.result(60).token_ids == answer
                close(turn.memory_after.states, memory.states)
            stopped.result(60)
        assert stopped.finish_reason == "stop" and stopped.token_ids == expected[4][0][:3]
        ids = torch.tensor([stopped.prompt + stopped.token_ids])
        close(stopped.memory_after.states, model.update_memory(stopped.memory, ids).states)
        assert first.memory_after is first.memory and len(first.token_ids) < 5
        memories = [turn.memory_after for turn in turns]
    # what is written without its instruction is read again without it
    turn = Turn([1, 9, 8, 5, 6], memories[0], 6, written_prompt=[1, 5, 6])
    ids = torch.tensor([[1, 5, 6, *engine.submit(turn).result(60).token_ids]])
    close(turn.memory_after.states, model.update_memory(memories[0], ids).states)
    engine.close()


def test_sampling_of_a_row_is_that_of_generate_with_its_seed_whatever_runs_beside_it(demo, engine):
    model, prompt = demo[0], prompt_of(demo, "Tell me a joke.")
    turns = [
        Turn(prompt, model.init_stm(1), 24, temperature=5.0, top_p=0.9, seed=7),
        Turn(prompt, model.init_stm(1), 24),
        Turn(prompt, model.init_stm(1), 24, temperature=5.0, top_p=0.9, seed=8),
        Turn(prompt, model.init_stm(1), 24, temperature=1.0, seed=3),
    ]
    for turn in turns:
        engine.submit(turn)
    answers = [turn.result(60).token_ids for turn in turns]
    assert answers[0] != answers[2] != answers[1]
    for turn, top_p in ((turns[0], 0.9), (turns[2], 0.9), (turns[3], 1.0)):
        torch.manual_seed(turn.seed)
        sampled = {"do_sample": True, "temperature": turn.temperature, "top_p": top_p, "top_k": 0}
        assert alone(model, turn, **sampled)[0] == turn.token_ids


def test_pieces_are_whole_characters_and_join_to_the_answer(demo, monkeypatch):
    model, tokenizer = demo
    text = "Grüße, 日本語 \U0001f9a6!"
    scripts = [tokenizer(text)["input_ids"], [300, 11, 120, 240, 200, 17, 250]]
    for script in scripts:
        engine = scripted(Engine(model, tokenizer, max_rows=2), monkeypatch, script)
        pieces = []
        turn = Turn([1, 4, 5], model.init_stm(1), len(script), streams=True)
        turn.on_change = lambda turn=turn, pieces=pieces: pieces.append(turn.take())
        engine.submit(turn).result(60)
        pieces.append(turn.take())
        assert "".join(pieces) == turn.text == decode(tokenizer, script)
        assert len([piece for piece in pieces if piece]) > 1
        engine.close()
    assert "\ufffd" in turn.text and "\ufffd" not in decode(tokenizer, scripts[0])


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_ends_before_its_stop_string_and_no_piece_shows_a_part_of_it(demo, monkeypatch, streams):
    model, tokenizer = demo
    script = tokenizer("one two three, END here")["input_ids"]
    engine = scripted(Engine(model, tokenizer, max_rows=2), monkeypatch, script)
    pieces, turn = [], Turn([1, 4, 5], model.init_stm(1), len(script), stop=["zzz", ", END"], streams=streams)
    turn.on_change = lambda: pieces.append(turn.take())
    engine.submit(turn).result(60)
    assert turn.text == "one two three" == "".join([*pieces, turn.take()])
    assert turn.finish_reason == "stop" and len(turn.token_ids) < len(script)
    # what was generated is written, the stop string included
    expected = model.update_memory(turn.memory, torch.tensor([[1, 4, 5, *turn.token_ids]]))
    close(turn.memory_after.states, expected.states)
    engine.close()


def test_an_answer_that_reaches_its_limit_says_so_and_one_cut_by_the_context_too(demo, engine):
    prompt = prompt_of(demo, FACTS[0])
    turn = engine.submit(Turn(prompt, demo[0].init_stm(1), 3)).result(60)
    assert turn.finish_reason == "length" and len(turn.token_ids) == 3
    long = random_ids(250).tolist()
    turn = engine.submit(Turn(long, demo[0].init_stm(1), 100)).result(60)
    assert len(turn.token_ids) <= 6
    with pytest.raises(ValueError, match="does not fit"):
        engine.submit(Turn(random_ids(256).tolist(), demo[0].init_stm(1), 1))


def test_what_is_written_may_differ_from_the_prompt_and_nothing_is_written_on_demand(demo, engine):
    model, prompt = demo[0], prompt_of(demo, FACTS[0])
    plain = engine.submit(Turn(prompt, model.init_stm(1), 24)).result(60)
    instructed = engine.submit(Turn([1, 7, 300, *prompt[1:]], model.init_stm(1), 24, written_prompt=prompt)).result(60)
    expected = model.update_memory(None, torch.tensor([prompt + instructed.token_ids]))
    close(instructed.memory_after.states, expected.states)
    kept = engine.submit(Turn(prompt, plain.memory_after, 24, updates_memory=False)).result(60)
    assert torch.equal(kept.memory_after.states, plain.memory_after.states)


def test_a_replay_before_the_turn_is_the_memory_of_these_interactions(demo, engine):
    model, prompt = demo[0], prompt_of(demo, QUESTIONS[0])
    history = [[*prompt_of(demo, text), 300 + index, 2] for index, text in enumerate(FACTS)]
    turn = engine.submit(Turn(prompt, model.init_stm(1), 24, replay=history)).result(60)
    expected = engine.submit(Turn(prompt, model.replay(None, history), 24)).result(60)
    assert turn.token_ids == expected.token_ids
    close(turn.memory_after.states, expected.memory_after.states)
    assert turn.memory_after.turns.tolist() == [5]


class SlowEngine(Engine):
    """Waits for a permission before each step."""

    def __init__(self, *args, **kwargs):
        self.gate = threading.Semaphore(0)
        super().__init__(*args, **kwargs)

    def _step(self):
        self.gate.acquire()
        super()._step()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def test_a_cancelled_turn_frees_its_row_within_a_step_and_writes_nothing(demo):
    model, prompt = demo[0], prompt_of(demo, "Tell me a joke.")
    engine = SlowEngine(*demo, max_rows=2, max_waiting=2)
    turns = [engine.submit(Turn(prompt, model.init_stm(1), 9 - index)) for index in range(2)]
    engine.gate.release()
    wait_for(lambda: engine.active == 2)
    waiting = [engine.submit(Turn(prompt, model.init_stm(1), 4)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 turns wait already"):
        engine.submit(Turn(prompt, model.init_stm(1), 4))
    turns[0].cancel()
    waiting[0].cancel()
    engine.gate.release(1)
    wait_for(lambda: turns[0].is_done)
    assert turns[0].result(20).finish_reason == waiting[0].result(20).finish_reason == "cancelled"
    assert turns[0].memory_after is turns[0].memory
    engine.gate.release(100)
    expected = alone(model, turns[1])[0]
    assert turns[1].result(20).token_ids == expected
    assert waiting[1].result(20).token_ids == expected[:4]
    engine.close()


def test_a_turn_beyond_its_time_ends_with_an_error_and_the_others_go_on(demo):
    model, prompt = demo[0], prompt_of(demo, "Tell me a joke.")
    engine = SlowEngine(*demo, max_rows=2)
    late = engine.submit(Turn(prompt, model.init_stm(1), 9, timeout_s=0.05))
    other = engine.submit(Turn(prompt, model.init_stm(1), 4))
    time.sleep(0.1)
    engine.gate.release(100)
    with pytest.raises(TimeoutError, match="time limit"):
        late.result(20)
    assert len(other.result(20).token_ids) == 4
    engine.close()


def test_a_failed_write_or_step_is_the_error_of_its_turns_alone(demo, engine, monkeypatch):
    model, prompt = demo[0], prompt_of(demo, FACTS[0])
    bad = STMCache(torch.full_like(model.init_stm(1).states, float("nan")))
    turns = [Turn(prompt, memory, 4) for memory in (model.init_stm(1), bad, model.init_stm(1))]
    for turn in turns:
        engine.submit(turn)
    with pytest.raises(ValueError, match="not finite"):
        turns[1].result(60)
    assert torch.isfinite(turns[0].result(60).memory_after.states).all()
    assert torch.isfinite(turns[2].result(60).memory_after.states).all()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_join", lambda turns: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(Turn(prompt, model.init_stm(1), 4)).result(60)
    assert engine.submit(Turn(prompt, model.init_stm(1), 4)).result(60).token_ids == turns[0].token_ids


def test_a_memory_of_other_weights_or_of_another_shape_is_refused_at_once(demo, engine):
    memory = demo[0].init_stm(1)
    with pytest.raises(ValueError, match="fingerprint 'another'"):
        engine.submit(Turn([1, 4, 5], STMCache(memory.states, 0, "another"), 4))
    with pytest.raises(ValueError, match="stm_cache has shape"):
        engine.submit(Turn([1, 4, 5], memory.repeat(2), 4))


def test_rows_fill_what_memory_allows_and_all_of_it_is_allocated_at_once(demo):
    model, engine = demo[0], Engine(*demo, max_rows=3)
    example = model.model.memory_keys_values(model.model.initial_states(1))
    tables = [engine._within.keys, engine._within.values, *(part for pair in engine._across for part in pair)]
    states = 2 * model.init_stm(1).nbytes
    assert sum(table.nbytes for table in tables) == 3 * (bytes_of_row(model, example) - states)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Turn([1, 4, 5], model.init_stm(1), 4))


def test_an_attention_without_masks_of_ones_own_is_refused(demo):
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa or eager, got 'flash_attention_2'"):
        Engine(model, demo[1], max_rows=1)


@pytest.mark.slow
def test_a_compiled_step_says_the_same(demo):
    engine = Engine(*demo, max_rows=4, compiles=True)
    model = demo[0]
    turns = [engine.submit(Turn(prompt_of(demo, text), model.init_stm(1), 20)) for text in FACTS[:3]]
    for turn in turns:
        assert turn.result(600).token_ids == alone(model, turn)[0]
    engine.close()
