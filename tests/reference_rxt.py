# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
The whole RxT in float64 and in plain torch, one equation of spec.md (sections 2 to 6, and 11) after the other.

Nothing here is fast. A row is cut down to its unmasked tokens before anything is computed, so padding cannot have an
effect by construction; heads and experts are loops. `Reference` uses nothing of rxt_hf.
"""

import math

import torch
from torch import Tensor


def softmax(scores: Tensor) -> Tensor:
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turns the pair (x[j], x[j + d/2]) of the token at position p by the angle p * base^(-2j/d)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    real, imaginary = x[:, :half], x[:, half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: x * (x > 0),
}
# role of an attention -> prefix of its two head counts in the config
HEAD_COUNTS = {
    "self": "",
    "encoder": "memory_encoder_",
    "cross": "cross_attention_",
    "write": "memory_attention_",
    "interlayer": "interlayer_attention_",
}


class Reference:
    """
    Computes what a model with `config` and `state_dict` must compute.

    `state_dict` is converted to float64; tensors that are float64 already are taken as they are, so that gradients
    reach them. `used` collects the names that were read.
    """

    def __init__(self, config, state_dict: dict[str, Tensor]):
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in state_dict.items()}
        self.used: set[str] = set()
        memory_layers = config.memory_layers
        self.memory_layers = list(range(config.num_hidden_layers)) if memory_layers is None else list(memory_layers)

    # ---- building blocks, on one row: (tokens or slots, hidden_size)

    def weight(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = torch.einsum("...i,oi->...o", x, self.weight(f"{name}.weight"))
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self.weights else y

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight"""
        return x / ((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.weight(f"{name}.weight")

    def attention(self, name, role, x, source, *, query_positions=None, key_positions=None, visible=None, gated=False):
        """Attention of the rows of `x` over those of `source`; `visible` (queries, keys): True where one may look."""
        config, outputs = self.config, []
        heads = getattr(config, f"{HEAD_COUNTS[role]}num_attention_heads")
        key_heads = getattr(config, f"{HEAD_COUNTS[role]}num_key_value_heads")
        base = (config.rope_parameters or {}).get("rope_theta", 10000.0)
        query = self.linear(f"{name}.q_proj", x).reshape(len(x), heads, config.head_dim)
        key = self.linear(f"{name}.k_proj", source).reshape(len(source), key_heads, config.head_dim)
        value = self.linear(f"{name}.v_proj", source).reshape(len(source), key_heads, config.head_dim)
        for head in range(heads):
            shared = head // (heads // key_heads)
            q, k, v = query[:, head], key[:, shared], value[:, shared]
            if config.use_qk_norm and role in ("self", "encoder"):
                q, k = self.rms_norm(f"{name}.q_norm", q), self.rms_norm(f"{name}.k_norm", k)
            q = q if query_positions is None else rotate(q, query_positions, base)
            k = k if key_positions is None else rotate(k, key_positions, base)
            scores = q @ k.T / math.sqrt(config.head_dim)
            scores = scores if visible is None else torch.where(visible, scores, -math.inf)
            outputs.append(softmax(scores) @ v)
        output = torch.cat(outputs, dim=-1)
        output = output * sigmoid(self.linear(f"{name}.gate_proj", x)) if gated else output
        return self.linear(f"{name}.o_proj", output)

    def swiglu(self, name: str, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.config.hidden_act]
        hidden = act(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", hidden)

    def expert(self, name: str, index: int, token: Tensor) -> Tensor:
        hidden = self.weight(f"{name}.gate_up_proj")[index] @ token
        if f"{name}.gate_up_proj_bias" in self.weights:
            hidden = hidden + self.weight(f"{name}.gate_up_proj_bias")[index]
        gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
        output = self.weight(f"{name}.down_proj")[index] @ (ACTIVATIONS[self.config.hidden_act](gate) * up)
        if f"{name}.down_proj_bias" in self.weights:
            output = output + self.weight(f"{name}.down_proj_bias")[index]
        return output

    def mixture(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over all experts, then the top k, then renormalised; shared experts see every token."""
        k, s = self.config.num_experts_per_tok, self.config.num_shared_experts
        router_logits, outputs = self.linear(f"{name}.gate", x), []
        for token, p in zip(x, softmax(router_logits), strict=True):
            chosen = p.argsort(descending=True)[:k].tolist()
            total = sum(p[e] for e in chosen)
            routed = sum(p[e] / total * self.expert(f"{name}.experts", e, token) for e in chosen)
            shared = [self.swiglu(f"{name}.shared_experts.{i}", token) for i in range(s)]
            mix = softmax(self.linear(f"{name}.shared_expert_gate", token)) if s > 1 else [1.0]
            shared = sum(w * y for w, y in zip(mix, shared, strict=False))
            weighted = s > 0 and self.config.use_weighted_shared_experts
            outputs.append(k / (k + s) * routed + s / (k + s) * shared if weighted else routed + shared)
        return torch.stack(outputs), router_logits

    # ---- section 3: the decoder

    def decode_row(self, tokens: Tensor, memory: Tensor | None) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """One row without padding: hidden states after each layer, logits, router logits of each MoE layer."""
        joint = self.config.memory_reading == "joint"
        # section 11: an empty slot takes no part
        if memory is not None and (joint or self.config.memory_writing == "selection"):
            memory = memory[:, filled(memory)] if filled(memory).any() else None
        config, hiddens, routers = self.config, [], []
        positions = torch.arange(len(tokens))
        distance = positions[:, None] - positions[None, :]
        x = self.weight("model.embed_tokens.weight")[tokens]
        for i in range(config.num_hidden_layers):
            name, visible = f"model.layers.{i}", distance >= 0
            if config.sliding_window and (config.layer_types or {i: "sliding_attention"})[i] == "sliding_attention":
                visible = visible & (distance < config.sliding_window)
            n = source = self.rms_norm(f"{name}.input_layernorm", x)
            at, keys_at = positions, positions
            # the slots stand before the tokens, in one softmax with them
            if joint and memory is not None and config.memory_positions == "rank":
                at = keys_at = positions + memory.shape[1]
            if joint and memory is not None and i in self.memory_layers:
                slots = memory[self.memory_layers.index(i)]
                ranks = torch.arange(len(slots)) * (config.memory_positions == "rank")
                source, keys_at = (
                    torch.cat([self.rms_norm(f"{name}.input_layernorm", slots), n]),
                    torch.cat([ranks, at]),
                )
                visible = torch.cat([torch.ones(len(x), len(slots)).bool(), visible], dim=1)
            if i in (config.no_rope_layers or []):
                at = keys_at = None
            places = {"query_positions": at, "key_positions": keys_at, "visible": visible}
            x = x + self.attention(f"{name}.self_attn", "self", n, source, gated=config.use_gated_attention, **places)
            if i in self.memory_layers and not joint and memory is not None:
                slots = self.rms_norm(f"{name}.memory_layernorm", memory[self.memory_layers.index(i)])
                n = self.rms_norm(f"{name}.memory_cross_attn_layernorm", x)
                places = {"query_positions": positions, "gated": config.use_gated_cross_attention}
                x = x + self.attention(f"{name}.memory_cross_attn", "cross", n, slots, **places)
            n = self.rms_norm(f"{name}.post_attention_layernorm", x)
            if config.num_experts and (config.moe_layers is None or i in config.moe_layers):
                y, router_logits = self.mixture(f"{name}.mlp", n)
                routers.append(router_logits)
            else:
                y = self.swiglu(f"{name}.mlp", n)
            x = x + y
            hiddens.append(x)
        x = self.rms_norm("model.norm", x) if config.use_final_norm else x
        if config.tie_word_embeddings:
            logits = x @ self.weight("model.embed_tokens.weight").T
            logits = logits + self.weight("lm_head.bias") if config.lm_head_bias else logits
        else:
            logits = self.linear("lm_head", x)
        return hiddens, logits, routers

    def _decode(self, input_ids, states, attention_mask):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [
            self.decode_row(ids[keep], memory) if keep.any() else None
            for ids, memory, keep in zip(input_ids, states.double(), mask.bool(), strict=True)
        ]
        return rows, mask.bool()

    def decoder(self, input_ids: Tensor, states: Tensor, attention_mask: Tensor | None = None):
        """(B, T), (B, L, S, D) -> list of (B, T, D) after each layer (before the final norm), logits (B, T, V)."""
        rows, mask = self._decode(input_ids, states, attention_mask)
        hiddens = [
            spread([row and row[0][i] for row in rows], mask, self.config.hidden_size)
            for i in range(self.config.num_hidden_layers)
        ]
        return hiddens, spread([row and row[1] for row in rows], mask, self.config.vocab_size)

    def router_logits(self, input_ids: Tensor, states: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Router logits (B, T, E) of each MoE layer; zeros at padding."""
        rows, mask = self._decode(input_ids, states, attention_mask)
        count = len(next(row for row in rows if row)[2])
        return [spread([row and row[2][i] for row in rows], mask, self.config.num_experts) for i in range(count)]

    def load_balancing_loss(self, router_logits: list[Tensor], attention_mask: Tensor | None = None) -> Tensor:
        """
        Mixtral's form: the real tokens of all MoE layers are one list of n rows; f_e = (how often e is among a row's
        top k) / n, so that the f_e sum to k; p_e = mean router probability of e; loss = num_experts * sum_e f_e p_e.
        """
        experts, k = self.config.num_experts, self.config.num_experts_per_tok
        layers = [logits.reshape(-1, experts) for logits in router_logits]
        if attention_mask is not None:
            layers = [logits[attention_mask.reshape(-1).bool()] for logits in layers]
        p = softmax(torch.cat(layers).double())
        chosen = torch.stack([sum(torch.eye(experts)[e] for e in row.argsort(descending=True)[:k]) for row in p])
        return experts * (chosen.double().mean(0) * p.mean(0)).sum()

    # ---- section 4: the memory encoder

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, states: Tensor | None = None):
        """
        (B, T) -> list of (B, T, D), the residual stream after each layer, or of section 11 before each memory layer of
        the decoder, which reads `states` if it encodes in passing; zeros at padding.
        """
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        if self.config.memory_encoding != "decoder_in_passing":
            states = [None] * len(mask)
        rows = [
            self.encode_row(ids[keep], memory) if keep.any() else None
            for ids, keep, memory in zip(input_ids, mask, states, strict=True)
        ]
        layers = range(len(self.memory_layers))
        return [spread([row and row[i] for row in rows], mask, self.config.hidden_size) for i in layers]

    def encode_row(self, tokens: Tensor, memory: Tensor | None = None) -> list[Tensor]:
        if self.config.memory_encoding != "encoder":
            hiddens = self.decode_row(tokens, None if memory is None else memory.double())[0]
            inputs = [self.weight("model.embed_tokens.weight")[tokens], *hiddens]
            return [inputs[i] for i in self.memory_layers]
        x, encoded = self.weight("model.embed_tokens.weight")[tokens], []
        positions, gated = torch.arange(len(tokens)), self.config.use_gated_memory_encoder_attention
        for i in range(len(self.memory_layers)):
            name = f"model.memory_encoder.layers.{i}"
            n = self.rms_norm(f"{name}.input_layernorm", x)
            places = {"query_positions": positions, "key_positions": positions, "gated": gated}
            x = x + self.attention(f"{name}.self_attn", "encoder", n, n, **places)
            x = x + self.swiglu(f"{name}.mlp", self.rms_norm(f"{name}.post_attention_layernorm", x))
            encoded.append(x)
        return encoded

    # ---- section 5: the write

    def initial_states(self, batch_size: int) -> Tensor:
        return torch.stack([self.weight("model.initial_memory")] * batch_size)

    def update(self, states: Tensor, ed: list[Tensor], attention_mask: Tensor | None = None) -> Tensor:
        """(B, L, S, D), list of (B, T, D) -> (B, L, S, D); a row without a token keeps its memory."""
        mask = torch.ones(ed[0].shape[:2]) if attention_mask is None else attention_mask
        return torch.stack(
            [
                self.update_row(memory, [e[row][keep] for e in ed]) if keep.any() else memory
                for row, (memory, keep) in enumerate(zip(states.double(), mask.bool(), strict=True))
            ]
        )

    def update_row(self, memory: Tensor, encoded: list[Tensor]) -> Tensor:
        # section 11: the last token ends the interaction, its states are not written
        if self.config.memory_writing == "selection" or self.config.memory_encoding == "decoder_in_passing":
            encoded = [e[:-1] for e in encoded]
        if self.config.memory_writing == "selection":
            return self.select_row(memory, encoded)
        if not len(encoded[0]):
            return memory
        kind, written, top = self.config.memory_attention_type, [], "model.memory_attention"
        pre = "write" if kind == "self" else "interlayer"
        for i, (s, ed) in enumerate(zip(memory, encoded, strict=True)):
            name = f"{top}.layers.{i}"
            if kind != "simple":
                n = self.rms_norm(f"{name}.pre_layernorm", s)
                z = n if kind == "self" else self.rms_norm(f"{top}.mean_layernorm", sum(memory) / len(memory))
                source = self.gate_row(f"{name}.interlayer_gate", n, z) if kind == "self_interlayer" else z
                s = self.gate_row(f"{name}.pre_gate", s, self.attention(f"{name}.pre_attn", pre, n, source))
            q, e = self.rms_norm(f"{name}.memory_layernorm", s), self.rms_norm(f"{name}.encoded_layernorm", ed)
            update = self.attention(f"{name}.write_attn", "write", q, e, key_positions=torch.arange(len(e)))
            written.append(self.gate_row(f"{name}.write_gate", s, update))
        return torch.stack(written)

    # ---- section 11: the write as a choice

    def select_row(self, memory: Tensor, encoded: list[Tensor]) -> Tensor:
        """(L, S, D), list of (T, D) -> (L, S, D): the most salient of slots and tokens, in order, then zeros."""
        slots = memory.shape[1]
        candidates = torch.cat([memory[:, filled(memory)], torch.stack(encoded)], dim=1)
        chosen = sorted(self.salience(candidates[0]).argsort(descending=True)[:slots].tolist())
        new = torch.zeros_like(memory)
        new[:, : len(chosen)] = candidates[:, chosen]
        return new

    def salience(self, states: Tensor) -> Tensor:
        """(C, D), in the order of time -> (C,)"""
        w, a, r = (self.weight(f"model.memory_selection.{n}") for n in ("weight", "age_penalty", "repeat_penalty"))
        directions = [x / (x * x).mean().sqrt() for x in states]
        scores = []
        for i, x in enumerate(directions):
            later = directions[i + 1 :]
            repeated = any(float(x @ y) / len(x) > 0.999 for y in later)
            scores.append((w @ x - a * len(later) - r * repeated).squeeze())
        return torch.stack(scores) if scores else states.new_zeros(0)

    # ---- section 6: the residual gate

    def gate(self, prefix: str, old: Tensor, new: Tensor) -> Tensor:
        """(B, S, D), (B, S, D) -> (B, S, D)"""
        return torch.stack([self.gate_row(prefix, o, n) for o, n in zip(old.double(), new.double(), strict=True)])

    def gate_row(self, prefix: str, old: Tensor, new: Tensor) -> Tensor:
        activation = self.config.memory_gate_activation
        if activation == "none":
            return old + new
        g = self.gate_logits(prefix, old, new)
        if activation == "sigmoid":
            return (1 - sigmoid(g)) * old + sigmoid(g) * new
        return (1 - g.tanh()) * old + (1 + g.tanh()) * new

    def gate_logits(self, prefix: str, old: Tensor, new: Tensor) -> Tensor:
        config, z = self.config, old + new
        kind, granularity, status = (
            config.memory_gate_type,
            config.memory_gate_granularity,
            config.memory_gate_status,
        )
        if kind == "static":
            return self.weight(f"{prefix}.gate")
        if status == "slot":
            if kind == "elementwise":
                return self.weight(f"{prefix}.gate") * z
            slot = torch.cat([old, new], dim=-1)
            slot = slot.mean(0, keepdim=True) if granularity == "layer" else slot
            return self.linear(f"{prefix}.gate", slot) + self.weight(f"{prefix}.gate_bias")
        status_of_slot = z.mean(-1) if status == "mean" else self.linear(f"{prefix}.slot_status", z)[:, 0]
        if kind == "linear":
            return self.linear(f"{prefix}.gate", status_of_slot)[:, None]
        status_of_slot = status_of_slot.mean(0, keepdim=True) if granularity == "layer" else status_of_slot
        return self.weight(f"{prefix}.gate") * status_of_slot[:, None]

    # ---- section 1: the turn loop

    def episode_loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, states: Tensor) -> Tensor:
        """
        (B, N, T) -> mean cross-entropy over the label tokens of all turns: Y_t given STM_{t-1}, then STM_t.

        The first token of a turn has no predecessor, so its label counts nowhere.
        """
        total, count = 0.0, 0
        for t in range(input_ids.shape[1]):
            ids, mask, wanted = input_ids[:, t], attention_mask[:, t], labels[:, t]
            _, logits = self.decoder(ids, states, mask)
            for row, position in (wanted != -100).nonzero().tolist():
                if position > 0:
                    p = softmax(logits[row, position - 1])
                    total, count = total - p[wanted[row, position]].log(), count + 1
            states = self.update(states, self.encode(ids, mask, states), mask)
        return total / count

    # ---- section 8: the stages before dialogues

    def joint_losses(self, input_ids, masked_input_ids, attention_mask, labels, mlm_targets) -> tuple[Tensor, Tensor]:
        """Next-token loss under the encoder's states as memory, and masked-token loss; both means over targets."""
        next_token, masked = [], []
        for ids, noisy, mask, targets, hidden in zip(
            input_ids, masked_input_ids, attention_mask.bool(), labels, mlm_targets, strict=True
        ):
            encoded = self.encode_row(noisy[mask])
            log_p = self.decode_row(ids[mask], torch.stack(encoded).detach())[1].log_softmax(-1)
            next_token += [-log_p[i, t] for i, t in enumerate(targets[mask][1:]) if t != -100]
            last = encoded[-1] / (encoded[-1].pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
            log_p = (last @ self.weight("model.embed_tokens.weight").T).log_softmax(-1)
            masked += [-log_p[i, t] for i, t in enumerate(hidden[mask]) if t != -100]
        return torch.stack(next_token).mean(), torch.stack(masked).mean()

    def memory_loss(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """1 - cosine of the written memory and (1 - w_t) * memory + w_t * turn, mean over turns, layers and slots."""
        slots, losses = self.config.num_memory_slots, []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            memory = self.initial_states(1)[0]
            for turn in range(len(ids)):
                tokens = ids[turn][mask[turn]]
                if len(tokens) == 0:
                    continue
                encoded = self.encode_row(tokens)
                written = self.update_row(memory, encoded)
                weight = 0.9 if turn == 0 else max(0.5 - 0.05 * turn, 0.1)
                for layer, states in enumerate(encoded):
                    for slot in range(slots):
                        place = min(max((slot + 0.5) * len(tokens) / slots - 0.5, 0.0), len(tokens) - 1.0)
                        low = int(place)
                        high = min(low + 1, len(tokens) - 1)
                        said = states[low] + (place - low) * (states[high] - states[low])
                        old = memory[layer, slot]
                        target = (1 - weight) * old / old.norm() + weight * said / said.norm()
                        new = written[layer, slot]
                        losses.append(1 - new @ target.detach() / (new.norm() * target.norm()))
                memory = written
        return torch.stack(losses).mean()


def filled(memory: Tensor) -> Tensor:
    """(L, S, D) -> (S,): an empty slot is all zeros, in every layer."""
    return (memory != 0).any(dim=-1).any(dim=0)


def spread(rows: list[Tensor | None], mask: Tensor, width: int) -> Tensor:
    """Puts the rows' tokens back to where `mask` had them; zeros elsewhere."""
    output = torch.zeros(*mask.shape, width, dtype=torch.float64)
    for index, row in enumerate(rows):
        if row is not None:
            output[index, mask[index]] = row
    return output


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills every parameter with asymmetric values of a scale that keeps activations O(1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 0.5 + torch.rand(parameter.shape, generator=generator)
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif name.endswith("_penalty"):
                # such that neither of the two decides alone
                noise = 0.2 + noise.abs()
            elif not name.endswith(("initial_memory", "_gate.gate", "memory_selection.weight")):
                noise = noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(noise)
    return model


def random_model(config, seed: int = 0) -> torch.nn.Module:
    """An `RxTForCausalLM` in eval mode in which every parameter is random."""
    from rxt_hf.modeling_rxt import RxTForCausalLM

    return randomize(RxTForCausalLM(config), seed).eval()
