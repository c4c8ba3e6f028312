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
from transformers.modeling_utils import slice_logits_to_keep

from .cache_rxt import STMCache
from .layers_rxt import project


class RxTEpisodeMixin:
    """The part of [`RxTModel`] that handles episodes."""

    # a setting of training, as gradient_checkpointing is, see RxTForCausalLM.set_bptt_turns
    bptt_turns: int | None = None

    def read_episode(
        self: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stm_cache: STMCache | torch.Tensor | None = None,
        write_mask: torch.Tensor | None = None,
        read_mask: torch.Tensor | None = None,
        cache: Any = None,
        memory_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, STMCache]:
        """
        Reads an episode turn by turn, each turn under the memory written from the turns before it.

        `write_mask` and `read_mask` of (batch_size, turns) are 0 for turns that are not written or not decoded.

        Returns: hidden states of (batch_size, turns, tokens, hidden_size), or with `read_mask` of (turns read, tokens,
        hidden_size); and the memory after the last turn.

        Raises: `ValueError` for a cache or a memory mask, which belong to one turn.
        """
        refuse_one_turns(cache, memory_mask)
        states, turns, fingerprint = self._read(stm_cache, inputs_embeds.shape[0])
        # all turns after the last written one read the same; processes that share parameters write equally often
        last = inputs_embeds.shape[1]
        if write_mask is None:
            write_mask = attention_mask
        else:
            if not is_sharded(self):
                last = max([1, *(write_mask.any(0).nonzero().flatten() + 1).tolist()])
            write_mask = write_mask.unsqueeze(-1).expand(inputs_embeds.shape[:-1])
            write_mask = write_mask if attention_mask is None else write_mask * attention_mask
        masks = (None if mask is None else mask[:, :last] for mask in (attention_mask, write_mask))
        read_states, states = self.read_states(inputs_embeds[:, :last], *masks, states)
        if last < inputs_embeds.shape[1]:
            rest = states.unsqueeze(1).expand(-1, inputs_embeds.shape[1] - last, -1, -1, -1)
            read_states = torch.cat([read_states, rest], dim=1)
        written = inputs_embeds.shape[1] if write_mask is None else write_mask.any(-1).sum(-1)
        stm_cache = STMCache(states, turns=turns.to(states.device) + written, fingerprint=fingerprint)
        if read_mask is not None:
            chosen = read_mask.bool()
            mask = None if attention_mask is None else attention_mask[chosen]
            return self.decode(inputs_embeds[chosen], read_states[chosen], mask, **kwargs), stm_cache
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        hidden_states = self.decode(inputs_embeds.flatten(0, 1), read_states.flatten(0, 1), mask, **kwargs)
        return hidden_states.unflatten(0, inputs_embeds.shape[:2]), stm_cache

    def _carried(self: Any, states, turn):
        """Returns the memory that the write of a turn starts from, detached at every `bptt_turns`-th turn."""
        ends = self.bptt_turns == 0 or (self.bptt_turns and turn and turn % self.bptt_turns == 0)
        return states.detach() if ends else states

    def read_states(
        self: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        write_mask: torch.Tensor | None,
        states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Writes the turns of an episode `inputs_embeds` of (batch_size, turns, tokens, hidden_size). Returns the memory
        that each turn reads, of (batch_size, turns, num_memory_layers, num_memory_slots, hidden_size), and the final
        one. Equals a loop over turns, but all turns are encoded in one batch, unless they are encoded in passing.
        `write_mask`, of the shape of `attention_mask` (batch_size, turns, tokens), is 0 at tokens that are not
        written.
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
                width = real_width(mask)
                mask, turn_mask = (None if each is None else each[:, :width] for each in (mask, turn_mask))
                encoded = self.encode(inputs_embeds[:, turn, :width], mask, states)
            states = self._write(self._carried(states, turn), encoded, turn_mask)
        return torch.stack(read, dim=1), states


class RxTCausalEpisodeMixin:
    """The part of [`RxTForCausalLM`] that handles episodes."""

    def set_bptt_turns(self: Any, bptt_turns: int | None) -> None:
        """
        Sets how many writes gradients flow back through in training. It is a setting of this object, and not saved.

        Args:
            bptt_turns (`int`, *optional*): every `bptt_turns`-th write starts from a detached memory. `None`, as at
                the start, goes through all; with 0, interactions are also encoded without a gradient.

        Raises: `ValueError` for a negative number.
        """
        if bptt_turns is not None and bptt_turns < 0:
            raise ValueError(f"bptt_turns must not be negative, or None for all turns, got {bptt_turns}.")
        self.model.bptt_turns = bptt_turns

    def episode_fields(
        self: Any,
        inputs: dict[str, Any],
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the output fields of an episode; `inputs` are those of [`RxTModel`]."""
        tokens = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"][..., 0]
        missing = missing_turns(self, tokens)
        if missing:
            if inputs["attention_mask"] is None:
                inputs["attention_mask"] = torch.ones_like(tokens, dtype=torch.long)
            episodes = ("input_ids", "inputs_embeds", "attention_mask", "write_mask", "read_mask")
            inputs |= {name: pad_turns(inputs[name], missing) for name in episodes}
            labels = pad_turns(labels, missing, -100)
        if labels is not None and num_items_in_batch is None:
            num_items_in_batch = (labels[..., 1:] != -100).sum().clamp(min=1)
        if inputs["output_router_logits"] and inputs["read_mask"] is not None:
            raise ValueError("read_mask and output_router_logits exclude each other: experts see all turns of a row.")
        decodes_all = inputs["output_router_logits"] or torch.compiler.is_compiling()
        if labels is not None and self.training and not decodes_all:
            return self._trained_episode(inputs, labels, num_items_in_batch, **kwargs)
        outputs = self.model(**inputs, **kwargs)
        hidden_states, read_mask = outputs.last_hidden_state, inputs["read_mask"]
        # the last tokens of every turn
        logits = project(self.lm_head, slice_logits_to_keep(hidden_states.flatten(0, -3), logits_to_keep), False)
        logits = logits.unflatten(0, hidden_states.shape[:-2])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels if read_mask is None else labels[read_mask.bool()],
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        if inputs["output_router_logits"] and outputs.router_logits:
            mask = inputs["attention_mask"]
            mask = torch.ones(hidden_states.shape[:-1], device=hidden_states.device) if mask is None else mask
            aux_loss = self.router_loss(outputs.router_logits, mask, labels, num_items_in_batch)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        if missing and read_mask is None:
            logits, hidden_states = logits[:, :-missing], hidden_states[:, :-missing]
        return dict(outputs) | {
            "loss": loss,
            "logits": logits,
            "aux_loss": aux_loss,
            "last_hidden_state": hidden_states,
        }

    def _trained_episode(self: Any, inputs, labels, num_items_in_batch, **kwargs):
        """Returns loss and memory of an episode. Only turns with a label are decoded, and there are no logits."""
        is_read = (labels[..., 1:] != -100).any(-1)
        if inputs["read_mask"] is not None:
            is_read &= inputs["read_mask"].bool()
        # a batch without a label has a loss of zero, and a graph: another process may wait for its gradient
        is_read[0, 0] |= ~is_read.any()
        labels = labels.masked_fill(~is_read[..., None], -100)
        if self.model.gradient_checkpointing:
            return self._recomputed_episode(inputs, labels, is_read, num_items_in_batch, **kwargs)
        outputs = self.model(**inputs | {"read_mask": is_read}, **kwargs)
        loss = self._labelled_loss(outputs.last_hidden_state, labels[is_read], num_items_in_batch, **kwargs)
        return dict(outputs) | {"loss": loss}

    def _labelled_loss(self: Any, hidden_states, labels, num_items_in_batch, **kwargs):
        """Returns the loss of turns of (rows, tokens); the head is computed only where the next token has a label."""
        targets = labels[:, 1:]
        is_target = targets != -100
        return self.loss_function(
            logits=project(self.lm_head, hidden_states[:, :-1][is_target].unsqueeze(0), False),
            labels=None,
            shift_labels=targets[is_target].unsqueeze(0),
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )

    def _recomputed_episode(self: Any, inputs, labels, is_read, num_items_in_batch, **kwargs):
        """
        Returns the same with each turn recomputed in the backward pass. Only the memory is kept between turns, so peak
        use hardly grows with the number of turns.
        """
        refuse_one_turns(inputs["cache"], inputs["memory_mask"])
        embeds = inputs["inputs_embeds"]
        embeds = self.model.embed(inputs["input_ids"]) if embeds is None else embeds
        masks = torch.ones_like(labels) if inputs["attention_mask"] is None else inputs["attention_mask"]
        written = masks if inputs["write_mask"] is None else masks * inputs["write_mask"].unsqueeze(-1)
        states, turns, fingerprint = self.model._read(inputs["stm_cache"], len(embeds))

        def turn_loss(index, states, embeds, mask, written, labels, is_read):
            # every process calls the layers as often as any other: a turn without labels decodes one row for nothing
            is_read = is_read | (~is_read.any() & (torch.arange(len(is_read), device=is_read.device) == 0))
            with whole_layers(self.model):
                hidden_states = self.model.decode(embeds[is_read], states[is_read], mask[is_read], **kwargs)
                loss = self._labelled_loss(hidden_states, labels[is_read], num_items_in_batch, **kwargs)
                states = self.model.write(self.model._carried(states, index), embeds, written)
            return loss, states

        loss: Any = 0.0
        # one unbind: its gradient is one stack, where indexing would make a full-sized gradient for every turn
        by_turn = zip(*(each.unbind(1) for each in (embeds, masks, written, labels, is_read)), strict=True)
        for index, turn in enumerate(by_turn):
            turn_value, states = self.model._gradient_checkpointing_func(turn_loss, index, states, *turn)
            loss = loss + turn_value
        turns = turns.to(states.device) + written.any(-1).sum(-1)
        return {"loss": loss, "stm_cache": STMCache(states, turns=turns, fingerprint=fingerprint)}


def refuse_one_turns(cache, memory_mask):
    """Raises `ValueError` for arguments that belong to one turn and have no place in an episode."""
    if cache is not None:
        raise ValueError(
            "An episode of (batch, turns, tokens) keeps no cache of keys and values, nor the prefixes that PEFT puts "
            "there; pass one turn."
        )
    if memory_mask is not None:
        raise ValueError("memory_mask is for one turn under a given memory; an episode reads what it writes.")


def by_turn(encoded, turns):
    """Splits encoded interactions of (batch_size * turns) rows, by layer, into those of each turn."""
    split = [[part.unflatten(0, (-1, turns)).unbind(1) for part in layer] for layer in encoded]
    return [[tuple(part[turn] for part in layer) for layer in split] for turn in range(turns)]


def real_width(mask: torch.Tensor | None) -> int | None:
    """
    Returns how many columns of a mask of (batch_size, tokens) hold all its real tokens, at least one; None for no
    mask, and where shapes must not follow from data. Most turns are far shorter than the longest of an episode.
    """
    if mask is None or torch.compiler.is_compiling():
        return None
    return int((mask.bool().any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max().clamp(min=1))


@contextlib.contextmanager
def whole_layers(module: nn.Module):
    """Disables per-layer checkpointing while a whole turn is recomputed; each layer would run twice."""
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    settings = [layer.gradient_checkpointing for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, setting in zip(layers, settings, strict=True):
            layer.gradient_checkpointing = setting


def is_sharded(module: nn.Module) -> bool:
    """Returns whether each process holds a part of every parameter (FSDP2, ZeRO-3), gathered before its use."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return any(hasattr(part, "full_tensor") or hasattr(part, "ds_id") for part in module.parameters())


def missing_turns(module: nn.Module, episode: torch.Tensor) -> int:
    """
    Returns how many turns this rank's episode of (batch_size, turns, ...) lacks compared with the longest of all
    ranks. Ranks that gather parameters together must call every layer equally often.
    """
    if not is_sharded(module):
        return 0
    distributed = torch.distributed
    most = torch.tensor(episode.shape[1], device=episode.device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most) - episode.shape[1]


def pad_turns(episode: torch.Tensor | None, missing: int, value: int = 0) -> torch.Tensor | None:
    """Pads `episode` of (batch_size, turns, ...) with `missing` extra turns."""
    if episode is None or not missing:
        return episode
    return torch.cat([episode, episode.new_full((len(episode), missing, *episode.shape[2:]), value)], dim=1)


__all__ = ["RxTCausalEpisodeMixin", "RxTEpisodeMixin", "by_turn", "missing_turns", "pad_turns"]
