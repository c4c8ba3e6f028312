# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from transformers import Trainer, TrainingArguments

from rxt_hf import RxTConfig, RxTForCausalLM
from rxt_hf.data.collator import RxTEpisodeCollator

from .models import IN_PASSING, JOINT

peft = pytest.importorskip("peft")

# peft itself still uses the former name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft")
MEMORY_WRITE_ALONE = r".*memory_attention.*\.(q_proj|v_proj)"


def tiny_model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = RxTConfig(**sizes, num_attention_heads=4, num_memory_slots=5, initializer_range=0.2, **fields)
    return RxTForCausalLM(config).eval()


def episodes():
    ids = torch.randint(10, 99, (4, 3, 8), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": turns, "labels": turns} for turns in ids]


def two_turns(model):
    """Tokens of two turns, the memory after them, and the logits of a third."""
    first, second, third = torch.tensor(episodes()[0]["input_ids"]).unsqueeze(1)
    out = model.generate(input_ids=first, stm_cache=model.init_stm(1), max_new_tokens=6, do_sample=False)
    out = model.generate(input_ids=second, stm_cache=out.stm_cache, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        return out.sequences, out.stm_cache.states, model(input_ids=third, stm_cache=out.stm_cache).logits


def distance(found, expected):
    """The largest difference of logits and memories; infinite if the tokens differ."""
    if not torch.equal(found[0], expected[0]):
        return float("inf")
    return max((left - right).abs().max().item() for left, right in zip(found[1:], expected[1:], strict=True))


def train_two_steps(model, folder, **arguments):
    args = TrainingArguments(
        str(folder),
        max_steps=2,
        learning_rate=5e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    Trainer(model, args, data_collator=RxTEpisodeCollator(pad_token_id=0), train_dataset=episodes()).train()
    return model.eval()


def adapted_modules(model):
    """Names of the adapted modules without the numbers of their layers."""
    layers = (name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in layers}


@pytest.fixture
def unregistered(monkeypatch):
    """What peft knows before it has met an RxT, however many tests have run."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as mapping

    monkeypatch.delitem(mapping, "rxt", raising=False)
    return mapping


TARGETS = {
    "default": None,
    "named": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "memory write": MEMORY_WRITE_ALONE,
}


@pytest.mark.parametrize("target_modules", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_adapter_trains_saves_loads_merges_and_switches_off(tmp_path, target_modules, activation_checkpointing):
    config = peft.LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config)
    base = two_turns(tiny_model())
    assert distance(two_turns(model), base) == 0.0
    train_two_steps(model, tmp_path / "run", activation_checkpointing=activation_checkpointing)
    adapted = two_turns(model)
    assert distance(adapted, base) > 1e-3

    with model.disable_adapter():
        assert distance(two_turns(model), base) == 0.0
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter")).eval()
    assert distance(two_turns(loaded), adapted) == 0.0
    merged = model.merge_and_unload()
    assert type(merged) is RxTForCausalLM
    assert distance(two_turns(merged), adapted) <= 1e-5


@pytest.mark.parametrize("form", [JOINT, IN_PASSING], ids=["apart", "in passing"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_adapter_of_a_model_that_reads_jointly_trains_saves_loads_and_merges(tmp_path, form, activation_checkpointing):
    form = {**form, "memory_init": "zeros", "bptt_turns": 0}
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["memory_selection"],
        task_type="CAUSAL_LM",
    )
    model, base = peft.get_peft_model(tiny_model(**form), config), two_turns(tiny_model(**form))
    assert distance(two_turns(model), base) == 0.0
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    train_two_steps(model, tmp_path / "run", activation_checkpointing=activation_checkpointing)
    after = dict(model.named_parameters())
    unchanged = {name.rpartition(".")[2] for name, value in before.items() if torch.equal(after[name], value)}
    # of the copies of a token, one alone is kept: no slot is one that comes again
    assert unchanged <= {"repeat_penalty"}
    adapted = two_turns(model)
    assert distance(adapted, base) > 1e-3
    with model.disable_adapter():
        assert distance(two_turns(model), base) == 0.0
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(**form), str(tmp_path / "adapter")).eval()
    assert distance(two_turns(loaded), adapted) == 0.0
    assert distance(two_turns(model.merge_and_unload()), adapted) <= 1e-5


def test_default_adapter_covers_decoder_and_memory(unregistered):
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig())
    attentions = {"layers.self_attn", "layers.memory_cross_attn", "memory_encoder.layers.self_attn"}
    attentions |= {"memory_attention.layers.pre_attn", "memory_attention.layers.write_attn"}
    expected = {f"base_model.model.model.{name}.{part}" for name in attentions for part in ("q_proj", "v_proj")}
    assert adapted_modules(model) == expected


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "AdaLoraConfig", "LNTuningConfig", "OFTConfig"])
def test_default_targets_work_for_a_model_made_before_peft_met_it(unregistered, method):
    model = tiny_model()
    unregistered.pop("rxt", None)
    options = {"total_step": 10} if method == "AdaLoraConfig" else {}
    options |= {"oft_block_size": 4, "r": 0} if method == "OFTConfig" else {}
    adapted = peft.get_peft_model(model, getattr(peft, method)(**options))
    trainable, _ = adapted.get_nb_trainable_parameters()
    assert trainable > 0


def test_a_users_own_default_targets_are_kept(unregistered):
    unregistered["rxt"] = ["down_proj"]
    adapted = adapted_modules(peft.get_peft_model(tiny_model(), peft.LoraConfig()))
    assert {name.rsplit(".", 1)[-1] for name in adapted} == {"down_proj"}


def test_excluded_memory_modules_stay_as_they_are():
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=r".*memory_.*")
    adapted = adapted_modules(peft.get_peft_model(tiny_model(), config))
    assert {name.split(".")[-2] for name in adapted} == {"self_attn"}


def test_memory_made_under_an_adapter_differs_from_the_base_models(tmp_path):
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=MEMORY_WRITE_ALONE))
    train_two_steps(model, tmp_path)
    ids = torch.tensor(episodes()[0]["input_ids"][0]).unsqueeze(0)
    with_adapter = model.update_memory(None, ids).states
    with model.disable_adapter():
        without = model.update_memory(None, ids).states
    assert (with_adapter - without).abs().max() > 1e-3
    assert torch.equal(without, tiny_model().update_memory(None, ids).states)


def test_initial_memory_as_a_target_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="initial memory"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(target_parameters=["initial_memory"]))
