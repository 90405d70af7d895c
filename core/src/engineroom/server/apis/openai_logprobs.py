"""Log probabilities of an answer's tokens, as OpenAI's chat and responses write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Final

import msgspec

from engineroom.schemas import TokenLogprob
from engineroom.server.http.frames import Answer, dumps, taken
from engineroom.server.http.rounds import Rounds

__all__ = ["ENTRIES", "TokenEntry", "TopLogprob", "bytes_of", "encoded", "listed", "token_entries"]

ENTRIES: Final = 64
"""Log probabilities of so many tokens are encoded at a time."""


class TopLogprob(Answer, kw_only=True, gc=False):
    """A token that was likely.

    :param bytes: ``None`` where a runtime tells only texts, and the token is no whole character.
    """

    token: str
    logprob: float
    bytes: Sequence[int] | None


class TokenEntry(TopLogprob, kw_only=True, gc=False):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


def bytes_of(token: str, known: Sequence[int] | None) -> Sequence[int] | None:
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


async def encoded(rounds: Rounds, logprobs: list[TokenLogprob]) -> list[bytes]:
    """The entries, some in each round of the event loop; they are taken out of the list."""
    entries: list[bytes] = []
    for some in taken(logprobs, ENTRIES):
        await rounds.next()
        entries += map(dumps, token_entries(some))
    return entries


def listed(entries: Iterable[bytes]) -> msgspec.Raw:
    """Encoded entries, as the list of them."""
    return msgspec.Raw(b"[" + b",".join(entries) + b"]")
