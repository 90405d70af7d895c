"""When the deployment file is read again: at SIGHUP, and when it has changed.

.. code-block:: python

    async with reloading(manager, watch=True):
        ...  # serve

A file with mistakes changes nothing: the log says what is wrong, and the old deployment goes on.
Watching needs ``pip install "engineroom[watch]"``.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any

from engineroom.border import get_logger, log_failure, passes
from engineroom.config.deployment import deployment_path
from engineroom.errors import ConfigurationError, EngineRoomError
from engineroom.models.manager import LLMModelManager

__all__ = ["at_hangup", "reloading"]

logger = get_logger("engineroom.triggers")


@asynccontextmanager
async def reloading(
    manager: LLMModelManager, *, on_signal: bool = True, watch: bool = False
) -> AsyncIterator[asyncio.Event]:
    """Reload the manager's deployment file when asked to, as long as the block runs.

    :param on_signal: reload at SIGHUP, where the system has that signal and the loop runs in the
        main thread; elsewhere this does nothing.
    :param watch: reload when the file has changed.
    :returns: an event; setting it reloads, too.
    :raises ConfigurationError: ``watch`` needs a library that is not installed, or the manager has
        no deployment file.
    """
    reload_now = asyncio.Event()
    tasks = {asyncio.create_task(_reload_when(reload_now, manager), name="engineroom-reload")}
    try:
        with at_hangup(reload_now.set) if on_signal else nullcontext():
            if watch:
                changes = _changes(manager)
                tasks.add(asyncio.create_task(_watch(changes, reload_now), name="engineroom-watch"))
            yield reload_now
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@contextmanager
def at_hangup(reload: Callable[[], object]) -> Iterator[None]:
    """Call ``reload`` on the running loop at each SIGHUP, where that can be, inside the block."""
    if not hasattr(signal, "SIGHUP"):  # Windows
        yield
        return
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGHUP, reload)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        logger.info("SIGHUP does not reload anything here: %s", error)
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def _reload_when(reload_now: asyncio.Event, manager: LLMModelManager) -> None:
    """One reload after another; several requests for one are one."""
    while True:
        await reload_now.wait()
        reload_now.clear()
        try:
            await manager.reload()  # which tells of it
        except EngineRoomError as error:
            logger.error("the deployment was not reloaded, the old one goes on: %s", error)
        except BaseException as error:
            if passes(error):
                raise
            log_failure(logger, error, "the deployment was not reloaded")


def _changes(manager: LLMModelManager) -> AsyncIterator[set[tuple[Any, str]]]:
    try:
        from watchfiles import awatch
    except ImportError as error:
        raise ConfigurationError(
            'watching the deployment file needs watchfiles; pip install "engineroom[watch]", or '
            "reload with SIGHUP"
        ) from error
    file = deployment_path(manager.config_path)
    name = file.name

    def ours(_: object, path: str) -> bool:
        return os.path.basename(path) == name  # noqa: PTH119 - called for every file of the folder

    # The folder, because a file that is replaced by another of its name is no longer watched; and
    # what it may link to (as in Kubernetes) is replaced by a change of a link beside it.
    only_ours = None if file.is_symlink() else ours
    folder = file.resolve().parent if only_ours else file.parent
    changes: AsyncIterator[set[tuple[Any, str]]] = awatch(folder, watch_filter=only_ours)
    return changes


async def _watch(changes: AsyncIterator[set[tuple[Any, str]]], reload_now: asyncio.Event) -> None:
    try:
        async for _ in changes:
            reload_now.set()
    except BaseException as error:  # it is written in Rust, and may panic
        if passes(error):
            raise
        log_failure(
            logger,
            error,
            "the deployment file is not watched any more; reload it by SIGHUP or by hand",
        )
