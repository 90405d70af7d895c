"""A server on a free port, in this process, with real sockets. Needs the extra ``server``."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from server_doubles import TalkHandler

from engineroom import LLMInferenceService, LLMModelManager
from engineroom.handlers.base import InferenceHandler
from engineroom.server.listening import url_of
from engineroom.server.runner import EngineRoomServer, bind, loop_factory
from engineroom.server.settings import ServerSettings


@dataclass
class Running:
    """A server that runs in a thread of its own, with its loop."""

    url: str
    port: int
    server: EngineRoomServer
    service: LLMInferenceService
    manager: LLMModelManager
    handler: Any
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def call(self, work: Callable[[], Any]) -> Any:
        """Run something on the server's loop."""

        async def run() -> Any:
            result = work()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def until(self, predicate: Callable[[], Any], what: str = "") -> None:
        """Wait until something is so on the server."""

        async def wait() -> None:
            while not predicate():
                await asyncio.sleep(0.005)

        try:
            asyncio.run_coroutine_threadsafe(wait(), self.loop).result(20)
        except TimeoutError:
            raise AssertionError(f"never came to be: {what or predicate}") from None

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextmanager
def running(
    models: list[dict[str, Any]] | None = None,
    handler: InferenceHandler | list[InferenceHandler] | None = None,
    wait: bool = True,
    max_requests: int = 1024,
    **settings: Any,
) -> Iterator[Running]:
    handler = handler or TalkHandler()
    manager = LLMModelManager(
        config={"models": models or [{"model_id": "m", "source": "talk:", "aliases": ["default"]}]}
    )
    handlers = handler if isinstance(handler, list) else [handler]
    service = LLMInferenceService(manager, handlers=handlers, max_requests=max_requests)
    told = ServerSettings(port=0, **{"drain_timeout_s": 0, "max_priority": 100, **settings})
    bound = bind(told)
    name = bound.getsockname()
    port = 0 if isinstance(name, str) else name[1]
    server = EngineRoomServer(service, told)
    started = threading.Event()
    failed: list[BaseException] = []
    loops: list[asyncio.AbstractEventLoop] = []

    def work() -> None:
        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await server.run_until_stopped([bound], started=started.set)

        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(main())
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(20)
    assert not failed, failed
    run = Running(url_of(bound, told), port, server, service, manager, handler, loops[0], thread)
    try:
        if wait:
            run.until(lambda: not server.context.starting, "preloaded")
        yield run
    finally:
        if thread.is_alive():
            run.loop.call_soon_threadsafe(server.stop)
            thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
    if failed:
        raise failed[0]
