# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights in int8 (torchao, bitsandbytes) and in nf4 (bitsandbytes): they keep a memory, and train through it."""

import logging
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from rxt_hf import StateError, STMCache
from rxt_hf.convert.llm import freeze_base
from rxt_hf.fingerprint_rxt import fingerprints_match

from .models import close, random_ids, tiny_model

# the largest error of a matrix, as a share of its size (Frobenius norms)
KINDS = {"torchao int8": 0.01, "bitsandbytes int8": 0.01, "nf4": 0.15}
# these compute with the numbers that they have stored; bitsandbytes' int8 rounds the activations too
EXACT_KINDS = ("torchao int8", "nf4")
# bitsandbytes' nf4 on a CPU is right for rows of whole blocks only, which are 64 numbers
SIZES = {"hidden_size": 64, "intermediate_size": 128}
OPTIONS = {
    "plain": SIZES,
    "many parts": SIZES
    | {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "num_shared_experts": 2,
        "mlp_bias": True,
        "attention_bias": True,
        "use_gated_attention": True,
        "cross_attention_zero_init": True,
        "memory_attention_type": "self_interlayer",
        "memory_gate_status": "linear",
        "memory_gate_granularity": "slot",
    },
    "untied": SIZES | {"memory_gate_granularity": "slot", "lm_head_bias": True, "tie_word_embeddings": False},
}
# a list of one's own replaces transformers', which names a tied head
WHOLE_MEMORY = [r".*\.memory_\w+", "lm_head"]

each_kind = pytest.mark.parametrize("kind", KINDS)
each_exact_kind = pytest.mark.parametrize("kind", EXACT_KINDS)
each_model = pytest.mark.parametrize("name", ["many parts", "untied"])


def config_of(kind, skipped=None):
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    pytest.importorskip("bitsandbytes")
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """bitsandbytes tells of every product what it casts."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, options in OPTIONS.items():
        tiny_model(**options).save_pretrained(folder / name)
    return folder


@pytest.fixture
def load(folders):
    def load_quantised(kind, name="plain", skipped=None, dtype=torch.float32):
        config = config_of(kind, skipped)
        return AutoModelForCausalLM.from_pretrained(
            folders / name, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
        )

    return load_quantised


def is_quantised(parameter):
    return type(parameter) is not nn.Parameter


def numbers(model):
    """What the parameters stand for, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "Int8Tensor":
            parameter = parameter.dequantize()
        elif is_quantised(parameter):
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            module = model.get_submodule(name.rpartition(".")[0])
            parameter = dequantize_bnb_weight(parameter, getattr(module, "state", None))
        found[name] = parameter.detach().float().clone()
    return found


def float_model_of(model, name="plain"):
    """A float model with the numbers of a quantised one."""
    expected = tiny_model(**OPTIONS[name])
    expected.load_state_dict(numbers(model), strict=False)
    return expected


@torch.no_grad()
def conversation(model):
    """The memory after three turns, and the logits of a fourth under it."""
    memory = None
    for turn in range(3):
        memory = model.update_memory(memory, random_ids(2, 6, seed=turn))
    return memory.states, model(random_ids(2, 6, seed=3), stm_cache=memory).logits


# Loading


@each_kind
@each_model
def test_every_matrix_is_quantised_and_nothing_else_is_touched(load, kind, name):
    model, source = load(kind, name), tiny_model(**OPTIONS[name])
    linear = (nn.Linear,) if kind == "torchao int8" else ()
    expected = {
        f"{path}.weight"
        for path, module in source.named_modules()
        # bitsandbytes takes the plain class alone: gates over all slots, and outputs that start at zero, stay whole
        if (isinstance(module, linear) or type(module) is nn.Linear) and path != "lm_head"
    }
    found = {path for path, parameter in model.named_parameters() if is_quantised(parameter)}
    assert found == expected and len(found) > 40
    tied = source.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for path, value in numbers(model).items():
        original = source.get_parameter(path)
        if path in found:
            assert 0 < (value - original).norm() < KINDS[kind] * original.norm(), path
        else:
            assert torch.equal(value, original), path


@each_exact_kind
@each_model
def test_memory_and_logits_are_those_of_the_stored_numbers(load, kind, name):
    model = load(kind, name)
    for found, expected in zip(conversation(model), conversation(float_model_of(model, name)), strict=True):
        close(found, expected, 1e-4)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conversation_goes_on_over_turns_and_files(tmp_path, load, kind, dtype):
    model = load(kind, dtype=dtype)
    memory = model.init_stm(2)
    assert memory.dtype == dtype
    for turn in range(3):
        ids = random_ids(2, 6, seed=turn)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, stm_cache=memory, **options)
        behind = model.generate(ids, stm_cache=memory, update_memory="async", **options)
        assert torch.equal(out.sequences, behind.sequences)
        assert torch.equal(out.stm_cache.states, behind.stm_cache.states)
        assert torch.equal(out.stm_cache.states, model.update_memory(memory, out.sequences).states)
        out.stm_cache.save(tmp_path / "memory")
        memory = STMCache.load(tmp_path / "memory", model=model)
    assert memory.turns.tolist() == [3, 3]
    with torch.no_grad():
        read, cleared = (model(ids, stm_cache=given).logits for given in (memory, model.init_stm(2)))
    assert (read - cleared).abs().max() > 1e-2


@each_kind
@each_model
def test_a_quantised_model_that_has_been_used_is_saved_and_loaded_bit_for_bit(tmp_path, load, kind, name):
    model = load(kind, name)
    stored, expected = numbers(model), conversation(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert fingerprints_match(loaded.memory_fingerprint(), model.memory_fingerprint())
    # to save a model changes nothing of it either
    for same in (loaded, model):
        assert all(torch.equal(value, stored[path]) for path, value in numbers(same).items())
        for found in zip(conversation(same), expected, strict=True):
            close(*found, 1e-5)


# Whose memory it is


@each_kind
def test_a_fingerprint_stays_through_use_and_dtype(load, kind):
    model = load(kind)
    fingerprint = model.memory_fingerprint()
    conversation(model)
    assert fingerprints_match(model.memory_fingerprint(), fingerprint)
    assert fingerprints_match(load(kind, dtype=torch.bfloat16).memory_fingerprint(), fingerprint)


@each_kind
def test_a_quantised_model_refuses_the_memory_of_the_float_model_and_the_other_way_round(tmp_path, load, kind):
    model, source = load(kind), tiny_model(**SIZES)
    for writer, reader in ((source, model), (model, source)):
        memory = writer.init_stm(1)
        memory.save(tmp_path / "memory")
        with pytest.raises(StateError, match="fingerprint"):
            STMCache.load(tmp_path / "memory", model=reader)
        # whoever wants it says so
        adopted = STMCache(memory.states, memory.turns, reader.memory_fingerprint())
        adopted.save(tmp_path / "memory")
        assert STMCache.load(tmp_path / "memory", model=reader).turns.tolist() == [0]


def test_every_kind_and_every_model_has_a_fingerprint_of_its_own(load):
    prints = [tiny_model(**SIZES).memory_fingerprint()]
    prints += [load(kind, name).memory_fingerprint() for kind in KINDS for name in ("plain", "untied")]
    prints += [load(kind, skipped=WHOLE_MEMORY).memory_fingerprint() for kind in KINDS]
    assert len(set(prints)) == len(prints)


# Training


def with_adapter(model, **fields):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
    fields = {"target_modules": projections, "task_type": "CAUSAL_LM"} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=4, **fields))


def episode():
    """Two conversations of three turns; only the last is a target, so that the rest is reached through the memory."""
    ids = random_ids(2, 3, 6)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels}


def gradients(model):
    model.zero_grad()
    model(**episode()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind, recompute", [("torchao int8", False), ("nf4", True)])
def test_gradients_through_the_memory_are_those_of_the_stored_numbers(load, kind, recompute):
    quantised = load(kind)
    # generate comes first, as in a training that is evaluated
    conversation(quantised)
    pair = []
    for model in (quantised, float_model_of(quantised)):
        adapted = with_adapter(model, init_lora_weights=False).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        pair.append(adapted)
    pair[1].load_state_dict({name: value for name, value in pair[0].state_dict().items() if "lora" in name}, False)
    found, expected = map(gradients, pair)
    written = [name for name in found if "memory_attention" in name or "memory_encoder" in name]
    assert len(written) > 20
    for name, value in found.items():
        assert value.abs().max() > 1e-6, name
        close(value, expected[name], 1e-4 * max(1.0, expected[name].abs().max().item()))


@each_kind
def test_an_adapter_learns_an_episode_on_a_base_that_stays_bit_for_bit(load, kind):
    model = with_adapter(load(kind))
    base = {name: value for name, value in numbers(model).items() if "lora" not in name}
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(adapters, lr=3e-2), []
    model.train()
    for _ in range(2):
        loss = model(**episode()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert model(**episode()).loss < losses[1] < losses[0]
    after = numbers(model)
    assert all(torch.equal(after[name], value) for name, value in base.items())


@each_kind
def test_a_memory_left_whole_is_trained_on_a_quantised_base(load, kind):
    model = load(kind, skipped=WHOLE_MEMORY)
    trained = freeze_base(model)
    quantised = {name for name, parameter in model.named_parameters() if is_quantised(parameter)}
    assert len(quantised) == 14 and not quantised & set(trained)
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if name in trained)
    assert gradients(model.train()).keys() == set(trained)


@each_kind
def test_a_quantised_memory_is_not_trained_as_it_is(load, kind):
    with pytest.raises(ValueError, match=r"memory_cross_attn.*modules_to_not_convert"):
        freeze_base(load(kind))
