# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Bodies, sizes and speeds that no client means well: each gets an error of its own, and the server goes on."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from .serving import TOKENS, free_port, running_server, token_hashes

hypothesis = pytest.importorskip("hypothesis", reason="the package hypothesis is not installed")
st = hypothesis.strategies


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server():
    with running_server(idle_s=0.5) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


def check(response):
    """An answer, or an error in OpenAI's shape that tells nothing of the inside."""
    assert response.status_code < 500, response.text
    assert "Traceback" not in response.text and 'File "' not in response.text
    if response.status_code >= 400:
        assert response.status_code in (400, 403, 404, 405, 408, 409, 413, 429)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and len(response.text) < 2000


TEXTS = st.one_of(
    st.text(st.characters(codec=None), max_size=40),
    st.sampled_from(["", " ", "[A]", "\ud800", "\0", "user", "system", "assistant", "x" * 3000, "resp_" + "0" * 32]),
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2, 2**63, 10**400]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
PARTS = st.one_of(TEXTS, st.lists(st.fixed_dictionaries({"type": TEXTS, "text": JSON}), max_size=3), JSON)
KINDS = ["message", "function_call", "function_call_output", "reasoning", "compaction", "item_reference", "tool"]
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.one_of(st.sampled_from(KINDS), JSON),
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "developer", "tool"]), JSON),
        **dict.fromkeys(("content", "output", "arguments", "name", "encrypted_content"), PARTS),
        "tool_calls": st.one_of(st.lists(st.fixed_dictionaries({"function": JSON}), max_size=2), JSON),
        "id": JSON,
    },
)
SAID = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS})
ITEMS = st.one_of(st.lists(SAID, min_size=1, max_size=3), st.lists(ITEM, max_size=5), PARTS)
TOOLS = st.one_of(
    st.lists(st.fixed_dictionaries({"type": st.sampled_from(["function", "x"]), "name": JSON, "function": JSON})), JSON
)
BODY = st.fixed_dictionaries(
    {"max_output_tokens": st.just(2), "max_tokens": st.just(2)},
    optional={
        **dict.fromkeys(("input", "messages", "items"), ITEMS),
        **dict.fromkeys(("previous_response_id", "conversation", "instructions", "stop", "metadata"), JSON),
        **dict.fromkeys(("temperature", "top_p", "seed", "stream", "store"), st.one_of(NUMBERS, st.booleans(), JSON)),
        **dict.fromkeys(("reasoning", "text", "context_management", "tool_choice", "response_format"), JSON),
        "tools": TOOLS,
    },
)
# what a path takes of a body: the others would only be refused as unknown
FIELDS = {
    "/v1/responses": "input previous_response_id conversation instructions stop metadata temperature top_p seed "
    "stream store reasoning text context_management tool_choice tools max_output_tokens",
    "/v1/responses/compact": "input previous_response_id instructions",
    "/v1/chat/completions": "messages stop metadata temperature top_p seed stream store tool_choice response_format "
    "tools max_tokens",
    "/v1/conversations": "items metadata",
}


def send_bodies(http, count):
    answered = set()

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from(sorted(FIELDS)), BODY)
    def send(path, body):
        body = {name: body[name] for name in FIELDS[path].split() if name in body}
        response = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        check(response)
        answered.add(response.status_code)

    send()
    return answered


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow, id="slow: 1000")])
def test_hostile_bodies_get_errors_of_their_own_and_leave_nothing(server, http, count):
    answered = send_bodies(http, count)
    # some of them do reach the model
    assert {200, 400} <= answered
    service = server[1]
    assert service.engine.active == service.engine.waiting == 0 and not service.jobs and not service.load
    good = http.post("/v1/responses", json={"input": "My dog is called Mochi."})
    assert "Mochi" in good.text


RAW = {
    "no json": b"{",
    "no utf-8": b'{"input": "\xff\xfe"}',
    "deep": b'{"input": ' + b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "long number": b'{"seed": ' + b"9" * 100_000 + b"}",
    "a list": b"[]",
    "nothing": b"",
    "half a character": b'{"input": "\\ud800"}',
    "half a character in a message": b'{"messages": [{"role": "user", "content": "a\\udfff"}]}',
    "not a number": b'{"input": "x", "temperature": NaN}',
    "too large a number": b'{"input": "x", "temperature": 1e999}',
    "long text": b'{"input": "' + b"a" * 200_000 + b'"}',
    "many items": b'{"input": [' + b'{"role": "user", "content": "a"},' * 5000 + b"{}]}",
}


OTHER_KINDS = {
    "/v1/responses": [
        {"input": [{"role": ["user"], "content": "x"}]},
        {"input": [{"type": {"a": 1}, "role": "user", "content": "x"}]},
        {"input": "x", "text": {"format": ["text"]}},
        {"input": "x", "tools": [{"type": "function", "function": 3}]},
        {"input": [{"type": "reasoning", "content": 3}]},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": {"user": 1}, "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": 3}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": [], "arguments": {}}}]}]},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": ["text"]}},
    ],
}


@pytest.mark.parametrize("path, body", [(path, body) for path, bodies in OTHER_KINDS.items() for body in bodies])
def test_json_of_another_kind_than_the_field_takes_is_refused(http, path, body):
    response = http.post(path, json=body)
    check(response)
    assert response.status_code == 400


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/conversations"])
@pytest.mark.parametrize("body", RAW.values(), ids=RAW)
def test_bodies_that_are_no_request_are_refused(http, path, body):
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    check(response)
    assert response.status_code == 400 or (path, body) == ("/v1/conversations", b"")


@pytest.mark.parametrize(
    "key", ["..%2f..%2fetc", "resp_%00", "conv_" + "a" * 500, "resp_ü", "conv_'; drop table", "%ff"]
)
def test_ids_that_were_never_given_are_not_found(http, key):
    for method, path in (
        ("GET", f"/v1/responses/{key}"),
        ("DELETE", f"/v1/responses/{key}"),
        ("POST", f"/v1/responses/{key}/cancel"),
        ("GET", f"/v1/conversations/{key}/items"),
        ("DELETE", f"/v1/conversations/{key}"),
        ("GET", f"/v1/memories/{key}"),
    ):
        response = http.request(method, path)
        check(response)
        assert response.status_code in (404, 405)


def raw_connection(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 30)


HEAD = b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def answer_of(connection):
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server):
    with raw_connection(server[0]) as connection:
        connection.sendall(HEAD + b"content-length: 99999999999\r\n\r\n" + b"x" * 1000)
        assert answer_of(connection).startswith(b"HTTP/1.1 413 ")
    with raw_connection(server[0]) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        # it answers and closes long before four megabytes
        with pytest.raises(OSError):
            for _ in range(64):
                connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                time.sleep(0.01)


def test_slow_clients_are_let_go(server, monkeypatch):
    url, service = server
    monkeypatch.setattr("rxt_hf.serving.guard.BODY_TIMEOUT_S", 0.3)
    with raw_connection(url) as connection:
        connection.sendall(HEAD + b'content-length: 1000\r\n\r\n{"input"')
        assert answer_of(connection).startswith(b"HTTP/1.1 408 ")
    for said in (b"", b"POST /v1/resp", HEAD):
        start = time.monotonic()
        with raw_connection(url) as connection:
            connection.sendall(said)
            assert answer_of(connection) == b""
        assert time.monotonic() - start < 20
    assert not service.jobs


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(server, http):
    for _ in range(20):
        with raw_connection(server[0]) as connection:
            connection.sendall(HEAD + b'content-length: 1000\r\n\r\n{"input"')
    check(http.get("/v1/models"))
    assert not server[1].jobs


def test_errors_of_the_inside_are_not_told(monkeypatch):
    with running_server() as (url, service):
        monkeypatch.setattr(service.store, "put", lambda *_: 1 / 0)
        response = httpx.post(f"{url}/v1/responses", json={"input": "My dog is called Rex."}, timeout=60)
        assert response.status_code == 500 and response.json()["error"]["code"] == "server_error"
        assert "division" not in response.text and not service.jobs and not service.load
        body = {"input": "My dog is called Rex.", "stream": True}
        assert '"status":"failed"' in httpx.post(f"{url}/v1/responses", json=body, timeout=60).text
        body = {"messages": [{"role": "user", "content": "My dog is called Rex."}], "stream": True}
        assert "server_error" in httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text
        # a turn that fails inside the engine
        monkeypatch.undo()
        monkeypatch.setattr(service.engine, "_join", lambda turns: 1 / 0)
        response = httpx.post(f"{url}/v1/responses", json={"input": "My dog is called Rex."}, timeout=60)
        assert response.status_code == 500 and "division" not in response.text


def test_an_address_that_others_reach_needs_tokens(tmp_path):
    from rxt_hf.serving.guard import check_address, read_tokens

    for host in ("127.0.0.1", "::1", "localhost"):
        check_address(host, False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        check_address(host, True)
        with pytest.raises(ValueError, match=f"who reaches {host} could read"):
            check_address(host, False)
    (tmp_path / "tokens").write_text(f"# who\n\n{TOKENS['ann']} ann\n{TOKENS['bob']}\tbob\n")
    assert read_tokens(tmp_path / "tokens") == token_hashes()
    for line in ("short ann", TOKENS["ann"], f"{TOKENS['ann']} ann extra", f"{TOKENS['ann']} a:b"):
        (tmp_path / "tokens").write_text(line)
        with pytest.raises(ValueError, match="tokens line 1: expected"):
            read_tokens(tmp_path / "tokens")
    (tmp_path / "tokens").write_text("# nobody\n")
    with pytest.raises(ValueError, match="holds no token"):
        read_tokens(tmp_path / "tokens")


def run_rxt_serve(*arguments):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "rxt_hf.cli", "serve", *arguments]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_says_each_step_serves_and_ends_when_it_is_told_to():
    port = free_port()
    with run_rxt_serve("--port", str(port), "--store", "memory", "--max-rows", "2") as process:
        try:
            lines = [process.stdout.readline() for _ in range(4)]
            assert [line.split()[0] for line in lines] == ["model", "store", "engine", "listens"]
            end = time.monotonic() + 30
            while True:
                try:
                    assert httpx.get(f"http://127.0.0.1:{port}/ready").json() == {"status": "ready"}
                    break
                except httpx.TransportError:
                    assert time.monotonic() < end
                    time.sleep(0.05)
            process.terminate()
            assert process.wait(40) == 0
            assert process.stdout.read().split()[0] == "ended"
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(server):
    binary = shutil.which("st", path=str(Path(sys.executable).parent))
    if binary is None:
        pytest.skip("the package schemathesis is not installed")
    url = f"{server[0]}/openapi.json"
    options = ["--checks", "not_a_server_error", "--max-examples", "60", "--phases", "fuzzing", "--seed", "1"]
    done = subprocess.run([binary, "run", url, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
