# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What a turn costs: bytes and FLOPs are exact, times are only there."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from rxt_hf.cli import main
from rxt_hf.evaluation import speed
from rxt_hf.evaluation.speed import ARMS, Turns, build_models, cache_bytes, markdown, ratio
from rxt_hf.presets import PRESETS

from .models import SIZES

QUERY, ANSWER = 5, 3
TURN = QUERY + ANSWER
CONCURRENCY = Path(__file__).parent.parent / "benchmarks" / "concurrency.py"
TIMES = {"first_token_s", "token_s", "turn_s", "return_delay_s"}


@pytest.fixture(scope="module")
def models():
    return build_models(SIZES, torch.float32, "cpu")


@pytest.fixture(scope="module")
def turns(models):
    return Turns(*models, [1, 2, 4, 8], query_tokens=QUERY, answer_tokens=ANSWER, window_turns=3)


@pytest.fixture(scope="module")
def costs(turns):
    return {arm: {turn: turns.costs(arm, turn) for turn in turns.memories} for arm in ARMS}


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """The report of a run at the smallest size, and what it printed; or what it said of a failure."""
    monkeypatch.setitem(speed.SIZES, "tiny", SIZES)

    def measure(*argv, code=0):
        smallest = ["--query-tokens", QUERY, "--answer-tokens", ANSWER, "--repeats", 1]
        argv = ["bench", *smallest, "--output", tmp_path / "report.json", *argv]
        assert main([str(arg) for arg in argv]) == code
        if code:
            return capsys.readouterr().err
        return json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return measure


def by_turn(costs, arm, field):
    return [figures[field] for figures in costs[arm].values()]


def test_llama_has_the_shape_of_the_decoder():
    unusual = {"head_dim": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "tie_word_embeddings": False}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    rxt, llama = build_models(SIZES | unusual | rope, torch.bfloat16, "meta", "eager")
    shapes = {name: weight.shape for name, weight in rxt.named_parameters()}
    assert all(shapes[name] == weight.shape for name, weight in llama.named_parameters())
    for name in ("rms_norm_eps", "tie_word_embeddings", "rope_parameters", "eos_token_id", "_attn_implementation"):
        assert getattr(llama.config, name) == getattr(rxt.config, name), name
    assert (llama.dtype, llama.config.eos_token_id) == (rxt.dtype, None)


def test_bytes_of_rxt_stay_the_same_and_those_of_keys_and_values_grow_by_a_turn_each(turns, costs):
    slots, width, layers = (SIZES[name] for name in ("num_memory_slots", "hidden_size", "num_hidden_layers"))
    for arm in ("rxt", "rxt_async"):
        assert by_turn(costs, arm, "state_bytes") == [layers * slots * width * 4] * 4
    # the last token of an answer is read with the next query
    expected = [(turn * TURN - 1) * 2 * layers * width * 4 for turn in turns.memories]
    assert by_turn(costs, "persistent_cache", "state_bytes") == expected


def test_bytes_of_ids_are_those_that_are_read_again(turns, costs):
    assert by_turn(costs, "full_history", "state_bytes") == [8 * TURN * turn for turn in turns.memories]
    assert by_turn(costs, "sliding_window", "state_bytes") == [8 * TURN * min(turn, 2) for turn in turns.memories]
    assert by_turn(costs, "current_turn", "state_bytes") == [0] * 4


def test_flops_of_rxt_are_equal_at_every_turn_and_those_of_histories_grow(costs):
    assert len(set(by_turn(costs, "rxt", "flops"))) == 1
    assert by_turn(costs, "rxt_async", "flops") == by_turn(costs, "rxt", "flops")
    assert len(set(by_turn(costs, "current_turn", "flops"))) == 1
    for arm in ("full_history", "persistent_cache"):
        flops = by_turn(costs, arm, "flops")
        assert flops == sorted(set(flops))
    window = by_turn(costs, "sliding_window", "flops")
    assert window[0] < window[1] < window[2] == window[3]
    assert len({costs[arm][1]["flops"] for arm in speed.BASELINES}) == 1


@pytest.mark.parametrize(
    "arm, turn, past, read",
    [
        ("current_turn", 4, 0, QUERY),
        ("full_history", 4, 0, 3 * TURN + QUERY),
        ("sliding_window", 4, 0, 2 * TURN + QUERY),
        ("persistent_cache", 4, 3 * TURN - 1, QUERY + 1),
    ],
)
def test_flops_of_the_llama_are_those_counted_by_hand(costs, arm, turn, past, read):
    width, inner, layers, vocab = (
        SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    steps = ANSWER - 1
    linear = (read + steps) * layers * (4 * width * width + 3 * width * inner) + ANSWER * width * vocab
    pairs = read * (past + read) + sum(past + read + step for step in range(1, steps + 1))
    assert costs[arm][turn]["flops"] == 2 * (linear + layers * 2 * width * pairs)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_answers_with_the_number_of_tokens_asked(turns, arm):
    sample, output = turns.timed(arm, turns.inputs(arm, 4))
    read = {"full_history": 3, "persistent_cache": 3, "sliding_window": 2}.get(arm, 0) * TURN + QUERY
    assert output.sequences.shape == (1, read + ANSWER)
    assert sample.keys() >= TIMES
    assert 0 < sample["first_token_s"] < sample["turn_s"]
    assert ("write_s" in sample) == arm.startswith("rxt")


def test_turn_ends_with_the_write_where_generate_waits_for_it_and_else_with_the_last_token(turns):
    for arm, waits in (("rxt", True), ("rxt_async", False), ("full_history", False)):
        sample = turns.play(arm, 2)
        last_token = sample["first_token_s"] + (ANSWER - 1) * sample["token_s"]
        assert sample["turn_s"] == pytest.approx(last_token + sample["return_delay_s"] * waits)


def test_an_answer_that_ends_early_is_an_error(turns, monkeypatch):
    monkeypatch.setattr(turns, "answer_tokens", ANSWER + 1)
    with pytest.raises(RuntimeError, match=f"current_turn answered with {ANSWER} tokens, expected {ANSWER + 1}"):
        turns.timed("current_turn", {**turns.inputs("current_turn", 1), "stopping_criteria": [stop_after(ANSWER)]})


def stop_after(tokens):
    return lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= QUERY + tokens)


def test_memory_at_a_turn_has_been_written_once_for_each_turn_before(turns):
    batch = Turns(turns.rxt, turns.llama, [2], query_tokens=QUERY, answer_tokens=ANSWER, batch_size=3)
    assert batch.memories[2].turns.tolist() == [1, 1, 1]
    assert {turn: memory.turns.tolist() for turn, memory in turns.memories.items()} == {
        turn: [turn - 1] for turn in (1, 2, 4, 8)
    }


def test_persistent_cache_is_as_generate_leaves_it_and_answers_as_the_full_history_does(turns):
    _, first = turns.timed("persistent_cache", turns.inputs("persistent_cache", 1))
    assert cache_bytes(turns.cache_before(2)) == cache_bytes(first.cache)
    ids = torch.cat([first.sequences, turns.ids(QUERY)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _, again = turns.timed("full_history", inputs)
    _, kept = turns.timed("persistent_cache", {**inputs, "cache": first.cache})
    assert torch.equal(again.sequences, kept.sequences)


def test_arms_alternate_and_rounds_after_the_third_keep_to_the_limit():
    played = []
    cells = {name: lambda name=name: played.append(name) or {"turn_s": 1.0} for name in "ab"}
    samples = speed.interleaved(cells, 9, limit_s=0.0)
    assert (len(samples["a"]), "".join(played)) == (3, "ababab")


def test_ratio_is_the_median_over_rounds_of_pairs_of_one_round():
    above, below = ([{"turn_s": value} for value in values] for values in ((1.0, 8.0, 30.0), (1.0, 4.0, 10.0)))
    assert ratio(above, below, "turn_s") == 2.0


def test_report_has_every_field_and_the_ratios_under_plain_names(measured):
    report, printed = measured("--turns", 1, 2, 4, "--decode-batch-sizes", 1, 2)
    assert {"python", "torch", "transformers", "device", "threads"} <= report["environment"].keys()
    assert report["options"]["dtype"] == "float32"
    assert report["sizes"]["hidden_size"] == 32
    assert report["parameters"]["rxt"] > report["parameters"]["llama"]
    assert report["turns"].keys() == ARMS.keys()
    for arm, found in report["turns"].items():
        assert list(found) == ["1", "2", "4"]
        fields = TIMES | {"state_bytes", "flops", "rounds", "turn_s_range"}
        fields |= {"write_s"} if arm.startswith("rxt") else set()
        assert all(figures.keys() == fields and figures["rounds"] == 1 for figures in found.values())
    assert report["decode"].keys() == {"at_batch_1_eager", "at_batch_2_eager"}
    expected = {
        "first_token_speedup_over_full_history_at_4",
        "turn_speedup_over_persistent_cache_at_4",
        "async_turn_speedup_over_persistent_cache_at_4",
        "turn_slowdown_over_current_turn_at_1",
        "async_turn_slowdown_over_current_turn_at_1",
        "rxt_turn_at_4_over_2",
        "rxt_first_token_at_4_over_2",
        "write_share_of_turn",
        "async_return_share_of_turn",
        "async_write_s",
        "decode_share_of_current_turn_at_batch_1_eager",
        "decode_share_of_current_turn_at_batch_2_eager",
    }
    assert expected <= report["ratios"].keys()
    assert all(value > 0 for value in report["ratios"].values())
    assert printed == markdown(report) + "\n"
    assert all(f"| {title} | " in printed for title in ARMS.values())
    assert "\n| first_token_speedup_over_full_history | " in printed


def test_arms_and_sections_can_be_left_out(measured):
    report, _ = measured("--turns", 1, "--arms", "current_turn", "--decode-batch-sizes")
    assert (list(report["turns"]), report["decode"], report["ratios"]) == (["current_turn"], {}, {})


def test_full_history_can_end_before_the_last_turn(measured):
    arms = ("full_history", "rxt")
    report, printed = measured("--turns", 1, 2, "--longest-full-history", 1, "--arms", *arms, "--decode-batch-sizes")
    assert {arm: list(found) for arm, found in report["turns"].items()} == {"full_history": ["1"], "rxt": ["1", "2"]}
    assert "turn_speedup_over_full_history_at_2" not in report["ratios"]
    (row,) = (line for line in printed.splitlines() if line.startswith("| turn_speedup_over_full_history | "))
    assert row.endswith(" |  |")


@pytest.mark.slow
def test_compiled_decoding_is_measured_beside_the_eager_one(measured):
    report, _ = measured("--turns", "--decode-batch-sizes", 1, "--compile")
    assert report["decode"].keys() == {"at_batch_1_eager", "at_batch_1_compiled"}


def test_speedup_and_slowdown_are_not_mixed_up():
    samples = {
        2: {"rxt": [{"first_token_s": 1.0, "turn_s": 2.0}], "current_turn": [{"first_token_s": 0.5, "turn_s": 1}]}
    }
    samples[2]["full_history"] = [{"first_token_s": 7.0, "turn_s": 8.0}]
    assert speed.turn_ratios(samples) == {
        "first_token_speedup_over_full_history_at_2": 7.0,
        "turn_speedup_over_full_history_at_2": 4.0,
        "first_token_slowdown_over_current_turn_at_2": 2.0,
        "turn_slowdown_over_current_turn_at_2": 2.0,
    }


def test_a_missing_matplotlib_costs_one_sentence_that_names_the_extra_before_anything_is_measured(
    measured, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(speed, "bench", None)
    assert "pip install 'rxt-hf[plot]'" in measured("--plot", tmp_path / "plot.png", code=2)


def test_a_missing_folder_is_found_before_anything_is_measured(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "bench", None)
    assert "No such file or directory" in measured("--output", tmp_path / "none" / "report.json", code=2)


def test_a_failed_measurement_leaves_no_file(measured, monkeypatch, tmp_path):
    def fail(options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed, "bench", fail)
    assert "out of memory" in measured("--output", tmp_path / "report.json", code=2)
    assert not any(tmp_path.iterdir())


def test_plot_is_a_picture_of_the_report(measured, tmp_path):
    pytest.importorskip("matplotlib")
    measured("--turns", 1, 2, "--decode-batch-sizes", "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_are_the_demo_and_a_llama_of_a_hundred_million_parameters():
    assert speed.SIZES["tiny"] == PRESETS["tiny"]
    rxt, llama = build_models(speed.SIZES["100m"], torch.float32, "meta")
    assert 100e6 < llama.num_parameters() < 115e6
    assert rxt.config.num_memory_slots == 256


def test_concurrency_counts_the_states_that_fit_and_leaves_out_what_does_not(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("concurrency", CONCURRENCY)
    concurrency = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(concurrency)
    monkeypatch.setitem(speed.SIZES, "tiny", SIZES)
    layers, slots, width = (SIZES[name] for name in ("num_hidden_layers", "num_memory_slots", "hidden_size"))
    memory, keys_values = layers * slots * width * 4, (2 * TURN - 1) * 2 * layers * width * 4
    budget = 2 * memory
    sizes = ["--query-tokens", QUERY, "--answer-tokens", ANSWER, "--at-turn", 2, "--turns", 1, "--repeats", 1]
    argv = [*sizes, "--conversations", 1, 2, "--budget-gib", budget / 2**30, "--output", tmp_path / "c.json"]
    concurrency.main([str(arg) for arg in argv])
    report = json.loads((tmp_path / "c.json").read_text())
    states, rates = report["states"], report["tokens_per_s"]
    assert states["rxt"]["2"] == {"state_bytes": memory, "conversations": 2}
    assert states["persistent_cache"]["2"] == {"state_bytes": keys_values, "conversations": 0}
    assert report["ratios"]["conversations_over_persistent_cache_at_2"] == keys_values / memory
    for mode in ("one_after_the_other", "batched"):
        assert [found["rxt"] > 0 for found in rates[mode].values()] == [True, True]
        assert [found["persistent_cache"] for found in rates[mode].values()] == [None, None]
    assert "| does not fit | does not fit |" in capsys.readouterr().out
