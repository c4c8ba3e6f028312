# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""One turn as three graphs of fixed shapes, for `torch.export` and ONNX; the memory is a plain input and output."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn
from torch.export import ExportedProgram
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from .modeling_rxt import RxTForCausalLM

# names of each graph's inputs and of its outputs
GRAPHS = {
    "prefill": (("input_ids", "attention_mask", "stm"), ("logits", "cache", "memory_cache")),
    "decode": (("token", "slot", "attention_mask", "cache", "memory_cache"), ("logits", "new_cache")),
    "update": (("stm", "input_ids", "attention_mask"), ("new_stm",)),
}
SETTINGS_NAME, INITIAL_STM_NAME = "rxt.json", "initial_stm.safetensors"
# RoPE types whose frequencies depend on the sequence length; a fixed graph cannot hold them
GROWING_ROPE = ("dynamic", "longrope")


class _SlotCache(Cache):
    """Keys and values of a turn, (2, layers, batch_size, heads, slots, head_dim); a step replaces one slot of each."""

    def __init__(self, cache: torch.Tensor, slot: torch.Tensor):
        super().__init__(layers=[])
        self.old, self.new = cache, []
        self.is_slot = (torch.arange(cache.shape[-2], device=cache.device) == slot)[:, None]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        # a choice for each element is the same in every backend, a write in place or a scatter is not
        self.new.append(torch.where(self.is_slot, torch.stack([key_states, value_states]), self.old[:, layer_idx]))
        return self.new[-1].unbind(0)


class _Graph(nn.Module):
    def __init__(self, model: RxTForCausalLM, answer_length: int):
        super().__init__()
        self.model: Any = model
        self.answer_length = answer_length

    def logits(self, token_ids, memory_states, attention_mask, query_slots, position_ids, cache):
        """Logits of the last token; queries see the columns of `attention_mask` up to their own, `query_slots`."""
        embeds, config = self.model.model.embed_tokens(token_ids), self.model.config
        distances = query_slots[:, None] - torch.arange(attention_mask.shape[1], device=embeds.device)
        seen = {"full_attention": attention_mask.bool()[:, None] & (distances >= 0)}
        if "sliding_attention" in config.layer_types:
            seen["sliding_attention"] = seen["full_attention"] & (distances < config.sliding_window)
        # finite: padding in front sees nothing, and minus infinity would make its values, and then all others, NaN
        hidden = torch.full((), torch.finfo(embeds.dtype).min, dtype=embeds.dtype, device=embeds.device)
        masks = {kind: torch.where(mask, torch.zeros_like(hidden), hidden)[:, None] for kind, mask in seen.items()}
        hidden_states = self.model.model.decode(embeds, memory_states, masks, position_ids, cache)
        return self.model.lm_head(hidden_states[:, -1])


class _Prefill(_Graph):
    def forward(self, input_ids, attention_mask, stm):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.logits(input_ids, stm, attention_mask, slots, position_ids, cache)
        turn, memory = _stacked(cache.self_attention_cache), _stacked(cache.cross_attention_cache)
        return logits, F.pad(turn, (0, 0, 0, self.answer_length)), memory


class _Decode(_Graph):
    def forward(self, token, slot, attention_mask, cache, memory_cache):
        turn, memory = _SlotCache(cache, slot), DynamicCache(list(zip(*memory_cache.unbind(0), strict=True)))
        position_ids = attention_mask.sum(-1, keepdim=True) - 1
        both = EncoderDecoderCache(turn, memory)
        logits = self.logits(token, None, attention_mask, slot[None], position_ids, both)
        return logits, torch.stack(turn.new, dim=1)


class _Update(_Graph):
    def forward(self, stm, input_ids, attention_mask):
        return self.model.model.write(stm, self.model.model.embed_tokens(input_ids), attention_mask)


def _stacked(cache: Any) -> torch.Tensor:
    return torch.stack([torch.stack([getattr(layer, part) for layer in cache.layers]) for part in ("keys", "values")])


class TurnRunner:
    """Plays greedy turns with the three graphs; a subclass says what runs them."""

    settings: dict[str, Any]
    initial_stm: torch.Tensor | None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def run(self, graph: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Runs the graph `"prefill"`, `"decode"` or `"update"` and returns its outputs in the order of `GRAPHS`."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self, input_ids: Any, attention_mask: Any = None, stm: Any = None, max_new_tokens: int | None = None
    ) -> tuple[Any, Any]:
        r"""
        Plays one turn, as [`~RxTForCausalLM.generate`] does with `do_sample=False`.

        Args:
            input_ids (tensor or array of shape `(batch_size, tokens)`): the prompts, padded on the left.
            attention_mask (of the same shape, *optional*): 0 at padding.
            stm (of shape `(batch_size, num_memory_layers, num_memory_slots, hidden_size)`, *optional*): the memory of
                earlier turns, which is not changed (default: the initial one).
            max_new_tokens (`int`, *optional*): longest answer in tokens (default: `answer_length`).

        Returns: prompts and answers, padded after the end of each answer, and the memory after this turn.

        Raises: `ValueError` if a tensor does not fit the fixed shapes, if a prompt ends with padding, or if `stm` is
        missing and the initial memory is noise.
        """
        settings = self.settings
        prompt_length, pad = settings["prompt_length"], settings["pad_token_id"]
        prompts = torch.as_tensor(input_ids, dtype=torch.long, device=self.device)
        prompt_mask = torch.ones_like(prompts) if attention_mask is None else torch.as_tensor(attention_mask)
        stm = self.initial_stm if stm is None else stm
        if stm is None:
            raise ValueError('The initial memory of this model is noise (memory_init="random"): pass stm.')
        stm = torch.as_tensor(stm, device=self.device)
        max_new_tokens = settings["answer_length"] if max_new_tokens is None else max_new_tokens
        self._check(prompts, prompt_mask, stm, max_new_tokens)

        ids = prompts.new_full((len(prompts), prompt_length + settings["answer_length"]), pad)
        mask = torch.zeros_like(ids)
        first, last = prompt_length - prompts.shape[1], prompt_length + max_new_tokens - 1
        ids[:, first:prompt_length], mask[:, first:prompt_length] = prompts, prompt_mask
        logits, cache, memory_cache = self.run("prefill", ids[:, :prompt_length], mask[:, :prompt_length], stm)
        running, ends = torch.ones_like(ids[:, 0], dtype=torch.bool), ids.new_tensor(settings["eos_token_ids"])
        slot = prompt_length
        while True:
            ids[:, slot] = torch.where(running, logits.argmax(-1), pad)
            mask[:, slot] = running
            running &= ~torch.isin(ids[:, slot], ends)
            if slot == last or not running.any():
                break
            token = ids[:, slot : slot + 1]
            logits, cache = self.run("decode", token, ids.new_tensor(slot), mask, cache, memory_cache)
            slot += 1
        return ids[:, first : slot + 1], self.run("update", stm, ids, mask)[0]

    def _check(self, prompts, prompt_mask, stm, max_new_tokens):
        settings, shape = self.settings, tuple(prompts.shape)
        batch_size, most = settings["batch_size"], settings["prompt_length"]
        if len(shape) != 2 or shape[0] != batch_size or not 0 < shape[1] <= most:
            raise ValueError(f"input_ids of shape {shape} does not fit graphs of ({batch_size}, 1 to {most}).")
        if prompt_mask.shape != prompts.shape or not prompt_mask[:, -1].all():
            raise ValueError("attention_mask must have the shape of input_ids and end with ones: pad on the left.")
        if list(stm.shape) != settings["stm_shape"]:
            raise ValueError(f"stm of shape {list(stm.shape)} does not fit graphs of {settings['stm_shape']}.")
        if not 0 < max_new_tokens <= settings["answer_length"]:
            raise ValueError(f"max_new_tokens={max_new_tokens}, the graphs have room for {settings['answer_length']}.")


@dataclass
class RxTGraphs(TurnRunner):
    r"""
    One turn of a model as three graphs that need no model. `P` is `prompt_length` and `A` is `answer_length`. A slot
    here is one of the `P + A` places of a turn; prompts end at slot `P - 1`. An `attention_mask` is 1 at all tokens so
    far.

    Args:
        prefill (`ExportedProgram`): `input_ids (batch_size, P), attention_mask (batch_size, P), stm` to `logits
            (batch_size, vocab_size)` of the last token, `cache (2, num_hidden_layers, batch_size, num_key_value_heads,
            P + A, head_dim)`, keys and then values, and `memory_cache (2, num_memory_layers, batch_size,
            cross_attention_num_key_value_heads, num_memory_slots, head_dim)`, which is made only here.
        decode (`ExportedProgram`): `token (batch_size, 1), slot (), attention_mask (batch_size, P + A), cache,
            memory_cache` to `logits` and `new_cache`. The mask is 1 at `slot`, too.
        update (`ExportedProgram`): `stm, input_ids (batch_size, P + A), attention_mask (batch_size, P + A)` to
            `new_stm`. A row without a token keeps its memory bit-identical.
        settings (`dict`): shapes and token ids, as in `rxt.json`.
        initial_stm (`torch.Tensor`, *optional*): the memory before the first turn, unless it is noise.
    """

    prefill: ExportedProgram
    decode: ExportedProgram
    update: ExportedProgram
    settings: dict[str, Any]
    initial_stm: torch.Tensor | None = None

    @cached_property
    def _modules(self) -> dict[str, Any]:
        return {graph: getattr(self, graph).module() for graph in GRAPHS}

    @property
    def device(self) -> torch.device:
        return next(iter(self.prefill.state_dict.values())).device

    def run(self, graph: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        outputs = self._modules[graph](*inputs)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    def save_onnx(self, folder: str | os.PathLike) -> Path:
        """
        Writes `prefill.onnx`, `decode.onnx` and `update.onnx`, each with the weights that it needs, `rxt.json`, and
        the initial memory unless it is noise.

        Returns: the folder.

        Raises: `ImportError` without the packages of the extra `onnx`, `ValueError` for graphs in bfloat16, which
        numpy lacks.
        """
        _require("onnx", "onnxscript")
        if torch.bfloat16 in {value.dtype for value in self.prefill.state_dict.values()}:
            raise ValueError("numpy, and so onnxruntime in Python, has no bfloat16: export model.float().")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for graph, (inputs, outputs) in GRAPHS.items():
            program: Any = torch.onnx.export(
                getattr(self, graph), (), dynamo=True, input_names=inputs, output_names=outputs, verbose=False
            )
            program.save(folder / f"{graph}.onnx")
        if self.initial_stm is not None:
            (folder / INITIAL_STM_NAME).write_bytes(save({"stm": self.initial_stm}))
        (folder / SETTINGS_NAME).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        return folder


class OnnxRxT(TurnRunner):
    r"""
    Plays turns with onnxruntime: `generate` takes arrays or tensors and returns numpy arrays.

    Args:
        folder: the folder that [`RxTGraphs.save_onnx`] wrote.
        session_kwargs (*optional*): go to `onnxruntime.InferenceSession`, for example `providers`.

    Raises: `ImportError` without onnxruntime.
    """

    def __init__(self, folder: str | os.PathLike, **session_kwargs: Any):
        _require("onnxruntime")
        from onnxruntime import InferenceSession

        folder = Path(folder)
        self.settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
        self.initial_stm = None
        if self.settings["has_initial_stm"]:
            self.initial_stm = load_file(folder / INITIAL_STM_NAME)["stm"]
        self._sessions = {graph: InferenceSession(folder / f"{graph}.onnx", **session_kwargs) for graph in GRAPHS}

    def run(self, graph: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(GRAPHS[graph][0], inputs, strict=True)}
        return [torch.from_numpy(output) for output in self._sessions[graph].run(None, feed)]

    def generate(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        sequences, stm = super().generate(*args, **kwargs)
        return sequences.numpy(), stm.numpy()


@torch.no_grad()
def export_graphs(
    model: RxTForCausalLM, *, batch_size: int = 1, prompt_length: int = 64, answer_length: int = 64
) -> RxTGraphs:
    r"""
    Exports a turn as three graphs of fixed shapes: read the prompt, read one token, write the memory. They share the
    model's weights and hold none of its code.

    Args:
        model ([`RxTForCausalLM`]): is not changed.
        batch_size (`int`): number of conversations.
        prompt_length (`int`): shorter prompts are padded on the left.
        answer_length (`int`): longest answer in tokens, the end token included.

    Returns: [`RxTGraphs`] in the model's dtype and on its device.

    Raises: `ValueError` for a turn longer than `max_position_embeddings`, and for models without a fixed graph: in
    training mode, with flash or flex attention, with experts not in `batched_mm`, or with the `rope_type` `dynamic` or
    `longrope`.
    """
    config = model.config
    _check_exportable(model, prompt_length + answer_length)
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    stm = torch.zeros_like(model.model.initial_states(batch_size))
    ids = torch.zeros((batch_size, prompt_length + answer_length), dtype=torch.long, device=stm.device)
    mask, prompt, slot = torch.ones_like(ids), ids[:, :prompt_length], ids.new_tensor(prompt_length)
    prefill, decode, update = (graph(model, answer_length) for graph in (_Prefill, _Decode, _Update))
    _, cache, memory_cache = prefill(prompt, mask[:, :prompt_length], stm)
    has_initial_stm = config.memory_init != "random"
    return RxTGraphs(
        prefill=torch.export.export(prefill, (prompt, mask[:, :prompt_length], stm)),
        decode=torch.export.export(decode, (prompt[:, :1], slot, mask, cache, memory_cache)),
        update=torch.export.export(update, (stm, ids, mask)),
        settings={
            "batch_size": batch_size,
            "prompt_length": prompt_length,
            "answer_length": answer_length,
            "stm_shape": list(stm.shape),
            "has_initial_stm": has_initial_stm,
            "pad_token_id": (ends or [0])[0] if pad is None else pad,
            "eos_token_ids": ends,
        },
        initial_stm=model.model.initial_states(batch_size).clone() if has_initial_stm else None,
    )


def _check_exportable(model: RxTForCausalLM, turn_length: int) -> None:
    config: Any = model.config
    if model.training:
        raise ValueError("The model is in training mode, and its graphs would drop out: call model.eval().")
    if turn_length > config.max_position_embeddings:
        raise ValueError(
            f"A turn of prompt_length + answer_length = {turn_length} tokens is longer than "
            f"max_position_embeddings={config.max_position_embeddings}."
        )
    attention, experts = config._attn_implementation, config._experts_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(f'{attention} has no fixed graph: call model.set_attn_implementation("sdpa").')
    if config.num_experts and experts != "batched_mm":
        raise ValueError(f'Experts in {experts} have no graph: call model.set_experts_implementation("batched_mm").')
    if config.rope_parameters["rope_type"] in GROWING_ROPE:
        raise ValueError(f"rope_type={config.rope_parameters['rope_type']!r} depends on the length: it has no graph.")


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"Without {' and '.join(missing)} there is no ONNX: pip install 'rxt_hf[onnx]'")


__all__ = ["OnnxRxT", "RxTGraphs", "TurnRunner", "export_graphs"]
