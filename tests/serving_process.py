# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Starts servers in processes that may be killed. The model is loaded once; a line of JSON on stdin forks one server,
whose process id is the answer. `kill_at` counts the writes of states until the server kills itself: before the write,
or, with `within`, inside its transaction.
"""

import json
import os
import signal
import sys

import torch
import uvicorn

from rxt_hf.serving.app import build_app
from rxt_hf.serving.service import Settings
from rxt_hf.serving.store import open_store

from .serving import demo


def killing(store, kill_at, within):
    """A store that ends its process at a certain write."""
    put, count = store.put, 0

    def put_or_die(records, expect=None):
        nonlocal count
        count += any(not record.key.startswith("seal") for record in records)
        if not kill_at or count != kill_at:
            return put(records, expect)

        def first_alone():
            if within:
                yield records[0]
            os.kill(os.getpid(), signal.SIGKILL)

        return put(first_alone(), expect)

    store.put = put_or_die
    return store


def serve(store, port, kill_at=0, within=False, **settings):
    store = killing(open_store(store), kill_at, within)
    app = build_app(*demo(), store, Settings(**{"max_rows": 8, "keeps_text": True, **settings}))
    uvicorn.run(app, port=port, log_level="critical", access_log=False)


def main():
    torch.set_num_threads(1)
    demo()
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            serve(**json.loads(line))
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
