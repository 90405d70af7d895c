"""What vLLM raises about a request, as errors of engineroom's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from engineroom import Border, ConfigurationError, EngineRoomError, InferenceError
from engineroom_vllm.library import Library
from engineroom_vllm.lifecycle import Lifecycle

__all__ = ["Failures"]

logger = logging.getLogger("engineroom.vllm")

_T = TypeVar("_T")


class Failures:
    """Makes errors of requests typed, of one engine."""

    def __init__(self, library: Library, lifecycle: Lifecycle) -> None:
        self._library = library
        self._lifecycle = lifecycle

    @contextmanager
    def typed(self) -> Iterator[None]:
        """Meanwhile, what vLLM raises about a request is made an error of engineroom's."""
        try:
            yield
        except EngineRoomError:
            raise
        except self._library.dead_error as error:
            # Without its traceback, whose frames would keep vLLM's objects alive.
            raise self._lifecycle.gone() from error.with_traceback(None)
        except self._library.request_errors as error:
            raise ConfigurationError(f"vLLM refuses the request: {error}") from error
        except Exception as error:
            if self._lifecycle.ended:
                cause = error.__cause__
                why = cause.message if isinstance(cause, EngineRoomError) else ""
                raise self._lifecycle.gone(why) from error
            raise InferenceError(
                f"vLLM failed on the request: {type(error).__name__}: {error.__cause__ or error}"
            ) from error

    async def together(self, work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
        """What all of them return. If one fails the others are cancelled, and its error is raised.

        It is typed within its task: what vLLM raises there may be what ends an event loop.
        """

        async def typed(one: Coroutine[Any, Any, _T]) -> _T:
            with Border(logger, "vLLM: the request"), self.typed():
                return await one

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(typed(one)) for one in work]
        except BaseExceptionGroup as group_of_errors:
            raise group_of_errors.exceptions[0] from group_of_errors
        finally:
            for one in work:  # whose task was cancelled before it began
                one.close()
        return [task.result() for task in tasks]
