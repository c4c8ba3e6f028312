# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A pretrained decoder language model becomes a Reactive Transformer that computes the same until it is trained."""

import contextlib
import copy
import os
import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from ..chat_template import CONTROL_TOKENS, add_control_tokens, source_pieces
from ..configuration_rxt import RxTConfig
from ..loading import load_whole, refuse_adapter, refuse_broken, some
from ..modeling_rxt import RxTForCausalLM
from .salience import start_salience
from .template import source_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.get_logger(__name__)

# Fields that mean the same in every family.
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# RxT field -> the family's constant, or the name of its field
_FAMILIES: dict[str, dict[str, bool | str]] = {
    "llama": {
        "attention_bias": "attention_bias",
        "attention_output_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    "mistral": {"sliding_window": "sliding_window"},
    "qwen2": {"attention_bias": True, "sliding_window": "sliding_window", "layer_types": "layer_types"},
    "qwen3": {
        "attention_bias": "attention_bias",
        "attention_output_bias": "attention_bias",
        "use_qk_norm": True,
        "sliding_window": "sliding_window",
        "layer_types": "layer_types",
    },
    "smollm3": {
        "attention_bias": "attention_bias",
        "attention_output_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "sliding_window": "sliding_window",
        "layer_types": "layer_types",
    },
}
_LAYER_MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# source tensor -> RxT tensors; the encoder's only for the layers that read the memory
_TENSORS: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
} | {
    f"model.layers.{{layer}}.{module}.{kind}": (
        f"model.layers.{{layer}}.{module}.{kind}",
        f"model.memory_encoder.layers.{{memory}}.{module}.{kind}",
    )
    for module in _LAYER_MODULES
    for kind in ("weight", "bias")
}
# modules that the memory cross-attention has a copy of
_CROSS_ATTENTION = {
    "self_attn.q_proj": ("memory_cross_attn.q_proj",),
    "self_attn.k_proj": ("memory_cross_attn.k_proj",),
    "self_attn.v_proj": ("memory_cross_attn.v_proj",),
    "self_attn.o_proj": ("memory_cross_attn.o_proj",),
    "input_layernorm": ("memory_cross_attn_layernorm", "memory_layernorm"),
}
# What `generate` does not look at without sampling, and with one beam; a configuration that sets them is not written.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAM_FIELDS = ("early_stopping", "length_penalty")
_INVALID_GENERATION = "The generation config of {} is invalid: {}"
# attributes of modules that say how they run, not what they compute
_MODES = ("training", "gradient_checkpointing")
_VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
_BASE_PROJECTIONS = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
# How a pretrained model reads, encodes and writes unless something else is asked for: with what it can already do.
_MEMORY_FIELDS = {
    "memory_reading": "joint",
    "memory_encoding": "decoder",
    "memory_writing": "selection",
}
# What the source leaves open. The encoder's sizes are those of the layers that it is copied from.
_OVERRIDES = re.compile(r"memory_(?!encoder_)|cross_attention_|interlayer_attention_|use_gated_cross_attention$")


def from_llm(
    source: PreTrainedModel | str | os.PathLike,
    *,
    num_memory_slots: int = 64,
    memory_layers: list[int] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config_overrides: Any,
) -> RxTForCausalLM:
    r"""
    Gives a pretrained Llama, Mistral, Qwen2, Qwen3 or SmolLM3 a memory.

    Every decoder tensor is copied. A memory slot is a copy of what a token gave to the layers of the model, each layer
    reads its slots by its own self-attention, together with the turn's own tokens, and a write keeps the most salient
    tokens. So nothing is fresh but one salience, and the model recalls on the day it is converted; what it keeps then
    is rare tokens ([`fit_salience`] learns better in seconds), and training makes it answer from them.

    As long as the memory is empty the logits are bit-identical to the source's, in float32 and below. (A source that
    was cast after loading has rounded the frequencies of its rotation; here they stay float32, as in a model loaded in
    that dtype.) Dtype, device and attention implementation are the source's; the source is not changed.

    The paper's forms are available by name. `memory_reading="cross_attention"`: q, k, v and o are copied from the
    self-attention, behind a gate for each head that starts closed, so that logits are the source's under any memory.
    `memory_encoding="encoder"`: a bidirectional copy of the decoder layers in `memory_layers`, without sliding windows
    and with rotation in every layer. `memory_writing="attention"`: a fresh memory attention, and an initial memory
    that is normal with the standard deviation of the embeddings, the same in each conversion.

    Args:
        source (`PreTrainedModel`, `str` or `os.PathLike`): the model, or the name or folder to load it from.
        num_memory_slots (`int`): slots of each memory layer.
        memory_layers (`list[int]`, *optional*): decoder layers that read the memory (default: all). Fewer layers save
            time and bytes; the last ones in a row are worth most.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): what [`convert_tokenizer`] returned. The vocabulary grows
            to it; rows of new tokens start as the mean of the others; ids of padding, begin and end are its own.
        config_overrides: fields of [`RxTConfig`] about the memory, such as `memory_attention_type`.

    Returns: [`RxTForCausalLM`]

    Raises: `ValueError` for another model type, and by name for a feature, field or tensor that is not covered; for a
    tensor that the source's files lack, that its configuration has no place for, or that holds NaN or infinity.
    """
    name = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    if isinstance(source, str | os.PathLike):
        source = _loaded(source)
    _check_config(source.config)
    _check_model(source)
    generation_config = _writable(source.generation_config, name)
    if refused := sorted(name for name in config_overrides if not _is_open(name)):
        raise ValueError(f"{refused} cannot be chosen: the source or an argument of from_llm decides them.")

    vocab_size, new_ids = _vocabulary(tokenizer, source.config.vocab_size)
    fields = _decoder_fields(source.config)
    fields |= {
        "vocab_size": vocab_size,
        "tie_word_embeddings": _is_tied(source),
        "num_memory_slots": num_memory_slots,
        "memory_layers": memory_layers,
        "memory_init_std": source.get_parameter("model.embed_tokens.weight").float().std().item(),
    }
    fields |= _memory_fields(config_overrides)
    if tokenizer is not None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            fields[name] = getattr(tokenizer, name)
            setattr(generation_config, name, fields[name])
    model = RxTForCausalLM._from_config(
        RxTConfig(**fields),
        dtype=source.dtype,
        attn_implementation=source.config._attn_implementation,
    ).to(source.device)
    model.generation_config = generation_config
    _load(model, _mapped_tensors(source, model.config), new_ids)
    if model.model.memory_selection is not None:
        start_salience(model)
    return model.train(source.training)


def convert_tokenizer(
    tokenizer: PreTrainedTokenizerFast | str | os.PathLike,
    max_length: int | None = None,
    template: Literal["source", "control"] | None = None,
) -> PreTrainedTokenizerFast:
    r"""
    Returns a copy of a tokenizer, or of the one at a path, with a chat template of RxT. Ids of ordinary text stay the
    same.

    Args:
        max_length (`int`, *optional*): longest interaction in tokens (default: the tokenizer's own limit).
        template (`str`, *optional*): "source" has the pieces that the source's own chat template puts around the texts
            of one turn, so that the model reads what it was trained on; no token is added, and an answer ends with the
            source's end token. What the source has no piece for (the result of a tool, thinking, a call) is plain text
            there, which a user can type. "control" adds the ten control tokens, which the model has to learn. Default:
            "source" where it can be had.

    Raises: `ValueError` where there is no tokenizer, for one without a `tokenizers` backend, or whose vocabulary
    spells a control token; for "source" where the source's template gives no pieces.
    """
    if template not in (None, "source", "control"):
        raise ValueError(f"template={template!r} must be 'source', 'control' or None.")
    given = tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        try:
            given = AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:
            # tokenizers raises plain `Exception`; transformers' reason is a list of several lines
            raise ValueError(
                f"{tokenizer} holds no tokenizer that can be read, such as tokenizer.json: "
                f"{' '.join(str(error).split())}"
            ) from error
    if not isinstance(given, PreTrainedTokenizerFast):
        raise ValueError(f"convert_tokenizer needs a fast tokenizer, got {type(given).__name__}.")
    if template == "control":
        return add_control_tokens(given, max_length)
    if source_pieces(given) is not None:
        converted = copy.deepcopy(given)
        converted.model_max_length = max_length or given.model_max_length
        return converted
    try:
        return source_tokenizer(given, max_length)
    except ValueError as error:
        if template == "source":
            raise ValueError(f'template="source" cannot be had, use "control": {error}') from error
        logger.warning(f"Interactions get control tokens of their own, which the model has to learn: {error}")
    return add_control_tokens(given, max_length)


def freeze_base(model: RxTForCausalLM) -> list[str]:
    r"""
    Freezes the language model and makes the modules of the memory trainable: cross-attention with its norms, encoder,
    attention or selection, and initial memory. The embeddings stay frozen, rows of new tokens included.

    Returns: the names of the trainable parameters.

    Raises: `ValueError` if memory modules are quantised, which leaves nothing that could be trained.
    """
    trained = model.memory_parameters()
    for name, parameter in trained.items():
        if type(parameter).__name__ in ("Params4bit", "Int8Params", "Int8Tensor"):
            raise ValueError(
                f"{name} is quantised and cannot be trained: load with modules_to_not_convert (bitsandbytes: "
                r'llm_int8_skip_modules) of [r".*\.memory_\w+", "lm_head"], or train LoRA on it.'
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return list(trained)


def adapter_config(
    model: RxTForCausalLM, tokenizer: PreTrainedTokenizerFast | None = None, **lora_fields: Any
) -> "LoraConfig":
    r"""
    Returns a PEFT configuration that trains a converted model and leaves its base frozen bit for bit:

        adapted = peft.get_peft_model(model, adapter_config(model, tokenizer, r=8))

    Attention and feed-forward of the decoder get LoRA. Where the memory is read jointly, that is all, of rank 8 and
    scale 2; the salience stays, and `modules_to_save=["model.memory_selection"]` trains it too. Where the memory is
    read by a cross-attention, the memory encoder, the memory attention, and the memory cross-attentions with their
    norms are trained whole. The initial memory stays, since PEFT adapts modules only.

    Checkpoints hold nothing else; loaded onto the same conversion of the same source they give the same numbers.

    Args:
        tokenizer (`PreTrainedTokenizerFast`, *optional*): what [`convert_tokenizer`] returned. The rows of its control
            tokens are trained too, in the table of the embeddings and in an untied head.
        lora_fields: further fields of `LoraConfig`, or others in place of these.
    """
    from peft import LoraConfig

    whole = [name for name in model.memory_modules() if name != "model.memory_selection"]
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": _BASE_PROJECTIONS, "modules_to_save": whole}
    if model.config.memory_reading == "joint":
        fields |= {"r": 8, "lora_alpha": 16, "modules_to_save": whole or None}
    if tokenizer is not None and (ids := _control_ids(tokenizer)):
        tables = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
        fields["trainable_token_indices"] = dict.fromkeys(tables, ids)
    return LoraConfig(**(fields | lora_fields))


def _loaded(source: str | os.PathLike) -> PreTrainedModel:
    """Loads the model of a name or folder; raises `ValueError` if the files lack a tensor, or for other families."""
    refuse_adapter(source)
    _check_config(AutoConfig.from_pretrained(source))
    # without a file of its own, the configuration for generation is the default one
    with contextlib.suppress(OSError):
        try:
            generation_config = GenerationConfig.from_pretrained(source)
        except ValueError as error:
            raise ValueError(_INVALID_GENERATION.format(source, " ".join(str(error).split()))) from error
        _writable(generation_config, source, warn=False)
    return load_whole(AutoModelForCausalLM, source, dtype="auto")


def _writable(config: GenerationConfig, source: object, *, warn: bool = True) -> GenerationConfig:
    """
    Returns a copy that can be saved, without fields that `generate` ignores in its mode: models were published with
    such fields, and transformers loads them but does not write them.
    """
    config = copy.deepcopy(config)
    try:
        config.validate(strict=True)
        return config
    except ValueError:
        unused = (_SAMPLING_FIELDS if config.do_sample is not True else ()) + (
            _BEAM_FIELDS if config.num_beams in (None, 1) else ()
        )
    dropped = {name: value for name in unused if (value := getattr(config, name, None)) is not None}
    if config.pad_token_id is not None and config.pad_token_id < 0:
        dropped["pad_token_id"] = config.pad_token_id
    config.update(**dict.fromkeys(dropped))
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(_INVALID_GENERATION.format(source, " ".join(str(error).split()))) from error
    if warn:
        logger.warning(f"The generation config of {source} sets {dropped}, which nothing uses: it is dropped.")
    return config


def _is_tied(source: PreTrainedModel) -> bool:
    """Returns whether the head and the embeddings are one tensor, whatever the configuration says."""
    table, head = (source.get_parameter(name) for name in _VOCABULARY_TENSORS)
    if table.data_ptr() == head.data_ptr():
        return True
    return bool(source.config.tie_word_embeddings) and torch.equal(table, head)


def _memory_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields about the memory: those that were asked for, and what goes with them."""
    fields = _MEMORY_FIELDS | overrides
    is_joint, selects = fields["memory_reading"] == "joint", fields["memory_writing"] == "selection"
    # with as many heads as the self-attention the cross-attention is a copy of it, else its output starts at zero
    is_copy = not is_joint and not any(name.startswith("cross_attention_num") for name in overrides)
    return {
        "memory_positions": "rank" if is_joint else "none",
        "memory_init": "zeros" if selects else "learned",
        "cross_attention_head_gate": is_copy,
        "cross_attention_zero_init": not (is_joint or is_copy),
    } | fields


def _check_config(config: PreTrainedConfig) -> None:
    if config.model_type not in _FAMILIES:
        raise ValueError(f"from_llm converts {', '.join(_FAMILIES)}; model type {config.model_type!r} is not covered.")
    rope = config.rope_parameters
    foreign = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    uncovered = {
        "rope_parameters by layer type": "rope_theta" not in rope,
        "quantization_config: load it dequantised": getattr(config, "quantization_config", None) is not None,
        "partial_rotary_factor": rope.get("partial_rotary_factor") not in (None, 1.0),
        f"layer_types {sorted(foreign)}": bool(foreign),
        # the source model does not look at them, its cache does
        "layer_types of a mistral": config.model_type == "mistral" and bool(getattr(config, "layer_types", None)),
    }
    if found := [name for name, is_found in uncovered.items() if is_found]:
        raise ValueError(f"from_llm does not cover {', '.join(found)}.")


def _check_model(source: PreTrainedModel) -> None:
    expected = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(source.config), None)
    if type(source) is not expected:
        raise ValueError(
            f"from_llm takes transformers' causal language model of type {source.config.model_type!r}, "
            f"got {type(source).__name__}{'; merge_and_unload() gives it' if hasattr(source, 'peft_config') else ''}."
        )
    if any(".lora_" in name for name, _ in source.named_parameters()):
        raise ValueError("The source holds LoRA layers: merge them with merge_and_unload() of PEFT first.")
    dtypes = {parameter.dtype for parameter in source.parameters()}
    if len(dtypes) > 1 or not source.dtype.is_floating_point:
        raise ValueError(f"from_llm needs weights of one floating-point type, not quantized ones, got {dtypes}.")
    if any(parameter.is_meta for parameter in source.parameters()):
        raise ValueError("from_llm needs weights in memory: some are offloaded or on the meta device.")
    refuse_broken(source, "The source")
    _check_modules(source)


def _check_modules(source: PreTrainedModel) -> None:
    """Raises `ValueError` for a source that does not compute what its configuration says: the RxT is built from it."""
    with torch.device("meta"):
        described = type(source)._from_config(copy.deepcopy(source.config), attn_implementation="eager")
    modules = dict(source.named_modules())
    differences = []
    for path, expected in described.named_modules():
        module = modules.get(path)
        if module is None:
            differences.append(f"{path} is missing")
            continue
        for name, value in vars(expected).items():
            found = vars(module).get(name, value)
            if not name.startswith("_") and name not in _MODES and isinstance(value, int | float | str | None):
                differences += [f"{path}.{name} is {found!r} in place of {value!r}".lstrip(".")] * (found != value)
        if path.endswith("act_fn") and type(module) is not type(expected):
            differences.append(f"{path} is {type(module).__name__} in place of {type(expected).__name__}")
    shapes = {name: tensor.shape for name, tensor in source.state_dict().items()}
    differences += [
        f"{name} has the shape {list(shapes[name])} in place of {list(tensor.shape)}"
        for name, tensor in described.state_dict().items()
        if shapes.get(name, tensor.shape) != tensor.shape
    ]
    rotation = source.model.rotary_emb
    frequencies = type(rotation)(source.config).original_inv_freq.to(rotation.original_inv_freq)
    if not torch.allclose(frequencies, rotation.original_inv_freq, rtol=1e-3):
        differences.append("model.rotary_emb has other frequencies")
    if differences:
        raise ValueError(f"The source is not what its configuration says: {some(differences)}.")


def _is_open(name: str) -> bool:
    """Returns whether a keyword is a field of the configuration that the source leaves open."""
    return name in RxTConfig.__dataclass_fields__ and _OVERRIDES.match(name) is not None


def _decoder_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of [`RxTConfig`] that the source decides."""
    fields = {name: copy.deepcopy(getattr(config, name)) for name in _SHARED_FIELDS}
    for name, origin in _FAMILIES[config.model_type].items():
        fields[name] = getattr(config, origin) if isinstance(origin, str) else origin
    layers = config.num_hidden_layers
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if fields.get("layer_types") is not None:
        fields["layer_types"] = fields["layer_types"][:layers]
    if config.model_type == "smollm3":
        # the source's list holds 1 for a layer that rotates
        fields["no_rope_layers"] = [layer for layer in range(layers) if not config.no_rope_layers[layer]]
    return fields


def _vocabulary(tokenizer: PreTrainedTokenizerFast | None, source_size: int) -> tuple[int, list[int]]:
    """Returns the size of the vocabulary, and the ids in it that the source has not learned."""
    if tokenizer is None:
        return source_size, []
    ids, control_ids = tokenizer.get_vocab(), _control_ids(tokenizer)
    size = max(source_size, 1 + max(ids.values()))
    # tables are often larger than the source's tokenizer: new tokens then have unused rows
    ordinary = 1 + max(token_id for text, token_id in ids.items() if text not in CONTROL_TOKENS.values())
    unlearned = {token_id for token_id in control_ids if token_id >= ordinary}
    return size, sorted(unlearned | set(range(source_size, size)))


def _control_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that the source does not know; none where interactions consist of its own pieces."""
    if source_pieces(tokenizer) is not None:
        return []
    ids = tokenizer.get_vocab()
    if missing := [text for text in CONTROL_TOKENS.values() if text not in ids]:
        raise ValueError(f"The tokenizer lacks the control tokens {missing}: pass convert_tokenizer(tokenizer).")
    return [ids[text] for text in CONTROL_TOKENS.values()]


def _mapped_tensors(source: PreTrainedModel, config: RxTConfig) -> dict[str, torch.Tensor]:
    """The source's tensors by their names in the RxT."""
    memory_layers = list(range(config.num_hidden_layers)) if config.memory_layers is None else config.memory_layers
    tensors, unmapped = {}, []
    for name, tensor in source.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        index = int(layer[1]) if layer else -1
        targets = _TENSORS.get(name.replace(layer[0], "model.layers.{layer}.") if layer else name)
        if targets is None:
            unmapped.append(name)
            continue
        for target in targets:
            if "{memory}" not in target:
                tensors[target.format(layer=index)] = tensor
            elif index in memory_layers and config.memory_encoding == "encoder":
                tensors[target.format(memory=memory_layers.index(index))] = tensor
        if layer and index in memory_layers and config.cross_attention_head_gate:
            module, kind = name.removeprefix(layer[0]).rsplit(".", 1)
            for target in _CROSS_ATTENTION.get(module, ()):
                # behind a closed gate, a bias of the output would be all that it says
                is_output_bias = target.endswith("o_proj") and kind == "bias"
                tensors[f"{layer[0]}{target}.{kind}"] = torch.zeros_like(tensor) if is_output_bias else tensor
    if unmapped:
        raise ValueError(f"from_llm does not cover these tensors of the source: {', '.join(unmapped)}.")
    return tensors


@torch.no_grad()
def _load(model: RxTForCausalLM, tensors: dict[str, torch.Tensor], new_ids: list[int]) -> None:
    """Fills the model; parameters that the source has no tensor for must be fresh parts of the memory."""
    for name in _VOCABULARY_TENSORS:
        table = tensors[name]
        grown = table.new_empty(model.config.vocab_size, table.shape[1])
        grown[: len(table)] = table
        is_new = torch.zeros(len(grown), dtype=torch.bool, device=table.device)
        is_new[new_ids] = True
        if new_ids:
            grown[is_new] = table[~is_new[: len(table)]].float().mean(dim=0).to(table.dtype)
        tensors[name] = grown
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    # an encoder is a copy of the source's layers, all else of the memory starts fresh
    encoder = "model.memory_encoder."
    fresh = {name for name in model.memory_parameters() if not name.startswith(encoder)}
    lost = sorted(unexpected) + sorted(set(missing) - fresh)
    if lost:
        raise ValueError(f"Source and RxT do not fit in {', '.join(lost)}.")
    memory = model.model.initial_memory
    if memory is not None:
        # without chance: an adapter, which does not hold it, must fit every conversion of its source
        noise = torch.randn(memory.shape, generator=torch.Generator().manual_seed(0))
        memory.copy_(noise * model.config.memory_init_std)


__all__ = ["adapter_config", "convert_tokenizer", "freeze_base", "from_llm"]
