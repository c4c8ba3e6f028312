# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import asyncio
import contextlib
import copy
import gc
import json
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import StoppingCriteria, TextStreamer

from rxt_hf import RxTConfig, RxTForCausalLM, StateError, STMCache
from rxt_hf.cache_rxt import PendingSTMCache
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.session import RxTSession, send_batch, tokenizer_fingerprint

from .models import IN_PASSING, JOINT

CONTEXT = 96
TEXTS = ["My dog is called Rex. What is my dog called? You live in Oslo.\n"] * 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, max_length=CONTEXT)


def random_model(tokenizer, seed=0, **config):
    torch.manual_seed(seed)
    settings = {"initializer_range": 0.3, "max_position_embeddings": CONTEXT, "vocab_size": len(tokenizer), **config}
    return RxTForCausalLM(
        RxTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_memory_slots=6,
            **settings,
        )
    ).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer)


@pytest.fixture
def session(model, tokenizer):
    return RxTSession(model, tokenizer, max_new_tokens=6)


def same(one, other):
    return torch.equal(one.states, other.states) and torch.equal(one.turns, other.turns)


def unchanged(session, memory, turns=0):
    return session.stm_cache is memory and len(session.history) == turns


def test_a_turn_is_the_generate_call_of_the_readme(model, tokenizer, session):
    answers, memory = [], None
    for query in ("My dog is called Rex.", "What is my dog called?"):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=6, stm_cache=memory, return_dict_in_generate=True)
        memory = out.stm_cache
        answers.append(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        assert session.send(query) == answers[-1]
    assert same(session.stm_cache, memory)
    assert session.turns == 2
    assert [turn["answer"] for turn in session.history] == answers


@pytest.mark.parametrize("form", [JOINT, IN_PASSING], ids=["apart", "in passing"])
def test_a_session_of_a_model_that_reads_jointly_does_all_that_others_do(tokenizer, form, tmp_path):
    model = random_model(tokenizer, **form, memory_init="zeros")
    session = RxTSession(model, tokenizer, max_new_tokens=6)
    first = session.send("My dog is called Rex.")
    before = session.stm_cache
    other = session.fork()
    assert "".join(other.stream("What is my dog called?")) == session.send("What is my dog called?")
    assert same(other.stm_cache, session.stm_cache) and not same(other.stm_cache, before)
    session.undo()
    assert same(session.stm_cache, before)
    later = RxTSession(model, tokenizer, max_new_tokens=6, update_memory="async")
    assert later.send("My dog is called Rex.") == first
    assert same(later.stm_cache, before)
    other.save(tmp_path / "state")
    loaded = RxTSession.load(tmp_path / "state", model, tokenizer)
    assert same(loaded.stm_cache, other.stm_cache)
    together = [session.fork(), RxTSession(model, tokenizer, max_new_tokens=6)]
    texts = ["What is my dog called?", "My dog is called Rex."]
    assert send_batch(together, texts) == [loaded.fork().history[1]["answer"], first]
    for found, expected in zip(together, (other, later), strict=True):
        torch.testing.assert_close(found.stm_cache.states, expected.stm_cache.states, rtol=0, atol=1e-5)
    loaded.forget(0)
    assert [turn["query"] for turn in loaded.history] == ["What is my dog called?"]
    other.forget(1)
    torch.testing.assert_close(other.stm_cache.states, before.states, rtol=0, atol=1e-5)
    assert not torch.allclose(loaded.stm_cache.states, other.stm_cache.states, atol=1e-3)


def test_history_is_a_copy_that_the_model_never_reads(session):
    other = session.fork()
    session.send("hello")
    other.send("hello")
    session.history[0]["query"] = "changed"
    session.history.clear()
    assert session.history[0]["query"] == "hello"
    assert session.send("again") == other.send("again")


@pytest.mark.parametrize("text", ["", " ", "\t\n  \u2003"])
def test_empty_text_is_refused_and_the_memory_stays(session, text):
    memory = session.stm_cache
    for call in (session.send, session.stream):
        with pytest.raises(ValueError, match="empty"):
            call(text)
    assert unchanged(session, memory)


def test_text_that_is_no_valid_unicode_is_refused_by_its_place(session):
    with pytest.raises(ValueError, match=r"no valid Unicode.*character 2"):
        session.send("ab\udcff")
    with pytest.raises(TypeError, match="bytes"):
        session.send(b"ab")


def test_query_longer_than_the_context_is_refused_with_both_counts(session, tokenizer):
    memory = session.stm_cache
    with pytest.raises(ValueError, match=rf"1003 tokens .* at most {CONTEXT - 16} fit .*={CONTEXT}"):
        session.send("7" * 1000)
    with pytest.raises(ValueError, match=f"{CONTEXT - 15} tokens"):
        session.stream("7" * (CONTEXT - 15 - 3))
    assert unchanged(session, memory)
    session.send("7" * (CONTEXT - 16 - 3))
    assert session.turns == 1


def test_answers_end_with_the_context_whatever_max_new_tokens_says(session, model):
    limited = copy.copy(model.generation_config)
    limited.max_new_tokens = 3
    prompt = "7" * (CONTEXT - 16 - 3)
    lengths = {}
    for name, kwargs in {
        "default": {"max_new_tokens": None},
        "too many": {"max_new_tokens": 1000},
        "few": {"max_new_tokens": 5},
        "config": {"max_new_tokens": None, "generation_config": limited},
    }.items():
        fork = session.fork()
        fork.send(prompt, eos_token_id=None, **kwargs)
        lengths[name] = len(fork._state.log[0].token_ids) - (CONTEXT - 16)
    assert lengths == {"default": 16, "too many": 16, "few": 5, "config": 3}


def test_default_answer_has_at_most_128_tokens(tokenizer):
    session = RxTSession(random_model(tokenizer, max_position_embeddings=512), tokenizer, eos_token_id=None)
    session.send("7")
    assert len(session._state.log[0].token_ids) == 4 + 128


def test_turn_without_memory_update_leaves_no_trace(session):
    memory = session.stm_cache
    answer = session.send("What is my dog called?", update_memory=False)
    assert answer == session.send("What is my dog called?", update_memory=False)
    assert unchanged(session, memory)


def test_more_answers_than_one_are_refused(session):
    memory = session.stm_cache
    with pytest.raises(ValueError, match="num_return_sequences=2"):
        session.send("hello", do_sample=True, num_return_sequences=2)
    assert unchanged(session, memory)


def test_failed_memory_write_raises_and_keeps_the_turn_out(session, model, monkeypatch):
    def fail(*args, **kwargs):
        raise StateError("not finite")

    memory = session.stm_cache
    monkeypatch.setattr(model, "update_memory", fail)
    with pytest.raises(StateError, match="not finite"):
        session.send("hello")
    with pytest.raises(StateError, match="not finite"):
        list(session.stream("hello"))
    assert unchanged(session, memory)


@pytest.mark.parametrize("query", ["hello", "日本 é 😀", "tell me a long story"])
def test_streamed_pieces_join_to_the_answer_of_send(session, query):
    other = session.fork()
    answer = other.send(query, max_new_tokens=40)
    assert "".join(session.stream(query, max_new_tokens=40)) == answer
    assert same(session.stm_cache, other.stm_cache)
    assert session.history == other.history


def test_stream_gives_text_before_the_turn_is_written_and_counts_at_its_end(session, model, monkeypatch):
    asked = threading.Event()
    write = model.update_memory
    monkeypatch.setattr(model, "update_memory", lambda *args, **kwargs: asked.wait(10) and write(*args, **kwargs))
    pieces = session.stream("hello")
    assert next(pieces)
    assert session.turns == 0
    asked.set()
    list(pieces)
    assert session.turns == 1


def test_closed_stream_cancels_the_turn_and_its_thread(session, model, monkeypatch):
    memory, threads = session.stm_cache, threading.active_count()
    writes = []
    write = model.update_memory
    monkeypatch.setattr(model, "update_memory", lambda *args, **kwargs: writes.append(args) or write(*args, **kwargs))
    pieces = session.stream("hello", max_new_tokens=80, eos_token_id=None)
    next(pieces)
    pieces.close()
    assert unchanged(session, memory)
    assert not writes
    assert threading.active_count() == threads
    session.send("hello")
    assert session.turns == 1


def test_stream_that_is_never_read_does_nothing(session):
    memory = session.stm_cache
    session.stream("hello")
    session.send("hello")
    assert session.turns == 1
    assert memory.turns == 0


def test_stream_raises_the_error_of_generate_at_the_consumer(session):
    memory = session.stm_cache
    with pytest.raises(ValueError, match="eam"):
        list(session.stream("hello", num_beams=2))
    assert unchanged(session, memory)
    assert session.send("hello") == session.history[0]["answer"]


def test_calls_in_the_middle_of_a_stream_by_its_own_thread_are_refused(session):
    pieces = session.stream("hello")
    next(pieces)
    for call in (lambda: session.send("hi"), session.undo, lambda: session.forget(0)):
        with pytest.raises(RuntimeError, match="being streamed"):
            call()
    assert session.fork().turns == session.turns == 0
    list(pieces)
    assert session.turns == 1


def test_threads_take_turns_on_one_session(session):
    def talk(name):
        for _ in range(4):
            session.send(name) if name < "c" else list(session.stream(name))

    with ThreadPoolExecutor(max_workers=4) as executor:
        done = [executor.submit(talk, name) for name in "abcd"]
    assert [future.exception() for future in done] == [None] * 4
    assert session.turns == len(session.history) == 16
    log = session._state.log
    assert same(session._replayed(log).memory, session.stm_cache)


def test_sessions_in_threads_on_one_model_equal_their_solo_runs(session):
    def talk(session, name):
        for turn in range(5):
            session.send(f"{name} {turn}")

    solo = {name: session.fork() for name in "ab"}
    for name, alone in solo.items():
        talk(alone, name)
    together = {name: session.fork() for name in "ab"}
    threads = [threading.Thread(target=talk, args=(fork, name)) for name, fork in together.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        assert same(solo[name].stm_cache, together[name].stm_cache)
        assert solo[name].history == together[name].history


def test_fork_is_independent_in_both_directions(session):
    session.send("one")
    fork = session.fork()
    memory = session.stm_cache
    fork.send("two")
    assert unchanged(session, memory, turns=1)
    session.send("three")
    assert [turn["query"] for turn in fork.history] == ["one", "two"]
    fork.generate_defaults["max_new_tokens"] = 1
    assert session.generate_defaults == {"max_new_tokens": 6}


def test_undo_gives_back_each_earlier_memory(session):
    memories = [session.stm_cache]
    for query in ("one", "two", "three"):
        session.send(query)
        memories.append(session.stm_cache)
    for turns in (2, 1, 0):
        session.undo()
        assert same(session.stm_cache, memories[turns])
        assert len(session.history) == turns
    with pytest.raises(ValueError, match="no turn to undo"):
        session.undo()


def test_undo_of_the_last_turn_computes_nothing(session, model, monkeypatch):
    session.send("one")
    memory = session.stm_cache
    session.send("two")
    monkeypatch.delattr(type(model), "update_memory")
    session.undo()
    assert unchanged(session, memory, turns=1)


def only_padding(input_ids, scores):
    return torch.full_like(scores, -float("inf")).index_fill(1, torch.tensor([0]), 0.0)


def test_padding_that_the_model_says_is_written_and_logged_like_any_token(session):
    assert session.send("one", eos_token_id=None, logits_processor=[only_padding]) == ""
    assert session._state.log[0].token_ids[-6:].tolist() == [0] * 6
    assert same(session._replayed(session._state.log).memory, session.stm_cache)


@pytest.mark.parametrize("turn, kept", [(0, [1, 2]), (1, [0, 2]), (-1, [0, 1])])
def test_forget_equals_a_memory_that_never_saw_the_turn(session, model, turn, kept):
    start = session.stm_cache
    for query in ("My password is lantern.", "hello", "bye"):
        session.send(query)
    log, with_it = session._state.log, session.stm_cache
    session.forget(turn)
    expected = start
    with torch.no_grad():
        for index in kept:
            expected = model.update_memory(expected, torch.tensor([list(log[index].token_ids)]))
    assert same(session.stm_cache, expected)
    assert not torch.equal(session.stm_cache.states, with_it.states)
    assert session.turns == len(session.history) == 2
    session.undo()
    assert session.turns == 1


@pytest.mark.parametrize("turn", [2, -3, 100])
def test_forget_of_a_turn_that_is_not_there_is_refused(session, turn):
    session.send("one")
    session.send("two")
    memory = session.stm_cache
    with pytest.raises(ValueError, match=f"no turn {turn} to forget.* 2 turns"):
        session.forget(turn)
    assert unchanged(session, memory, turns=2)


def test_system_prompt_is_one_write_before_the_first_turn(model, tokenizer, session):
    system = RxTSession(model, tokenizer, system="Be brief.", max_new_tokens=6)
    ids = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert same(system.stm_cache, model.update_memory(session.stm_cache, ids))
    assert (system.turns, system.history) == (1, [])
    start = system.stm_cache
    system.send("one")
    system.send("two")
    system.forget(0)
    system.undo()
    assert same(system.stm_cache, start)
    with pytest.raises(ValueError, match="empty"):
        RxTSession(model, tokenizer, system=" ")
    with pytest.raises(ValueError, match="1003 tokens"):
        RxTSession(model, tokenizer, system="7" * 1000)


def test_session_goes_on_from_a_given_memory_and_copies_it(model, tokenizer, session):
    session.send("one")
    for given in (session.stm_cache, session.stm_cache.states):
        other = RxTSession(model, tokenizer, stm_cache=given, max_new_tokens=6)
        assert torch.equal(other.stm_cache.states, session.stm_cache.states)
        assert other.stm_cache.states.data_ptr() != session.stm_cache.states.data_ptr()
        assert other.send("two") == session.fork().send("two")
    with pytest.raises(ValueError, match="shape"):
        RxTSession(model, tokenizer, stm_cache=session.stm_cache.repeat(2))
    with pytest.raises(StateError, match="fingerprint"):
        RxTSession(random_model(tokenizer, seed=1), tokenizer, stm_cache=session.stm_cache)


def test_training_the_model_does_not_change_a_memory(tokenizer):
    model = random_model(tokenizer)
    session = RxTSession(model, tokenizer)
    before = session.stm_cache.states.clone()
    with torch.no_grad():
        model.model.initial_memory.add_(1.0)
    assert torch.equal(session.stm_cache.states, before)
    assert not session.stm_cache.states.requires_grad


@pytest.mark.parametrize("config", [{}, {"memory_init": "random"}, {"dtype": torch.bfloat16}])
def test_saved_session_goes_on_as_if_it_had_never_stopped(tmp_path, tokenizer, config):
    dtype = config.pop("dtype", torch.float32)
    model = random_model(tokenizer, **config).to(dtype)
    session = RxTSession(model, tokenizer, system="Be brief.", max_new_tokens=6)
    for query in ("one [A] \ufdd0", "two", "three"):
        session.send(query)
    session.save(tmp_path / "memory")
    loaded = RxTSession.load(tmp_path / "memory", model, tokenizer, max_new_tokens=6)
    assert same(loaded.stm_cache, session.stm_cache)
    assert loaded.stm_cache.dtype == dtype
    assert loaded.history == session.history
    for each in (loaded, session):
        each.send("four")
        each.undo()
        each.undo()
        each.forget(0)
        each.send("five")
    assert same(loaded.stm_cache, session.stm_cache)
    assert loaded.history == session.history
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "memory.json"]


def test_memory_file_alone_is_a_complete_memory(tmp_path, model, tokenizer, session):
    session.send("one")
    session.save(tmp_path / "memory")
    (tmp_path / "memory.json").unlink()
    assert same(STMCache.load(tmp_path / "memory", model=model), session.stm_cache)
    loaded = RxTSession.load(tmp_path / "memory", model, tokenizer)
    assert (loaded.turns, loaded.history) == (1, [])
    with pytest.raises(ValueError, match="no turn to undo"):
        loaded.undo()


def corrupted(log):
    yield b""
    yield b"\xff\xfe"
    yield b"[" * 100_000
    yield b"[]"
    yield b"{}"
    yield b'{"checksum": 1}'
    content = json.loads(log)
    for name in content:
        yield json.dumps({**content, name: None}).encode()
    changed = json.loads(log)
    changed["turns"][0][2][3] += 1
    yield json.dumps(changed).encode()
    yield log[:-2]


def test_log_that_does_not_belong_to_the_memory_is_never_used(tmp_path, model, tokenizer, session):
    path, log = tmp_path / "memory", tmp_path / "memory.json"
    session.send("one")
    session.save(path)
    good = log.read_bytes()
    for bad in corrupted(good):
        log.write_bytes(bad)
        loaded = RxTSession.load(path, model, tokenizer)
        assert same(loaded.stm_cache, session.stm_cache)
        assert loaded.history == []
    session.send("two")
    session.save(path)
    log.write_bytes(good)
    assert RxTSession.load(path, model, tokenizer).history == []


def test_memory_of_another_model_or_tokenizer_is_refused(tmp_path, model, tokenizer, session):
    path = tmp_path / "memory"
    session.send("one")
    session.save(path)
    with pytest.raises(StateError, match="fingerprint"):
        RxTSession.load(path, random_model(tokenizer, seed=1), tokenizer)
    other = train_tokenizer(["abc abc abc abd"] * 8, vocab_size=300)
    with pytest.raises(StateError, match="fingerprint of the tokenizer"):
        RxTSession.load(path, model, other)
    with pytest.raises(FileNotFoundError):
        RxTSession.load(tmp_path / "none", model, tokenizer)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match="safetensors cannot read it"):
        RxTSession.load(path, model, tokenizer)


def test_load_takes_the_memory_of_other_weights_on_demand(session, tokenizer, tmp_path):
    session.send("hello")
    session.save(tmp_path / "memory")
    other = random_model(tokenizer, seed=1)
    loaded = RxTSession.load(tmp_path / "memory", other, tokenizer, allow_other_weights=True, max_new_tokens=6)
    assert torch.equal(loaded.stm_cache.states, session.stm_cache.states)
    assert loaded.history == session.history
    assert loaded.stm_cache.fingerprint == other.memory_fingerprint()
    loaded.send("hi")
    loaded.undo()
    assert loaded.turns == 1


@pytest.mark.parametrize("name", ["memory", "stm", "state", "write_memory"])
def test_misspelt_memory_is_refused_before_the_first_turn(model, tokenizer, name):
    with pytest.raises(TypeError, match=f"RxTSession got an unexpected keyword argument '{name}'"):
        RxTSession(model, tokenizer, **{name: model.init_stm(1)})
    RxTSession(model, tokenizer, update_memory=False, low_memory=True)


def test_tokenizer_fingerprint_survives_a_save_and_padded_calls(tmp_path, tokenizer):
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    loaded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(loaded) == expected
    loaded.add_tokens(["new"])
    assert tokenizer_fingerprint(loaded) != expected


def test_state_keeps_its_size_over_many_turns(session):
    size = session.stm_cache.nbytes
    for turn in range(30):
        session.send(f"turn {turn}", max_new_tokens=1)
    assert session.stm_cache.nbytes == size
    assert session.turns == 30


class Held:
    """A logits processor that lets the test decide when the next token comes."""

    def __init__(self, tokens_before=2):
        self.asked, self.gate, self.left = threading.Event(), threading.Event(), tokens_before

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            self.asked.set()
            self.was_released = self.gate.wait(20)
        return scores


def in_thread(call):
    return asyncio.get_running_loop().run_in_executor(None, call)


async def joined(pieces):
    return "".join([piece async for piece in pieces])


def test_stream_is_an_asynchronous_iterator_too(session):
    other = session.fork()
    answer = other.send("hello", max_new_tokens=40)
    pieces = session.stream("hello", max_new_tokens=40)
    assert asyncio.run(joined(pieces)) == answer
    assert same(session.stm_cache, other.stm_cache)
    assert session.history == other.history
    assert asyncio.run(joined(pieces)) == ""


@pytest.mark.parametrize("held", ["token", "write"])
def test_event_loop_runs_while_a_stream_waits_for_a_token_or_for_the_write(session, model, monkeypatch, held):
    token, write, written = Held(), model.update_memory, threading.Event()
    monkeypatch.setattr(model, "update_memory", lambda *args, **kwargs: written.wait(20) and write(*args, **kwargs))
    (token.gate if held == "write" else written).set()

    async def talk():
        answer = asyncio.create_task(joined(session.stream("hello", logits_processor=[token])))
        # a loop that waits for the answer itself never gets here
        await asyncio.sleep(0.1)
        assert session.turns == 0
        token.gate.set()
        written.set()
        return await answer

    assert asyncio.run(talk()) == session.history[0]["answer"]
    assert token.was_released
    assert session.turns == 1


def test_event_loop_runs_while_a_stream_waits_for_another_threads_turn(session):
    held = Held()

    async def talk():
        first = in_thread(lambda: session.send("one", logits_processor=[held]))
        await in_thread(held.asked.wait)
        second = asyncio.create_task(joined(session.stream("two")))
        await asyncio.sleep(0.1)
        held.gate.set()
        return [await first, await second]

    assert asyncio.run(talk()) == [turn["answer"] for turn in session.history]
    assert held.was_released


def test_stream_that_waits_for_another_threads_turn_can_be_cancelled(session):
    held = Held()

    async def talk():
        first = in_thread(lambda: session.send("one", logits_processor=[held]))
        await in_thread(held.asked.wait)
        second = asyncio.create_task(joined(session.stream("two")))
        await asyncio.sleep(0.1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(second), 10)
        assert not first.done()
        held.gate.set()
        await first

    asyncio.run(talk())
    assert [turn["query"] for turn in session.history] == ["one"]
    session.send("three")


def test_sessions_streamed_together_in_one_loop_equal_their_solo_runs(session):
    solo = {name: session.fork() for name in "abcde"}
    expected = {name: [fork.send(f"{name} {turn}") for turn in range(3)] for name, fork in solo.items()}
    together = {name: session.fork() for name in solo}

    async def talk(name):
        return [await joined(together[name].stream(f"{name} {turn}")) for turn in range(3)]

    async def all_talk():
        return dict(zip(together, await asyncio.gather(*map(talk, together)), strict=True))

    assert asyncio.run(all_talk()) == expected
    for name in solo:
        assert same(solo[name].stm_cache, together[name].stm_cache)


def test_cancelled_task_cancels_its_turn_and_its_thread(session, caplog):
    memory, held, before = session.stm_cache, Held(), set(threading.enumerate())

    async def talk():
        task = asyncio.create_task(joined(session.stream("hello", eos_token_id=None, logits_processor=[held])))
        await in_thread(held.asked.wait)
        task.cancel()
        # a loop that waits for the thread itself never gets here
        await asyncio.sleep(0.1)
        held.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await joined(session.stream("two"))

    asyncio.run(talk())
    assert [turn["query"] for turn in session.history] == ["two"]
    assert memory.turns == 0
    assert held.was_released
    assert "exception" not in caplog.text
    assert set(threading.enumerate()) == before


def test_task_cancelled_twice_leaves_no_turn_behind(session):
    held = Held()

    async def talk():
        task = asyncio.create_task(joined(session.stream("hello", logits_processor=[held])))
        await in_thread(held.asked.wait)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.05)
        assert task.cancelled()
        held.gate.set()
        return await in_thread(lambda: session.send("two"))

    asyncio.run(talk())
    assert held.was_released
    assert [turn["query"] for turn in session.history] == ["two"]
    session.send("three")


def test_asynchronous_stream_that_is_left_early_is_cancelled_by_aclose(session):
    memory = session.stm_cache

    async def talk():
        async with contextlib.aclosing(session.stream("hello", max_new_tokens=80, eos_token_id=None)) as pieces:
            async for _ in pieces:
                break
        return [piece async for piece in pieces]

    assert asyncio.run(talk()) == []
    assert unchanged(session, memory)
    session.send("hello")


def test_stream_that_is_dropped_in_the_middle_is_cancelled(session):
    memory = session.stm_cache
    for _ in session.stream("hello", max_new_tokens=80, eos_token_id=None):
        break
    gc.collect()
    session.send("hello", update_memory=False)
    assert unchanged(session, memory)


def test_asynchronous_stream_raises_the_error_of_generate(session):
    memory = session.stm_cache
    with pytest.raises(ValueError, match="eam"):
        asyncio.run(joined(session.stream("hello", num_beams=2)))
    assert unchanged(session, memory)


def test_second_turn_from_the_loop_of_a_stream_is_refused(session):
    async def talk():
        pieces = session.stream("hello")
        await anext(pieces)
        with pytest.raises(RuntimeError, match="being streamed"):
            session.send("hi")
        with pytest.raises(RuntimeError, match="being streamed"):
            await joined(session.stream("hi"))
        await joined(pieces)

    asyncio.run(talk())
    assert [turn["query"] for turn in session.history] == ["hello"]


@pytest.mark.skipif(sys.platform == "win32", reason="pthread_kill")
def test_interrupt_while_a_piece_is_awaited_cancels_the_turn(session):
    memory, held = session.stm_cache, Held()

    def interrupt():
        held.asked.wait(20)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        held.gate.set()

    # a shell that starts the tests in the background has them ignore interrupts
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    pieces = session.stream("hello", logits_processor=[held])
    try:
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
    finally:
        signal.signal(signal.SIGINT, former)
    assert list(pieces) == []
    assert unchanged(session, memory)
    session.send("hello")


QUERIES = ["hello", "What is my dog called? You live in Oslo. My dog is called Rex.", "日本 é 😀"]


def aged(session):
    """Sessions with memories of zero, one and two turns."""
    sessions = [session.fork() for _ in QUERIES]
    for age, each in enumerate(sessions):
        for turn in range(age):
            each.send(f"{age} {turn}")
    return sessions


def close_to(session, other, tolerance=1e-5):
    assert session.history == other.history
    assert [turn.token_ids for turn in session._state.log] == [turn.token_ids for turn in other._state.log]
    assert session.turns == other.turns
    torch.testing.assert_close(session.stm_cache.states, other.stm_cache.states, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("update_memory", [True, "async"])
def test_batch_equals_separate_sends_of_sessions_of_different_ages(session, update_memory):
    batch, alone = aged(session), aged(session)
    expected = [each.send(query, max_new_tokens=20) for each, query in zip(alone, QUERIES, strict=True)]
    assert send_batch(batch, QUERIES, max_new_tokens=20, update_memory=update_memory) == expected
    for one, other in zip(batch, alone, strict=True):
        close_to(one, other)


def test_many_batches_with_undo_and_forget_differ_from_separate_sends_by_rounding_alone(tokenizer):
    # in float32 this random model doubles a difference with every turn
    batch = aged(RxTSession(random_model(tokenizer).double(), tokenizer, max_new_tokens=20))
    alone = [each.fork() for each in batch]
    for turn in range(3):
        texts = [f"{query} {turn}" for query in QUERIES]
        expected = [each.send(text) for each, text in zip(alone, texts, strict=True)]
        assert send_batch(batch, texts) == expected
    for undo in (True, False):
        for one, other in zip(batch, alone, strict=True):
            for each in (one, other):
                each.undo() if undo else each.forget(0)
            close_to(one, other, 1e-10)


def test_batch_is_one_generate(session, model, monkeypatch):
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: calls.append(kwargs) or generate(**kwargs))
    send_batch(aged(session), QUERIES)
    assert len(calls) == 3 + 1
    assert len(calls[-1]["input_ids"]) == len(QUERIES)


def test_answers_of_a_batch_end_at_their_own_end_token_and_the_log_has_no_padding(session):
    batch, alone = aged(session), aged(session)
    # tokens that the answers hold at different places, and not all of them
    ends = [245, 94]
    expected = [
        each.send(query, max_new_tokens=20, eos_token_id=ends) for each, query in zip(alone, QUERIES, strict=True)
    ]
    assert send_batch(batch, QUERIES, max_new_tokens=20, eos_token_id=ends) == expected
    lengths = set()
    for one, other in zip(batch, alone, strict=True):
        close_to(one, other)
        token_ids = one._state.log[-1].token_ids
        lengths.add(len(token_ids))
        assert token_ids[-1] in ends
        assert 0 not in token_ids
        assert one._replayed(one._state.log).memory.states.allclose(one.stm_cache.states, rtol=1e-4, atol=1e-4)
    assert len(lengths) == len(QUERIES)


def test_padding_that_the_model_says_in_a_batch_is_written_and_logged_like_any_token(session):
    batch, alone, kwargs = aged(session), aged(session), {"eos_token_id": None, "logits_processor": [only_padding]}
    send_batch(batch, QUERIES, **kwargs)
    for one, other, query in zip(batch, alone, QUERIES, strict=True):
        other.send(query, **kwargs)
        close_to(one, other)


class StopsRowOne(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.steps = getattr(self, "steps", 0) + 1
        return torch.tensor([row == 1 and self.steps == 3 for row in range(len(input_ids))])


def test_row_that_another_criterion_ended_is_logged_without_its_filling(session):
    batch = aged(session)
    send_batch(batch, QUERIES, max_new_tokens=9, stopping_criteria=[StopsRowOne()])
    for row, (one, query) in enumerate(zip(batch, QUERIES, strict=True)):
        token_ids = one._state.log[-1].token_ids
        assert len(token_ids) == one._encode("user", query).shape[1] + (3 if row == 1 else 9)
        assert one._replayed(one._state.log).memory.states.allclose(one.stm_cache.states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("update_memory", [True, "async", False])
def test_long_query_of_a_batch_cuts_its_own_answer_and_no_other(session, update_memory):
    batch, texts = aged(session), ["hello", "7" * (CONTEXT - 16 - 3), "hi"]
    alone = [each.fork() for each in batch]
    kwargs = {"max_new_tokens": 40, "eos_token_id": None, "update_memory": update_memory}
    expected = [each.send(text, **kwargs) for each, text in zip(alone, texts, strict=True)]
    assert send_batch(batch, texts, **kwargs) == expected
    for one, other in zip(batch, alone, strict=True):
        close_to(one, other)
    if update_memory:
        assert [len(each._state.log[-1].token_ids) for each in batch] == [7 + 40, CONTEXT, 5 + 40]


def test_each_session_of_a_batch_keeps_its_own_default_of_max_new_tokens(session):
    batch = aged(session)
    for new_tokens, each in enumerate(batch, start=2):
        each.generate_defaults["max_new_tokens"] = new_tokens
    alone = [each.fork() for each in batch]
    expected = [each.send(q, eos_token_id=None) for each, q in zip(alone, QUERIES, strict=True)]
    assert send_batch(batch, QUERIES, eos_token_id=None) == expected
    for one, other in zip(batch, alone, strict=True):
        close_to(one, other)


def test_batch_without_memory_update_leaves_no_trace(session):
    batch = aged(session)
    before = [each._state for each in batch]
    expected = [each.send(q, update_memory=False) for each, q in zip(batch, QUERIES, strict=True)]
    assert send_batch(batch, QUERIES, update_memory=False) == expected
    assert all(each._state is state for each, state in zip(batch, before, strict=True))


def test_asynchronous_batch_returns_before_its_write_and_each_row_waits(session, model, monkeypatch):
    batch, alone, gate, write = aged(session), aged(session), threading.Event(), model.update_memory
    expected = [each.send(q) for each, q in zip(alone, QUERIES, strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr(model, "update_memory", lambda *args, **kwargs: gate.wait(20) and write(*args, **kwargs))
        assert send_batch(batch, QUERIES, update_memory="async") == expected
        for each in batch:
            assert isinstance(each.stm_cache, PendingSTMCache)
            assert each.stm_cache.is_pending
        gate.set()
        for one, other in zip(batch, alone, strict=True):
            close_to(one, other)
            assert not one.stm_cache.is_pending
            assert len(one.stm_cache) == 1
    # a row that somebody has used holds no other
    assert [each.stm_cache._batch for each in batch] == [None] * 3
    send_batch(batch, QUERIES, update_memory="async")
    assert [each.turns for each in batch] == [2, 3, 4]


def test_failed_asynchronous_write_of_a_batch_takes_every_turn_back(session, model, monkeypatch):
    batch = aged(session)
    before = [each.stm_cache for each in batch]
    with monkeypatch.context() as patch:
        patch.setattr(model, "update_memory", lambda *args, **kwargs: 1 / 0)
        send_batch(batch, QUERIES, update_memory="async")
        for each in batch:
            with pytest.raises(ZeroDivisionError):
                each.send("next")
    for age, (each, memory) in enumerate(zip(batch, before, strict=True)):
        assert unchanged(each, memory, turns=age)


def not_finite(*args, **kwargs):
    raise StateError("not finite")


def other_tokenizer(session):
    session = session.fork()
    session.tokenizer = copy.deepcopy(session.tokenizer)
    session.tokenizer.add_tokens(["new"])
    return session


def other_defaults(session):
    session = session.fork()
    session.generate_defaults["do_sample"] = True
    return session


def other_model(session):
    return RxTSession(random_model(session.tokenizer, seed=1), session.tokenizer)


@contextlib.contextmanager
def raises_and_changes_nothing(sessions, error, match):
    before = [each._state for each in sessions]
    with pytest.raises(error, match=match):
        yield
    assert all(each._state is state for each, state in zip(sessions, before, strict=True))


@pytest.mark.parametrize(
    "choose, texts, match",
    [
        (lambda a, b, c: [], [], "0 sessions"),
        (lambda a, b, c: [a, b, c], QUERIES[:2], "3 sessions, 2 texts"),
        (lambda a, b, c: [a, b, a], QUERIES, "twice"),
        (lambda a, b, c: [a, b, other_model(c)], QUERIES, "one model object"),
        (lambda a, b, c: [a, b, other_tokenizer(c)], QUERIES, "equal tokenizers"),
        (lambda a, b, c: [a, b, other_defaults(c)], QUERIES, "equal defaults.*do_sample"),
        (lambda a, b, c: [a, b, c], ["a", "b", " "], "empty"),
        (lambda a, b, c: [a, b, c], ["a", "b", "7" * 1000], "1003 tokens"),
    ],
)
def test_sessions_or_texts_that_are_no_batch_are_refused_and_unchanged(session, choose, texts, match):
    everyone = aged(session)
    with raises_and_changes_nothing(everyone, ValueError, match):
        send_batch(choose(*everyone), texts)
    for each in everyone:
        each.send("hello")


def test_batch_with_a_session_that_is_being_streamed_is_refused_and_changes_none(session):
    batch = aged(session)
    with contextlib.closing(batch[1].stream("hello")) as pieces:
        next(pieces)
        with raises_and_changes_nothing(batch, RuntimeError, "being streamed"):
            send_batch(batch, QUERIES)
    send_batch(batch, QUERIES)


@pytest.mark.parametrize(
    "kwargs, match",
    [({"do_sample": True, "num_return_sequences": 2}, "6 sequences"), ({"streamer": "text"}, "batch size 1")],
)
def test_batch_whose_generate_fails_changes_no_session(session, tokenizer, kwargs, match):
    batch = aged(session)
    kwargs = {name: TextStreamer(tokenizer) if value == "text" else value for name, value in kwargs.items()}
    with raises_and_changes_nothing(batch, ValueError, match):
        send_batch(batch, QUERIES, **kwargs)


@pytest.mark.parametrize("rows", [3, 1])
def test_batch_whose_memory_write_fails_changes_no_session(session, model, monkeypatch, rows):
    batch, write = aged(session), model.update_memory
    monkeypatch.setattr(model, "update_memory", lambda *a, **k: not_finite() if len(a[1]) == rows else write(*a, **k))
    # the last row runs beyond its room, and so is written again, alone
    texts = ["hello", "hi", "7" * (CONTEXT - 16 - 3)]
    with raises_and_changes_nothing(batch, StateError, "not finite"):
        send_batch(batch, texts, max_new_tokens=40, eos_token_id=None)


def test_sessions_with_equal_tokenizers_are_a_batch(session, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    batch = aged(session)
    batch[1].tokenizer = type(tokenizer).from_pretrained(tmp_path)
    assert len(send_batch(batch, QUERIES)) == 3


def test_batches_of_one_session_equal_send_bit_for_bit(session):
    other = session.fork()
    for query in QUERIES:
        assert send_batch([session], [query]) == [other.send(query)]
    assert same(session.stm_cache, other.stm_cache)


class SlowLock:
    """Gives the other thread time to take the lock that this one wants next."""

    def __init__(self):
        self.lock = threading.Lock()

    def __enter__(self):
        self.lock.acquire()
        time.sleep(0.1)

    def __exit__(self, *_):
        self.lock.release()


def test_batches_of_the_same_sessions_in_two_threads_never_wait_for_each_other(session):
    batch = aged(session)
    for each in batch:
        each._lock = SlowLock()
    orders = [(batch, QUERIES), (batch[::-1], QUERIES)]
    threads = [threading.Thread(target=send_batch, args=order, daemon=True) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [each.turns for each in batch] == [2, 3, 4]


# ---- copies


def test_deepcopy_of_a_session_is_a_fork(model, tokenizer):
    session = RxTSession(model, tokenizer, max_new_tokens=4)
    session.send("one")
    copied = copy.deepcopy({"state": session})["state"]
    assert copied.model is model
    assert copied.history == session.history
    expected = session.fork().send("two")
    assert copied.send("two") == expected
    assert (session.turns, copied.turns) == (1, 2)
    copied.undo()
    assert torch.equal(copied.stm_cache.states, session.stm_cache.states)


def test_pickled_session_goes_on_elsewhere(model, tokenizer):
    session = RxTSession(model, tokenizer, max_new_tokens=4, update_memory="async")
    session.send("one")
    loaded = pickle.loads(pickle.dumps(session))
    assert loaded.model is not model
    assert loaded.send("two") == session.send("two")
    assert torch.equal(loaded.stm_cache.states, session.stm_cache.states)
    loaded.forget(0)
    assert loaded.turns == 1
