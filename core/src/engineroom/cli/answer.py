"""One request from the command line: load, answer, show, and leave nothing running."""

from __future__ import annotations

import sys
from typing import Any

from engineroom.cli.answer_writer import AnswerWriter, call_line
from engineroom.cli.output import warning_line
from engineroom.cli.resolve import Target
from engineroom.errors import EngineRoomError
from engineroom.handlers.markers import hookimpl
from engineroom.inference.streams import StreamError
from engineroom.printable import printable
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.service import LLMInferenceService

__all__ = ["answer"]


async def answer(
    target: Target, request: InferenceRequest, *, show_progress: bool
) -> InferenceResponse:
    """Answer the request; with ``stream`` the text is written as it comes, and calls follow it.

    :returns: the final response, failed or not.
    :raises OutputClosedError: nobody reads the text any more; the work was stopped.
    """
    manager = target.manager()
    service = LLMInferenceService(manager)
    finished = False
    try:
        with _Progress(target.model_id, show_progress) as progress:
            manager.registry.register_plugin(progress, name="cli-progress")
            if request.stream:
                response = await _stream(service, request, progress)
            else:
                response = await service.infer(request)
        finished = True
    finally:
        await _close(service, orderly=finished)
    return response


async def _stream(
    service: LLMInferenceService, request: InferenceRequest, progress: _Progress
) -> InferenceResponse:
    writer = AnswerWriter()
    ended = False
    async with service.stream(request) as stream:
        try:
            async for chunk in stream:
                progress.stop()
                if isinstance(chunk, StreamError):
                    break
                writer.write(chunk)
            ended = True
        finally:
            writer.end_line(ended or sys.stdout.isatty())
    assert stream.response is not None
    for call in stream.response.tool_calls or ():
        call_line(call)
    return stream.response


async def _close(service: LLMInferenceService, orderly: bool) -> None:
    """Stop whatever is left of the work, and unload."""
    try:
        await service.close(drain_timeout_s=0)
    except EngineRoomError as error:
        if not orderly:
            raise
        warning_line(error.describe())  # the answer is there; it stays an answer


class _Progress:
    """A spinner on standard error until the first text comes, if that is a terminal."""

    def __init__(self, model_id: str, shown: bool) -> None:
        self._model_id = printable(model_id)
        self._status: Any = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.text import Text

            self._words = Text
            self._status = Console(stderr=True).status(Text(f"loading {self._model_id}"))

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Make room for text. May be called again."""
        status, self._status = self._status, None
        if status is not None:
            status.stop()

    @hookimpl
    def engineroom_model_loaded(self) -> None:
        """Loading is over; the prompt is read."""
        if self._status is not None:
            self._status.update(self._words(f"{self._model_id} reads the prompt"))
