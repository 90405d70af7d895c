"""Checks of stopping a request: when, how, and what becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.loop import where
from engineroom.testing.conformance.outcomes import broken, skip, told
from engineroom.testing.conformance.patience import quietly

__all__ = ["CancellationChecks"]

_TURNS = 8
"""Turns of the loop in which a request gets to work."""


class CancellationChecks(Checks):
    """A request that nobody wants any more."""

    @check()
    async def test_cancel_by_task(self, kit: Kit) -> None:
        request = await kit.lengthy()
        loaded = kit.bench.loaded
        infer = kit.spawn(kit.handler.infer(loaded, again(request)))
        await kit.turns(_TURNS)
        if infer.done():
            skip("the answer was there at once: there was nothing to cancel")
        await _passes(kit, infer, f"infer({said(request)}), cancelled while it decoded")
        began = asyncio.Event()
        stream = kit.spawn(_read(kit.bench.direct(again(request)), began))
        await kit.within(began.wait(), f"the first chunk of stream_infer({said(request)})")
        if not stream.done():
            await _passes(kit, stream, f"stream_infer({said(request)}), its reader cancelled")

    @check()
    async def test_cancel_by_aclose(self, kit: Kit) -> None:
        request = await kit.lengthy()
        did = f"aclose() after the first chunk of stream_infer({said(request)})"
        generator = kit.bench.direct(again(request))
        await kit.within(anext(generator), f"stream_infer({said(request)})")
        try:
            await kit.within(generator.aclose(), did)
        except RuntimeError as error:
            broken(did=did, expected="that the generator ends", saw=f"RuntimeError: {error}")
        try:
            chunk = await kit.within(anext(generator), "the next chunk after aclose()")
        except StopAsyncIteration:
            return
        broken(did=did, expected="no chunk any more", saw=repr(chunk))

    @check()
    async def test_cancel_by_deadline(self, kit: Kit) -> None:
        request = await kit.lengthy()
        # While nobody reads: whatever the runtime's speed, the stream has not been read then.
        late = again(request, timeout_s=0.05)
        stream = kit.bench.open(late)
        chunks = [await kit.within(anext(stream, ""), f"stream({said(late)})")]
        if not await kit.until(lambda: stream.response is not None):
            broken(
                did=f"stream({said(late)}), not read after its first chunk",
                expected="its end at the deadline",
                saw="that it had not ended long after",
            )
        response = stream.response
        assert response is not None
        if response.finish_reason != "timeout":
            broken(
                did=f"stream({said(late)}), not read after its first chunk ({chunks[0]!r})",
                expected="the finish reason 'timeout'",
                saw=f"{response.finish_reason!r} {response.error_message or ''}",
            )
        # While it is waited for: a quick runtime may be done before, which is as well.
        whole = await kit.bench.infer(again(request, timeout_s=0.02))
        if whole.finish_reason not in ("timeout", "length", "eos_token"):
            broken(
                did=f"infer({said(request)}, timeout_s=0.02)",
                expected="the finish reason 'timeout', or an answer",
                saw=f"{whole.finish_reason!r} {whole.error_message or ''}",
            )

    @check()
    async def test_cancel_in_prefill(self, kit: Kit) -> None:
        prompt = await kit.long_prompt()
        request = kit.likely(prompt, 24)
        for turns in (1, 2, 3, 5):
            infer = kit.spawn(kit.handler.infer(kit.bench.loaded, again(request)))
            await kit.turns(turns)
            if not infer.done():
                await _passes(kit, infer, f"infer({said(request)}), cancelled in its beginning")
        stream = kit.bench.open(again(request))
        reader = kit.spawn(_read(stream, asyncio.Event()))
        await kit.turns(3)
        did = f"aclose() of stream({said(request)}) before its first chunk"
        await kit.within(stream.aclose(), did)
        await kit.within(quietly(reader), did)
        await kit.bench.infer(again(request, timeout_s=0.001))
        await kit.bench.answer(kit.likely(n=2))

    @check()
    async def test_cancel_while_queued(self, kit: Kit) -> None:
        async with kit.narrow_model() as bench:
            request = await kit.lengthy(bench)
            request = kit.watched(request)
            alone = await bench.answer(again(request))
            active = kit.spawn(bench.answer(again(request)))
            await kit.until(lambda: active.done() or bench.health().num_requests_running > 0)
            queued = kit.spawn(kit.handler.infer(bench.loaded, again(request)))
            await kit.until(
                lambda: active.done() or queued.done() or bench.health().num_requests_waiting > 0
            )
            if active.done() or queued.done() or not bench.health().num_requests_waiting:
                skip("no request was seen to wait: the runtime has no queue, or is too quick")
            await _passes(kit, queued, "infer(…), cancelled while it was queued")
            if not await kit.until(lambda: bench.health().num_requests_waiting == 0):
                broken(
                    did="cancelled the request that was queued",
                    expected="that it leaves the queue",
                    saw=f"{bench.health()}",
                )
            beside = await kit.within(active, "the request that was running")
            if (wrong := await kit.difference(request, alone, beside)) is not None:
                broken(
                    did="cancelled a request that was queued, while another ran",
                    expected=f"the text of the one that ran, {alone.generated_text!r}",
                    saw=wrong,
                )

    @check()
    async def test_slots_return(self, kit: Kit) -> None:
        request = await kit.lengthy()
        for place in range(_TURNS):
            generator = kit.bench.direct(again(request))
            try:
                await kit.within(anext(generator), f"stream_infer({said(request)})")
            except StopAsyncIteration:
                continue
            await kit.within(quietly(generator.aclose()), "aclose()")
            task = kit.spawn(kit.bench.infer(again(request)))
            await kit.turns(place)
            task.cancel()
            await kit.within(quietly(task), "infer, cancelled")
            await kit.bench.infer(again(request, timeout_s=0.005))
        idle = await kit.until(lambda: _busy(kit) == 0)
        if not idle:
            health = kit.bench.health()
            broken(
                did=f"cancelled {3 * _TURNS} requests, by aclose(), by task and by deadline",
                expected="that health counts no request any more",
                saw=f"{health.num_requests_running} running, {health.num_requests_waiting} waiting",
            )
        await kit.bench.answer(kit.likely(n=2))

    @check()
    async def test_neighbours_go_on(self, kit: Kit) -> None:
        request = await kit.lengthy()

        async def beside(watched: InferenceRequest) -> InferenceResponse:
            neighbour = kit.spawn(kit.bench.answer(again(watched)))
            closed = kit.bench.direct(again(request))
            cancelled = kit.spawn(kit.bench.infer(again(request)))
            await kit.within(anext(closed, ""), f"stream_infer({said(request)})")
            await kit.turns(4)
            await kit.within(quietly(closed.aclose()), "aclose()")
            cancelled.cancel()
            await kit.within(quietly(cancelled), "infer, cancelled")
            return await kit.within(neighbour, f"infer({said(request)})")

        did = f"infer({said(request)}), beside requests that were closed and cancelled"
        await kit.unchanged(did, "the text that it has alone", request, beside)


def _busy(kit: Kit) -> int:
    health = kit.bench.health()
    return health.num_requests_running + health.num_requests_waiting


async def _read(chunks: AsyncGenerator[str, None], began: asyncio.Event) -> None:
    async for _ in chunks:
        began.set()


async def _passes(kit: Kit, task: asyncio.Task[Any], did: str) -> None:
    """Cancel, and see that the cancellation comes out."""
    task.cancel()
    if not await kit.ended(task):
        broken(
            did=did,
            expected="its end within a decoding step",
            saw=f"that it went on; it waits {where(task)}",
        )
    if not task.cancelled():
        error = task.exception()
        broken(
            did=did,
            expected="CancelledError, passed on",
            saw=told(error) if error else "an answer: it was swallowed",
        )
