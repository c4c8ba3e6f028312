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
"""What the decoder and the memory are both made of: norm, rotary embedding, attention, feed-forward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .configuration_rxt import RxTConfig

logger = logging.get_logger(__name__)


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """Widens half precisions to float32; float64 stays."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def suits_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Returns whether oneDNN is to compute a product of float32 matrices on a CPU. There `F.linear` calls MKL, which on
    processors of other makers than its own is half as fast; small products cost less without the detour.
    """
    return (
        states.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and states.numel() * len(weight) > 2**21
        and type(weight) in (nn.Parameter, torch.Tensor)
        and type(states) is torch.Tensor
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"))
        and not torch._C._are_functorch_transforms_active()
    )


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns what `F.linear` does, but for rounding, by the faster kernel."""
    if not suits_onednn(states, weight):
        return F.linear(states, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (states, weight, bias)):
        return OneDNNLinear.apply(states, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """`F.linear` by oneDNN, whose own operator has no gradient."""

    @staticmethod
    def forward(ctx, states, weight, bias):
        ctx.save_for_backward(states, weight)
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.t()) if of_states else None,
            linear(rows.t(), states.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def project(module: nn.Module, states: torch.Tensor, in_memory: bool) -> torch.Tensor:
    """
    Returns `module(states)`, of linear layers in training and `in_memory` by the faster kernel. A decoder keeps the
    kernel of other language models otherwise: converted from one, it computes the same bits.
    """
    # a decoder that answers pays for no more than this look
    if not (in_memory or module.training) or type(module) is not nn.Linear:
        return module(states)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        return module(states)
    return linear(states, module.weight, module.bias)


class RxTRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = upcast(hidden_states)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class RxTRotaryEmbedding(nn.Module):
    """
    Computes cosine and sine of positions, (batch, tokens, head_dim) each. A forward changes nothing here, so threads
    can share one module: for RoPE types whose frequencies depend on the length ("longrope", "dynamic"), each row gets
    those of its own length.
    """

    def __init__(self, config: RxTConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.attention_scaling = self.rope_init_fn(config)[1]
        for name, frequencies in self.initial_frequencies().items():
            self.register_buffer(name, frequencies, persistent=False)

    @property
    def rope_init_fn(self) -> Callable:
        return ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)

    def initial_frequencies(self) -> dict[str, torch.Tensor]:
        """Returns the content of each buffer: the frequencies, and for "longrope" those of long interactions."""
        frequencies = {"inv_freq": self.rope_init_fn(self.config)[0]}
        if self.rope_type == "longrope":
            beyond = self.config.rope_parameters["original_max_position_embeddings"] + 1
            frequencies["long_inv_freq"] = self.rope_init_fn(self.config, seq_len=beyond)[0]
        return frequencies

    @staticmethod
    def compute_default_rope_parameters(config: RxTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `rope_theta ** (-2 j / head_dim)`, and the scaling 1 of cosine and sine."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    def frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Returns frequencies of (head_dim / 2,), or of (batch, 1, head_dim / 2) if they depend on the length."""
        if self.rope_type not in ("longrope", "dynamic"):
            return self.inv_freq
        lengths = position_ids.amax(-1, keepdim=True) + 1
        if self.rope_type == "longrope":
            longest, grown = self.config.rope_parameters["original_max_position_embeddings"], self.long_inv_freq
        else:
            longest = self.config.max_position_embeddings
            grown, _ = self.rope_init_fn(self.config, position_ids.device, seq_len=lengths)
        return torch.where(lengths > longest, grown, self.inv_freq).unsqueeze(1)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = self.frequencies(position_ids).to(device=x.device, dtype=torch.float)
        freqs = position_ids[..., None].float() * inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tables that all layers rotate by, (batch, 1, tokens, head_dim), the rotation's sign in the sine."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(1), torch.cat((-first, second), dim=-1).unsqueeze(1)


def rotate(states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates (batch, heads, tokens, head_dim) in Llama's half-split layout; equals `apply_rotary_pos_emb`."""
    cos, sin = position_embeddings
    return states * cos + states.roll(states.shape[-1] // 2, dims=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(upcast(weights), dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()
    return output, weights


def one_query_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """Attends with one query without a mask by two products; sdpa is far slower at this in bfloat16 on a CPU."""
    # three dimensions: of four, the compiler makes sums that are slower still
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    weights = torch.bmm(query.reshape(len(key), module.num_key_value_groups, -1), key.transpose(1, 2)) * scaling
    return torch.bmm(F.softmax(upcast(weights), dim=-1).to(value.dtype), value), None


class RxTZeroLinear(nn.Linear):
    """A linear layer that `_init_weights` fills with zeros."""


class RxTAttention(nn.Module):
    """
    Attention with separate steps for queries and for keys and values, so that the keys and values of a memory are
    computed once a turn and used for many queries. The head counts are those of the role whose prefix is given; fewer
    heads than `hidden_size // head_dim` are Sparse Query Attention.
    """

    is_causal = False

    def __init__(
        self,
        config: RxTConfig,
        layer_idx: int,
        role: str = "",
        *,
        gated: bool = False,
        use_qk_norm: bool = False,
        zero_init: bool = False,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.in_memory = role.startswith(("memory_", "interlayer_"))
        self.head_dim = config.head_dim
        num_heads = getattr(config, f"{role}num_attention_heads")
        num_key_value_heads = getattr(config, f"{role}num_key_value_heads")
        self.num_key_value_groups = num_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        query_size, key_value_size = num_heads * self.head_dim, num_key_value_heads * self.head_dim
        output_class = RxTZeroLinear if zero_init else nn.Linear
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = output_class(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.gate_proj = nn.Linear(config.hidden_size, query_size, bias=False) if gated else None
        self.head_gate = None
        self.q_norm = RxTRMSNorm(self.head_dim, config.rms_norm_eps) if use_qk_norm else None
        self.k_norm = RxTRMSNorm(self.head_dim, config.rms_norm_eps) if use_qk_norm else None

    def queries(self, hidden_states, position_embeddings=None):
        states = project(self.q_proj, hidden_states, self.in_memory).view(*hidden_states.shape[:-1], -1, self.head_dim)
        states = (states if self.q_norm is None else self.q_norm(states)).transpose(1, 2)
        return states if position_embeddings is None else rotate(states, position_embeddings)

    def keys_values(self, hidden_states, position_embeddings=None):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        keys = project(self.k_proj, hidden_states, self.in_memory).view(shape)
        keys = (keys if self.k_norm is None else self.k_norm(keys)).transpose(1, 2)
        keys = keys if position_embeddings is None else rotate(keys, position_embeddings)
        return keys, project(self.v_proj, hidden_states, self.in_memory).view(shape).transpose(1, 2)

    def attention_interface(self, queries, attention_mask) -> Callable:
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    def attend(self, hidden_states, queries, keys, values, attention_mask=None, **kwargs):
        """Attends with projected states; queries and the output gate come from `hidden_states`."""
        output, weights = self.attention_interface(queries, attention_mask)(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if self.gate_proj is not None:
            output = output * torch.sigmoid(project(self.gate_proj, hidden_states, self.in_memory))
        if self.head_gate is not None:
            output = output * torch.tanh(self.head_gate).repeat_interleave(self.head_dim)
        return project(self.o_proj, output, self.in_memory), weights

    def forward(self, hidden_states, key_value_states=None, attention_mask=None, position_embeddings=None):
        """Bidirectional attention over `key_value_states`, by default over `hidden_states` themselves."""
        queries = self.queries(hidden_states, position_embeddings)
        keys, values = self.keys_values(
            hidden_states if key_value_states is None else key_value_states, position_embeddings
        )
        return self.attend(hidden_states, queries, keys, values, attention_mask)


class RxTMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, bias: bool, in_memory: bool = False):
        super().__init__()
        self.in_memory = in_memory
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states):
        gate = self.act_fn(project(self.gate_proj, hidden_states, self.in_memory))
        return project(self.down_proj, gate * project(self.up_proj, hidden_states, self.in_memory), self.in_memory)


def positions_in_interaction(attention_mask, inputs_embeds, cache=None) -> torch.Tensor:
    """Returns the index of each token among the real tokens of its interaction; padding changes nothing."""
    length = inputs_embeds.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    start = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=inputs_embeds.device) + start).unsqueeze(0)


def warn_beyond_positions(config, tokens: int) -> None:
    """Warns once of an interaction of more tokens than positions, as a forward of any model takes it."""
    if tokens > config.max_position_embeddings and not torch.compiler.is_compiling():
        logger.warning_once(
            f"An interaction has {tokens} tokens, more than max_position_embeddings={config.max_position_embeddings}, "
            "which the model was not made for: shorten it or split it into several turns."
        )


def check_mask_shape(attention_mask, inputs_embeds, cache) -> None:
    """Raises `ValueError` unless a mask has one column for each token, those in the cache included."""
    if not isinstance(attention_mask, torch.Tensor) or torch.compiler.is_compiling():
        return
    expected = inputs_embeds.shape[:-1]
    if len(expected) == 2:
        if attention_mask.dim() == 4:
            return
        past = 0 if cache is None else cache.get_seq_length()
        expected = (expected[0], past + expected[1])
    if tuple(attention_mask.shape) != tuple(expected):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit an interaction of shape "
            f"{tuple(expected)}."
        )
