# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The stages before dialogues, and what each stage trains."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForPreTraining, Trainer, TrainingArguments

from rxt_hf import RxTForCausalLM, RxTForPreTraining
from rxt_hf.data.collator import RxTEpisodeCollator, RxTPreTrainingCollator
from rxt_hf.training.pretraining import resampled
from rxt_hf.training.stages import STAGES, set_training_stage, unfreezing_optimizer

from .models import EXPERTS, close, random_ids, tiny_config, tiny_model
from .reference_rxt import Reference, randomize

MASK_TOKEN = 3


def pretraining_model(settings=None, **options):
    return randomize(RxTForPreTraining(tiny_config(**options), **(settings or {})), seed=0).eval()


def joint_batch():
    """Two rows, the first padded on the left; every third token masked."""
    batch = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch["attention_mask"][0, :4] = 0
    is_target = batch["attention_mask"].bool()
    # the first token has no predecessor
    batch["labels"] = batch["input_ids"].masked_fill(~is_target | (batch["attention_mask"].cumsum(-1) == 1), -100)
    is_masked = is_target & (torch.arange(9) % 3 == 2)
    batch["masked_input_ids"] = batch["input_ids"].masked_fill(is_masked, MASK_TOKEN)
    batch["mlm_targets"] = batch["input_ids"].masked_fill(~is_masked, -100)
    return batch


def episode_batch():
    """Four turns; one row ends early, one has a short turn, padded on the left."""
    mask = torch.ones(2, 4, 7, dtype=torch.long)
    mask[0, 3], mask[1, 1, :4] = 0, 0
    return {"input_ids": random_ids(2, 4, 7, seed=5), "attention_mask": mask}


def reference(model):
    return Reference(model.config, {name: tensor.double() for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("options", [{}, {"memory_layers": [1]}, {"num_key_value_heads": 2}], ids=str)
def test_joint_loss_is_that_of_the_equations(options):
    model, batch = pretraining_model({"mlm_loss_coef": 0.25}, **options), joint_batch()
    output = model(**batch)
    next_token, _ = reference(model).joint_losses(**batch)
    # rows count by their labels, of which they have unequal numbers
    counts = batch["labels"][:, 1:].ne(-100).sum(1)
    assert len(counts.unique()) > 1
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(len(counts))]
    masked = sum(
        reference(model).joint_losses(**row)[1] * share for row, share in zip(rows, counts / counts.sum(), strict=True)
    )
    close(output.mlm_loss.double(), masked)
    close(output.loss.double(), next_token + 0.25 * masked)


@pytest.mark.parametrize("slots", [3, 7, 12], ids="{} slots for 3 and 7 tokens".format)
def test_memory_loss_is_that_of_the_equations(slots):
    model, batch = pretraining_model(num_memory_slots=slots), episode_batch()
    output = model(**batch)
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
    turns = batch["attention_mask"].any(-1).sum(-1)
    expected = [reference(model).memory_loss(**row) for row in rows]
    close(output.loss.double(), reference(model).memory_loss(**batch))
    close(output.loss.double(), sum(loss * count for loss, count in zip(expected, turns, strict=True)) / turns.sum())
    assert output.stm_cache.turns.tolist() == [3, 4]


def test_joint_loss_of_a_model_with_experts_has_their_balance_in_it():
    model, batch = pretraining_model(**EXPERTS), joint_batch()
    output = model(**batch)
    plain = model(**batch, output_router_logits=False)
    close(output.loss - plain.loss, 0.5 * output.aux_loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_of_any_stage(side):
    model = pretraining_model()
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "masked_input_ids": 0, "mlm_targets": -100}
    for batch in (joint_batch(), episode_batch()):
        pad = (3, 0) if side == "left" else (0, 3)
        padded = {name: torch.nn.functional.pad(tensor, pad, value=fill[name]) for name, tensor in batch.items()}
        close(model(**padded).loss, model(**batch).loss, 2e-6)


def test_the_decoder_trains_the_memory_encoder_by_nothing_but_the_masked_tokens():
    model, batch = pretraining_model(), joint_batch()
    del batch["mlm_targets"]
    model(**batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.memory_encoder.parameters())
    assert model.model.layers[0].memory_cross_attn.k_proj.weight.grad.abs().max() > 0


def test_noise_on_what_the_decoder_reads_comes_in_training_alone():
    model, batch = pretraining_model(), joint_batch()
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    torch.manual_seed(0)
    found = [model.train()(**batch) for _ in range(2)]
    assert (found[0].loss - found[1].loss).abs() > 1e-4
    assert torch.equal(found[0].mlm_loss, found[1].mlm_loss)
    model.memory_noise_std = 0.0
    close(model(**batch).loss, model.eval()(**batch).loss, 1e-6)


@pytest.mark.parametrize("before, after", [(RxTForPreTraining, RxTForCausalLM), (RxTForCausalLM, RxTForPreTraining)])
def test_each_stages_checkpoint_loads_into_the_next_with_no_key_missing_or_left(before, after, tmp_path):
    model = randomize(before(tiny_config()), seed=1)
    model.save_pretrained(tmp_path)
    loaded, info = after.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert isinstance(AutoModelForPreTraining.from_pretrained(tmp_path), RxTForPreTraining)


def test_a_batch_without_masked_tokens_is_refused():
    with pytest.raises(ValueError, match="needs masked_input_ids"):
        pretraining_model()(input_ids=random_ids(2, 5))


def test_tokens_are_interpolated_to_slots_wherever_the_padding_is():
    tokens = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    whole = torch.ones(1, 4, dtype=torch.long)
    close(resampled(tokens, whole, 4).flatten(), tokens.flatten(), 0)
    close(resampled(tokens, whole, 2).flatten(), torch.tensor([0.5, 2.5]), 0)
    close(resampled(tokens, whole, 8).flatten(), torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]), 0)
    padded = torch.tensor([9.0, 9.0, 0.0, 1.0, 2.0, 3.0, 9.0]).view(1, 7, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    close(resampled(padded, mask, 3), resampled(tokens, whole, 3), 0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "memory_attention_type": "self_interlayer"}])
def test_a_stage_trains_exactly_the_parameters_that_get_a_gradient(stage, options):
    model = STAGES[stage][0](tiny_config(**options)).train()
    set_training_stage(model, stage)
    batch = joint_batch() if stage in ("pretraining", "finetuning") else episode_batch()
    batch.setdefault("labels", batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    model(**batch).loss.backward()
    wrong = [name for name, p in model.named_parameters() if p.requires_grad == (p.grad is None)]
    assert not wrong
    assert any(p.requires_grad for p in model.parameters())


def test_an_unknown_stage_and_another_stages_model_are_refused():
    with pytest.raises(ValueError, match="no training stage 'sft'"):
        set_training_stage(tiny_model(), "sft")
    with pytest.raises(ValueError, match=r"trains a RxTForPreTraining, got a RxTForCausalLM"):
        set_training_stage(tiny_model(), "memory_attention")
    with pytest.raises(ValueError, match=r"trains a RxTForCausalLM, got a RxTForPreTraining"):
        set_training_stage(pretraining_model(), "memory_aware")


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def turn_by_turn_gradients(model, batch, bptt_turns):
    """The episode written as a loop, in which every `bptt_turns`-th write starts from a detached memory."""
    model.zero_grad()
    states = model.model.initial_states(2)
    labels = batch["labels"]
    for turn in range(labels.shape[1]):
        ids, mask = batch["input_ids"][:, turn], batch["attention_mask"][:, turn]
        logits = model(ids, mask, stm_cache=states).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, turn, 1:].flatten(), reduction="sum")
        (loss / labels[:, :, 1:].ne(-100).sum()).backward(retain_graph=True)
        states = states.detach() if turn and turn % bptt_turns == 0 else states
        states = model.model.write(states, model.model.embed_tokens(ids), mask)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("recompute", [False, True], ids=["one graph", "recomputed"])
@pytest.mark.parametrize("bptt_turns", [1, 2, 9])
def test_back_propagation_ends_after_the_given_number_of_writes(bptt_turns, recompute):
    model, batch = tiny_model().train(), episode_batch()
    model.set_bptt_turns(bptt_turns)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = turn_by_turn_gradients(model, batch, bptt_turns)
    if recompute:
        model.activation_checkpointing_enable()
    found = gradients(model, batch)
    assert found.keys() == expected.keys()
    for name in expected:
        close(found[name], expected[name])
    # the write itself learns even from one turn to the next
    assert found["model.memory_attention.layers.0.write_attn.q_proj.weight"].abs().max() > 1e-6
    model.set_bptt_turns(None)
    differs = any((found[name] - whole).abs().max() > 1e-6 for name, whole in gradients(model, batch).items())
    assert differs == (bptt_turns < 3)


class Rows(Dataset):
    def __init__(self, shape):
        self.rows = random_ids(8, *shape, seed=2).tolist()
        self.shape = shape

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        # rows of unequal length: their batches hold unequal numbers of labels
        row = self.rows[index][: len(self.rows[index]) - index % 3]
        return {"input_ids": row, "labels": row}


def trained(stage, folder, **arguments):
    model = set_training_stage(pretraining_model({"memory_noise_std": 0.0}).train(), stage)
    shape = (4, 6) if stage == "memory_attention" else (9,)
    settings = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", **arguments}
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    collator = EveryThird(0, mask_token_id=MASK_TOKEN)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=Rows(shape), eval_dataset=Rows(shape))
    trainer.train()
    return trainer


class EveryThird(RxTPreTrainingCollator):
    """Masks the same tokens in every batch size."""

    def __call__(self, features):
        batch = RxTEpisodeCollator.__call__(self, features)
        if batch["input_ids"].dim() == 3:
            return batch
        is_masked = (batch["attention_mask"] == 1) & (torch.arange(batch["input_ids"].shape[1]) % 3 == 1)
        batch["masked_input_ids"] = batch["input_ids"].masked_fill(is_masked, MASK_TOKEN)
        return batch | {"mlm_targets": batch["input_ids"].masked_fill(~is_masked, -100)}


@pytest.mark.parametrize("stage", ["pretraining", "memory_attention"])
def test_plain_trainer_trains_and_evaluates_a_stage_and_leaves_the_rest_alone(stage, tmp_path):
    trainer = trained(stage, tmp_path)
    assert trainer.label_names == ["labels"]
    assert trainer.evaluate()["eval_loss"] > 0
    start, still = pretraining_model().state_dict(), STAGES[stage][1]
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, start[name]) != name.startswith(still), name


def test_collator_masks_real_tokens_only_and_leaves_control_tokens():
    torch.manual_seed(0)
    features = [
        {"input_ids": [1, *range(10, 40), 2], "labels": [-100] * 31 + [2]},
        {"input_ids": [1, 2], "labels": [1, 2]},
    ]
    batch = RxTPreTrainingCollator(0, mask_token_id=MASK_TOKEN, special_token_ids=[0, 1, 2], mlm_probability=0.5)(
        features
    )
    is_masked = batch["masked_input_ids"] == MASK_TOKEN
    assert 5 < is_masked[0].sum() < 25
    assert not is_masked[1].any()
    assert not is_masked[0, [0, 31]].any()
    assert torch.equal(batch["mlm_targets"], batch["input_ids"].masked_fill(~is_masked, -100))
    assert torch.equal(batch["masked_input_ids"][~is_masked], batch["input_ids"][~is_masked])


def test_a_part_stays_bit_equal_until_its_step_and_moves_from_it():
    model = pretraining_model().train()
    model.memory_noise_std = 0.0
    schedule = {"model.layers.": 2, "model.layers.1.": 1}
    optimizer, scheduler = unfreezing_optimizer(model, schedule, lambda step: 1.0, lr=1e-2, weight_decay=0.1)
    parts = {"model.layers.0.mlp.up_proj.weight": 2, "model.layers.1.mlp.up_proj.weight": 1, "model.norm.weight": 0}
    for step in range(3):
        before = {name: model.get_parameter(name).detach().clone() for name in parts}
        model(**joint_batch()).loss.backward()
        optimizer.step()
        scheduler.step()
        for name, first in parts.items():
            assert torch.equal(model.get_parameter(name), before[name]) == (step < first), (name, step)
    with pytest.raises(ValueError, match="starts with 'layers'; they start with"):
        unfreezing_optimizer(model, {"layers": 1}, lambda step: 1.0)
