# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes on a CPU train every stage as one process does that sees the same batches."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rxt_hf import RxTForCausalLM
from rxt_hf.training.stages import STAGES

from .distributed_run import ALL, BATCH_SIZE, STEPS, collator_for, main, rows_of
from .models import close, tiny_model

WRAPPED = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPRxT",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The model that all runs start from."""
    folder = tmp_path_factory.mktemp("start")
    experts = {"num_experts": 3, "moe_intermediate_size": 16, "moe_layers": [1], "output_router_logits": True}
    tiny_model(router_aux_loss_coef=0.5, **experts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    main("none", "False", str(start), str(folder))
    return folder


def run_two_processes(wrapper, checkpointing, start, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed_run", wrapper, str(checkpointing), str(start), str(folder)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-5000:]


def found_in(folder):
    """What a run left: its losses, what wrapped the model, and the weights, which any of the classes can load."""
    run = json.loads((folder / "run.json").read_text())
    model, info = RxTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return run["losses"], run["wrapped"], model.state_dict()


def assert_same_run(found, expected, start):
    losses, _, weights = found
    expected_losses, _, expected_weights = expected
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, abs=1e-5, rel=0)
    assert max((expected_weights[name] - tensor).abs().max() for name, tensor in start.items()) > 1e-3
    for name, tensor in expected_weights.items():
        close(weights[name], tensor)


@pytest.mark.parametrize(
    "wrapper, checkpointing",
    [
        pytest.param(
            wrapper, checkpointing, marks=[] if (wrapper, checkpointing) == ("ddp", False) else pytest.mark.slow
        )
        for wrapper in WRAPPED
        for checkpointing in (False, True)
    ],
)
def test_two_processes_train_every_stage_as_one_does(start, one_process, tmp_path, wrapper, checkpointing):
    if wrapper.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("ZeRO needs DeepSpeed, which no extra installs: at its first run it compiles C++ of its own.")
    run_two_processes(wrapper, checkpointing, start, tmp_path)
    before = RxTForCausalLM.from_pretrained(start).state_dict()
    for stage in ALL:
        found = found_in(tmp_path / stage)
        assert found[1].startswith(WRAPPED[wrapper])
        assert_same_run(found, found_in(one_process / stage), before)
    if wrapper != "fsdp2":
        whole, resumed = found_in(tmp_path / "whole"), found_in(tmp_path / "resumed")
        # no weights: Adam makes steps of rounding errors
        assert whole[0] == pytest.approx(found_in(one_process / "whole")[0], abs=1e-5, rel=0)
        # the log of a resumed run holds that of the steps before
        assert resumed[0] == whole[0]
        assert all(torch.equal(tensor, whole[2][name]) for name, tensor in resumed[2].items())


def test_data_differ_between_the_two_processes_in_the_number_of_turns():
    """Where parameters are sharded, layers that one process calls more often than the other would wait for ever."""
    turns = [len(row["labels"]) for row in rows_of("memory_aware")]
    halves = [turns[place : place + BATCH_SIZE // 2] for place in range(0, len(turns), BATCH_SIZE // 2)]
    assert any(max(one) != max(other) for one, other in zip(halves[::2], halves[1::2], strict=True))


@pytest.mark.parametrize("stage", ["pretraining", "finetuning", "memory_attention"])
def test_a_batch_that_is_the_whole_step_has_the_loss_of_a_call_without_the_steps_count(start, stage):
    model, collate = STAGES[stage][0].from_pretrained(start), collator_for(stage)
    batch = collate(rows_of(stage)[:BATCH_SIZE])
    # as the Trainer counts: no label of a first token is a target
    count = batch["labels"][..., 1:].ne(-100).sum()
    close(model(**batch, num_items_in_batch=count).loss, model(**batch).loss, 1e-6)
