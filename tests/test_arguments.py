# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""One name for each idea, in every training of the library and the examples."""

import dataclasses
from dataclasses import fields

import pytest
from demo.train import FactDialogueArguments
from memory_tasks.train import MemoryTaskArguments
from train_dialogues import DialogueArguments
from transformers import TrainingArguments

from rxt_hf.training.arguments import BudgetArguments, DataArguments, ModelArguments, json_object
from rxt_hf.training.loop import parse
from rxt_hf.training.preference import PreferenceArguments
from rxt_hf.training.reinforcement import ReinforcementArguments
from rxt_hf.training.run import RunArguments

SHARED = (ModelArguments, DataArguments, BudgetArguments)
RECIPES = (RunArguments, FactDialogueArguments, DialogueArguments, MemoryTaskArguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_recipes_say_of_their_own_only_what_no_other_one_says(recipe):
    """Apart from `override`, which the memory tasks have without the choice of a model."""
    shared = {each.name for kind in SHARED if not issubclass(recipe, kind) for each in fields(kind)} - {"override"}
    assert not shared & {each.name for each in fields(recipe)}
    trainers = {each.name for each in fields(TrainingArguments)}
    assert not trainers & {each.name for each in fields(recipe)}


@pytest.mark.parametrize("kind", [PreferenceArguments, ReinforcementArguments])
def test_every_training_takes_recipe_options_and_defaults_of_its_own(kind, tmp_path):
    @dataclasses.dataclass
    class Recipe(ModelArguments, BudgetArguments):
        size: int = 3

    words = ["--output_dir", str(tmp_path), "--override", '{"hidden_size": 8}', "--size", "4", "--use_cpu", "True"]
    options, args = parse(Recipe, {"learning_rate": 0.5, "cpu_seconds": 9.0}, words, kind)
    assert (options.config_fields, options.size, options.cpu_seconds) == ({"hidden_size": 8}, 4, 9.0)
    assert type(args) is kind and args.learning_rate == 0.5 and args.remove_unused_columns is False


def test_one_source_is_a_list_of_one_and_none_is_refused():
    assert DataArguments(data="one.jsonl").data == ["one.jsonl"]
    with pytest.raises(ValueError, match="data is missing: name files, folders or data sets of the Hub"):
        DataArguments().check_data()


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (DataArguments, {"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, got 0"),
        (ModelArguments, {"bptt_turns": -1}, "bptt_turns must be at least 0, got -1"),
        (ModelArguments, {"override": "{"}, "override is not JSON"),
        (ModelArguments, {"override": "[1]"}, r"override must be an object, got '\[1\]'"),
    ],
)
def test_wrong_values_are_refused(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_an_object_is_given_as_it_is_or_as_json_or_not_at_all():
    assert [json_object("mix", value) for value in ({"a": 1}, '{"a": 1}', "", None)] == [{"a": 1}, {"a": 1}, {}, {}]
