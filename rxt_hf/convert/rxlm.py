# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints of the architecture's authors (RxT-Alpha and RxT-Beta, package `rxlm`) as [`RxTForCausalLM`].

Their options become configuration or a rearrangement of the tensors; the model computes the same numbers up to float
rounding. What the model cannot compute is refused by name, and no tensor of the file is left over in silence.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors.torch import load_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..configuration_rxt import RxTConfig
from ..loading import refuse_adapter
from ..modeling_rxt import RxTForCausalLM

logger = logging.get_logger(__name__)

LICENCE_NOTICE = (
    "The weights that Reactive AI publishes are under their own licence (RAML: non-commercial, share-alike). It also "
    "covers a model converted from them; the licence of this package does not."
)
COMPONENTS = ("decoder", "encoder", "memory_attention")
ACTIVATIONS = {
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "linear": "linear",
}
ATTENTION_TYPES = ("mha", "gqa", "mqa", "sqa")
ATTENTION_TYPE_OPTIONS = ("att_type", "self_att_type", "cross_att_type", "interlayer_att_type")
UNSUPPORTED_OPTIONS = {"use_rms_norm": False, "use_gated": False, "use_post_norm": True, "disable_residual": True}
# their RMSNorm has no eps of its own: torch then takes that of float32
RMS_NORM_EPS = torch.finfo(torch.float32).eps

DROPPED = {
    r"\.rope\.(inv_freq|cache)$": "table of angles, computed from rope_base",
    r"\.stm\.memory$": "memory at the time of saving, random before the first interaction",
    r"^encoder\..*\.(memory_cross_attention\..*|norm2\.weight|stm_norm\.weight)$": "the encoder never reads a memory",
    r"^mlm_head\.": "head of the first training stage",
}
UNSUPPORTED_TENSORS = {
    r"norm(\d|_layers\.\d+)?\.bias$": "LayerNorm in place of RMSNorm",
    r"norm(_layers\.\d+)?\.(scale|gate|ema_rms|norm\.\w+)$": "a memory norm other than classic-rms",
    r"\.fc1\.weight$": "a feed-forward layer without a gate",
    r"^encoder\..*\.ff\.(router|w1|w2|experts|shared)": "experts in the encoder",
    r"^encoder\.model\.(final_)?stateless_layers\.": "stateless layers in the encoder",
}
# options that tensors show, that only training uses, or that are read below
KNOWN_OPTIONS = frozenset(
    re.findall(
        r"\w+",
        """
    embed_dim vocab_size num_layers seq_len stm_size rope_base use_flash_attention use_rms_norm use_post_norm
    att_heads att_groups att_query_groups att_type self_att_type cross_att_type cross_att_groups cross_att_query_groups
    self_att_groups self_att_query_groups interlayer_att_type interlayer_att_groups interlayer_att_query_groups
    att_dropout self_att_dropout cross_att_dropout interlayer_att_dropout ff_dropout use_attention_output_bias
    use_gated_attention use_gated_cross_attention skip_memory_cross_attention use_head_norm head_norm_type
    ff_dim ff_activation use_gated use_moe num_experts moe_top_k moe_bias_mode use_vectorized_moe num_shared_experts
    shared_expert_dim moe_shared_experts_bias_mode moe_use_weighted_shared_experts dense_layer_dim
    stateless_layers_config final_stateless_layers_config norm_type norm_decay norm_init_gate norm_per_dim_scale
    use_gated_residual residual_gate_type residual_gate_init residual_gate_slot_status_type residual_per_slot_gate
    use_tanh_residual_gate use_gate_for_self_attention disable_residual num_groups debug_mode debug_interval
    """,
    )
)


@dataclass
class RxLMReport:
    """
    What became of a checkpoint.

    Args:
        mapped (`list[str]`): tensors of the file that are in the model.
        dropped (`dict[str, str]`): the other tensors of the file, each with the reason.
        zeros (`list[str]`): biases of the model that the file does not have.
        token_ids (`dict[str, Any]`): the checkpoint's `tokenizer_config`.
    """

    mapped: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    zeros: list[str] = field(default_factory=list)
    token_ids: dict[str, Any] = field(default_factory=dict)


@overload
def from_rxlm(path: str | os.PathLike, *, report: Literal[False] = False) -> RxTForCausalLM: ...
@overload
def from_rxlm(path: str | os.PathLike, *, report: Literal[True]) -> tuple[RxTForCausalLM, RxLMReport]: ...
def from_rxlm(path, *, report=False):
    r"""
    Reads a checkpoint of the package `rxlm`. The converted model starts from a random memory, as theirs does, and is
    in evaluation mode; its memory is laid out `(batch, layers, slots, hidden)` where theirs has the layers first.

    Args:
        path (`str` or `os.PathLike`): a folder with `config.json` and `model.safetensors` of a whole model, or with
            the folders `decoder`, `encoder` and `memory_attention` of one component each.
        report (`bool`): also return an [`RxLMReport`].

    Returns: the model, or the model and the report.

    Raises: `ValueError` with the names of everything in the checkpoint that this model cannot compute, of the first
    missing tensor, or of the tensors that no rule knows.
    """
    folder = Path(path)
    refuse_adapter(folder)
    configs, tensors = _read(folder)
    reader = _Reader(tensors)
    _refuse(_unsupported_options(configs) + _unsupported_tensors(set(tensors) - set(reader.dropped)))
    state, options = _map_checkpoint(reader, configs)
    unknown = sorted(set(tensors) - reader.used - set(reader.dropped))
    _refuse([f"unknown tensor {key}" for key in unknown])
    _refuse([f"NaN or infinity in {key}" for key in sorted(reader.used) if not torch.isfinite(tensors[key]).all()])

    config = RxTConfig(**options, **_token_options(configs["tokenizer"]))
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    model = RxTForCausalLM._from_config(config, dtype=dtype)
    zeros = _fill_biases(model, state)
    model.load_state_dict(state, strict=True)
    logger.warning(LICENCE_NOTICE)
    if not report:
        return model.eval()
    return model.eval(), RxLMReport(sorted(reader.used), reader.dropped, zeros, configs["tokenizer"])


def _refuse(problems: Iterable[str]) -> None:
    listed = "; ".join(dict.fromkeys(problems))
    if listed:
        raise ValueError(f"This rxlm checkpoint cannot be converted: {listed}.")


def _refuse_if(condition: object, problem: str) -> None:
    _refuse([problem] if condition else [])


def _read(folder: Path) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """Configuration of each component, and all tensors under the names that a whole model gives them."""
    if (folder / SAFE_WEIGHTS_NAME).is_file() and (folder / CONFIG_NAME).is_file():
        whole = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        configs = {name: whole.pop(f"{name}_config", None) for name in COMPONENTS}
        _refuse([f"{CONFIG_NAME} has no {name}_config" for name in COMPONENTS if not configs[name]])
        tensors = load_file(folder / SAFE_WEIGHTS_NAME)
    else:
        files = [folder / name / file for name in COMPONENTS for file in (CONFIG_NAME, SAFE_WEIGHTS_NAME)]
        missing = [str(file.relative_to(folder)) for file in files if not file.is_file()]
        _refuse_if(missing, f"{folder} holds neither {SAFE_WEIGHTS_NAME} with {CONFIG_NAME} nor {', '.join(missing)}")
        whole, tensors = {}, {}
        configs = {name: json.loads((folder / name / CONFIG_NAME).read_text(encoding="utf-8")) for name in COMPONENTS}
        for name in (*COMPONENTS, "mlm_head"):
            if (folder / name / SAFE_WEIGHTS_NAME).is_file():
                part = load_file(folder / name / SAFE_WEIGHTS_NAME)
                tensors.update({f"{name}.{key}": tensor for key, tensor in part.items()})
        logger.warning("Component folders name no token ids: the defaults of RxTConfig (0, 1 and 2) are used.")
    configs["tokenizer"] = whole.pop("tokenizer_config", None) or {}
    whole.pop("tokenizer", None)
    configs["whole"] = whole
    return configs, tensors


def _unsupported_options(configs: dict[str, dict]) -> list[str]:
    problems = [problem for name in COMPONENTS for problem in _unsupported_in_component(name, configs[name])]
    # one value of each for the whole model; att_heads is the size of a head
    for key in ("embed_dim", "num_layers", "att_heads", "stm_size", "vocab_size", "rope_base", "ff_activation"):
        values = {name: configs[name].get(key, 10000 if key == "rope_base" else None) for name in COMPONENTS}
        if len({ACTIVATIONS.get(value, value) for value in values.values() if value is not None}) > 1:
            problems.append(f"{key} differs between components: {values}")
    return problems + _unsupported_memory_options(configs)


def _unsupported_in_component(name: str, config: dict) -> list[str]:
    required = ["embed_dim", "att_heads", "seq_len", "stm_size"]
    required += ["ff_activation"] * (name != "memory_attention")
    problems = [f"{name} option {key} is missing" for key in required if config.get(key) is None]
    for key, value in sorted(config.items()):
        if key not in KNOWN_OPTIONS and value not in (None, False, [], {}):
            # what a gated attention is activated with has an option of its own
            if not (key.endswith("activation") and value == "sigmoid"):
                advice = f"remove it from {CONFIG_NAME} if it does not change what the model computes"
                problems.append(f"{name} option {key}={value!r} is unknown, {advice}")
        elif (
            (key in ATTENTION_TYPE_OPTIONS and value not in (None, *ATTENTION_TYPES))
            or (key == "ff_activation" and value not in (None, *ACTIVATIONS))
            or (key in UNSUPPORTED_OPTIONS and value is UNSUPPORTED_OPTIONS[key])
        ):
            problems.append(f"{name} option {key}={value!r}")
    kinds = [*(config.get("stateless_layers_config") or []), *(config.get("final_stateless_layers_config") or [])]
    return problems + [f"stateless layer {kind!r}" for kind in kinds if kind not in ("dense", "moe")]


def _unsupported_memory_options(configs: dict[str, dict]) -> list[str]:
    memory, whole = configs["memory_attention"], configs["whole"]
    variant = whole.get("memory_attention_variant") or ""
    problems = [
        f"option {key}={value!r} is unknown"
        for key, value in whole.items()
        if key != "memory_attention_variant" and value not in (None, False, [], {})
    ]
    if "grouped" in variant or (memory.get("num_groups") or 1) > 1:
        problems.append(f"grouped memory attention (variant {variant!r}, num_groups={memory.get('num_groups')})")
    elif variant.replace("_", "-") not in ("", "simple", "self", "interlayer", "self-interlayer"):
        problems.append(f"memory_attention_variant={variant!r}")
    if memory.get("norm_type", "classic-rms") != "classic-rms":
        problems.append(f"memory norm norm_type={memory['norm_type']!r} (supported: 'classic-rms')")
    decoder = configs["decoder"]
    if decoder.get("use_head_norm") and "layer" in str(decoder.get("head_norm_type")):
        problems.append(f"head_norm_type={decoder['head_norm_type']!r} in place of RMSNorm")
    return problems


def _unsupported_tensors(names: Iterable[str]) -> list[str]:
    return [
        f"{sentence} ({name})"
        for pattern, sentence in UNSUPPORTED_TENSORS.items()
        for name in [next((name for name in sorted(names) if re.search(pattern, name)), None)]
        if name is not None
    ]


class _Reader:
    """The file's tensors, and which of them have been used."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors, self.used = tensors, set()
        self.dropped = {
            key: reason for key in sorted(tensors) for pattern, reason in DROPPED.items() if re.search(pattern, key)
        }

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def take(self, key: str) -> torch.Tensor:
        _refuse_if(key not in self.tensors, f"tensor {key} is missing")
        self.used.add(key)
        return self.tensors[key]

    def has_any(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.tensors)

    def count(self, prefix: str) -> int:
        """Layers of a list: the largest index and one, so that a gap shows as a missing tensor."""
        found = (re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in self.tensors)
        return max((int(match[1]) + 1 for match in found if match), default=0)


class _Shapes(dict[str, Any]):
    """Sizes read off the tensors: a second, different value of the same name is refused."""

    def note(self, name: str, value: Any) -> None:
        if self.setdefault(name, value) != value:
            _refuse([f"{name} is {self[name]} in one layer and {value} in another"])


def _map_checkpoint(reader: _Reader, configs: dict[str, dict]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and configuration of the model."""
    decoder, memory = configs["decoder"], configs["memory_attention"]
    shapes = _Shapes(head_dim=decoder["embed_dim"] // decoder["att_heads"])
    _check_rope_tables(reader, decoder.get("rope_base", 10000), shapes["head_dim"])
    state = {"model.embed_tokens.weight": _embedding(reader)}
    state |= _map_decoder(reader, decoder, shapes)
    state |= _map_encoder(reader, configs["encoder"], shapes)
    state |= _map_memory_attention(reader, memory, shapes)
    shapes.setdefault("intermediate_size", shapes["memory_encoder_intermediate_size"])
    # notes with a space in their name are for comparison only
    options = {name: value for name, value in shapes.items() if " " not in name} | {
        "vocab_size": state["model.embed_tokens.weight"].shape[0],
        "hidden_size": state["model.embed_tokens.weight"].shape[1],
        "hidden_act": ACTIVATIONS[decoder["ff_activation"]],
        "max_position_embeddings": decoder["seq_len"],
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(decoder.get("rope_base", 10000))},
        "attention_output_bias": True,
        "attention_dropout": decoder.get("att_dropout") or 0.0,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "num_memory_slots": decoder["stm_size"],
        "memory_init": "random",
    }
    return state, options


def _embedding(reader: _Reader) -> torch.Tensor:
    """One table for both: a shared one is stored under either name, or twice."""
    keys = ("decoder.model.embedding.weight", "encoder.model.embedding.weight")
    tables = [reader.take(key) for key in keys if key in reader] or [reader.take(keys[0])]
    _refuse_if(not torch.equal(tables[0], tables[-1]), "encoder and decoder have embeddings of different values")
    return tables[0]


def _check_rope_tables(reader: _Reader, base: float, head_dim: int) -> None:
    expected = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    for key, table in reader.tensors.items():
        if key.endswith(".rope.inv_freq") and "mlm_head" not in key:
            fits = table.shape == expected.shape and torch.allclose(table.float(), expected, rtol=1e-2)
            _refuse_if(not fits, f"{key} is not that of rope_base={base} and heads of {head_dim}")


def _map_decoder(reader: _Reader, config: dict, shapes: _Shapes) -> dict[str, torch.Tensor]:
    groups = ("stateless_layers", "layers", "final_stateless_layers")
    counts = [reader.count(f"decoder.model.{group}") for group in groups]
    sources = [f"decoder.model.{group}.{i}" for group, count in zip(groups, counts, strict=True) for i in range(count)]
    state, moe_layers = {}, []
    for index, source in enumerate(sources):
        reads_memory = counts[0] <= index < counts[0] + counts[1]
        layer = {"input_layernorm.weight": reader.take(f"{source}.norm1.weight")}
        layer["post_attention_layernorm.weight"] = reader.take(f"{source}.norm3.weight")
        layer |= _prefixed("self_attn", _attention(reader, f"{source}.attention", config, shapes, ""))
        if reads_memory:
            layer["memory_cross_attn_layernorm.weight"] = reader.take(f"{source}.norm2.weight")
            layer["memory_layernorm.weight"] = reader.take(f"{source}.stm_norm.weight")
            cross = _attention(reader, f"{source}.memory_cross_attention", config, shapes, "cross_attention_")
            layer |= _prefixed("memory_cross_attn", cross)
        if reader.has_any(f"{source}.ff.router."):
            moe_layers.append(index)
            layer |= _prefixed("mlp", _experts(reader, f"{source}.ff", config, shapes))
        else:
            layer |= _prefixed("mlp", _feed_forward(reader, f"{source}.ff", shapes, "intermediate_size"))
        state |= _prefixed(f"model.layers.{index}", layer)
    shapes["num_hidden_layers"] = len(sources)
    shapes["memory_layers"] = list(range(counts[0], counts[0] + counts[1]))
    shapes["moe_layers"] = moe_layers
    shapes.note("memory layers", counts[1])

    state["lm_head.weight"] = reader.take("decoder.model.head.weight")
    state["lm_head.bias"] = reader.take("decoder.model.head.bias")
    shapes["lm_head_bias"] = True
    shapes["use_final_norm"] = bool(config.get("use_head_norm")) or "decoder.model.head_norm.weight" in reader
    if shapes["use_final_norm"]:
        state["model.norm.weight"] = reader.take("decoder.model.head_norm.weight")
    return state


def _map_encoder(reader: _Reader, config: dict, shapes: _Shapes) -> dict[str, torch.Tensor]:
    state = {}
    shapes.note("memory layers", reader.count("encoder.model.layers"))
    for index in range(reader.count("encoder.model.layers")):
        source = f"encoder.model.layers.{index}"
        layer = {"input_layernorm.weight": reader.take(f"{source}.norm1.weight")}
        layer["post_attention_layernorm.weight"] = reader.take(f"{source}.norm3.weight")
        layer |= _prefixed("self_attn", _attention(reader, f"{source}.attention", config, shapes, "memory_encoder_"))
        layer |= _prefixed("mlp", _feed_forward(reader, f"{source}.ff", shapes, "memory_encoder_intermediate_size"))
        state |= _prefixed(f"model.memory_encoder.layers.{index}", layer)
    return state


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in state.items()}


def _half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from interleaved pairs to the two halves that are rotated against each other."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


# which option says that the attention of a role is gated
GATED_OPTIONS = {"": "use_gated_attention", "cross_attention_": "use_gated_cross_attention"}
GATED_OPTIONS["memory_encoder_"] = "use_gated_memory_encoder_attention"


def _attention(reader: _Reader, source: str, config: dict, shapes: _Shapes, role: str) -> dict[str, torch.Tensor]:
    """
    One attention. Queries and keys are reordered alike, also where one or none is rotated: their products stay.
    """
    head_dim = shapes["head_dim"]
    query, key, value = (reader.take(f"{source}.{name}_proj.weight") for name in "qkv")
    heads, key_value_heads = query.shape[0] // head_dim, key.shape[0] // head_dim
    fewer, more = sorted((heads, key_value_heads))
    if not fewer or more % fewer or query.shape[0] % head_dim or key.shape != value.shape or key.shape[0] % head_dim:
        _refuse([f"{source} has {query.shape[0]} query and {key.shape[0]} key rows for heads of {head_dim}"])
    query, key = _half_split(query, head_dim), _half_split(key, head_dim)
    if heads < key_value_heads:
        # reversed SQA: all query heads in turn, once more for each further group of key heads
        query = query.repeat(key_value_heads // heads, 1)
    shapes.note(f"{role}num_attention_heads", more)
    shapes.note(f"{role}num_key_value_heads", key_value_heads)
    state = {"q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value}
    state["o_proj.weight"] = reader.take(f"{source}.out_proj.weight")
    if source.startswith("memory_attention.") or config.get("use_attention_output_bias") is not False:
        state["o_proj.bias"] = reader.take(f"{source}.out_proj.bias")
    if role in GATED_OPTIONS:
        wanted = bool(config.get("use_gated_attention"))
        if role == "cross_attention_" and config.get("use_gated_cross_attention") is not None:
            wanted = bool(config["use_gated_cross_attention"])
        if wanted or f"{source}.gate_proj.weight" in reader:
            state["gate_proj.weight"] = reader.take(f"{source}.gate_proj.weight")
        shapes.note(GATED_OPTIONS[role], "gate_proj.weight" in state)
    return state


def _gate_first(linear_then_gated: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    linear, gated = linear_then_gated.chunk(2, dim=dim)
    return gated, linear


def _feed_forward(
    reader: _Reader, source: str, shapes: _Shapes, width: str, *, has_bias: bool = True
) -> dict[str, torch.Tensor]:
    """A dense gated feed-forward layer; the second half of its first matrix is the gate."""
    state = {"down_proj.weight": reader.take(f"{source}.fc2.weight")}
    state["gate_proj.weight"], state["up_proj.weight"] = _gate_first(reader.take(f"{source}.fc1.linear.weight"))
    shapes.note(width, state["down_proj.weight"].shape[1])
    if has_bias:
        state["gate_proj.bias"], state["up_proj.bias"] = _gate_first(reader.take(f"{source}.fc1.linear.bias"))
        state["down_proj.bias"] = reader.take(f"{source}.fc2.bias")
    return state


def _experts(reader: _Reader, source: str, config: dict, shapes: _Shapes) -> dict[str, torch.Tensor]:
    """A mixture of experts: router, routed experts and shared ones."""
    _refuse_if(config.get("moe_top_k") is None, "decoder option moe_top_k is missing")
    top_k, router = config["moe_top_k"], reader.take(f"{source}.router.gate.weight")
    shared, shared_count = _shared_experts(reader, source, config, shapes)
    is_weighted = bool(config.get("moe_use_weighted_shared_experts")) and shared_count > 0
    shapes.note("num_experts", len(router))
    shapes.note("num_experts_per_tok", top_k)
    shapes.note("num_shared_experts", shared_count)
    shapes.note("use_weighted_shared_experts", is_weighted)
    if f"{source}.w1" not in reader and reader.count(f"{source}.experts"):
        routed = _listed_experts(reader, source, len(router), shapes)
    else:
        # the weights of the routed experts sum to one, or to their share where shared ones are weighted
        share = top_k / (top_k + shared_count) if is_weighted else 1.0
        routed = _stacked_experts(reader, source, config, share)
    shapes.note("moe_intermediate_size", routed["down_proj"].shape[2])
    return {"gate.weight": router} | _prefixed("experts", routed) | shared


def _listed_experts(reader: _Reader, source: str, count: int, shapes: _Shapes) -> dict[str, torch.Tensor]:
    """Older checkpoints have the experts one by one."""
    width = "moe_intermediate_size"
    parts = [_feed_forward(reader, f"{source}.experts.{index}", shapes, width) for index in range(count)]
    stacked = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    return {
        "gate_up_proj": torch.cat([stacked["gate_proj.weight"], stacked["up_proj.weight"]], dim=1),
        "gate_up_proj_bias": torch.cat([stacked["gate_proj.bias"], stacked["up_proj.bias"]], dim=1),
        "down_proj": stacked["down_proj.weight"],
        "down_proj_bias": stacked["down_proj.bias"],
    }


def _stacked_experts(reader: _Reader, source: str, config: dict, share: float) -> dict[str, torch.Tensor]:
    """Stacked (in, out) matrices; one bias for all experts becomes that of each, as their weights sum to `share`."""
    first = reader.take(f"{source}.w1").transpose(1, 2)
    state = {"gate_up_proj": torch.cat(_gate_first(first, 1), dim=1)}
    state["down_proj"] = reader.take(f"{source}.w2").transpose(1, 2).contiguous()
    mode = config.get("moe_bias_mode") or "global"
    if mode == "local":
        state["gate_up_proj_bias"] = torch.cat(_gate_first(reader.take(f"{source}.b1"), 1), dim=1)
        state["down_proj_bias"] = reader.take(f"{source}.b2")
    elif mode == "global":
        state["down_proj_bias"] = (reader.take(f"{source}.global_bias") / share).repeat(len(first), 1)
    else:
        _refuse_if(mode != "off", f"decoder option moe_bias_mode={mode!r}")
    return state


def _shared_experts(
    reader: _Reader, source: str, config: dict, shapes: _Shapes
) -> tuple[dict[str, torch.Tensor], int]:
    """Experts that every token passes, and how many; an old configuration without their number has none."""
    width = "shared_expert_intermediate_size"
    if f"{source}.shared_w1" in reader:
        experts = _stacked_shared_experts(reader, source)
        shapes.note(width, experts[0]["down_proj.weight"].shape[1])
    else:
        single = [f"{source}.shared_expert"] * reader.has_any(f"{source}.shared_expert.")
        names = single or [f"{source}.shared_experts.{i}" for i in range(reader.count(f"{source}.shared_experts"))]
        experts = [
            _feed_forward(reader, name, shapes, width, has_bias=_shared_has_bias(reader, name, config))
            for name in names
        ]
    wanted = config.get("num_shared_experts")
    if wanted is not None and wanted != len(experts):
        _refuse([f"num_shared_experts is {wanted}, but {source} has {len(experts)}"])
    mode = config.get("moe_shared_experts_bias_mode")
    has_bias = bool(experts) and (f"{source}.shared_experts_bias" in reader or mode == "global")
    shapes.note("bias of shared experts", has_bias)
    if has_bias:
        if config.get("moe_use_weighted_shared_experts"):
            _refuse(["weighted shared experts with one bias for all of them, whose weight is not known"])
        bias = reader.take(f"{source}.shared_experts_bias")
        for expert in experts:
            expert["down_proj.bias"] = bias + expert.get("down_proj.bias", 0.0)
    state = {f"shared_experts.{i}.{key}": tensor for i, part in enumerate(experts) for key, tensor in part.items()}
    if len(experts) > 1:
        state["shared_expert_gate.weight"] = reader.take(f"{source}.shared_expert_gate.weight")
    return state, len(experts)


def _shared_has_bias(reader: _Reader, name: str, config: dict) -> bool:
    return config.get("moe_shared_experts_bias_mode") == "local" or reader.has_any(f"{name}.fc1.linear.bias")


def _stacked_shared_experts(reader: _Reader, source: str) -> list[dict[str, torch.Tensor]]:
    first = reader.take(f"{source}.shared_w1").transpose(1, 2)
    second = reader.take(f"{source}.shared_w2").transpose(1, 2)
    experts = []
    for index in range(len(first)):
        gate, up = _gate_first(first[index])
        experts.append({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": second[index]})
        if f"{source}.shared_b1" in reader or f"{source}.shared_b2" in reader:
            gate, up = _gate_first(reader.take(f"{source}.shared_b1")[index])
            experts[-1] |= {"gate_proj.bias": gate, "up_proj.bias": up}
            experts[-1]["down_proj.bias"] = reader.take(f"{source}.shared_b2")[index]
    return experts


# their names of what precedes the write: attention, norm and gate
PRE_STEPS = {
    "simple": None,
    "self": ("self_attention_layers", "self_memory_norm_layers", "self_residual_gate_layers"),
    "interlayer": ("mean_attention_layers", "mean_memory_norm_layers", "mean_residual_gate_layers"),
}
PRE_STEPS["self_interlayer"] = PRE_STEPS["interlayer"]


def _memory_attention_type(reader: _Reader) -> str:
    """Read off the tensors: the name in the configuration is not always that of the model that was saved."""
    top = "memory_attention.model"
    if reader.has_any(f"{top}.interlayer_gate_layers."):
        return "self_interlayer"
    if reader.has_any(f"{top}.mean_"):
        return "interlayer"
    return "self" if reader.has_any(f"{top}.self_") else "simple"


def _map_memory_attention(reader: _Reader, config: dict, shapes: _Shapes) -> dict[str, torch.Tensor]:
    top, kind = "memory_attention.model", _memory_attention_type(reader)
    steps = PRE_STEPS[kind]
    count = reader.count(f"{top}.attention_layers")
    shapes.note("memory layers", count)
    shapes["memory_attention_type"] = kind
    state, gates = {}, {}
    for index in range(count):
        source, target = f"{top}.{{}}.{index}".format, f"model.memory_attention.layers.{index}"
        state[f"{target}.memory_layernorm.weight"] = reader.take(source("memory_norm_layers") + ".weight")
        state[f"{target}.encoded_layernorm.weight"] = reader.take(source("memory_input_norm_layers") + ".weight")
        write = _attention(reader, source("attention_layers"), config, shapes, "memory_attention_")
        state |= _prefixed(f"{target}.write_attn", write)
        gates[f"{target}.write_gate"] = source("residual_gate_layers")
        if steps is not None:
            attention, norm, gate = steps
            role = "memory_attention_" if kind == "self" else "interlayer_attention_"
            pre = _attention(reader, source(attention), config, shapes, role)
            state |= _prefixed(f"{target}.pre_attn", pre)
            state[f"{target}.pre_layernorm.weight"] = reader.take(source(norm) + ".weight")
            gates[f"{target}.pre_gate"] = source(gate)
        if kind == "self_interlayer":
            gates[f"{target}.interlayer_gate"] = source("interlayer_gate_layers")
    if kind in ("interlayer", "self_interlayer"):
        state["model.memory_attention.mean_layernorm.weight"] = reader.take(f"{top}.mean_stm_norm.weight")
    return state | _map_gates(reader, config, shapes, gates)


def _map_gates(reader: _Reader, config: dict, shapes: _Shapes, gates: dict[str, str]) -> dict[str, torch.Tensor]:
    """
    Residual gates, all of one form. A plain sum among tanh gates is one whose logits are zero; among sigmoid gates it
    has no such form.
    """
    state: dict[str, torch.Tensor] = {}
    sums = []
    for target, source in gates.items():
        if _is_plain_sum(reader, config, source):
            sums.append(target)
            continue
        state |= _prefixed(target, _gate(reader, config, source, shapes))
    if not state:
        shapes["memory_gate_activation"] = "none"
        return state
    # their default, where the configuration does not say
    shapes["memory_gate_activation"] = "sigmoid" if config.get("use_tanh_residual_gate") is False else "tanh"
    if sums and shapes["memory_gate_activation"] == "sigmoid":
        _refuse([f"memory attention with a plain sum at {gates[sums[0]]} beside sigmoid gates"])
    example = next(target for target in gates if target not in sums)
    form = {key.removeprefix(example): tensor for key, tensor in state.items() if key.startswith(f"{example}.")}
    return state | {f"{target}{name}": torch.zeros_like(tensor) for target in sums for name, tensor in form.items()}


def _is_plain_sum(reader: _Reader, config: dict, source: str) -> bool:
    """Whether a gate is switched off; the self-attention of the memory has a switch of its own, which is off."""
    if reader.has_any(f"{source}."):
        return False
    if ".self_residual_gate_layers." in source:
        return not config.get("use_gate_for_self_attention")
    return config.get("use_gated_residual") is False


def _gate(reader: _Reader, config: dict, source: str, shapes: _Shapes) -> dict[str, torch.Tensor]:
    state = {}
    kind = config.get("residual_gate_type")
    if f"{source}.gate" in reader:
        state["gate"] = reader.take(f"{source}.gate")
        if kind not in ("static", "elementwise"):
            _refuse([f"residual_gate_type={kind!r}, but {source}.gate is a parameter"])
    else:
        state["gate.weight"] = reader.take(f"{source}.gate.weight")
        state["gate.bias"] = reader.take(f"{source}.gate.bias")
        kind = "linear"
    status = "mean"
    wants_linear = kind != "static" and config.get("residual_gate_slot_status_type") == "linear"
    if wants_linear or f"{source}.slot_status.weight" in reader:
        status = "linear"
        state["slot_status.weight"] = reader.take(f"{source}.slot_status.weight")
        state["slot_status.bias"] = reader.take(f"{source}.slot_status.bias")
    rows = next(iter(state.values())).shape[0]
    granularity = "layer" if rows == 1 else "slot"
    for name, value in (("type", kind), ("status", status), ("granularity", granularity)):
        shapes.note(f"memory_gate_{name}", value)
    return state


def _fill_biases(model: RxTForCausalLM, state: dict[str, torch.Tensor]) -> list[str]:
    """Adds zeros for biases that this model has in all layers and the file only in some; checks every shape."""
    zeros, wrong = [], []
    for name, parameter in model.state_dict().items():
        if name not in state and name.endswith("bias"):
            state[name] = torch.zeros_like(parameter)
            zeros.append(name)
        if name in state and state[name].shape != parameter.shape:
            wrong.append(f"{name} would be {list(state[name].shape)} where its layer needs {list(parameter.shape)}")
    _refuse(wrong)
    return zeros


def _token_options(tokenizer: dict[str, Any]) -> dict[str, int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: tokenizer[name] for name in names if tokenizer.get(name) is not None}
