# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Baselines: models of transformers with as many parameters as an RxT, on the same tokens and label masks.

    rxt             reads one turn and its memory
    current_turn    a Llama that reads one turn alone
    sliding_window  a Mistral that reads the dialogue, each layer the last `SLIDING_WINDOW` tokens
    mamba           a Mamba-2 that reads the dialogue into a state of fixed size
    full_history    a Llama that reads the whole dialogue
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast, get_args

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from rxt_hf.configuration_rxt import RxTConfig
from rxt_hf.modeling_rxt import RxTForCausalLM

Arm = Literal["rxt", "current_turn", "sliding_window", "mamba", "full_history"]
ARMS: tuple[str, ...] = get_args(Arm)
SLIDING_WINDOW = 64
MAMBA_STATE, MAMBA_HEAD = 64, 32


def build_model(arm: str, config: RxTConfig) -> PreTrainedModel:
    """Builds the RxT, or a baseline with about as many parameters: as many layers as fit, then wider ones."""
    if arm == "rxt":
        return RxTForCausalLM(config)
    target = sum(p.numel() for p in RxTForCausalLM(config).parameters())
    room = target - config.vocab_size * config.hidden_size
    if arm == "mamba":
        return _build_mamba(config, room)
    shared: dict[str, Any] = {
        name: getattr(config, name)
        for name in [
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "head_dim",
            "initializer_range",
            "rms_norm_eps",
            "pad_token_id",
        ]
    }
    attention = 4 * config.hidden_size * config.num_attention_heads * cast(int, config.head_dim)
    # a mixture of experts has room for more layers than can be trained
    fits = round(room / (attention + 3 * config.hidden_size * config.intermediate_size))
    layers = min(max(1, fits), 3 * config.num_hidden_layers)
    shared |= {
        "num_key_value_heads": config.num_attention_heads,
        "num_hidden_layers": layers,
        "intermediate_size": round((room / layers - attention) / (3 * config.hidden_size)),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    if arm == "sliding_window":
        return MistralForCausalLM(MistralConfig(**shared, sliding_window=SLIDING_WINDOW))
    return LlamaForCausalLM(LlamaConfig(**shared))


def _build_mamba(config: RxTConfig, room: int) -> Mamba2ForCausalLM:
    width = config.hidden_size
    inner = 2 * width
    layer = width * (3 * inner + 2 * MAMBA_STATE + inner // MAMBA_HEAD)
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=width,
            num_hidden_layers=max(1, round(room / layer)),
            expand=2,
            num_heads=inner // MAMBA_HEAD,
            head_dim=MAMBA_HEAD,
            state_size=MAMBA_STATE,
            n_groups=1,
            chunk_size=MAMBA_STATE,
            initializer_range=config.initializer_range,
            layer_norm_epsilon=config.rms_norm_eps,
            tie_word_embeddings=True,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )


def arranged(episodes: Iterable[dict[str, Any]], arm: str) -> Iterator[dict[str, Any]]:
    """Returns the same tokens and label masks for every model; only what a turn can see differs."""
    for episode in episodes:
        if arm == "rxt":
            yield episode
        elif arm == "current_turn":
            yield from ({name: episode[name][turn] for name in episode} for turn in range(len(episode["labels"])))
        else:
            yield {name: [token for turn in episode[name] for token in turn] for name in episode}
