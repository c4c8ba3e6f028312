# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of earlier versions are read, and mean what they meant. What wrote them lies beside them in `fixtures`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rxt_hf import STMCache

from .models import close

FOLDER = Path(__file__).parent / "fixtures" / "0_1_0"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
QUERIES = EXPECTED["queries"]

# peft itself still uses the former name
IGNORED = "ignore:.*gradient_checkpointing:FutureWarning"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(IGNORED)]


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model").eval()


def answers(model, stm_cache, queries):
    """Tokens of the answers to some queries, one after the other, and the memory after them."""
    tokenizer, found = AutoTokenizer.from_pretrained(FOLDER / "model"), []
    for query in queries:
        messages = [{"role": "user", "content": query}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(
            **inputs,
            stm_cache=stm_cache,
            min_new_tokens=8,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
        )
        found.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        stm_cache = out.stm_cache
    return found, stm_cache


def test_a_folder_answers_and_writes_as_it_did(model):
    found, memory = answers(model, model.init_stm(1), QUERIES[:2])
    assert found == EXPECTED["first"]
    saved = STMCache.load(FOLDER / "memory.safetensors", model)
    close(memory.states, saved.states)
    assert memory.turns.tolist() == saved.turns.tolist() == EXPECTED["turns"]


@pytest.mark.parametrize("file", ["memory.safetensors", "memory_int8.safetensors"])
def test_a_memory_goes_on_as_it_did(model, file):
    assert answers(model, STMCache.load(FOLDER / file, model), QUERIES[2:])[0] == EXPECTED["then"]
    # which the question alone does not bring about
    assert answers(model, None, QUERIES[2:])[0] != EXPECTED["then"]


def test_an_adapter_answers_as_it_did(model):
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(model, FOLDER / "adapter").eval()
    assert answers(adapted, None, QUERIES)[0] == EXPECTED["adapted"] != EXPECTED["first"] + EXPECTED["then"]


def test_an_episode_has_the_loss_and_the_gradient_that_it_had(model):
    # a field of the configuration then
    model.set_bptt_turns(2)
    ids = torch.tensor([EXPECTED["first"] * 2])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(EXPECTED["loss"], rel=1e-5)
    assert model.get_input_embeddings().weight.grad.norm().item() == pytest.approx(EXPECTED["gradient"], rel=1e-4)
