# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo.facts import generate_dialogue
from transformers import AutoModelForCausalLM, AutoTokenizer

from rxt_hf import DEMO, graphs
from rxt_hf.graphs import OnnxRxT, RxTGraphs, TurnRunner, export_graphs

from .models import EXPERTS, IN_PASSING, close, random_ids, random_memory, tiny_model

PROMPT, ANSWER = 9, 7
VARIANTS = {
    "window": {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 4,
        "num_key_value_heads": 2,
        "cross_attention_num_key_value_heads": 2,
        "memory_layers": [1],
    },
    "choice": {
        **IN_PASSING,
        "num_memory_slots": 12,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "memory_layers": [1, 2],
        "memory_init": "zeros",
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "experts": {**EXPERTS, "memory_init": "random", "memory_attention_type": "interlayer"},
}


def prompts(turn):
    """Prompts shorter than the graphs', of two lengths."""
    ids = random_ids(2, PROMPT - 1, seed=turn)
    mask = torch.ones_like(ids)
    ids[turn % 2, :3], mask[turn % 2, :3] = 0, 0
    return ids, mask


def model_of(variant):
    model = tiny_model(**VARIANTS[variant])
    model.set_attn_implementation("eager" if variant == "experts" else "sdpa")
    model.set_experts_implementation("batched_mm")
    # an end that one row's answer reaches early
    ids, mask = prompts(0)
    answers = model.generate(
        ids, attention_mask=mask, stm_cache=random_memory(model), max_new_tokens=4, eos_token_id=None
    )
    model.generation_config.eos_token_id = [49, int(answers.sequences[0, -1])]
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request) -> tuple[torch.nn.Module, RxTGraphs]:
    model = model_of(request.param)
    return model, export_graphs(model, batch_size=2, prompt_length=PROMPT, answer_length=ANSWER)


def answers_as_the_model(runner: TurnRunner, model, turns=3):
    """Plays the same turns on both, and gives the lengths of the answers."""
    memory = random_memory(model)
    stm, lengths = memory.states, set()
    for turn in range(turns):
        ids, mask = prompts(turn)
        out = model.generate(ids, attention_mask=mask, stm_cache=memory, max_new_tokens=ANSWER - turn)
        sequences, stm = runner.generate(ids, mask, stm, max_new_tokens=ANSWER - turn)
        assert torch.as_tensor(sequences).tolist() == out.sequences.tolist()
        close(torch.as_tensor(stm), out.stm_cache.states)
        memory = out.stm_cache
        lengths |= {int((row != 0).sum()) for row in out.sequences[:, ids.shape[1] :]}
    assert len(lengths) > 1
    return lengths


def test_turns_are_those_of_generate_for_padded_rows_that_end_at_different_lengths(exported):
    model, turn_graphs = exported
    answers_as_the_model(turn_graphs, model)


def test_a_turn_starts_from_the_initial_memory_and_leaves_a_given_one_as_it_was(exported):
    model, turn_graphs = exported
    ids, mask = prompts(0)
    if model.config.memory_init == "random":
        with pytest.raises(ValueError, match=r'memory_init="random".*pass stm'):
            turn_graphs.generate(ids, mask)
    else:
        initial = model.init_stm(2).states
        assert torch.equal(turn_graphs.generate(ids, mask)[1], turn_graphs.generate(ids, mask, initial)[1])
        assert torch.equal(initial, model.init_stm(2).states)


def test_graphs_share_the_weights_of_the_model(exported):
    model, turn_graphs = exported
    for graph in graphs.GRAPHS:
        shared = getattr(turn_graphs, graph).state_dict["model.lm_head.weight"]
        assert shared.data_ptr() == model.lm_head.weight.data_ptr()


def linear_layers(program):
    """Weight and output shape of each linear layer of a graph."""
    parameters = program.graph_signature.inputs_to_parameters
    nodes = [node for node in program.graph.nodes if node.target == torch.ops.aten.linear.default]
    return {parameters[node.args[1].name]: tuple(node.meta["val"].shape) for node in nodes}


def test_a_step_computes_one_token_and_nothing_of_the_memory(exported):
    model, turn_graphs = exported
    prefill, decode = linear_layers(turn_graphs.prefill), linear_layers(turn_graphs.decode)
    memory = {name for name in prefill if "memory_cross_attn.k_proj" in name or "memory_cross_attn.v_proj" in name}
    assert memory or model.config.memory_reading == "joint"
    assert set(decode) == set(prefill) - memory
    assert {shape[:-1] for name, shape in decode.items() if "attn" in name} == {(2, 1)}
    assert prefill["model.lm_head.weight"][:-1] == (2,)


def test_a_row_without_a_token_keeps_its_memory(exported):
    model, turn_graphs = exported
    stm, ids = random_memory(model).states, random_ids(2, PROMPT + ANSWER)
    mask = torch.ones_like(ids)
    mask[0] = 0
    (new_stm,) = turn_graphs.run("update", stm, ids, mask)
    assert torch.equal(new_stm[0], stm[0])
    close(new_stm, model.update_memory(stm, ids, mask).states)


@pytest.mark.parametrize("exported", ["window"], indirect=True)
def test_a_saved_program_computes_the_same(exported, tmp_path):
    model, turn_graphs = exported
    loaded = {}
    for graph in graphs.GRAPHS:
        torch.export.save(getattr(turn_graphs, graph), tmp_path / "graph.pt2")
        loaded[graph] = torch.export.load(tmp_path / "graph.pt2")
    ids, mask = prompts(0)
    stm = random_memory(model).states
    for actual, expected in zip(
        replace(turn_graphs, **loaded).generate(ids, mask, stm), turn_graphs.generate(ids, mask, stm), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": random_ids(1, 4)}, r"\(1, 4\) does not fit graphs of \(2, 1 to 9\)"),
        ({"input_ids": random_ids(2, PROMPT + 1)}, r"\(2, 10\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, "pad on the left"),
        ({"stm": torch.zeros(2, 1, 5, 31)}, r"\[2, 1, 5, 31\]"),
        ({"max_new_tokens": ANSWER + 1}, "max_new_tokens=8.* 7"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
    ids=["rows", "tokens", "right padding", "memory", "answer", "no answer"],
)
def test_what_does_not_fit_the_shapes_is_refused(exported, changed, message):
    model, turn_graphs = exported
    turn = {"input_ids": random_ids(2, 4), "stm": random_memory(model).states, **changed}
    with pytest.raises(ValueError, match=message):
        turn_graphs.generate(**turn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_attn_implementation": "flash_attention_2"}, r'flash_attention_2 .*set_attn_implementation\("sdpa"\)'),
        ({"num_experts": 4, "_experts_implementation": "grouped_mm"}, r'grouped_mm .*\("batched_mm"\)'),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
        ({"max_position_embeddings": 15}, "= 16 tokens .*max_position_embeddings=15"),
    ],
    ids=["flash", "experts", "rope", "length"],
)
def test_models_without_fixed_graphs_are_refused_by_name(settings, message):
    model = tiny_model()
    for name, value in settings.items():
        # past the setters, which ask whether the kernel is installed
        object.__setattr__(model.config, f"{name}_internal" if name.startswith("_") else name, value)
    with pytest.raises(ValueError, match=message):
        export_graphs(model, prompt_length=PROMPT, answer_length=ANSWER)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        export_graphs(tiny_model().train())


def test_a_missing_package_is_one_sentence_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=r"^Without onnxruntime .* pip install 'rxt_hf\[onnx\]'$"):
        OnnxRxT(tmp_path)
    with pytest.raises(ImportError, match=r"^Without onnx and onnxscript "):
        RxTGraphs(None, None, None, {}).save_onnx(tmp_path)
    assert not list(tmp_path.iterdir())


def test_bfloat16_which_numpy_lacks_is_refused_for_onnx(monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "find_spec", lambda package: package)
    half: Any = SimpleNamespace(state_dict=tiny_model().bfloat16().state_dict())
    with pytest.raises(ValueError, match=r"bfloat16.*model\.float\(\)"):
        RxTGraphs(half, half, half, {}).save_onnx(tmp_path)


def onnx_of(turn_graphs, folder) -> OnnxRxT:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return OnnxRxT(turn_graphs.save_onnx(folder))


@pytest.mark.slow
def test_onnx_turns_are_those_of_generate(exported, tmp_path):
    model, turn_graphs = exported
    runner = onnx_of(turn_graphs, tmp_path / "new" / "folder")
    answers_as_the_model(runner, model)
    settings = json.loads((tmp_path / "new" / "folder" / "rxt.json").read_text())
    assert settings == turn_graphs.settings
    assert settings["eos_token_ids"] == model.generation_config.eos_token_id


@pytest.mark.slow
def test_demo_in_onnx_says_and_remembers_the_same_over_twenty_turns(tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO).eval(), AutoTokenizer.from_pretrained(DEMO)
    turn_graphs = export_graphs(model, prompt_length=32, answer_length=32)
    runner = onnx_of(turn_graphs, tmp_path)
    memory, stm, program_stm = model.init_stm(), None, None
    for turn in generate_dialogue(7, split="seen", num_turns=20)["interactions"]:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn["query"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**inputs, stm_cache=memory, max_new_tokens=32)
        memory = out.stm_cache
        sequences, stm = runner.generate(inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), stm)
        program_sequences, program_stm = turn_graphs.generate(**inputs, stm=program_stm)
        assert sequences.tolist() == program_sequences.tolist() == out.sequences.tolist()
    close(torch.from_numpy(stm), memory.states, 1e-4)
    close(program_stm, memory.states, 1e-4)
