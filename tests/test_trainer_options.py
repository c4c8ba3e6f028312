# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Options of `Trainer` that work on inputs, labels, embeddings or outputs, outside of the model's forward.

    option                              single turns and episodes of RxTForCausalLM; RxTForPreTraining
    label_smoothing_factor              the shifted loss; refused with the routers' loss, and by RxTForPreTraining
    compute_loss_func                   gets the logits of all turns; refused where label smoothing is
    neftune_noise_alpha                 noise of a turn's tokens and width, however many turns there are
    compute_metrics, predict            any single turns; episodes with pad_to_turns and pad_to_tokens of the collator
    batch_eval_metrics                  episodes of any shape: nothing is joined
    eval_do_concat_batches=False        episodes of any shape: nothing is joined
    preprocess_logits_for_metrics       gets logits and labels of a batch; joined as above
    include_for_metrics                 inputs and loss are joined as above
    prediction_loss_only                the loss alone: episodes of any shape
    label_names                         found by itself: labels
    average_tokens_across_devices       one denominator, see test_distributed.py; False: one for each process
    include_num_input_tokens_seen       real tokens, by the attention mask
    group_by_length, length column      a sampler: groups episodes by their number of turns, or by the column
    auto_find_batch_size                as in any model
    torch_compile                       as in any model, and decodes all turns; smoothing with it is refused by
                                        `rxt train`: Trainer does not find the name of a compiled model in its table
    use_liger_kernel                    has no kernels for this model, says so and changes nothing
"""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rxt_hf
from rxt_hf import RxTForCausalLM, RxTForPreTraining
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.data.collator import RxTEpisodeCollator, RxTPreTrainingCollator

from .models import EXPERTS, random_ids, tiny_config
from .reference_rxt import randomize

LORA = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, "ensure_weight_tying": True}


def model_of(model_class=RxTForCausalLM, mlm_loss_coef=0.5, **options):
    settings = {"mlm_loss_coef": mlm_loss_coef, "memory_noise_std": 0.0} if model_class is RxTForPreTraining else {}
    return randomize(model_class(tiny_config(**options), **settings), seed=0)


def rows_of(turns, answers=(1, 2, 4, 7), tokens=8):
    """Rows whose answers have unequal lengths; every second turn of an episode has no label. `turns=0`: one turn."""
    rows = []
    for ids, answer in zip(random_ids(len(answers), max(turns, 1), tokens, seed=3).tolist(), answers, strict=True):
        labels = [
            [-100] * tokens if turn % 2 else [-100] * (tokens - answer) + row[tokens - answer :]
            for turn, row in enumerate(ids)
        ]
        rows.append({"input_ids": ids, "labels": labels} if turns else {"input_ids": ids[0], "labels": labels[0]})
    return rows


class MaskEveryThird(RxTPreTrainingCollator):
    """Masks the same tokens in every batch size, and unequal shares of the rows."""

    def __call__(self, features):
        batch = RxTEpisodeCollator.__call__(self, features)
        is_masked = batch["input_ids"] % 3 == 0
        batch["masked_input_ids"] = batch["input_ids"].masked_fill(is_masked, self.mask_token_id)
        return batch | {"mlm_targets": batch["input_ids"].masked_fill(~is_masked, -100)}


def trainer_of(model, rows, folder, collator=None, size=4, steps=1, **arguments):
    settings = {"max_steps": 1, "logging_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0}
    settings |= {"lr_scheduler_type": "constant", "save_strategy": "no", "remove_unused_columns": False}
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    settings |= {"per_device_eval_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    others = {name: arguments.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in arguments}
    args = TrainingArguments(str(folder), **settings | arguments)
    collator = RxTEpisodeCollator(0) if collator is None else collator
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=collator, **others)


def loss_and_gradient(model, *arguments, **options):
    """Of one step of plain gradient descent with a learning rate of 1."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, *arguments, **options)
    trainer.train()
    gradient = torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])
    return trainer.state.log_history[0]["loss"], gradient


def smoothed(model, rows, factor):
    """The loss of the shifted labels, smoothed, of all turns."""
    batch = RxTEpisodeCollator(0)(rows)
    labels = batch.pop("labels")
    logits = model.eval()(**batch).logits[..., :-1, :].flatten(0, -2)
    return F.cross_entropy(logits, labels[..., 1:].flatten(), label_smoothing=factor).item()


@pytest.mark.parametrize("kind", ["plain", "lora", "checkpointing", "subclass"])
@pytest.mark.parametrize("turns", [0, 1, 3], ids="{} turns".format)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_label_smoothing_shifts(turns, kind, tmp_path):
    model, rows = model_of(), rows_of(turns)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    elif kind == "subclass":
        # as FSDP2 makes one of the model's class
        model.__class__ = type("FSDPRxTForCausalLM", (RxTForCausalLM,), {})
    expected = smoothed(model, rows, 0.2)
    options = {"label_smoothing_factor": 0.2, "activation_checkpointing": kind == "checkpointing"}
    loss, gradient = loss_and_gradient(model, rows, tmp_path, **options)
    assert loss == pytest.approx(expected, abs=1e-4)
    assert gradient.abs().max() > 1e-3


def test_causal_language_models_are_looked_up_by_name():
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rxt"] == "RxTForCausalLM"


@pytest.mark.parametrize("name", ["label_smoothing_factor", "compute_loss_func"])
@pytest.mark.parametrize("case", ["experts", "joint", "memory"])
def test_losses_that_would_be_dropped_are_refused(case, name, tmp_path):
    model = model_of(**EXPERTS) if case == "experts" else model_of(RxTForPreTraining)
    collator = MaskEveryThird(0, mask_token_id=3) if case == "joint" else None
    option = {name: 0.1 if name == "label_smoothing_factor" else lambda outputs, labels, **_: outputs.logits.sum()}
    with pytest.raises(ValueError, match="labels were taken away before forward"):
        trainer_of(model, rows_of(0 if case == "joint" else 3), tmp_path, collator, **option).train()


def test_loss_function_of_the_user_gets_all_turns(tmp_path):
    seen = []

    def own(outputs, labels, num_items_in_batch):
        seen.append((outputs.logits.shape[:3], labels.shape, int(num_items_in_batch)))
        return F.cross_entropy(outputs.logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())

    loss, gradient = loss_and_gradient(model_of(), rows_of(3), tmp_path, compute_loss_func=own)
    expected, expected_gradient = loss_and_gradient(model_of(), rows_of(3), tmp_path)
    assert seen == [((4, 3, 8), (4, 3, 8), 28)]
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("turns", [0, 1, 6], ids="{} turns".format)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_noise_on_embeddings_does_not_depend_on_the_number_of_turns(turns, checkpointing, tmp_path):
    model, noise = model_of(), []
    clean = model.model.embed_tokens.weight.detach().clone()

    def measured(module, inputs, output):
        noise.append((output - clean[inputs[0]]).abs().max().item())

    trainer = trainer_of(
        model, rows_of(turns), tmp_path, neftune_noise_alpha=5, activation_checkpointing=checkpointing
    )
    train = trainer._inner_training_loop

    def hooked(*arguments, **options):
        handle = model.model.embed_tokens.register_forward_hook(measured)
        # after the hook of the Trainer, which is there from the start of training
        assert list(model.model.embed_tokens._forward_hooks)[-1] == handle.id
        return train(*arguments, **options)

    trainer._inner_training_loop = hooked
    trainer.train()
    limit = 5 / (8 * model.config.hidden_size) ** 0.5
    assert len(noise) == 1
    assert 0.9 * limit < noise[0] <= limit * 1.001


def test_predictions_of_episodes_of_many_shapes_are_joined_if_padded(tmp_path):
    model = model_of().eval()
    rows = rows_of(3) + rows_of(2, tokens=11)
    seen = []

    def metrics(found):
        seen.append((found.predictions.shape, found.label_ids.shape))
        return {"tokens": int((found.label_ids != -100).sum())}

    collator = RxTEpisodeCollator(0, pad_to_turns=4, pad_to_tokens=12)
    trainer = trainer_of(model, rows, tmp_path, collator, compute_metrics=metrics)
    assert trainer.evaluate()["eval_tokens"] == sum(
        label != -100 for row in rows for t in row["labels"] for label in t
    )
    assert seen == [((8, 4, 12, 50), (8, 4, 12))]
    predicted = trainer.predict(rows).predictions
    batch = RxTEpisodeCollator(0)(rows[4:])
    np.testing.assert_allclose(predicted[4:, :2, :11], model(**batch).logits.detach(), atol=1e-5)
    for refused in ({"pad_to_turns": 2}, {"pad_to_tokens": 10}):
        with pytest.raises(ValueError, match="more than pad_to_"):
            trainer_of(model, rows, tmp_path, RxTEpisodeCollator(0, **refused)).evaluate()


@pytest.mark.parametrize(
    "options", [{"eval_do_concat_batches": False}, {"batch_eval_metrics": True}, {"prediction_loss_only": True}]
)
def test_episodes_of_many_shapes_are_measured_batch_by_batch(options, tmp_path):
    shapes = []

    def metrics(found, compute_result=True):
        shapes.append(np.shape(found.predictions[0] if isinstance(found.predictions, list) else found.predictions))
        return {"batches": len(shapes)}

    rows = rows_of(3) + rows_of(2, tokens=11)
    found = trainer_of(model_of(), rows, tmp_path, compute_metrics=metrics, **options).evaluate()
    assert found["eval_loss"] > 0
    assert bool(shapes) != ("prediction_loss_only" in options)


def test_counted_input_tokens_are_the_real_ones(tmp_path):
    rows = rows_of(3)
    rows[0] = {name: values[:1] for name, values in rows[0].items()}
    trainer = trainer_of(model_of(), rows, tmp_path, include_num_input_tokens_seen="non_padding")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 8 * (1 + 3 * 3)


def test_episodes_grouped_by_length_train(tmp_path):
    trainer_of(model_of(), rows_of(3), tmp_path, train_sampling_strategy="group_by_length").train()


@pytest.mark.parametrize("turns", [0, 3], ids="{} turns".format)
def test_compiled_model_trains_as_the_plain_one(turns, tmp_path):
    plain = loss_and_gradient(model_of(), rows_of(turns), tmp_path)
    found = loss_and_gradient(model_of(), rows_of(turns), tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert found[0] == pytest.approx(plain[0], abs=1e-5)
    torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=1e-4)


# ---- one denominator


CASES = {
    "tokens": (RxTForCausalLM, {}, 3),
    "tokens of one turn": (RxTForCausalLM, {}, 0),
    "experts": (RxTForCausalLM, EXPERTS, 3),
    "experts of one turn": (RxTForCausalLM, EXPERTS, 0),
    "memory": (RxTForPreTraining, {}, 3),
    "masked tokens": (RxTForPreTraining, {"mlm_loss_coef": 0.7}, 0),
    "masked tokens and experts": (RxTForPreTraining, EXPERTS | {"mlm_loss_coef": 0.7}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_accumulated_batches_have_the_gradient_of_one(case, tmp_path):
    model_class, options, turns = CASES[case]
    model, rows = model_of(model_class, experts_implementation="eager", **options).double(), rows_of(turns)
    if turns:
        # unequal numbers of turns too
        rows[1] = {name: values[:1] for name, values in rows[1].items()}
    is_joint = model_class is RxTForPreTraining and not turns
    collator = MaskEveryThird(0, mask_token_id=3) if is_joint else RxTEpisodeCollator(0)
    whole, cut = (
        loss_and_gradient(copy.deepcopy(model), rows, tmp_path, collator, size, steps)
        for size, steps in ((4, 1), (1, 4))
    )
    assert whole[0] == pytest.approx(cut[0], abs=1e-6)
    assert whole[1].norm() > 0.01
    assert (whole[1] - cut[1]).norm() / whole[1].norm() < 1e-6


# ---- the way of multi-turn messages into Trainer


def test_messages_go_into_trainer_in_three_lines(tmp_path):
    said = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello you"}]
    tokenizer = train_tokenizer(["hi there", "hello you"] * 20, vocab_size=280, max_length=64)
    model = RxTForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    episodes = rxt_hf.Episodes(tokenizer, rxt_hf.read_episodes([{"messages": said * 3}, {"messages": said * 2}]))
    collator = rxt_hf.RxTEpisodeCollator(tokenizer)
    trainer = Trainer(model, args, train_dataset=episodes, data_collator=collator)
    assert collator([episodes[0], episodes[1]])["input_ids"].shape[:2] == (2, 3)
    assert trainer.train().training_loss > 0


def test_outputs_of_training_and_of_evaluation_are_model_outputs():
    model, batch = model_of(), RxTEpisodeCollator(0)(rows_of(3))
    trained, evaluated = model.train()(**batch), model.eval()(**batch)
    assert isinstance(trained, ModelOutput) and trained.logits is None
    assert evaluated.logits.shape == (4, 3, 8, 50)
    torch.testing.assert_close(trained.loss, evaluated.loss, atol=1e-6, rtol=0)
