"""Use a service, fork, and use it and another one in the child; prints what came of it.

    python forked_service.py MODULE:HANDLER SOURCE

Each use in the child has a deadline, and some seconds more; then it counts as hanging.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import traceback

from engineroom import (
    EngineRoomError,
    GenerationParams,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
)

HANG_S = 20.0


def request(**more):
    params = GenerationParams(max_new_tokens=3, temperature=0)
    return InferenceRequest(model_id="m", prompt="one two three", params=params, **more)


def make():
    module, name = sys.argv[1].split(":")
    manager = LLMModelManager(config={"models": [{"model_id": "m", "source": sys.argv[2]}]})
    handler = getattr(importlib.import_module(module), name)()
    return LLMInferenceService(manager, handlers=[handler]), manager


async def told(work):
    """What came of a use: an error's name and message, or a text."""
    try:
        async with asyncio.timeout(HANG_S):
            value = await work
    except TimeoutError:
        return "it hangs", ""
    except EngineRoomError as error:
        return type(error).__name__, error.message
    return "done", str(value)


async def answered(service, timeout_s=HANG_S / 2):
    response = await service.infer(request(timeout_s=timeout_s))
    response.raise_for_error()
    return response.generated_text


async def streamed(service):
    chunks = [chunk async for chunk in service.stream(request())]
    if (error := getattr(chunks[-1], "error", None)) is not None:
        raise error
    return "".join(chunks)


async def leased(manager):
    async with manager.lease("m") as loaded:
        return loaded.model_id


async def uses(service, manager):
    works = {
        "infer": answered(service),
        "stream": streamed(service),
        "embed": service.embed("m", ["a"]),
        "load": manager.load("m"),
        "lease": leased(manager),
        "unload": manager.unload("m"),
        "reload": manager.reload({"models": []}),
        "close": service.close(),
        "close the manager": manager.close(),
    }
    return {name: await told(work) for name, work in works.items()}


def blocking(service):
    """The ways of those who have no event loop."""
    came = {}
    for name, use in {
        "run": lambda: service.run(request()).raise_for_error(),
        "stream_sync": lambda: list(service.stream_sync(request())),
        "close_sync": service.close_sync,
    }.items():
        try:
            came[name] = "done", str(use())
        except EngineRoomError as error:
            came[name] = type(error).__name__, error.message
    return came


def in_child(work) -> dict[str, object]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(write, "w") as told_to:
                json.dump(work(), told_to)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as told_by:
        came = told_by.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, (status, came)
    return json.loads(came)


async def main() -> None:
    service, manager = make()
    unused, _ = make()
    async with service:
        text = await answered(service, None)
        blocker, _ = make()
        await asyncio.to_thread(blocker.run, request())

        # The child of a program with an event loop: it leaves the loop alone.
        def child():
            asyncio._set_running_loop(None)
            return {
                "old": asyncio.run(uses(service, manager)),
                "blocking": blocking(blocker),
                "unused": asyncio.run(told(answered(unused))),
                "new": asyncio.run(told(answered(make()[0]))),
            }

        came = await asyncio.to_thread(in_child, child)
        again = await answered(service)
    blocker.close_sync()
    print(json.dumps({"pid": os.getpid(), "text": text, "again": again, **came}))


if __name__ == "__main__":
    asyncio.run(main())
