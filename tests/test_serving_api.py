# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Every endpoint, driven by OpenAI's own Python client over a socket."""

import ast
import itertools
import json
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.conversations import Conversation, ConversationItem
from openai.types.responses import CompactedResponse, Response, ResponseStreamEvent
from pydantic import TypeAdapter

from rxt_hf import RxTSession, STMCache

from .models import close
from .serving import TOKENS, demo, openai_client, running_server, scripted, token_hashes

FACT, QUESTION = "My dog is called Mochi.", "What is my dog called?"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server():
    with running_server(tokens=token_hashes()) as running:
        yield running


@pytest.fixture
def service(server):
    return server[1]


@pytest.fixture
def client(server):
    return openai_client(server[0])


@pytest.fixture
def http(server):
    headers = {"authorization": f"Bearer {TOKENS['ann']}"}
    with httpx.Client(base_url=server[0], headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def turns(service, monkeypatch):
    """The turns that the engine gets."""
    seen, submit = [], service.engine.submit
    monkeypatch.setattr(service.engine, "submit", lambda turn: (seen.append(turn), submit(turn))[1])
    return seen


def ask(client, text, **kwargs):
    response = client.responses.create(model="rxt", input=text, **kwargs)
    Response.model_validate(response.to_dict())
    return response


def told(*texts):
    """The answers of a session that is told these."""
    session = RxTSession(*demo())
    return [session.send(text) for text in texts]


def refused(status, call, *args, code=None, **kwargs):
    with pytest.raises(openai.APIStatusError) as caught:
        call(*args, **kwargs)
    assert caught.value.status_code == status
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    assert code is None or body["code"] == code
    return body["message"]


# Responses


def test_a_response_is_what_a_session_says_and_a_place_to_go_on_from(client):
    first = ask(client, FACT)
    assert first.status == "completed" and first.output_text == told(FACT)[0]
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens > 10
    second = ask(client, QUESTION, previous_response_id=first.id)
    assert second.output_text == told(FACT, QUESTION)[1] and "Mochi" in second.output_text
    # the fork point is as it was
    other = ask(client, "My dog is called Rex.", previous_response_id=first.id)
    assert other.output_text == told(FACT, "My dog is called Rex.")[1]
    assert ask(client, QUESTION, previous_response_id=first.id).output_text == second.output_text
    assert "Mochi" not in ask(client, QUESTION).output_text


def test_a_stored_response_is_read_listed_and_deleted(client):
    first = ask(client, FACT, metadata={"purpose": "test"}, instructions="Be brief.")
    found = client.responses.retrieve(first.id)
    assert found.to_dict() == first.to_dict() and found.metadata == {"purpose": "test"}
    (item,) = client.responses.input_items.list(first.id).data
    assert item.role == "user" and item.content[0].text == FACT
    client.responses.delete(first.id)
    refused(404, client.responses.retrieve, first.id)
    refused(404, ask, client, QUESTION, previous_response_id=first.id, code="not_found")
    refused(404, client.responses.delete, first.id)


def test_a_stream_has_the_events_of_the_types_and_joins_to_the_answer(client):
    first = ask(client, FACT)
    events = list(client.responses.create(model="rxt", input=QUESTION, previous_response_id=first.id, stream=True))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    # how many there are is a matter of time: what waits when the loop wakes goes out as one
    assert all(pieces) and "".join(pieces) == told(FACT, QUESTION)[1]
    first_kinds, last_kinds = kinds[:4], kinds[-4:]
    assert first_kinds == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert last_kinds == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    last = events[-1].response
    assert last.output_text == "".join(pieces) and last.id == events[0].response.id
    assert client.responses.retrieve(last.id).output_text == last.output_text
    with client.responses.stream(model="rxt", input=QUESTION, previous_response_id=first.id) as stream:
        assert stream.get_final_response().output_text == last.output_text


def test_what_is_not_stored_is_not_there(client, service):
    before = service.store.usage("ann").records
    response = ask(client, FACT, store=False)
    assert service.store.usage("ann").records == before
    refused(404, client.responses.retrieve, response.id)
    refused(404, ask, client, QUESTION, previous_response_id=response.id)


def test_a_client_that_stores_nothing_carries_its_memory_sealed(client, service):
    before = service.store.usage("ann").records
    compaction = [{"type": "compaction"}]
    first = ask(client, FACT, store=False, context_management=compaction)
    assert [item.type for item in first.output] == ["message", "compaction"]
    history = [item.to_dict() for item in first.output]
    second = ask(client, [*history, {"role": "user", "content": QUESTION}], store=False, context_management=compaction)
    assert second.output_text == told(FACT, QUESTION)[1]
    assert service.store.usage("ann").records == before
    sealed = history[-1]
    bob = openai_client(str(client.base_url).removesuffix("/v1/"), "bob")
    question = {"role": "user", "content": QUESTION}
    refused(400, ask, bob, [sealed, question], code="invalid_compaction_item")
    content = sealed["encrypted_content"]
    damaged = content[:200] + ("A" if content[200] != "A" else "B") + content[201:]
    refused(400, ask, client, [{**sealed, "encrypted_content": damaged}, question], code="invalid_compaction_item")
    refused(400, ask, client, [sealed, question], previous_response_id=new_response(client))


def new_response(client):
    return ask(client, FACT).id


def test_compaction_of_a_history_is_its_memory(client):
    first = ask(client, FACT)
    history = [
        {"role": "user", "content": "I live in Lisbon."},
        {"role": "assistant", "content": "Noted, you live in Lisbon."},
    ]
    compacted = client.responses.compact(model="rxt", previous_response_id=first.id, input=history)
    CompactedResponse.model_validate(compacted.to_dict())
    items = [item.to_dict() for item in compacted.output]
    assert [item["type"] for item in items] == ["compaction"]
    for question, word in ((QUESTION, "Mochi"), ("Where do I live?", "Lisbon")):
        assert word in ask(client, [*items, {"role": "user", "content": question}]).output_text
    # what is not answered yet goes along
    compacted = client.responses.compact(model="rxt", previous_response_id=first.id, input=QUESTION)
    items = [item.to_dict() for item in compacted.output]
    assert [item["type"] for item in items] == ["compaction"]
    answer = ask(client, [*items, {"role": "user", "content": "Please."}])
    assert answer.output_text == told(FACT, f"{QUESTION}\nPlease.")[1]


def test_instructions_are_of_one_turn_and_a_system_item_of_all(client, service, turns):
    def written(response, *before):
        """What the memory of a response holds, and what it would hold had these been written and the turn."""
        value, _ = service.store.get("ann", response.id)
        interactions = [*before, [*prompt, *turns[-1].token_ids]]
        return service._unpack(value)[1].states, demo()[0].replay(None, interactions).states

    fact = {"role": "user", "content": FACT}
    prompt = service.codec.prompt(fact, None, False)[0]
    plain = ask(client, FACT)
    close(*written(plain), 1e-4)
    instructed = ask(client, FACT, instructions="Say nothing of dogs.")
    assert demo()[1].decode(turns[-1].prompt).startswith("[BOS][I]Say nothing of dogs.[Q]")
    assert instructed.usage.input_tokens > plain.usage.input_tokens
    close(*written(instructed), 1e-4)
    system = ask(client, [{"role": "developer", "content": "My cat is called Tom."}, fact])
    instruction = service.codec.interaction([{"role": "system", "content": "My cat is called Tom."}])
    close(*written(system, instruction), 1e-4)
    found, without = written(system)
    assert (found - without).abs().max() > 0.01


def test_a_history_in_the_input_is_replayed(client):
    history = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "My dog is "}, {"type": "input_text", "text": "called Mochi."}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": told(FACT)[0], "annotations": []}]},
        {"role": "user", "content": QUESTION},
    ]
    assert ask(client, history).output_text == told(FACT, QUESTION)[1]


def test_limits_and_samplings_are_those_of_the_request(client, turns):
    cut = ask(client, FACT, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage.output_tokens == 3
    events = list(client.responses.create(model="rxt", input=FACT, max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"
    stopped = ask(client, FACT, extra_body={"stop": [" name"]})
    assert stopped.output_text == told(FACT)[0].partition(" name")[0] and stopped.status == "completed"
    wild = {"temperature": 1.5, "top_p": 0.75}
    sampled = ask(client, FACT, **wild, extra_body={"seed": 7})
    assert (turns[-1].temperature, turns[-1].top_p, turns[-1].seed) == (1.5, 0.75, 7)
    assert (sampled.temperature, sampled.top_p) == (1.5, 0.75)
    ask(client, FACT)
    assert (turns[-1].temperature, turns[-1].top_p, turns[-1].seed) == (0.0, 1.0, None)


def test_a_streamed_response_is_cancelled_by_its_id(client, service, monkeypatch):
    step = service.engine._step
    monkeypatch.setattr(service.engine, "_step", lambda: (time.sleep(0.05), step()))
    before = service.store.usage("ann").records
    with client.responses.create(model="rxt", input="Tell me a joke.", stream=True) as stream:
        events = iter(stream)
        key = next(events).response.id
        assert client.responses.cancel(key).status == "cancelled"
        last = list(events)[-1]
    assert last.type == "response.incomplete" and last.response.status == "cancelled"
    assert service.store.usage("ann").records == before
    refused(404, client.responses.cancel, key)
    refused(400, client.responses.cancel, new_response(client), code="response_finished")


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row_and_stores_nothing(server, service, monkeypatch, stream):
    step = service.engine._step
    monkeypatch.setattr(service.engine, "_step", lambda: (time.sleep(0.2), step()))
    before, headers = service.store.usage("ann").records, {"authorization": f"Bearer {TOKENS['ann']}"}
    body = {"input": "Tell me a joke.", "stream": stream, "temperature": 2.0, "max_output_tokens": 200}
    timeout = httpx.Timeout(30, read=0.3)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server[0], headers=headers, timeout=timeout) as http:
        if stream:
            with http.stream("POST", "/v1/responses", json=body) as response:
                next(response.iter_lines())
            raise httpx.ReadTimeout("left after the first line")
        http.post("/v1/responses", json=body)
    turns = service.engine.steps
    wait_for(lambda: service.engine.active == 0)
    assert service.engine.steps - turns < 10
    wait_for(lambda: not service.jobs and not service.load)
    assert service.store.usage("ann").records == before


def test_a_response_may_tell_what_its_answer_read(client):
    first = ask(client, FACT)
    asked = {"model": "rxt", "input": QUESTION, "previous_response_id": first.id}
    reads = torch.tensor(client.responses.create(**asked, include=["memory.reads"]).memory_reads)
    assert reads.shape == (2, 40) and reads.std() > 0.001
    close(reads.sum(-1), torch.ones(2))
    # another memory is read otherwise
    del asked["previous_response_id"]
    other = client.responses.create(**asked, include=["memory.reads"])
    assert (torch.tensor(other.memory_reads) - reads).abs().max() > 0.01
    refused(400, client.responses.create, **asked, include=["file_search_call.results"])


# Conversations


def test_a_conversation_goes_on_and_lists_its_items(client):
    conversation = client.conversations.create(metadata={"name": "dogs"})
    Conversation.model_validate(conversation.to_dict())
    first = ask(client, FACT, conversation=conversation.id)
    second = ask(client, QUESTION, conversation={"id": conversation.id})
    assert [first.output_text, second.output_text] == told(FACT, QUESTION)
    assert second.conversation.id == conversation.id
    items = list(client.conversations.items.list(conversation.id, order="asc", limit=1))
    for item in items:
        TypeAdapter(ConversationItem).validate_python(item.to_dict())
    assert [item.content[0].text for item in items] == [FACT, first.output_text, QUESTION, second.output_text]
    assert [item.id for item in client.conversations.items.list(conversation.id)] == [item.id for item in items][::-1]
    assert (
        client.conversations.items.retrieve(items[2].id, conversation_id=conversation.id).to_dict()
        == items[2].to_dict()
    )
    refused(404, client.conversations.items.retrieve, "msg_0", conversation_id=conversation.id)
    refused(400, client.conversations.items.delete, items[0].id, conversation_id=conversation.id)
    # a response of a conversation is a fork point too
    assert ask(client, QUESTION, previous_response_id=first.id).output_text == second.output_text


def test_a_conversation_is_renamed_and_deleted_with_all_that_belongs_to_it(client, service):
    before = service.store.usage("ann").records
    conversation = client.conversations.create()
    ask(client, FACT, conversation=conversation.id, store=False)
    assert client.conversations.update(conversation.id, metadata={"name": "new"}).metadata == {"name": "new"}
    assert client.conversations.retrieve(conversation.id).metadata == {"name": "new"}
    assert "Mochi" in ask(client, QUESTION, conversation=conversation.id, store=False).output_text
    assert service.store.usage("ann").records > before
    assert client.conversations.delete(conversation.id).deleted
    assert service.store.usage("ann").records == before
    refused(404, client.conversations.retrieve, conversation.id)
    refused(404, ask, client, FACT, conversation=conversation.id)


def test_items_that_are_added_are_remembered_and_an_open_question_waits_for_its_answer(client):
    told_before = [{"role": "user", "content": FACT}, {"role": "assistant", "content": told(FACT)[0]}]
    conversation = client.conversations.create(items=[*told_before, {"role": "user", "content": "I live in Lisbon."}])
    added = client.conversations.items.create(conversation.id, items=[{"role": "assistant", "content": "Noted."}])
    assert [item.content[0].text for item in added.data] == ["Noted."]
    assert "Mochi" in ask(client, QUESTION, conversation=conversation.id).output_text
    client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "What is"}])
    answer = ask(client, "my dog called?", conversation=conversation.id)
    assert "Mochi" in answer.output_text


# Chat Completions


def complete(client, *messages, **kwargs):
    roles = ("user", "assistant") * len(messages)
    messages = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return client.chat.completions.create(model="rxt", messages=kwargs.pop("system", []) + messages, **kwargs)


def test_a_chat_that_sends_its_history_is_replayed_only_where_it_is_new(client, turns):
    first = complete(client, FACT)
    ChatCompletion.model_validate(first.to_dict())
    answer = first.choices[0].message.content
    assert [answer] == told(FACT) and first.choices[0].finish_reason == "stop"
    second = complete(client, FACT, answer, QUESTION)
    assert second.choices[0].message.content == told(FACT, QUESTION)[1]
    assert [len(turn.replay) for turn in turns] == [0, 0]
    # an edited history is another one, and is answered by the edit
    edited = complete(client, "My dog is called Rex.", "Okay.", QUESTION)
    assert "Rex" in edited.choices[0].message.content and "Mochi" not in edited.choices[0].message.content
    assert [len(turn.replay) for turn in turns] == [0, 0, 1]
    longer = [FACT, answer, QUESTION, second.choices[0].message.content, "I live in Lisbon.", "Nice.", QUESTION]
    assert "Mochi" in complete(client, *longer).choices[0].message.content
    assert [len(turn.replay) for turn in turns] == [0, 0, 1, 1]


def test_a_system_message_is_the_beginning_of_its_chat(client, service):
    system = [{"role": "system", "content": "My dog is called Mochi."}]
    assert (
        complete(client, QUESTION, system=system).usage.prompt_tokens > complete(client, QUESTION).usage.prompt_tokens
    )


def test_chunks_of_a_chat_join_to_its_answer(client):
    chunks = list(complete(client, FACT, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict())
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert ["".join(pieces)] == told(FACT) and len(pieces) > 3
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 3
    cut = complete(client, FACT, max_tokens=2, stop="zzz")
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def test_a_chat_that_is_not_stored_leaves_nothing(client, service):
    before = service.store.usage("ann").records
    complete(client, "My parrot is called Coco.", store=False)
    assert service.store.usage("ann").records == before


# Tools and reasoning

TOOL = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}


def spelled(*parts):
    """Token ids of texts and control tokens."""
    tokenizer = demo()[1]
    ids = [
        [getattr(tokenizer, f"{part}_token_id")]
        if part in ("answer", "tool_call", "eos")
        else tokenizer(part)["input_ids"]
        for part in parts
    ]
    return list(itertools.chain(*ids))


def test_a_call_of_a_function_comes_and_its_output_goes_back(client, service, turns, monkeypatch):
    script = spelled("tool_call", '{"name": "weather", "arguments": {"town": "Rome"}}', "eos")
    tools, question = [{"type": "function", **TOOL, "strict": False}], {"role": "user", "content": "Weather in Rome?"}
    with monkeypatch.context() as patch:
        scripted(service.engine, patch, script)
        first = ask(client, [question], tools=tools)
        events = list(client.responses.create(model="rxt", input=[question], tools=tools, stream=True))
    (call,) = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"town": "Rome"})
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict())
    assert events[-1].response.output[0].arguments == call.arguments
    assert "response.function_call_arguments.done" in [event.type for event in events]
    turns.clear()
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    assert ask(client, [output], previous_response_id=first.id, tools=tools).output_text
    tokenizer = demo()[1]
    # the tools are in the memory already, and the output is a turn of its own kind
    assert tokenizer.decode(turns[0].prompt) == "[BOS][U]sunny[A]" and turns[0].replay == []
    # the same as a whole history
    ask(client, [question, call.to_dict(), output], tools=tools)
    decoded = [tokenizer.decode(ids) for ids in turns[1].replay]
    assert decoded[0].startswith('[BOS][I]Tools: [{"description": "The weather.", "name": "weather"')
    assert decoded[1].startswith('[BOS][Q]Weather in Rome?[A][C]{"name": "weather", "arguments": ')
    assert decoded[1].endswith("[EOS]") and tokenizer.decode(turns[1].prompt) == "[BOS][U]sunny[A]"


def test_a_chat_calls_functions_too(client, service, turns, monkeypatch):
    script = spelled("Wait.", "tool_call", '{"name": "weather", "arguments": {}}', "tool_call", "no json", "eos")
    scripted(service.engine, monkeypatch, script)
    tools = [{"type": "function", "function": TOOL}]
    message = complete(client, "Weather?", tools=tools).choices[0].message
    assert message.content == "Wait.no json" and message.tool_calls[0].function.name == "weather"
    chunks = list(complete(client, "Weather?", tools=tools, stream=True))
    calls = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert calls[0][0].function.arguments == "{}" and chunks[-1].choices[0].finish_reason == "tool_calls"
    history = [
        {"role": "user", "content": "Weather?"},
        message.to_dict(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    turns.clear()
    client.chat.completions.create(model="rxt", messages=history, tools=tools)
    # the call and what came before it are known
    assert turns[0].replay == [] and demo()[1].decode(turns[0].prompt) == "[BOS][U]sunny[A]"


def test_thoughts_are_told_from_the_answer(client, service, monkeypatch):
    scripted(service.engine, monkeypatch, spelled("Let me see.", "answer", "Yes.", "eos"))
    response = ask(client, QUESTION, reasoning={"effort": "low"})
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "Let me see." and response.output_text == "Yes."
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    events = list(client.responses.create(model="rxt", input=QUESTION, reasoning={"effort": "low"}, stream=True))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict())
    assert events[-1].response.output_text == "Yes."
    chat = complete(client, QUESTION, reasoning_effort="low").choices[0].message
    assert chat.content == "Yes." and chat.reasoning_content == "Let me see."


# Models, memories, metrics


def test_models_are_listed_with_the_size_of_their_memory(client):
    (model,) = client.models.list().data
    assert model.id == "rxt" and model.memory_bytes == 40960 and model.cache_bytes_per_token == 2048
    assert client.models.retrieve("rxt").to_dict() == model.to_dict()
    refused(404, client.models.retrieve, "gpt", code="model_not_found")
    refused(404, client.responses.create, model="gpt", input=FACT, code="model_not_found")


def test_a_memory_is_a_file_that_goes_out_and_comes_in(client, http, tmp_path):
    response = ask(client, FACT)
    content = http.get(f"/v1/memories/{response.id}").content
    (tmp_path / "memory").write_bytes(content)
    memory = STMCache.load(tmp_path / "memory", model=demo()[0])
    session = RxTSession(*demo(), stm_cache=memory)
    assert "Mochi" in session.send(QUESTION)
    assert http.put("/v1/memories/mem_mine", content=content).json()["turns"] == 1
    assert "Mochi" in ask(client, QUESTION, previous_response_id="mem_mine").output_text
    small = memory.to_bytes(torch.int8)
    assert http.put("/v1/memories/mem_small", content=small).status_code == 200 and len(small) < len(content) / 3
    assert "Mochi" in ask(client, QUESTION, previous_response_id="mem_small").output_text
    assert http.delete("/v1/memories/mem_mine").json()["deleted"]
    assert http.get("/v1/memories/mem_mine").status_code == 404
    for bad, status in (
        (content[:-1], 400),
        (b"", 400),
        (memory.replace(memory.states * 1e6).to_bytes(), 400),
        (STMCache(memory.states, 1, "others").to_bytes(), 409),
        (content * 3, 413),
    ):
        assert http.put("/v1/memories/mem_bad", content=bad).status_code == status
    assert http.put("/v1/memories/conv_0", content=content).status_code == 400


def test_health_readiness_and_metrics(server, http, client):
    ask(client, FACT)
    with httpx.Client(base_url=server[0]) as nobody:
        assert nobody.get("/health").json() == {"status": "ok"}
        assert nobody.get("/ready").json() == {"status": "ready"}
        assert nobody.get("/metrics").status_code == 401
        assert nobody.get("/").status_code == 200
    text = http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["rxt_rows_max"]) == 8 and float(values["rxt_tokens_generated"]) > 5
    assert float(values['rxt_turns_total{reason="stop"}']) >= 1
    assert float(values["rxt_store_bytes"]) > 40960 and FACT not in text


# Who may do what


def test_without_a_token_there_is_nothing_and_with_another_ones_nothing_of_this_ones(server, client):
    for key in ("", "token-of-ann-012345678", "token-of-ann-01234567890", "x" * 5000):
        stranger = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=key or "x", max_retries=0)
        refused(401, stranger.models.list, code="invalid_api_key")
    mine = ask(client, FACT).id
    conversation = client.conversations.create().id
    bob = openai_client(server[0], "bob")
    refused(404, bob.responses.retrieve, mine)
    refused(404, bob.responses.delete, mine)
    refused(404, ask, bob, QUESTION, previous_response_id=mine)
    refused(404, ask, bob, QUESTION, conversation=conversation)
    refused(404, bob.conversations.delete, conversation)
    headers = {"authorization": f"Bearer {TOKENS['bob']}"}
    assert httpx.get(f"{server[0]}/v1/memories/{mine}", headers=headers).status_code == 404
    complete(client, "My dog is called Bello.")
    assert client.responses.retrieve(mine).id == mine


def test_bobs_chat_does_not_find_anns_memory(server, client, turns):
    answer = complete(client, "My dog is called Bello.").choices[0].message.content
    turns.clear()
    for tenant in ("ann", "bob"):
        complete(openai_client(server[0], tenant), "My dog is called Bello.", answer, QUESTION)
    assert [len(turn.replay) for turn in turns] == [0, 1]


def test_without_text_kept_a_response_is_a_place_without_words(tmp_path):
    path = tmp_path / "states.db"
    with running_server(path, keeps_text=False) as (url, _):
        client = openai_client(url)
        first = ask(client, FACT)
        assert first.output_text == told(FACT)[0]
        conversation = client.conversations.create()
        ask(client, FACT, conversation=conversation.id)
        found = client.responses.retrieve(first.id)
        assert found.output_text == "" and found.status == "completed"
        assert client.responses.input_items.list(first.id).data == []
        assert list(client.conversations.items.list(conversation.id)) == []
        assert "Mochi" in ask(client, QUESTION, previous_response_id=first.id).output_text
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"Mochi" not in content and first.id.encode() in content


def test_what_is_kept_and_what_is_sealed_outlives_the_server_but_not_its_weights(tmp_path):
    with running_server(tmp_path / "states.db") as (url, _):
        first = ask(openai_client(url), FACT, context_management=[{"type": "compaction"}])
    sealed = first.output[-1].to_dict()
    question = {"role": "user", "content": QUESTION}
    with running_server(tmp_path / "states.db") as (url, _):
        client = openai_client(url)
        assert "Mochi" in ask(client, QUESTION, previous_response_id=first.id).output_text
        assert "Mochi" in ask(client, [sealed, question]).output_text
    other = type(demo()[0])(demo()[0].config)
    with running_server(tmp_path / "states.db", model=other) as (url, _):
        client = openai_client(url)
        refused(409, ask, client, QUESTION, previous_response_id=first.id, code="weights_changed")
        refused(400, ask, client, [sealed, question], code="invalid_compaction_item")
        assert ask(client, FACT).status in ("completed", "incomplete")


def test_pages_of_other_sites_and_names_that_point_here_are_refused():
    with running_server() as (url, _):
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"host": "evil.example:80"}):
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 403
        for headers in ({}, {"origin": url}, {"host": "localhost:1"}, {"host": "[::1]:1"}):
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_states_turns_and_waiting_are_bounded():
    with running_server(max_rows=1, max_waiting=1, max_records_per_tenant=3) as (url, service):
        client = openai_client(url)
        for _ in range(3):
            ask(client, FACT)
        refused(429, ask, client, FACT, code="state_limit")
        assert ask(client, FACT, store=False).status == "completed"
        step, gate = service.engine._step, threading.Semaphore(0)
        service.engine._step = lambda: (gate.acquire(), step())
        stream = {"model": "rxt", "input": FACT, "store": False, "stream": True}
        streams = [client.responses.create(**stream)]
        gate.release()
        wait_for(lambda: service.engine.active == 1)
        streams.append(client.responses.create(**stream))
        wait_for(lambda: service.engine.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, FACT, store=False)
        assert caught.value.response.headers["retry-after"] == "1"
        gate.release(1000)
        assert [list(stream)[-1].type for stream in streams] == ["response.completed"] * 2


def test_a_turn_that_takes_too_long_is_ended(monkeypatch):
    with running_server(timeout_s=0.2) as (url, service):
        step = service.engine._step
        service.engine._step = lambda: (time.sleep(0.1), step())
        client = openai_client(url)
        refused(408, ask, client, "Tell me a joke.", max_output_tokens=100, temperature=2.0, code="timeout")
        events = list(
            client.responses.create(model="rxt", input=FACT, max_output_tokens=100, temperature=2.0, stream=True)
        )
        assert events[-1].type == "response.failed" and "timeout" in events[-1].response.error.message


def test_the_transcript_of_the_documents_is_what_happens(capsys):
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    lines, shown = code.splitlines(), 0
    with running_server(name="demo", keeps_text=False) as (url, _):
        names = {}
        for node in ast.parse(code.replace("http://127.0.0.1:8000", url)).body:
            comment = lines[node.end_lineno] if node.end_lineno < len(lines) else ""
            if isinstance(node, ast.Expr) and comment.startswith('# "'):
                assert eval(ast.unparse(node), names) == ast.literal_eval(comment[2:])
                shown += 1
            else:
                exec(ast.unparse(node), names)
    assert shown == 4 and len(capsys.readouterr().out) > 10
