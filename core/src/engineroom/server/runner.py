"""Running the server: listening, loading, and an end in good order.

SIGTERM and Ctrl-C: the server is not ready any more and takes no request; what runs gets the
drain's time; what is left is stopped, and its streams end properly; models are unloaded; the
exit status is 0. A second signal cuts the drain short: what runs is stopped at once, and told so
like the rest. A third ends the process where it stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from engineroom.border import get_logger, run_to_end
from engineroom.errors import EngineRoomError
from engineroom.models.reloading import at_hangup, reloading
from engineroom.server.app import Front, with_cors
from engineroom.server.descriptors import DescriptorWatch, raise_limit
from engineroom.server.http.compat_uvicorn import Server, connection_class
from engineroom.server.http.context import ServerContext
from engineroom.server.http.errors import stopping
from engineroom.server.http.protocol import GuardedConnection
from engineroom.server.listening import bind, removed_at_end, tls_context, url_of
from engineroom.server.long_lived import LongLived
from engineroom.server.settings import ServerSettings
from engineroom.service import LLMInferenceService
from engineroom.status import PreloadProgress

__all__ = ["EngineRoomServer", "bind", "loop_factory", "serve"]

logger = get_logger("engineroom.server.runner")

_INTERRUPTED: Final = 130
CLOSE_S: Final = 5
"""Seconds that connections get to take the last bytes, once all work has ended."""
HURRIED_CLOSE_S: Final = 1
"""As ``CLOSE_S``, after a second signal."""
PATIENCE_S: Final = 10.0
"""Seconds from a second signal to the process's end, whatever unloads or blocks a thread then."""


class EngineRoomServer(Server):
    """The server, with its limits and its way of ending.

    :param service: answers the requests; the server closes it in the end.
    :param settings: its limits, and who may use it.
    """

    def __init__(self, service: LLMInferenceService, settings: ServerSettings) -> None:
        self.context = ServerContext(service, settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._hurrying: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._signals = 0
        self._long_lived = LongLived()
        self._rereading: set[asyncio.Task[None]] = set()
        self._guard = threading.Timer(PATIENCE_S, _leave)
        self._guard.daemon = True
        super().__init__(
            with_cors(Front(self.context), settings),
            connection_class(GuardedConnection, limits=settings, resting=OrderedDict()),
            settings,
            tls_context(settings),
        )

    async def run_until_stopped(
        self,
        sockets: list[socket.socket],
        preload: bool = True,
        started: Callable[[], None] = lambda: None,
        *,
        watch: bool = False,
        progress: Callable[[PreloadProgress], None] | None = None,
    ) -> None:
        """Serve until a signal, or :meth:`stop`, ends it.

        SIGHUP has the deployment file and the key files read anew, where there are any.

        :param sockets: where to listen; they are closed in the end.
        :param preload: load the configured models, while ``/readyz`` says that it is not ready.
        :param started: called once the server listens.
        :param watch: read the deployment file anew whenever it changes.
        :param progress: is told before and after each model that is preloaded.
        :raises ConfigurationError: ``watch`` lacks its library, or there is no deployment file.
        :raises EngineRoomError: no model at all could be preloaded.
        """
        self._loop = asyncio.get_running_loop()
        if self._signals:  # it came while the loop was made
            for unused in sockets:
                unused.close()
            await self._stop()
            return
        self.listening = started
        self.context.starting = preload and self.context.directory.manager is not None
        long_lived = self._long_lived.set_aside(self.context.service.registry)
        with self.context.loop_meter.running(), DescriptorWatch(), long_lived:
            async with self._reloading(watch):
                loading = asyncio.create_task(self._preload(progress))
                try:
                    await self.serve(sockets)
                finally:
                    loading.cancel()
                    await self._stop()
                    await asyncio.wait([loading])
                if not loading.cancelled():
                    loading.result()

    def stop(self) -> None:
        """Begin to stop, as a signal does. On the loop only; may be called again."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop_all())

    def stop_at_once(self) -> None:
        """Stop what runs without draining, as a second signal does. As :meth:`stop` else."""
        self.stop()
        if self._hurrying is None:
            self._hurrying = asyncio.create_task(self._close(0))

    @property
    def hurried(self) -> bool:
        """Whether it was stopped at once."""
        return self._hurrying is not None

    async def _stop_all(self) -> None:
        try:
            await self._stop()
        finally:
            self.end(HURRIED_CLOSE_S if self.hurried else CLOSE_S)

    async def _stop(self) -> None:
        context = self.context
        context.draining = True
        context.limiter.refuse_waiting(stopping())
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(context.settings.drain_timeout_s))
        await asyncio.wait([self._closing])

    async def _close(self, drain_timeout_s: float) -> None:
        try:
            await self.context.service.close(drain_timeout_s=drain_timeout_s)
        except EngineRoomError as error:
            logger.error("closing failed: %s", error.describe())

    @contextlib.asynccontextmanager
    async def _reloading(self, watch: bool) -> AsyncIterator[None]:
        manager, keys = self.context.directory.manager, self.context.settings.keys
        async with contextlib.AsyncExitStack() as stack:
            now: list[Callable[[], object]] = [self._reread_keys] if keys.from_files else []
            if manager is not None and (watch or self.context.directory.has_file):
                event = await stack.enter_async_context(
                    reloading(manager, on_signal=False, watch=watch)
                )
                now.append(event.set)
            if now:
                stack.enter_context(at_hangup(lambda: [reload() for reload in now]))
            yield

    def _reread_keys(self) -> None:
        async def reread() -> None:
            with contextlib.suppress(EngineRoomError):  # the log says why
                await self.context.callers.reload_keys()

        task = asyncio.get_running_loop().create_task(reread())
        self._rereading.add(task)
        task.add_done_callback(self._rereading.discard)

    async def _preload(self, progress: Callable[[PreloadProgress], None] | None) -> None:
        """Load the models; without a single one the server ends."""
        manager = self.context.directory.manager
        if manager is None or not self.context.starting:
            return
        try:
            await manager.load_configured_models(progress)
        except EngineRoomError as error:
            if self.context.draining:
                return
            preloaded = [m.model_id for m in manager.config.models if m.preload]
            nothing = all(manager.get_loaded_model(name) is None for name in preloaded)
            if nothing:
                self.stop()
                raise
            logger.error("a model could not be preloaded: %s", error.describe())
        finally:
            self._long_lived.settle()
            self.context.starting = False

    def signalled(self, number: int) -> None:
        """Stop; at the second signal, at once; at the third, whatever goes on."""
        self._signals += 1
        if self._signals > 2:
            os._exit(128 + number)
        if self._signals == 2:
            self._guard.start()
        if self._loop is not None:
            stop = self.stop if self._signals == 1 else self.stop_at_once
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                self._loop.call_soon_threadsafe(stop)

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """Be told of signals that ask the process to end. In the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            self._guard.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop where it is installed; ``None``: asyncio's own."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None


def serve(
    service: LLMInferenceService,
    settings: ServerSettings | None = None,
    *,
    preload: bool = True,
    started: Callable[[str], Any] = lambda _: None,
    watch: bool = False,
    progress: Callable[[PreloadProgress], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Blocks; closes the service in the end.

    :param settings: by default those of a server that only this machine reaches.
    :param preload: load the configured models at once rather than with their first requests.
    :param started: called with the server's URL once it listens.
    :param watch: read the deployment file anew whenever it changes, as SIGHUP does.
    :param progress: is told before and after each model that is preloaded.
    :param stopped: asked once signals are heard here: whether one came before, which then ends it.
    :raises ConfigurationError: it cannot listen there, or speak TLS, or watch.
    :raises EngineRoomError: no model at all could be preloaded.
    :raises KeyboardInterrupt: a second signal came, and running requests were stopped.
    """
    settings = settings or ServerSettings()
    raise_limit(settings)
    server = EngineRoomServer(service, settings)
    bound = bind(settings)
    url = url_of(bound, settings)
    # From before the loop to behind it: a signal then neither kills nor is lost.
    with (
        removed_at_end(bound),
        server.hearing(),
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        if stopped():
            server.signalled(signal.SIGTERM)
        work = server.run_until_stopped(
            [bound], preload, started=lambda: started(url), watch=watch, progress=progress
        )
        run_to_end(runner, work)
    if server.hurried:
        raise KeyboardInterrupt


def _leave() -> None:
    logger.warning("something does not end; the process ends without it")
    os._exit(_INTERRUPTED)  # sys.exit would wait for the thread that could not be waited for
