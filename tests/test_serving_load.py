# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Many clients, races, and servers that are killed: every answer is that of the conversation alone."""

import asyncio
import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from rxt_hf import RxTSession

from .serving import Servers, demo, redis_server, running_server

DOGS, TOWNS = ["Mochi", "Rex", "Bello", "Luna", "Coco"], ["Lisbon", "Rome", "Oslo", "Paris", "Berlin"]
SCRIPTS = [
    [
        f"My dog is called {dog}.",
        f"I live in {town}.",
        "What is my dog called?",
        "Where do I live?",
        "Tell me a joke.",
        "My favourite colour is green.",
        "Where do I live?",
        "What is my favourite colour?",
        "I work as a baker.",
        "What is my dog called?",
    ]
    for dog in DOGS
    for town in TOWNS
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def servers():
    with Servers() as servers:
        yield servers


@functools.cache
def session_of(script):
    return RxTSession(*demo())


def alone(script, turns):
    """What a session says to the first turns of a script."""
    session = session_of(script)
    for text in SCRIPTS[script][session.turns : turns]:
        session.send(text)
    return [turn["answer"] for turn in session.history[:turns]]


def text_of(response):
    return response.raise_for_status().json()["output"][0]["content"][0]["text"]


async def converse(http, script, turns, pause=lambda: 0.0):
    """The answers to the first turns of a script, each going on from the last."""
    answers, previous = [], None
    for text in SCRIPTS[script][:turns]:
        await asyncio.sleep(pause())
        response = await http.post("/v1/responses", json={"input": text, "previous_response_id": previous})
        answers.append(text_of(response))
        previous = response.json()["id"]
    return answers


async def all_of(url, calls):
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        return await asyncio.gather(*(call(http) for call in calls))


def test_32_clients_hear_what_each_would_hear_alone():
    scripts = [client % len(SCRIPTS) for client in range(32)]
    with running_server(max_rows=16) as (url, service):
        calls = [functools.partial(converse, script=script, turns=4) for script in scripts]
        answers = asyncio.run(all_of(url, calls))
        assert service.engine.steps < 0.5 * service.engine.tokens
    assert answers == [alone(script, 4) for script in scripts]


def test_the_event_loop_is_woken_once_for_all_that_one_step_changes():
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from rxt_hf.serving.service import Changes

    wakes, changes = [], Changes()
    loop = SimpleNamespace(call_soon_threadsafe=wakes.append)
    jobs = [SimpleNamespace(changed=asyncio.Event()) for _ in range(3)]
    for job in jobs:
        changes.add(loop, job)
    assert len(wakes) == 1 and not any(job.changed.is_set() for job in jobs)
    wakes.pop()()
    assert all(job.changed.is_set() for job in jobs)
    # what changes from then on wakes it again
    jobs[1].changed.clear()
    changes.add(loop, jobs[1])
    wakes.pop()()
    assert jobs[1].changed.is_set() and not wakes


@pytest.mark.parametrize(
    "conversations, turns", [(25, 5), pytest.param(1000, 10, marks=pytest.mark.slow, id="slow: 1000, 10")]
)
def test_conversations_in_random_order_are_each_its_solo_replay_and_memory_stays_flat(tmp_path, conversations, turns):
    psutil = pytest.importorskip("psutil")
    order = [conversation for conversation in range(conversations) for _ in range(turns)]
    random.Random(0).shuffle(order)
    script = [conversation % len(SCRIPTS) for conversation in range(conversations)]
    spoken, sizes = [0] * conversations, []
    with running_server(tmp_path / "states.db", max_rows=16, max_waiting=64, keeps_text=False) as (url, _):

        async def run():
            limits = httpx.Limits(max_connections=24)
            async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
                made = [await http.post("/v1/conversations", json={}) for _ in range(conversations)]
                keys, locks = [response.json()["id"] for response in made], [asyncio.Lock() for _ in made]
                places = asyncio.Semaphore(24)

                async def turn(conversation):
                    async with places, locks[conversation]:
                        number = spoken[conversation]
                        body = {"input": SCRIPTS[script[conversation]][number], "conversation": keys[conversation]}
                        answer = text_of(await http.post("/v1/responses", json={**body, "store": False}))
                        assert answer == expected[script[conversation]][number]
                        spoken[conversation] += 1

                for start in range(0, len(order), 500):
                    await asyncio.gather(*(turn(conversation) for conversation in order[start : start + 500]))
                    sizes.append(psutil.Process().memory_info().rss)

        expected = [alone(each, turns) for each in range(len(SCRIPTS))]
        asyncio.run(run())
    assert spoken == [turns] * conversations
    # the first part makes what is made once
    assert len(sizes) < 4 or sizes[-1] - sizes[1] < 32 * 2**20


@pytest.mark.parametrize("has_lease", [True, False])
def test_a_race_on_one_conversation_has_one_winner(monkeypatch, has_lease):
    with running_server() as (url, service):
        if not has_lease:
            # compare-and-set alone
            monkeypatch.setattr(service.store, "lease", lambda *_: True)
        for _ in range(3):
            key = httpx.post(f"{url}/v1/conversations", json={}).json()["id"]

            async def speak(http, dog, key=key):
                body = {"input": f"My dog is called {dog}.", "conversation": key}
                return await http.post("/v1/responses", json=body)

            racing = [functools.partial(speak, dog=dog) for dog in DOGS]
            answers = asyncio.run(all_of(url, racing))
            statuses = [response.status_code for response in answers]
            assert sorted(statuses) == [200, 409, 409, 409, 409]
            loser = answers[statuses.index(409)]
            assert loser.json()["error"]["code"] == "conversation_locked"
            assert loser.headers["x-should-retry"] == "false"
            body = {"input": "What is my dog called?", "conversation": key}
            assert DOGS[statuses.index(200)] in text_of(httpx.post(f"{url}/v1/responses", json=body, timeout=60))


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow, id="slow: 20")])
def test_a_kill_between_answer_and_write_loses_that_turn_alone(servers, tmp_path, times):
    store, rounds, script = tmp_path / "states.db", random.Random(1), alone(0, 10)
    lost = 0
    # the answers that each conversation has given
    counts, key = {}, None
    while lost < times:
        within = lost % 2 == 1
        url, _ = servers.start(store, kill_at=rounds.randint(2, 4), within=within, lease_s=0.3)
        with contextlib.suppress(httpx.TransportError), httpx.Client(base_url=url, timeout=60) as http:
            while True:
                if counts.get(key, len(script)) == len(script):
                    key = http.post("/v1/conversations", json={}).json()["id"]
                    counts[key] = 0
                body = {"input": SCRIPTS[0][counts[key]], "conversation": key}
                response = http.post("/v1/responses", json=body)
                if response.status_code == 409:
                    # the lease of the server that was killed
                    time.sleep(0.1)
                    continue
                assert text_of(response) == script[counts[key]]
                counts[key] += 1
        lost += 1
    url, _ = servers.start(store)
    for key, count in counts.items():
        items = httpx.get(f"{url}/v1/conversations/{key}/items?limit=100", timeout=60).json()["data"]
        assert len(items) == 2 * count
    assert sum(counts.values()) >= times


def test_replicas_on_one_redis_answer_each_others_conversations_and_lose_nothing_when_one_is_killed(servers):
    with redis_server() as store:
        replicas = [servers.start(store) for _ in range(2)]
        killed, chance = asyncio.Event(), random.Random(2)

        async def run():
            async with httpx.AsyncClient(timeout=60) as http:
                asked = 0

                async def conversation(script):
                    nonlocal asked
                    answers, previous = [], None
                    while len(answers) < 4:
                        url, _ = chance.choice(replicas)
                        asked += 1
                        if asked == 12:
                            os.kill(replicas[1][1], signal.SIGKILL)
                        body = {"input": SCRIPTS[script][len(answers)], "previous_response_id": previous}
                        try:
                            response = await http.post(f"{url}/v1/responses", json=body)
                        except httpx.TransportError:
                            # asked again, from the same place, of whoever answers
                            killed.set()
                            continue
                        answers.append(text_of(response))
                        previous = response.json()["id"]
                    return answers

                return await asyncio.gather(*(conversation(script) for script in range(6)))

        answers = asyncio.run(run())
        assert killed.is_set()
    assert answers == [alone(script, 4) for script in range(6)]


@pytest.mark.slow
def test_replicas_of_ray_serve_answer_each_others_conversations_and_survive_a_kill():
    psutil = pytest.importorskip("psutil")
    # RXT_RAY_SERVE names the command of another environment that has ray
    command = os.environ.get("RXT_RAY_SERVE") or shutil.which("serve", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the package ray is not installed: pip install 'ray[serve]'")
    root, url = Path(__file__).parent.parent, "http://127.0.0.1:8000"
    with redis_server() as store:
        environment = {**os.environ, "RXT_STORE": store, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen([command, "run", "examples.ray_serve:app"], cwd=root, env=environment, **pipes)
        try:
            end = time.monotonic() + 180
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                assert running.poll() is None and time.monotonic() < end, "ray does not start"
                time.sleep(1)

            def replicas():
                return [
                    process
                    for process in psutil.Process(running.pid).children(recursive=True)
                    if "ServeReplica" in " ".join(process.cmdline())
                ]

            assert len(replicas()) == 2
            killed = []

            async def conversation(http, script):
                answers, previous = [], None
                while len(answers) < 6:
                    if len(answers) == 3 and not killed:
                        killed.append(replicas()[0])
                        killed[0].kill()
                    body = {"input": SCRIPTS[script][len(answers)], "previous_response_id": previous}
                    try:
                        response = await http.post("/v1/responses", json=body)
                    except httpx.TransportError:
                        continue
                    if response.status_code >= 500:
                        # of the proxy, while it finds out
                        await asyncio.sleep(0.5)
                        continue
                    answers.append(text_of(response))
                    previous = response.json()["id"]
                return answers

            answers = asyncio.run(all_of(url, [functools.partial(conversation, script=each) for each in range(6)]))
            assert killed and answers == [alone(script, 6) for script in range(6)]
            key = httpx.post(f"{url}/v1/conversations", json={}, timeout=60).json()["id"]

            async def speak(http):
                return await http.post("/v1/responses", json={"input": "Tell me a joke.", "conversation": key})

            statuses = [response.status_code for response in asyncio.run(all_of(url, [speak] * 6))]
            assert sorted(statuses) == [200, 409, 409, 409, 409, 409]
        finally:
            running.send_signal(signal.SIGINT)
            try:
                running.wait(60)
            finally:
                running.kill()
