"""``POST /api/chat`` and ``POST /api/generate``: Ollama's API, text in and text out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, Tag

from engineroom.field_types import either
from engineroom.schemas import InferenceRequest
from engineroom.server.apis.ollama_answers import (
    ChatLines,
    GenerateLines,
    OllamaChat,
    OllamaGenerated,
    OllamaWriter,
)
from engineroom.server.apis.ollama_common import (
    NDJSON,
    WORK_ERRORS,
    OllamaError,
    load_or_unload,
    served_name,
    status_of,
)
from engineroom.server.apis.ollama_messages import OllamaInput, OllamaTools, messages_of
from engineroom.server.apis.ollama_options import (
    DEFAULTS,
    PLACES,
    KeepAlive,
    OllamaOptions,
    told_in_vain,
    told_of_keep_alive,
)
from engineroom.server.apis.request_fields import (
    Generating,
    build,
    chat_message,
    params_of,
    parse,
)
from engineroom.server.apis.routing import work_route
from engineroom.server.apis.structured_fields import OllamaFormat, of_ollama, structured_output
from engineroom.server.apis.tool_fields import TemplateFields, chosen_tools, reasoning_of
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, unsupported
from engineroom.server.http.exchange import respond

__all__ = ["ROUTES", "OllamaChatRequest", "OllamaGenerateRequest"]

Think = Annotated[
    Annotated[bool, Tag("(whether)")]
    | Annotated[Literal["low", "medium", "high", "max"], Tag("(level)")],
    either("true, false, low, medium, high or max", {bool: "(whether)", str: "(level)"}),
]


_ELSEWHERE: Final[Mapping[str, str]] = {
    **{
        name: f"use options.{name}"
        for name in (
            "temperature", "top_p", "top_k", "min_p", "seed", "num_predict", "num_ctx", "stop",
            "repeat_penalty", "presence_penalty", "frequency_penalty",
        )
    },
    "max_tokens": "use options.num_predict",
    "max_completion_tokens": "use options.num_predict",
    "repetition_penalty": "use options.repeat_penalty",
    "response_format": "use format",
    "reasoning_effort": "use think",
    "logit_bias": "use /v1/chat/completions",
}  # fmt: skip
"""Of other APIs, or options: fields that would be ignored here → what to do instead."""


class OllamaRequest(TemplateFields, Generating):
    """What both have. It is a stream unless ``stream`` is false."""

    format: OllamaFormat | None = None
    """``json``, or a schema."""
    options: OllamaOptions | None = None
    keep_alive: KeepAlive | None = None
    """How long a model stays is said by its deployment; 0 with nothing to answer unloads it, where
    the key may do that."""
    think: Think | None = None
    """Whether the model thinks before it answers, or how hard."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncate: bool | None = None
    """What is too long is refused, not truncated."""
    shift: bool | None = None
    """What fills the context ends there; nothing is moved."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "model_id": "model",
        "reasoning": "think",
        "template_args": "chat_template_kwargs",
        **PLACES,
    }
    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        "_debug_render_only": (False,),
        **dict.fromkeys(_ELSEWHERE, ()),
        "response_format": ({"type": "text"},),
        "n": (1,),
        "tool_choice": ("auto",),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = _ELSEWHERE


class OllamaChatRequest(OllamaRequest):
    """A conversation to be continued; without messages, a model to be loaded."""

    messages: Annotated[list[OllamaInput], Field(fail_fast=True)] | None = None
    tools: OllamaTools | None = None
    """Functions that the model may call."""

    COUNTED: ClassVar[Collection[str]] = ("messages",)


class OllamaGenerateRequest(OllamaRequest):
    """A prompt to be answered; without one, a model to be loaded."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    """The prompt as it stands: no chat template is applied."""

    REFUSED: ClassVar[Mapping[str, Collection[Any]]] = {
        **OllamaRequest.REFUSED,
        "suffix": ("",),
        "template": ("",),
        "context": ([],),
        "images": ([],),
        "tools": ([],),
        "messages": ([],),
        "width": (0,),
        "height": (0,),
        "steps": (0,),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        **OllamaRequest.INSTEAD,
        "context": "send the conversation to /api/chat",
        "messages": "use /api/chat",
        "tools": "use /api/chat",
        "template": "write the prompt in whole, with raw",
        "suffix": "write the prompt in whole, with raw, as the model has it",
    }


# ── the work ─────────────────────────────────────────────────────────────────────────────────


async def chat(call: Call) -> None:
    """Continue a conversation, in a stream unless it is said otherwise."""
    request = parse(call, OllamaChatRequest, await call.json())
    name = served_name(call, request.model)
    writer = ChatLines(call, request.model, bool(request.logprobs))
    if not request.messages:
        await _only_model(call, request, name, writer)
        return
    tools = [tool.function for tool in request.tools or ()]
    asked = _request(
        call,
        request,
        name,
        messages=messages_of(request.messages),
        **chosen_tools(call, tools, None, None, "function.parameters"),
    )
    await respond(call, [asked], writer)


async def generate(call: Call) -> None:
    """Answer a prompt, in a stream unless it is said otherwise."""
    request = parse(call, OllamaGenerateRequest, await call.json())
    if request.raw and request.system:
        raise ApiError(
            400, "raw mode does not support template, system, or context", "invalid_value", "raw"
        )
    name = served_name(call, request.model)
    writer = GenerateLines(call, request.model, bool(request.logprobs))
    if not request.prompt:
        await _only_model(call, request, name, writer)
        return
    if request.raw:
        asked = _request(call, request, name, prompt=request.prompt)
    else:
        system = [chat_message("system", request.system, "system")] if request.system else []
        messages = [*system, chat_message("user", request.prompt, "prompt")]
        asked = _request(call, request, name, messages=messages)
    await respond(call, [asked], writer)


def _request(call: Call, request: OllamaRequest, name: str, **given: Any) -> InferenceRequest:
    options = request.options or OllamaOptions()
    status = status_of(call, name)
    told_in_vain(call, options, status.max_context_tokens if status else None)
    told_of_keep_alive(call, request.keep_alive, status.keep_alive_s if status else None)
    for field, instead in (("truncate", "refused, not truncated"), ("shift", "ended, not moved")):
        if getattr(request, field):
            call.warn([f"{field} changed nothing: what does not fit the context is {instead}"])
    if "messages" in given:
        template = request.chat_template_kwargs
        budgets = {"reasoning_budget": request.reasoning_budget}
        given |= reasoning_of({"think": request.think}, budgets, template)
        given["template_args"] = template or None
    else:
        for field in ("think", "chat_template_kwargs", "reasoning_budget"):
            if getattr(request, field) is not None:
                raise unsupported(f"{field} beside raw", field)
    served = request.model_copy(update={"model": name, "stream": request.stream is not False})
    params = {
        **options.params(),
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "structured_output": structured_output(call, {"format": of_ollama(request.format)}),
    }
    return build(
        call,
        served,
        params_of(call, served, params, DEFAULTS),
        stop_sequences=options.stops,
        **given,
    )


async def _only_model(call: Call, request: OllamaRequest, name: str, writer: OllamaWriter) -> None:
    """Load the model, or unload it; one answer, whatever ``stream`` says."""
    done = await load_or_unload(call, name, request.keep_alive, request.timeout_s)
    await call.answer_json(writer.answer(writer.said(""), done=True, done_reason=done))


ROUTES = (
    work_route(
        "/api/chat",
        chat,
        "Continue a conversation (Ollama)",
        "Ollama",
        request=OllamaChatRequest,
        response=OllamaChat,
        error=OllamaError,
        errors=WORK_ERRORS,
        streams=NDJSON,
        example={
            "model": "default",
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
            "options": {"num_predict": 20},
        },
    ),
    work_route(
        "/api/generate",
        generate,
        "Answer a prompt (Ollama)",
        "Ollama",
        request=OllamaGenerateRequest,
        response=OllamaGenerated,
        error=OllamaError,
        errors=WORK_ERRORS,
        streams=NDJSON,
        example={
            "model": "default",
            "prompt": "Why is the sky blue?",
            "options": {"num_predict": 20},
        },
    ),
)
