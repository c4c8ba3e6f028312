# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
`rxt serve` on any number of machines, by Ray Serve: every replica answers every conversation, since the states are in
Redis. There is no sticky routing; a replica that dies takes no turn with it that was answered.

    pip install '.[serve,redis]' 'ray[serve]'
    RXT_STORE=redis://HOST:6379/0 RXT_TOKENS=tokens.txt serve run examples.ray_serve:app

On several nodes: `ray start --head` on one, `ray start --address HEAD:6379` on the others, the two variables (and
RXT_MODEL, RXT_REPLICAS, RXT_KEEP) set on all of them, the model's folder and the file of tokens at the same path, and
`serve run` on one. Ray's own port is for the cluster alone: let only its nodes reach it.
"""

import os
from typing import Any

from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

import rxt_hf

REPLICAS = int(os.environ.get("RXT_REPLICAS", "2"))


def build() -> Any:
    """The server of one replica, made where it runs."""
    from rxt_hf.serving.app import build_app
    from rxt_hf.serving.guard import read_tokens
    from rxt_hf.serving.service import Settings
    from rxt_hf.serving.store import open_store

    folder = os.environ.get("RXT_MODEL", str(rxt_hf.DEMO))
    tokens = os.environ.get("RXT_TOKENS")
    settings = Settings(
        tokens=None if tokens is None else read_tokens(tokens), keeps_text=os.environ.get("RXT_KEEP") == "text"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return build_app(model, tokenizer, open_store(os.environ["RXT_STORE"]), settings)


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=256, health_check_period_s=5)
@serve.ingress(build)
class Server:
    """One replica."""


app = Server.bind()
