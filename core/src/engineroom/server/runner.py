"""Running the server: listening, loading, and an end in good order.

SIGTERM and Ctrl-C: the server is not ready any more and takes no request; what runs gets the
drain's time; what is left is stopped, and its streams end properly; models are unloaded; the
exit status is 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from engineroom.errors import ConfigurationError, EngineRoomError
from engineroom.models.manager import LLMModelManager
from engineroom.models.reloading import at_hangup, reloading
from engineroom.server.app import Front, with_cors
from engineroom.server.http.compat_uvicorn import Server, connection_class
from engineroom.server.http.context import ServerContext
from engineroom.server.http.errors import stopping
from engineroom.server.http.protocol import GuardedConnection
from engineroom.server.settings import ServerSettings
from engineroom.service import LLMInferenceService
from engineroom.status import PreloadProgress

__all__ = ["EngineRoomServer", "bind", "loop_factory", "serve"]

logger = logging.getLogger("engineroom.server.runner")

CLOSE_S: Final = 5
"""Seconds that connections get to take the last bytes, once all work has ended."""


class EngineRoomServer(Server):
    """The server, with its limits and its way of ending.

    :param service: answers the requests; the server closes it in the end.
    :param settings: its limits, and who may use it.
    """

    def __init__(self, service: LLMInferenceService, settings: ServerSettings) -> None:
        self.context = ServerContext(service, settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._signals = 0
        self._rereading: set[asyncio.Task[None]] = set()
        super().__init__(
            with_cors(Front(self.context), settings),
            connection_class(GuardedConnection, limits=settings),
            settings,
            CLOSE_S,
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
        self.listening = started
        self.context.starting = preload and self.context.directory.manager is not None
        with self.context.loop_meter.running():
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

    async def _stop_all(self) -> None:
        try:
            await self._stop()
        finally:
            self.end()

    async def _stop(self) -> None:
        context = self.context
        context.draining = True
        context.limiter.refuse_waiting(stopping())
        try:
            await context.service.close(drain_timeout_s=context.settings.drain_timeout_s)
        except EngineRoomError as error:
            logger.error("closing failed: %s", error.describe())

    @contextlib.asynccontextmanager
    async def _reloading(self, watch: bool) -> AsyncIterator[None]:
        manager, keys = self.context.directory.manager, self.context.settings.keys
        async with contextlib.AsyncExitStack() as stack:
            now: list[Callable[[], object]] = [self._reread_keys] if keys.from_files else []
            if manager is not None and (watch or _has_file(manager)):
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
            preloaded = [m.model_id for m in manager.config.models if m.preload]
            nothing = all(manager.get_loaded_model(name) is None for name in preloaded)
            if nothing and not self.context.draining:
                self.stop()
                raise
            logger.error("a model could not be preloaded: %s", error.describe())
        finally:
            self.context.starting = False

    def signalled(self) -> None:
        """Stop; at the second signal, at once."""
        self._signals += 1
        if self._signals > 1:
            self.end(at_once=True)
            raise KeyboardInterrupt
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop)


def _has_file(manager: LLMModelManager) -> bool:
    try:
        manager.config_path  # noqa: B018 - it raises where there is none
    except ConfigurationError:
        return False
    return True


def bind(settings: ServerSettings) -> socket.socket:
    """The socket to listen on.

    :raises ConfigurationError: the address is no address, or in use.
    """
    host = settings.host.strip("[]")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {settings.host!r}: {error.strerror}; check --host"
        ) from error
    try:
        if hasattr(signal, "SIGALRM"):  # on Windows the option means something else
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "give another --port, or stop what uses this one"
        ) from error
    return bound


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
) -> None:
    """Serve until SIGTERM or Ctrl-C. Blocks; closes the service in the end.

    :param settings: by default those of a server that only this machine reaches.
    :param preload: load the configured models at once rather than with their first requests.
    :param started: called with the server's URL once it listens.
    :param watch: read the deployment file anew whenever it changes, as SIGHUP does.
    :param progress: is told before and after each model that is preloaded.
    :raises ConfigurationError: it cannot listen there, or cannot watch.
    :raises EngineRoomError: no model at all could be preloaded.
    """
    settings = settings or ServerSettings()
    bound = bind(settings)
    name = bound.getsockname()
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    url = f"http://{host}:{name[1]}"
    server = EngineRoomServer(service, settings)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        work = server.run_until_stopped(
            [bound], preload, started=lambda: started(url), watch=watch, progress=progress
        )
        runner.run(work)
