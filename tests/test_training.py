# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import importlib
import itertools
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from demo.facts import corpus_texts, generate_dialogue
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import Trainer, TrainingArguments

from rxt_hf import RxTConfig, RxTForCausalLM
from rxt_hf.chat_template import encode_interactions, train_tokenizer
from rxt_hf.data.collator import RxTEpisodeCollator

EXPERTS = {"num_experts": 3, "moe_intermediate_size": 16, "output_router_logits": True, "router_aux_loss_coef": 0.5}
# the other implementations have no float64
EXPERTS["experts_implementation"] = "eager"
VARIANTS = {
    "dense": {},
    "self_interlayer": {"memory_attention_type": "self_interlayer", "use_gated_attention": True},
    "experts": EXPERTS,
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


def tiny_model(vocab_size=300, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RxTConfig(vocab_size=vocab_size, num_memory_slots=5, initializer_range=0.1, **sizes, **fields)
    return RxTForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(itertools.islice(corpus_texts(20), 100), vocab_size=300, max_length=96)


@pytest.fixture(scope="module")
def episodes(tokenizer):
    """Eight dialogues of two to four turns, whose answers differ in length."""
    dialogues = [
        generate_dialogue(seed, num_turns=2 + seed % 3)["interactions"] for seed in range(1_000_000, 1_000_008)
    ]
    return [
        encode_interactions(tokenizer, [turn["query"] for turn in turns], [turn["answer"] for turn in turns])
        for turns in dialogues
    ]


@pytest.fixture(scope="module")
def batch(episodes):
    return RxTEpisodeCollator(pad_token_id=0)(episodes[:3])


def random_episode(rows=2, turns=4, tokens=12):
    """Every token but the first is a target; the last turn of the second row is padding."""
    ids = torch.randint(10, 300, (rows, turns, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if turns > 1:
        mask[1, -1], mask[0, 1, 7:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[..., 0] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def trainer_for(model, episodes, folder, **arguments):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", **arguments}
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    collator = RxTEpisodeCollator(pad_token_id=0)
    return Trainer(model, args, data_collator=collator, train_dataset=episodes, eval_dataset=episodes[:4])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=1e-4, msg=lambda m, n=name: n + m)


def turn_by_turn(model, batch):
    """The mean loss over all targets, each turn under the memory of those before it; and the memory after all."""
    memory, total = model.init_stm(len(batch["labels"])), 0.0
    for turn in range(batch["labels"].shape[1]):
        ids, mask, labels = (batch[name][:, turn] for name in ("input_ids", "attention_mask", "labels"))
        logits = model(ids, attention_mask=mask, stm_cache=memory).logits[:, :-1]
        total = total + cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        memory = model.update_memory(memory, ids, mask)
    return total / (batch["labels"][..., 1:] != -100).sum(), memory


def test_trainer_resumed_at_step_two_equals_four_steps(episodes, tmp_path):
    whole = trainer_for(tiny_model(), episodes, tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    torch.manual_seed(99)
    rest = trainer_for(tiny_model(), episodes, tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(whole)) == 4
    assert losses(rest) == losses(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in rest.model.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_episodes_at_once_equal_four_accumulated_ones(episodes, tmp_path, checkpointing):
    targets = [sum(label != -100 for turn in episode["labels"] for label in turn) for episode in episodes]
    assert len(set(targets[:4])) > 1, "equal counts would hide a mean over batches instead of targets"
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = trainer_for(
            tiny_model(),
            episodes,
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            activation_checkpointing=checkpointing,
            # of Adam only the sign of the first gradient would show
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.5,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    start = tiny_model().state_dict()
    assert any((start[name] - tensor).abs().max() > 1e-2 for name, tensor in weights[0].items())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=0)


def test_evaluation_reports_the_loss_and_prediction_the_logits_of_episodes(episodes, tmp_path):
    trainer = trainer_for(tiny_model(), episodes, tmp_path, per_device_eval_batch_size=4)
    assert trainer.label_names == ["labels"]
    batch = trainer.data_collator(episodes[:4])
    with torch.no_grad():
        output = trainer.model.eval()(**batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(output.loss.item(), abs=1e-6)
    predicted = torch.tensor(trainer.predict(episodes[:4]).predictions)
    torch.testing.assert_close(predicted, output.logits, atol=1e-5, rtol=0)


def test_training_steps_lower_the_loss(episodes, tmp_path):
    trainer = trainer_for(tiny_model(), episodes, tmp_path, max_steps=12)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast_trains_float32_weights(episodes, tmp_path, checkpointing):
    reference = trainer_for(tiny_model(), episodes, tmp_path, max_steps=2)
    reference.train()
    trainer = trainer_for(
        tiny_model(), episodes, tmp_path, max_steps=2, bf16=True, activation_checkpointing=checkpointing
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(reference), abs=0.05)
    assert losses(trainer) != losses(reference)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@each_variant
def test_episode_equals_turns_one_by_one(fields):
    model, batch = tiny_model(**fields), random_episode()
    if fields is EXPERTS:
        model.config.output_router_logits = False
    output = model(**batch)
    expected, memory = turn_by_turn(model, batch)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.stm_cache.states, memory.states, atol=1e-5, rtol=0)
    assert output.stm_cache.turns.tolist() == memory.turns.tolist() == [4, 3]
    assert_equal_gradients(gradients(model, output.loss), gradients(model, expected), tolerance=1e-5)


@each_variant
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_recomputed_episode_has_the_same_loss_and_gradients(fields, use_reentrant):
    model, batch = tiny_model(**fields).double(), random_episode()
    if use_reentrant:
        # its first pass has no graph, so router logits that it hands out carry no gradient
        model.config.output_router_logits = False
    output = model(**batch)
    expected = gradients(model, output.loss)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = model(**batch)
    torch.testing.assert_close(recomputed.loss, output.loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(recomputed.stm_cache.states, output.stm_cache.states, atol=1e-6, rtol=0)
    assert_equal_gradients(gradients(model, recomputed.loss), expected, tolerance=1e-6)


def in_float64(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    """The loss of transformers' own causal language models, which is in float32."""
    targets = pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum") / num_items_in_batch


@each_variant
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("write_mask", [None, [[1, 0, 1, 0], [0, 1, 1, 1]]], ids=["all written", "some written"])
@pytest.mark.parametrize(
    "labelled", [[[0, 1, 0, 1], [0, 0, 1, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]], ids=["some", "none"]
)
def test_decoding_labelled_turns_alone_changes_nothing(fields, checkpointing, write_mask, labelled):
    if fields is EXPERTS:
        fields = EXPERTS | {"output_router_logits": False}
    model, batch = tiny_model(**fields).double(), random_episode()
    model.loss_function = in_float64
    batch["labels"] = batch["labels"].masked_fill(torch.tensor(labelled)[..., None] == 0, -100)
    if write_mask is not None:
        batch["write_mask"] = torch.tensor(write_mask)
    all_turns = model.eval()(**batch)
    assert all_turns.logits.shape == (2, 4, 12, 300)
    expected = gradients(model, all_turns.loss)
    rows = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    if checkpointing:
        model.activation_checkpointing_enable()
    output = model.train()(**batch)
    handle.remove()
    some = sum(map(sum, labelled))
    # recomputed turns are decoded one by one, and each for one row at least
    assert sum(rows) == (max(some, 4) if checkpointing else max(some, 1))
    assert output.logits is None
    torch.testing.assert_close(output.loss, all_turns.loss, atol=1e-10, rtol=0)
    torch.testing.assert_close(output.stm_cache.states, all_turns.stm_cache.states, atol=1e-10, rtol=0)
    assert output.stm_cache.turns.tolist() == all_turns.stm_cache.turns.tolist()
    found = gradients(model, output.loss)
    assert (found["model.norm.weight"].abs().max() > 0) == bool(some)
    assert_equal_gradients(found, expected, tolerance=1e-10)


def test_turns_chosen_by_hand_are_decoded_alone():
    model, batch = tiny_model().eval(), random_episode()
    read_mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    whole = model(**batch)
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    chosen = model(ids, attention_mask=mask, read_mask=read_mask)
    torch.testing.assert_close(chosen.logits, whole.logits[read_mask.bool()], atol=1e-5, rtol=0)
    assert torch.equal(chosen.stm_cache.states, whole.stm_cache.states)
    # the labels of all turns are the denominator, whatever is decoded
    kept = labels.masked_fill(read_mask[..., None] == 0, -100)
    share = (kept[..., 1:] != -100).sum() / (labels[..., 1:] != -100).sum()
    expected = model(ids, attention_mask=mask, labels=kept).loss * share
    for training in (False, True):
        loss = model.train(training)(ids, attention_mask=mask, labels=labels, read_mask=read_mask).loss
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="read_mask and output_router_logits exclude each other"):
        tiny_model(**EXPERTS)(ids, read_mask=read_mask)


def test_every_weight_gets_a_gradient_from_an_episode():
    model = tiny_model()
    found = gradients(model, model(**random_episode()).loss)
    assert {name for name, _ in model.named_parameters()} == found.keys()
    assert [name for name, gradient in found.items() if gradient.abs().max() == 0] == []


def test_gradient_reaches_the_memory_three_turns_back_and_detach_cuts_it():
    model, batch = tiny_model(), random_episode()
    first = model.model.embed_tokens(batch["input_ids"][:, 0]).detach().requires_grad_()
    for detached in (False, True):
        memory = model.update_memory(None, inputs_embeds=first)
        memory = memory.detach() if detached else memory
        for turn in (1, 2):
            memory = model.update_memory(memory, batch["input_ids"][:, turn], batch["attention_mask"][:, turn])
        loss = model(batch["input_ids"][:, 2], labels=batch["labels"][:, 2], stm_cache=memory).loss
        (gradient,) = torch.autograd.grad(loss, first, allow_unused=True)
        assert gradient is None if detached else gradient.abs().max() > 1e-8


def padded(batch, turns, tokens):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: pad(batch[name], (0, tokens, 0, turns), value=fill[name]) for name in batch}


@each_variant
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("turns", "tokens"), [(0, 5), (2, 0), (1, 3)])
def test_padding_changes_no_loss(batch, fields, checkpointing, turns, tokens):
    model = tiny_model(**fields)
    if checkpointing:
        model.activation_checkpointing_enable()
    expected = model(**batch)
    output = model(**padded(batch, turns, tokens))
    torch.testing.assert_close(output.loss, expected.loss, atol=2e-6, rtol=0)
    torch.testing.assert_close(output.stm_cache.states, expected.stm_cache.states, atol=1e-6, rtol=0)


def test_padding_of_a_single_turn_on_either_side_changes_no_loss():
    model = tiny_model(**EXPERTS)
    episode = random_episode(turns=1)
    batch, wide = ({name: tensor[:1, 0] for name, tensor in b.items()} for b in (episode, padded(episode, 0, 5)))
    left = {name: tensor.roll(5, dims=1) for name, tensor in wide.items()}
    expected = model(**batch).loss
    torch.testing.assert_close(model(**wide).loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(**left).loss, expected, atol=1e-6, rtol=0)


def test_answer_of_a_turn_is_not_in_the_memory_it_is_scored_under(batch):
    model = tiny_model().eval()
    row, turn = 1, 1
    answer = (batch["labels"][row, turn] != -100).nonzero().flatten()
    changed = copy.deepcopy(batch)
    changed["input_ids"][row, turn, answer] = (batch["input_ids"][row, turn, answer] - 9) % 290 + 10
    changed["labels"][row, turn, answer] = changed["input_ids"][row, turn, answer]
    with torch.no_grad():
        before, after = model(**batch).logits[row], model(**changed).logits[row]
    difference = (after - before).abs().amax(-1)
    # the logits that predict the first token of the answer come from the position before it
    assert (difference[:turn] == 0).all()
    assert (difference[turn, : answer[0]] == 0).all()
    assert difference[turn, answer[0]] > 1e-3
    assert difference[turn + 1, 0] > 1e-4


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in storages that were made inside it and are still referred to."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage):
        self.seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size):
        self.now -= size


def peak_bytes(model, turns):
    batch = random_episode(turns=turns, tokens=64)
    model.zero_grad()
    with LiveBytes() as live:
        model(**batch).loss.backward()
    return live.peak


def test_peak_memory_is_nearly_flat_in_the_number_of_turns_when_recomputed():
    model = tiny_model(vocab_size=2000)
    kept = [peak_bytes(model, turns) for turns in (4, 16)]
    model.activation_checkpointing_enable()
    recomputed = [peak_bytes(model, turns) for turns in (4, 16)]
    assert kept[1] > 3.5 * kept[0]
    assert recomputed[1] < 1.2 * recomputed[0]
    # what a turn adds is its embedded tokens and one memory, not its activations
    assert recomputed[1] - recomputed[0] < 0.05 * (kept[1] - kept[0])


# peft itself still uses the former name
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["finetune_trainer", "finetune_peft"])
def test_example_runs_and_ends_as_its_docstring_says(tokenizer, tmp_path, monkeypatch, capsys, name):
    if name == "finetune_peft":
        pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    arguments = ["--model", str(tmp_path / "model"), "--max-steps", "2", "--output-dir", str(tmp_path / "tuned")]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    example = importlib.import_module(name)
    # its functions are those of finetune_trainer in both
    monkeypatch.setattr(sys.modules["finetune_trainer"], "TEST_WORDS", ("lantern",))
    example.main()
    last_line = capsys.readouterr().out.splitlines()[-1]
    expected = example.__doc__.strip().splitlines()[-1].strip()
    assert re.sub(r"\d+", "N", last_line) == re.sub(r"\d+", "N", expected)
    assert list((tmp_path / "tuned").glob("*model.safetensors"))
