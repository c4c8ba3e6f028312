# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
What serving costs: tokens per CPU second of 1, 8 and 32 clients, in process and over HTTP.

    python benchmarks/serving.py --output benchmarks/results/serving.json
    python benchmarks/serving.py --hidden-size 256 --turns 2 --output benchmarks/results/serving_wider.json

With `--hidden-size` the weights are random and the answers have 16 tokens.
Each client holds a conversation and speaks as soon as it is answered. In process, one by one is `RxTSession.send`, and
the engine gets the next turn of each client from the end of the last. Over HTTP, CPU seconds are those of the server's
process alone; one by one is a server with one row. With `--against MODEL` a language model that re-reads the history,
in transformers' continuous batching, answers at turn 2, 8 and 32, and the CPU seconds of a turn stand side by side.
"""

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

import rxt_hf
from rxt_hf import RxTSession
from rxt_hf.evaluation.speed import environment, markdown_table
from rxt_hf.serving.engine import Engine, Turn

SAYS = [
    "My dog is called Mochi.",
    "I live in Lisbon.",
    "What is my dog called?",
    "Tell me a joke.",
    "Where do I live?",
    "My favourite colour is green.",
    "What is my favourite colour?",
    "I work as a baker.",
]
CLIENTS = (1, 8, 32)


def percentiles(seconds):
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"p50_ms": 1e3 * statistics.median(seconds), "p95_ms": 1e3 * cuts[18]}


def one_by_one(model, tokenizer, clients, turns):
    sessions = [RxTSession(model, tokenizer) for _ in range(clients)]
    start, tokens = time.process_time(), 0
    for turn in range(turns):
        for session in sessions:
            session.send(SAYS[turn % len(SAYS)])
    seconds = time.process_time() - start
    for session in sessions:
        tokens += sum(
            len(interaction.token_ids) - prompt_length(session, interaction) for interaction in session._state.log
        )
    return {"tokens_per_cpu_s": tokens / seconds}


def prompt_length(session, interaction):
    return len(session._encode("user", interaction.query)[0])


def in_engine(model, tokenizer, clients, turns):
    engine = Engine(model, tokenizer, max_rows=32)
    session, ended = RxTSession(model, tokenizer), threading.Semaphore(0)
    prompts = [session._encode("user", text)[0].tolist() for text in SAYS]
    firsts, wholes = [], []

    def speak(memory, number):
        if number == turns:
            ended.release()
            return
        turn = Turn(prompts[number % len(prompts)], memory, model.generation_config.max_new_tokens or 64)

        def go_on():
            if turn.is_done:
                firsts.append(turn.first_token_at - turn.started_at)
                wholes.append(time.monotonic() - turn.started_at)
                speak(turn.memory_after, number + 1)

        turn.on_change = go_on
        engine.submit(turn)

    start = time.process_time()
    for _ in range(clients):
        speak(model.init_stm(1), 0)
    for _ in range(clients):
        ended.acquire()
    seconds = time.process_time() - start
    engine.close()
    found = {"tokens_per_cpu_s": engine.tokens / seconds, "steps": engine.steps, "prefills": engine.prefills}
    return {**found, "first_token": percentiles(firsts), "turn": percentiles(wholes)}


class Server:
    """`rxt serve` in a process of its own."""

    def __init__(self, model, port, max_rows):
        command = [sys.executable, "-m", "rxt_hf.cli", "serve", model, "--port", str(port), "--name", "rxt"]
        self.folder = tempfile.TemporaryDirectory()
        command += ["--max-rows", str(max_rows), "--store", str(Path(self.folder.name, "states.sqlite"))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while not self.process.stdout.readline().startswith("listens"):
            if self.process.poll() is not None:
                raise RuntimeError("The server does not start.")
        self.url = f"http://127.0.0.1:{port}"
        while True:
            try:
                httpx.get(f"{self.url}/ready")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        self.usage = psutil.Process(self.process.pid)

    def cpu_seconds(self):
        times = self.usage.cpu_times()
        return times.user + times.system

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)
        self.folder.cleanup()


async def client(http, turns, streams, firsts, wholes):
    previous, tokens = None, 0
    for number in range(turns):
        body = {"input": SAYS[number % len(SAYS)], "previous_response_id": previous, "stream": streams}
        start = time.monotonic()
        if streams:
            answer = None
            async with http.stream("POST", "/v1/responses", json=body) as response:
                is_first = True
                async for line in response.aiter_lines():
                    if is_first and line == "event: response.output_text.delta":
                        firsts.append(time.monotonic() - start)
                        is_first = False
                    # the last of them is the whole response
                    answer = line if line.startswith("data: ") else answer
            answer = json.loads(answer.removeprefix("data: "))["response"]
        else:
            answer = (await http.post("/v1/responses", json=body)).raise_for_status().json()
        wholes.append(time.monotonic() - start)
        previous, tokens = answer["id"], tokens + answer["usage"]["output_tokens"]
    return tokens


async def clients_at_once(url, clients, turns, streams):
    firsts, wholes = [], []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=100)) as http:
        await client(http, 1, streams, [], [])
        counts = await asyncio.gather(*(client(http, turns, streams, firsts, wholes) for _ in range(clients)))
    return sum(counts), firsts, wholes


def over_http(server, clients, turns, streams=False):
    start = server.cpu_seconds()
    tokens, firsts, wholes = asyncio.run(clients_at_once(server.url, clients, turns, streams))
    found = {"tokens_per_cpu_s": tokens / (server.cpu_seconds() - start), "turn": percentiles(wholes)}
    return {**found, "first_token": percentiles(firsts)} if firsts else found


def full_history(name, numbers, tokens_of_turn, conversations):
    """CPU seconds of a turn that re-reads all turns before it, in transformers' continuous batching."""
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa_paged").eval()
    generator = torch.Generator().manual_seed(0)
    config = GenerationConfig(max_new_tokens=tokens_of_turn // 4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = {}
    for number in numbers:
        length = number * tokens_of_turn - tokens_of_turn // 4
        prompts = torch.randint(10, model.config.vocab_size, (conversations, length), generator=generator).tolist()
        start = time.process_time()
        model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        found[str(number)] = (time.process_time() - start) / conversations
    return found


def random_model(hidden_size, folder):
    """A model of another width with the demo's tokenizer, in a folder."""
    config = AutoConfig.from_pretrained(rxt_hf.DEMO)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": 6, "head_dim": 64, "layer_types": None}
    sizes |= dict.fromkeys(("intermediate_size", "memory_encoder_intermediate_size"), 4 * hidden_size)
    heads = [name for name in config.to_dict() if name.endswith(("attention_heads", "key_value_heads"))]
    given = {**config.to_dict(), **sizes, **dict.fromkeys(heads, hidden_size // 64)}
    torch.manual_seed(0)
    model = rxt_hf.RxTForCausalLM(type(config)(**given))
    model.generation_config = GenerationConfig.from_pretrained(rxt_hf.DEMO, max_new_tokens=16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(rxt_hf.DEMO).save_pretrained(folder)
    return folder


def measure(args):
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parameters = model.num_parameters()
    arms = {"session": {}, "engine": {}, "http, one row": {}, "http": {}, "http, streamed": {}}
    for count in CLIENTS:
        arms["session"][count] = one_by_one(model, tokenizer, count, max(2, args.turns // count))
        arms["engine"][count] = in_engine(model, tokenizer, count, args.turns)
    with Server(args.model, args.port, 1) as server:
        for count in CLIENTS:
            arms["http, one row"][count] = over_http(server, count, max(2, args.turns // count))
    with Server(args.model, args.port + 1, 32) as server:
        for count in CLIENTS:
            arms["http"][count] = over_http(server, count, args.turns)
            arms["http, streamed"][count] = over_http(server, count, args.turns, streams=True)
    return parameters, arms


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tokens per CPU second of a server, in process and over HTTP.")
    parser.add_argument("--model", default=str(rxt_hf.DEMO), help="model folder or Hub name; default: the demo")
    parser.add_argument("--hidden-size", type=int, help="random weights of this width in place of --model")
    parser.add_argument("--turns", type=int, default=16, help="turns of each client; default 16")
    parser.add_argument("--port", type=int, default=8770, help="first of two ports; default 8770")
    parser.add_argument("--against", metavar="MODEL", help="a language model that re-reads the history")
    parser.add_argument("--tokens-of-turn", type=int, default=64, help="of --against; default 64, a quarter answered")
    parser.add_argument("--output", metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if args.hidden_size:
            args.model = random_model(args.hidden_size, folder)
        parameters, arms = measure(args)
    speed = {arm: {count: row["tokens_per_cpu_s"] for count, row in rows.items()} for arm, rows in arms.items()}
    report = {
        "command": f"python benchmarks/serving.py {shlex.join(sys.argv[1:] if argv is None else argv)}".strip(),
        "environment": environment("cpu"),
        "parameters": parameters,
        "arms": arms,
        "http_of_engine_at_32": speed["http"][32] / speed["engine"][32],
        "http_32_of_one_by_one": speed["http"][32] / speed["http, one row"][32],
    }
    if args.against:
        report["full_history_cpu_s_by_turn"] = full_history(args.against, (2, 8, 32), args.tokens_of_turn, 8)
    head = ["tokens per CPU second; clients", *map(str, CLIENTS)]
    print(markdown_table(head, *([arm, *(f"{rows[count]:.0f}" for count in CLIENTS)] for arm, rows in speed.items())))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
