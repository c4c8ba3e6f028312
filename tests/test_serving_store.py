# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What every store promises, and what a sealed memory keeps."""

import base64
import multiprocessing
import os
import stat
import threading
import time

import pytest
import torch

from rxt_hf import StateError, STMCache
from rxt_hf.serving.state import OtherWeightsError, Seal, pack, prefix_keys, read_memory, unpack, unpack_about
from rxt_hf.serving.store import Record, RedisStore, SQLiteStore, Usage, open_store

from .models import random_memory, tiny_model
from .serving import redis_server


@pytest.fixture(scope="module")
def redis_url():
    with redis_server() as url:
        yield url


@pytest.fixture(params=["memory", "file", "redis"])
def store(request, tmp_path):
    if request.param == "redis":
        store = RedisStore(request.getfixturevalue("redis_url"))
        store._redis.flushall()
    else:
        store = open_store("memory" if request.param == "memory" else str(tmp_path / "states.db"))
    yield store
    store.close()


def test_values_have_versions_and_tenants_do_not_see_each_other(store):
    assert store.get("ann", "key") is None and store.head("ann", ["key"])[0] == 0
    assert store.put([Record("ann", "key", b"\0one"), Record("bob", "key", b"other")])
    assert store.put([Record("ann", "key", b"two")])
    assert store.get("ann", "key") == (b"two", 2) and store.head("ann", ["key"])[0] == 2
    assert store.get("bob", "key") == (b"other", 1)
    assert store.head("ann", ["nothing", "key"]) == [0, 2]
    assert store.delete("ann", ["key", "nothing"]) == 1
    assert store.get("ann", "key") is None and store.head("ann", ["key"])[0] == 0
    assert store.get("bob", "key") == (b"other", 1)


def test_compare_and_set_writes_all_or_nothing(store):
    records = [Record("ann", "head", b"1"), Record("ann", "item", b"a")]
    assert not store.put(records, ("ann", "head", 1))
    assert store.get("ann", "item") is None
    assert store.put(records, ("ann", "head", 0))
    assert not store.put([Record("ann", "head", b"2"), Record("ann", "item", b"b")], ("ann", "head", 0))
    assert store.get("ann", "item") == (b"a", 1)
    assert store.put([Record("ann", "head", b"2")], ("ann", "head", 1))
    assert store.get("ann", "head") == (b"2", 2)


def test_of_many_that_compare_and_set_one_wins_each_version(store):
    store.put([Record("ann", "head", b"0")])
    won = []

    def race(name):
        for version in range(1, 20):
            while store.head("ann", ["head"])[0] < version:
                time.sleep(0.001)
            if store.put([Record("ann", "head", name)], ("ann", "head", version)):
                won.append(version)

    threads = [threading.Thread(target=race, args=(bytes([65 + index]),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won) == list(range(1, 20))


def test_what_has_expired_is_gone_and_counts_no_more_after_a_sweep(store):
    store.put([Record("ann", "short", b"12345", 0.1), Record("ann", "long", b"1", 60.0), Record("ann", "ever", b"1")])
    assert store.get("ann", "short") == (b"12345", 1)
    time.sleep(0.15)
    assert store.get("ann", "short") is None and store.head("ann", ["short"])[0] == 0
    assert store.sweep() == 1
    assert store.usage() == Usage(2, 2)
    # a new value under the old name starts anew, and lives on
    store.put([Record("ann", "short", b"1", 0.05)])
    time.sleep(0.1)
    assert store.put([Record("ann", "short", b"2")], ("ann", "short", 0))
    assert store.get("ann", "short") == (b"2", 1)


def test_a_sweep_removes_the_least_recently_used_until_the_rest_fits(store, monkeypatch):
    monkeypatch.setattr("rxt_hf.serving.store.USED_EVERY_S", 0.0)
    for name in ("a", "b", "c", "d"):
        store.put([Record("ann", name, b"x" * 100)])
        time.sleep(0.002)
    store.get("ann", "a")
    assert store.sweep(1000) == 0
    assert store.sweep(250) == 2
    assert [name for name in "abcd" if store.get("ann", name)] == ["a", "d"]
    assert store.usage() == Usage(2, 200)


def test_usage_counts_records_and_bytes_by_tenant_through_every_change(store):
    store.put([Record("ann", "a", b"12"), Record("ann", "b", b"3"), Record("bob", "a", b"12345")])
    assert store.usage("ann") == Usage(2, 3) and store.usage("bob") == Usage(1, 5) and store.usage() == Usage(3, 8)
    store.put([Record("ann", "a", b"")])
    store.delete("bob", ["a", "a"])
    assert store.usage("ann") == Usage(2, 1) and store.usage("bob") == Usage(0, 0) and store.usage() == Usage(2, 1)
    assert store.usage("nobody") == Usage(0, 0)


def test_a_lease_has_one_owner_until_it_is_released_or_ends(store):
    assert store.lease("ann", "key", "one", 60)
    assert not store.lease("ann", "key", "two", 60)
    assert store.lease("bob", "key", "two", 60) and store.lease("ann", "key", "one", 60)
    store.release("ann", "key", "two")
    assert not store.lease("ann", "key", "two", 60)
    store.release("ann", "key", "one")
    assert store.lease("ann", "key", "two", 0.05) and store.lease("ann", "key", "two", 0.2)
    time.sleep(0.1)
    assert not store.lease("ann", "key", "three", 60)
    time.sleep(0.15)
    assert store.lease("ann", "key", "three", 60)


def write_many(path, name):
    store = SQLiteStore(path)
    for index in range(50):
        store.put([Record("ann", f"{name}{index}", b"x" * 1000)])
    store.close()


def test_a_file_serves_many_processes_and_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "states.db"
    store = SQLiteStore(path)
    # not spawned: that would import all of torch for a few writes
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert store.usage() == Usage(100, 100_000)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(os.stat(file).st_mode) & 0o077 == 0
    store.close()


def test_deleted_states_are_overwritten_in_the_file(tmp_path):
    store = SQLiteStore(tmp_path / "states.db")
    store.put([Record("ann", "key", b"a secret of ann " * 8000)])
    store.delete("ann", ["key"])
    store.close()
    assert b"a secret of ann" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_other_addresses_are_no_store():
    with pytest.raises(ValueError, match="no store 'postgres://host'"):
        open_store("postgres://host")


def model_and_memory():
    model = tiny_model()
    memory = random_memory(model, batch_size=1)
    return model, STMCache(memory.states, 3, model.memory_fingerprint())


def test_what_is_packed_comes_back_with_its_memory():
    model, memory = model_and_memory()
    value = pack({"turns": [1, "ü"]}, memory)
    assert unpack_about(value) == {"turns": [1, "ü"]}
    about, found = unpack(value, model, memory.fingerprint)
    assert about == {"turns": [1, "ü"]} and torch.equal(found.states, memory.states) and found.turns.tolist() == [3]


def test_memories_of_other_weights_shapes_and_sizes_are_refused():
    model, memory = model_and_memory()
    with pytest.raises(OtherWeightsError, match="other weights"):
        read_memory(memory.to_bytes(), model, "another")
    with pytest.raises(StateError, match=r"shape \(2, .*expected \(1, "):
        read_memory(memory.repeat(2).to_bytes(), model, memory.fingerprint)
    huge = memory.replace(memory.states.clone())
    huge.states[0, 1, 2, 3] = -2e4
    with pytest.raises(StateError, match="number of size 20000, expected at most 10000"):
        read_memory(huge.to_bytes(), model, memory.fingerprint)


def test_only_its_tenant_brings_a_sealed_value_back_and_only_to_the_same_weights():
    old, new = os.urandom(32), os.urandom(32)
    text = Seal([old]).seal(b"state", "ann", "weights")
    assert b"state" not in base64.b64decode(text)
    assert text != Seal([old]).seal(b"state", "ann", "weights")
    assert Seal([new, old]).unseal(text, "ann", "weights") == b"state"
    for keys, tenant, fingerprint in (([old], "bob", "weights"), ([old], "ann", "others"), ([new], "ann", "weights")):
        with pytest.raises(StateError, match="cannot be opened"):
            Seal(keys).unseal(text, tenant, fingerprint)


def test_a_sealed_value_with_any_byte_changed_or_cut_is_refused():
    seal = Seal([os.urandom(32)])
    raw = base64.b64decode(seal.seal(b"state", "ann", "weights"))
    for place in range(len(raw)):
        damaged = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        for content in (damaged, raw[:place]):
            with pytest.raises(StateError, match="cannot be opened"):
                seal.unseal(base64.b64encode(content).decode(), "ann", "weights")
    for text in ("", "no base64!", "ü" * 40):
        with pytest.raises(StateError, match="cannot be opened"):
            seal.unseal(text, "ann", "weights")


def test_prefix_keys_name_weights_and_all_interactions_before():
    history = [["system", "Be brief."], ["a", "b"], ["c", "d"]]
    keys = prefix_keys("weights", history)
    assert prefix_keys("weights", history[:2]) == keys[:2] and len(set(keys)) == 3
    assert not set(keys) & set(prefix_keys("others", history))
    edited = prefix_keys("weights", [history[0], ["a", "B"], history[2]])
    assert edited[0] == keys[0] and not set(edited[1:]) & set(keys)
