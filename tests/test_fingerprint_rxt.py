# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A memory belongs to the weights in effect: the fingerprint changes with what they write, and with nothing else."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rxt_hf
from rxt_hf import RxTSession, StateError, STMCache
from rxt_hf.fingerprint_rxt import _known, fingerprints_match
from rxt_hf.hub import export_memory, load_memory

from .models import close, random_ids, random_memory, tiny_model

peft = pytest.importorskip("peft")
# peft itself still uses the former name
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft", "ignore::UserWarning:accelerate"
)


def same(*models):
    return fingerprints_match(*(model.memory_fingerprint() for model in models))


def disturb(model, scale=0.05):
    """Moves all that an adapter trains, without a trace in the version of any tensor."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def adapted(**config):
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, lora_alpha=8, **config), adapter_name="first").eval()


@pytest.fixture
def two_adapters():
    model = adapted(lora_dropout=0.5)
    disturb(model)
    model.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=8))
    model.set_adapter("second")
    disturb(model)
    model.set_adapter("first")
    return model


# ---- adapters


def test_the_active_adapter_is_what_counts(two_adapters, tmp_path):
    model, prints = two_adapters, {"base": tiny_model().memory_fingerprint()}
    for name in ("first", "second"):
        model.set_adapter(name)
        prints[name] = model.memory_fingerprint()
    with model.disable_adapter():
        assert fingerprints_match(model.memory_fingerprint(), prints["base"])
    pairs = [("first", "second"), ("first", "base"), ("second", "base")]
    assert not any(fingerprints_match(prints[left], prints[right]) for left, right in pairs)

    model.set_adapter("first")
    model.init_stm(1).save(tmp_path / "first.stm")
    model.set_adapter("second")
    with pytest.raises(StateError, match="fingerprint"):
        STMCache.load(tmp_path / "first.stm", model=model)
    model.set_adapter("first")
    model.delete_adapter("second")
    assert model.memory_fingerprint() == prints["first"]
    merged = model.merge_and_unload()
    assert STMCache.load(tmp_path / "first.stm", model=merged).turns.tolist() == [0]
    assert not fingerprints_match(merged.memory_fingerprint(), prints["base"])


def test_an_adapter_that_has_not_been_trained_takes_the_memory_of_the_base(tmp_path):
    memory = tiny_model().update_memory(None, random_ids(1, 6)).detach()
    memory.save(tmp_path / "base.stm")
    model = adapted()
    loaded = STMCache.load(tmp_path / "base.stm", model=model)
    assert STMCache.cat([loaded, model.init_stm(1)]).batch_size == 2
    disturb(model)
    with pytest.raises(StateError, match="fingerprint"):
        STMCache.load(tmp_path / "base.stm", model=model)
    with pytest.raises(ValueError, match="fingerprint"):
        STMCache.cat([loaded, model.init_stm(1)])


def test_a_merge_that_nothing_looked_at_before_is_seen():
    model = tiny_model()
    before = model.memory_fingerprint()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4))
    disturb(wrapped)
    assert wrapped.merge_and_unload() is model
    assert not fingerprints_match(model.memory_fingerprint(), before)


KINDS = {
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "whole module": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["memory_attention"]),
    "parameter": lambda: peft.LoraConfig(target_modules=["q_proj"], target_parameters=["write_gate.gate_bias"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[17, 18]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_counts_once_it_is_trained(kind):
    base, model = tiny_model(), peft.get_peft_model(tiny_model(), KINDS[kind]()).eval()
    fresh = model.memory_fingerprint()
    # an adapter with rows of its own is held for trained, however its rows stand
    assert fingerprints_match(fresh, base.memory_fingerprint()) == (kind != "tokens")
    disturb(model)
    assert not same(model, base)
    assert not fingerprints_match(model.memory_fingerprint(), fresh)
    with model.disable_adapter():
        assert same(model, base)


def test_a_memory_of_other_weights_is_taken_on_demand_and_only_in_the_right_shape(tmp_path):
    writer, reader = tiny_model(), tiny_model(seed=1)
    memory = writer.init_stm(1)
    folder = export_memory(memory, tmp_path / "memory", description="nothing", base_model="m")
    with pytest.raises(StateError, match="fingerprint"):
        load_memory(folder, reader)
    for taken in (
        load_memory(folder, reader, allow_other_weights=True),
        STMCache.from_bytes(memory.to_bytes(), model=reader, allow_other_weights=True),
    ):
        assert torch.equal(taken.states, memory.states)
        assert taken.fingerprint == reader.memory_fingerprint()
    with pytest.raises(StateError, match="num_memory_slots"):
        load_memory(folder, tiny_model(num_memory_slots=6), allow_other_weights=True)


# ---- what changes it and what does not


def test_fingerprint_follows_weights_that_change_in_place_and_stays_otherwise():
    model = tiny_model()
    before, weights = model.memory_fingerprint(), copy.deepcopy(model.state_dict())
    model(random_ids(1, 2, 6), labels=random_ids(1, 2, 6)).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    assert not fingerprints_match(model.memory_fingerprint(), before)
    model.load_state_dict(weights)
    assert model.memory_fingerprint() == before
    assert model.train().memory_fingerprint() == before
    assert fingerprints_match(model.to(torch.bfloat16).memory_fingerprint(), before)


def test_fingerprint_is_the_same_where_training_drops_out_and_draws_no_random_number():
    model = tiny_model(attention_dropout=0.5)
    before = model.memory_fingerprint()
    model.train()
    model.model.embed_tokens.weight.data += 0.0
    _known.clear()
    torch.manual_seed(0)
    assert model.memory_fingerprint() == before
    found = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(1))
    with torch.autocast("cpu", torch.bfloat16):
        _known.clear()
        assert model.memory_fingerprint() == before


def test_what_only_reads_does_not_count():
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.mul_(1.5)
    assert same(model, other)
    assert model.memory_fingerprint() != other.memory_fingerprint()


def test_fingerprint_of_an_earlier_release_names_the_same_weights():
    model = tiny_model()
    fingerprint = model.memory_fingerprint()
    earlier = fingerprint.split(":")[1]
    assert len(earlier) == 64
    assert fingerprints_match(earlier, fingerprint)
    assert fingerprints_match(fingerprint, earlier)
    assert not fingerprints_match("0" * 64, fingerprint)
    trained = adapted()
    disturb(trained)
    assert not fingerprints_match(earlier, trained.memory_fingerprint())


def test_demo_memories_of_the_earlier_release_load():
    model = AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO)
    earlier = "97c56c2357d33c46ba220a61ca11b55e1bc4b48d735f5f3a76a55784e72d7b2c"
    data = STMCache(model.init_stm(1).states, 1, earlier).to_bytes()
    assert STMCache.from_bytes(data, model=model).turns.tolist() == [1]


@pytest.mark.parametrize(
    "found", ["", "write", "write:::2:", "write:a:float32:0:AAAA", "write:a:int3:1:AAAAAA==", "a:b"]
)
def test_a_fingerprint_that_no_model_has_matches_none(found):
    assert not fingerprints_match(found, tiny_model().memory_fingerprint())
    assert fingerprints_match(found, found)
    assert not fingerprints_match(None, found)


def test_nothing_of_a_fingerprint_stays_on_the_model_or_keeps_it_alive():
    model = tiny_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    fingerprint = model.memory_fingerprint()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.memory_fingerprint() == fingerprint
    held = len(_known)
    del model, copied
    gc.collect()
    assert len(_known) < held


def test_threads_ask_for_the_fingerprint_while_others_write():
    model, wrong = tiny_model(), []
    expected, memory, ids = model.memory_fingerprint(), random_memory(model, 1), random_ids(1, 6)
    written = model.update_memory(memory, ids).states

    def run():
        for turn in range(200):
            if turn % 20 == 0:
                _known.clear()
            wrong.append(model.init_stm(1).fingerprint != expected)
            with torch.no_grad():
                wrong.append(not torch.equal(model.update_memory(memory, ids).states, written))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 800
    assert not any(wrong)


# ---- offloaded weights

PARTS = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb", "memory_encoder", "memory_attention"]
PARTS = [f"model.{part}" for part in [*PARTS, "initial_memory"]] + ["lm_head"]


def offloaded(way, folder):
    if way == "cpu_offload":
        accelerate = pytest.importorskip("accelerate")
        model = AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO)
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    on_disk = PARTS if way == "all on disk" else ["model.layers.1"]
    device_map = {part: "disk" if part in on_disk else "cpu" for part in PARTS} | {"model.rotary_emb": "cpu"}
    return AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO, device_map=device_map, offload_folder=folder)


@pytest.mark.parametrize("way", ["cpu_offload", "one layer on disk", "all on disk"])
def test_offloaded_model_holds_the_same_conversation(way, tmp_path):
    model, tokenizer = offloaded(way, tmp_path / "weights"), AutoTokenizer.from_pretrained(rxt_hf.DEMO)
    whole = AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO)
    texts, sessions = ["My dog is called Rex.", "What is my dog called?"], []
    for each, options in ((whole, {}), (model, {}), (model, {"update_memory": "async"})):
        sessions.append(RxTSession(each, tokenizer, **options))
        assert [sessions[-1].send(text) for text in texts][1] == "Your dog's name is Rex."
    for session in sessions[1:]:
        close(session.stm_cache.states, sessions[0].stm_cache.states, 1e-6)
    assert model.memory_fingerprint() == whole.memory_fingerprint()
    assert model.device.type == "cpu"
    ids = random_ids(1, 4)
    assert torch.equal(model.generate(ids, max_new_tokens=2), whole.generate(ids, max_new_tokens=2))
    assert model.generate(max_new_tokens=1, return_dict_in_generate=True).stm_cache.turns.tolist() == [1]
    sessions[1].save(tmp_path / "chat.stm")
    assert RxTSession.load(tmp_path / "chat.stm", whole, tokenizer).turns == 2


def test_weights_that_are_nowhere_are_said_to_be_offloaded():
    with torch.device("meta"):
        model = rxt_hf.RxTForCausalLM(tiny_model().config)
    for use in (model.init_stm, model.memory_fingerprint):
        with pytest.raises(ValueError, match="offloaded"):
            use()
