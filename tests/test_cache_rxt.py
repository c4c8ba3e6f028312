# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import errno
import hashlib
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
from torch.utils import _pytree

from rxt_hf import cache_rxt, memory_file_rxt
from rxt_hf.cache_rxt import StateError, STMCache, as_stm_cache


def random_cache(batch=3, layers=2, slots=4, hidden=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, layers, slots, hidden, generator=generator).to(dtype)
    return STMCache(states, [5 + 2 * row for row in range(batch)], "model-a")


def stand_in_model(layers=2, slots=4, hidden=8, fingerprint="model-a"):
    config = SimpleNamespace(num_memory_layers=layers, num_memory_slots=slots, hidden_size=hidden)
    return SimpleNamespace(config=config, memory_fingerprint=lambda: fingerprint)


def assert_same(found, expected):
    assert found.states.dtype == expected.states.dtype
    assert torch.equal(found.states, expected.states)
    assert torch.equal(found.turns, expected.turns)
    assert found.fingerprint == expected.fingerprint


def shares_storage(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# The value


def test_sizes_are_those_of_the_states():
    cache = random_cache(dtype=torch.bfloat16)
    assert (cache.batch_size, cache.num_memory_layers, cache.num_memory_slots, cache.hidden_size) == (3, 2, 4, 8)
    assert (len(cache), cache.dtype, cache.device.type) == (3, torch.bfloat16, "cpu")
    assert cache.nbytes == 3 * 2 * 4 * 8 * 2
    assert cache.turns.tolist() == [5, 7, 9] and cache.turns.dtype == torch.long
    assert "\n" not in repr(cache) and "(3, 2, 4, 8)" in repr(cache)


def test_turns_start_at_zero_and_may_be_one_number_for_all_rows():
    states = torch.randn(2, 1, 1, 4)
    assert STMCache(states).turns.tolist() == [0, 0]
    assert STMCache(states, 3).turns.tolist() == [3, 3]
    assert STMCache(states, torch.tensor([1, 2], dtype=torch.int32)).turns.dtype == torch.long


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (ValueError, r"\(2, 1, 4\)", (torch.zeros(2, 1, 4),)),
        (ValueError, "int64", (torch.zeros(2, 1, 1, 4, dtype=torch.long),)),
        (TypeError, "list", ([[[[0.0]]]],)),
        (ValueError, r"\(2,\).*\(3,\)", (torch.zeros(2, 1, 1, 4), [1, 2, 3])),
        (ValueError, "float32", (torch.zeros(2, 1, 1, 4), [1.5, 2.0])),
        (TypeError, "int", (torch.zeros(2, 1, 1, 4), None, 7)),
    ],
)
def test_wrong_parts_are_refused_at_construction(error, words, arguments):
    with pytest.raises(error, match=words):
        STMCache(*arguments)


@pytest.mark.parametrize("copied", [STMCache.fork, copy.deepcopy])
def test_a_copy_is_independent_and_bit_identical(copied):
    cache = random_cache()
    other = copied(cache)
    assert_same(other, cache)
    other.states.zero_()
    other.turns.zero_()
    assert_same(cache, random_cache())


def test_a_copy_of_a_memory_in_a_graph_stays_in_it():
    leaf = torch.randn(1, 1, 2, 4, requires_grad=True)
    copy.deepcopy(STMCache(leaf * 2)).states.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


@pytest.mark.parametrize(
    "rows, expected",
    [
        (1, [1]),
        (-1, [2]),
        ([2, 0, 2], [2, 0, 2]),
        ((0, 1), [0, 1]),
        (slice(1, None), [1, 2]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor(1), [1]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([True, False, True], [0, 2]),
        ([], []),
    ],
)
def test_select_takes_rows_in_order_into_new_storage(rows, expected):
    cache = random_cache()
    taken = cache.select(rows)
    assert_same(taken, STMCache(cache.states[expected], cache.turns[expected], "model-a"))
    assert not shares_storage(taken.states, cache.states)


@pytest.mark.parametrize("rows", [3, [0, 3], torch.tensor([True, False])])
def test_select_refuses_rows_that_do_not_exist(rows):
    with pytest.raises(IndexError):
        random_cache().select(rows)


def test_cat_puts_back_together_what_select_took_apart():
    cache = random_cache()
    assert_same(STMCache.cat([cache.select([0, 1]), cache.select(2)]), cache)


@pytest.mark.parametrize(
    "other, words",
    [
        (random_cache(slots=5), r"\(2, 4, 8\) and \(2, 5, 8\)"),
        (random_cache(dtype=torch.bfloat16), "float32 and torch.bfloat16"),
        (STMCache(random_cache().states, fingerprint="model-b"), "model-a and model-b"),
    ],
)
def test_cat_refuses_memories_that_do_not_belong_together(other, words):
    with pytest.raises(ValueError, match=words):
        STMCache.cat([random_cache(), other])


def test_cat_of_nothing_and_repeat_of_zero_are_refused():
    with pytest.raises(ValueError, match="empty"):
        STMCache.cat([])
    with pytest.raises(ValueError, match="got 0"):
        random_cache().repeat(0)


def test_repeat_keeps_the_copies_of_a_row_together():
    cache = random_cache()
    assert_same(cache.repeat(2), cache.select([0, 0, 1, 1, 2, 2]))


def test_to_casts_the_states_and_moves_the_turns():
    cache = random_cache()
    for cast in (cache.to(torch.bfloat16), cache.to(dtype=torch.bfloat16), cache.to(torch.zeros(1).bfloat16())):
        assert_same(cast, random_cache(dtype=torch.bfloat16))
    moved = cache.to("meta", torch.float16)
    assert (moved.device.type, moved.dtype) == ("meta", torch.float16)
    assert (moved.turns.device.type, moved.turns.dtype) == ("meta", torch.long)
    assert_same(cache, random_cache())


def test_detach_cuts_the_graph_of_the_new_value_only():
    cache = STMCache(torch.randn(1, 1, 2, 4, requires_grad=True) * 2)
    assert not cache.detach().states.requires_grad
    assert cache.states.requires_grad


def test_replace_keeps_turns_and_fingerprint_unless_told():
    cache = random_cache()
    states = torch.zeros_like(cache.states)
    assert_same(cache.replace(states), STMCache(states, [5, 7, 9], "model-a"))
    assert_same(cache.replace(states, cache.turns + 1), STMCache(states, [6, 8, 10], "model-a"))


def test_two_equal_memories_are_still_two():
    assert random_cache() != random_cache()
    assert len({random_cache(), random_cache()}) == 2


# The check before a forward


def test_a_memory_comes_back_as_itself_and_a_tensor_wrapped():
    cache, config = random_cache(), stand_in_model().config
    assert as_stm_cache(cache, batch_size=3, config=config) is cache
    assert as_stm_cache(cache.states, batch_size=3, config=config).states is cache.states
    assert as_stm_cache(cache) is cache


@pytest.mark.parametrize("wrong", [{"batch": 2}, {"layers": 1}, {"slots": 5}, {"hidden": 16}])
@pytest.mark.parametrize("plain", [False, True])
def test_a_memory_of_another_shape_is_refused_naming_both_shapes(wrong, plain):
    cache = random_cache(**wrong)
    with pytest.raises(ValueError) as caught:
        as_stm_cache(cache.states if plain else cache, batch_size=3, config=stand_in_model().config)
    assert str(tuple(cache.states.shape)) in str(caught.value) and "(3, 2, 4, 8)" in str(caught.value)


def test_a_tensor_without_four_dimensions_is_refused_naming_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 4, 8\), expected \(any, 2, 4, 8\)"):
        as_stm_cache(torch.zeros(2, 4, 8), config=stand_in_model().config)


@pytest.mark.parametrize("value", [None, [torch.zeros(1, 1, 1, 4)], 3])
def test_anything_else_is_a_type_error(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        as_stm_cache(value)


# pytree, export, compile


def test_pytree_round_trip_keeps_everything_and_takes_any_leaves():
    cache = random_cache()
    leaves, tree = _pytree.tree_flatten({"stm_cache": cache})
    assert len(leaves) == 2
    assert_same(_pytree.tree_unflatten(leaves, tree)["stm_cache"], cache)
    assert _pytree.tree_map(lambda leaf: leaf.ndim, cache).states == 4
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(cache)[0]]
    assert paths == [".states", ".turns"]
    assert _pytree.treespec_loads(_pytree.treespec_dumps(tree)) == tree


def test_a_second_copy_of_the_module_can_be_imported_beside_the_first():
    spec = importlib.util.spec_from_file_location("rxt_hf.downloaded_cache_rxt", cache_rxt.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for cls in (module.STMCache, STMCache):
        leaves, tree = _pytree.tree_flatten(cls(torch.zeros(1, 1, 1, 4)))
        assert len(leaves) == 2 and type(_pytree.tree_unflatten(leaves, tree)) is cls
        assert _pytree.treespec_loads(_pytree.treespec_dumps(tree)) == tree


class Writer(torch.nn.Module):
    def forward(self, update, stm_cache):
        stm_cache = as_stm_cache(stm_cache, batch_size=update.shape[0])
        return stm_cache.replace(stm_cache.states * 0.5 + update, stm_cache.turns + 1)


def test_export_accepts_and_returns_a_memory():
    cache = random_cache()
    update = torch.ones_like(cache.states)
    exported = torch.export.export(Writer(), (update, cache))
    other = random_cache(seed=1)
    assert_same(exported.module()(update, other), Writer()(update, other))


def test_turns_of_a_conversation_share_one_compiled_graph():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(Writer(), backend=count, fullgraph=True)
    cache = expected = random_cache()
    for _ in range(4):
        update = torch.ones_like(cache.states)
        cache, expected = step(update, cache), Writer()(update, expected)
    assert_same(cache, expected)
    assert len(graphs) == 1


# The file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_gives_back_every_bit_and_the_dtype(tmp_path, dtype):
    cache = random_cache(dtype=dtype)
    cache.states[0, 0, 0, 0] = -0.0
    cache.states[0, 0, 0, 1] = torch.finfo(dtype).smallest_normal / 2
    cache.save(tmp_path / "state")
    loaded = STMCache.load(str(tmp_path / "state"), stand_in_model())
    assert_same(loaded, cache)
    assert torch.equal(loaded.states.view(torch.uint8), cache.states.view(torch.uint8))
    assert STMCache.load(tmp_path / "state", device="meta").device.type == "meta"


def test_a_default_device_does_not_disturb_construction_or_load(tmp_path):
    with torch.device("meta"):
        cache = STMCache(torch.ones(2, 1, 1, 4, device="cpu"), [1, 2])
        cache.save(tmp_path / "state")
        assert_same(STMCache.load(tmp_path / "state").select([0, 1]), cache)


def test_the_file_is_plain_safetensors(tmp_path):
    cache = random_cache(batch=1, slots=1, hidden=3, dtype=torch.bfloat16)
    cache.save(tmp_path / "state")
    tensors = safetensors.torch.load_file(tmp_path / "state")
    assert tensors.keys() == {"states", "turns"}
    assert torch.equal(tensors["states"], cache.states) and torch.equal(tensors["turns"], cache.turns)
    with safetensors.safe_open(tmp_path / "state", "pt") as file:
        assert file.metadata().keys() == {"format", "format_version", "checksum", "fingerprint"}


def test_views_and_graphs_are_saved_as_their_numbers(tmp_path):
    base = torch.randn(8, 4, 2, 3)
    graph = base.clone().requires_grad_() * 2
    for states in (base.permute(3, 2, 1, 0), base[:1].expand(3, -1, -1, -1), base[::2, :, :, 1:], graph):
        STMCache(states).save(tmp_path / "state")
        loaded = STMCache.load(tmp_path / "state")
        assert torch.equal(loaded.states, states) and not loaded.states.requires_grad
        assert loaded.fingerprint is None


def test_a_file_without_int8_is_the_same_to_the_byte_as_it_always_was(tmp_path):
    cache = STMCache(torch.arange(24.0).view(2, 1, 3, 4), [5, 7], "model-a")
    cache.save(tmp_path / "state")
    digest = hashlib.sha256((tmp_path / "state").read_bytes()).hexdigest()
    assert digest == "73da8302f691763d3a80b975ad55991a36ef213af57d92b9e3695f8623744a9b"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_is_that_of_the_cast_memory(tmp_path, dtype):
    random_cache().save(tmp_path / "state", dtype=dtype)
    random_cache().to(dtype).save(tmp_path / "cast")
    assert (tmp_path / "state").read_bytes() == (tmp_path / "cast").read_bytes()
    assert_same(STMCache.load(tmp_path / "state", stand_in_model()), random_cache(dtype=dtype))


def cache_of_all_sizes(dtype):
    """Slots of zeros, of one number, of the largest numbers, and random ones over eight orders of magnitude."""
    cache = random_cache(hidden=64)
    states = (cache.states * 10.0 ** torch.linspace(-5, 3, 24).view(3, 2, 4, 1)).to(dtype)
    states[0, 0, 0], states[0, 0, 1] = 0.0, -0.25
    states[0, 0, 2, 0] = torch.finfo(dtype).max
    return cache.replace(states)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_bytes_of_a_memory_are_those_of_its_file_and_give_it_back(tmp_path, dtype):
    cache = random_cache()
    cache.states.requires_grad_()
    content = cache.to_bytes(dtype)
    cache.save(tmp_path / "state", dtype=dtype)
    assert isinstance(content, bytes) and content == (tmp_path / "state").read_bytes()
    assert_same(STMCache.from_bytes(content), STMCache.load(tmp_path / "state"))
    assert not STMCache.from_bytes(content).states.requires_grad
    with pytest.raises(StateError, match="The memory is refused: the fingerprint"):
        STMCache.from_bytes(random_cache().to_bytes(dtype), stand_in_model(fingerprint="model-b"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_keeps_every_number_to_half_a_scale_and_the_dtype(tmp_path, dtype):
    cache = cache_of_all_sizes(dtype)
    cache.save(tmp_path / "state", dtype=torch.int8)
    loaded = STMCache.load(tmp_path / "state")
    assert loaded.dtype == dtype and loaded.fingerprint == "model-a" and torch.equal(loaded.turns, cache.turns)
    scales = cache.states.double().abs().amax(-1, keepdim=True) / 127
    error = (loaded.states.double() - cache.states.double()).abs()
    # half a scale, and what rounding to bfloat16 adds: at most 2**-8 of 127 scales
    assert (error <= (0.503 if dtype == torch.float32 else 1.0) * scales).all()
    assert (error > 0.45 * scales).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_stored_in_int8_once_is_stored_again_without_any_loss(tmp_path, dtype):
    cache_of_all_sizes(dtype).save(tmp_path / "state", dtype=torch.int8)
    loaded = STMCache.load(tmp_path / "state")
    loaded.save(tmp_path / "again", dtype=torch.int8)
    assert_same(STMCache.load(tmp_path / "again"), loaded)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()


def test_int8_scales_each_slot_by_itself(tmp_path):
    cache = random_cache()
    cache.states[0, 0, 0] *= 1e6
    cache.save(tmp_path / "state", dtype=torch.int8)
    error = (STMCache.load(tmp_path / "state").states - cache.states).abs().amax(-1)
    assert error[0, 0, 0] > 100 and error.flatten()[1:].max() < 0.02


def test_int8_takes_a_quarter_of_the_bytes_and_any_view(tmp_path):
    cache = random_cache(slots=64, hidden=128)
    cache.save(tmp_path / "whole")
    cache.save(tmp_path / "state", dtype=torch.int8)
    assert (tmp_path / "state").stat().st_size < 0.27 * (tmp_path / "whole").stat().st_size
    view = cache.replace(cache.states.transpose(1, 2)[:, :, :, 1::2].requires_grad_() * 2)
    view.save(tmp_path / "view", dtype=torch.int8)
    view.replace(view.states.detach().contiguous()).save(tmp_path / "contiguous", dtype=torch.int8)
    assert (tmp_path / "view").read_bytes() == (tmp_path / "contiguous").read_bytes()


def test_the_int8_file_is_plain_safetensors(tmp_path):
    cache = random_cache(dtype=torch.bfloat16, hidden=3)
    cache.save(tmp_path / "state", dtype=torch.int8)
    tensors = safetensors.torch.load_file(tmp_path / "state")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "turns": torch.int64,
        "scales": torch.float32,
        "states": torch.int8,
    }
    states = (tensors["states"] * tensors["scales"].unsqueeze(-1)).bfloat16()
    assert torch.equal(states, STMCache.load(tmp_path / "state").states)
    with safetensors.safe_open(tmp_path / "state", "pt") as file:
        assert (file.metadata()["format_version"], file.metadata()["dtype"]) == ("2", "BF16")


@pytest.mark.parametrize(
    "cache, dtype, words",
    [
        (random_cache(), torch.int32, "int32, expected one of"),
        (random_cache(dtype=torch.float64), torch.int8, "float64, expected one of"),
        (random_cache().replace(torch.full((3, 2, 4, 8), 1e6)), torch.float16, "NaN or Inf, expected finite"),
        (random_cache().replace(torch.full((3, 2, 4, 8), float("nan"))), torch.int8, "NaN or Inf, expected finite"),
    ],
)
def test_what_cannot_be_stored_in_a_dtype_is_not_saved(tmp_path, cache, dtype, words):
    with pytest.raises(StateError, match=words):
        cache.save(tmp_path / "state", dtype=dtype)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fingerprint", ["", 'quote " and \\ and \n', "Gedächtnis 記憶", "[[[{{{"])
def test_any_short_fingerprint_survives(tmp_path, fingerprint):
    cache = STMCache(torch.zeros(1, 1, 1, 1), 1, fingerprint)
    cache.save(tmp_path / "state")
    assert_same(STMCache.load(tmp_path / "state"), cache)


@pytest.mark.parametrize(
    "cache, words",
    [
        (random_cache(dtype=torch.float64), "float64, expected one of"),
        (random_cache().replace(torch.full((3, 2, 4, 8), float("nan"))), "NaN or Inf, expected finite"),
        (random_cache().replace(torch.full((3, 2, 4, 8), float("inf"))), "NaN or Inf, expected finite"),
        (random_cache().select([]), r"\(0, 2, 4, 8\)"),
        (STMCache(torch.zeros(1, 1, 1, 1), -1), "turns hold -1"),
        (STMCache(torch.zeros(1, 1, 1, 1), 1, "x" * 5000), "header"),
    ],
)
def test_what_load_would_refuse_is_not_saved(tmp_path, cache, words):
    random_cache().save(tmp_path / "state")
    with pytest.raises(StateError, match=words):
        cache.save(tmp_path / "state")
    assert_same(STMCache.load(tmp_path / "state"), random_cache())
    assert os.listdir(tmp_path) == ["state"]


def test_a_missing_file_is_a_missing_file_and_a_folder_no_state(tmp_path):
    with pytest.raises(FileNotFoundError):
        STMCache.load(tmp_path / "nowhere")
    with pytest.raises(StateError, match="regular file"):
        STMCache.load(tmp_path)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"layers": 3}, r"\(2, 4, 8\), expected \(3, 4, 8\)"),
        ({"slots": 5}, r"\(2, 4, 8\), expected \(2, 5, 8\)"),
        ({"hidden": 16}, r"\(2, 4, 8\), expected \(2, 4, 16\)"),
        ({"fingerprint": "model-b"}, "fingerprint.*'model-a', expected 'model-b'"),
    ],
)
def test_the_memory_of_another_model_is_refused(tmp_path, wrong, words):
    random_cache().save(tmp_path / "state")
    with pytest.raises(StateError, match=words):
        STMCache.load(tmp_path / "state", stand_in_model(**wrong))


def test_a_memory_without_fingerprint_does_not_pass_as_a_models_own(tmp_path):
    STMCache(random_cache().states).save(tmp_path / "state")
    with pytest.raises(StateError, match="None, expected 'model-a'"):
        STMCache.load(tmp_path / "state", stand_in_model())


# Damaged and hostile files


@pytest.fixture
def one_slot_file(tmp_path, request):
    path = tmp_path / "state"
    random_cache(batch=1, layers=1, slots=1).save(path, dtype=getattr(request, "param", None))
    return path


# what safetensors refuses, and what it reads in other ways than we write
UNREADABLE, SPELLING = "safetensors cannot read it", "way that save never writes"
each_kind_of_file = pytest.mark.parametrize("one_slot_file", [None, torch.int8], indirect=True)
int8_file = pytest.mark.parametrize("one_slot_file", [torch.int8], indirect=True)


def refuse(path, content, words=None):
    """Loading must raise one `StateError` quickly, from a file as from bytes; gives back the seconds it took."""
    path.write_bytes(content)
    with pytest.raises(StateError, match=words):
        STMCache.from_bytes(content)
    start = time.perf_counter()
    with pytest.raises(StateError, match=words) as caught:
        STMCache.load(path)
    seconds = time.perf_counter() - start
    assert len(str(caught.value)) < 500 + len(str(path))
    return seconds


@each_kind_of_file
def test_a_file_cut_at_any_byte_is_refused(one_slot_file):
    whole = one_slot_file.read_bytes()
    seconds = [refuse(one_slot_file, whole[:length]) for length in range(len(whole))]
    seconds.append(refuse(one_slot_file, whole + b"\0", UNREADABLE))
    assert sorted(seconds)[len(seconds) // 2] < 0.05


@each_kind_of_file
def test_a_thousand_random_byte_flips_are_refused(one_slot_file):
    whole, generator = one_slot_file.read_bytes(), random.Random(0)
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= generator.randrange(1, 256)
        refuse(one_slot_file, bytes(damaged))


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header, body=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200 * 2**20, 5000])
def test_an_announced_header_of_any_length_costs_nothing(tmp_path, length):
    path = tmp_path / "state"
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"')
        # a sparse file really as long as it says
        file.truncate(min(length, 200 * 2**20) + 8)
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match=f"header of {length} bytes"):
            STMCache.load(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def change(header, *keys_and_value):
    *keys, last, value = keys_and_value
    header = copy.deepcopy(header)
    inner = header
    for key in keys:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return header


@pytest.mark.parametrize(
    "place, words",
    [
        (("states", "data_offsets", [0, 40]), UNREADABLE),
        (("states", "data_offsets", [16, 48]), UNREADABLE),
        (("states", "data_offsets", [8, 2**64]), UNREADABLE),
        (("states", "data_offsets", None), UNREADABLE),
        (("turns", "data_offsets", [8, 0]), UNREADABLE),
        (("turns", "data_offsets", [False, 8.0]), UNREADABLE),
        (("turns", "dtype", "F64"), SPELLING),
        (("turns", "shape", [2]), UNREADABLE),
        (("states", "shape", [1, 2**40, 2**40, 2**40]), UNREADABLE),
        (("states", "shape", [2**62, 4, 1, 1]), UNREADABLE),
        (("states", "shape", [1, 1, 1, 16]), UNREADABLE),
        (("states", "shape", [1, 1, 1, -8]), UNREADABLE),
        (("states", "shape", [1, 0, 2**62, 2**62]), "shape"),
        (("states", "shape", [1, 1, 1, 8.0]), UNREADABLE),
        (("states", "shape", [1, 1, True, 8]), UNREADABLE),
        (("states", "shape", [1, 1, 8]), "shape"),
        (("states", "shape", "1118"), UNREADABLE),
        (("states", "dtype", "F64"), UNREADABLE),
        (("states", "dtype", "I32"), "dtype 'I32', expected"),
        (("states", "dtype", ["F32"]), UNREADABLE),
        (("states", "dtype", "F16"), UNREADABLE),
        (("states", None), UNREADABLE),
        (("turns", None), UNREADABLE),
        (("more", {"dtype": "F32", "shape": [0], "data_offsets": [40, 40]}), "'more'"),
        (("states", []), UNREADABLE),
        (("__metadata__", None), "metadata"),
        (("__metadata__", "format", "pt"), "'pt', expected 'rxt_hf.STMCache'"),
        (("__metadata__", "format_version", "2"), "newer.*'2', expected '1'"),
        (("__metadata__", "format_version", None), "version"),
        (("__metadata__", "checksum", "0" * 64), "checksum"),
        (("__metadata__", "checksum", None), SPELLING),
        (("__metadata__", "fingerprint", "model-b"), "checksum"),
        (("__metadata__", "fingerprint", 5), UNREADABLE),
        (("__metadata__", "author", "me"), SPELLING),
        (("__metadata__", "dtype", "F32"), SPELLING),
        (("states", "dtype", "I8"), UNREADABLE),
    ],
)
def test_a_header_that_says_another_thing_is_refused(one_slot_file, place, words):
    header, body = header_of(one_slot_file.read_bytes())
    refuse(one_slot_file, file_of(change(header, *place), body), words)


@int8_file
@pytest.mark.parametrize(
    "place, words",
    [
        (("scales", "data_offsets", [8, 16]), UNREADABLE),
        (("scales", "data_offsets", [12, 16]), UNREADABLE),
        (("states", "data_offsets", [8, 16]), UNREADABLE),
        (("states", "data_offsets", [12, 2**64]), UNREADABLE),
        (("scales", "dtype", "F64"), UNREADABLE),
        (("states", "dtype", "U8"), SPELLING),
        (("states", "dtype", "F32"), UNREADABLE),
        (("scales", "shape", [1, 1, 2]), UNREADABLE),
        (("scales", "shape", None), UNREADABLE),
        (("states", "shape", [1, 1, 1, 16]), UNREADABLE),
        (("states", "shape", [1, 2**40, 2**40, 2**40]), UNREADABLE),
        (("states", "shape", [1, 1, 1, -8]), UNREADABLE),
        (("scales", None), UNREADABLE),
        (("states", None), UNREADABLE),
        (("scales", []), UNREADABLE),
        (("__metadata__", "format_version", "1"), "'1', expected '2'"),
        (("__metadata__", "format_version", "3"), "newer.*'3', expected '2'"),
        (("__metadata__", "dtype", "I8"), "dtype 'I8', expected"),
        (("__metadata__", "dtype", ["F32"]), UNREADABLE),
        (("__metadata__", "dtype", None), "dtype None, expected"),
        (("__metadata__", "dtype", "BF16"), "checksum"),
        (("__metadata__", "checksum", "0" * 64), "checksum"),
    ],
)
def test_an_int8_header_that_says_another_thing_is_refused(one_slot_file, place, words):
    header, body = header_of(one_slot_file.read_bytes())
    refuse(one_slot_file, file_of(change(header, *place), body), words)


@int8_file
def test_an_int8_file_loads_as_it_is(one_slot_file):
    """What the tests of damaged files start from."""
    header, body = header_of(one_slot_file.read_bytes())
    one_slot_file.write_bytes(file_of(header, body))
    assert STMCache.load(one_slot_file).states.shape == (1, 1, 1, 8)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
def test_an_int8_file_with_a_right_checksum_but_no_finite_numbers_is_refused(tmp_path, monkeypatch, number):
    scales = torch.ones(3, 2, 4)
    scales[1, 0, 2] = number
    codes = torch.full((3, 2, 4, 8), 2, dtype=torch.int8)
    with monkeypatch.context() as patch:
        patch.setattr(memory_file_rxt, "_to_int8", lambda _: (scales, codes))
        random_cache().save(tmp_path / "state", dtype=torch.int8)
    with pytest.raises(StateError, match="NaN or Inf, expected finite"):
        STMCache.load(tmp_path / "state")


@pytest.mark.parametrize(
    "header, words",
    [
        (b"[" * 4096, "JSON"),
        (b'{"a":' * 800, "JSON"),
        (b'{"__metadata__":{"format":"rxt_hf.STMCache","format":"rxt_hf.STMCache"}}', "format version"),
        (b'{"__metadata__":NaN}', "metadata"),
        (b"[]", "metadata"),
        (b"\xff\xfe", "JSON"),
        (b"", "JSON"),
        (b'"' + b'\\"' * 2000, "JSON"),
        (b"9" * 4096, "metadata"),
    ],
)
def test_a_header_that_is_no_such_json_is_refused(tmp_path, header, words):
    assert refuse(tmp_path / "state", file_of(header), words) < 1


@each_kind_of_file
def test_the_same_header_spelt_otherwise_is_refused(one_slot_file):
    header, body = header_of(one_slot_file.read_bytes())
    refuse(one_slot_file, file_of(json.dumps(header).encode(), body), SPELLING)


@each_kind_of_file
def test_a_body_with_more_or_fewer_bytes_is_refused(one_slot_file):
    content = one_slot_file.read_bytes()
    _, body = header_of(content)
    refuse(one_slot_file, content[: -len(body)] + b"\0" * 8 + body, UNREADABLE)
    refuse(one_slot_file, content[:-8], UNREADABLE)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "state"
    safetensors.torch.save_file({"states": torch.zeros(1, 1, 1, 8), "turns": torch.zeros(1, dtype=torch.long)}, path)
    refuse(path, path.read_bytes(), "metadata")
    torch.save(torch.zeros(1, 1, 1, 8), path)
    refuse(path, path.read_bytes())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_file_with_a_right_checksum_but_no_finite_numbers_is_refused(tmp_path, monkeypatch, number):
    cache = random_cache()
    cache.states[1, 0, 2, 3] = number
    with monkeypatch.context() as patch:
        patch.setattr(memory_file_rxt, "_check_numbers", lambda *_: None)
        cache.save(tmp_path / "state")
    with pytest.raises(StateError, match="NaN or Inf, expected finite"):
        STMCache.load(tmp_path / "state")


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_a_pickle_is_refused_and_never_runs(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "state"
    content = pickle.dumps(Payload(str(canary)))
    refuse(path, content)
    torch.save(Payload(str(canary)), path)
    refuse(path, path.read_bytes())
    assert not canary.exists()
    # the canary is alive: whoever unpickles the file makes it
    pickle.loads(content)
    assert canary.exists()


# Interrupted saves


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path, old = tmp_path / "state", random_cache()
    old.save(path)
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        random_cache(seed=1).save(path)
    assert_same(STMCache.load(path), old)
    assert os.listdir(tmp_path) == ["state"]


def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path, old = tmp_path / "state", random_cache()
    old.save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError):
            random_cache(slots=2**15, seed=1).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(STMCache.load(path), old)
    assert os.listdir(tmp_path) == ["state"]


def test_what_a_killed_save_left_goes_with_the_next_save(tmp_path, monkeypatch):
    path, temporary = tmp_path / "state", []
    monkeypatch.setattr(os, "fsync", lambda _: temporary.extend(set(os.listdir(tmp_path)) - {"state", "state.tmp"}))
    (tmp_path / "state.tmp").write_text("somebody's own file")
    random_cache().save(path)
    assert len(temporary) == 1
    (tmp_path / temporary[0]).write_bytes(b"half" * 10_000)
    random_cache(seed=1).save(path)
    assert sorted(os.listdir(tmp_path)) == ["state", "state.tmp"]
    assert_same(STMCache.load(path), random_cache(seed=1))
    assert (tmp_path / "state.tmp").read_text() == "somebody's own file"


def test_a_save_keeps_the_permissions_and_the_link(tmp_path):
    path, link = tmp_path / "state", tmp_path / "link"
    random_cache().save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    random_cache(seed=1).save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert_same(STMCache.load(path), random_cache(seed=1))


@pytest.mark.skipif(memory_file_rxt.fcntl is None, reason="concurrent saves to one path need fcntl")
def test_threads_may_save_to_one_path(tmp_path):
    path, caches = tmp_path / "state", [random_cache(seed=seed) for seed in range(4)]

    def save_often(cache):
        for _ in range(25):
            cache.save(path)
            STMCache.load(path)

    with ThreadPoolExecutor(max_workers=4) as executor:
        done = [executor.submit(save_often, cache) for cache in caches]
    assert [future.exception() for future in done] == [None] * 4
    assert any(torch.equal(STMCache.load(path).states, cache.states) for cache in caches)
    assert os.listdir(tmp_path) == ["state"]


# One process that imports torch once and forks the ones that are killed: cheap enough for fifty kills.
KILL_SCRIPT = """
import os, random, signal, sys, time
import torch
from rxt_hf.cache_rxt import STMCache

torch.set_num_threads(1)
path, kills = sys.argv[1], int(sys.argv[2])
versions = [STMCache(torch.full((1, 2, 64, 512), float(k)), k, "model-a") for k in (1, 2)]
versions[0].save(path)
pauses = random.Random(0)
interrupted = 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            for version in versions:
                version.save(path)
    time.sleep(0.004 + 0.02 * pauses.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = STMCache.load(path)
    assert torch.equal(loaded.states, versions[int(loaded.turns) - 1].states)
    interrupted += len(os.listdir(os.path.dirname(path))) > 1
versions[0].save(path)
print(interrupted, *os.listdir(os.path.dirname(path)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fifty_killed_saves_leave_the_old_or_the_new_version(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(cache_rxt.__file__)))
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILL_SCRIPT, str(tmp_path / "state"), "50"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    interrupted, *left = done.stdout.split()
    assert left == ["state"]
    # the kills did hit saves in the middle, so the test could have failed
    assert int(interrupted) > 0


def test_torch_load_takes_a_memory_without_trusting_the_file(tmp_path):
    cache = random_cache()
    torch.save({"memory": cache}, tmp_path / "memory.pt")
    assert_same(torch.load(tmp_path / "memory.pt", weights_only=True)["memory"], cache)
