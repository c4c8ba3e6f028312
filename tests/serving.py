# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What several tests of the server share: servers on real sockets, a real Redis, and answers by heart."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rxt_hf

TOKENS = {"ann": "token-of-ann-0123456789", "bob": "token-of-bob-0123456789"}


@functools.cache
def demo():
    return AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO), AutoTokenizer.from_pretrained(rxt_hf.DEMO)


@contextlib.contextmanager
def running_server(store="memory", model=None, idle_s=30.0, **settings):
    """A server on a socket of this machine, in a thread; gives its address and its service."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    from rxt_hf.serving.app import build_app
    from rxt_hf.serving.guard import impatient
    from rxt_hf.serving.service import Settings
    from rxt_hf.serving.store import open_store

    settings = {"max_rows": 8, "keeps_text": True, **settings}
    app = build_app(model or demo()[0], demo()[1], open_store(str(store)), Settings(**settings))
    protocol = impatient(AutoHTTPProtocol, idle_s)
    config = uvicorn.Config(app, port=0, log_level="critical", access_log=False, http=protocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server does not start"
        time.sleep(0.005)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app.app.state.service
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def token_hashes():
    return {hashlib.sha256(token.encode()).digest(): tenant for tenant, token in TOKENS.items()}


def openai_client(url, tenant="ann", **options):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    options = {"max_retries": 0, "timeout": 60, **options}
    return openai.OpenAI(base_url=f"{url}/v1", api_key=TOKENS[tenant], **options)


def scripted(engine, monkeypatch, script):
    """Lets every turn of an engine say these tokens."""
    take = engine._take

    def take_script(first, logits):
        logits = torch.full_like(logits, -1.0)
        for index, row in enumerate(engine._rows[first:]):
            logits[index, script[len(row.turn.token_ids)]] = 1.0
        take(first, logits)

    monkeypatch.setattr(engine, "_take", take_script)
    return engine


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def redis_server():
    """The address of a Redis that keeps nothing on the disk and ends with the block."""
    pytest.importorskip("redis", reason="the package redis is not installed")
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("there is no redis-server: apt-get install redis-server")
    port = free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < end, "redis-server does not start"
                    time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()


class Servers:
    """Servers in processes of their own, which may be killed."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.serving_process"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "stderr": subprocess.DEVNULL}
        root = Path(__file__).parent.parent
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, cwd=root, env=environment, **pipes)
        self.pids = []

    def __enter__(self):
        assert self._process.stdout.readline().strip() == "ready"
        return self

    def start(self, store, **options):
        """Address and process id of one more."""
        port = free_port()
        self._process.stdin.write(json.dumps({"store": str(store), "port": port, **options}) + "\n")
        self._process.stdin.flush()
        self.pids.append(int(self._process.stdout.readline()))
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return f"http://127.0.0.1:{port}", self.pids[-1]
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.02)

    def __exit__(self, *_):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
