"""Beam search over an engine that tells the likeliest next tokens of a sequence. Pure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from engineroom.engine import Beam, BeamSearch, Likeliest

__all__ = ["Expand", "search"]

Expand: TypeAlias = Callable[[list[tuple[int, ...]], int], Awaitable[list[Likeliest]]]
"""For each sequence of generated tokens its ``count`` likeliest next ones: (token, log
probability), likeliest first."""


async def search(
    expand: Expand,
    *,
    beams: int,
    limit: int,
    ends: frozenset[int],
    early_stopping: bool,
    least: int = 0,
    least_tokens: int = 0,
) -> Beam:
    """The best sequence; see :class:`~engineroom.engine.BeamSearch`.

    :param ends: tokens that end a sequence.
    :param least: how many likeliest tokens to ask for at least.
    :param least_tokens: before a sequence has so many, none of ``ends`` comes.
    """
    books = BeamSearch(
        beams,
        limit,
        ends.__contains__,
        len(ends),
        early_stopping=early_stopping,
        keep_choices=True,
    )
    count = max(books.candidates, least)
    while True:
        likeliest = await expand([beam.tokens for beam in books.running], count)
        if len(books.running[0].tokens) < least_tokens:
            likeliest = [[c for c in choices if c[0] not in ends] for choices in likeliest]
        if not books.advance(likeliest):
            return books.best
