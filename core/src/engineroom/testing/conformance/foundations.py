"""What everything else stands on. A foundation that does not hold is told once, by its check."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal, TypeAlias

from engineroom.errors import EngineRoomError
from engineroom.handlers.base import Capabilities
from engineroom.handlers.validation import validate_handler
from engineroom.schemas import FINISH_REASONS, InferenceResponse
from engineroom.testing.conformance.bench import said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import HungError, broken

__all__ = ["FOUNDATIONS", "Foundation"]

Foundation: TypeAlias = Literal[
    "handler-is-valid",
    "capabilities",
    "can-load",
    "model-loads",
    "can-handle",
    "answers",
    "chunks-are-text",
    "stream-ends",
]
_PROBE_TOKENS: Final = 6


async def _handler_is_valid(kit: Kit) -> None:
    try:
        validate_handler(kit.handler)
    except EngineRoomError as error:
        broken(did="registered the handler", expected="that it is one", saw=error.message)


async def _capabilities(kit: Kit) -> None:
    answers: list[object] = [kit.handler.capabilities() for _ in range(2)]
    for answer in answers:
        if not isinstance(answer, Capabilities):
            broken(
                did="capabilities()",
                expected="a Capabilities",
                saw=f"{type(answer).__name__} {answer}",
            )
    if answers[0] != answers[1]:
        broken(
            did="capabilities() twice", expected="the same", saw=f"{answers[0]}, then {answers[1]}"
        )


async def _can_load(kit: Kit) -> None:
    config = kit.config.choices()[0]
    answer: object = kit.handler.can_load(config)
    if not isinstance(answer, bool) or (not answer and config.runtime is None):
        broken(
            did=f"can_load(source={config.source!r})",
            expected="the bool True (or a model_config that names the runtime, if the format is "
            "a foreign one)",
            saw=repr(answer),
        )


async def _model_loads(kit: Kit) -> None:
    did = f"load_model(source={kit.config.choices()[0].source!r})"
    try:
        loaded = await kit.bench.load()
    except EngineRoomError as error:
        broken(did=did, expected="a LoadedModel", saw=error.describe())
    config = kit.config.choices()[0]
    if loaded.model_id != config.model_id or loaded.config != config:
        broken(
            did=did,
            expected="the model_id and the config that were given",
            saw=f"model_id={loaded.model_id!r}, config={loaded.config!r}",
        )
    for name in ("max_context_tokens", "memory_bytes"):
        value = getattr(loaded, name)
        if value is not None and value < (1 if name == "max_context_tokens" else 0):
            broken(did=did, expected=f"{name} that can be", saw=f"{name}={value}")


async def _can_handle(kit: Kit) -> None:
    answer = kit.handler.can_handle(kit.bench.loaded)
    if answer is not True:
        broken(
            did="can_handle(the model that the handler has loaded)",
            expected="the bool True",
            saw=repr(answer),
        )


async def _answers(kit: Kit) -> None:
    request = kit.likely(n=_PROBE_TOKENS)
    did = f"infer({said(request)})"
    response = await kit.within(kit.handler.infer(kit.bench.loaded, request), did)
    if not isinstance(response, InferenceResponse):
        broken(did=did, expected="an InferenceResponse", saw=type(response).__name__)
    right = {
        "request_id": response.request_id == request.request_id,
        "model_id": response.model_id == request.model_id,
        "generated_text": isinstance(response.generated_text, str),
        "error_message": response.error_message is None,
        "finish_reason": response.finish_reason
        in FINISH_REASONS - {"error", "cancelled", "timeout"},
        "generated_tokens": (response.generated_tokens or 0) >= 0,
        "prompt_tokens": (response.prompt_tokens or 0) >= 0,
    }
    wrong = [f"{name}={getattr(response, name)!r}" for name, holds in right.items() if not holds]
    if wrong:
        broken(
            did=did,
            expected="the request's ids, a text, how it ended, and counts",
            saw=", ".join(wrong),
        )
    await kit.bench.answer(kit.likely(n=_PROBE_TOKENS))


async def _chunks_are_text(kit: Kit) -> None:
    request = kit.likely(n=_PROBE_TOKENS)
    did = f"stream_infer({said(request)})"
    generator = kit.bench.direct(request)
    try:
        for _ in range(8 * _PROBE_TOKENS):
            try:
                chunk = await kit.within(_next(generator), did)
            except HungError:
                return  # the next foundation tells it
            if chunk is _OVER:
                return
            if not isinstance(chunk, str):
                broken(
                    did=did, expected="chunks of str", saw=f"a {type(chunk).__name__}: {chunk!r}"
                )
            try:
                chunk.encode()
            except UnicodeEncodeError as error:
                broken(did=did, expected="text that UTF-8 can write", saw=f"{chunk!r}: {error}")
    finally:
        await kit.clean_up()


async def _stream_ends(kit: Kit) -> None:
    request = kit.likely(n=_PROBE_TOKENS)
    did = f"stream_infer({said(request)}), read to its end"
    generator = kit.bench.direct(request)
    most = 8 * _PROBE_TOKENS
    if not kit.honours("max_new_tokens"):
        most = 1 << 20
    for _ in range(most):
        if (await kit.within(_next(generator), did)) is _OVER:
            return
    broken(
        did=did,
        expected=f"its end after {_PROBE_TOKENS} tokens",
        saw=f"{most} chunks and no end",
    )


_OVER: Final = object()


async def _next(generator: object) -> object:
    return await anext(generator, _OVER)  # type: ignore[call-overload]


FOUNDATIONS: Final[Mapping[Foundation, Callable[[Kit], Awaitable[None]]]] = {
    "handler-is-valid": _handler_is_valid,
    "capabilities": _capabilities,
    "can-load": _can_load,
    "model-loads": _model_loads,
    "can-handle": _can_handle,
    "answers": _answers,
    "chunks-are-text": _chunks_are_text,
    "stream-ends": _stream_ends,
}
"""What looks at each, in their order; it raises ``BrokenRuleError`` where one does not hold."""
