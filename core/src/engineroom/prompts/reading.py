"""Where prompts and texts are read: short ones at once, everything else in the model's threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, TypeVar

from engineroom.errors import ConfigurationError
from engineroom.forks import renew_in_child
from engineroom.prompts.codec import PromptCodec
from engineroom.prompts.limits import (
    check_prompt,
    check_text,
    check_text_ids,
    check_texts,
    pair_too_long,
    prompt_too_long,
    text_too_long,
)
from engineroom.prompts.pairs import PairTokens
from engineroom.prompts.threads import PromptLane
from engineroom.prompts.work import TooManyTokensError, check_stopped
from engineroom.schemas import InferenceRequest

__all__ = [
    "ReadPrompt",
    "in_lane",
    "read_prompt",
    "stop_reading",
    "stuck_in_reading",
    "tokens_of",
    "tokens_of_pairs",
    "tokens_of_texts",
]

_T = TypeVar("_T")

_INLINE_CHARS: Final = 256
"""Longer prompts are read in a thread. So many take up to 0.2 ms, the way there and back 0.05; and
one call may bring the same prompt a hundred times."""
_CHARS_OF_MESSAGE: Final = 100
_CHARS_OF_TOOL: Final = 1000
_COUNTED: Final = 1000
"""What a message counts beside its content, what a tool counts, and in how many messages the
content is looked at."""
_OTHERS: Final = PromptLane()
"""The lane of codecs that have none."""
renew_in_child(_OTHERS.begin)


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A request's input as its model reads it.

    :param tokens: its token ids.
    :param tail: how the text ends that a chat template wrote; ``None``: none did.
    """

    tokens: list[int]
    tail: str | None = None


async def tokens_of(
    codec: PromptCodec,
    request: InferenceRequest,
    *,
    n_ctx: int | None = None,
    advice: str = "load the model with a longer context",
) -> list[int]:
    """Token ids of a request's input; see :func:`read_prompt`."""
    return (await read_prompt(codec, request, n_ctx=n_ctx, advice=advice)).tokens


async def read_prompt(
    codec: PromptCodec,
    request: InferenceRequest,
    *,
    n_ctx: int | None = None,
    advice: str = "load the model with a longer context",
    contexts: int = 1,
    ends: bool = False,
) -> ReadPrompt:
    """A request's input, with its tools and what the template is to be told, made where it holds up
    nobody.

    A chat template is foreign code and never runs on the event loop; nor is a long text read
    there. Cancelling stops the template, or what waits.

    :param n_ctx: tokens of the context. What has far more is refused before they are listed, and
        before it is read where the vocabulary tells; the rest is for ``check_prompt``.
    :param advice: as for ``check_prompt``.
    :param contexts: so many times as much is read, where it is only counted.
    :param ends: a ``prompt`` is a text that is not continued; see :meth:`.PromptCodec.whole`.
    :raises ConfigurationError: there is no chat template, or it refuses the messages.
    :raises ContextLengthExceededError: the input is too long.
    :raises QueueFullError: too many prompts wait to be read.
    :raises ResourceNotAvailableError: the model is being unloaded.
    """
    if (ids := request.prompt_token_ids) is not None:
        if n_ctx is not None and contexts == 1:
            check_prompt(ids, n_ctx, advice)
        return ReadPrompt(list(ids))
    if request.prompt is not None and len(request.prompt) <= _INLINE_CHARS:
        return _read(codec, request, ends)
    most = None if n_ctx is None else n_ctx * contexts
    try:
        return await _lane_of(codec).run(
            partial(_read, codec, request, ends),
            key=request.key_name,
            size=_size(request),
            most=most,
        )
    except TooManyTokensError as error:
        least = error.least
    # Outside of the handler: the refusal is not to keep the frames that have the prompt.
    raise prompt_too_long(least, n_ctx or 0, advice, least=True)


def _read(codec: PromptCodec, request: InferenceRequest, ends: bool) -> ReadPrompt:
    if request.messages is None:
        return ReadPrompt(_read_text(codec, request, ends))
    if not hasattr(codec, "chat"):  # a runtime's own, which makes token ids and no more
        return ReadPrompt(codec.prompt(None, request.messages, request.offered_tools))
    asked = request.messages, request.offered_tools, _template_args(request)
    if request.continues:
        return ReadPrompt(*codec.chat(*asked, continues=True))
    return ReadPrompt(*codec.chat(*asked))


def _read_text(codec: PromptCodec, request: InferenceRequest, ends: bool) -> list[int]:
    """Token ids of a ``prompt``, read as a :class:`~engineroom.TokenizeRequest` says."""
    text = request.prompt or ""
    around = getattr(request, "add_special_tokens", True)
    plain = getattr(request, "special_as_text", False)
    if ends and around and not plain:
        return codec.whole(text)
    if around and not plain:
        return codec.prompt(request.prompt, None)
    if not hasattr(codec, "begun"):  # a runtime's own
        raise ConfigurationError(
            "this runtime reads prompts only as the model wants them: with its special tokens "
            "around them and in them"
        )
    tokens = codec.plain(text) if plain else codec.read(text)
    return codec.begun(tokens) if around else tokens


def _template_args(request: InferenceRequest) -> dict[str, Any]:
    """What the template is told, whether and how hard to think by the names that are in use."""
    stated = dict(request.template_args or {})
    if (reasoning := request.reasoning) is None:
        return stated
    thinks = reasoning is not False
    names: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
    if isinstance(reasoning, str):
        names["reasoning_effort"] = "low" if reasoning == "minimal" else reasoning
    # What is ``None`` says nothing.
    return names | {n: v for n, v in stated.items() if v is not None or n not in names}


async def tokens_of_texts(
    codec: PromptCodec,
    texts: Sequence[str | Sequence[int]],
    n_ctx: int,
    *,
    n_vocab: int | None = None,
) -> list[list[int]]:
    """Token ids of texts that are to be embedded, made where it holds up nobody.

    :param texts: each a text, or its token ids, which are taken as they are.
    :param n_ctx: tokens that the model reads at once.
    :param n_vocab: tokens that the model has; ``None``: not known.
    :raises ConfigurationError: a text has none, or more, or one that the model does not have.
    :raises QueueFullError: too many prompts wait to be read.
    :raises ResourceNotAvailableError: the model is being unloaded.
    """
    tokens: list[list[int]] = []

    def read() -> None:
        for text in texts:
            check_stopped()
            if isinstance(text, str):
                check_text("each text", text)
                tokens.append(codec.whole(text))
            else:
                check_text_ids(len(tokens), text, n_ctx, n_vocab)
                tokens.append(list(text))

    try:
        await _lane_of(codec).run(read, size=sum(map(len, texts)), most=n_ctx)
    except TooManyTokensError as error:
        least = error.least
    else:
        check_texts(tokens, n_ctx)
        return tokens
    raise text_too_long(len(tokens), least, n_ctx, least=True)


async def tokens_of_pairs(
    codec: PromptCodec, pairs: Sequence[tuple[str, str]], n_ctx: int
) -> list[PairTokens]:
    """Token ids of pairs of texts that are to be scored, made where it holds up nobody.

    :param n_ctx: tokens that the model reads at once.
    :raises ConfigurationError: the model joins no two texts.
    :raises ContextLengthExceededError: a pair has more.
    :raises QueueFullError: too many prompts wait to be read.
    :raises ResourceNotAvailableError: the model is being unloaded.
    """
    made: list[PairTokens] = []

    def plain(text: str) -> list[int]:
        check_text("each text", text)
        return codec.plain(text)

    def read() -> None:
        known: tuple[str, list[int]] | None = None
        for query, document in pairs:
            check_stopped()
            if known is None or known[0] is not query:  # most queries are for many documents
                known = query, plain(query)
            made.append(codec.pair(known[1], plain(document)))
            if (count := len(made[-1])) > n_ctx:
                raise pair_too_long(len(made) - 1, count, n_ctx)

    try:
        size = sum(len(first) + len(second) for first, second in pairs)
        await _lane_of(codec).run(read, size=size, most=n_ctx)
    except TooManyTokensError as error:
        least = error.least
    else:
        return made
    raise pair_too_long(len(made), least, n_ctx, least=True)


async def in_lane(codec: Any, call: Callable[[], _T], *, key: str | None, size: int = 0) -> _T:
    """Do other work on a request's texts where its model's prompts are read.

    :param key: name of the key whose it is.
    :param size: characters that there are to read, about.
    :raises QueueFullError: too many prompts wait to be read.
    :raises ResourceNotAvailableError: the model is being unloaded.
    """
    return await _lane_of(codec).run(call, key=key, size=size)


def stop_reading(codec: Any) -> None:
    """Read no prompt any more, and wait for the end of those that are read. Blocks.

    To be called before what a codec reads with is freed.
    """
    if (lane := _lane_of(codec)) is not _OTHERS:
        lane.close()


def stuck_in_reading(codec: Any) -> str:
    """What to tell of prompts whose reading does not come to an end; empty: there are none."""
    return _lane_of(codec).stuck()


def _lane_of(codec: Any) -> PromptLane:
    """A codec that is no ``PromptCodec`` may have none."""
    lane: PromptLane = getattr(codec, "lane", _OTHERS)
    return lane


def _size(request: InferenceRequest) -> int:
    """How much there is to read, about; not all of it is looked at."""
    messages = request.messages or ()
    written = sum(len(message.content or "") for message in islice(messages, _COUNTED))
    tools = _CHARS_OF_TOOL * len(request.tools or ())
    return len(request.prompt or "") + tools + written + _CHARS_OF_MESSAGE * len(messages)
