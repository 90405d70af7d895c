"""What a request may not exceed, said in the same words on every runtime."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from engineroom.errors import ConfigurationError, ContextLengthExceededError
from engineroom.field_types import half_of_pair

__all__ = [
    "check_adapter",
    "check_beams",
    "check_prompt",
    "check_prompt_logprobs",
    "check_text",
    "check_text_ids",
    "check_texts",
    "check_token_ids",
    "pair_too_long",
    "prompt_too_long",
    "text_too_long",
]

_MOST_BEAMS: Final = 64
_MOST_PROMPT_ENTRIES: Final = 1 << 18
"""Tokens and alternatives of a prompt's log probabilities: about 150 bytes each, all of which are
kept until they are sent."""
_CONTEXT: Final = "This model's maximum context length is {} tokens. However,"


def check_text(what: str, text: str) -> None:
    """Refuse what looks like a text and is none; a tokenizer may do anything with it.

    :raises ConfigurationError: there is half of a surrogate pair in it.
    """
    if (place := half_of_pair(text)) is not None:
        raise ConfigurationError(
            f"{what} must be text, but character {place} is half of a surrogate pair"
        )


def check_prompt(tokens: Sequence[int], n_ctx: int, advice: str, *, beams: int = 1) -> None:
    """Refuse a prompt without tokens, or one that leaves no room for an answer.

    :param n_ctx: tokens that the context has.
    :param advice: how to get a longer context, to be read after "shorten the prompt, or".
    :param beams: each of them needs a token of its own.
    :raises ConfigurationError: the prompt is empty.
    :raises ContextLengthExceededError: it is too long.
    """
    if not tokens:
        raise ConfigurationError("the prompt has no tokens; send at least one character")
    if len(tokens) + beams > n_ctx:
        raise prompt_too_long(len(tokens), n_ctx, advice, beams=beams)


def prompt_too_long(
    count: int, n_ctx: int, advice: str, *, least: bool = False, beams: int = 1
) -> ContextLengthExceededError:
    """The refusal of a prompt that leaves no room for an answer.

    Routers and agents know by its first words that a shorter prompt, or another model, is needed.

    :param count: how many tokens it has.
    :param least: it has more, perhaps.
    :param beams: each of them needs a token of its own.
    """
    needed = "one" if beams == 1 else f"one for each of num_beams={beams}"
    shown = f"at least {count}" if least else f"{count}"
    return ContextLengthExceededError(
        f"{_CONTEXT.format(n_ctx)} your prompt has {shown} tokens, and at least {needed} must be "
        f"left to generate; shorten the prompt, or {advice}",
        tokens=count,
        most=n_ctx - beams,
    )


def check_prompt_logprobs(tokens: Sequence[int], count: int | None) -> None:
    """Refuse more log probabilities of a prompt than are kept for one request.

    :param count: alternatives of each token; ``None``: no log probabilities.
    :raises ConfigurationError: there are too many.
    """
    if count is not None and (entries := len(tokens) * (1 + count)) > _MOST_PROMPT_ENTRIES:
        raise ConfigurationError(
            f"prompt_logprobs={count} of {len(tokens)} tokens are {entries} log probabilities, and "
            f"{_MOST_PROMPT_ENTRIES} are told at most; ask for fewer, or send a shorter prompt"
        )


def check_token_ids(
    n_vocab: int, *, prompt: Collection[int] | None = None, bias: Collection[int] | None = None
) -> None:
    """Refuse ids that the model does not have.

    :param prompt: the request's ``prompt_token_ids``.
    :param bias: those that its ``logit_bias`` names.
    :raises ConfigurationError: names the field, the id and the ids that there are.
    """
    known = f"the model's tokens are 0 to {n_vocab - 1}"
    if (largest := max(prompt or (0,))) >= n_vocab:
        raise ConfigurationError(f"prompt_token_ids has {largest}; {known}")
    if (largest := max(bias or (0,))) >= n_vocab:
        raise ConfigurationError(f"logit_bias names token {largest}; {known}")


def check_adapter(name: str | None, loaded: Collection[str], option: str) -> None:
    """Refuse an adapter that is not loaded with the model.

    :param name: what the request names; ``None``: no adapter.
    :param option: the model's option that loads adapters.
    :raises ConfigurationError: names the adapters that there are.
    """
    if name is not None and name not in loaded:
        raise ConfigurationError(
            f"adapter {name!r} is not loaded with this model; "
            f"it has {', '.join(sorted(loaded)) or f'none (see the option {option})'}"
        )


def check_beams(beams: int | None) -> None:
    """Refuse more beams than anybody searches with: each is a sequence with a memory of its own.

    :raises ConfigurationError: there are more than 64.
    """
    if (beams or 1) > _MOST_BEAMS:
        raise ConfigurationError(
            f"num_beams={beams}: at most {_MOST_BEAMS} are searched with here; ask for fewer"
        )


def check_texts(texts: Sequence[Sequence[int]], n_ctx: int) -> None:
    """Refuse texts for embeddings that have no tokens, or more than the model reads.

    :param texts: each text as token ids.
    :raises ConfigurationError: a text has no tokens; names it by its number, from 0.
    :raises ContextLengthExceededError: a text has more.
    """
    for number, tokens in enumerate(texts):
        if len(tokens) > n_ctx:
            raise text_too_long(number, len(tokens), n_ctx)
        if not tokens:
            raise ConfigurationError(f"text {number} has no tokens")


def check_text_ids(number: int, ids: Sequence[int], n_ctx: int, n_vocab: int | None) -> None:
    """Refuse token ids in the place of a text that the model does not have, or too many of them.

    :param number: of the text, from 0.
    :param n_vocab: tokens that the model has; ``None``: not known.
    :raises ConfigurationError: names the id and the ids that there are.
    :raises ContextLengthExceededError: there are too many.
    """
    if len(ids) > n_ctx:
        raise text_too_long(number, len(ids), n_ctx)
    if n_vocab is not None and (largest := max(ids, default=0)) >= n_vocab:
        raise ConfigurationError(
            f"text {number} has the token {largest}; the model's tokens are 0 to {n_vocab - 1}"
        )


def text_too_long(
    number: int, count: int, n_ctx: int, *, least: bool = False
) -> ContextLengthExceededError:
    """The refusal of a text that the model cannot read at once.

    :param count: how many tokens it has.
    :param least: it has more, perhaps.
    """
    shown = f"at least {count}" if least else f"{count}"
    return ContextLengthExceededError(
        f"{_CONTEXT.format(n_ctx)} text {number} has {shown} tokens; cut it into parts",
        tokens=count,
        most=n_ctx,
    )


def pair_too_long(
    number: int, count: int, n_ctx: int, *, least: bool = False
) -> ContextLengthExceededError:
    """The refusal of a query and a document that the model cannot read at once.

    :param number: of the document, from 0.
    :param count: how many tokens the two have.
    :param least: they have more, perhaps.
    """
    shown = f"at least {count}" if least else f"{count}"
    return ContextLengthExceededError(
        f"{_CONTEXT.format(n_ctx)} document {number} and its query have {shown} tokens; cut the "
        "document into parts",
        tokens=count,
        most=n_ctx,
    )
