"""Log probabilities of an answer's tokens, as OpenAI's chat and responses write them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from engineroom.schemas import TokenLogprob
from engineroom.server.http.frames import Answer

__all__ = ["TokenEntry", "TopLogprob", "bytes_of", "token_entries"]


class TopLogprob(Answer, kw_only=True):
    """A token that was likely.

    :param bytes: ``None`` where a runtime tells only texts, and the token is no whole character.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class TokenEntry(TopLogprob, kw_only=True):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


def bytes_of(token: str, known: list[int] | None) -> list[int] | None:
    """A token's bytes, as the runtime tells them, or by its text where that is whole."""
    if known is not None:
        return known
    return None if "\ufffd" in token else list(token.encode())


def token_entries(logprobs: Sequence[TokenLogprob]) -> list[TokenEntry]:
    """An entry for each token."""
    return [
        TokenEntry(
            token=entry.token,
            logprob=entry.logprob,
            bytes=bytes_of(entry.token, entry.bytes),
            top_logprobs=[
                TopLogprob(token=token, logprob=logprob, bytes=bytes_of(token, known))
                for (_, token, logprob), known in zip(
                    entry.top, entry.top_bytes or repeat(None), strict=False
                )
            ],
        )
        for entry in logprobs
    ]
