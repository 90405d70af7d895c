"""Which handlers there are, and in which order they are asked.

First those given to :meth:`HandlerRegistry.register`, in call order; then the deployment's list
(order and allow-list in one); without a list, the installed plugins by name. pluggy checks
signatures, blocks names and carries the observer hooks; its own call loop asks the last one
first and stops at ``False``, so :mod:`~engineroom.handlers.dispatch` is a plain loop.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO
from typing import Any
from weakref import WeakKeyDictionary

from engineroom.border import get_logger
from engineroom.config.environment import DISABLED_VARIABLE, HANDLERS_VARIABLE
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import ConfigurationError, NoSuitableHandlerError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.discovery import (
    HANDLER_GROUP,
    PluginRecord,
    handler_of,
    install_hint,
    installed_plugins,
    load_plugin,
)
from engineroom.handlers.dispatch import DispatchReport, ask, explain
from engineroom.handlers.observers import HookManager
from engineroom.handlers.validation import validate_handler

__all__ = ["HandlerRegistry"]

logger = get_logger("engineroom.registry")


class HandlerRegistry:
    """The handlers of a process, or of one service.

    :param allow: names of installed handlers to use, in this order; ``None``:
        ``ENGINEROOM_HANDLERS`` (names, separated by commas) or else all of them.
    :param disabled: names never to use, besides those in ``ENGINEROOM_DISABLED_HANDLERS``.
    :param discover: look for installed plugins at all.
    :param environ: where the variables are read; by default the process's own.
    """

    def __init__(
        self,
        *,
        allow: Sequence[str] | None = None,
        disabled: Iterable[str] = (),
        discover: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        if allow is None:
            allow = _names(environ.get(HANDLERS_VARIABLE)) or None
        if allow is not None and (twice := sorted({n for n in allow if list(allow).count(n) > 1})):
            raise ConfigurationError(f"handlers: {twice[0]!r} is listed twice; list it once")
        self._allow = None if allow is None else list(allow)
        self._disabled = {*disabled, *_names(environ.get(DISABLED_VARIABLE))}
        self._lock = threading.RLock()
        self._manager = HookManager(self._disabled)
        self._order: list[InferenceHandler] = []
        self._explicit = 0  # how many at the front of the order were registered by hand
        self._records: list[PluginRecord] = []
        self._pending = discover
        self._discovered = not discover
        self._choices: WeakKeyDictionary[LoadedModel, InferenceHandler] = WeakKeyDictionary()
        self._reasons: WeakKeyDictionary[LoadedModel, str] = WeakKeyDictionary()
        self.request_log_level = INFO
        """Level of the line that the log has of a request that ended well; an observer that has
        ``request_log_level`` sets it."""

    # ── what there is ────────────────────────────────────────────────────────────────────────

    @property
    def handlers(self) -> tuple[InferenceHandler, ...]:
        """The handlers in the order in which they are asked."""
        self.discover()
        return tuple(self._order)

    @property
    def plugins(self) -> tuple[PluginRecord, ...]:
        """Installed plugins and what became of each."""
        self.discover()
        return tuple(self._records)

    def get(self, name: str) -> InferenceHandler:
        """The handler of that name.

        :raises ConfigurationError: there is none; the message says why and what to install.
        """
        for handler in self.handlers:
            if handler.name == name:
                return handler
        raise ConfigurationError(f"handler {name!r} {self._why_not(name)}")

    def _why_not(self, name: str) -> str:
        for record in self._records:
            if record.group == HANDLER_GROUP and record.name == name:
                remedy = f"; {record.remedy}" if record.remedy else ""
                return f"is {record.status}: {record.reason}{remedy}"
        known = [handler.name for handler in self._order]
        return f"is not installed (there is: {', '.join(known) or 'none'})" + (
            did_you_mean(name, known) or f"; {install_hint(name)}"
        )

    # ── discovery ────────────────────────────────────────────────────────────────────────────

    @property
    def discovered(self) -> bool:
        """Whether :meth:`discover` has nothing left to do, so that it returns at once."""
        return self._discovered

    def discover(self) -> None:
        """Import the installed plugins that may be used. Happens once, when first needed.

        Reads files and imports modules: call it in a thread where there is an event loop.
        A plugin that fails is quarantined and logged; the others work.

        :raises ConfigurationError: the allow-list names a handler that is not installed.
        """
        if self._discovered:
            return
        with self._lock:
            if self._pending:
                self._pending = False
                self._records = installed_plugins()
                for record in self._records:
                    if self._may_be_used(record):
                        load_plugin(record, self._add_discovered)
                rank = {name: place for place, name in enumerate(self._allow or ())}
                self._order[self._explicit :] = sorted(
                    self._order[self._explicit :], key=lambda h: rank.get(h.name, -1)
                )
            self._check_allow_list()
            self._discovered = True

    def _may_be_used(self, record: PluginRecord) -> bool:
        """Whether neither list is against it; otherwise the record says why."""
        if record.name in self._disabled:
            record.status = "disabled"
            record.reason = f"named in {DISABLED_VARIABLE} or the deployment"
        elif (
            record.group == HANDLER_GROUP
            and self._allow is not None
            and record.name not in self._allow
        ):
            record.status = "not listed"
            listed = ", ".join(self._allow)
            record.reason = (
                f"the list of handlers is {listed}" if listed else "other handlers were given"
            )
        return record.status == "found"

    def _check_allow_list(self) -> None:
        installed = [r.name for r in self._records if r.group == HANDLER_GROUP]
        installed += [h.name for h in self._order if h.name not in installed]
        for name in self._allow or ():
            if name not in installed:
                known = ", ".join(installed) or "none"
                raise ConfigurationError(
                    f"handlers: {name!r} is not installed (installed: {known})"
                    + (did_you_mean(name, installed) or f"; {install_hint(name)}")
                )

    def _add_discovered(self, record: PluginRecord, plugin: object) -> None:
        if record.group != HANDLER_GROUP:
            self.register_plugin(plugin, name=record.name)
        elif (handler := handler_of(record, plugin)) is not None:
            self._insert(handler, len(self._order), record.distribution)

    # ── adding ───────────────────────────────────────────────────────────────────────────────

    def register(self, handler: InferenceHandler, before: str | None = None) -> None:
        """Add a handler by hand: after those added so before, ahead of all installed ones.

        :param before: put it directly before the handler of this name instead.
        :raises ConfigurationError: it is no proper handler, its name is taken or disabled, or
            ``before`` names none.
        """
        validate_handler(handler)
        if before is not None:
            self.discover()
        with self._lock:
            place = self._explicit
            if before is not None:
                names = [h.name for h in self._order]
                if before not in names:
                    raise ConfigurationError(
                        f"register_handler({handler.name!r}, before={before!r}): there is no "
                        f"handler {before!r} (there is: {', '.join(names) or 'none'})"
                        f"{did_you_mean(before, names)}"
                    )
                place = names.index(before)
            self._insert(handler, place, "register_handler")
            if place <= self._explicit and (before is None or place < self._explicit):
                self._explicit += 1

    def register_plugin(self, plugin: object, name: str | None = None) -> None:
        """Add an observer: an object or module with hooks (see :mod:`engineroom.handlers.markers`).

        :raises ConfigurationError: it has a hook that does not exist, asks for an argument
            that the hook does not have, is ``async`` or a wrapper, or its name is taken.
        """
        with self._lock:
            self._manager.add_observer(plugin, name, self._add_published)
            self.request_log_level = getattr(plugin, "request_log_level", self.request_log_level)

    def _add_published(self, origin: str, handler: InferenceHandler) -> None:
        """Add a handler that an observer publishes, if the lists allow it."""
        validate_handler(handler)
        if self._allow is not None and handler.name not in self._allow:
            return
        if handler.name not in self._disabled:
            self._insert(handler, len(self._order), origin)

    def _insert(self, handler: InferenceHandler, place: int, origin: str) -> None:
        with self._lock:
            if handler.name in self._disabled:
                raise ConfigurationError(
                    f"handler {handler.name!r} is disabled; take it out of {DISABLED_VARIABLE} "
                    "or of the deployment's disabled_handlers"
                )
            for other in self._order:
                if other.name == handler.name:
                    raise ConfigurationError(
                        f"handler {handler.name!r} (from {origin}): the name is taken by "
                        f"{type(other).__module__}.{type(other).__qualname__}; give one of them "
                        "another name, or disable one"
                    )
            self._manager.add_handler(handler)
            self._order.insert(place, handler)
            self._choices.clear()

    # ── observers ────────────────────────────────────────────────────────────────────────────

    def listens(self, hook: str) -> bool:
        """Whether any observer has this hook."""
        return self._manager.listens(hook)

    def plugins_with(self, method: str) -> list[Any]:
        """The handlers and observers that have a method of this name."""
        plugins = self._manager.get_plugins()
        return [p for p in plugins if inspect.getattr_static(p, method, None) is not None]

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call an observer hook. An observer that raises is logged; the rest are called."""
        self._manager.notify(hook, **arguments)

    # ── dispatch ─────────────────────────────────────────────────────────────────────────────

    def select(self, loaded_model: LoadedModel) -> InferenceHandler:
        """The first handler whose ``can_handle`` is ``True``; remembered for the model.

        :raises NoSuitableHandlerError: there is none; the message has every handler's reason.
        """
        if (known := self._choices.get(loaded_model)) is not None:
            return known
        reasons: list[str] = []
        for handler in self.handlers:
            answer, reason = ask(handler, "can_handle", loaded_model)
            reasons.append(f"{handler.name}: {reason}")
            if answer:
                self._choices[loaded_model] = handler
                self._reasons[loaded_model] = "; ".join(reasons)
                return handler
        raise NoSuitableHandlerError(
            f"no handler takes model {loaded_model.model_id!r}: "
            f"{self.explain(loaded_model).reasons}",
            model_id=loaded_model.model_id,
        )

    def why(self, loaded_model: LoadedModel) -> str:
        """Who was asked before :meth:`select` chose, and what each said; empty before it did."""
        return self._reasons.get(loaded_model, "")

    def select_loader(self, config: ModelConfig) -> InferenceHandler:
        """The handler that loads the model: the one it names, or the first that can.

        :raises ConfigurationError: the named one is not there.
        :raises NoSuitableHandlerError: none can.
        """
        if config.runtime is not None:
            try:
                return self.get(config.runtime)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"model {config.model_id!r}: {error.message}", model_id=config.model_id
                ) from error
        report = self.explain(config)
        logger.debug("who loads model %s: %s", config.model_id, report.reasons)
        if report.chosen is not None:
            return self.get(report.chosen)
        raise NoSuitableHandlerError(
            f"no handler loads {config.source!r} for model {config.model_id!r}: "
            f"{report.reasons}; name one with runtime: if its own format differs",
            model_id=config.model_id,
        )

    def explain(self, model: LoadedModel | ModelConfig) -> DispatchReport:
        """Ask every handler, and say which is used and why each of the others is not."""
        return explain(model, self.handlers, self._records)


def _names(text: str | None) -> list[str]:
    return [name for part in (text or "").split(",") if (name := part.strip())]
