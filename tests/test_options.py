# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of stages and options: what each model is trained on, and what is kept of a stopped run."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from demo.facts import corpus_texts
from tables import OPTION_FIGURES

from rxt_hf.chat_template import train_tokenizer

STAGES = "stages 1 + 2 + 3"


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "options.py"
    spec = importlib.util.spec_from_file_location("options_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TURNS_PER_STEP = 16
    module.MODEL |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    # a model that has learnt nothing does not end its answers
    module.recall = partial(module.recall, max_new_tokens=2)
    module.CASES = {"seen": {8: 2, 16: 2, 32: 2}, "unseen": {8: 2}}
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus_texts(300), vocab_size=800, max_length=128)


def test_every_option_is_another_model_and_every_stage_takes_its_share_of_the_steps(benchmark, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        benchmark, "train", lambda model, stage, data, folder, seed: seen.append((type(model).__name__, stage, data))
    )
    episodes = list(benchmark.dialogues(tokenizer, 1, 100))
    configs = set()
    for option in benchmark.OPTIONS.values():
        seen.clear()
        model, _ = benchmark.trained(tokenizer, option, episodes, 1)
        assert sum(len(data) for *_, data in seen) == 100 and seen[-1][:2] == ("RxTForCausalLM", "memory_aware")
        configs.add((json.dumps(model.config.to_diff_dict(), sort_keys=True), model.model.bptt_turns))
        if "stages" in option:
            assert [stage for _, stage, _ in seen[:-1]] == list(option["stages"])
            # stage 1 learns from every token, stage 2 from answers
            pretraining, finetuning = (batch["labels"] == -100 for batch in (seen[0][2][0], seen[1][2][0]))
            assert finetuning.float().mean() > 0.5 > pretraining.float().mean()
    # stages change the weights, nothing else
    assert len(configs) == len(benchmark.OPTIONS) - 2


def test_dialogues_of_a_seed_are_the_same_for_every_option_and_differ_between_seeds(benchmark, tokenizer):
    first, again, other = (list(benchmark.dialogues(tokenizer, seed, 20)) for seed in (1, 1, 2))
    assert first == again and first[5] != other[5]
    assert [len(step[0]["labels"]) for step in first] == [2] * 2 + [4] * 2 + [8] * 11 + [16] * 5


@pytest.mark.filterwarnings("ignore")
def test_a_stopped_run_goes_on_and_keeps_what_it_has(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "corpus_texts", lambda number: corpus_texts(300))
    path, start = tmp_path / "options.json", torch.random.get_rng_state()
    arguments = ["--steps", "30", "--seeds", "1", "--output", str(path), "--options"]
    benchmark.main([*arguments, STAGES])
    kept = json.loads(path.read_text())["options"][STAGES]
    assert set(kept["1"]) == {*OPTION_FIGURES, "parameters"} and 1.0 <= kept["1"]["rank after 8"] <= 24.0
    benchmark.main([*arguments, STAGES, "base"])
    report = json.loads(path.read_text())
    assert report["options"][STAGES] == kept and set(report["options"]) == {STAGES, "base"}
    assert capsys.readouterr().out.count("| base | ") == 1
    with pytest.raises(ValueError, match="models of 30 steps, not 5"):
        benchmark.main(["--steps", "5", "--output", str(path)])
    torch.random.set_rng_state(start)
