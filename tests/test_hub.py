# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from demo.facts import corpus_texts
from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, pipeline

from rxt_hf import RxTConfig, RxTForCausalLM, RxTSession, StateError, STMCache, hub
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.convert import from_llm
from rxt_hf.hub import export, export_memory, load_memory, model_card

from .reference_rxt import randomize

CODE_NAMES = (
    "cache",
    "configuration",
    "episode",
    "fingerprint",
    "generation",
    "layers",
    "losses",
    "memory",
    "memory_file",
    "modeling",
)
CODE = {f"{name}_rxt.py" for name in CODE_NAMES}
TEXTS = {"config.json", "generation_config.json", "README.md"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
# `None` makes an import fail as if the package were not installed
FRESH_PROCESS = """
import contextlib, io, json, sys
sys.modules["rxt_hf"] = None
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

{conversation}

folder, second, card = sys.argv[1:]
result = {{"refused": {{}}, "tokens": {{}}}}
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto.from_pretrained(folder)
    except ValueError as error:
        result["refused"][auto.__name__] = str(error)
result["config"] = AutoConfig.from_pretrained(folder, trust_remote_code=True).num_memory_slots
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
for auto in (AutoModel, AutoModelForCausalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    result["tokens"][auto.__name__] = two_turns(model, tokenizer)
model.save_pretrained(second)
tokenizer.save_pretrained(second)
result["files"] = sorted(path.name for path in Path(second).iterdir())
with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(card)
result["printed"] = printed.getvalue()
Path(second + ".json").write_text(json.dumps(result))
"""


def two_turns(model, tokenizer):
    """Tokens of two turns, and of the second without the memory of the first."""
    memory, answers = model.init_stm(1), []
    for text in ["My dog is called Rex.", "What is my dog called?"]:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, stm_cache=memory, max_new_tokens=8, do_sample=False)
        memory = out.stm_cache
        answers.append(out.sequences[0].tolist())
    answers.append(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
    return answers


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(itertools.islice(corpus_texts(20), 100), vocab_size=300, max_length=64)


def tiny_model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = RxTConfig(**sizes, num_attention_heads=4, num_memory_slots=5, initializer_range=0.3, **fields)
    return RxTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def exported(model, tokenizer, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("hub") / "tiny-rxt", tokenizer)


def in_fresh_process(folder, second, card=""):
    code = FRESH_PROCESS.format(conversation=inspect.getsource(two_turns))
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(folder), str(second), card]
    # no terminal: transformers asks there whether to trust the code
    done = subprocess.run(
        command, cwd=folder.parent, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(second.with_name(second.name + ".json").read_text())


@pytest.fixture(scope="module")
def fresh(exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return in_fresh_process(exported, exported.parent / "saved-again", example)


@pytest.fixture(scope="module")
def fresh_from_saved_again(fresh, exported):
    return in_fresh_process(exported.parent / "saved-again", exported.parent / "third")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export_holds_weights_code_texts_and_tokenizer_and_nothing_else(exported):
    assert {path.name for path in exported.iterdir()} == CODE | TEXTS | TOKENIZER | {"model.safetensors"}
    assert [path.name for path in exported.parent.iterdir() if "partial" in path.name] == []


def test_export_loads_without_the_package_and_gives_the_same_tokens(fresh, model, tokenizer):
    expected = two_turns(model, tokenizer)
    assert expected[1] != expected[2], "the second turn must depend on the memory, or this test says nothing"
    assert fresh["tokens"] == {"AutoModel": expected, "AutoModelForCausalLM": expected}
    assert fresh["config"] == 5


def test_export_is_refused_without_trust(fresh):
    assert set(fresh["refused"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert all("trust_remote_code=True" in message for message in fresh["refused"].values())


def test_export_saved_again_by_a_process_without_the_package_still_loads(fresh, fresh_from_saved_again):
    assert set(fresh["files"]) >= CODE
    assert fresh_from_saved_again["tokens"] == fresh["tokens"]
    assert fresh_from_saved_again["refused"].keys() == fresh["refused"].keys()
    assert fresh_from_saved_again["files"] == fresh["files"]


def test_example_of_the_card_runs_without_the_package(fresh):
    assert fresh["printed"].count("\n") >= 2


def test_export_of_a_converted_language_model_loads_without_the_package_and_once_more(tmp_path):
    words = train_tokenizer(itertools.islice(corpus_texts(20), 100), vocab_size=300, max_length=64)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    source = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model = from_llm(source, tokenizer=words, num_memory_slots=5, memory_layers=[0, 2])
    model = randomize(model, seed=1).eval()
    folder = export(model, tmp_path / "converted", words)
    expected = two_turns(model, words)
    assert expected[1] != expected[2]
    for name in ("again", "third"):
        found = in_fresh_process(folder, tmp_path / name)
        assert found["tokens"] == {"AutoModel": expected, "AutoModelForCausalLM": expected}
        folder = tmp_path / name


def test_export_loads_with_the_package_and_needs_no_trust(exported, model, tokenizer):
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert type(loaded) is RxTForCausalLM
    assert two_turns(loaded, AutoTokenizer.from_pretrained(exported)) == two_turns(model, tokenizer)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_an_ordinary_save_loads_with_the_package(model, tokenizer, tmp_path, auto_class):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is RxTForCausalLM
    assert two_turns(loaded, AutoTokenizer.from_pretrained(tmp_path)) == two_turns(model, tokenizer)


def test_export_changes_neither_the_class_nor_the_next_ordinary_save(exported, model, tmp_path):
    assert RxTForCausalLM._auto_class is None
    assert RxTConfig._auto_class is None
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))


def test_card_names_licence_library_and_patent(exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    header = card.split("---")[1].split("\n")
    lines = {"license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation", "- rxt"}
    assert lines <= set(header)
    assert all(
        part in card for part in ("P.453260", "independent implementation", "tiny-rxt", "2 layers of 5 vectors")
    )


def test_a_card_that_is_there_stays_unless_another_is_given(model, tmp_path):
    for card, expected in ((None, "Reactive"), ("mine", "mine"), (None, "mine"), ("new", "new")):
        assert expected in (export(model, tmp_path / "out", card=card) / "README.md").read_text()


MEASURED = {
    "dataset_name": "Schema-Guided Dialogue",
    "dataset_type": "sgd",
    "dataset_split": "test",
    "metric_type": "loss",
    "metric_name": "nats per recalled word",
    "metric_value": 4.21,
}


def test_card_holds_lineage_and_the_measured_numbers_for_readers_and_for_the_hub(model, tmp_path):
    lineage = {"base_model": "them/base", "datasets": ["sgd"], "data": "12,174 dialogues.", "language": "en"}
    licence = {"license": "other", "license_name": "theirs", "licence_notice": "Not for sale."}
    text = model_card(model, "me/tiny-rxt", results=[MEASURED], **lineage, **licence)
    header = ModelCard(text).data
    assert (header.base_model, header.datasets, header.language) == ("them/base", ["sgd"], "en")
    assert (header.license, header.license_name, header.model_name) == ("other", "theirs", "tiny-rxt")
    assert header.eval_results == [EvalResult(task_type="text-generation", **MEASURED)]
    assert "| nats per recalled word | Schema-Guided Dialogue, test | 4.21 |" in text
    body = text.split("---", 2)[2]
    assert all(part in body for part in ("them/base", "12,174", "\n- sgd\n", "`theirs`", "Not for sale.", "P.453260"))
    export(model, tmp_path / "out", card=text)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict() == header.to_dict()


def test_card_without_measurements_shows_no_number_and_an_unknown_licence_of_a_base_model(model):
    text = model_card(model, "x", base_model="them/base")
    header = ModelCard(text).data
    assert header.eval_results is None and "| measured |" not in text and "None were given" in text
    assert header.license == "unknown"
    assert "did not say what the model was trained on" in text


@pytest.mark.parametrize(
    ("result", "named"), [({"dataset_name": "SGD"}, "metric_value"), (MEASURED | {"metric": 1}, "metric")]
)
def test_a_result_that_the_hub_would_not_take_is_refused(model, result, named):
    with pytest.raises(ValueError, match=f"SGD.*is refused: .*'{named}'|Dialogue.*is refused: .*'{named}'"):
        model_card(model, "x", results=[result])


@pytest.fixture(scope="module")
def memory(model, tokenizer):
    return RxTSession(model, tokenizer, system="You live in Oslo.").stm_cache


def test_a_written_memory_is_shared_with_a_card_and_goes_on_bit_identical(model, tokenizer, memory, tmp_path):
    said = {"description": "A system prompt: you live in Oslo.", "base_model": "me/tiny-rxt"}
    folder = export_memory(memory, tmp_path / "oslo", **said)
    assert {path.name for path in folder.iterdir()} == {"README.md", "memory.stm"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "me/tiny-rxt" and "rxt-memory" in card.data.tags
    parts = (said["description"], "1 interactions", "2 layers of 5 vectors of 32", "P.453260", '"oslo"')
    assert all(part in card.content for part in parts)

    loaded = load_memory(folder, model)
    assert torch.equal(loaded.states, memory.states) and loaded.turns.tolist() == [1]
    answers = [
        RxTSession(model, tokenizer, stm_cache=given, max_new_tokens=8).send("Where do I live?")
        for given in (loaded, memory, None)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_memory_of_another_model_or_of_none_is_refused(model, memory, tmp_path):
    said = {"description": "x", "base_model": "me/tiny-rxt"}
    export_memory(memory, tmp_path / "oslo", **said)
    with pytest.raises(StateError, match="fingerprint"):
        load_memory(tmp_path / "oslo", tiny_model(memory_init_std=2.0))
    with pytest.raises(FileNotFoundError):
        load_memory(tmp_path)
    with pytest.raises(ValueError, match=r"init_stm\(\)"):
        export_memory(STMCache(memory.states), tmp_path / "new", **said)
    assert not (tmp_path / "new").exists()


def test_a_failed_export_of_a_memory_leaves_the_former_one_as_it_was(memory, tmp_path):
    said = {"description": "x", "base_model": "me/tiny-rxt"}
    before = files_of(export_memory(memory, tmp_path / "oslo", **said))
    with pytest.raises(StateError, match="NaN"):
        export_memory(memory.replace(memory.states * float("nan")), tmp_path / "oslo", **said)
    assert files_of(tmp_path / "oslo") == before
    assert [path.name for path in tmp_path.iterdir()] == ["oslo"]


def test_a_memory_travels_through_a_hub_repository(model, memory, tmp_path, monkeypatch):
    uploads, asked = [], []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, exist_ok: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **kwargs: uploads.append((api.token, kwargs)))
    said = {"description": "x", "base_model": "me/tiny-rxt"}
    folder = export_memory(memory, tmp_path / "oslo", **said, push_to_hub="me/oslo", token="secret")
    ((token, upload),) = uploads
    assert (token, upload["repo_id"], upload["folder_path"]) == ("secret", "me/oslo", folder)
    assert upload["allow_patterns"] == ["README.md", "memory.stm"] and upload["delete_patterns"] == []
    assert 'load_memory("me/oslo"' in (folder / "README.md").read_text()

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs))
        return str(folder / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert torch.equal(load_memory("me/oslo", model, revision="v1").states, memory.states)
    assert asked == [("me/oslo", "memory.stm", {"revision": "v1"})]


@pytest.mark.parametrize("saved_by", ["export", "save_pretrained"])
def test_shards_load_the_same_weights(model, tmp_path, saved_by):
    if saved_by == "export":
        export(model, tmp_path, max_shard_size="20KB")
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_new_export_replaces_old_weights_of_another_number_of_files_and_keeps_foreign_files(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ones = tiny_model()
    torch.nn.init.ones_(ones.model.embed_tokens.weight)
    for sizes in ({}, {"max_shard_size": "20KB"}, {}):
        export(ones, tmp_path, **sizes)
        export(model, tmp_path, **({} if sizes else {"max_shard_size": "20KB"}))
        loaded = RxTForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failed_export_leaves_the_former_one_as_it_was(model, tokenizer, tmp_path, monkeypatch):
    folder = export(model, tmp_path / "out", tokenizer)
    before = files_of(folder)

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", disk_full)
    with pytest.raises(OSError, match="No space left"):
        export(tiny_model(memory_init="zeros"), folder, tokenizer, card="new")
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_does_not_get_into_the_next_one(model, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_text("half a file")
    folder = export(model, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == CODE | TEXTS | {"model.safetensors"}


def test_push_uploads_the_export_alone_and_removes_old_shards(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "private-notes.txt").write_text("mine")
    uploads = []
    url = SimpleNamespace(repo_id="me/tiny-rxt")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, exist_ok: url)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **kwargs: uploads.append((api.token, kwargs)))
    export(model, tmp_path, tokenizer, push_to_hub="tiny-rxt", token="secret")
    ((token, upload),) = uploads
    assert (token, upload["repo_id"], upload["folder_path"]) == ("secret", "me/tiny-rxt", tmp_path)
    files = [path.name for path in tmp_path.iterdir()]
    added = set(filter_repo_objects(files, allow_patterns=upload["allow_patterns"]))
    assert added == CODE | TEXTS | TOKENIZER | {"model.safetensors"} == set(files) - {"private-notes.txt"}
    there = [".gitattributes", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "figure.png"]
    assert list(filter_repo_objects(there, allow_patterns=upload["delete_patterns"])) == there[1:3]
    assert 'from_pretrained("tiny-rxt"' in (tmp_path / "README.md").read_text()


# peft itself still uses the former name
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_model_with_adapters_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="PeftModel"):
        export(adapted, tmp_path / "out")
    with pytest.raises(ValueError, match="merge"):
        export(base, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export(adapted.merge_and_unload(), tmp_path / "out")


def test_a_file_in_the_folders_place_is_refused(model, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out"):
        export(model, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_forward_with_a_memory_can_be_exported_as_a_program(model):
    ids = torch.randint(10, 300, (2, 6))
    memory = model.update_memory(model.init_stm(2), ids).detach()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "stm_cache": memory, "use_cache": False}
    program = torch.export.export(model, args=(), kwargs=inputs, strict=False)
    other = inputs | {"input_ids": ids.flip(1), "stm_cache": memory.replace(memory.states.flip(0))}
    with torch.no_grad():
        expected = model(**other)
        output = program.module()(**other)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    assert isinstance(output.stm_cache, STMCache)
    assert torch.equal(output.stm_cache.states, other["stm_cache"].states)


def test_text_generation_pipeline_answers_a_chat(model, tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "My dog is called Rex."}]
    (result,) = generator(chat, max_new_tokens=8, do_sample=False)
    question, answer = result["generated_text"]
    assert question == chat[0]
    first_turn = two_turns(model, tokenizer)[0]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    expected = tokenizer.decode(first_turn[len(prompt) :], skip_special_tokens=True)
    assert answer == {"role": "assistant", "content": expected}


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "lm_head_bias": True}], ids=["tied", "untied"])
def test_resized_vocabulary_is_one_table_for_decoder_and_memory_encoder(fields, tmp_path):
    model = tiny_model(**fields)
    old_ids = torch.randint(10, 300, (1, 6))
    before = model.update_memory(None, old_ids).states
    with torch.no_grad():
        logits = model(old_ids).logits
    model.resize_token_embeddings(307)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 307
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert sum(isinstance(module, torch.nn.Embedding) for module in model.modules()) == 1
    new_ids = old_ids.clone()
    new_ids[0, 0] = 306
    with torch.no_grad():
        torch.testing.assert_close(model(old_ids).logits[..., :300], logits, atol=1e-5, rtol=0)
        assert model(new_ids, labels=new_ids).loss.isfinite()
    assert torch.equal(model.update_memory(None, old_ids).states, before)
    written = model.update_memory(None, new_ids).states
    assert not torch.equal(written, before)
    model.save_pretrained(tmp_path)
    loaded = RxTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.update_memory(None, new_ids).states, written)


def test_export_leaves_the_length_of_answers_to_the_caller(tmp_path):
    model = tiny_model()
    model.generation_config.max_new_tokens, model.generation_config.update_memory = 64, False
    export(model, tmp_path / "export")
    found = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert found["update_memory"] is False
    assert "max_new_tokens" not in found
    assert model.generation_config.max_new_tokens == 64
