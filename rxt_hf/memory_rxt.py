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
"""The memory of the Reactive Transformer: what encodes a finished interaction, and what writes it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from .configuration_rxt import RxTConfig
from .layers_rxt import RxTAttention, RxTMLP, RxTRMSNorm, upcast


class RxTMemoryPartsMixin:
    """Says what of a model belongs to its memory: freezing, LoRA and conversion ask here, and match no names."""

    def memory_modules(self: Any) -> dict[str, nn.Module]:
        """Returns the modules that read the memory, encode for it and write it, by name; of nested ones the outer."""
        return {name: part for name, part in self._memory_parts().items() if isinstance(part, nn.Module)}

    def memory_parameters(self: Any) -> dict[str, nn.Parameter]:
        """Returns the parameters of [`memory_modules`] and the initial memory, by name."""
        parts = self._memory_parts()
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name in parts or any(name.startswith(f"{part}.") for part in parts)
        }

    def _memory_parts(self: Any) -> dict[str, nn.Module | nn.Parameter]:
        return {
            f"{name}.{part}".removeprefix("."): getattr(module, part)
            for name, module in self.named_modules()
            for part in getattr(module, "memory_parts", ())
            if getattr(module, part, None) is not None
        }


class RxTMemoryEncoderLayer(GradientCheckpointingLayer):
    """Bidirectional self-attention and feed-forward."""

    def __init__(self, config: RxTConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = RxTAttention(
            config,
            layer_idx,
            "memory_encoder_",
            gated=config.use_gated_memory_encoder_attention,
            use_qk_norm=config.use_qk_norm,
        )
        self.post_attention_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = RxTMLP(
            config.hidden_size,
            config.memory_encoder_intermediate_size,
            config.hidden_act,
            config.mlp_bias,
            in_memory=True,
        )

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
        update, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, position_embeddings=position_embeddings
        )
        hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RxTMemoryEncoder(nn.Module):
    """Encodes a finished interaction: one residual stream for each memory layer, without a final norm."""

    def __init__(self, config: RxTConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            [RxTMemoryEncoderLayer(config, layer_idx) for layer_idx in range(config.num_memory_layers)]
        )

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> list[torch.Tensor]:
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        hidden_states, encoded_states = inputs_embeds, []
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, position_embeddings)
            encoded_states.append(hidden_states)
        return encoded_states


class RxTGateLinear(nn.Linear):
    """The linear layer of a residual gate over the slots' statuses: its bias starts as [`RxTResidualGate`] says."""


class RxTResidualGate(nn.Module):
    r"""
    Blends the memory with its update (arXiv 2510.03561, residual gates), in float32 at least:

        sigmoid   (1 - sigmoid(g)) * old + sigmoid(g) * new
        tanh      (1 - tanh(g)) * old + (1 + tanh(g)) * new
        none      old + new

    The logits `g` are a parameter (`memory_gate_type="static"`), a parameter times a status (`"elementwise"`), or a
    linear map of a status plus a bias (`"linear"`), one for each layer, slot or element (`memory_gate_granularity`).
    The status of a slot (`memory_gate_status`) is the mean of `old + new`, a learned projection of `old + new`, or the
    slot itself: both `old` and `new` for `"linear"`, their sum for `"elementwise"`.

    Parameters and biases that belong to a slot start spread over `memory_gate_init - 2` to `memory_gate_init + 2`.
    Otherwise the write would be the same map for all slots, and would pull them together into one.
    """

    def __init__(self, config: RxTConfig):
        super().__init__()
        self.gate_type = config.memory_gate_type
        self.activation = config.memory_gate_activation
        self.status = config.memory_gate_status
        self.granularity = config.memory_gate_granularity
        self.gate = self.gate_bias = self.slot_status = None
        if self.activation == "none":
            return
        slots, width = config.num_memory_slots, config.hidden_size
        shape = {"layer": (1,), "slot": (slots, 1), "element": (slots, width)}[self.granularity]
        if self.gate_type != "linear":
            self.gate = nn.Parameter(torch.empty(shape))
        elif self.status == "slot":
            self.gate = nn.Linear(2 * width, shape[-1], bias=False)
            self.gate_bias = nn.Parameter(torch.empty(shape))
        else:
            self.gate = RxTGateLinear(slots, shape[0])
        if self.gate_type != "static" and self.status == "linear":
            self.slot_status = nn.Linear(width, 1)

    def logits(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Gate logits, which broadcast to (batch_size, num_memory_slots, hidden_size)."""
        if self.gate_type == "static":
            return self.gate
        old = old.to(new.dtype)
        if self.gate_type == "linear" and self.status == "slot":
            slots = torch.cat([old, new], dim=-1)
            slots = slots.mean(dim=1, keepdim=True) if self.granularity == "layer" else slots
            return self.gate(slots) + self.gate_bias
        status = old + new
        if self.status != "slot":
            status = status.mean(-1, keepdim=True) if self.status == "mean" else self.slot_status(status)
        if self.gate_type == "linear":
            return self.gate(status.squeeze(-1)).unsqueeze(-1)
        return self.gate * (status.mean(dim=1, keepdim=True) if self.granularity == "layer" else status)

    def forward(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.activation == "none":
            return (upcast(old) + upcast(new)).to(old.dtype)
        logits = upcast(self.logits(old, new))
        if self.activation == "sigmoid":
            keep, write = torch.sigmoid(-logits), torch.sigmoid(logits)
        else:
            keep, write = 1.0 - torch.tanh(logits), 1.0 + torch.tanh(logits)
        return (keep * upcast(old) + write * upcast(new)).to(old.dtype)


class RxTMemoryAttentionLayer(GradientCheckpointingLayer):
    """Writes one layer of the memory: its slots are the queries, the encoded interaction keys and values."""

    def __init__(self, config: RxTConfig, layer_idx: int):
        super().__init__()
        self.memory_attention_type = config.memory_attention_type
        if self.memory_attention_type != "simple":
            role = "memory_attention_" if self.memory_attention_type == "self" else "interlayer_attention_"
            self.pre_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.pre_attn = RxTAttention(config, layer_idx, role)
            self.pre_gate = RxTResidualGate(config)
        if self.memory_attention_type == "self_interlayer":
            self.interlayer_gate = RxTResidualGate(config)
        self.memory_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.encoded_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.write_attn = RxTAttention(config, layer_idx, "memory_attention_")
        self.write_gate = RxTResidualGate(config)

    def forward(self, memory_states, mean_memory, keys, values, attention_mask=None, varlen=None):
        if self.memory_attention_type != "simple":
            normed = self.pre_layernorm(memory_states.to(keys.dtype))
            source = mean_memory
            if self.memory_attention_type == "self":
                source = normed
            elif self.memory_attention_type == "self_interlayer":
                source = self.interlayer_gate(normed, mean_memory)
            memory_states = self.pre_gate(memory_states, self.pre_attn(normed, source)[0])
        normed = self.memory_layernorm(memory_states.to(keys.dtype))
        queries = self.write_attn.queries(normed)
        if varlen is not None:
            # one packed row: flash kernels take ragged keys by their offsets, not by a mask
            queries = queries.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)
            update, _ = self.write_attn.attend(normed, queries, keys, values, **varlen)
        else:
            update, _ = self.write_attn.attend(normed, queries, keys, values, attention_mask)
        return self.write_gate(memory_states, update)


class RxTMemoryAttention(nn.Module):
    """The write (arXiv 2510.03561): every layer of the new memory comes from the old memory of all layers."""

    def __init__(self, config: RxTConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            [RxTMemoryAttentionLayer(config, layer_idx) for layer_idx in range(config.num_memory_layers)]
        )
        self.mean_layernorm = None
        # CODEPATH: nano to mini are interlayer, synthetic self_interlayer, tiny simple
        if config.memory_attention_type in ("interlayer", "self_interlayer"):
            self.mean_layernorm = RxTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def keys_values(
        self, encoded_states: list[torch.Tensor], position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns keys (rotated by position) and values of each layer; they do not depend on the memory."""
        return [
            layer.write_attn.keys_values(layer.encoded_layernorm(encoded), position_embeddings)
            for layer, encoded in zip(self.layers, encoded_states, strict=True)
        ]

    def forward(
        self,
        memory_states: torch.Tensor,
        keys_values: list[tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor | None = None,
        varlen: dict | None = None,
    ) -> torch.Tensor:
        """Returns new states of the shape of `memory_states`, (batch_size, layers, num_memory_slots, hidden_size)."""
        mean_memory = None
        if self.mean_layernorm is not None:
            mean_memory = self.mean_layernorm(memory_states.mean(dim=1).to(keys_values[0][0].dtype))
        new_states = [
            layer(memory_states[:, index], mean_memory, keys, values, attention_mask, varlen)
            for index, (layer, (keys, values)) in enumerate(zip(self.layers, keys_values, strict=True))
        ]
        return torch.stack(new_states, dim=1)


class RxTMemorySelection(nn.Module):
    r"""
    The write as a choice (ours, no part of the paper): old slots and new tokens compete, and the `num_memory_slots`
    most salient stay, the same tokens in all layers, in the order of time. A kept slot stays bit-identical; in terms
    of the residual gate, its values are 0 and 1. Free slots are zeros, behind the filled ones.

        salience = weight . (x / rms(x)) - age_penalty * (number of later candidates)
                   - repeat_penalty * (whether a later candidate has the same state)

    where `x` is the candidate's state in the first memory layer. In the first decoder layer that is the embedding, so
    that there "the same state" is the same token. Everything follows from the states and the order of the slots, so a
    memory holds nothing else.
    """

    def __init__(self, config: RxTConfig):
        super().__init__()
        self.num_slots = config.num_memory_slots
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.age_penalty = nn.Parameter(torch.empty(1))
        self.repeat_penalty = nn.Parameter(torch.empty(1))

    def features(self, states: torch.Tensor, is_candidate: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        What the salience of `states`, (batch_size, candidates, hidden_size) in the first memory layer, is made of: the
        normalised states, how many later candidates there are, and whether one of these has the same state.
        """
        normed = F.rms_norm(upcast(states), states.shape[-1:], eps=1e-6)
        later = is_candidate.flip(-1).cumsum(-1).flip(-1) - is_candidate.long()
        # a choice must not hang on the rounding of a lower precision
        with maybe_autocast(device_type=states.device.type, enabled=False):
            same = (normed @ normed.transpose(1, 2)) > 0.999 * states.shape[-1]
        return normed, later, (same & is_candidate[:, None]).triu(diagonal=1).any(dim=-1)

    def salience(self, states: torch.Tensor, is_candidate: torch.Tensor) -> torch.Tensor:
        """Returns the salience of each candidate, (batch_size, candidates), in at least float32; -inf at gaps."""
        normed, later, is_repeated = self.features(states, is_candidate)
        weight, age_penalty, repeat_penalty = map(upcast, (self.weight, self.age_penalty, self.repeat_penalty))
        # as above
        with maybe_autocast(device_type=states.device.type, enabled=False):
            scores = normed @ weight - age_penalty * later - repeat_penalty * is_repeated
        return scores.masked_fill(~is_candidate, -torch.inf)

    def forward(self, states: torch.Tensor, encoded: list[torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
        """
        The memory after one more interaction.

        Args:
            states (`torch.Tensor` of shape `(batch_size, layers, num_memory_slots, hidden_size)`): the memory so far.
            encoded (`list[torch.Tensor]` of shape `(batch_size, tokens, hidden_size)`): states of its tokens, by
            layer.
            attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`): True at what may be kept.
        """
        candidates = torch.cat([states, torch.stack(encoded, dim=1).to(states.dtype)], dim=2)
        is_candidate = torch.cat([filled_slots(states), attention_mask], dim=1)
        with torch.no_grad():
            scores = self.salience(candidates[:, 0], is_candidate)
            kept, length = scores.topk(self.num_slots, dim=-1).indices, scores.shape[1]
            # in the order of time; what is no candidate goes behind all that is, and is cleared
            kept = (kept + length * ~is_candidate.gather(1, kept)).sort(dim=-1).values
            is_kept, kept = kept < length, kept % length
        index = kept[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return candidates.gather(2, index).masked_fill(~is_kept[:, None, :, None], 0)


def filled_slots(states: torch.Tensor) -> torch.Tensor:
    """True for each slot of (batch_size, layers, slots, hidden_size) that is not all zeros: (batch_size, slots)."""
    return states.ne(0).any(dim=-1).any(dim=1)


def without_last_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Returns True at all real tokens of (batch_size, tokens) except the last of each row. That token only ends the
    interaction, and `generate` never computes its states.
    """
    attention_mask = attention_mask.bool()
    return attention_mask & (attention_mask.flip(-1).cumsum(-1).flip(-1) > 1)


def packed(keys_values, attention_mask, slots):
    """Packs keys and values without padding into one row, and returns the offsets of the batch's rows in it."""
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    varlen = {
        "cu_seq_lens_q": torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device) * slots,
        "cu_seq_lens_k": F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        "max_length_q": slots,
        "max_length_k": int(lengths.max()),
    }
    keys_values = [
        tuple(states.transpose(1, 2)[attention_mask].transpose(0, 1).unsqueeze(0) for states in pair)
        for pair in keys_values
    ]
    return keys_values, varlen
