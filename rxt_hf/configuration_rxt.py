# Copyright 2026 the rxt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of the Reactive Transformer."""

import sys
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import auto_docstring, logging

logger = logging.get_logger(__name__)

# settings of training, which files of version 0.1.0 hold: what they were without being set, and where they are now
TRAINING_FIELDS = {
    "bptt_turns": (None, "given to RxTForCausalLM.set_bptt_turns"),
    "mlm_loss_coef": (0.5, "an argument of RxTForPreTraining"),
    "memory_noise_std": (0.2, "an argument of RxTForPreTraining"),
}


def set_peft_defaults(model_type: str) -> None:
    """
    Gives PEFT the targets of Llama, whose names the projections have, as the defaults of `model_type`. Does nothing
    as long as PEFT is not imported.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, mapping in list(vars(constants).items()) if constants else []:
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in mapping:
            mapping.setdefault(model_type, mapping["llama"])


@auto_docstring(checkpoint="rxt-hf/rxt-tiny-facts")
@strict
class RxTConfig(PreTrainedConfig):
    r"""
    Configuration of a Reactive Transformer (RxT, arXiv 2510.03561): a decoder that reads a fixed-size Short-Term
    Memory (STM) through memory cross-attention, a memory encoder and a memory attention that write each finished
    interaction into it. Names shared with [`LlamaConfig`] mean the same here; the others are:

    Args:
        > The decoder, as a Llama

        head_dim (`int`, *optional*): size of a head (default: `hidden_size // num_attention_heads`). Fewer query heads
            at an unchanged `head_dim` are Sparse Query Attention (arXiv 2510.01817).
        max_position_embeddings (`int`): longest interaction in tokens, query and answer together.
        attention_bias (`bool`): biases of the q, k and v projections.
        attention_output_bias (`bool`): biases of the o projections.
        use_qk_norm (`bool`): RMSNorm over `head_dim` of queries and keys before the rotation, in the decoder's
            self-attention and the memory encoder.
        sliding_window (`int`, *optional*): tokens that a layer of type `"sliding_attention"` looks back.
        layer_types (`list[str]`, *optional*): `"full_attention"` or `"sliding_attention"` for each decoder layer.
        no_rope_layers (`list[int]`, *optional*): decoder layers whose self-attention does not rotate.

        > Its experts

        num_experts (`int`): experts of the decoder's feed-forward; 0 is dense.

        > The memory: its size and its start

        num_memory_slots (`int`): slots of each memory layer.
        memory_layers (`list[int]`, *optional*): decoder layers that read the memory, in order (default: all). The
            memory has one layer for each.
        memory_init (`str`): the memory before the first interaction: `"learned"`, `"random"` (normal, the paper's
            choice) or `"zeros"`.
        memory_init_std (`float`): standard deviation of the random memory, and of the learned one before training.

        > The memory: how it is read

        memory_reading (`str`): how a decoder layer reads its memory. `"cross_attention"` (the paper's form) is an
            attention of its own. `"joint"` (ours) makes slots further keys and values of the layer's self-attention,
            with its norm and projections, in one softmax with the turn's tokens.
        memory_positions (`str`): places of slots that are read jointly: `"none"` leaves their keys unrotated, `"rank"`
            rotates them by their rank in time, with the turn's tokens after the last slot.
        cross_attention_num_attention_heads (`int`, *optional*): query heads of the memory cross-attention.
        cross_attention_num_key_value_heads (`int`, *optional*): key and value heads of the memory cross-attention.
        cross_attention_zero_init (`bool`): starts the output of the memory cross-attention at zero, so that a model
            that has just been given a memory computes what it did without.
        cross_attention_head_gate (`bool`): a gate `tanh(g)` for each head of the memory cross-attention, closed before
            training.

        > The memory: how an interaction is encoded

        memory_encoding (`str`): how a finished interaction is encoded. `"encoder"` (the paper's form): by
            bidirectional layers of its own, whose outputs are written. The others (ours) write the inputs of the
            decoder's layers: `"decoder"` reads the interaction once more without a memory, all turns of an episode at
            once; `"decoder_in_passing"` keeps the states that the decoder computed while it read its memory and
            answered.
        memory_encoder_intermediate_size (`int`, *optional*): feed-forward width of the memory encoder (default:
            `intermediate_size`).
        memory_encoder_num_attention_heads (`int`, *optional*): query heads of the memory encoder.
        memory_encoder_num_key_value_heads (`int`, *optional*): key and value heads of the memory encoder.

        > The memory: how it is written

        memory_writing (`str`): how the memory is written. `"attention"` (the paper's form): by memory attention and
            gates. `"selection"` (ours): slots are copies of encoded tokens, and the most salient stay, see
            `RxTMemorySelection`.
        memory_attention_type (`str`): what the memory attends to before it is written: `"simple"` (nothing), `"self"`
            (its own layer), `"interlayer"` (the mean of all layers) or `"self_interlayer"` (a gated mix of the two).
        memory_attention_num_attention_heads (`int`, *optional*): query heads of the write and of `"self"`.
        memory_attention_num_key_value_heads (`int`, *optional*): key and value heads of the write and of `"self"`.
        interlayer_attention_num_attention_heads (`int`, *optional*): query heads of the attention to other layers.
        interlayer_attention_num_key_value_heads (`int`, *optional*): key and value heads of that attention.
        memory_gate_type (`str`): `"static"`, `"elementwise"` or `"linear"`, see `RxTResidualGate`.
        memory_gate_status (`str`): input of the gate from a slot: `"mean"`, `"linear"` or `"slot"`.
        memory_gate_granularity (`str`): one gate for each `"layer"`, `"slot"` or `"element"`.
        memory_gate_activation (`str`): `"sigmoid"`, `"tanh"` or `"none"` (a plain sum).
        memory_gate_init (`float`): parameter or bias of the gate before training; a negative one keeps more than it
            writes.

        > Set by [`convert.from_rxlm`] for checkpoints of RxT's authors; new models leave them as they are

        use_gated_attention (`bool`): multiplies the output of the heads by `sigmoid(gate_proj(x))`, where `x` is the
            input of the queries.
        use_gated_cross_attention (`bool`, *optional*): the same gate in the memory cross-attention (default:
            `use_gated_attention`).
        use_gated_memory_encoder_attention (`bool`, *optional*): the same gate in the memory encoder (default:
            `use_gated_attention`).
        use_final_norm (`bool`): norm before the language-model head.
        lm_head_bias (`bool`): bias of the language-model head.
        moe_layers (`list[int]`, *optional*): decoder layers with experts (default: all).
        num_shared_experts (`int`): experts that every token passes; a softmax gate mixes several.
        shared_expert_intermediate_size (`int`, *optional*): width of a shared expert (default:
            `moe_intermediate_size`).
        use_weighted_shared_experts (`bool`): scales routed and shared output by their share of the experts in use.

    Example:

    ```python
    >>> from rxt_hf import RxTConfig, RxTForCausalLM

    >>> model = RxTForCausalLM(RxTConfig(hidden_size=128, num_hidden_layers=2, num_memory_slots=32))
    >>> model.init_stm(batch_size=1).states.shape
    torch.Size([1, 2, 32, 128])

    ```"""

    model_type = "rxt"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "stm_cache",
        "last_hidden_state",
        "hidden_states",
        "attentions",
    ]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.gate_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.memory_cross_attn.q_proj": "colwise",
        "layers.*.memory_cross_attn.k_proj": "colwise",
        "layers.*.memory_cross_attn.v_proj": "colwise",
        "layers.*.memory_cross_attn.gate_proj": "colwise",
        "layers.*.memory_cross_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    # the memory attention stays whole with the root: its keys and values are computed outside its layers' forward
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "memory_encoder.layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }
    attribute_map = {"num_local_experts": "num_experts"}

    # Grouped as in the docstring. Fields that transformers describes come first in a group, so that the headings of
    # what `auto_docstring` makes of it stand where they belong.

    # the decoder, as a Llama
    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    attention_bias: bool = False
    attention_output_bias: bool = False
    use_qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None

    # its experts
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    router_aux_loss_coef: float | int = 0.01
    output_router_logits: bool = False
    num_experts: int = 0

    # the memory: its size and its start
    num_memory_slots: int = 64
    memory_layers: list[int] | None = None
    memory_init: Literal["learned", "random", "zeros"] = "learned"
    memory_init_std: float | int = 1.0

    # the memory: how it is read
    memory_reading: Literal["cross_attention", "joint"] = "cross_attention"
    memory_positions: Literal["none", "rank"] = "none"
    cross_attention_num_attention_heads: int | None = None
    cross_attention_num_key_value_heads: int | None = None
    cross_attention_zero_init: bool = False
    cross_attention_head_gate: bool = False

    # the memory: how an interaction is encoded
    memory_encoding: Literal["encoder", "decoder", "decoder_in_passing"] = "encoder"
    memory_encoder_intermediate_size: int | None = None
    memory_encoder_num_attention_heads: int | None = None
    memory_encoder_num_key_value_heads: int | None = None

    # the memory: how it is written
    memory_writing: Literal["attention", "selection"] = "attention"
    memory_attention_type: Literal["simple", "self", "interlayer", "self_interlayer"] = "interlayer"
    memory_attention_num_attention_heads: int | None = None
    memory_attention_num_key_value_heads: int | None = None
    interlayer_attention_num_attention_heads: int | None = None
    interlayer_attention_num_key_value_heads: int | None = None
    memory_gate_type: Literal["static", "elementwise", "linear"] = "linear"
    memory_gate_status: Literal["mean", "linear", "slot"] = "slot"
    memory_gate_granularity: Literal["layer", "slot", "element"] = "element"
    memory_gate_activation: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    memory_gate_init: float | int = -1.0

    # what convert.from_rxlm sets
    use_gated_attention: bool = False
    use_gated_cross_attention: bool | None = None
    use_gated_memory_encoder_attention: bool | None = None
    use_final_norm: bool = True
    lm_head_bias: bool = False
    moe_layers: list[int] | None = None
    num_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    use_weighted_shared_experts: bool = False

    def __post_init__(self, **kwargs):
        for name, (default, place) in TRAINING_FIELDS.items():
            if (value := kwargs.pop(name, default)) != default:
                logger.warning_once(f"{name}={value} of a configuration has no effect any more: it is {place}.")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for role in ("memory_encoder", "cross_attention", "memory_attention", "interlayer_attention"):
            heads, key_value_heads = f"{role}_num_attention_heads", f"{role}_num_key_value_heads"
            fallback = self.num_key_value_heads if getattr(self, heads) is None else getattr(self, heads)
            if getattr(self, heads) is None:
                setattr(self, heads, self.num_attention_heads)
            if getattr(self, key_value_heads) is None:
                setattr(self, key_value_heads, fallback)
        if self.use_gated_cross_attention is None:
            self.use_gated_cross_attention = self.use_gated_attention
        if self.use_gated_memory_encoder_attention is None:
            self.use_gated_memory_encoder_attention = self.use_gated_attention
        if self.memory_encoder_intermediate_size is None:
            self.memory_encoder_intermediate_size = self.intermediate_size
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.moe_intermediate_size
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        # trainers take any other coefficient, in files written before too, for a sign of experts
        if not self.num_experts:
            self.router_aux_loss_coef = 0.0
        super().__post_init__(**kwargs)
        # TRL reads it of every model that is not in transformers' namespace; empty, it is not saved
        self.__dict__.setdefault("auto_map", {})

    def __setattr__(self, key, value):
        if key in TRAINING_FIELDS:
            raise AttributeError(f"{key} is no field of the configuration: it is {TRAINING_FIELDS[key][1]}.")
        super().__setattr__(key, value)

    def to_dict(self) -> dict[str, Any]:
        # PEFT reads this right before it looks up the default targets of a model type, whichever was imported first
        set_peft_defaults(self.model_type)
        fields = super().to_dict()
        if not fields.get("auto_map"):
            fields.pop("auto_map", None)
        return fields

    @property
    def num_memory_layers(self) -> int:
        """Layers of the memory: as many as decoder layers that read it."""
        return self.num_hidden_layers if self.memory_layers is None else len(self.memory_layers)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        for name in (
            "vocab_size",
            "hidden_size",
            "head_dim",
            "num_hidden_layers",
            "max_position_embeddings",
            "num_memory_slots",
            "num_attention_heads",
            "num_key_value_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("memory_init_std", "num_experts", "num_shared_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError('layer_types with "sliding_attention" need a sliding_window of at least 1 token.')
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even to be rotated, got {self.head_dim}.")
        for prefix in ("", "memory_encoder_", "cross_attention_", "memory_attention_", "interlayer_attention_"):
            heads = getattr(self, f"{prefix}num_attention_heads")
            key_value_heads = getattr(self, f"{prefix}num_key_value_heads")
            if min(heads, key_value_heads) < 1 or heads % key_value_heads:
                raise ValueError(
                    f"{prefix}num_attention_heads ({heads}) must be a positive multiple of "
                    f"{prefix}num_key_value_heads ({key_value_heads})."
                )
        for name in ("memory_layers", "moe_layers", "no_rope_layers"):
            layers = getattr(self, name)
            if layers is not None and layers != sorted(set(layers) & set(range(self.num_hidden_layers))):
                raise ValueError(
                    f"{name} must be ascending, distinct decoder layers below num_hidden_layers="
                    f"{self.num_hidden_layers}, got {layers}."
                )
        if self.memory_layers == []:
            raise ValueError("memory_layers must name at least one decoder layer: an RxT without memory is a Llama.")
        if self.moe_layers and not self.num_experts:
            raise ValueError(f"moe_layers={self.moe_layers} need num_experts, which is 0.")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and num_experts "
                f"({self.num_experts})."
            )
        self._validate_memory()

    def _validate_memory(self):
        if self.memory_positions == "rank" and self.memory_reading != "joint":
            raise ValueError(
                'memory_positions="rank" needs memory_reading="joint": the cross-attention has no positions.'
            )
        kind, status, granularity = self.memory_gate_type, self.memory_gate_status, self.memory_gate_granularity
        if kind == "linear" and status != "slot" and granularity == "element":
            raise ValueError(
                f"A linear gate over the slots' {status} status has one value for each slot or layer; "
                'memory_gate_granularity="element" needs memory_gate_status="slot".'
            )
        if kind == "elementwise" and status == "slot" and granularity != "element":
            raise ValueError(
                f'An elementwise gate over the slot needs memory_gate_granularity="element", got "{granularity}".'
            )


__all__ = ["RxTConfig"]
