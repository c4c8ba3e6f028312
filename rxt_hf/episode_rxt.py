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
"""Many turns at once: the episodes of (batch_size, turns, tokens) that training and evaluation read."""

import contextlib
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_rxt import STMCache


class RxTEpisodeMixin:
    """What [`RxTModel`] does with an episode."""

    def read_episode(
        self: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stm_cache: STMCache | torch.Tensor | None = None,
        write_mask: torch.Tensor | None = None,
        cache: Any = None,
        memory_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, STMCache]:
        """
        Hidden states of (batch_size, turns, tokens, hidden_size), each turn read under the memory written from the
        turns before it, and the memory after the last. `write_mask` of (batch_size, turns) is 0 for turns that are
        not written. Raises `ValueError` for a cache or a memory mask, which belong to one turn.
        """
        if cache is not None:
            raise ValueError("An episode of (batch, turns, tokens) keeps no cache of keys and values; pass one turn.")
        if memory_mask is not None:
            raise ValueError("memory_mask is for one turn under a given memory; an episode reads what it writes.")
        states, turns, fingerprint = self._read(stm_cache, inputs_embeds.shape[0])
        if write_mask is None:
            write_mask = attention_mask
        else:
            write_mask = write_mask.unsqueeze(-1).expand(inputs_embeds.shape[:-1])
            write_mask = write_mask if attention_mask is None else write_mask * attention_mask
        read_states, states = self.read_states(inputs_embeds, attention_mask, write_mask, states)
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        hidden_states = self.decode(inputs_embeds.flatten(0, 1), read_states.flatten(0, 1), mask, **kwargs)
        written = inputs_embeds.shape[1] if write_mask is None else write_mask.any(-1).sum(-1)
        stm_cache = STMCache(states, turns=turns.to(states.device) + written, fingerprint=fingerprint)
        return hidden_states.unflatten(0, inputs_embeds.shape[:2]), stm_cache

    def _carried(self: Any, states, turn):
        """What the write of that turn takes of the memory: cut off from the graph at every `bptt_turns`-th turn."""
        bptt_turns = self.config.bptt_turns
        ends = bptt_turns == 0 or (bptt_turns and turn and turn % bptt_turns == 0)
        return states.detach() if ends else states

    def read_states(
        self: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        write_mask: torch.Tensor | None,
        states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What each turn of an episode `inputs_embeds` of (batch_size, turns, tokens, hidden_size) reads, of
        (batch_size, turns, num_memory_layers, num_memory_slots, hidden_size), and the memory after the last. The same
        numbers as turn by turn: all turns are encoded at once, unless they are encoded under the memory that they
        read, and only the writes are in sequence. `write_mask`, as `attention_mask` of (batch_size, turns, tokens), is
        0 at tokens that are not written.
        """
        turns, encoded_by_turn = inputs_embeds.shape[1], None
        if self.config.memory_encoding != "decoder_in_passing":
            flat_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
            encoded_by_turn = by_turn(self.encode(inputs_embeds.flatten(0, 1), flat_mask), turns)
        read = []
        for turn in range(turns):
            read.append(states)
            turn_mask = None if write_mask is None else write_mask[:, turn]
            if encoded_by_turn is not None:
                encoded = encoded_by_turn[turn]
            else:
                mask = None if attention_mask is None else attention_mask[:, turn]
                encoded = self.encode(inputs_embeds[:, turn], mask, states)
            states = self._write(self._carried(states, turn), encoded, turn_mask)
        return torch.stack(read, dim=1), states


class RxTEpisodeLossMixin:
    """What [`RxTForCausalLM`] does with an episode whose turns are recomputed in the backward pass."""

    def recomputed_episode(
        self: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        stm_cache: STMCache | torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, STMCache]:
        """
        The episode's loss, and the memory after it, with each turn recomputed in the backward pass: between turns only
        the memory is kept, so that peak memory hardly grows with the number of turns.
        """
        states, turns, fingerprint = self.model._read(stm_cache, inputs_embeds.shape[0])
        masks = torch.ones_like(labels) if attention_mask is None else attention_mask
        if num_items_in_batch is None:
            num_items_in_batch = (labels[..., 1:] != -100).sum().clamp(min=1)

        def turn_loss(index, states, embeds, mask, turn_labels):
            with whole_layers(self.model):
                logits = self.lm_head(self.model.decode(embeds, states, mask, **kwargs))
                written = self.model.write(self.model._carried(states, index), embeds, mask)
            loss = self.loss_function(
                logits=logits,
                labels=turn_labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            return loss, written

        loss: Any = 0.0
        # one unbind: its gradient is one stack, where indexing would make a full-sized gradient for every turn
        turns_of = zip(inputs_embeds.unbind(1), masks.unbind(1), labels.unbind(1), strict=True)
        for index, turn in enumerate(turns_of):
            turn_value, states = self.model._gradient_checkpointing_func(turn_loss, index, states, *turn)
            loss = loss + turn_value
        return loss, STMCache(states, turns=turns.to(states.device) + masks.any(-1).sum(-1), fingerprint=fingerprint)


def by_turn(encoded, turns):
    """For each turn what writes it, by layer, from that of (batch_size * turns) rows."""
    split = [[part.unflatten(0, (-1, turns)).unbind(1) for part in layer] for layer in encoded]
    return [[tuple(part[turn] for part in layer) for layer in split] for turn in range(turns)]


@contextlib.contextmanager
def whole_layers(module: nn.Module):
    """For turns that are recomputed as a whole: their layers would be recomputed once more each."""
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    settings = [layer.gradient_checkpointing for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, setting in zip(layers, settings, strict=True):
            layer.gradient_checkpointing = setting


def missing_turns(module: nn.Module, episode: torch.Tensor) -> int:
    """
    How many turns fewer than on another rank an episode of (batch_size, turns, ...) has here. Ranks that each hold a
    part of every parameter (FSDP2, ZeRO-3) gather it together, so all of them must call every layer equally often.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0
    if not any(hasattr(part, "full_tensor") or hasattr(part, "ds_id") for part in module.parameters()):
        return 0
    most = torch.tensor(episode.shape[1], device=episode.device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most) - episode.shape[1]


def pad_turns(episode: torch.Tensor | None, missing: int, value: int = 0) -> torch.Tensor | None:
    """(batch_size, turns, ...) with so many turns more."""
    if episode is None or not missing:
        return episode
    return torch.cat([episode, episode.new_full((len(episode), missing, *episode.shape[2:]), value)], dim=1)


__all__ = ["RxTEpisodeLossMixin", "RxTEpisodeMixin", "by_turn", "missing_turns", "pad_turns"]
