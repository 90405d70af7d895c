"""The shapes of answers, as ``/openapi.json`` tells them. Nothing is built from them: answers
are written as plain values, and tests hold the two against each other.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AdminModel",
    "AdminModels",
    "AnthropicError",
    "Anything",
    "ChatCompletion",
    "Completion",
    "EmbeddingList",
    "Health",
    "Message",
    "Model",
    "ModelList",
    "OpenAIError",
    "Plan",
    "Readiness",
    "Reload",
    "Response",
    "Version",
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Anything(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(_Answer):
    """OpenAI's error object."""

    error: ErrorDetail


class AnthropicErrorDetail(_Answer):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(_Answer):
    """Anthropic's error object."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class CachedTokens(_Answer):
    """What of the prompt's work was not done again."""

    cached_tokens: int


class Usage(_Answer):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(_Answer):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """Log probabilities of the answer's tokens."""

    content: list[TokenEntry]
    refusal: None


class AssistantMessage(_Answer):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Answer):
    """An answered conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None


class CompletionLogprobs(_Answer):
    """Log probabilities of the text's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Answer):
    """Continued prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None


class Embedding(_Answer):
    """A text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Answer):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Answer):
    """Vectors in the order of the texts."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class OutputText(_Answer):
    """A part of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(_Answer):
    """A message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class Response(BaseModel):
    """OpenAI's response object."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[OutputMessage]
    store: Literal[False]
    usage: dict[str, Any] | None


class TextBlock(_Answer):
    """A part of the answer."""

    type: Literal["text"]
    text: str
    citations: None


class AnthropicUsage(_Answer):
    """Tokens read, those from the cache apart, and written."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(_Answer):
    """Anthropic's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    stop_reason: Literal["end_turn", "stop_sequence", "max_tokens"]
    stop_sequence: str | None
    usage: AnthropicUsage


class Model(_Answer):
    """A model, under its id or an alias."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelList(_Answer):
    """The models."""

    object: Literal["list"]
    data: list[Model]


class Health(_Answer):
    """The process answers."""

    status: Literal["ok"]


class Readiness(_Answer):
    """Whether requests should be sent here, and why not."""

    status: Literal["ready", "not ready"]
    reasons: list[str]


class Version(_Answer):
    """Which engineroom it is."""

    version: str


class AdminModel(_Answer):
    """A model and how it is."""

    id: str
    state: str = Field(examples=["ready"])
    aliases: list[str]
    runtime: str | None
    leases: int
    memory_bytes: int | None
    max_context_tokens: int | None
    failed: bool


class AdminModels(_Answer):
    """Every model and how it is."""

    models: list[AdminModel]


class Plan(_Answer):
    """What the model manager's plan says."""

    plan: Any


class Reload(_Answer):
    """What the model manager's reload says."""

    reload: Any
