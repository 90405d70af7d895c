"""Checks of the event loop, of tasks, and of the suite itself."""

from __future__ import annotations

import asyncio

from engineroom.testing.conformance.base import Checks, check
from engineroom.testing.conformance.bench import again
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken
from engineroom.testing.conformance.patience import quietly

__all__ = ["HygieneChecks"]

_REQUESTS = 6


class HygieneChecks(Checks):
    """What is left behind, and who is held up."""

    @check()
    async def test_loop_is_free(self, kit: Kit) -> None:
        async with kit.own_model() as bench:
            prompt = await kit.long_prompt()
            await kit.turns(2)
            kit.loop.forget_stalls()
            await bench.load()
            for text in (kit.settings.prompt, prompt):
                request = kit.likely(text, 12, model_id=bench.config.model_id)
                await bench.answer(request)
                await bench.stream(again(request))
            await kit.within(bench.manager.unload(bench.config.model_id), "unload_model")
            await asyncio.sleep(0.05)  # the watch beats once more
        stall, place = kit.loop.stall()
        if stall > kit.settings.max_stall_s:
            broken(
                did="loaded a model, read a long prompt, generated, and unloaded it",
                expected=f"an event loop that is never held up for {kit.settings.max_stall_s:g} s",
                saw=f"{stall:.2f} s {place}".rstrip(),
            )

    @check()
    async def test_no_leaked_tasks(self, kit: Kit) -> None:
        request = kit.likely(n=4)
        await kit.bench.answer(again(request))  # an engine may begin its own with the first
        await kit.turns()
        before = kit.tasks()
        for number in range(_REQUESTS):
            if number % 2:
                await kit.bench.stream(again(request))
            else:
                await kit.bench.answer(again(request))
        generator = kit.bench.direct(again(request))
        await kit.within(anext(generator, ""), "stream_infer")
        await kit.within(quietly(generator.aclose()), "aclose()")

        def left() -> list[asyncio.Task[object]]:
            return [task for task in kit.tasks() - before if not task.done()]

        if await kit.until(lambda: len(left()) <= 1):
            return
        names = sorted({getattr(t.get_coro(), "__qualname__", t.get_name()) for t in left()})
        broken(
            did=f"{_REQUESTS + 1} requests, all of which have ended",
            expected="the tasks that there were before",
            saw=f"{len(left())} more: {', '.join(names)}",
        )
