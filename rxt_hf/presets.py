# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Named sizes as data: `RxTConfig(**PRESETS["nano"])`.

`tiny` is the shipped demo. The others meet the total parameters of arXiv 2510.03561 (12, 26, 100 and 160 million).
Widths, depths, heads, slots and memory attention of micro and mini are as published; what is not published (all of
nano and synthetic, and how many experts the totals leave room for) is our choice.
"""


def _paper(experts: int, layers: int, width: int, heads: int, cross_key_value_heads: int, **fields) -> dict:
    """Sparse Query Attention of `heads` heads of 16, mixture-of-experts decoder, one linear gate for each slot."""
    roles = ("", "memory_encoder_", "memory_attention_", "interlayer_attention_", "cross_attention_")
    counts = {f"{role}num_{kind}_heads": heads for role in roles for kind in ("attention", "key_value")}
    return {
        **counts,
        "cross_attention_num_key_value_heads": cross_key_value_heads,
        "hidden_size": width,
        "head_dim": 16,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "intermediate_size": 2 * width,
        "memory_encoder_intermediate_size": 3 * width,
        "memory_gate_status": "mean",
        "memory_gate_granularity": "slot",
        "memory_gate_init": 0.0,
        "tie_word_embeddings": False,
        "output_router_logits": True,
        **fields,
    }


_SMALL = {"vocab_size": 7500, "max_position_embeddings": 256, "num_memory_slots": 256}
_LARGE = {
    "vocab_size": 10_000,
    "max_position_embeddings": 1024,
    "num_memory_slots": 1024,
    "memory_attention_type": "self_interlayer",
}

PRESETS: dict[str, dict] = {
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "num_memory_slots": 40,
        "memory_attention_type": "simple",
    },
    "nano": _paper(12, 6, 128, 4, 4, **_SMALL),
    "micro": _paper(36, 6, 128, 4, 4, **_SMALL),
    "mini": _paper(18, 8, 256, 8, 4, **_LARGE),
    "synthetic": _paper(21, 12, 256, 8, 4, **_LARGE),
}
