# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The bodies that the server takes, with the limits of every field, and the JSON that it gives."""

from typing import Annotated, Any, Literal

from .messages import RequestError
from .state import to_json

try:
    from fastapi import Response
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    raise ImportError(f"The server needs {error.name}: pip install 'rxt-hf[serve]'.") from None

# the first is this server's own: what the answer read of each slot of the memory
OPTIONAL_INCLUDES = {"memory.reads", "reasoning.encrypted_content"}

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Items = Annotated[list[dict[str, Any]], Field(max_length=1024)]
Count = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Reasoning(BaseModel):
    effort: Effort | None = None


class ConversationId(BaseModel):
    id: str


class ContextManagement(BaseModel):
    type: Literal["compaction"]
    compact_threshold: int | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TurnRequest(Body):
    """What both ways to ask for a turn have in common."""

    model: str | None = None
    store: bool | None = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # of Chat Completions; this server takes them in Responses too
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    tools: Items | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    # read by others alone: who asks, what it costs, and how OpenAI caches
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self) -> dict[str, Any]:
        """Returns how the answer is generated, as the arguments of `Service.start`."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
            "streams": bool(self.stream),
        }

    def functions(self, of_tool: Any = lambda tool: tool) -> list[dict[str, Any]] | None:
        """
        Returns the functions that the model may call, as it is told of them.

        Raises: [`RequestError`] for other tools, and for a choice that the model does not have.
        """
        is_free = self.tool_choice in (None, "auto", "none")
        refuse(not is_free, "The model chooses itself: tool_choice is auto or none.", "tool_choice")
        functions = []
        for tool in self.tools or ():
            given = of_tool(tool)
            function: dict[str, Any] = given if isinstance(given, dict) else {}
            is_function = tool.get("type") == "function" and isinstance(function.get("name"), str)
            refuse(not is_function, "Tools are functions with a name.", "tools")
            told = ("name", "description", "parameters")
            functions.append({name: function[name] for name in told if function.get(name)})
        return None if self.tool_choice == "none" else functions or None


class ResponseRequest(TurnRequest):
    input: str | Items | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    context_management: list[ContextManagement] | None = None
    max_output_tokens: Count | None = None
    reasoning: Reasoning | None = None
    text: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None
    prompt_cache_retention: str | None = None

    def check(self) -> None:
        """Raises [`RequestError`] for what the model cannot do."""
        refuse(self.background, "Responses in the background are not supported.", "background")
        refuse(self.top_logprobs, "Log probabilities are not supported.", "top_logprobs")
        refuse(set(self.include or ()) - OPTIONAL_INCLUDES, "Nothing of that can be included.", "include")
        check_format((self.text or {}).get("format"), "text.format")


class ChatRequest(TurnRequest):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: int | None = None
    reasoning_effort: Effort | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def check(self) -> None:
        """Raises [`RequestError`] for what the model cannot do."""
        refuse(self.n not in (None, 1), "One choice is what there is: n is 1.", "n")
        refuse(self.logprobs, "Log probabilities are not supported.", "logprobs")
        refuse(self.frequency_penalty or self.presence_penalty, "Penalties are not supported.", "frequency_penalty")
        refuse(self.logit_bias, "logit_bias is not supported.", "logit_bias")
        check_format(self.response_format, "response_format")


class CompactRequest(Body):
    model: str | None = None
    input: str | Items | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None


class ConversationRequest(Body):
    items: Items | None = None
    metadata: Metadata | None = None


class MetadataRequest(Body):
    metadata: Metadata | None


class ItemsRequest(Body):
    items: Annotated[Items, Field(min_length=1)]


def refuse(condition: Any, message: str, param: str) -> None:
    """Raises [`RequestError`] if the condition holds."""
    if condition:
        raise RequestError(message, param=param)


def check_format(given: Any, param: str) -> None:
    """Raises [`RequestError`] for answers that are not plain text."""
    is_text = given is None or (isinstance(given, dict) and given.get("type") == "text")
    refuse(not is_text, f"The model answers with plain text: {param}.type is text.", param.partition(".")[0])
