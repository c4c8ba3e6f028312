# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Training of a converted language model: what stays as it was, what is saved, and what the recipe measures."""

import copy
import json
import re
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from rxt_hf import RxTForCausalLM, RxTModel
from rxt_hf.chat_template import CONTROL_TOKENS, train_tokenizer
from rxt_hf.convert import adapter_config, from_llm
from rxt_hf.data.readers import Episodes
from rxt_hf.hub import model_card
from rxt_hf.training import upcycle

from .models import close
from .reference_rxt import randomize

peft = pytest.importorskip("peft")

# peft itself still uses the former name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
VOCABULARY = 280


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["I want a table for 7 people. It is booked."] * 8, vocab_size=VOCABULARY, max_length=96)


# the recipe trains the paper's parts
PAPER = {"memory_reading": "cross_attention", "memory_encoding": "encoder", "memory_writing": "attention"}


def make_source(is_tied=True):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=is_tied)
    return randomize(LlamaForCausalLM(config), seed=3)


def converted(is_tied=True):
    return from_llm(make_source(is_tied), num_memory_slots=5, memory_layers=[0, 2], **PAPER)


EPISODES = torch.randint(0, VOCABULARY, (2, 3, 9), generator=torch.Generator().manual_seed(5))


def train(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=EPISODES, labels=EPISODES).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def computed(model):
    out = model(input_ids=EPISODES)
    return torch.cat([out.logits.flatten(), out.stm_cache.states.flatten()])


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_adapter_trains_the_memory_and_new_rows_alone_saves_them_alone_and_merges(tokenizer, is_tied, tmp_path):
    torch.manual_seed(0)
    source, model = make_source(is_tied).state_dict(), converted(is_tied)
    before = computed(model)
    adapted = peft.get_peft_model(model, adapter_config(model, tokenizer, r=2))
    assert torch.equal(computed(adapted), before)
    start = {name: tensor.detach().clone() for name, tensor in adapted.named_parameters()}
    train(adapted, steps=100 if is_tied else 10)
    after = computed(adapted)
    assert (after - before).abs().max() > 0.1
    for name, tensor in adapted.named_parameters():
        assert torch.equal(tensor, start[name]) != tensor.requires_grad, name
    with adapted.disable_adapter():
        assert torch.equal(computed(adapted), before)

    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trainable = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    assert sum(tensor.numel() for tensor in saved.values()) == sum(tensor.numel() for tensor in trainable.values())
    memory = [name for name, _ in converted().named_parameters() if "memory" in name and "initial" not in name]
    assert {name for name in saved if "memory" in name} == {f"base_model.model.{name}" for name in memory}
    loaded = peft.PeftModel.from_pretrained(converted(is_tied), tmp_path).eval()
    assert torch.equal(computed(loaded), after)

    # in float64, so that only a wrong merge, and no rounding of this machine, tells the two apart
    after = computed(adapted.double())
    merged = adapted.merge_and_unload()
    assert type(merged) is RxTForCausalLM
    assert merged.state_dict().keys() == converted(is_tied).state_dict().keys()
    torch.testing.assert_close(computed(merged), after, rtol=0, atol=1e-10)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == is_tied
    new = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS.values()))
    old = [row for row in range(VOCABULARY) if row not in new]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = merged.state_dict()[name]
        assert torch.equal(table[old], source[name][old])
        assert not torch.equal(table[new], source[name][new])


def test_lora_is_on_the_decoder_alone_and_its_fields_can_be_chosen(tokenizer):
    model = converted()
    config = adapter_config(model, r=3, target_modules=["q_proj"], exclude_modules=".*memory_.*")
    assert (config.r, config.target_modules, config.trainable_token_indices) == (3, {"q_proj"}, None)
    adapted = peft.get_peft_model(model, adapter_config(model, tokenizer))
    lora = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(lora) == 3 * 7 and not any("memory" in name for name in lora)


def test_tokenizer_without_control_tokens_is_refused_by_the_adapter_too():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"word": 0}, "word")))
    with pytest.raises(ValueError, match="lacks the control tokens"):
        adapter_config(converted(), plain)


DIALOGUE = [
    {"query": "A table for 7 people.", "answer": "It is booked.", "recall": []},
    {"query": "Thanks", "answer": "I want it.", "recall": []},
    {"query": "For how many?", "answer": "For 7 people.", "recall": [[4, 5, 2], [6, 12, 1]]},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    for split in ("train", "test"):
        lines = [json.dumps({"interactions": DIALOGUE[:turns]}) for turns in (3, 2, 3, 3)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def batch(tokenizer):
    dialogues = [{"interactions": DIALOGUE}, {"interactions": DIALOGUE[1:]}]
    (batch,) = upcycle.recall_batches(tokenizer, dialogues, max_tokens=64, batch_tokens=512)
    return batch


def rxt(tokenizer):
    """A converted model whose memory says something already."""
    return randomize(from_llm(make_source(), num_memory_slots=5, tokenizer=tokenizer, **PAPER), seed=4).eval()


def test_labels_are_the_recalled_words_with_their_distances(tokenizer, batch):
    is_target = batch["labels"] != -100
    assert tokenizer.decode(batch["labels"][is_target]) == "7people" * 2
    first = batch["labels"][is_target] == tokenizer.encode("7", add_special_tokens=False)[0]
    assert first.sum() == 2
    lowest = torch.tensor([low for low, _ in upcycle.DISTANCES])[batch["distances"][is_target]]
    assert (lowest[first] == 2).all() and (lowest[~first] == 1).all()


@torch.no_grad()
def test_losses_are_those_of_the_whole_episode_at_the_labels(tokenizer, batch):
    model = rxt(tokenizer)
    is_target = batch["labels"][..., 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    targets = batch["labels"][..., 1:][is_target]

    def expected(logits):
        return F.cross_entropy(logits[..., :-1, :][is_target], targets, reduction="none")

    own = upcycle.token_losses(model, batch)
    close(own, expected(model(**inputs).logits), 1e-5)
    flat = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
    cleared = model(**flat).logits.unflatten(0, is_target.shape[:2])
    close(upcycle.token_losses(model, batch, "cleared"), expected(cleared), 1e-5)
    shuffled = upcycle.token_losses(model, batch, "shuffled")
    assert (own - shuffled).abs().max() > 1e-3
    swapped = {name: tensor.flip(0) for name, tensor in batch.items()}
    close(upcycle.token_losses(model, swapped, "shuffled").sort().values, shuffled.sort().values, 1e-5)


def test_turns_without_a_label_are_written_but_not_decoded(tokenizer, batch):
    model = rxt(tokenizer)
    rows = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    upcycle.token_losses(model, batch)
    assert rows == [2]
    loss = upcycle.token_losses(model, batch).sum()
    loss.backward()
    assert model.model.memory_attention.layers[0].write_attn.q_proj.weight.grad.abs().max() > 0


def test_language_model_is_measured_in_its_own_template_with_and_without_history(tokenizer, batch):
    source, theirs = make_source().eval(), copy.deepcopy(tokenizer)
    theirs.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};\n{% endfor %}"
    losses = [upcycle.source_losses(source, theirs, tokenizer, [batch], history=history) for history in (False, True)]
    tokens = (batch["labels"] != -100).sum()
    assert [found["all"][1] for found in losses] == [tokens, tokens]

    def nats(text):
        ids = torch.tensor([theirs.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            return F.cross_entropy(source(ids).logits[0, :-1], ids[0, 1:], reduction="none")

    turns = [f"<user>{turn['query']};\n<assistant>{turn['answer']};\n" for turn in DIALOGUE]
    texts = ([turns[2], turns[2]], ["".join(turns), "".join(turns[1:])])
    for found, pair in zip(losses, texts, strict=True):
        # the digit stands before " people.;\n" and is recalled over two turns
        behind = len(theirs.encode(" people.;\n", add_special_tokens=False))
        expected = sum(nats(text)[-behind - 1] for text in pair) / 2
        assert found["2-2"] == [pytest.approx(expected.item(), abs=1e-4), 2]


def test_every_step_has_something_to_learn(tokenizer):
    options = upcycle.UpcycleArguments(model="", data=[], labelled_share=0.0, tokens_per_step=100)
    episodes = Episodes(tokenizer, [{"interactions": DIALOGUE[:2]}, {"interactions": DIALOGUE}])
    labels = [
        [max(row) for item in step for row in item["labels"]] for step in upcycle.TrainingSteps(episodes, 4, options)
    ]
    assert all(max(rows) >= 0 for rows in labels)
    # the dialogue with recalled words needs no answer without them
    assert sorted(rows for rows in labels if len(rows) == 3)[0][:2] == [-100, -100]


def test_steps_are_a_function_of_their_index_alone(tokenizer):
    options = upcycle.UpcycleArguments(model="", data=[], labelled_share=0.5)
    episodes = Episodes(tokenizer, [{"interactions": DIALOGUE}] * 8)
    first, second = (upcycle.TrainingSteps(episodes, 4, options) for _ in range(2))
    for index in (3, 0, 3):
        assert first[index] == second[index]
    assert len({str(item["labels"]) for item in first[0]}) > 1


def test_recipe_trains_resumes_and_reports_recall_by_distance(tokenizer, data, tmp_path, monkeypatch):
    is_autocast, read_episode = [], RxTModel.read_episode

    def noted(*args, **kwargs):
        is_autocast.append(torch.is_autocast_enabled("cpu"))
        return read_episode(*args, **kwargs)

    monkeypatch.setattr(RxTModel, "read_episode", noted)
    base, source = tmp_path / "base", tmp_path / "source"
    rxt(tokenizer).save_pretrained(base)
    make_source().save_pretrained(source)
    for folder in (base, source):
        tokenizer.save_pretrained(folder)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};\n{% endfor %}"
    plain.save_pretrained(source)
    shared = ["--model", str(base), "--data", str(data), "--lora_rank", "2", "--disable_tqdm", "True"]
    shared += ["--save_steps", "2", "--tokens_per_step", "256", "--learning_rate", "0.01"]
    upcycle.main([*shared, "--max_steps", "4", "--output_dir", str(tmp_path / "whole"), "--source", str(source)])
    assert is_autocast == [True] * 4
    # stopped after its first two steps, as by a kill
    stopped = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", stopped / "checkpoint-2")
    upcycle.main([*shared, "--max_steps", "4", "--output_dir", str(stopped)])
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", stopped)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    name = "model.memory_encoder.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], RxTForCausalLM.from_pretrained(base).state_dict()[name])
    whole, resumed = (
        json.loads((folder / "recall.json").read_text())["nats"][data.name] for folder in (tmp_path / "whole", stopped)
    )
    assert resumed == {name: whole[name] for name in ("own", "cleared", "shuffled")}
    assert set(whole["own"]) == {"all", "1-1", "2-2"} and whole["own"]["2-2"][1] == 3
    own, without, full = (whole[name]["all"][0] for name in ("own", "source_query_only", "source_full_history"))
    assert whole["gap_closed"]["all"] == pytest.approx((without - own) / (without - full), abs=1e-3)
    card = model_card(rxt(tokenizer), "x", **json.loads((tmp_path / "whole" / "card.json").read_text()))
    assert f"| nats per recalled token, own memory | {data.name}, test | {own} |" in card
    assert f"| nats per recalled token, source query only | {data.name}, test | {without} |" in card
    assert "made from source" in card


def test_memory_may_learn_at_a_rate_of_its_own(tokenizer):
    adapted = peft.get_peft_model(converted(), adapter_config(converted(), r=2))
    options = upcycle.UpcycleArguments(model="", data=[], memory_learning_rate=1e-3)
    args = TrainingArguments("unused", use_cpu=True, report_to="none", learning_rate=1e-4)
    names = {id(parameter): name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    rates = {}
    for group in upcycle.optimizer_of(adapted, options, args).param_groups:
        rates |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
    assert len(rates) == len(names)
    assert {rate for name, rate in rates.items() if "lora" in name} == {1e-4}
    assert {rate for name, rate in rates.items() if "memory_encoder" in name} == {1e-3}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_recipe_trains_on_a_quantised_base_and_merges_into_the_whole_one(tokenizer, data, tmp_path, kind):
    package = {"nf4": "bitsandbytes", "int8": "torchao"}[kind]
    # nf4 on a CPU is right for rows of whole blocks of 64 numbers only
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    source = randomize(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)), seed=3)
    base = from_llm(source, num_memory_slots=5, memory_layers=[1], tokenizer=tokenizer, **PAPER).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    command = ["--model", str(tmp_path / "base"), "--data", str(data), "--lora_rank", "2", "--disable_tqdm", "True"]
    command += ["--quantization", kind, "--max_steps", "3", "--learning_rate", "0.01", "--bf16", "False"]
    command += ["--tokens_per_step", "256", "--output_dir", str(tmp_path / "out")]
    if find_spec(package) is None:
        with pytest.raises(ImportError, match=rf"{package}: pip install 'rxt_hf\[quant\]'"):
            upcycle.main(command)
        return
    upcycle.main(command)
    trained = RxTForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    before = base.state_dict()
    assert trained.keys() == before.keys()
    # LoRA is of rank 2, so that what it adds to a matrix shows whether the merge began from the whole one
    added = trained["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    assert 0 < torch.linalg.svdvals(added)[2] < 1e-5 < torch.linalg.svdvals(added)[1]
    assert not torch.equal(
        trained["model.memory_encoder.layers.0.mlp.up_proj.weight"],
        before["model.memory_encoder.layers.0.mlp.up_proj.weight"],
    )


def test_example_ends_as_it_promises(tokenizer, data, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parent.parent / "examples" / "upcycle_smollm2.py"
    make_source().save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    options = ["--model", tmp_path / "source", "--data", data, "--memory-layers", 0, 2, "--max-steps", 2]
    monkeypatch.setattr(sys, "argv", [str(part) for part in (path, *options, "--output-dir", tmp_path / "out")])
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert "largest difference of logits between the language model and the RxT: 0.0" in lines
    promised = re.search(r"a line like\n\n    (.+)", path.read_text())[1]
    assert re.sub(r"\d+", "N", lines[-1]) == re.sub(r"\d+", "N", promised)
    model = from_llm(make_source(), num_memory_slots=32, memory_layers=[0, 2], tokenizer=tokenizer, **PAPER)
    assert peft.PeftModel.from_pretrained(model, tmp_path / "out")


def test_what_cannot_be_measured_is_left_out_or_refused_by_name(tokenizer, data, tmp_path):
    options = upcycle.UpcycleArguments(model="", data=[str(data)], tokens_per_step=1)
    # every batch is one dialogue, so there is no other's memory
    assert set(upcycle.measure(rxt(tokenizer), tokenizer, options)[data.name]) == {"own", "cleared"}
    (tmp_path / "test.jsonl").write_text(json.dumps({"interactions": DIALOGUE[:2]}))
    options.data = [str(tmp_path)]
    with pytest.raises(ValueError, match=r"No test dialogue of .* recalls a word"):
        upcycle.measure(rxt(tokenizer), tokenizer, options)
