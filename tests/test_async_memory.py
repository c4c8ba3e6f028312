# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""`update_memory="async"`: the write goes on while the user reads the answer."""

import copy
import pickle
import threading
import time

import pytest
import torch

from rxt_hf import RxTSession, StateError, STMCache
from rxt_hf.cache_rxt import PendingSTMCache

from . import test_session
from .models import random_ids, random_memory, tiny_model
from .test_session import tokenizer  # noqa: F401  (a fixture)


@pytest.fixture
def model():
    return tiny_model(0)


@pytest.fixture
def held_write(model, monkeypatch):
    """Lets the test decide when the write may go on."""
    gate, write = threading.Event(), model.update_memory

    def held(*args, **kwargs):
        assert gate.wait(20)
        return write(*args, **kwargs)

    monkeypatch.setattr(model, "update_memory", held)
    yield gate
    gate.set()


def turn(model, memory, ids, update_memory):
    return model.generate(ids, stm_cache=memory, max_new_tokens=4, do_sample=False, update_memory=update_memory)


def conversation(model, seed, update_memory, turns=3):
    memory = model.init_stm(2)
    for index in range(turns):
        out = turn(model, memory, random_ids(2, 6, seed=seed + index), update_memory)
        memory = out.stm_cache
    return out.sequences, memory


def test_asynchronous_conversation_is_bit_identical_to_the_synchronous_one_twenty_times_in_two_threads(model):
    expected = {seed: conversation(model, seed, True) for seed in (0, 100)}
    failures = []

    def run(seed):
        for _ in range(20):
            sequences, memory = conversation(model, seed, "async")
            equal = torch.equal(memory.states, expected[seed][1].states)
            if not (equal and torch.equal(sequences, expected[seed][0]) and memory.turns.tolist() == [3, 3]):
                failures.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_generate_returns_before_the_write_and_the_first_use_waits(model, held_write):
    out = turn(model, model.init_stm(2), random_ids(2, 6), "async")
    assert isinstance(out.stm_cache, PendingSTMCache)
    assert out.stm_cache.is_pending
    assert "being written" in repr(out.stm_cache)
    with pytest.raises(TimeoutError):
        out.stm_cache.wait(timeout_s=0.01)
    threading.Timer(0.05, held_write.set).start()
    assert out.stm_cache.states.shape == model.init_stm(2).states.shape
    assert not out.stm_cache.is_pending


def test_error_of_the_write_surfaces_at_every_use_and_the_old_memory_is_unchanged(model, monkeypatch):
    memory = model.init_stm(2)
    before = memory.states.clone()

    def broken(*args, **kwargs):
        raise StateError("not finite")

    monkeypatch.setattr(model, "update_memory", broken)
    out = turn(model, memory, random_ids(2, 6), "async")
    for use in (lambda m: m.states, lambda m: m.turns, lambda m: m.wait(), lambda m: m.fork(), copy.deepcopy):
        with pytest.raises(StateError, match="not finite"):
            use(out.stm_cache)
    with pytest.raises(StateError, match="not finite"):
        turn(model, out.stm_cache, random_ids(2, 6), True)
    assert torch.equal(memory.states, before)


def test_pending_memory_is_used_like_any_other(model, tmp_path):
    ids = random_ids(2, 6)
    written = turn(model, model.init_stm(2), ids, True).stm_cache
    uses = {
        "select": lambda m: m.select([1]).states,
        "cat": lambda m: STMCache.cat([m, m]).states,
        "repeat": lambda m: m.repeat(2).states,
        "deepcopy": lambda m: copy.deepcopy(m).states,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)).states,
        "update": lambda m: model.update_memory(m, ids).states,
        "forward": lambda m: model(ids, stm_cache=m).logits,
    }
    for name, use in uses.items():
        pending = turn(model, model.init_stm(2), ids, "async").stm_cache
        assert torch.equal(use(pending), use(written)), name
    turn(model, model.init_stm(2), ids, "async").stm_cache.save(tmp_path / "m.stm")
    assert torch.equal(STMCache.load(tmp_path / "m.stm", model=model).states, written.states)


def test_asynchronous_write_runs_under_the_callers_autocast(model):
    ids = random_ids(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = turn(model, model.init_stm(2), ids, True).stm_cache.states
        found = turn(model, model.init_stm(2), ids, "async").stm_cache.states
    assert torch.equal(found, expected)
    assert not torch.equal(found, turn(model, model.init_stm(2), ids, True).stm_cache.states)


def test_asynchronous_write_keeps_no_gradient(model):
    assert not turn(model, model.init_stm(2), random_ids(2, 6), "async").stm_cache.states.requires_grad


def test_unknown_way_of_writing_is_refused(model):
    with pytest.raises(ValueError, match="'later'"):
        turn(model, model.init_stm(2), random_ids(2, 6), "later")


def test_session_whose_write_failed_takes_the_turn_back_and_goes_on(tokenizer, monkeypatch):  # noqa: F811
    model = test_session.random_model(tokenizer)
    session = RxTSession(model, tokenizer, update_memory="async", max_new_tokens=4)
    session.send("one")
    before, write = session.stm_cache.states.clone(), model.update_memory
    with monkeypatch.context() as patch:
        patch.setattr(model, "update_memory", lambda *args, **kwargs: write(*args, **kwargs).no_such_method())
        session.send("two")
        with pytest.raises(AttributeError):
            session.send("three")
    assert [entry["query"] for entry in session.history] == ["one"]
    assert torch.equal(session.stm_cache.states, before)
    session.send("four")
    assert session.turns == 2


# ---- what changes before the write has ended


def trained_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(0), peft.LoraConfig(r=4), adapter_name="first").eval()
    model.add_adapter("second", peft.LoraConfig(r=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def slow_down(model, monkeypatch):
    """Gives the caller time to change something before a write begins; returns what says that one was asked for."""
    started, write = threading.Event(), model.update_memory

    def slow(*args, **kwargs):
        started.set()
        time.sleep(0.2)
        return write(*args, **kwargs)

    monkeypatch.setattr(model, "update_memory", slow)
    return started


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_asynchronous_write_keeps_the_adapter_of_its_turn(monkeypatch):
    model, ids = trained_adapters(), random_ids(2, 6)
    memory, expected = random_memory(model), {}
    for name in ("first", "second"):
        model.set_adapter(name)
        expected[name] = turn(model, memory, ids, True).stm_cache.states
    with model.disable_adapter():
        expected["none"] = turn(model, memory, ids, True).stm_cache.states
    slow_down(model.get_base_model(), monkeypatch)
    for name, other in (("first", "second"), ("second", "first")):
        model.set_adapter(name)
        out = turn(model, memory, ids, "async")
        model.set_adapter(other)
        assert torch.equal(out.stm_cache.states, expected[name])
    with model.disable_adapter():
        out = turn(model, memory, ids, "async")
    assert torch.equal(out.stm_cache.states, expected["none"])


CHANGES = {
    "train": lambda model: model.train(),
    "dtype": lambda model: model.to(torch.bfloat16),
    "part": lambda model: model.model.half(),
    "attention": lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_mode_or_dtype_waits_for_the_write(change, monkeypatch):
    model = tiny_model(0, attention_dropout=0.5)
    ids, memory = random_ids(2, 6), random_memory(model)
    expected = turn(model, memory, ids, True).stm_cache.states
    started = slow_down(model, monkeypatch)
    out = turn(model, memory, ids, "async")
    assert started.wait(20)
    CHANGES[change](model)
    assert torch.equal(out.stm_cache.states, expected)


def test_weights_that_change_in_place_make_the_write_fail_and_leave_the_old_memory(model, held_write):
    memory = random_memory(model)
    before, out = memory.states.clone(), turn(model, memory, random_ids(2, 6), "async")
    with torch.no_grad():
        model.model.memory_encoder.layers[0].mlp.down_proj.weight.mul_(1.01)
    held_write.set()
    with pytest.raises(StateError, match="weights changed"):
        out.stm_cache.wait()
    assert torch.equal(memory.states, before)
