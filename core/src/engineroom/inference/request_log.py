"""What the standard log is told of each request, without anybody's observer. Never its texts.

One line at its end (INFO; WARNING where it failed, with whose mistake that was; ERROR where there
is something to mend of which the log has nothing else), one at its beginning with its parameters,
and one for the choice of its handler (both DEBUG).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, Final, Literal, TypeAlias

from engineroom.border import MOST_CHARACTERS, get_logger, log_failure, related, words
from engineroom.errors import (
    ConfigurationError,
    EngineDeadError,
    EngineRoomError,
    InferenceError,
    QueueFullError,
    RequestTimeoutError,
    ResourceNotAvailableError,
)
from engineroom.inference.scope import RequestScope
from engineroom.prompts.messages import strings
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.telemetry import request_logger

__all__ = [
    "Whose",
    "defect",
    "end_of",
    "finished",
    "origin",
    "rejected",
    "started",
    "whose_mistake",
]

logger = get_logger("engineroom.requests")
service_logger = get_logger("engineroom.service")

Whose: TypeAlias = Literal["client", "handler", "runtime", "server", "nobody"]
"""Who has to mend what made a request fail. ``nobody``: its time was over, or it was stopped."""

_CROWDED: Final = (QueueFullError, ResourceNotAvailableError)
_QUOTED: Final = 16
"""So many characters of a request in a message are a quotation."""
_LOOKED_AT: Final = 1 << 19
"""Characters of a request in which quotations are looked for: milliseconds, on the event loop."""
_CLOSELY: Final = 1 << 13
"""In so many of them, the first ones, a quotation of ``_QUOTED`` is seen wherever it begins."""
_MOST_TEXTS: Final = 20_000
"""Texts of a request that are looked at."""
_WITHHELD: Final = "its message quotes the request, and is left out"


def started(request: InferenceRequest) -> None:
    """Its parameters; of texts, only how long they are."""
    if logger.isEnabledFor(logging.DEBUG):
        what = f"stream={request.stream}" if request.kind == "generate" else request.kind
        request_logger(logger, request).debug(
            "request %s for %s started (%s): %s",
            request.request_id,
            request.model_id,
            what,
            ", ".join(_parameters(request)),
        )


def rejected(request: InferenceRequest, reason: str) -> None:
    """A limit turned it away before it began."""
    request_logger(logger, request).warning(
        "request %s for %s was turned away: %s (key %s)",
        request.request_id,
        request.model_id,
        reason,
        request.key_name or "-",
    )


def end_of(request: InferenceRequest, response: InferenceResponse) -> str:
    """How it ended, in a word. No end of a text is the reason why vectors or scores are there."""
    reason = response.finish_reason or "error"
    return "done" if request.kind != "generate" and reason == "eos_token" else reason


def finished(scope: RequestScope, response: InferenceResponse, level: int) -> None:
    """How it ended.

    :param level: of one that did not fail.
    """
    request, failed = scope.request, response.error_message is not None
    if failed:
        level = logging.ERROR if _is_news(scope) else logging.WARNING
    if not logger.isEnabledFor(level):
        return
    generates, end = request.kind == "generate", end_of(request, response)
    first = response.time_to_first_token_ms
    request_logger(logger, request).log(
        level,
        "request %s for %s finished: %s, %s prompt %s in %.0f ms (handler %s, key %s, "
        "waited %.0f ms%s)%s",
        request.request_id,
        request.model_id,
        end if generates else f"{request.kind}, {end}",
        _count(response.prompt_tokens),
        f"and {_count(response.generated_tokens)} generated tokens" if generates else "tokens",
        response.inference_time_ms or 0.0,
        response.handler or "-",
        request.key_name or "-",
        scope.queued_s * 1000,
        "" if first is None else f", first token after {first:.0f} ms",
        _failure(scope, response) if failed else "",
    )


def defect(request: InferenceRequest, error: BaseException, described: str) -> None:
    """What nobody foresaw, with the traceback.

    :raises BaseException: it is an interrupt, which is raised on.
    """
    log = request_logger(service_logger, request)
    if _any_quotes(error, request):
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("request failed: %s (%s)\n%s", type(error).__name__, _WITHHELD, frames)
    else:
        log_failure(log, error, "request failed: %s", described)


def origin(request: InferenceRequest, error: EngineRoomError) -> None:
    """Where a typed error came from that others raised, at DEBUG: nothing tells it later."""
    if service_logger.isEnabledFor(logging.DEBUG) and not _any_quotes(error, request):
        log = request_logger(service_logger, request)
        log.debug("request failed: %s", error.message, exc_info=error)


def whose_mistake(scope: RequestScope, error: BaseException, known: bool) -> Whose:
    """Who has to mend what ended the request.

    :param error: what was raised.
    :param known: whether its model is one of the deployment's.
    """
    if isinstance(error, RequestTimeoutError):
        return "nobody"
    if isinstance(error, _CROWDED):
        return "server"
    if isinstance(error, EngineDeadError):
        return "runtime"
    if isinstance(error, EngineRoomError) and not isinstance(error, InferenceError):
        # Once there is a handler, what is wrong is what was asked of it; before, the deployment.
        asked = scope.handler is not None and isinstance(error, ConfigurationError)
        return "client" if asked or not known else "server"
    root = [*_chain(error)][-1]
    place = _raised_in(root)
    package = place.partition(".")[0]
    if isinstance(root, EngineRoomError):
        ours = place.startswith(
            ("engineroom.service", "engineroom.inference", "engineroom.handlers")
        )
        return "handler" if ours else "runtime"  # the core found fault with the handler
    if package == "engineroom" and not place.startswith(
        ("engineroom.engine", "engineroom.testing")
    ):
        return "server"
    return "handler" if package == scope.handler_module.partition(".")[0] else "runtime"


def _is_news(scope: RequestScope) -> bool:
    """Whether somebody has to mend what the log does not tell of yet."""
    error = scope.error
    if error is None or scope.whose in ("client", "nobody") or isinstance(error, _CROWDED):
        return False
    return all(isinstance(link, EngineRoomError) for link in _chain(error))


def _failure(scope: RequestScope, response: InferenceResponse) -> str:
    error, mistake = scope.error, f"the {scope.whose}'s mistake"
    message = (response.error_message if error is None else error.message) or ""
    message = message[:MOST_CHARACTERS]
    return (
        f": {mistake if scope.whose != 'nobody' else 'nobody made a mistake'}, "
        f"{response.error_type}: "
        f"{_WITHHELD if _quotes(message, scope.request) else message}"
    )


def _count(tokens: int | None) -> str:
    return "-" if tokens is None else str(tokens)


def _parameters(request: InferenceRequest) -> Iterator[str]:
    texts = _texts(request)
    if request.messages is not None:
        yield f"{len(request.messages)} messages of {sum(map(len, texts))} characters"
    elif request.prompt_token_ids is not None:
        yield f"{len(request.prompt_token_ids)} token ids"
    elif request.kind in ("generate", "count", "tokenize"):
        yield f"prompt of {len(request.prompt or '')} characters"
    else:
        yield from _listed(request)
        return
    params = request.params
    for name in type(params).model_fields:
        value = getattr(params, name)
        if value is None or name not in params.model_fields_set:
            continue
        if name == "logit_bias":
            value = f"{len(value)} entries"
        elif name == "structured_output":
            value = next(iter(value.model_fields_set))
        yield f"{name}={value}"
    for name in ("stop_sequences", "tools"):
        if listed := getattr(request, name):
            yield f"{len(listed)} {name}"
    for name in ("timeout_s", "priority", "adapter", "on_unsupported"):
        if value := getattr(request, name):
            yield f"{name}={value}"


def _listed(request: InferenceRequest) -> Iterator[str]:
    """How much there is to make vectors of, to score, or to make a text of."""
    if (tokens := getattr(request, "tokens", None)) is not None:
        yield f"{len(tokens)} token ids"
        return
    if (documents := getattr(request, "documents", None)) is not None:
        queries: Sequence[str] = getattr(request, "queries", ())
        yield f"{len(documents)} documents of {sum(map(len, documents))} characters"
        yield f"{len(queries)} queries of {sum(map(len, queries))} characters"
        return
    listed: Sequence[str | Sequence[int]] = getattr(request, "texts", ())
    texts = [text for text in listed if isinstance(text, str)]
    if texts or not listed:
        yield f"{len(texts)} texts of {sum(map(len, texts))} characters"
    if len(texts) < len(listed):
        ids = sum(len(text) for text in listed if not isinstance(text, str))
        yield f"{len(listed) - len(texts)} lists of {ids} token ids"
    if dimensions := getattr(request, "dimensions", None):
        yield f"dimensions={dimensions}"


def _texts(request: InferenceRequest) -> Sequence[str]:
    """What is to be continued or made a vector of."""
    if request.messages is not None:
        return [m.content for m in request.messages if m.content is not None]
    if (listed := getattr(request, "texts", None)) is not None:
        return [text for text in listed if isinstance(text, str)]
    if (documents := getattr(request, "documents", None)) is not None:
        return [*getattr(request, "queries", ()), *documents]
    return [request.prompt or ""]


def _any_quotes(error: BaseException, request: InferenceRequest) -> bool:
    """Whether what its traceback shows quotes the request."""
    said = (" ".join((words(one), *getattr(one, "__notes__", ()))) for one in related(error))
    return any(_quotes(text[: 2 * MOST_CHARACTERS], request) for text in said)


def _quotes(said: str, request: InferenceRequest) -> bool:
    """Whether a message has a piece of what the request's author wrote in it, as far as it is
    looked for: one of twice ``_QUOTED`` characters is seen wherever it begins.
    """
    texts = list(islice(_written(request), _MOST_TEXTS))
    if any(_QUOTED // 2 <= len(text) < 2 * _QUOTED and text in said for text in texts):
        return True
    # Blocks of the request against each place of the message: as quick whatever they consist of.
    looked_at = "\0".join(texts)[:_LOOKED_AT]
    pieces = {said[at : at + _QUOTED] for at in range(len(said) - _QUOTED + 1)}
    places = chain(range(min(len(looked_at), _CLOSELY)), range(0, len(looked_at), _QUOTED))
    blocks = (looked_at[at : at + _QUOTED] for at in places)
    return not pieces.isdisjoint(blocks)


def _written(request: InferenceRequest) -> Iterator[str]:
    """Each text that the request's author wrote, at whatever depth; first what parsers quote."""
    if (structured := request.params.structured_output) is not None:
        yield from strings(structured.model_dump())
    yield from _texts(request)
    yield from request.stop_sequences or ()
    for message in request.messages or ():
        yield from strings([message.reasoning, message.name, message.tool_calls])
    parts: tuple[Any, ...] = (request.tools, request.tool_choice, request.template_args)
    yield from strings([*parts, request.metadata, request.cache_salt])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from, the first cause last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""
