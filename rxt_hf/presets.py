# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Named sizes as data: `RxTConfig(**PRESETS["nano"])`."""

PRESETS: dict[str, dict] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "num_memory_slots": 32,
        "memory_attention_type": "simple",
    },
}
