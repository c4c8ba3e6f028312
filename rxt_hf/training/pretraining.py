# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The losses of the stages before dialogues, and the class that has them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from ..cache_rxt import STMCache
from ..configuration_rxt import RxTConfig
from ..episode_rxt import by_turn, missing_turns, pad_turns
from ..layers_rxt import upcast
from ..losses_rxt import refuse_labels_taken_away, row_shares
from ..modeling_rxt import (
    RxTCausalLMOutputWithPast,
    RxTForCausalLM,
)


@auto_docstring
@dataclass
class RxTForPreTrainingOutput(RxTCausalLMOutputWithPast):
    r"""
    Output of [`RxTForPreTraining`]; of a memory loss, only `loss` and `stm_cache` are set.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): the sum of the stage's losses.
        logits (`torch.FloatTensor`, *optional*): the decoder's, see [`RxTCausalLMOutputWithPast`].
        cache (`EncoderDecoderCache`, *optional*): not set.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        attentions (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        router_logits (`tuple(torch.FloatTensor)`, *optional*): see [`RxTModelOutputWithPast`].
        aux_loss (`torch.FloatTensor`, *optional*): see [`RxTCausalLMOutputWithPast`].
        last_hidden_state (`torch.FloatTensor`, *optional*): what the head was given.
        stm_cache (`STMCache`, *optional*): of a memory loss, the memory after the last turn.
        mlm_loss (`torch.FloatTensor`, *optional*): the memory encoder's loss on masked tokens, without its weight, a
            mean for each row; rows count by their share of the labels.
        mlm_logits (`torch.FloatTensor` of shape `(batch_size, tokens, vocab_size)`, *optional*): its predictions.
    """

    mlm_loss: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None


def resampled(states: torch.Tensor, attention_mask: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Interpolates the real tokens of (batch_size, tokens, width), in order, to (batch_size, num_slots, width)."""
    real_first = attention_mask.long().argsort(dim=-1, descending=True, stable=True)
    last = (attention_mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    places = (torch.arange(num_slots, device=states.device) + 0.5) / num_slots * (last + 1) - 0.5
    places = places.clamp(min=0).minimum(last)
    below = places.long()
    above = (below + 1).minimum(last)
    below, above = (
        states.gather(1, real_first.gather(1, index).unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        for index in (below, above)
    )
    return torch.lerp(below, above, places.frac().unsqueeze(-1).to(states.dtype))


@auto_docstring
class RxTForPreTraining(RxTForCausalLM):
    """
    The training stages before dialogues (arXiv 2510.03561, supervised curriculum), with the weights of
    [`RxTForCausalLM`] and no others: what one saves the other loads.

    Given `masked_input_ids`, joint pre-training or fine-tuning: the memory encoder predicts the masked tokens, and the
    decoder predicts the tokens while it reads the encoder's states, detached and with noise, as if they were a memory.

    Given an episode of `(batch_size, turns, tokens)`, pre-training of the memory attention: after each turn the memory
    should point where a mix of itself and of the encoded turn points, tokens interpolated to slots.

    The losses beside the decoder's are means over each row, and rows count by their share of the labels, if there are
    any: so an optimizer step has one gradient, however it is cut into batches and processes.
    """

    def __init__(self, config: RxTConfig, *, mlm_loss_coef: float = 0.5, memory_noise_std: float = 0.2):
        r"""
        mlm_loss_coef (`float`, *optional*, defaults to 0.5):
            Weight of the memory encoder's loss on masked tokens; an argument of `from_pretrained`, too.
        memory_noise_std (`float`, *optional*, defaults to 0.2):
            Noise on the states that the decoder reads, as a share of their size; likewise.
        """
        for name, value in (("mlm_loss_coef", mlm_loss_coef), ("memory_noise_std", memory_noise_std)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        if (config.memory_encoding, config.memory_writing) != ("encoder", "attention"):
            raise ValueError(
                "RxTForPreTraining trains a memory encoder and a memory attention, which this configuration has not: "
                f"memory_encoding={config.memory_encoding!r}, memory_writing={config.memory_writing!r}."
            )
        super().__init__(config)
        self.mlm_loss_coef, self.memory_noise_std = mlm_loss_coef, memory_noise_std
        self.loss_type = "ForCausalLM"

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        masked_input_ids: torch.LongTensor | None = None,
        mlm_targets: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RxTForPreTrainingOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, tokens)` or `(batch_size, turns, tokens)`): what the
                decoder reads, or an episode to write.
            attention_mask (`torch.Tensor` of the same shape, *optional*): 0 at padding.
            labels (`torch.LongTensor` of the same shape, *optional*): the decoder's targets; -100 where no loss is
                taken. An episode has none.
            masked_input_ids (`torch.LongTensor` of shape `(batch_size, tokens)`): `input_ids` with some tokens masked.
            mlm_targets (`torch.LongTensor` of the same shape, *optional*): the masked tokens, and -100 elsewhere.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): labels in all batches of an optimizer step.

        Returns: [`RxTForPreTrainingOutput`]
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        refuse_labels_taken_away(labels, num_items_in_batch, "the losses beside the decoder's")
        if input_ids.dim() == 3:
            missing = missing_turns(self, input_ids)
            losses, stm_cache = self._memory_losses(pad_turns(input_ids, missing), pad_turns(attention_mask, missing))
            shares = row_shares(attention_mask.any(-1).sum(-1), labels, num_items_in_batch)
            return RxTForPreTrainingOutput(loss=(losses * shares).sum(), stm_cache=stm_cache)
        if masked_input_ids is None:
            raise ValueError(
                "RxTForPreTraining needs masked_input_ids beside input_ids of (batch_size, tokens), or an episode of "
                "(batch_size, turns, tokens)."
            )
        encoded_states, _ = self.model.encoded_states(self.model.embed_tokens(masked_input_ids), attention_mask)
        memory_states = torch.stack(encoded_states, dim=1).detach()
        if self.training:
            size = upcast(memory_states).pow(2).mean(-1, keepdim=True).sqrt()
            noise = torch.randn_like(memory_states) * size.to(memory_states.dtype)
            memory_states = memory_states + self.memory_noise_std * noise
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=False,
            stm_cache=memory_states,
            memory_mask=attention_mask,
            num_items_in_batch=num_items_in_batch,
            return_dict=True,
            **kwargs,
        )
        last_states = F.rms_norm(encoded_states[-1], encoded_states[-1].shape[-1:], eps=self.config.rms_norm_eps)
        mlm_logits = self.lm_head(last_states)
        mlm_loss: Any = None
        fields: dict[str, Any] = dict(output)
        loss = fields.pop("loss", None)
        if mlm_targets is not None:
            losses = F.cross_entropy(upcast(mlm_logits).flatten(0, 1), mlm_targets.flatten(), reduction="none")
            counts = mlm_targets.ne(-100).sum(-1)
            losses = losses.view_as(mlm_targets).sum(-1) / counts.clamp(min=1)
            mlm_loss = (losses * row_shares(counts, labels, num_items_in_batch)).sum()
            loss = (0.0 if loss is None else loss) + self.mlm_loss_coef * mlm_loss
        return RxTForPreTrainingOutput(loss=loss, mlm_loss=mlm_loss, mlm_logits=mlm_logits, **fields)

    def _memory_losses(self, input_ids, attention_mask):
        """Returns each row's mean of 1 - cosine(memory, target) over turns, layers and slots, and the final memory."""
        batch_size, turns, _ = input_ids.shape
        embeds, mask = self.model.embed(input_ids).flatten(0, 1), attention_mask.flatten(0, 1)
        encoded_states, position_embeddings = self.model.encoded_states(embeds, mask)
        keys_values = self.model.writable(encoded_states, position_embeddings)
        # memory and encoder differ in scale: only directions are mixed
        encoded_states = torch.stack(
            [
                F.normalize(resampled(states.detach(), mask, self.config.num_memory_slots), dim=-1)
                for states in encoded_states
            ],
            dim=1,
        ).unflatten(0, (batch_size, turns))
        active = attention_mask.any(dim=-1)
        states, loss = self.model.initial_states(batch_size), torch.zeros(batch_size, device=input_ids.device)
        for turn, turn_keys_values in enumerate(by_turn(keys_values, turns)):
            # the first turn is nearly all that there is to remember; later turns are a smaller and smaller share
            weight = 0.9 if turn == 0 else max(0.5 - 0.05 * turn, 0.1)
            target = torch.lerp(F.normalize(states.detach(), dim=-1), encoded_states[:, turn], weight)
            states = self.model._write(self.model._carried(states, turn), turn_keys_values, attention_mask[:, turn])
            distance = 1.0 - F.cosine_similarity(upcast(states), upcast(target), dim=-1)
            loss = loss + distance.mean(dim=(1, 2)) * active[:, turn]
        return loss / active.sum(-1).clamp(min=1), STMCache(states, turns=active.sum(-1))


__all__ = ["RxTForPreTraining", "RxTForPreTrainingOutput"]
