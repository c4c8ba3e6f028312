# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import threading

import pytest
import torch

from rxt_hf import RxTConfig, RxTForCausalLM, StateError, STMCache
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.session import RxTSession, tokenizer_fingerprint

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
    monkeypatch.setattr(model, "update_memory", lambda *args: asked.wait(10) and write(*args))
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
    monkeypatch.setattr(model, "update_memory", lambda *args: writes.append(args) or write(*args))
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
    errors = []

    def talk(name):
        try:
            for _ in range(4):
                session.send(name) if name < "c" else list(session.stream(name))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
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


def test_padding_that_the_model_says_is_written_and_logged_like_any_token(session):
    def only_padding(input_ids, scores):
        return torch.full_like(scores, -float("inf")).index_fill(1, torch.tensor([0]), 0.0)

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
    with pytest.raises(StateError, match="size"):
        RxTSession.load(path, model, tokenizer)


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
