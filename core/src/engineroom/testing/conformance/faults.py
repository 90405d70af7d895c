"""Checks of what goes wrong: requests that fail, models pulled away, loads without end."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import AsyncGenerator
from typing import Any, Final

from engineroom.errors import ContextLengthExceededError, EngineRoomError, ResourceNotAvailableError
from engineroom.schemas import ChatMessage, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again, refused, said
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, same, skip, told

__all__ = ["FaultChecks"]

_GROWTH: Final = 48 << 20
"""Bytes that a process may grow by over the cycles: allocators keep some."""
_POOL: Final = "asyncio_"
"""Names of the threads of the loop's own executor, which come one by one and stay."""


class FaultChecks(Checks):
    """What goes wrong."""

    @check()
    async def test_prompt_too_long(self, kit: Kit) -> None:
        context = kit.bench.loaded.max_context_tokens
        if context is None or context > 1 << 16:
            skip("the context is unbounded, or too large to be overrun here")
        request = kit.likely(await _overlong(kit, context), 4)
        did = f"with a prompt that is longer than the context of {context} tokens"
        for way, response in (
            ("infer", await kit.bench.infer(request)),
            ("stream", await _stream_error(kit, again(request))),
        ):
            refused(response, f"{way} {did}", kind=ContextLengthExceededError)

    @check()
    async def test_failing_request(self, kit: Kit) -> None:
        request = await kit.lengthy()
        bad = await _bad_requests(kit)
        well = kit.bench.health().ok
        plain = await kit.bench.answer(kit.watched(request))

        async def beside(watched: InferenceRequest) -> InferenceResponse:
            neighbour = kit.spawn(kit.bench.answer(again(watched)))
            await kit.turns(4)
            for bad_request in bad:
                await kit.bench.infer(again(bad_request))
                await _stream_error(kit, again(bad_request))
            answer = await kit.within(neighbour, f"infer({said(request)})")
            if await kit.difference(watched, plain, answer) is not None:
                return answer
            return await kit.bench.answer(again(watched))

        did = f"infer({said(request)}) beside and after {len(bad)} requests that fail"
        await kit.unchanged(did, "the text that it has without them", request, beside)
        if well and not kit.bench.health().ok:
            broken(
                did=f"{len(bad)} requests that fail",
                expected="health that is ok",
                saw=repr(kit.bench.health()),
            )

    @check()
    async def test_unload_in_use(self, kit: Kit) -> None:
        async with kit.own_model() as bench:
            await bench.load()
            request = await kit.lengthy(bench)
            stream = bench.open(again(request))
            await kit.within(anext(stream, ""), f"stream({said(request)})")
            try:
                await kit.within(
                    bench.manager.unload(bench.config.model_id, timeout_s=0.01), "unload"
                )
            except ResourceNotAvailableError:
                pass
            await kit.within(stream.aclose(), "aclose()")
            await kit.within(bench.manager.unload(bench.config.model_id), "unload_model")
            # And without the manager, which waits for those that use the model.
            loaded = await kit.within(kit.handler.load_model(bench.config), "load_model")
            generator = kit.handler.stream_infer(loaded, again(request))
            kit.opened.append(generator.aclose)
            await kit.within(anext(generator, ""), f"stream_infer({said(request)})")
            reader = kit.spawn(_outcome(generator))
            did = "unload_model() while stream_infer was read"
            await kit.within(kit.handler.unload_model(loaded), did)
            error = await kit.within(reader, f"the rest of the stream after {did}")
            if error is not None and not isinstance(error, EngineRoomError):
                broken(
                    did=did,
                    expected="that the stream ends, or fails with an error of engineroom's",
                    saw=told(error),
                )

    @check()
    async def test_load_cycles(self, kit: Kit) -> None:
        cycles = kit.settings.load_cycles
        if cycles < 4:
            skip("load_cycles is less than 4: there is nothing to compare")
        await kit.need_determinism()
        living: list[weakref.ref[Any]] = []
        marks: list[dict[str, int]] = []
        first: str | None = None
        async with kit.own_model() as bench:
            request = kit.likely(n=2, model_id=bench.config.model_id)
            for number in range(cycles):
                living.append(weakref.ref(await bench.load()))
                text = (await bench.answer(again(request))).generated_text
                await kit.within(bench.manager.unload(bench.config.model_id), "unload_model")
                first = text if first is None else first
                did = f"loaded the model for the {number + 1}th time"
                same(did, "the text of the first time", first, text)
                if number in (cycles // 4, cycles - 1):
                    gc.collect()
                    marks.append(_used())
        before, after = marks
        between = cycles - 1 - cycles // 4
        did = f"loaded and unloaded the model {cycles} times"
        alive = sum(ref() is not None for ref in living)
        if alive > 1:
            broken(did=did, expected="no LoadedModel left", saw=f"{alive} are still referred to")
        for name in ("threads", "files"):
            if after[name] - before[name] >= max(2, between // 2):
                broken(
                    did=did,
                    expected=f"as many {name} as before",
                    saw=f"{after[name]} {name}, {before[name]} after {cycles // 4 + 1} times",
                )
        if (growth := after["bytes"] - before["bytes"]) > _GROWTH:
            broken(
                did=did,
                expected=f"memory that grows by no more than {_GROWTH >> 20} MiB",
                saw=f"{growth >> 20} MiB more in the last {between} times",
            )


async def _stream_error(kit: Kit, request: InferenceRequest) -> Any:
    stream = kit.bench.open(request)

    async def read() -> None:
        async for _ in stream:
            pass

    await kit.within(read(), f"stream({said(request)})")
    return stream.response


async def _overlong(kit: Kit, context: int) -> str:
    prompt = await kit.long_prompt(1.0, most=context)
    return prompt * 2


async def _bad_requests(kit: Kit) -> list[InferenceRequest]:
    """Requests that most runtimes refuse, each in another place."""
    requests = [
        kit.likely("", 4),
        kit.likely(n=4, params={"num_beams": 3, "early_stopping": True}),
    ]
    context = kit.bench.loaded.max_context_tokens
    if context is not None and context <= 1 << 16:
        requests.append(kit.likely(await _overlong(kit, context), 4))
    if kit.honours("logit_bias"):
        far = {**kit.greedy(), "logit_bias": {2**31 - 1: 1.0}}
        requests.append(kit.request(n=4, params=far))
    if kit.capabilities.chat:
        odd = [ChatMessage(role="tool", content="42"), ChatMessage(role="assistant", content="?")]
        requests.append(kit.likely(n=4, messages=odd))
    return requests


async def _outcome(generator: AsyncGenerator[str, None]) -> BaseException | None:
    try:
        async for _ in generator:
            pass
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - looked at by the caller
        return error
    return None


def _used() -> dict[str, int]:
    import psutil

    process = psutil.Process()
    count = "num_handles" if sys.platform == "win32" else "num_fds"
    files: int = getattr(process, count)()
    threads = [t for t in threading.enumerate() if not t.name.startswith(_POOL)]
    return {"threads": len(threads), "files": files, "bytes": process.memory_info().rss}
