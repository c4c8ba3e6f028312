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
"""`generate` with a memory that goes in and comes out."""

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)
from transformers.utils import logging

from .cache_rxt import PendingSTMCache, StateError, STMCache, TurnCache, as_stm_cache
from .fingerprint_rxt import changes_beside_writes, weights_state

logger = logging.get_logger(__name__)

_writes_under_way: set[Future] = set()


@dataclass
class RxTGenerateOutput(GenerateDecoderOnlyOutput):
    """
    Output of [`RxTForCausalLM.generate`].

    Args:
        stm_cache ([`STMCache`]): the memory after this turn, one row for each row of `sequences`; the memory that was
            passed in if `update_memory=False`.
    """

    stm_cache: STMCache | None = None


@dataclass
class RxTGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """
    Output of [`RxTForCausalLM.generate`] with beams.

    Args:
        stm_cache ([`STMCache`]): as in [`RxTGenerateOutput`].
    """

    stm_cache: STMCache | None = None


def answer_mask(answers, generation_config, stopping_criteria=None):
    """Returns 1 at the tokens of the answers that are written: up to and including each row's first end token."""
    ends, pad = _as_list(generation_config.eos_token_id), generation_config.pad_token_id
    is_end = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype, device=answers.device))
    after_end = (is_end.cumsum(-1) - is_end.long()) > 0
    # of many rows, those that another criterion than the end token stopped are filled up with padding
    may_fill = len(answers) > 1 and (stopping_criteria or generation_config.stop_strings)
    if may_fill and pad is not None and pad not in ends:
        after_end |= (answers == pad).flip(-1).cumprod(-1).flip(-1).bool()
    return (~after_end).long()


class _RowEnds(StoppingCriteria):
    """Ends each row after as many new tokens as it has room for."""

    def __init__(self, rooms):
        self.rooms, self.start = rooms, None

    def __call__(self, input_ids, scores, **kwargs):
        # asked for the first time behind the first new token
        self.start = input_ids.shape[1] - 1 if self.start is None else self.start
        rooms = self.rooms.repeat_interleave(len(input_ids) // len(self.rooms))
        return rooms <= input_ids.shape[1] - self.start


class RxTGenerationMixin(GenerationMixin):
    """`generate` of transformers, which reads the memory and then writes the finished interaction into it."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        stm_cache: STMCache | torch.Tensor | None = None,
        update_memory: bool | Literal["async"] | None = None,
        **kwargs,
    ) -> RxTGenerateOutput | RxTGenerateBeamOutput | torch.LongTensor:
        r"""
        One turn of a conversation. Takes every argument of [`~GenerationMixin.generate`], and:

        Args:
            stm_cache ([`STMCache`] or `torch.Tensor`, *optional*): the memory of the turns before, one row for each
                row of the prompt; by default the initial one. It is not changed. Passing it also asks for the output
                object.
            update_memory (`bool` or `"async"`, *optional*, defaults to `generation_config.update_memory` or `True`):
                whether the interaction is written into the returned memory. The write starts after the last token has
                gone to the streamer. With `"async"` a thread of its own (on a GPU: a stream of its own) writes, and
                `generate` returns at once; the first use of the returned memory waits, raises the error of a write
                that failed, and sees the same numbers as with `True`: `train`, `to` and `set_attn_implementation`
                wait for writes that are under way, a model with adapters (which may be switched at any time) or with
                offloaded weights is written to at once, as with `True`, and if its weights change in place (an
                optimizer's step, `load_state_dict`) before the write has ended, the write fails with [`StateError`]:
                call `stm_cache.wait()` before such a change.

        `guidance_scale` compares the scores after the prompt with those after its last token alone, or after
        `negative_prompt_ids`, both under the given memory.

        Returns: [`RxTGenerateOutput`] (beams: [`RxTGenerateBeamOutput`]) with `stm_cache` set if `stm_cache` or
        `return_dict_in_generate=True` was given, else the sequences alone (then nothing is written). With
        `num_return_sequences` each returned sequence comes with a memory of its own.

        Raises: `ValueError` for a memory that does not fit the model or the prompt, for a prompt that leaves no
        room in `max_position_embeddings`, where every answer ends, for modes that cannot keep a memory
        (`cache_implementation="paged"`), and for `guidance_scale` with beams or candidate tokens.
        """
        if generation_config is not None and generation_config.is_assistant:
            return self._draft(inputs, generation_config, stm_cache, **kwargs)
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        update_memory = self._way_to_write(config, update_memory, kwargs.get("assistant_model"))
        ids = kwargs.get("input_ids") if inputs is None else inputs
        embeds = kwargs.get("inputs_embeds")
        prompt_mask = self._prompt_mask(ids, embeds, kwargs.get("attention_mask"), config)
        batch_size = prompt_mask.shape[0]
        returns_dict = stm_cache is not None or bool(config.return_dict_in_generate)
        if stm_cache is None:
            stm_cache = self.init_stm(batch_size) if returns_dict else self.model.initial_states(batch_size)
        stm_cache = as_stm_cache(stm_cache, batch_size=batch_size, config=self.config)
        if ids is not None or embeds is not None:
            kwargs["attention_mask"] = prompt_mask
        self._end_within_positions(config, prompt_mask, kwargs)
        if generation_config is None:
            kwargs["return_dict_in_generate"] = returns_dict
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.return_dict_in_generate = returns_dict
            if "max_new_tokens" in kwargs:
                generation_config.max_new_tokens, generation_config.max_length = kwargs.pop("max_new_tokens"), None
        in_passing = returns_dict and self._writes_in_passing(config, update_memory)
        kwargs |= {"output_hidden_states": True} if in_passing else {}
        output = super().generate(inputs, generation_config, stm_cache=stm_cache.states.detach(), **kwargs)
        if not returns_dict:
            return output

        copies = output.sequences.shape[0] // batch_size
        if copies > 1:
            stm_cache, prompt_mask = stm_cache.repeat(copies), prompt_mask.repeat_interleave(copies, dim=0)
        written, start = output.sequences, prompt_mask.shape[1]
        if embeds is not None:
            # the sequences do not hold a prompt of embeddings, but ids that were given beside them
            written, start = written[:, 0 if ids is None else ids.shape[1] :], 0
            embeds = embeds.repeat_interleave(copies, dim=0)
        mask = answer_mask(written[:, start:], config, kwargs.get("stopping_criteria"))
        mask = torch.cat([prompt_mask.to(mask), mask], dim=1)
        layer_inputs, fields = None, dict(output)
        if in_passing:
            layer_inputs = self._layer_inputs(output.hidden_states, mask.shape)
            if not config.output_hidden_states:
                del fields["hidden_states"]
        turn = (stm_cache, written, mask, embeds, layer_inputs)
        if update_memory == "async":
            stm_cache = self._write_turn_async(*turn)
        elif update_memory:
            stm_cache = self._write_turn(*turn)
        output_class = RxTGenerateOutput
        if isinstance(output, GenerateBeamDecoderOnlyOutput):
            output_class = RxTGenerateBeamOutput
        return output_class(**fields, stm_cache=stm_cache)

    def _way_to_write(self, config, update_memory, assistant_model):
        """Returns the `update_memory` that is carried out; refuses modes that would lose the memory or mix it up."""
        if config.cache_implementation == "paged":
            raise ValueError('cache_implementation="paged" would lose the memory; use "dynamic" or "static".')
        is_guided = config.guidance_scale not in (None, 1)
        if is_guided and (config.num_beams > 1 or config.prompt_lookup_num_tokens or assistant_model is not None):
            raise ValueError(
                f"guidance_scale={config.guidance_scale} follows one sequence: it works neither with num_beams > 1 "
                "nor with an assistant_model or prompt_lookup_num_tokens."
            )
        if update_memory is None:
            update_memory = getattr(config, "update_memory", True)
        if not isinstance(update_memory, bool) and update_memory != "async":
            raise ValueError(f'update_memory must be True, False or "async", got {update_memory!r}.')
        if update_memory == "async" and changes_beside_writes(self.model):
            logger.warning_once('With adapters or offloaded weights update_memory="async" writes at once, as True.')
            return True
        return update_memory

    def _prompt_mask(self, ids, embeds, attention_mask, config):
        """Returns the prompt's mask, inferred as transformers does if none is given; refuses what is not a prompt."""
        if ids is None and embeds is None:
            # the lone begin-of-sequence token that transformers starts from
            return torch.ones((1, 1), dtype=torch.long, device=self.device)
        if ids is not None and ids.dim() != 2:
            raise ValueError(f"generate takes ids of shape (batch_size, tokens), got {tuple(ids.shape)}.")
        shape = (ids if embeds is None else embeds).shape[:2]
        if shape[1] == 0:
            raise ValueError("The prompt is empty: generate needs at least one token.")
        if shape[1] >= self.config.max_position_embeddings:
            raise ValueError(
                f"The prompt has {shape[1]} tokens, which leaves no room for an answer within "
                f"max_position_embeddings={self.config.max_position_embeddings}; shorten the query."
            )
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} does not fit the prompt of shape "
                f"{tuple(shape)}: pass mask and ids of the whole interaction, also to go on from a cache."
            )
        if attention_mask is not None:
            return attention_mask
        pad, ends = config.pad_token_id, _as_list(config.eos_token_id)
        if embeds is None and pad is not None and pad not in ends:
            return (ids != pad).long()
        return torch.ones(shape, dtype=torch.long, device=(ids if embeds is None else embeds).device)

    def _end_within_positions(self, config, prompt_mask, kwargs):
        """Sets `max_new_tokens` and a criterion so that no row's answer goes past the positions of the model."""
        limit, width = self.config.max_position_embeddings, prompt_mask.shape[1]
        wanted = (config.max_length or 0) - width if config.max_new_tokens is None else config.max_new_tokens
        if width + wanted <= limit:
            return
        rooms = limit - prompt_mask.sum(dim=-1)
        left, most = rooms.min().item(), rooms.max().item()
        if wanted > left:
            logger.warning_once(
                f"{wanted} new tokens were asked for: the answer ends after {left}, where "
                f"max_position_embeddings={limit} ends; a batch, after as many as each row has left."
            )
        if wanted > most:
            kwargs["max_new_tokens"] = most
            kwargs.pop("max_length", None)
        if left < most:
            criteria = kwargs.get("stopping_criteria") or ()
            kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, _RowEnds(rooms)])

    def _writes_in_passing(self, config, update_memory):
        """Returns whether `generate` keeps this turn's states; otherwise the write computes them again."""
        is_plain = config.num_beams == 1 and config.cache_implementation in (None, "dynamic")
        return bool(update_memory) and is_plain and self.config.memory_encoding == "decoder_in_passing"

    def _layer_inputs(self, steps, shape):
        """
        Returns the inputs of each memory layer at all tokens of an interaction of `shape` except the last, taken from
        the hidden states of each step; `None` if some are missing.
        """
        memory_layers = self.config.memory_layers
        memory_layers = range(self.config.num_hidden_layers) if memory_layers is None else memory_layers
        if any(step[layer] is None for step in steps for layer in memory_layers):
            return None
        layer_inputs = [torch.cat([step[layer] for step in steps], dim=1) for layer in memory_layers]
        return layer_inputs if layer_inputs[0].shape[:2] == (shape[0], shape[1] - 1) else None

    def _write_turn(self, stm_cache, ids, mask, embeds, layer_inputs):
        """Writes prompt and answer, up to each row's own end, into the memory; `embeds` stand before the ids."""
        if embeds is None:
            return self.update_memory(stm_cache, ids, mask, layer_inputs=layer_inputs)
        embeds = torch.cat([embeds, self.get_input_embeddings()(ids)], dim=1)
        return self.update_memory(stm_cache, inputs_embeds=embeds, attention_mask=mask, layer_inputs=layer_inputs)

    def _write_turn_async(self, *turn) -> PendingSTMCache:
        """Writes in another thread, under this thread's autocast and after this thread's GPU work."""
        device = self.device
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        before = None if stream is None else stream.record_event()
        weights = weights_state(self.model)

        def checked_write() -> STMCache:
            written = self._write_turn(*turn)
            if weights_state(self.model) != weights:
                raise StateError(
                    "The model's weights changed while an asynchronous write was under way; the memory before it is "
                    "unchanged. Call stm_cache.wait() before weights change."
                )
            return written

        def write() -> STMCache:
            with torch.no_grad(), torch.autocast(device.type, enabled=autocast[0], dtype=autocast[1]):
                if stream is None:
                    return checked_write()
                side_stream = torch.cuda.Stream(device)
                side_stream.wait_event(before)
                with torch.cuda.stream(side_stream):
                    written = checked_write()
                side_stream.synchronize()
                # the memory will be read, and freed, on the stream of the conversation
                written.states.record_stream(stream)
                return written

        future = _writers(os.getpid()).submit(write)
        _writes_under_way.add(future)
        future.add_done_callback(_writes_under_way.discard)
        return PendingSTMCache(future)

    def _get_logits_processor(self, *args, model_kwargs=None, **kwargs):
        """Lets guidance compute its scores without the prompt under the same memory."""
        states = (model_kwargs or {}).get("stm_cache")
        for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
            given = kwargs.get(name)
            if given is not None and states is not None and len(given) < len(states):
                # a prompt that is answered several times
                kwargs[name] = given.repeat_interleave(len(states) // len(given), dim=0)
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(self, stm_cache=states)
        return processors

    def _draft(self, inputs, generation_config, stm_cache, **kwargs):
        """
        Drafts candidates for another model's assisted decoding. Nothing is written. The other model's memory is read
        if it fits this one, else the initial memory; a draft changes the speed, never the tokens.
        """
        expected = (self.config.num_memory_layers, self.config.num_memory_slots, self.config.hidden_size)
        if stm_cache is not None and tuple(stm_cache.shape[1:]) != expected:
            stm_cache = self.model.initial_states(stm_cache.shape[0])
        return super().generate(inputs, generation_config, stm_cache=stm_cache, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Adds the cross part, which the first forward fills with the memory's keys and values."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = TurnCache.of(model_kwargs.get("cache"))
        if cache is not None:
            model_kwargs["cache"] = cache if isinstance(cache, TurnCache) else TurnCache(cache, DynamicCache())

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs):
        """
        Masks of fixed shapes, for a static cache. A joint read puts slots in front of them, so they are never `None`.
        """
        if config.memory_reading != "joint":
            return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs)
        create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: create[kind](config, inputs_embeds, attention_mask, cache, allow_is_causal_skip=False)
            for kind in set(config.layer_types)
        }

    def _get_candidate_generator(self, *args, assistant_model=None, model_kwargs=None, **kwargs):
        """Takes the memory away from a draft model of another family, which has none to read."""
        if assistant_model is not None and not isinstance(assistant_model, RxTGenerationMixin):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "stm_cache"}
        return super()._get_candidate_generator(
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )

    def generate_batch(self, *args, **kwargs):
        """Raises: continuous batching shares one paged cache between requests and has no place for a memory."""
        raise ValueError("Continuous batching would lose the memory; call generate with a batch of prompts instead.")

    init_continuous_batching = continuous_batching_context_manager = generate_batch


def wait_for_writes() -> None:
    """Waits until all asynchronous writes have ended, failed ones included."""
    wait(list(_writes_under_way))


@lru_cache(maxsize=1)
def _writers(process_id: int) -> ThreadPoolExecutor:
    """Threads that write memories; a forked process, which has none of its parent's threads, gets its own."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="rxt-memory-write")


def _as_list(token_ids) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)


__all__ = ["RxTGenerateBeamOutput", "RxTGenerateOutput", "RxTGenerationMixin"]
