# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rxt_hf import RxTForCausalLM
from rxt_hf.chat_template import CONTROL_TOKENS
from rxt_hf.convert import from_rxlm
from rxt_hf.convert.llm import convert_tokenizer, freeze_base, from_llm

from .models import random_memory
from .reference_rxt import randomize

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
# a window is shorter than the prompt
FAMILIES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama, tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 16, "hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": 4, "head_dim": 12}),
    "qwen2": ("qwen2", {**SLIDING, "max_window_layers": 1, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {**SLIDING, "no_rope_layers": [1, 0, 1, 0], "attention_bias": True, "mlp_bias": True}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
each_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])

PROMPT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(PROMPT)
MASK[1, :4] = 0
INPUTS = {"input_ids": PROMPT, "attention_mask": MASK}


def make_source(family="llama", dtype=torch.float32, attention="sdpa", **options):
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(SIZES | fields | options))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return randomize(model, seed=3).eval()


def converted(source, **options):
    return from_llm(source, num_memory_slots=5, **options)


# the paper's parts, for which every memory leaves the logits as they are
PAPER = {"memory_reading": "cross_attention", "memory_encoding": "encoder", "memory_writing": "attention"}
SEPARATE = {"memory_reading": "cross_attention"}
FORMS = {"joint": {}, "separate": SEPARATE, "paper": PAPER}
each_form = pytest.mark.parametrize("form", FORMS)


def memory_fields(model):
    """Any memory where the numbers depend on none at first, and an empty one for what reads at once."""
    if not isinstance(model, RxTForCausalLM):
        return {}
    is_joint = model.config.memory_reading == "joint"
    return {"stm_cache": (model.init_stm(2) if is_joint else random_memory(model)).states}


@torch.no_grad()
def computed(model):
    """Logits of a padded prompt, of a longer one without mask, of two cached steps, and greedy tokens."""
    fields = memory_fields(model)
    position_ids = (MASK.cumsum(-1) - 1).clamp(min=0)
    found = [model(**INPUTS, **fields, position_ids=position_ids).logits, model(PROMPT.repeat(1, 2), **fields).logits]
    cache = None
    for start, end in ((0, 7), (7, 8), (8, 9)):
        out = model(
            PROMPT[:, start:end],
            attention_mask=MASK[:, :end],
            position_ids=position_ids[:, start:end],
            cache=cache,
            use_cache=True,
            **fields,
        )
        cache = out.cache
        found.append(out.logits)
    tokens = model.generate(**INPUTS, **fields, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return [*found, getattr(tokens, "sequences", tokens)]


def assert_bit_equal(found, expected):
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@each_family
@each_dtype
@each_attention
@each_form
def test_logits_and_tokens_are_the_sources_bit_for_bit(family, dtype, attention, form, tmp_path):
    source = make_source(family, dtype, attention)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    expected = computed(source)
    model = converted(source, **FORMS[form])
    assert model.dtype == dtype and model.config._attn_implementation == attention
    assert_bit_equal(computed(model), expected)
    assert_bit_equal(source.state_dict().values(), before.values())

    model.save_pretrained(tmp_path)
    loaded = RxTForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    assert loaded.dtype == dtype
    assert_bit_equal(computed(loaded), expected)


def test_settings_that_no_logit_shows_are_kept_too():
    fields = {"pad_token_id": 3, "bos_token_id": 4, "eos_token_id": [5, 6], "attention_dropout": 0.25}
    fields |= {"max_position_embeddings": 48, "initializer_range": 0.5, "use_cache": False}
    source = make_source(**fields).train()
    source.generation_config.update(max_new_tokens=2, eos_token_id=[5, 6, 7])
    model = converted(source)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.generation_config.to_dict() == source.generation_config.to_dict()
    assert model.generation_config is not source.generation_config
    assert model.training and not converted(source.eval()).training


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_frequencies_that_depend_on_the_length_are_the_sources_after_any_other_length(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    sizes = SIZES | {"max_position_embeddings": 64 if rope_type == "longrope" else 16}
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope)).eval()
    randomize(source, seed=2)
    model = from_llm(source, num_memory_slots=5).eval()
    for tokens in (8, 17, 40, 8, 16):
        ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, copy.deepcopy(source)(ids).logits), tokens


def test_frequencies_that_a_cast_rounded_in_the_source_stay_float32():
    cast = make_source().bfloat16()
    loaded = make_source(dtype=torch.bfloat16)
    assert cast.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert_bit_equal(computed(converted(cast)), computed(loaded))


@torch.no_grad()
def test_memory_changes_the_logits_once_a_gate_opens():
    source = make_source()
    model = converted(source, **SEPARATE)
    for layer in model.model.layers:
        layer.memory_cross_attn.head_gate[1] = 0.5
    assert not torch.equal(computed(model)[0], computed(source)[0])


@each_family
def test_a_cross_attention_with_open_gates_reads_by_the_sources_own_projections(family):
    source = make_source(family)
    model = converted(source, memory_layers=[1, 2], **SEPARATE)
    for layer, source_layer in zip(model.model.layers[1:], source.model.layers[1:], strict=True):
        attention, own = layer.memory_cross_attn, source_layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert torch.equal(getattr(attention, name).weight, getattr(own, name).weight)
        assert torch.equal(layer.memory_layernorm.weight, source_layer.input_layernorm.weight)
        assert attention.o_proj.bias is None or not attention.o_proj.bias.any()


def windows(family):
    return {"use_sliding_window", "sliding_window"} & set(FAMILIES[family][1])


@torch.no_grad()
@each_family
def test_a_written_memory_is_read_as_the_turn_before_would_be(family):
    """Without a chosen few and without padding the slots are the tokens of the turn before, at their places."""
    # in the source a window would hide the turn before, which is no part of this turn's window here
    source = make_source(family, **{name: None if name == "sliding_window" else False for name in windows(family)})
    model = from_llm(source, num_memory_slots=12).eval()
    before, ids = PROMPT[:, :8], PROMPT[:, 2:]
    memory = model.update_memory(None, before)
    # the last token of a turn is not kept, and repeated ones lose to none as long as there is room
    expected = source(torch.cat([before[:, :-1], ids], dim=1)).logits[:, 7:]
    torch.testing.assert_close(model(ids, stm_cache=memory).logits, expected, rtol=0, atol=1e-4)


@each_family
def test_a_saved_source_converts_from_its_folder(family, tmp_path):
    source = make_source(family, torch.bfloat16)
    source.save_pretrained(tmp_path)
    assert_bit_equal(computed(converted(tmp_path)), computed(source))


def saved(folder, change=lambda tensors: None, config=None, generation=None, **options):
    """The folder of a source whose tensors and configuration files were changed after it was saved."""
    make_source(**options).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, fields in (("config.json", config), ("generation_config.json", generation)):
        if fields is not None:
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))
    return folder


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("head", ["its own", "equal", "alone"])
def test_a_head_is_what_the_files_hold_and_not_what_the_flag_says(flag, head, tmp_path):
    def change(tensors):
        own = randomize(torch.nn.Linear(32, 60), seed=9).weight.detach()
        tensors[HEAD] = own if head == "its own" else tensors[TABLE].clone()
        if head == "alone" and flag:
            del tensors[TABLE]

    saved(tmp_path, change, tie_word_embeddings=flag)
    source = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = computed(source)
    for given in (tmp_path, source):
        model = converted(given)
        assert_bit_equal(computed(model), expected)
        assert model.config.tie_word_embeddings == (flag and head != "its own")
    model.save_pretrained(tmp_path / "rxt")
    assert_bit_equal(computed(RxTForCausalLM.from_pretrained(tmp_path / "rxt")), expected)


@pytest.mark.parametrize("flag", [True, False])
def test_a_head_is_what_the_model_has_and_not_what_the_flag_says(flag):
    source = make_source(tie_word_embeddings=not flag)
    source.config.tie_word_embeddings = flag
    model = converted(source)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (not flag)
    assert_bit_equal(computed(model), computed(source))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "config", "named"),
    [
        (lambda tensors: tensors.pop(HEAD), None, "lacks lm_head.weight"),
        (lambda tensors: tensors.pop(UP), None, f"lacks {UP}"),
        (lambda tensors: tensors.update({UP: tensors[UP][:-1]}), None, UP),
        (lambda tensors: tensors[UP].view(-1)[7:8].fill_(float("nan")), None, f"NaN or infinity in {UP}"),
        (lambda tensors: tensors[UP].view(-1)[7:8].fill_(float("inf")), None, f"NaN or infinity in {UP}"),
        (lambda tensors: None, {"num_hidden_layers": 2}, "no place in its configuration for model.layers.2"),
        (lambda tensors: None, {"num_hidden_layers": 4}, "lacks model.layers.3"),
        (
            lambda tensors: None,
            {"num_key_value_heads": 1},
            r"self_attn.k_proj.weight \[16, 32\] in place of \[8, 32\]",
        ),
        (lambda tensors: None, {"vocab_size": 61}, r"embed_tokens.weight \[60, 32\] in place of \[61, 32\]"),
        (lambda tensors: None, {"attention_bias": False}, "no place in its configuration for .*q_proj.bias"),
        (lambda tensors: None, {"mlp_bias": False}, "no place in its configuration for .*down_proj.bias"),
        (lambda tensors: None, {"quantization_config": {"quant_method": "awq"}}, "dequantised"),
    ],
)
def test_what_the_files_lack_or_have_beside_the_configuration_is_refused_by_name(change, config, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        converted(saved(tmp_path, change, config))


def test_frequencies_of_old_checkpoints_are_no_unexpected_tensors(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = make_source()
    assert_bit_equal(
        computed(converted(saved(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)})))), computed(source)
    )


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("rms_norm_eps", 0.5, "input_layernorm.variance_epsilon is 1e-05 in place of 0.5"),
        ("hidden_act", "gelu", "act_fn is SiLUActivation in place of GELUActivation"),
        ("num_key_value_heads", 1, "num_key_value_groups is 2 in place of 4"),
        ("vocab_size", 59, "vocab_size is 60 in place of 59"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}, "model.rotary_emb has other frequencies"),
    ],
)
def test_a_model_that_is_not_what_its_configuration_says_is_refused_by_name(field, value, named):
    source = make_source()
    setattr(source.config, field, value)
    with pytest.raises(ValueError, match=named):
        from_llm(source)


def test_weights_of_a_model_that_are_not_finite_are_refused_by_name():
    source = make_source()
    source.get_parameter(UP).data[2, 3] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or infinity in {UP}"):
        from_llm(source)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_an_adapter_is_called_what_it_is(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_source(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        from_llm(adapted)
    with pytest.raises(ValueError, match="LoRA layers: merge"):
        from_llm(adapted.base_model.model)
    adapted.save_pretrained(tmp_path)
    for convert in (from_llm, from_rxlm):
        with pytest.raises(ValueError, match=r"is a PEFT adapter, not a model: merge it .* or give its base"):
            convert(tmp_path)


UNUSED = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0}


def test_a_generation_config_that_cannot_be_written_loses_what_nothing_uses(tmp_path, caplog):
    saved(tmp_path, generation=UNUSED | {"repetition_penalty": 1.5, "pad_token_id": -1})
    transformers.utils.logging.enable_propagation()
    model = converted(tmp_path)
    transformers.utils.logging.disable_propagation()
    assert f"The generation config of {tmp_path} sets" in caplog.text and "'temperature': 0.9" in caplog.text
    model.save_pretrained(tmp_path / "rxt")
    kept = json.loads((tmp_path / "rxt" / "generation_config.json").read_text())
    assert kept["repetition_penalty"] == 1.5 and not {"temperature", "top_p", "pad_token_id"} & set(kept)


def test_an_invalid_generation_config_is_refused_with_the_sources_name(tmp_path):
    saved(tmp_path, generation={"do_sample": False, "num_return_sequences": 3})
    (tmp_path / "model.safetensors").write_bytes(b"is not read")
    with pytest.raises(ValueError, match=rf"generation config of {tmp_path} is invalid: .*num_return_sequences"):
        from_llm(tmp_path)


def test_a_folder_without_a_tokenizer_is_said_so_in_a_whole_sentence(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"holds no tokenizer that can be read, such as tokenizer.json: .*\(3\)"):
        convert_tokenizer(tmp_path)


@each_family
def test_no_tensor_of_decoder_or_encoder_is_random(family):
    source = make_source(family)
    first, second = (dict(converted(source, memory_layers=[0, 2], **PAPER).named_parameters()) for _ in range(2))
    differs = {name.split(".")[1] for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    layers = {name.split(".")[3] for name in first if name.startswith("model.layers.") and "memory" in name}
    assert differs == {"memory_attention"}
    assert layers == {"memory_cross_attn", "memory_cross_attn_layernorm", "memory_layernorm"}
    assert all(
        torch.equal(tensor, second[name]) for name, tensor in first.items() if name.startswith("model.memory_encoder")
    )


@each_family
def test_a_joint_model_adds_one_salience_and_the_same_one_in_each_conversion(family):
    source = make_source(family)
    first, second = (dict(converted(source).named_parameters()) for _ in range(2))
    added = {name: tensor for name, tensor in first.items() if name not in dict(source.named_parameters())}
    assert {name.rpartition(".")[0] for name in added} == {"model.memory_selection"}
    assert sum(tensor.numel() for tensor in added.values()) == source.config.hidden_size + 2
    assert_bit_equal(first.values(), second.values())


def test_memory_encoder_holds_the_memory_layers_in_order():
    source = make_source("qwen3")
    model = converted(source, memory_layers=[0, 2], **PAPER)
    assert model.config.num_memory_layers == len(model.model.memory_encoder.layers) == 2
    for index, layer in enumerate([0, 2]):
        encoder_layer = model.model.memory_encoder.layers[index].state_dict()
        source_layer = source.model.layers[layer].state_dict()
        assert encoder_layer.keys() == source_layer.keys()
        assert_bit_equal([encoder_layer[name] for name in source_layer], source_layer.values())
    assert_bit_equal(computed(model), computed(source))


def test_initial_memory_has_the_scale_of_the_embeddings():
    source = make_source(hidden_size=256)
    model = from_llm(source, num_memory_slots=32, **PAPER)
    assert model.config.memory_init_std == pytest.approx(source.model.embed_tokens.weight.std().item())
    assert model.model.initial_memory.std().item() == pytest.approx(model.config.memory_init_std, rel=0.05)


@pytest.mark.parametrize("options", [PAPER, {}], ids=["paper", "joint"])
def test_memory_parts_are_told_by_the_model_and_not_by_their_names(options):
    model = converted(make_source("qwen3"), **options)
    expected = {name for name, _ in model.named_parameters() if "memory" in name}
    assert set(model.memory_parameters()) == expected
    modules = model.memory_modules()
    assert {name.rpartition(".")[2] for name in modules} == (
        {"memory_cross_attn_layernorm", "memory_layernorm", "memory_cross_attn", "memory_encoder", "memory_attention"}
        if options
        else {"memory_selection"}
    )
    assert all(modules[name] is model.get_submodule(name) for name in modules)
    # neither trained nor saved whole: a module of the decoder that only sounds like the memory
    model.model.layers[0].mlp.in_memory_of = torch.nn.Linear(2, 2)
    assert set(freeze_base(model)) == expected
    assert not model.model.layers[0].mlp.in_memory_of.weight.requires_grad


def test_memory_trains_while_the_frozen_decoder_stays_bit_identical():
    model = converted(make_source("qwen3"), **PAPER).train()
    trained = freeze_base(model)
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if name not in trained}
    expected = [name for name, _ in model.named_parameters() if "memory" in name]
    assert trained == expected == [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    assert any("self_attn" in name for name in frozen) and "model.embed_tokens.weight" in frozen

    start = {name: model.get_parameter(name).detach().clone() for name in trained}
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in trained], lr=1e-2)
    for step in range(3):
        episode = torch.stack([PROMPT, PROMPT.flip(1)], dim=1)
        model(input_ids=episode, labels=episode).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            assert all(layer.memory_cross_attn.head_gate.all() for layer in model.model.layers)
    assert_bit_equal([model.get_parameter(name) for name in frozen], frozen.values())
    assert all(not torch.equal(model.get_parameter(name), tensor) for name, tensor in start.items())


@pytest.mark.parametrize("model_type", ["gpt2", "gemma", "rxt"])
def test_another_model_type_is_refused_by_name(model_type, tmp_path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"llama, mistral, qwen2, qwen3, smollm3; model type '{model_type}' is not"):
        from_llm(tmp_path)


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types of a mistral"),
    ],
)
def test_a_feature_that_is_not_covered_is_refused_by_name(family, options, named):
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(SIZES | fields | options))
    source = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))
    source.config = config
    with pytest.raises(ValueError, match=named):
        from_llm(source)


def test_what_is_no_whole_language_model_is_refused():
    source = make_source()
    with pytest.raises(ValueError, match="got LlamaForSequenceClassification"):
        from_llm(LlamaForSequenceClassification(AutoConfig.for_model("llama", **SIZES)))
    with pytest.raises(ValueError, match="one floating-point type"):
        from_llm(make_source().apply(lambda module: isinstance(module, torch.nn.Linear) and module.bfloat16()))
    with pytest.raises(ValueError, match="meta device"):
        from_llm(make_source().to("meta"))
    source.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.sinks"):
        from_llm(source)
    del source.model.layers[1].self_attn.sinks
    source.model.layers[1].self_attn.q_norm = torch.nn.RMSNorm(8)
    with pytest.raises(ValueError, match=r"do not fit in model\.layers\.1\.self_attn\.q_norm\.weight"):
        from_llm(source)


@pytest.mark.parametrize(
    "name", ["hidden_size", "use_gated_attention", "memory_encoder_intermediate_size", "memory_slots"]
)
def test_fields_that_the_source_decides_or_nobody_knows_are_refused(name):
    with pytest.raises(ValueError, match=rf"\['{name}'\] cannot be chosen"):
        from_llm(make_source(), **{name: 7})


def test_fields_of_the_memory_are_chosen():
    model = converted(make_source(), memory_attention_type="self", cross_attention_num_attention_heads=2, **PAPER)
    assert model.config.memory_attention_type == "self"
    assert model.model.layers[0].memory_cross_attn.q_proj.weight.shape[0] == 2 * model.config.head_dim


@pytest.fixture(scope="module")
def plain_tokenizer():
    """A pretrained language model's tokenizer: 52 words, none of ours."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, **{f"w{n}": n + 2 for n in range(50)}}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=64)


@pytest.mark.parametrize("rows", [52, 60, 80], ids=["exact table", "some spare rows", "spare rows for all"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_vocabulary_grows_to_the_control_tokens(plain_tokenizer, rows, is_tied, tmp_path):
    tokenizer = convert_tokenizer(plain_tokenizer)
    source = make_source(vocab_size=rows, tie_word_embeddings=is_tied)
    model = converted(source, tokenizer=tokenizer)
    assert model.config.vocab_size == max(rows, 62)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    for table, old in (
        (model.model.embed_tokens.weight, source.model.embed_tokens.weight),
        (model.lm_head.weight, source.lm_head.weight),
    ):
        kept = [row for row in range(rows) if not 52 <= row < 62]
        assert torch.equal(table[kept], old[kept])
        torch.testing.assert_close(table[52:62], old[kept].mean(0).expand(10, -1), rtol=0, atol=1e-6)
    for fields in (model.config, model.generation_config):
        assert (fields.pad_token_id, fields.bos_token_id, fields.eos_token_id) == (52, 53, 54)

    model.save_pretrained(tmp_path)
    loaded = RxTForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied
    assert_bit_equal(computed(loaded), computed(model))


def test_extended_tokenizer_renders_one_interaction_that_the_model_answers(plain_tokenizer, tmp_path):
    plain_tokenizer.save_pretrained(tmp_path)
    tokenizer = convert_tokenizer(tmp_path, max_length=32)
    assert tokenizer.model_max_length == 32
    chat = [{"role": "user", "content": "w3 w4"}]
    text = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "w5"}], tokenize=False)
    assert text == "[BOS][Q]w3 w4[A]w5[EOS]"
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = tokenizer.convert_tokens_to_ids
    assert inputs["input_ids"].tolist() == [[ids("[BOS]"), ids("[Q]"), 5, 6, ids("[A]")]]
    model = converted(make_source(), tokenizer=tokenizer)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.stm_cache.turns.tolist() == [1]

    tokenizer.save_pretrained(tmp_path / "rxt")
    assert AutoTokenizer.from_pretrained(tmp_path / "rxt").get_vocab() == tokenizer.get_vocab()


def test_tokenizer_without_control_tokens_is_refused(plain_tokenizer):
    assert not set(CONTROL_TOKENS.values()) & set(plain_tokenizer.get_vocab())
    with pytest.raises(ValueError, match=r"convert_tokenizer\(tokenizer\)"):
        from_llm(make_source(), tokenizer=plain_tokenizer)
    with pytest.raises(ValueError, match="fast tokenizer, got dict"):
        convert_tokenizer({})
