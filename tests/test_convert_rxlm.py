# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints of the architecture's authors compute the numbers that their package computed.

The checkpoints are not part of this repository: RXT_GOLDEN names their folder, or it is `../shared/golden` beside it.
"""

import json
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.testing_utils import CaptureLogger

from rxt_hf.convert import rxlm
from rxt_hf.layers_rxt import rotary_tables

GOLDEN = Path(os.environ.get("RXT_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/io.safetensors"))
EOS, ANSWER = 2, 6

pytestmark = pytest.mark.skipif(not NAMES, reason=f"no checkpoints in {GOLDEN}")
each_checkpoint = pytest.mark.parametrize("name", NAMES)


@lru_cache
def converted(name):
    return rxlm.from_rxlm(GOLDEN / name, report=True)


@lru_cache
def recorded(name):
    return load_file(GOLDEN / name / "io.safetensors")


def our_layout(memory):
    return memory.transpose(0, 1).contiguous()


def logits(model, name, turn=0, memory=None):
    """Logits of one recorded interaction, and which of its tokens are real."""
    data = recorded(name)
    mask = data["full_mask"][turn]
    memory = our_layout(data["stm0"] if memory is None else memory)
    with torch.no_grad():
        output = model(data["full_ids"][turn], attention_mask=mask, stm_cache=memory)
    return output.logits, mask.bool()


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@each_checkpoint
def test_logits_are_those_of_the_package_in_the_first_turn_and_after_an_update(name):
    model, data = converted(name)[0], recorded(name)
    for turn, memory, key in ((0, None, "decoder_logits"), (1, data["stm_after"][0], "decoder_logits_turn2")):
        actual, is_token = logits(model, name, turn, memory)
        close(actual[is_token], data[key][is_token])


@each_checkpoint
def test_memory_encoder_states_are_those_of_the_package(name):
    model, data = converted(name)[0].model, recorded(name)
    embeds, mask = model.embed_tokens(data["full_ids"][0]), data["full_mask"][0]
    positions = torch.arange(mask.shape[1]).unsqueeze(0)
    with torch.no_grad():
        states = model.memory_encoder(embeds, mask.bool(), rotary_tables(*model.rotary_emb(embeds, positions)))
    for actual, expected in zip(states, data["encoder_hidden"][0], strict=True):
        close(actual[mask.bool()], expected[mask.bool()])


@each_checkpoint
def test_memory_after_three_updates_is_that_of_the_package(name):
    model, data = converted(name)[0], recorded(name)
    memory = our_layout(data["stm0"])
    for turn, expected in enumerate(data["stm_after"]):
        with torch.no_grad():
            memory = model.update_memory(memory, data["full_ids"][turn], data["full_mask"][turn])
        close(memory.states, our_layout(expected))


@each_checkpoint
def test_greedy_conversation_and_its_memory_are_those_of_the_package(name):
    model, data = converted(name)[0], recorded(name)
    for row in range(2):
        memory = our_layout(data["stm0"])[row : row + 1]
        for turn in range(3):
            query = data["query_ids"][turn, row][data["query_mask"][turn, row].bool()]
            prompt = torch.cat([query, torch.tensor([ANSWER])]).unsqueeze(0)
            # some of these random models end with [PAD] tokens, which generate would take for filling
            output = model.generate(prompt, stm_cache=memory, max_length=22, do_sample=False, pad_token_id=EOS)
            memory = output.stm_cache
            expected = data["greedy_ids"][turn, row][data["greedy_mask"][turn, row].bool()]
            assert output.sequences[0].tolist() == expected.tolist()
            close(memory.states[0], data["greedy_stm"][turn][:, row])


@each_checkpoint
def test_variant_of_the_memory_attention_is_the_true_one(name):
    expected = json.loads((GOLDEN / name / "meta.json").read_text())["true_memory_variant"]
    assert converted(name)[0].config.memory_attention_type == expected.replace("-", "_")


def test_variant_is_not_taken_from_the_configuration(tmp_path):
    folder = changed_copy(tmp_path, "dense_sqa_interlayer", memory_attention_variant="self-interlayer")
    assert rxlm.from_rxlm(folder).config.memory_attention_type == "interlayer"


@each_checkpoint
def test_every_tensor_of_the_file_is_mapped_or_dropped_with_a_reason(name):
    report = converted(name)[1]
    assert sorted([*report.mapped, *report.dropped]) == sorted(load_file(GOLDEN / name / "model.safetensors"))
    assert all(re.search(r"\.rope\.|\.stm\.memory$", key) and reason for key, reason in report.dropped.items())


def test_component_folders_are_the_whole_model(tmp_path):
    model, report = rxlm.from_rxlm(GOLDEN / "dense_sqa_interlayer" / "components", report=True)
    expected = converted("dense_sqa_interlayer")[0].state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert "mlm_head.dense.weight" in report.dropped


def test_converted_model_survives_saving_and_loading(tmp_path):
    model, _ = converted("beta_like")
    model.save_pretrained(tmp_path)
    close(logits(type(model).from_pretrained(tmp_path), "beta_like")[0], logits(model, "beta_like")[0], 0.0)


def test_conversion_warns_of_the_licence_of_the_weights():
    with CaptureLogger(rxlm.logger) as captured:
        rxlm.from_rxlm(GOLDEN / "mem_simple")
    assert "RAML" in captured.out and "non-commercial" in captured.out


# a whole class of tensors each: dense, stacked experts with shared ones, experts one by one, a learned status
DROPPABLE = ("dense_sqa_interlayer", "beta_like", "moe_perexpert_shared1", "gate_elem_slot_sig_linstatus")


@pytest.mark.parametrize("name", DROPPABLE)
def test_checkpoint_without_any_one_tensor_is_refused(name, monkeypatch):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    needed = [key for key in converted(name)[1].mapped if not key.endswith("model.embedding.weight")]
    accepted = []
    for key in needed:
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        monkeypatch.setattr(rxlm, "load_file", lambda path, rest=rest: rest)
        try:
            rxlm.from_rxlm(GOLDEN / name)
        except ValueError:
            continue
        accepted.append(key)
    assert len(needed) > 50 and not accepted


def changed_copy(folder, name, tensors=None, **options):
    """A checkpoint with other tensors (`None` removes one) and options (`component__option`, or of the whole)."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    for key, value in options.items():
        component, _, option = key.rpartition("__")
        (config[f"{component}_config"] if component else config)[option] = value
    state = load_file(GOLDEN / name / "model.safetensors") | (tensors or {})
    folder.mkdir(exist_ok=True)
    save_file({k: t.contiguous().clone() for k, t in state.items() if t is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LAYER = "decoder.model.layers.0"
REFUSED = {
    "unknown tensor": ({f"{LAYER}.attention.sink": torch.ones(2)}, {}, f"unknown tensor {LAYER}.attention.sink"),
    "unknown option": ({}, {"decoder__logit_scale": 2.0}, "decoder option logit_scale=2.0 is unknown"),
    "layer norm": ({f"{LAYER}.norm1.bias": torch.ones(32)}, {}, "LayerNorm"),
    "layer norm option": ({}, {"decoder__use_rms_norm": False}, "use_rms_norm=False"),
    "plain feed-forward": ({f"{LAYER}.ff.fc1.weight": torch.ones(48, 32)}, {}, "without a gate"),
    "memory norm": ({}, {"memory_attention__norm_type": "adaptive"}, "norm_type='adaptive'"),
    "linear attention": ({}, {"decoder__self_att_type": "gated_deltanet"}, "self_att_type='gated_deltanet'"),
    "grouped": ({}, {"memory_attention_variant": "grouped-self-interlayer"}, "grouped memory attention"),
    "rope base": ({}, {"encoder__rope_base": 100000}, "rope_base differs between components"),
    "rope base of the file": (
        {},
        {f"{part}__rope_base": 100000 for part in rxlm.COMPONENTS},
        "inv_freq is not that of rope_base=100000",
    ),
    "embeddings": ({"encoder.model.embedding.weight": torch.ones(64, 32)}, {}, "embeddings of different values"),
    "activation": ({}, {"encoder__ff_activation": "gelu"}, "ff_activation differs"),
    "head size": ({}, {"encoder__att_heads": 8}, "att_heads"),
    "no residual": ({}, {"memory_attention__disable_residual": True}, "disable_residual=True"),
    "NaN": (
        {"decoder.model.head.bias": torch.full((64,), torch.nan)},
        {},
        "NaN or infinity in decoder.model.head.bias",
    ),
    "shape": ({"decoder.model.head.bias": torch.ones(63)}, {}, "lm_head.bias would be [63]"),
    "gap": ({f"{LAYER[:-1]}7.norm1.weight": torch.ones(32)}, {}, "decoder.model.layers.2.norm1.weight is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_cannot_compute_is_refused_by_name(case, tmp_path):
    tensors, options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        rxlm.from_rxlm(changed_copy(tmp_path, "dense_sqa_interlayer", tensors, **options))


def test_all_that_is_unsupported_is_in_one_sentence(tmp_path):
    options = {"decoder__use_post_norm": True, "memory_attention__norm_type": "rms"}
    with pytest.raises(ValueError, match=r"use_post_norm=True; .*norm_type='rms'"):
        rxlm.from_rxlm(changed_copy(tmp_path, "dense_sqa_interlayer", **options))


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors"):
        rxlm.from_rxlm(tmp_path)
    shutil.copytree(GOLDEN / "dense_sqa_interlayer" / "components" / "decoder", tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"encoder/config\.json"):
        rxlm.from_rxlm(tmp_path)


def test_fewer_query_than_key_heads_are_tiled(tmp_path):
    key = f"{LAYER}.attention.q_proj.weight"
    one_head = {
        layer: load_file(GOLDEN / "dense_sqa_interlayer" / "model.safetensors")[layer][:8]
        for layer in (key, key.replace("layers.0", "layers.1"))
    }
    tiled = {layer: weight.repeat(2, 1) for layer, weight in one_head.items()}
    few = rxlm.from_rxlm(changed_copy(tmp_path / "few", "dense_sqa_interlayer", one_head))
    all_heads = rxlm.from_rxlm(changed_copy(tmp_path / "all", "dense_sqa_interlayer", tiled))
    close(logits(few, "dense_sqa_interlayer")[0], logits(all_heads, "dense_sqa_interlayer")[0], 0.0)


def stacked_form(tensors, layer):
    """Experts one by one as stacked ones, and the shared expert twice beside each other."""
    ff = f"decoder.model.layers.{layer}.ff"
    names = [f"{ff}.experts.{i}" for i in range(4)]
    shared = [f"{ff}.shared_experts.0"] * 2
    stacked = {key: None for key in tensors if key.startswith((f"{ff}.experts", f"{ff}.shared_experts"))}
    for prefix, parts in (("", names), ("shared_", shared)):
        for number, linear in (("1", "fc1.linear"), ("2", "fc2")):
            weights = torch.stack([tensors[f"{part}.{linear}.weight"].T for part in parts])
            stacked[f"{ff}.{prefix}w{number}"] = weights
            stacked[f"{ff}.{prefix}b{number}"] = torch.stack([tensors[f"{part}.{linear}.bias"] for part in parts])
    return stacked | {f"{ff}.shared_expert_gate.weight": torch.randn(2, 32)}


def test_stacked_experts_compute_what_the_same_experts_do_one_by_one(tmp_path):
    name = "moe_perexpert_shared1"
    tensors = load_file(GOLDEN / name / "model.safetensors")
    stacked = stacked_form(tensors, 0) | stacked_form(tensors, 1)
    options = {"decoder__moe_bias_mode": "local", "decoder__num_shared_experts": 2}
    model = rxlm.from_rxlm(changed_copy(tmp_path, name, stacked, **options))
    # two equal shared experts, mixed by weights that sum to one, are one
    assert model.config.num_shared_experts == 2
    close(logits(model, name)[0], logits(converted(name)[0], name)[0], 1e-5)


def test_one_bias_for_all_experts_keeps_its_size_where_shared_experts_are_weighted(tmp_path):
    folder = changed_copy(tmp_path, "beta_like", decoder__moe_use_weighted_shared_experts=True)
    model = rxlm.from_rxlm(folder)
    block = model.model.layers[2].mlp
    bias = load_file(folder / "model.safetensors")[f"{LAYER}.ff.global_bias"]
    assert block.routed_scale == pytest.approx(2 / 3)
    close(block.experts.down_proj_bias[0] * block.routed_scale, bias, 1e-6)


def test_memory_that_adds_its_self_attention_without_a_gate_is_exact_only_beside_tanh_gates(tmp_path):
    tensors = load_file(GOLDEN / "mem_self" / "model.safetensors")
    gone = {key: None for key in tensors if ".self_residual_gate_layers." in key}
    options = {"memory_attention__use_gate_for_self_attention": False}
    with pytest.raises(ValueError, match="plain sum"):
        rxlm.from_rxlm(changed_copy(tmp_path, "mem_self", gone, **options))
    options["memory_attention__use_tanh_residual_gate"] = True
    model = rxlm.from_rxlm(changed_copy(tmp_path, "mem_self", gone, **options))
    old, new = torch.randn(2, 1, 12, 32)
    close(model.model.memory_attention.layers[0].pre_gate(old, new), old + new, 1e-6)
