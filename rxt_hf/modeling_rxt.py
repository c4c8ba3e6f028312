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
"""The Reactive Transformer (arXiv 2510.03561): the decoder, how it reads and writes the memory, and the causal LM."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.integrations import use_experts_implementation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, _active_collector, capture_outputs

from .cache_rxt import StateError, STMCache, TurnCache, as_stm_cache
from .configuration_rxt import RxTConfig
from .episode_rxt import RxTCausalEpisodeMixin, RxTEpisodeMixin
from .fingerprint_rxt import execution_device, loaded_parameter, memory_fingerprint
from .generation_rxt import RxTGenerationMixin, wait_for_writes
from .layers_rxt import (
    RxTAttention,
    RxTMLP,
    RxTRMSNorm,
    RxTRotaryEmbedding,
    RxTZeroLinear,
    check_mask_shape,
    linear,
    one_query_attention,
    positions_in_interaction,
    project,
    rotary_tables,
    upcast,
    warn_beyond_positions,
)
from .losses_rxt import load_balancing_losses, refuse_labels_taken_away, row_shares
from .memory_rxt import (
    RxTGateLinear,
    RxTMemoryAttention,
    RxTMemoryEncoder,
    RxTMemoryPartsMixin,
    RxTMemorySelection,
    RxTResidualGate,
    filled_slots,
    packed,
    without_last_token,
)

logger = logging.get_logger(__name__)


@auto_docstring
@dataclass
class RxTModelOutputWithPast(BaseModelOutputWithPastAndCrossAttentions):
    r"""
    Output of [`RxTModel`]. For an episode the leading dimension of `hidden_states`, `attentions` and
    `cross_attentions` is `batch_size * turns`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, tokens, hidden_size)`):
            Hidden states after the last layer and norm; `(batch_size, turns, tokens, hidden_size)` for an episode.
        cache (`EncoderDecoderCache`, *optional*): keys and values of this interaction; the cross part holds
            those of the memory.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): input and output of each decoder layer.
        attentions (`tuple(torch.FloatTensor)`, *optional*): weights of each self-attention.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*): weights of each memory cross-attention, of shape
            `(batch_size, num_heads, tokens, num_memory_slots)`.
        router_logits (`tuple(torch.FloatTensor)`, *optional*): router logits of each mixture-of-experts layer.
        stm_cache (`STMCache`, *optional*): the memory that was read; for an episode the memory after its last turn.
    """

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    stm_cache: STMCache | None = None


@auto_docstring
@dataclass
class RxTCausalLMOutputWithPast(CausalLMOutputWithCrossAttentions):
    r"""
    Output of [`RxTForCausalLM`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): next-token loss, router loss included.
        logits (`torch.FloatTensor` of shape `(batch_size, tokens, vocab_size)`): prediction scores;
            `(batch_size, turns, tokens, vocab_size)` for an episode, `(turns read, tokens, vocab_size)` with a
            `read_mask`, and `None` for an episode with labels in training, see [`RxTForCausalLM.forward`].
        cache (`EncoderDecoderCache`, *optional*): see [`RxTModelOutputWithPast`].
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        attentions (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        router_logits (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        aux_loss (`torch.FloatTensor`, *optional*): load-balancing loss of the experts over the unpadded tokens of
            each row, and of all rows the mean; with `labels`, rows count by their share of the labels.
        last_hidden_state (`torch.FloatTensor`, *optional*): what the head was given.
        stm_cache (`STMCache`, *optional*): see [`RxTModelOutputWithPast`].
    """

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    stm_cache: STMCache | None = None


class RxTSelfAttention(RxTAttention):
    """Causal self-attention of the decoder."""

    is_causal = True

    def __init__(self, config: RxTConfig, layer_idx: int):
        super().__init__(config, layer_idx, gated=config.use_gated_attention, use_qk_norm=config.use_qk_norm)
        self.use_rope = layer_idx not in (config.no_rope_layers or ())
        # CODEPATH: converted Mistral and Qwen checkpoints slide, RxT presets do not
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, cache=None, memory=None, **kwargs):
        """
        Attends in one softmax to `memory`, keys and values of slots, and to the turn's own tokens after it. A window
        is of these alone: the mask says which slots a token sees.
        """
        position_embeddings = position_embeddings if self.use_rope else None
        queries = self.queries(hidden_states, position_embeddings)
        keys, values = self.keys_values(hidden_states, position_embeddings)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        sliding_window = self.sliding_window
        if memory is not None:
            keys, values = torch.cat([memory[0], keys], dim=2), torch.cat([memory[1], values], dim=2)
            sliding_window = None
        return self.attend(
            hidden_states, queries, keys, values, attention_mask, sliding_window=sliding_window, **kwargs
        )


class RxTMemoryCrossAttention(RxTAttention):
    """Tokens read the memory: queries are rotated by their position, slots have none."""

    def __init__(self, config: RxTConfig, layer_idx: int):
        super().__init__(
            config,
            layer_idx,
            "cross_attention_",
            gated=config.use_gated_cross_attention,
            zero_init=config.cross_attention_zero_init,
        )
        # CODEPATH: language models that are converted to read by cross-attention have gates, RxT presets do not
        if config.cross_attention_head_gate:
            self.head_gate = nn.Parameter(torch.empty(config.cross_attention_num_attention_heads))

    def attention_interface(self, queries, attention_mask) -> Callable:
        interface = super().attention_interface(queries, attention_mask)
        is_one_query = queries.shape[2] == 1 and attention_mask is None and not self.training
        is_slow = queries.device.type == "cpu" and queries.dtype.itemsize < 4
        return one_query_attention if is_one_query and is_slow and interface is sdpa_attention_forward else interface

    def forward(self, hidden_states, keys, values, position_embeddings, attention_mask=None):
        queries = self.queries(hidden_states, position_embeddings)
        return self.attend(hidden_states, queries, keys, values, attention_mask)


@use_experts_implementation
class RxTExperts(nn.Module):
    """Experts as stacked tensors; the loop here is the `eager` implementation, transformers has faster ones."""

    def __init__(self, config: RxTConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.gate_up_proj_bias = self.down_proj_bias = None
        # CODEPATH: checkpoints of RxT-Alpha have biases, RxT presets do not
        if config.mlp_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            token, choice = torch.where(top_k_index == expert)
            biases = (None, None)
            if self.has_bias:
                biases = (self.gate_up_proj_bias[expert], self.down_proj_bias[expert])
            gate, up = linear(hidden_states[token], self.gate_up_proj[expert], biases[0]).chunk(2, dim=-1)
            update = linear(self.act_fn(gate) * up, self.down_proj[expert], biases[1])
            output.index_add_(0, token, (update * top_k_weights[token, choice, None]).to(output.dtype))
        return output


class RxTTopKRouter(nn.Module):
    """Softmax over all experts, the best `num_experts_per_tok` of them, renormalised."""

    def __init__(self, config: RxTConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states):
        router_logits = F.linear(hidden_states, self.weight)
        top_k_weights, top_k_index = torch.topk(F.softmax(upcast(router_logits), dim=-1), self.top_k, dim=-1)
        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index


class RxTSparseMoeBlock(nn.Module):
    def __init__(self, config: RxTConfig):
        super().__init__()
        self.gate = RxTTopKRouter(config)
        self.experts = RxTExperts(config)
        self.experts.has_bias = config.mlp_bias
        shared = config.num_shared_experts
        width, bias = config.shared_expert_intermediate_size, config.mlp_bias
        self.shared_experts = nn.ModuleList(
            [RxTMLP(config.hidden_size, width, config.hidden_act, bias) for _ in range(shared)]
        )
        self.shared_expert_gate = nn.Linear(config.hidden_size, shared, bias=False) if shared > 1 else None
        self.routed_scale = self.shared_scale = 1.0
        # CODEPATH: checkpoints of RxT-Beta may weight shared experts, RxT presets add them
        if config.use_weighted_shared_experts and shared:
            self.routed_scale = config.num_experts_per_tok / (config.num_experts_per_tok + shared)
            self.shared_scale = 1.0 - self.routed_scale

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights) * self.routed_scale
        if len(self.shared_experts) == 1:
            output = output + self.shared_experts[0](tokens) * self.shared_scale
        elif self.shared_expert_gate is not None:
            shares = F.softmax(self.shared_expert_gate(tokens), dim=-1).unsqueeze(1)
            shared = torch.stack([expert(tokens) for expert in self.shared_experts], dim=-1)
            output = output + (shared * shares).sum(dim=-1) * self.shared_scale
        return output.reshape(hidden_states.shape)


class RxTDecoderLayer(GradientCheckpointingLayer):
    """
    Self-attention, memory cross-attention (in `memory_layers`), feed-forward; each with a norm before it. A joint
    layer has no cross-attention: its self-attention reads the memory.
    """

    memory_parts = ("memory_cross_attn_layernorm", "memory_layernorm", "memory_cross_attn")

    def __init__(self, config: RxTConfig, layer_idx: int):
        super().__init__()
        memory_layers = range(config.num_hidden_layers) if config.memory_layers is None else config.memory_layers
        self.memory_idx = memory_layers.index(layer_idx) if layer_idx in memory_layers else None
        self.input_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = RxTSelfAttention(config, layer_idx)
        self.is_joint = config.memory_reading == "joint"
        self.slots_have_rank = config.memory_positions == "rank" and self.self_attn.use_rope
        if self.memory_idx is not None and not self.is_joint:
            self.memory_cross_attn_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.memory_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.memory_cross_attn = RxTMemoryCrossAttention(config, layer_idx)
        self.post_attention_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
        is_sparse = config.num_experts and (config.moe_layers is None or layer_idx in config.moe_layers)
        self.mlp = (
            RxTSparseMoeBlock(config)
            if is_sparse
            else RxTMLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias)
        )

    def memory_keys_values(self, memory_states, filled=None, slot_embeddings=None):
        """
        Returns keys and values of one layer's slots, (batch_size, num_memory_slots, hidden_size), and zeros for those
        that are not `filled`; `slot_embeddings` rotate by the slots' places.
        """
        if self.is_joint:
            states = self.input_layernorm(memory_states)
            pair = self.self_attn.keys_values(states, slot_embeddings if self.slots_have_rank else None)
        else:
            pair = self.memory_cross_attn.keys_values(self.memory_layernorm(memory_states))
        return pair if filled is None else tuple(part * filled[:, None, :, None] for part in pair)

    def read_memory(self, memory_states, cache, dtype, filled, slot_embeddings):
        """Returns this layer's keys and values of the memory; with a cache they are computed once a turn."""
        cached = isinstance(cache, EncoderDecoderCache)
        if cached and cache.is_updated.get(self.memory_idx):
            layer = cache.cross_attention_cache.layers[self.memory_idx]
            return (layer.keys, layer.values) if layer.keys.shape[2] else None
        if memory_states is None:
            return None
        if memory_states.shape[2]:
            states = memory_states[:, self.memory_idx].to(dtype)
            keys, values = self.memory_keys_values(states, filled, slot_embeddings)
        else:
            keys = values = memory_states[:, :1]
        if cached:
            keys, values = cache.cross_attention_cache.update(keys, values, self.memory_idx)
            cache.is_updated[self.memory_idx] = True
        return (keys, values) if keys.shape[2] else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        memory_mask: torch.Tensor | None = None,
        filled: torch.Tensor | None = None,
        slot_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        within_turn = cache
        if isinstance(cache, EncoderDecoderCache):
            within_turn = cache.self_attention_cache
        memory = None
        if self.memory_idx is not None:
            memory = self.read_memory(memory_states, cache, hidden_states.dtype, filled, slot_embeddings)
        update, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            cache=within_turn,
            memory=memory if self.is_joint else None,
            **kwargs,
        )
        hidden_states = hidden_states + update
        if memory is not None and not self.is_joint:
            update, _ = self.memory_cross_attn(
                self.memory_cross_attn_layernorm(hidden_states), *memory, position_embeddings, memory_mask
            )
            # a row without a slot to read computes what it does without a memory
            hidden_states = hidden_states + (update if filled is None else update * filled.any(-1)[:, None, None])
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@auto_docstring
class RxTPreTrainedModel(PreTrainedModel, RxTMemoryPartsMixin):
    config: RxTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RxTDecoderLayer", "RxTMemoryEncoderLayer", "RxTMemoryAttentionLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache", "stm_cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(RxTTopKRouter, index=0),
        "hidden_states": RxTDecoderLayer,
        "attentions": RxTSelfAttention,
        "cross_attentions": OutputRecorder(RxTMemoryCrossAttention, index=1),
    }

    @property
    def device(self) -> torch.device:
        """The device that the model computes on, also if its weights are offloaded."""
        return execution_device(self)

    # what a write that is under way depends on does not change under it

    def _apply(self, fn, recurse: bool = True):
        wait_for_writes()
        return super()._apply(fn, recurse)

    def set_attn_implementation(self, *args, **kwargs):
        wait_for_writes()
        return super().set_attn_implementation(*args, **kwargs)

    def train(self, mode: bool = True):
        wait_for_writes()
        # On some CPUs bitsandbytes would reorder 4-bit weights for inference in their first forward, in place: no
        # gradient passes them from then on, and what is saved is damaged. Loading ends with eval().
        for module in self.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return super().train(mode)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, RxTZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, RxTGateLinear):
            self._init_gate(module.bias)
        elif isinstance(module, RxTResidualGate):
            if isinstance(module.gate, nn.Parameter):
                self._init_gate(module.gate)
            elif module.gate_bias is not None:
                self._init_gate(module.gate_bias)
        elif isinstance(module, RxTExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
            if module.gate_up_proj_bias is not None:
                init.zeros_(module.gate_up_proj_bias)
                init.zeros_(module.down_proj_bias)
        elif isinstance(module, RxTTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RxTRotaryEmbedding):
            for name, frequencies in module.initial_frequencies().items():
                init.copy_(getattr(module, name), frequencies)
        elif isinstance(module, RxTMemoryCrossAttention) and module.head_gate is not None:
            init.zeros_(module.head_gate)
        elif isinstance(module, RxTMemorySelection):
            init.normal_(module.weight, mean=0.0, std=std)
            init.constant_(module.age_penalty, 0.01)
            init.constant_(module.repeat_penalty, 3.0)
        elif isinstance(module, RxTModel) and module.initial_memory is not None:
            init.normal_(module.initial_memory, mean=0.0, std=self.config.memory_init_std)

    def _init_gate(self, parameter):
        """`memory_gate_init`, spread over the slots, which are the first dimension."""
        spread = torch.linspace(-2.0, 2.0, len(parameter)) if len(parameter) > 1 else torch.zeros(1)
        values = (self.config.memory_gate_init + spread).view(-1, *[1] * (parameter.dim() - 1))
        init.copy_(parameter, values.expand_as(parameter).to(parameter))


@auto_docstring
class RxTModel(RxTPreTrainedModel, RxTEpisodeMixin):
    """The decoder with its memory encoder and memory attention; no head."""

    memory_parts = ("memory_encoder", "memory_attention", "memory_selection", "initial_memory")

    def __init__(self, config: RxTConfig):
        super().__init__(config)
        # fields may have been set one by one since the configuration was made
        config.validate_architecture()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [RxTDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        # CODEPATH: some RxT-Alpha checkpoints have no norm before the head, RxT presets do
        self.norm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps) if config.use_final_norm else nn.Identity()
        self.rotary_emb = RxTRotaryEmbedding(config)
        self.memory_encoder = self.memory_attention = self.memory_selection = None
        # CODEPATH: RxT presets have the paper's encoder and write; converted language models encode with their own
        # layers, and choose
        if config.memory_encoding == "encoder":
            self.memory_encoder = RxTMemoryEncoder(config)
        # CODEPATH: as above
        if config.memory_writing == "selection":
            self.memory_selection = RxTMemorySelection(config)
        else:
            self.memory_attention = RxTMemoryAttention(config)
        self.initial_memory = None
        # CODEPATH: RxT presets learn it, checkpoints of RxT-Alpha and RxT-Beta start from noise
        if config.memory_init == "learned":
            shape = (config.num_memory_layers, config.num_memory_slots, config.hidden_size)
            self.initial_memory = nn.Parameter(torch.empty(shape))
        self.leaves_out_empty_slots = config.memory_reading == "joint" or config.memory_writing == "selection"
        self.leaves_out_last_token = config.memory_writing == "selection" or config.memory_encoding.endswith("passing")
        self.gradient_checkpointing = False
        self.post_init()

    def initial_states(self, batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """The memory before the first interaction, (batch_size, num_memory_layers, num_memory_slots, hidden_size)."""
        if self.initial_memory is not None:
            return loaded_parameter(self, "initial_memory").unsqueeze(0).expand(batch_size, -1, -1, -1)
        config, device, dtype = self.config, self.device, self.dtype
        shape = (batch_size, config.num_memory_layers, config.num_memory_slots, config.hidden_size)
        # CODEPATH: no published checkpoint starts from zeros, RxT-Alpha and RxT-Beta start from noise
        if config.memory_init == "zeros":
            return torch.zeros(shape, device=device, dtype=dtype)
        noise_device = device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=noise_device, dtype=torch.float32)
        return (noise * config.memory_init_std).to(device=device, dtype=dtype)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeds ids of any shape. Hooks on the embedding, such as NEFTune's, see rows of tokens."""
        return self.embed_tokens(input_ids.flatten(0, -2)).unflatten(0, input_ids.shape[:-1])

    def memory_keys_values(self, states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Returns the content of the cross part of a cache for a turn that reads `states` of
        (batch_size, num_memory_layers, num_memory_slots, hidden_size): for each of its layers the keys and values, of
        (batch_size, heads, slots, head_dim). `decode` with a cache that is filled with them needs no `memory_states`.
        """
        dtype = self.embed_tokens.weight.dtype
        layers = [layer for layer in self.layers if layer.memory_idx is not None]
        filled = filled_slots(states) if self.leaves_out_empty_slots else None
        places = self._slot_embeddings(states[:, 0].to(dtype), filled)
        return [layer.memory_keys_values(states[:, layer.memory_idx].to(dtype), filled, places) for layer in layers]

    def _slot_embeddings(self, like: torch.Tensor, filled: torch.Tensor):
        """Returns the embeddings that rotate keys of slots by their rank among the filled ones, if any."""
        # CODEPATH: converted language models ask for it, RxT presets have cross-attention
        if self.config.memory_positions != "rank" or filled is None:
            return None
        return rotary_tables(*self.rotary_emb(like, (filled.cumsum(dim=-1) - 1).clamp(min=0)))

    def encode(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory_states: torch.Tensor | None = None,
    ) -> list[tuple[torch.Tensor, ...]]:
        """
        Encodes the interactions in `inputs_embeds` of (batch_size, tokens, hidden_size) for the write. Returns, for
        each memory layer, keys and values, or the states themselves with `memory_writing="selection"`. Only
        `memory_encoding="decoder_in_passing"` needs `memory_states`, the memory that these turns read.
        """
        # CODEPATH: converted language models train without a gradient here, RxT presets with one
        has_gradient = torch.is_grad_enabled() and self.bptt_turns != 0
        # the input of the first layer is the embedding itself
        inputs_embeds = inputs_embeds if has_gradient else inputs_embeds.detach()
        with torch.set_grad_enabled(has_gradient):
            return self.writable(*self.encoded_states(inputs_embeds, attention_mask, memory_states))

    def writable(
        self, encoded_states: list[torch.Tensor], position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> list[tuple[torch.Tensor, ...]]:
        """Turns `encoded_states` into the input of the write."""
        if self.memory_attention is None:
            return [(states,) for states in encoded_states]
        return self.memory_attention.keys_values(encoded_states, position_embeddings)

    def encoded_states(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory_states: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Returns the states that encode an interaction, by memory layer, and their position embeddings."""
        if attention_mask is not None:
            # a row without a token would attend to nothing; what it encodes is thrown away by the write
            attention_mask = attention_mask.bool() | ~attention_mask.any(dim=-1, keepdim=True)
        position_ids = positions_in_interaction(attention_mask, inputs_embeds)
        position_embeddings = rotary_tables(*self.rotary_emb(inputs_embeds, position_ids))
        if self.memory_encoder is not None:
            return self.memory_encoder(inputs_embeds, attention_mask, position_embeddings), position_embeddings
        # CODEPATH: a converted language model starts with the first, and may end with the second
        if self.config.memory_encoding == "decoder":
            memory_states = None
        elif memory_states is None:
            raise ValueError('memory_encoding="decoder_in_passing" encodes under the memory that was read: give it.')
        layer_inputs: list[torch.Tensor] = []
        with nothing_recorded():
            self.decode(inputs_embeds, memory_states, attention_mask, layer_inputs=layer_inputs)
        return layer_inputs, position_embeddings

    def write_layer_inputs(
        self, states: torch.Tensor, layer_inputs: list[torch.Tensor], attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        The memory after an interaction whose states the decoder computed in passing, those of its last token left out.
        """
        position_ids = positions_in_interaction(attention_mask, attention_mask)[:, : layer_inputs[0].shape[1]]
        position_embeddings = rotary_tables(*self.rotary_emb(layer_inputs[0], position_ids))
        return self._write(states, self.writable(layer_inputs, position_embeddings), attention_mask)

    def write(
        self, states: torch.Tensor, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes one more interaction and returns the memory after it."""
        return self._write(states, self.encode(inputs_embeds, attention_mask, states), attention_mask)

    def _write(self, states, encoded, attention_mask):
        """Writes encoded interactions; rows without a token keep their memory bit-identical."""
        if self.leaves_out_last_token:
            if attention_mask is None:
                attention_mask = torch.ones(encoded[0][0].shape[:1] + encoded[0][0].shape[-2:-1], device=states.device)
            # the states as `generate` computed them lack the last token
            attention_mask = without_last_token(attention_mask)[:, : encoded[0][0].shape[-2]]
        if self.memory_selection is not None:
            return self.memory_selection(states, [layer for (layer,) in encoded], attention_mask)
        if attention_mask is None:
            return self.memory_attention(states, encoded)
        active = attention_mask.any(dim=-1)
        attention_mask = attention_mask.bool() | ~active[:, None]
        mask = varlen = None
        if is_flash_attention_requested(self.config):
            encoded, varlen = packed(encoded, attention_mask, slots=states.shape[2])
        else:
            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=states[:, 0],
                attention_mask=attention_mask,
                encoder_hidden_states=encoded[0][0][:, 0],
            )
        new_states = self.memory_attention(states, encoded, mask, varlen)
        if not torch.compiler.is_compiling() and active.all():
            return new_states
        return torch.where(active[:, None, None, None], new_states, states)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        stm_cache: STMCache | torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        write_mask: torch.Tensor | None = None,
        read_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RxTModelOutputWithPast:
        r"""
        cache (`EncoderDecoderCache`, *optional*):
            Keys and values of this interaction so far, and those of the memory.
        stm_cache ([`STMCache`] or `torch.Tensor`, *optional*):
            The memory to read; by default the initial one.
        memory_mask (`torch.Tensor` of shape `(batch_size, slots)`, *optional*):
            0 where nothing is to be read. The memory is then a tensor with any number of slots, such as the states of
            a memory encoder.
        write_mask (`torch.Tensor` of shape `(batch_size, turns)`, *optional*):
            0 for the turns of an episode that are read under the memory and not written into it.
        read_mask (`torch.Tensor` of shape `(batch_size, turns)`, *optional*):
            0 for the turns of an episode that are written into the memory and not decoded. `last_hidden_state` is then
            of shape `(turns read, tokens, hidden_size)`, in the order of rows and turns.
        """
        refuse_unknown_memory(f"{type(self).__name__}.forward", kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        batch_size = inputs_embeds.shape[0]
        check_mask_shape(attention_mask, inputs_embeds, cache)
        warn_beyond_positions(self.config, inputs_embeds.shape[-2])

        if inputs_embeds.dim() == 4:
            last_hidden_state, stm_cache = self.read_episode(
                inputs_embeds,
                attention_mask,
                stm_cache,
                write_mask,
                read_mask,
                cache=cache,
                memory_mask=memory_mask,
                **kwargs,
            )
            return RxTModelOutputWithPast(last_hidden_state=last_hidden_state, stm_cache=stm_cache)

        for name, mask in (("write_mask", write_mask), ("read_mask", read_mask)):
            if mask is not None:
                raise ValueError(f"{name} is for an episode of (batch, turns, tokens); one turn is read, not written.")
        if memory_mask is not None and not isinstance(stm_cache, torch.Tensor):
            raise ValueError(
                "memory_mask needs an stm_cache that is a tensor of (batch_size, layers, slots, hidden_size), "
                f"got {type(stm_cache).__name__}."
            )
        cache = TurnCache(DynamicCache(config=self.config), DynamicCache()) if use_cache and cache is None else cache
        cache = TurnCache.of(cache)
        states = None
        if isinstance(cache, TurnCache) and cache.is_updated.get(0):
            self._check_memory_unchanged(stm_cache, cache, batch_size)
        else:
            given = stm_cache
            if memory_mask is None:
                states, turns, fingerprint = self._read(given, batch_size)
                stm_cache = STMCache(states, turns=turns, fingerprint=fingerprint)
            else:
                states, stm_cache = given, None
            if isinstance(cache, TurnCache):
                cache.memory_given, cache.memory_states = given, states
        hidden_states = self.decode(
            inputs_embeds,
            states,
            attention_mask,
            position_ids=position_ids,
            cache=cache,
            memory_mask=memory_mask,
            **kwargs,
        )
        return RxTModelOutputWithPast(last_hidden_state=hidden_states, stm_cache=stm_cache, cache=cache)

    def _read(self, stm_cache, batch_size):
        """Returns states, turns and fingerprint of the given memory, or those before the first interaction."""
        if stm_cache is None:
            return self.initial_states(batch_size), torch.zeros(batch_size, dtype=torch.long), None
        if torch.compiler.is_compiling() and isinstance(stm_cache, torch.Tensor):
            return stm_cache, torch.zeros(batch_size, dtype=torch.long), None
        stm_cache = as_stm_cache(stm_cache, batch_size=batch_size, config=self.config)
        return stm_cache.states, stm_cache.turns, stm_cache.fingerprint

    def _check_memory_unchanged(self, stm_cache, cache, batch_size):
        """Raises `ValueError` if the memory changes within a turn, whose `cache` holds its keys and values."""
        # every step of generate passes the same object, whose content need not be compared
        if stm_cache is None or stm_cache is cache.memory_given or torch.compiler.is_compiling():
            return
        states, read = self._read(stm_cache, batch_size)[0], cache.memory_states
        if read is None:
            raise ValueError(
                "The cache does not know which memory its keys and values are of: go on with the cache that the model "
                "returned, or give no stm_cache."
            )
        if states is not read and not (states.shape == read.shape and torch.equal(states, read)):
            raise ValueError(
                "The cache holds the keys and values of another memory than the stm_cache given: pass the memory "
                "that this turn was started with, or start a new turn without a cache."
            )

    def decode(
        self,
        inputs_embeds: torch.Tensor,
        memory_states: torch.Tensor | None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        memory_mask: torch.Tensor | None = None,
        layer_inputs: list[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Returns the hidden states of one interaction for each row, read under `memory_states`. These may be `None` if
        the cross part of `cache` already holds their keys and values (see `memory_keys_values`); without either, no
        memory is read. `memory_mask` of (batch_size, slots) is 0 where nothing is to be read. An `attention_mask` that
        is a dict gives the mask of the tokens for each kind in `config.layer_types`, as the attention implementation
        takes it. To `layer_inputs`, if given, the inputs of the memory layers are appended, and nothing behind the
        last of them is computed.
        """
        if position_ids is None:
            position_ids = positions_in_interaction(attention_mask, inputs_embeds, cache)
        filled = slot_embeddings = None
        is_joint = self.config.memory_reading == "joint"
        if self.leaves_out_empty_slots:
            memory_states, filled = self._filled(memory_states, memory_mask, cache, attention_mask)
            memory_mask = filled
        has_slots = is_joint and filled is not None
        plain_masks = masks = self._causal_masks(inputs_embeds, attention_mask, position_ids, cache, has_slots)
        # CODEPATH: converted language models read jointly, RxT presets by cross-attention
        if has_slots:
            masks = self._masks_behind_slots(plain_masks, inputs_embeds, attention_mask, cache, filled)
            masks = self._with_salience(masks, memory_states, filled, inputs_embeds.dtype)
            # CODEPATH: as above
            if self.config.memory_positions == "rank":
                position_ids = position_ids + filled.sum(dim=-1, keepdim=True)
                slot_embeddings = None if memory_states is None else self._slot_embeddings(inputs_embeds, filled)
        elif memory_mask is not None:
            memory_mask = self._mask_of_slots(memory_mask, inputs_embeds)
            if filled is not None:
                memory_mask = self._with_salience({"": memory_mask}, memory_states, filled, inputs_embeds.dtype)[""]
        hidden_states = inputs_embeds
        position_embeddings = rotary_tables(*self.rotary_emb(hidden_states, position_ids))
        num_memory_layers = self.config.num_memory_layers
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            if layer_inputs is not None and layer.memory_idx is not None:
                layer_inputs.append(hidden_states)
                if len(layer_inputs) == num_memory_layers:
                    return hidden_states
            hidden_states = layer(
                hidden_states,
                memory_states,
                (plain_masks if layer.memory_idx is None else masks)[kind],
                position_embeddings=position_embeddings,
                cache=cache,
                memory_mask=memory_mask,
                filled=filled,
                slot_embeddings=slot_embeddings,
                position_ids=position_ids,
                **kwargs,
            )
        return self.norm(hidden_states)

    def _causal_masks(self, inputs_embeds, attention_mask, position_ids, cache, is_whole=False):
        """Returns the mask of each type of layer, over the turn's own tokens; unless `is_whole`, it may be `None`."""
        if isinstance(attention_mask, dict):
            return attention_mask
        create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: create[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                allow_is_causal_skip=not is_whole,
            )
            for kind in set(self.config.layer_types)
        }

    def _filled(self, memory_states, memory_mask, cache, attention_mask):
        """
        Returns the memory to be read and which of its slots are filled, (batch_size, slots). Where no slot is, it is
        nothing at all: then the numbers are those of a model without a memory, bit for bit.
        """
        if isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(0):
            # an empty slot's values are zeros; in the first layer so are those of a padding token, as its embedding
            values = cache.cross_attention_cache.layers[-1].values
            return None, values.ne(0).any(dim=-1).any(dim=1) if values.shape[2] else None
        if memory_states is None:
            return None, None
        filled = filled_slots(memory_states)
        if memory_mask is not None:
            filled = filled & memory_mask.bool()
            memory_states = memory_states * filled[:, None, :, None]
        # fixed shapes keep their slots, and in training the selection takes part even where there is nothing to read
        is_fixed = self.training or isinstance(attention_mask, dict) or getattr(cache, "is_compileable", False)
        if not (is_fixed or torch.compiler.is_compiling() or filled.any()):
            return memory_states[:, :, :0], None
        return memory_states, filled

    def _mask_of_slots(self, memory_mask, inputs_embeds):
        """Returns the mask of the cross-attention; raises `ValueError` for flash kernels, which have none for it."""
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=memory_mask,
            encoder_hidden_states=memory_mask[..., None].to(inputs_embeds.dtype),
        )
        if mask is not None and is_flash_attention_requested(self.config):
            raise ValueError(
                f"{self.config._attn_implementation} cannot leave out slots of a memory that is read by "
                'cross-attention: call model.set_attn_implementation("sdpa").'
            )
        return mask

    def _masks_behind_slots(self, masks, inputs_embeds, attention_mask, cache, filled):
        """
        Returns the masks of layers that read the memory jointly: slots stand before the tokens, and every token sees
        all that are filled, whatever its window. Raises `ValueError` where the attention has no mask for that.
        """
        if is_flash_attention_requested(self.config) and not isinstance(attention_mask, dict):
            length = inputs_embeds.shape[1] + (0 if cache is None else cache.get_seq_length())
            slides = "sliding_attention" in masks and length > self.config.sliding_window
            if not slides and (attention_mask is None or attention_mask.dim() == 2):
                tokens = filled.new_ones((len(filled), length)) if attention_mask is None else attention_mask.bool()
                mask = torch.cat([filled, tokens], dim=1)
                return dict.fromkeys(masks, None if mask.all() else mask)
        if not all(isinstance(mask, torch.Tensor) and mask.dim() == 4 for mask in masks.values()):
            raise ValueError(
                f'memory_reading="joint" has no mask for {self.config._attn_implementation} here (flex_attention '
                "never has, flash has none for turns longer than the sliding window and for a static cache): call "
                'model.set_attn_implementation("sdpa").'
            )
        behind = {}
        for kind, mask in masks.items():
            to_slots = filled[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
            if mask.dtype != torch.bool:
                to_slots = as_bias(to_slots, mask.dtype)
            behind[kind] = torch.cat([to_slots, mask.expand(len(filled), -1, -1, -1)], dim=-1)
        return behind

    def _with_salience(self, masks, memory_states, filled, dtype):
        """
        Returns, in training, the masks plus zero, with a gradient: what a slot's salience would have changed had it
        been a bias of the attention to it. So the choice, which is hard, learns from how much its slots are read.
        Flash kernels take no bias, and give it no gradient.
        """
        has_bias = memory_states is not None and not is_flash_attention_requested(self.config)
        if not (self.training and has_bias) or self.memory_selection is None:
            return masks
        salience = self.memory_selection.salience(memory_states[:, 0].detach(), filled).masked_fill(~filled, 0.0)
        bias, with_bias = (salience - salience.detach()).to(dtype)[:, None, None], {}
        for kind, mask in masks.items():
            mask = filled[:, None, None] if mask is None else mask
            mask = as_bias(mask, dtype) if mask.dtype == torch.bool else mask
            with_bias[kind] = mask + F.pad(bias, (0, mask.shape[-1] - filled.shape[1]))
        return with_bias


def as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns 0 where `mask` is True, else the lowest number: minus infinity would make a hidden row NaN."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def is_finite(states: torch.Tensor) -> bool:
    """Returns whether all numbers are finite. Their sum is, unless one is not or the sum itself overflows."""
    return bool(torch.isfinite(states.detach().sum()) or torch.isfinite(states).all())


@contextlib.contextmanager
def nothing_recorded():
    """Keeps layers that run here out of the hidden states, attentions and router logits that a forward returns."""
    if torch.compiler.is_compiling():
        yield
        return
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


def refuse_unknown_memory(where, kwargs):
    """Refuses misspelt names of the memory, which would lose a conversation; other unknown words are ignored."""
    for name, value in kwargs.items():
        is_memory = isinstance(value, STMCache) or type(value).__name__ == "STMCache"
        if is_memory or any(part in name.lower() for part in ("stm", "smt", "mem", "write", "read_")):
            raise TypeError(
                f"{where} got an unexpected keyword argument {name!r}: the memory to read is stm_cache, and the masks "
                "of a forward are memory_mask, write_mask and read_mask."
            )


@auto_docstring
class RxTForCausalLM(RxTPreTrainedModel, RxTGenerationMixin, RxTCausalEpisodeMixin):
    """
    A Reactive Transformer with a language-model head. `AutoModel` and `AutoModelForCausalLM` both load this class,
    since the memory belongs to the model and `generate` to the memory.

    Libraries that take the second dimension for the tokens work with single turns only. TRL's `SFTTrainer` calls the
    decoder itself and shifts that dimension: it would silently learn each turn of an episode as the answer to the turn
    before, so train episodes with `Trainer`. PEFT's prompt, prefix and P-tuning put their tokens into that dimension
    and fail on episodes: use LoRA.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init_subclass__(cls, **kwargs):
        # a subclass, such as FSDP2 makes of the model, has another name
        super().__init_subclass__(**kwargs)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"rxt/{cls.__name__}"] = cls.__name__

    def __init__(self, config: RxTConfig):
        super().__init__(config)
        self.model = RxTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        # fields of this model alone (`update_memory`) are left out where a file says that it was made from a config
        self.generation_config._from_model_config = False
        self.post_init()

    def __setattr__(self, name, value):
        if name == "model" and isinstance(value, nn.Module) and not hasattr(value, "initial_states"):
            raise ValueError(
                f"{type(value).__name__} cannot take the place of the model: the initial memory, which is read "
                "outside of a forward, is no target of an adapter (target_parameters); train the parameter itself."
            )
        super().__setattr__(name, value)

    def memory_fingerprint(self) -> str:
        """
        Names the weights that a memory belongs to: the weights in effect, active adapters included, by what they write
        into a fixed memory, and where there are no adapters by a hash of all weights beside it. Two of them are
        compared with [`fingerprints_match`]: an adapter that is not active or has not been trained yet, the merge of
        an active one, another dtype or device change nothing; other weights of the decoder alone do not either, as
        they write the same. Quantised weights match those that write the same but for the rounding of their dtype.

        It is computed once for the weights as they are, and again when they have changed.

        Raises: `ValueError` if weights are offloaded to where they cannot be read.
        """
        return memory_fingerprint(self.model)

    def init_stm(self, batch_size: int = 1, *, generator: torch.Generator | None = None) -> STMCache:
        """
        The memory before the first interaction.

        Args:
            batch_size (`int`): number of conversations.
            generator (`torch.Generator`, *optional*): makes `memory_init="random"` reproducible.
        """
        states = self.model.initial_states(batch_size, generator).clone()
        return STMCache(states, turns=0, fingerprint=self.memory_fingerprint())

    def update_memory(
        self,
        stm_cache: STMCache | torch.Tensor | None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        layer_inputs: list[torch.Tensor] | None = None,
    ) -> STMCache:
        r"""
        Writes one finished interaction, query and answer with their control tokens, into the memory:
        `STM_t = MemoryAttention(STM_{t-1}, MemoryEncoder([X_t ; Y_t]))`, arXiv 2510.03561.

        Args:
            stm_cache ([`STMCache`] or `torch.Tensor`, *optional*): the memory of the turns before; it is not changed.
            input_ids (`torch.LongTensor` of shape `(batch_size, tokens)`): the interaction.
            attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): 0 at padding, on any side.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, tokens, hidden_size)`): in place of `input_ids`.
            layer_inputs (`list[torch.Tensor]` of shape `(batch_size, tokens, hidden_size)`, *optional*): with
                `memory_encoding="decoder_in_passing"`, the inputs of the memory layers as the turn computed them, but
                for its last token: then nothing is computed again.

        Returns: a new [`STMCache`] in the dtype of the old one. A row without a token keeps its memory bit-identical.

        Raises: `ValueError` for shapes that do not fit, `StateError` if the new memory is not finite.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} does not fit an interaction of shape "
                f"{tuple(embeds.shape[:2])}."
            )
        warn_beyond_positions(self.config, embeds.shape[1])
        old = self.init_stm(embeds.shape[0]) if stm_cache is None else stm_cache
        old = as_stm_cache(old, batch_size=embeds.shape[0], config=self.config)
        if layer_inputs is None:
            states = self.model.write(old.states, embeds, attention_mask)
        else:
            if attention_mask is None:
                attention_mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            states = self.model.write_layer_inputs(old.states, layer_inputs, attention_mask)
        if not is_finite(states):
            raise StateError("The memory update produced values that are not finite; the old memory is unchanged.")
        written = 1 if attention_mask is None else attention_mask.any(-1).to(old.turns)
        return old.replace(states, turns=old.turns + written)

    @torch.no_grad()
    def replay(self, stm_cache: STMCache | torch.Tensor | None, interactions: Sequence[Sequence[int]]) -> STMCache:
        r"""
        Writes many finished interactions of one conversation, in order: the memory that a loop of `update_memory`
        gives, but for rounding. They are encoded in batches, and only the writes are one after the other.

        Args:
            stm_cache ([`STMCache`] or `torch.Tensor` with one row, *optional*): the memory before; it is not changed.
            interactions (`Sequence[Sequence[int]]`): token ids of each, with their control tokens.

        Returns: a new [`STMCache`] in the dtype of the old one.

        Raises: `ValueError` for a memory that does not fit and an interaction without a token, `StateError` if the new
        memory is not finite.
        """
        old = as_stm_cache(self.init_stm(1) if stm_cache is None else stm_cache, batch_size=1, config=self.config)
        if not all(len(token_ids) for token_ids in interactions):
            raise ValueError("replay got an interaction without a token: leave it out.")
        states = old.states
        # enough rows to fill the matrices, and few enough to keep the encoded states small
        for start in range(0, len(interactions), 32):
            rows = [
                torch.tensor(list(token_ids), device=self.device) for token_ids in interactions[start : start + 32]
            ]
            input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).unsqueeze(0)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).unsqueeze(0)
            _, states = self.model.read_states(self.model.embed_tokens(input_ids), mask, mask, states)
        if not is_finite(states):
            raise StateError("The replay produced values that are not finite; the old memory is unchanged.")
        return old.replace(states.clone() if states is old.states else states, turns=old.turns + len(interactions))

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        stm_cache: STMCache | torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        write_mask: torch.Tensor | None = None,
        read_mask: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RxTCausalLMOutputWithPast:
        r"""
        One turn, or an episode.

        In training, of an episode with `labels` only the turns that hold one are decoded, and `logits` is `None`: loss
        and gradient are those of decoding all. With gradient checkpointing each turn is recomputed as a whole, and
        between turns only the memory is kept. The exceptions decode all turns and recompute layer by layer: the
        routers' loss, which is over all tokens, and `torch.compile`, which needs one shape.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, tokens)`): one interaction, or its part so far. Of
                shape `(batch_size, turns, tokens)` it is an episode: each turn is read under the memory written from
                the turns before it, the loss is one, and gradients flow through the memory.
            attention_mask (`torch.Tensor` of the same shape, *optional*): 0 at padding.
            labels (`torch.LongTensor` of the same shape, *optional*): -100 where no loss is taken.
            stm_cache ([`STMCache`] or `torch.Tensor`, *optional*): the memory to read; by default the initial one.
            cache (`EncoderDecoderCache`, *optional*): keys and values of this interaction so far, and those of the
                memory.
            memory_mask (`torch.Tensor` of shape `(batch_size, slots)`, *optional*): see [`RxTModel`]; of one turn.
            write_mask (`torch.Tensor` of shape `(batch_size, turns)`, *optional*): 0 for the turns of an episode that
                are read under the memory and not written into it.
            read_mask (`torch.Tensor` of shape `(batch_size, turns)`, *optional*): 0 for the turns of an episode that
                are written and not decoded. The logits are then of shape `(turns read, tokens, vocab_size)`.

        Returns: [`RxTCausalLMOutputWithPast`]

        Raises: `ValueError` for shapes and arguments that do not fit together, `TypeError` for a misspelt memory.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> import rxt_hf

        >>> model = AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO)
        >>> tokenizer = AutoTokenizer.from_pretrained(rxt_hf.DEMO)
        >>> inputs = tokenizer.apply_chat_template(
        ...     [{"role": "user", "content": "My dog is called Rex."}],
        ...     add_generation_prompt=True, return_tensors="pt", return_dict=True,
        ... )
        >>> out = model.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
        >>> out.stm_cache.turns
        tensor([1])

        ```"""
        refuse_unknown_memory(f"{type(self).__name__}.forward", kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        num_items_in_batch = kwargs.get("num_items_in_batch")
        # CODEPATH: only a mixture of experts, such as RxT-Beta, has a coefficient other than 0
        if output_router_logits and self.config.router_aux_loss_coef:
            refuse_labels_taken_away(labels, num_items_in_batch, "the routers' loss")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "cache": cache,
            "stm_cache": stm_cache,
            "memory_mask": memory_mask,
            "write_mask": write_mask,
            "read_mask": read_mask,
            "output_router_logits": output_router_logits,
        }
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if tokens.dim() == 3:
            check_mask_shape(attention_mask, tokens.unsqueeze(-1), None)
            return RxTCausalLMOutputWithPast(**self.episode_fields(inputs, labels, logits_to_keep, **kwargs))
        outputs = self.model(position_ids=position_ids, use_cache=use_cache, **inputs, **kwargs)
        logits = project(self.lm_head, slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep), False)
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_router_logits and outputs.router_logits:
            # a mask for cached decoding covers the past tokens too
            mask = torch.ones_like(tokens) if attention_mask is None else attention_mask[:, -tokens.shape[1] :]
            aux_loss = self.router_loss(outputs.router_logits, mask, labels, num_items_in_batch)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return RxTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            router_logits=outputs.router_logits,
            aux_loss=aux_loss,
            last_hidden_state=outputs.last_hidden_state,
            stm_cache=outputs.stm_cache,
        )

    def router_loss(self, router_logits, mask, labels=None, num_items_in_batch=None):
        """The experts' load-balancing loss of turns or episodes; `mask`, of their shape, is 0 at padding."""
        weights = mask.flatten(1)
        losses = load_balancing_losses(router_logits, self.config.num_experts_per_tok, weights)
        return (losses * row_shares(weights.sum(1), labels, num_items_in_batch).to(losses)).sum()


# Trainer looks by the class's name whether the labels that it smooths are to be shifted
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rxt"] = RxTForCausalLM.__name__

__all__ = ["RxTForCausalLM", "RxTModel", "RxTPreTrainedModel"]
