"""Who ``engineroom chat`` talks to: a service in this process, or a server."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from typing import Any

from engineroom.cli.agent_flags import AgentFields
from engineroom.cli.remote import bearer, server_at
from engineroom.cli.resolve import Target
from engineroom.errors import ConfigurationError, EngineRoomError, InferenceError
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.inference.streams import StreamError
from engineroom.schemas import ChatMessage, GenerationParams, InferenceRequest
from engineroom.service import LLMInferenceService

__all__ = ["LocalTalker", "ServerTalker", "Talker"]


class Talker(AbstractContextManager["Talker"]):
    """Answers conversations. A context manager: leaving it gives everything back."""

    @abstractmethod
    def models(self) -> list[str]:
        """Names that ``/model`` takes."""

    @abstractmethod
    def answer(
        self,
        model: str,
        messages: Sequence[ChatMessage],
        params: GenerationParams,
        asked: AgentFields,
    ) -> Generator[str, None, None]:
        """The answer piece by piece, as the service streams it. Closing it stops the work.

        :raises EngineRoomError: it failed.
        """


class LocalTalker(Talker):
    """A service of one's own.

    :param target: the model, and the deployment that has it.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._service = LLMInferenceService(target.manager())

    def __exit__(self, *_: object) -> None:
        self._service.close_sync(drain_timeout_s=0)

    def models(self) -> list[str]:
        """The models of the deployment."""
        models = self._target.deployment.models
        return [name for model in models for name in (model.model_id, *model.aliases)]

    def answer(
        self,
        model: str,
        messages: Sequence[ChatMessage],
        params: GenerationParams,
        asked: AgentFields,
    ) -> Generator[str, None, None]:
        """See :class:`Talker`."""
        request = InferenceRequest(
            model_id=model, messages=list(messages), params=params, **asked.given()
        )
        with closing(self._service.stream_sync(request)) as stream:
            for chunk in stream:
                if isinstance(chunk, StreamError):
                    raise chunk.error
                yield chunk


class ServerTalker(Talker):
    """A server that has OpenAI's API.

    :param url: where it is, with or without ``/v1``.
    :param key: its API key, if it wants one.
    """

    def __init__(self, url: str, key: str | None) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"--url needs {error.name}, which is not installed; pip install 'engineroom[chat]'"
            ) from error
        self._httpx = httpx
        self._client = httpx.Client(
            base_url=server_at(url),
            headers={"authorization": bearer(key, "the key of --key")} if key else {},
            timeout=httpx.Timeout(600.0, connect=10.0),
        )

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """The models of the server."""
        try:
            answer = self._client.get("/v1/models")
            self._check(answer)
            return [str(model["id"]) for model in answer.json()["data"]]
        except (self._httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise self._failed(error) from error

    def answer(
        self,
        model: str,
        messages: Sequence[ChatMessage],
        params: GenerationParams,
        asked: AgentFields,
    ) -> Generator[str, None, None]:
        """See :class:`Talker`."""
        body = _chat_body(model, messages, params, asked)
        written = Counter[int]()  # characters of each call's arguments
        with ExitStack() as stack:
            try:
                answer = stack.enter_context(
                    self._client.stream("POST", "/v1/chat/completions", json=body)
                )
                self._check(answer)
                for line in answer.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if error := event.get("error"):
                        raise InferenceError(str(error.get("message") or error))
                    for choice in event.get("choices", ()):
                        for chunk in _chunks(choice["delta"]):
                            if isinstance(chunk, ToolCallDelta):
                                written[chunk.call] += len(chunk.arguments)
                            yield chunk
                        if choice.get("finish_reason") not in (None, "length"):
                            # Some servers write none for a tool that takes none.
                            for call in [call for call, count in written.items() if not count]:
                                yield ToolCallDelta(call, arguments="{}")
                                written[call] = 2
            except (
                self._httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError,
            ) as error:  # fmt: skip
                raise self._failed(error) from error

    def _check(self, answer: Any) -> None:
        if answer.is_success:
            return
        answer.read()
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"{answer.status_code} {answer.reason_phrase}"
        raise InferenceError(f"the server says: {message}")

    def _failed(self, error: Exception) -> EngineRoomError:
        if isinstance(error, EngineRoomError):  # a ConfigurationError is a ValueError
            return error
        return InferenceError(
            f"{self._client.base_url} does not answer as it should: "
            f"{type(error).__name__}: {error}; is it a server with OpenAI's API?"
        )


def _chat_body(
    model: str, messages: Sequence[ChatMessage], params: GenerationParams, asked: AgentFields
) -> dict[str, Any]:
    """A request of OpenAI's API for chat."""
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "messages": [message.model_dump(exclude_none=True) for message in messages],
        "max_tokens": params.max_new_tokens,
        "tools": asked.tools,
    }
    values = params.model_dump(
        exclude_unset=True, exclude={"max_new_tokens", "do_sample", "structured_output"}
    )
    if isinstance(asked.tool_choice, Mapping):
        body["tool_choice"] = {"type": "function", "function": asked.tool_choice}
    else:
        body["tool_choice"] = asked.tool_choice
    if isinstance(asked.reasoning, str):
        body["reasoning_effort"] = asked.reasoning
    elif asked.reasoning is not None:
        body["reasoning"] = {"enabled": asked.reasoning}
    if (form := params.structured_output) is not None:
        kind = "structured_outputs" if form.json_schema is None else "response_format"
        body[kind] = (
            form.model_dump(exclude_none=True)
            if form.json_schema is None
            else {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": form.json_schema, "strict": True},
            }
        )
    return {name: value for name, value in {**body, **values}.items() if value is not None}


def _chunks(delta: Mapping[str, Any]) -> Iterator[str]:
    """What a delta of OpenAI's API brings, as the service streams it."""
    if thought := delta.get("reasoning_content") or delta.get("reasoning"):
        yield ReasoningDelta(str(thought))
    if text := delta.get("content"):
        yield str(text)
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        yield ToolCallDelta(
            int(call["index"]),
            call.get("id"),
            function.get("name"),
            function.get("arguments") or "",
        )
