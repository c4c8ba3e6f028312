# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import math
import runpy
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from demo.facts import corpus_texts
from transformers import AutoModelForCausalLM, TrainingArguments

from rxt_hf import DEMO
from rxt_hf.chat_template import encode_interaction, train_tokenizer
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.readers import cut_episode, read_episodes
from rxt_hf.training.preference import (
    PreferenceArguments,
    PreferenceTrainer,
    add_own_mistakes,
    answer_log_probs,
    encode_preferences,
    preference_interactions,
    preference_loss,
    recalls_all,
)

from .models import EXPERTS, random_ids, tiny_model
from .reference_rxt import Reference

# peft itself still uses the former name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
BETA = 0.3
PAD = 0
LOSSES = {
    "dpo": lambda chosen, rejected: math.log(1 + math.exp(rejected - chosen)),
    "apo_zero": lambda chosen, rejected: 1 / (1 + math.exp(-rejected)) - 1 / (1 + math.exp(-chosen)),
    "apo_down": lambda chosen, rejected: 1 / (1 + math.exp(-chosen)) - 1 / (1 + math.exp(rejected - chosen)),
}


def turn(seed, query_tokens, answer_tokens, rejected_tokens=0):
    """A turn of token ids; the two answers differ in every way."""
    ids = [random_ids(length, seed=seed + 100 * place).tolist() for place, length in enumerate((query_tokens, 9, 9))]
    rejected = {"rejected": ids[2][:rejected_tokens]} if rejected_tokens else {}
    return {"query": ids[0], "answer": ids[1][:answer_tokens], **rejected}


# a preference in the first turn, after another one, and after a turn without; the dialogues differ in length
DIALOGUES = [
    [turn(1, 3, 4), turn(2, 2, 5, 3), turn(3, 4, 2), turn(4, 3, 3, 6)],
    [turn(5, 4, 2, 5), turn(6, 3, 4)],
]


def batch_of(dialogues, **options):
    return RxTEpisodeCollator(PAD, **options)([encode_preferences(None, turns) for turns in dialogues])


def trainer_for(model, folder, reference=None, dialogues=DIALOGUES, **arguments):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "beta": BETA, **arguments}
    return PreferenceTrainer(
        model,
        PreferenceArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings),
        data_collator=RxTEpisodeCollator(PAD),
        train_dataset=[encode_preferences(None, turns) for turns in dialogues],
        reference_model=reference,
    )


def scores_of_pairs(model, dialogue):
    """Log probability of each chosen and rejected answer in float64, turn by turn: score both, then write."""
    reference = Reference(model.config, model.state_dict())
    memory, scores = reference.initial_states(1)[0], []
    for each in dialogue:
        pair = []
        for answer in (each["answer"], each.get("rejected")):
            if answer is not None and "rejected" in each:
                # beginning of sequence, query, its tokens, answer
                prompt = [1, 4, *each["query"], 5]
                target = [*answer, 2]
                log_p = reference.decode_row(torch.tensor(prompt + target), memory)[1].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(target) - 1)
                pair.append(sum(log_p[place, token].item() for place, token in zip(places, target, strict=True)))
        if pair:
            scores.append(pair)
        written = torch.tensor([1, 4, *each["query"], 5, *each["answer"], 2])
        memory = reference.update_row(memory, reference.encode_row(written))
    return scores


def hand_computed(policy, reference, loss_type):
    losses = []
    for dialogue in DIALOGUES:
        pairs = zip(scores_of_pairs(policy, dialogue), scores_of_pairs(reference, dialogue), strict=True)
        for (chosen, rejected), (expected_chosen, expected_rejected) in pairs:
            rewards = BETA * (chosen - expected_chosen), BETA * (rejected - expected_rejected)
            losses.append(LOSSES[loss_type](*rewards))
    assert len(losses) == 3
    return sum(losses) / len(losses)


def test_control_tokens_of_the_hand_computation_are_those_of_the_data():
    ids, labels = (encode_preferences(None, [turn(1, 2, 3, 1)])[name] for name in ("input_ids", "labels"))
    query, answer = turn(1, 2, 3)["query"], turn(1, 2, 3)["answer"]
    assert ids[1] == [1, 4, *query, 5, *answer, 2]
    assert labels[1] == [-100] * 5 + [*answer, 2]


def test_a_rejected_answer_is_a_turn_before_the_chosen_one_that_is_not_written():
    plain, paired = turn(1, 3, 4), turn(2, 2, 5, 3)
    found = encode_preferences(None, [plain, paired])
    assert found["write_mask"] == [1, 0, 1]
    assert found["labels"][0] == [-100] * len(found["input_ids"][0])
    assert found["input_ids"][1][-4:] == found["labels"][1][-4:] == [*paired["rejected"], 2]
    assert found["input_ids"][2][-6:] == found["labels"][2][-6:] == [*paired["answer"], 2]
    assert found["input_ids"][1][:5] == found["input_ids"][2][:5] == [1, 4, *paired["query"], 5]


def test_a_turn_that_is_not_written_leaves_the_memory_bit_identical_and_counts_for_nothing():
    model, batch = tiny_model(), batch_of(DIALOGUES)
    nothing = batch | {"write_mask": torch.zeros_like(batch["write_mask"])}
    out = model(**nothing)
    assert torch.equal(out.stm_cache.states, model.init_stm(2).states) and out.stm_cache.turns.tolist() == [0, 0]
    assert model(**batch).stm_cache.turns.tolist() == [4, 2]
    without_mask = model(batch["input_ids"], write_mask=batch["write_mask"] * 0).stm_cache
    assert torch.equal(without_mask.states, model.init_stm(2).states)
    # recomputing the activations changes nothing
    model.gradient_checkpointing_enable()
    recomputed = model.train()(**nothing)
    assert recomputed.loss.item() == pytest.approx(out.loss.item(), abs=1e-6)
    assert torch.equal(recomputed.stm_cache.states, model.init_stm(2).states)


def test_collator_pads_turns_that_are_then_not_written():
    batch = batch_of(DIALOGUES)
    assert {name: tuple(tensor.shape[:2]) for name, tensor in batch.items()} == dict.fromkeys(batch, (2, 6))
    assert batch["write_mask"].tolist() == [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert batch_of(DIALOGUES, max_turns=2)["write_mask"].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("fields", [{}, {"memory_attention_type": "self_interlayer", "memory_layers": [1]}], ids=str)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_equals_a_float64_computation_turn_by_turn(tmp_path, loss_type, fields):
    policy, reference = tiny_model(1, **fields), tiny_model(2, **fields)
    expected = hand_computed(policy, reference, loss_type)
    trainer = trainer_for(policy.double(), tmp_path, reference.double(), loss_type=loss_type)
    loss = trainer.compute_loss(trainer.model, batch_of(DIALOGUES))
    # the model's rotary table is float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("loss_type", "expected"), [("dpo", math.log(2)), ("apo_zero", 0.0), ("apo_down", 0.0)])
def test_loss_where_policy_and_reference_are_one(tmp_path, loss_type, expected):
    model = tiny_model()
    trainer = trainer_for(model, tmp_path, copy.deepcopy(model), loss_type=loss_type)
    assert trainer.compute_loss(model, batch_of(DIALOGUES)).item() == pytest.approx(expected, abs=1e-6)


def test_gradient_where_policy_and_reference_are_one_is_half_that_of_the_margin(tmp_path):
    model, batch = tiny_model().double(), batch_of(DIALOGUES)
    trainer_for(model, tmp_path, copy.deepcopy(model)).compute_loss(model, batch).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    scores = answer_log_probs(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    scores = scores.sum(-1)
    margins = scores[0, 2] - scores[0, 1] + scores[0, 5] - scores[0, 4] + scores[1, 1] - scores[1, 0]
    (-0.5 * BETA * margins / 3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-10, rtol=0)
    assert found["model.memory_attention.layers.0.write_attn.v_proj.weight"].abs().max() > 1e-6


def answer_scores(model, dialogue):
    """The sum of log probabilities of each turn's labels, as the trainer scores them."""
    batch = batch_of([dialogue])
    labels = batch.pop("labels")
    with torch.no_grad():
        return answer_log_probs(model(**batch).logits, labels).sum(-1)[0]


def test_no_label_leaks_into_the_memory_that_its_turn_is_scored_under():
    """Turns of the episode: 0 plain, 1 rejected, 2 chosen, 3 plain, 4 rejected, 5 chosen."""
    model, dialogue = tiny_model(), DIALOGUES[0]
    before = answer_scores(model, dialogue)
    other_chosen, other_rejected = copy.deepcopy(dialogue), copy.deepcopy(dialogue)
    other_chosen[1]["answer"] = random_ids(5, seed=77).tolist()
    after = answer_scores(model, other_chosen) - before
    # its own score changes, that of the rejected answer beside it does not, those of later turns do
    assert after[1] == 0 and after[2].abs() > 1e-3 and after[4].abs() > 1e-3 and after[5].abs() > 1e-3
    other_rejected[1]["rejected"] = random_ids(3, seed=78).tolist()
    after = answer_scores(model, other_rejected) - before
    assert after[1].abs() > 1e-3 and torch.equal(after[2:], torch.zeros(4))


def test_equal_answers_have_equal_scores_so_neither_is_written_before_both_are_scored():
    model, dialogue = tiny_model(), copy.deepcopy(DIALOGUES[0])
    dialogue[1]["rejected"] = dialogue[1]["answer"]
    scores = answer_scores(model, dialogue)
    assert scores[1] == pytest.approx(scores[2].item(), abs=1e-5)
    assert scores[1].abs() > 1


def test_padding_changes_nothing(tmp_path):
    model, batch = tiny_model().double(), batch_of(DIALOGUES)
    trainer = trainer_for(model, tmp_path, tiny_model(3).double())
    expected = trainer.compute_loss(model, batch)
    wider = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    padded = {name: torch.nn.functional.pad(batch[name], (0, 3, 0, 2), value=value) for name, value in wider.items()}
    padded["write_mask"] = torch.nn.functional.pad(batch["write_mask"], (0, 2), value=1)
    assert trainer.compute_loss(model, padded).item() == pytest.approx(expected.item(), abs=1e-9)


def test_a_batch_without_a_pair_has_no_loss_and_no_gradient(tmp_path):
    model = tiny_model()
    loss = trainer_for(model, tmp_path, tiny_model(3)).compute_loss(model, batch_of([[turn(1, 2, 3), turn(2, 2, 2)]]))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_experts_keep_their_load_balancing_loss(tmp_path):
    model = tiny_model(**EXPERTS)
    trainer = trainer_for(model, tmp_path, copy.deepcopy(model))
    batch = batch_of(DIALOGUES)
    # dialogues count by their pairs
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "write_mask")}
    rows = [{name: tensor[row : row + 1] for name, tensor in inputs.items()} for row in range(len(DIALOGUES))]
    pairs = [sum("rejected" in each for each in turns) for turns in DIALOGUES]
    balance = sum(model(**row).aux_loss.item() * count for row, count in zip(rows, pairs, strict=True)) / sum(pairs)
    expected = math.log(2) + EXPERTS["router_aux_loss_coef"] * balance
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, abs=1e-5)


def test_training_prefers_the_chosen_answers_and_leaves_the_reference_alone(tmp_path):
    model = tiny_model()
    reference, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trainer_for(model, tmp_path, reference, max_steps=8)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and logs[-1]["loss"] < 0.5
    assert logs[-1]["accuracy"] == 1.0 and logs[-1]["margin"] > 0.5
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), start.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert trainer.evaluate([encode_preferences(None, DIALOGUES[0])])["eval_loss"] < 0.5


def test_an_adapters_reference_is_itself_switched_off(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    start = copy.deepcopy(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    trainer = trainer_for(model, tmp_path / "adapter", max_steps=2, learning_rate=5e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] < losses[0]
    # the loss that a frozen copy of the base model gives
    with_copy = trainer_for(model, tmp_path / "copy", start)
    expected = with_copy.compute_loss(model, batch_of(DIALOGUES))
    assert trainer.compute_loss(model, batch_of(DIALOGUES)).item() == pytest.approx(expected.item(), abs=1e-6)
    assert model.training and all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_a_model_without_adapter_needs_a_reference(tmp_path):
    with pytest.raises(ValueError, match="A reference is needed"):
        trainer_for(tiny_model(), tmp_path)


def test_two_dialogues_at_once_equal_two_accumulated_ones(tmp_path):
    weights, dialogues = [], [DIALOGUES[0][:2], DIALOGUES[1]]
    for size, accumulation in ((2, 1), (1, 2)):
        model = tiny_model()
        # of Adam only the sign of the first gradient would show
        options = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "max_steps": 2}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer_for(model, tmp_path, copy.deepcopy(model), dialogues, **options).train()
        weights.append(model.state_dict())
    start = tiny_model().state_dict()
    assert max((start[name] - tensor).abs().max() for name, tensor in weights[0].items()) > 1e-3
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=0)


def test_an_unknown_loss_is_refused_and_the_arguments_are_those_of_training(tmp_path):
    with pytest.raises(ValueError, match="hinge"):
        preference_loss(torch.zeros(1), torch.zeros(1), "hinge")
    assert isinstance(PreferenceArguments(str(tmp_path)), TrainingArguments)


def test_rows_of_preference_data_sets_become_interactions():
    user, chosen, rejected = (
        {"role": role, "content": text} for role, text in (("user", "Hi."), *[("assistant", "?")] * 2)
    )
    chosen, rejected = chosen | {"content": "Yes."}, rejected | {"content": "No."}
    whole = {"chosen": [user, chosen, user, chosen], "rejected": [user, chosen, user, rejected]}
    expected = [{"query": "Hi.", "answer": "Yes."}, {"query": "Hi.", "answer": "Yes.", "rejected": "No."}]
    assert preference_interactions(whole) == expected
    assert preference_interactions({"prompt": [user], "chosen": [chosen], "rejected": [rejected]}) == expected[1:]
    assert preference_interactions({"prompt": "Hi.", "chosen": "Yes.", "rejected": "No."}) == expected[1:]
    with pytest.raises(ValueError, match="before their last answer"):
        preference_interactions({"chosen": [user, chosen, user, chosen], "rejected": [user, rejected, user, rejected]})
    with pytest.raises(ValueError, match="the same answer: 'Yes"):
        preference_interactions({"prompt": "Hi.", "chosen": "Yes.", "rejected": "Yes."})


def test_own_mistakes_are_the_greedy_answers_under_the_memory_of_reference_answers():
    tokenizer = train_tokenizer(corpus_texts(50), vocab_size=300, max_length=96)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128)
    # dialogues may differ in length
    dialogues = [
        cut_episode(episode, 5 + row % 2) for row, episode in enumerate(islice(read_episodes(DEMO, "test"), 6))
    ]
    found = add_own_mistakes(model, tokenizer, dialogues, max_new_tokens=8, is_right=lambda turn, _: False)
    questions = [["recall" in turn for turn in dialogue["interactions"]] for dialogue in dialogues]
    assert 3 <= sum(map(any, questions)) < 6
    assert [[("rejected" in turn) for turn in turns] for turns in found] == [
        row[: len(row) - row[::-1].index(True)] for row in questions if any(row)
    ]
    turns, memory = found[0], None
    for each in turns:
        if "rejected" in each:
            prompt = torch.tensor([encode_interaction(tokenizer, each["query"])["input_ids"]])
            said = model.generate(
                prompt,
                stm_cache=memory,
                return_dict_in_generate=True,
                update_memory=False,
                max_new_tokens=8,
                do_sample=False,
            ).sequences[0, prompt.shape[1] :]
            assert each["rejected"] == tokenizer.decode(said, skip_special_tokens=True)
        ids = encode_interaction(tokenizer, each["query"], each["answer"])["input_ids"]
        memory = model.update_memory(memory, torch.tensor([ids]))
    # by default right is what has the recalled words, which a random model does not say
    assert add_own_mistakes(model, tokenizer, dialogues, max_new_tokens=8) == found
    assert add_own_mistakes(model, tokenizer, dialogues, max_new_tokens=2, is_right=lambda turn, _: True) == []
    assert add_own_mistakes(model, tokenizer, dialogues, max_new_tokens=2, is_asked=lambda _: False) == []


def test_an_answer_is_right_that_has_all_recalled_words():
    turn = {"query": "Who?", "answer": "Rex and Mia", "recall": [[0, 3, 1], [8, 11, 2]]}
    assert recalls_all(turn, "Mia, Rex!") and not recalls_all(turn, "Mia, Rexy") and not recalls_all(turn, "mia, Rex")


def test_the_recipe_says_so_where_the_model_makes_no_mistake(tmp_path, monkeypatch):
    path = Path(__file__).parent.parent / "examples" / "recipes" / "preference.py"
    argv = [str(path), "--output_dir", str(tmp_path), "--rounds", "1", "--dialogues", "1", "--test_dialogues", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="answered every question right in 1 rounds of 1 dialogues"):
        runpy.run_path(str(path), run_name="__main__")
    # nothing is left behind that the next run would take for pairs
    assert not (tmp_path / "pairs.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["preference", "reinforcement"])
def test_a_recipe_measures_before_and_after_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys, recipe):
    path = Path(__file__).parent.parent / "examples" / "recipes" / f"{recipe}.py"
    monkeypatch.syspath_prepend(str(path.parent))
    # the demo's mistakes are rare, and most are about names that no list holds, as in the third round
    options = {"preference": ["--rounds", "3", "--dialogues", "24"], "reinforcement": ["--group_size", "2"]}[recipe]
    measured = {"preference": 3, "reinforcement": 6}[recipe]
    options += [
        "--test_dialogues",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
    ]
    for steps in (1, 2):
        monkeypatch.setattr(
            sys, "argv", [str(path), "--output_dir", str(tmp_path), "--max_steps", str(steps), *options]
        )
        runpy.run_path(str(path), run_name="__main__")
        result = json.loads((tmp_path / "result.json").read_text())
        # a run that goes on has the log of the steps before
        assert [entry["step"] for entry in result["log"] if "loss" in entry] == list(range(1, steps + 1))
        assert len(result["before"]) == len(result["after"]) == measured
        assert capsys.readouterr().out.count(" -> ") == 3 * measured
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "rxt"
