"""Checks of ``rerank``."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from engineroom.errors import ConfigurationError, EngineRoomError
from engineroom.handlers.base import Scores
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import Bench
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip

__all__ = ["RankingChecks"]

_QUERY: Final = "Where is the harbour?"
_PAIRS: Final = tuple(
    (_QUERY, document)
    for document in (
        "The harbour lies behind the old town.",
        "Trains.",
        "A recipe for lentil soup with cumin, lemon and a little patience.",
        "Zürich, 北京, and a 🦆",
    )
)
_CLOSE: Final = 2e-2
"""How far apart scores may be, as a share of the larger one or of 1, and still be the same."""


class RankingChecks(Checks):
    """Documents by their scores."""

    @check(needs="can-handle")
    async def test_rerank(self, kit: Kit) -> None:
        if not kit.capabilities.rerank:
            await kit.bench.load()
            await _refused(kit, kit.bench, "a", "rerank, which capabilities() does not claim")
            return
        async with _model(kit) as bench:
            made = await _rank(kit, bench, _PAIRS)
            same("rerank", "as many scores as pairs", len(_PAIRS), len(made.scores))
            if not all(type(score) is float and math.isfinite(score) for score in made.scores):
                broken(did="rerank", expected="finite numbers", saw=repr(made.scores))
            if type(made.prompt_tokens) is not int or made.prompt_tokens < len(_PAIRS):
                broken(did="rerank", expected="prompt_tokens", saw=repr(made.prompt_tokens))
            _, turned = await asyncio.gather(
                _rank(kit, bench, _PAIRS[:1]), _rank(kit, bench, _PAIRS[::-1])
            )
            for place, pair in enumerate(_PAIRS):
                (alone,) = (await _rank(kit, bench, [pair])).scores
                for score in (made.scores[place], turned.scores[-1 - place]):
                    if abs(score - alone) > _CLOSE * max(1.0, abs(alone)):
                        broken(
                            did=f"rerank([{pair!r}]) alone and beside others",
                            expected="the same score",
                            saw=f"{alone} and {score}",
                        )
            most = bench.loaded.max_context_tokens
            if most is not None and most <= 1 << 17:
                did = f"rerank of {most + 1} words, where max_context_tokens is {most}"
                await _refused(kit, bench, "duck " * (most + 1), did)


@asynccontextmanager
async def _model(kit: Kit) -> AsyncIterator[Bench]:
    """A model that ranks documents: one of its own, where the suite names one."""
    if kit.ranking_config is None:
        await kit.bench.load()
        try:
            await kit.within(kit.handler.rerank(kit.bench.loaded, [("a", "b")]), "rerank")
        except ConfigurationError as error:
            skip(
                f"the model ranks no documents ({error.message}); name one that does in the "
                "suite's fixture ranking_config"
            )
        yield kit.bench
        return
    async with kit.other_model(kit.ranking_config) as bench:
        await bench.load()
        yield bench


async def _rank(kit: Kit, bench: Bench, pairs: Sequence[tuple[str, str]]) -> Scores:
    made: object
    try:
        made = await kit.within(kit.handler.rerank(bench.loaded, list(pairs)), "rerank")
    except EngineRoomError as error:
        broken(did=f"rerank({list(pairs)!r})", expected="scores", saw=error.describe())
    if not isinstance(made, Scores):
        broken(did=f"rerank({list(pairs)!r})", expected="a Scores", saw=type(made).__name__)
    return made


async def _refused(kit: Kit, bench: Bench, document: str, did: str) -> None:
    work = kit.handler.rerank(bench.loaded, [("a", document)])
    made = await kit.outcome(work, did, ConfigurationError)
    if not isinstance(made, ConfigurationError):
        broken(did=did, expected="a ConfigurationError", saw=type(made).__name__)
