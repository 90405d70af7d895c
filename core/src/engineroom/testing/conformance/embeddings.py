"""Checks of ``embed``."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from engineroom.errors import ConfigurationError, EngineRoomError
from engineroom.field_types import MAX_TOKEN_ID
from engineroom.handlers.base import Embeddings
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import Bench
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip

__all__ = ["EmbeddingChecks"]

_TEXTS: Final = (
    "The harbour was quiet.",
    "Trains.",
    "A recipe for lentil soup with cumin, lemon and a little patience.",
    "Zürich, 北京, and a 🦆",
)
_IDS: Final = list(range(40, 52))
"""Ids that a vocabulary of any size has."""
_CLOSE: Final = 2e-2
"""How far apart vectors may be, as a share of their length, and still be the same: padding and
half precision change the last digits."""


class EmbeddingChecks(Checks):
    """Texts as vectors."""

    @check(needs="can-handle")
    async def test_embeddings_fit(self, kit: Kit) -> None:
        async with _model(kit) as bench:
            embeddings = await _embed(kit, bench, _TEXTS)
            same("embed", "as many vectors as texts", len(_TEXTS), len(embeddings.vectors))
            lengths = sorted({len(vector) for vector in embeddings.vectors})
            if len(lengths) != 1 or not lengths[0]:
                broken(
                    did="embed of texts of several lengths",
                    expected="vectors of one length",
                    saw=f"the lengths {lengths}",
                )
            if not all(math.isfinite(x) for vector in embeddings.vectors for x in vector):
                broken(did="embed", expected="finite numbers", saw="infinity or NaN")
            least = [bench.handler.count_tokens(bench.loaded, text) or 1 for text in _TEXTS]
            if type(embeddings.prompt_tokens) is not int or embeddings.prompt_tokens < sum(least):
                broken(
                    did=f"embed of texts with {least} tokens",
                    expected=f"prompt_tokens of {sum(least)} or more",
                    saw=repr(embeddings.prompt_tokens),
                )

    @check(needs="can-handle")
    async def test_embeddings_alone(self, kit: Kit) -> None:
        async with _model(kit) as bench:
            together = (await _embed(kit, bench, _TEXTS)).vectors
            _, turned = await asyncio.gather(
                _embed(kit, bench, ["Something else."]), _embed(kit, bench, _TEXTS[::-1])
            )
            for place, text in enumerate(_TEXTS):
                (alone,) = (await _embed(kit, bench, [text])).vectors
                for beside, vector in (
                    ("beside others", together[place]),
                    ("beside others in another order", turned.vectors[-1 - place]),
                ):
                    if (far := _distance(alone, vector)) > _CLOSE:
                        broken(
                            did=f"embed([{text!r}]) alone and {beside}",
                            expected="the same vector",
                            saw=f"vectors that differ by {far:.2g} of their length",
                        )
            if _distance(together[0], together[2]) <= _CLOSE:
                broken(
                    did=f"embed([{_TEXTS[0]!r}, {_TEXTS[2]!r}])",
                    expected="two vectors",
                    saw="the same one twice",
                )

    @check(needs="can-handle")
    async def test_embeddings_cancelled(self, kit: Kit) -> None:
        async with _model(kit) as bench:
            expected = (await _embed(kit, bench, _TEXTS)).vectors
            for turns in (0, 1, 3):
                work = kit.spawn(kit.handler.embed(bench.loaded, list(_TEXTS) * 4))
                await kit.turns(turns)
                work.cancel()
                did = f"cancelled embed after {turns} turns of the event loop"
                if not await kit.ended(work):
                    broken(did=did, expected="it ends", saw="it goes on")
                if not work.cancelled() and work.exception() is not None:
                    broken(did=did, expected="CancelledError", saw=repr(work.exception()))
            vectors = (await _embed(kit, bench, _TEXTS)).vectors
            if any(_distance(a, b) > _CLOSE for a, b in zip(expected, vectors, strict=True)):
                broken(
                    did="embed after cancelled ones",
                    expected="the vectors of before",
                    saw="other ones",
                )

    @check(needs="can-handle")
    async def test_embeddings_token_ids(self, kit: Kit) -> None:
        async with _model(kit) as bench:
            if not kit.capabilities.prompt_token_ids:
                skip("capabilities() does not claim prompt_token_ids; the service refuses them")
            beside = (await _embed(kit, bench, [_IDS, _TEXTS[0], _IDS[::-1]])).vectors
            embeddings = await _embed(kit, bench, [_IDS])
            same(f"embed([{_IDS}])", "prompt_tokens", len(_IDS), embeddings.prompt_tokens)
            if _distance(beside[0], embeddings.vectors[0]) > _CLOSE:
                broken(
                    did=f"embed of the ids {_IDS} alone and beside a text",
                    expected="the same vector",
                    saw="two",
                )
            ids = [*_IDS, MAX_TOKEN_ID]
            await _refused(kit, bench, ids, "embed of an id that no vocabulary has")

    @check(needs="can-handle")
    async def test_embeddings_refused(self, kit: Kit) -> None:
        if not kit.capabilities.embeddings:
            await kit.bench.load()
            await _refused(kit, kit.bench, "a", "embed, which capabilities() does not claim")
            return
        async with _model(kit) as bench:
            most = bench.loaded.max_context_tokens
            if most is None or most > 1 << 17:
                skip("max_context_tokens is not told, or too large to be filled")
            did = f"embed of a text of {most + 1} words, where max_context_tokens is {most}"
            await _refused(kit, bench, "duck " * (most + 1), did)


@asynccontextmanager
async def _model(kit: Kit) -> AsyncIterator[Bench]:
    """A model that makes embeddings: one of its own, where the suite names one."""
    if not kit.capabilities.embeddings:
        skip("capabilities() does not claim embeddings")
    if kit.embedding_config is None:
        await kit.bench.load()
        bench = kit.bench
        try:
            await kit.within(kit.handler.embed(bench.loaded, ["a"]), "embed")
        except ConfigurationError as error:
            skip(
                f"the model makes no embeddings ({error.message}); name one that does in the "
                "suite's fixture embedding_config"
            )
        yield bench
        return
    async with kit.other_model(kit.embedding_config) as bench:
        await bench.load()
        yield bench


async def _embed(kit: Kit, bench: Bench, texts: Sequence[str | Sequence[int]]) -> Embeddings:
    embeddings: object
    try:
        embeddings = await kit.within(kit.handler.embed(bench.loaded, list(texts)), "embed")
    except EngineRoomError as error:
        broken(did=f"embed({list(texts)!r})", expected="vectors", saw=error.describe())
    if not isinstance(embeddings, Embeddings):
        broken(
            did=f"embed({list(texts)!r})", expected="an Embeddings", saw=type(embeddings).__name__
        )
    return embeddings


async def _refused(kit: Kit, bench: Bench, text: str | list[int], did: str) -> None:
    work = kit.handler.embed(bench.loaded, [text])
    embeddings = await kit.outcome(work, did, ConfigurationError)
    if not isinstance(embeddings, ConfigurationError):
        broken(did=did, expected="a ConfigurationError", saw=type(embeddings).__name__)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two vectors, as a share of the longer one's length."""
    longer = max(math.hypot(*a), math.hypot(*b)) or 1.0
    return math.dist(a, b) / longer if len(a) == len(b) else math.inf
