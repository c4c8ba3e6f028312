# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from rxt_hf import RxTConfig, RxTForCausalLM, RxTForPreTraining

from .models import tiny_config

ROLES = ("memory_encoder", "cross_attention", "memory_attention", "interlayer_attention")
SLIDING = ["sliding_attention", "full_attention"]
REFUSED = [
    ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ({"hidden_size": 0, "head_dim": 8}, "hidden_size must be at least 1, got 0"),
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
    ({"num_memory_slots": 0}, "num_memory_slots must be at least 1, got 0"),
    ({"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads must be at least 1, got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
    ({"memory_init_std": -1}, "memory_init_std must not be negative, got -1"),
    ({"num_experts": -1}, "num_experts must not be negative, got -1"),
    ({"num_shared_experts": -1}, "num_shared_experts must not be negative, got -1"),
    ({"layer_types": SLIDING}, "need a sliding_window"),
    ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
    ({"layer_types": ["global", "full_attention"]}, "global"),
    ({"head_dim": 7}, "head_dim must be even to be rotated, got 7"),
    ({"num_key_value_heads": 3}, r"num_attention_heads \(4\).*num_key_value_heads \(3\)"),
    *[({f"{role}_num_key_value_heads": 3}, rf"{role}_num_attention_heads \(4\).*\(3\)") for role in ROLES],
    ({"cross_attention_num_attention_heads": 0}, r"cross_attention_num_attention_heads \(0\)"),
    ({"memory_layers": []}, "memory_layers must name at least one"),
    ({"memory_layers": [2]}, r"memory_layers must be .*num_hidden_layers=2, got \[2\]"),
    ({"memory_layers": [1, 0]}, r"ascending.*got \[1, 0\]"),
    ({"memory_layers": [-1]}, r"got \[-1\]"),
    ({"no_rope_layers": [0, 0]}, r"no_rope_layers must be .*distinct.*got \[0, 0\]"),
    ({"moe_layers": [5], "num_experts": 2}, r"moe_layers must be .*got \[5\]"),
    ({"moe_layers": [0]}, r"moe_layers=\[0\] need num_experts"),
    ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok \(3\).*num_experts \(2\)"),
    ({"num_experts": 2, "num_experts_per_tok": 0}, r"num_experts_per_tok \(0\)"),
    ({"memory_gate_status": "mean"}, 'memory_gate_granularity="element" needs memory_gate_status="slot"'),
    ({"memory_gate_type": "elementwise", "memory_gate_granularity": "slot"}, 'got "slot"'),
    ({"memory_init": "learnt"}, "memory_init"),
    ({"memory_attention_type": "inter"}, "memory_attention_type"),
    ({"memory_gate_activation": "relu"}, "memory_gate_activation"),
    ({"memory_gate_granularity": "slots"}, "memory_gate_granularity"),
    ({"num_memory_slots": "5"}, "num_memory_slots"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[" ".join(map(str, fields)) for fields, _ in REFUSED])
def test_a_configuration_that_fits_no_model_is_refused_naming_the_field(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        tiny_config(**fields)


def test_a_dense_configuration_has_no_balancing_loss_whatever_its_file_says(tmp_path):
    assert tiny_config(router_aux_loss_coef=0.25).router_aux_loss_coef == 0.0
    assert tiny_config(router_aux_loss_coef=0.25, num_experts=2).router_aux_loss_coef == 0.25
    assert RxTConfig(num_experts=2).router_aux_loss_coef == 0.01
    tiny_config().save_pretrained(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text()) | {"router_aux_loss_coef": 0.01}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert RxTConfig.from_pretrained(tmp_path).router_aux_loss_coef == 0.0


def test_settings_of_training_in_an_old_file_are_dropped_by_name_and_cannot_be_set(tmp_path, caplog):
    old = {"bptt_turns": 3, "mlm_loss_coef": 0.5, "memory_noise_std": 0.1}
    config = RxTConfig.from_dict(tiny_config().to_dict() | old)
    assert config.to_dict() == tiny_config().to_dict()
    # what it was by default means nothing
    assert [record.message.split("=")[0] for record in caplog.records] == ["bptt_turns", "memory_noise_std"]
    assert "set_bptt_turns" in caplog.text and "RxTForPreTraining" in caplog.text
    with pytest.raises(AttributeError, match=r"bptt_turns is no field .*set_bptt_turns"):
        config.bptt_turns = 0
    with pytest.raises(ValueError, match=r"bptt_turns must not be negative, .*got -1"):
        RxTForCausalLM(config).set_bptt_turns(-1)
    with pytest.raises(ValueError, match="mlm_loss_coef must not be negative, got -1"):
        RxTForPreTraining(config, mlm_loss_coef=-1)


def test_the_auto_map_is_there_is_not_shared_and_is_saved_only_if_it_says_something(tmp_path):
    first, second = tiny_config(), tiny_config()
    assert first.auto_map == {} and "auto_map" not in first.to_dict() and "auto_map" not in first.to_diff_dict()
    first.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    first.auto_map["AutoConfig"] = "configuration_rxt.RxTConfig"
    first.save_pretrained(tmp_path)
    assert RxTConfig.from_pretrained(tmp_path).auto_map == first.auto_map
    assert second.auto_map == {}


def test_what_is_not_given_is_derived_from_what_is():
    config = tiny_config(num_key_value_heads=2, use_gated_attention=True, sliding_window=3)
    assert config.head_dim == 8
    assert config.memory_encoder_intermediate_size == config.moe_intermediate_size == 40
    assert config.shared_expert_intermediate_size == 40
    for role in ROLES:
        assert getattr(config, f"{role}_num_attention_heads") == 4
        assert getattr(config, f"{role}_num_key_value_heads") == 2
    assert config.use_gated_cross_attention is config.use_gated_memory_encoder_attention is True
    assert config.layer_types == ["sliding_attention"] * 2
    assert tiny_config().num_key_value_heads == 4
    assert tiny_config().layer_types == ["full_attention"] * 2


def test_what_is_given_is_kept():
    fields = {
        "head_dim": 16,
        "memory_encoder_intermediate_size": 3,
        "moe_intermediate_size": 5,
        "shared_expert_intermediate_size": 7,
        "use_gated_attention": True,
        "use_gated_cross_attention": False,
        "use_gated_memory_encoder_attention": False,
        "sliding_window": 3,
        "layer_types": SLIDING,
    }
    config = tiny_config(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("role", ROLES)
def test_fewer_heads_of_one_role_take_their_keys_and_values_along(role):
    config = tiny_config(**{f"{role}_num_attention_heads": 2})
    assert getattr(config, f"{role}_num_key_value_heads") == 2
    assert config.num_key_value_heads == 4


def test_memory_has_as_many_layers_as_read_it():
    assert tiny_config().num_memory_layers == 2
    assert tiny_config(num_hidden_layers=4, memory_layers=[1, 3]).num_memory_layers == 2
    assert tiny_config(num_hidden_layers=4).num_memory_layers == 4


def test_json_round_trip_keeps_every_field(tmp_path):
    config = tiny_config(
        memory_layers=[1],
        num_experts=3,
        moe_layers=[0],
        no_rope_layers=[1],
        sliding_window=4,
        layer_types=SLIDING,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        memory_init="random",
        memory_init_std=2,
        memory_gate_init=0.5,
        eos_token_id=[2, 3],
    )
    config.save_pretrained(tmp_path)
    for loaded in (RxTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RxTConfig
        for name in (field.name for field in dataclasses.fields(RxTConfig)):
            # the version is that of the writer
            if name != "transformers_version":
                assert getattr(loaded, name) == getattr(config, name), name
    assert RxTConfig.from_dict(config.to_dict()).to_json_string() == config.to_json_string()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 1, r"memory_layers must be .*num_hidden_layers=1, got \[0, 1\]"),
        ("num_memory_slots", 0, "num_memory_slots must be at least 1, got 0"),
        ("num_key_value_heads", 3, r"\(4\).*\(3\)"),
        ("memory_gate_status", "mean", "memory_gate_granularity"),
    ],
)
def test_a_field_set_afterwards_is_checked_when_a_model_is_built(name, value, message):
    config = tiny_config(memory_layers=[0, 1])
    setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        RxTForCausalLM(config)


def test_a_field_set_afterwards_to_another_kind_of_value_is_refused_at_once():
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="memory_init"):
        config.memory_init = "learnt"
    with pytest.raises(StrictDataclassError, match="num_memory_slots"):
        config.num_memory_slots = "many"


def test_local_experts_is_another_name_of_experts():
    config = tiny_config(num_experts=3)
    assert config.num_local_experts == 3
    config.num_local_experts = 2
    assert config.num_experts == 2


def test_sizes_in_the_documentation_are_those_of_the_model():
    model = RxTForCausalLM(RxTConfig(hidden_size=128, num_hidden_layers=2, num_memory_slots=32, vocab_size=50))
    assert model.init_stm(batch_size=1).states.shape == (1, 2, 32, 128)
