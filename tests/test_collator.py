# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from rxt_hf.data.batching import StepCollator, StepDataset
from rxt_hf.data.collator import RxTEpisodeCollator, RxTPreTrainingCollator

LONG = {"input_ids": [[1, 4, 9], [1, 8]], "labels": [[-100, -100, 9], [-100, 8]]}
SHORT = {"input_ids": [[1, 7, 6, 5]], "labels": [[-100, -100, 6, 5]]}


def as_lists(batch):
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_episodes_are_padded_on_the_right_in_turns_and_tokens():
    assert as_lists(RxTEpisodeCollator(pad_token_id=3)([LONG, SHORT])) == {
        "input_ids": [[[1, 4, 9, 3], [1, 8, 3, 3]], [[1, 7, 6, 5], [3, 3, 3, 3]]],
        "attention_mask": [[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]],
        "labels": [
            [[-100, -100, 9, -100], [-100, 8, -100, -100]],
            [[-100, -100, 6, 5], [-100, -100, -100, -100]],
        ],
    }


def test_single_interactions_have_no_turn_axis():
    features = [{"input_ids": [1, 4], "labels": [-100, 4]}, {"input_ids": [5], "labels": [5]}]
    assert as_lists(RxTEpisodeCollator(pad_token_id=0, max_turns=1)(features)) == {
        "input_ids": [[1, 4], [5, 0]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[-100, 4], [5, -100]],
    }


def test_an_episode_of_one_turn_keeps_its_turn_axis():
    assert RxTEpisodeCollator(pad_token_id=0)([SHORT])["input_ids"].shape == (1, 1, 4)


def test_a_pad_token_inside_an_interaction_is_attended_to():
    batch = RxTEpisodeCollator(pad_token_id=0)([{"input_ids": [1, 0, 2], "labels": [1, 0, 2]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_a_long_episode_keeps_its_first_turns():
    assert as_lists(RxTEpisodeCollator(pad_token_id=0, max_turns=1)([LONG])) == {
        "input_ids": [[[1, 4, 9]]],
        "attention_mask": [[[1, 1, 1]]],
        "labels": [[[-100, -100, 9]]],
    }


def test_tokens_are_padded_to_a_multiple():
    batch = RxTEpisodeCollator(pad_token_id=0, pad_to_multiple_of=3)([SHORT])
    assert as_lists(batch) == {
        "input_ids": [[[1, 7, 6, 5, 0, 0]]],
        "attention_mask": [[[1, 1, 1, 1, 0, 0]]],
        "labels": [[[-100, -100, 6, 5, -100, -100]]],
    }
    assert RxTEpisodeCollator(pad_token_id=0, pad_to_multiple_of=4)([SHORT])["input_ids"].shape == (1, 1, 4)


def test_tensors_are_taken_like_lists():
    tensors = {name: [torch.tensor(turn) for turn in turns] for name, turns in LONG.items()}
    single = {name: torch.tensor(turns[0]) for name, turns in LONG.items()}
    collator = RxTEpisodeCollator(pad_token_id=0)
    assert as_lists(collator([tensors, SHORT])) == as_lists(collator([LONG, SHORT]))
    assert collator([single])["input_ids"].tolist() == [[1, 4, 9]]


def test_every_key_of_tokens_or_of_turns_is_padded():
    more = {
        "attention_mask": [[1, 0, 1], [1, 1]],
        "recall_labels": LONG["labels"],
        "advantages": [[0.5, 1, 2], [3, 4]],
    }
    short = {"attention_mask": [[0, 1, 1, 1]], "recall_labels": SHORT["labels"], "advantages": [[1, 2, 3, 4.5]]}
    batch = RxTEpisodeCollator(7)([LONG | more | {"write_mask": [1, 1]}, SHORT | short | {"write_mask": [1]}])
    assert batch["attention_mask"].tolist() == [[[1, 0, 1, 0], [1, 1, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 0]]]
    assert torch.equal(batch["recall_labels"], batch["labels"])
    assert batch["advantages"].tolist() == [[[0.5, 1, 2, 0], [3, 4, 0, 0]], [[1, 2, 3, 4.5], [0, 0, 0, 0]]]
    assert batch["write_mask"].tolist() == [[1, 1], [1, 0]]
    first = RxTEpisodeCollator(7, max_turns=1)([LONG | more | {"write_mask": [1, 0]}])
    assert {name: tensor.shape[1] for name, tensor in first.items()} == dict.fromkeys(batch, 1)
    single = {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 1]}
    assert RxTEpisodeCollator(7)([single])["attention_mask"].tolist() == [[0, 1]]


def test_shape_is_fixed_on_demand():
    fixed = RxTEpisodeCollator(0, pad_to_turns=3, pad_to_tokens=5)
    assert {tensor.shape for tensor in fixed([LONG, SHORT]).values()} == {(2, 3, 5)}
    assert fixed([{"input_ids": [1, 4], "labels": [1, 4]}])["labels"].shape == (1, 5)
    for options, message in (({"pad_to_turns": 1}, r"2 turns, .* pad_to_turns=1"), ({"pad_to_tokens": 3}, "4 tokens")):
        with pytest.raises(ValueError, match=message):
            RxTEpisodeCollator(0, **options)([LONG, SHORT])


@pytest.mark.filterwarnings("error")
def test_rows_of_numpy_that_are_read_only_are_taken():
    feature = {name: [np.array(turn) for turn in turns] for name, turns in LONG.items()}
    for turns in feature.values():
        for turn in turns:
            turn.flags.writeable = False
    assert as_lists(RxTEpisodeCollator(3)([feature])) == as_lists(RxTEpisodeCollator(3)([LONG]))


def test_tokenizer_stands_for_its_padding_token():
    class Tokenizer:
        pad_token_id = 5

    assert RxTEpisodeCollator(Tokenizer()).pad_token_id == 5
    Tokenizer.pad_token_id = None
    with pytest.raises(ValueError, match="has no padding token"):
        RxTEpisodeCollator(Tokenizer())


def test_token_that_masks_has_to_be_named():
    with pytest.raises(TypeError, match="mask_token_id"):
        RxTPreTrainingCollator(0)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "got 0 features, expected at least 1"),
        ([LONG, {"input_ids": [1], "labels": [1]}], "1 episodes and 1 single interactions"),
        ([{"input_ids": [[1, 2], [3]], "labels": [[1, 2]]}], r"length \[2, 1\] but labels of length \[2\]"),
        ([{"input_ids": [[1, 2]], "labels": [[1]]}], r"length \[2\] but labels of length \[1\]"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "length 3 but labels of length 2"),
        ([{"input_ids": [[1, 2]], "labels": [1, 2]}], r"length \[2\] but labels of length 2"),
        ([{"input_ids": [[1], []], "labels": [[1], []]}], r"turns of \[1, 0\] tokens, expected at least 1"),
        ([{"input_ids": [], "labels": []}], "length 0, expected at least 1"),
        ([{"input_ids": [1]}], r"keys \['input_ids'\], expected \['input_ids', 'labels'\]"),
        ([{"input_ids": [1], "labels": [1], "weight": 2.0}], r"'weight'=2\.0, expected a number for each token"),
        ([{"input_ids": [1], "labels": [1], "text": "a"}], "'text'='a', expected a number for each token"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}], "length 2 but attention_mask of length 1"),
        ([LONG, LONG | {"write_mask": [1, 1]}], r"Feature 1 has the keys .*'write_mask'\], expected"),
    ],
)
def test_a_bad_shape_is_refused_with_both_values(features, message):
    with pytest.raises(ValueError, match=message):
        RxTEpisodeCollator(pad_token_id=0)(features)


@pytest.mark.parametrize("field", ["max_turns", "pad_to_multiple_of"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        RxTEpisodeCollator(pad_token_id=0, **{field: 0})


@pytest.mark.parametrize("collate", [0, RxTEpisodeCollator(0)], ids=["padding token", "collator"])
def test_an_item_of_a_data_set_of_steps_is_a_batch(collate):
    features = [SHORT, LONG, LONG]
    steps = StepDataset(features, [[1, 0], [2]])
    assert len(steps) == 2 and steps[1] == [LONG]
    batch = StepCollator(collate)([steps[0]])
    expected = RxTEpisodeCollator(0)([LONG, SHORT])
    assert set(batch) == set(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="a batch size of 1, got 2"):
        StepCollator(collate)([steps[0], steps[1]])
