"""The hooks through which metrics, tracing and audit look on.

An observer is any object or module with functions of these names, marked with
:data:`~engineroom.hookimpl`, published under the entry-point group ``engineroom.plugins`` or given
to ``HandlerRegistry.register_plugin``. It may take fewer arguments than a hook has::

    from engineroom import hookimpl

    @hookimpl
    def engineroom_request_finished(response):
        print(response.model_id, response.finish_reason, response.generated_tokens)

A request that is not to generate text says so in its ``kind``. That of ``service.embed`` is an
:class:`~engineroom.EmbeddingRequest`: the ``kind`` is ``"embed"``, the ``prompt`` is empty, the
texts are in ``texts``, and the response has ``prompt_tokens`` and no text. That of
``service.rerank`` is a :class:`~engineroom.RerankRequest` of the kind ``"rerank"``, with
``queries`` and ``documents``.

Hooks are called on the event loop, so an observer must be quick and must not be ``async``. One
that raises is logged with its traceback; it harms neither the request nor other observers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from engineroom.config.model import LoadedModel
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.markers import hookspec
from engineroom.schemas import InferenceRequest, InferenceResponse
from engineroom.status import ModelState, ReloadReport

__all__ = ["ObserverSpec"]


class ObserverSpec:
    """The observer hooks. None of them returns anything.

    A ``request`` is the request as it came. It holds the prompt or the texts: do not log it
    unasked.
    """

    @hookspec
    def engineroom_register_handlers(self, register: Callable[[InferenceHandler], None]) -> None:
        """Publish several handlers at once, or handlers that need arguments.

        :param register: call it once for each handler, with an instance.
        """

    @hookspec
    def engineroom_request_started(self, request: InferenceRequest) -> None:
        """A request was accepted; nothing of it has been computed yet."""

    @hookspec
    def engineroom_request_rejected(self, request: InferenceRequest, reason: str) -> None:
        """A request was turned away by a limit before anything of it was begun.

        It has not started, and does not finish.

        :param reason: ``queue_full``, ``tokens_per_minute``, ``closed``, or what a server of
            one's own calls it: one of few words, fit to be counted by.
        """

    @hookspec
    def engineroom_request_waited(self, request: InferenceRequest, waited_s: float) -> None:
        """A server let a request in that had to wait, or not, for its limits.

        The request starts next. Time in a runtime's own queue is not in it.

        :param waited_s: seconds that it waited.
        """

    @hookspec
    def engineroom_request_gaps(
        self, request: InferenceRequest, handler: str, gaps_s: Sequence[float]
    ) -> None:
        """How far the chunks of a streamed request lay apart.

        Called now and then while it goes on, and at its end, before it finishes. As long as no
        observer has this hook, nothing is measured.

        :param handler: name of the handler that does the work.
        :param gaps_s: seconds between each two chunks since the last call, in order.
        """

    @hookspec
    def engineroom_request_finished(
        self, request: InferenceRequest, response: InferenceResponse
    ) -> None:
        """A request has ended, in whatever way; called exactly once for each that started.

        :param response: its ``finish_reason`` is never ``None``.
        """

    @hookspec
    def engineroom_model_loaded(self, loaded_model: LoadedModel, duration_s: float) -> None:
        """A model is ready.

        :param duration_s: seconds that loading took.
        """

    @hookspec
    def engineroom_model_unloaded(
        self, loaded_model: LoadedModel, duration_s: float, not_returned: Mapping[str, int]
    ) -> None:
        """A model was given back.

        :param loaded_model: the model; its ``model_object`` is of no use any more.
        :param duration_s: seconds that unloading took.
        :param not_returned: bytes that did not come back, by device, as far as was measured.
        """

    @hookspec
    def engineroom_model_state_changed(
        self, model_id: str, old_state: ModelState, new_state: ModelState, reason: str
    ) -> None:
        """A model went from one state to another.

        :param old_state: ``unloaded``, ``loading``, ``ready``, ``draining`` or ``failed``.
        :param new_state: one of these, and another.
        :param reason: why, in words.
        """

    @hookspec
    def engineroom_deployment_reloaded(self, report: ReloadReport) -> None:
        """The deployment was read anew, and something of it changed."""
