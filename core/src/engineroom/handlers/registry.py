"""Which handlers there are, in which order they are asked, and why.

Order of consultation: handlers given to :meth:`HandlerRegistry.register`, in call order; then
the deployment's list (order and allow-list in one); without a list, the installed plugins by
name. pluggy checks signatures, blocks names and carries the observer hooks; its own call loop
asks the last one first and stops at ``False``, so dispatch is a plain loop over this registry.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import pluggy

from engineroom.config.environment import DISABLED_VARIABLE, HANDLERS_VARIABLE
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import ConfigurationError, EngineRoomError, NoSuitableHandlerError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.discovery import (
    HANDLER_GROUP,
    PluginRecord,
    install_hint,
    installed_plugins,
)
from engineroom.handlers.markers import PROJECT
from engineroom.handlers.observer_hooks import ObserverSpec
from engineroom.handlers.validation import HANDLER_METHODS, validate_handler

__all__ = ["DispatchReport", "HandlerRegistry", "HandlerVerdict"]

logger = logging.getLogger("engineroom.registry")


Verdict: TypeAlias = Literal[
    "chosen", "yes", "no", "error", "found", "active", "disabled", "not listed", "unavailable",
    "quarantined"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class HandlerVerdict:
    """What one handler says to one model, and why.

    :param verdict: ``chosen`` (the first that said yes), ``yes`` (it would, but one before it
        did), ``no``, ``error`` (its answer was a defect), or why it was not asked.
    """

    handler: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class DispatchReport:
    """Every handler, its verdict and its reason, in the order of consultation.

    :param question: ``can_handle`` for a loaded model, ``can_load`` for one that is not.
    :param chosen: name of the handler that is used; ``None``: there is none.
    :param notes: what became of each of a model's variants, where it was loaded.
    """

    model_id: str
    question: Literal["can_handle", "can_load"]
    verdicts: tuple[HandlerVerdict, ...]
    chosen: str | None
    notes: tuple[str, ...] = ()

    def with_notes(self, notes: tuple[str, ...]) -> DispatchReport:
        """The same report with these lines at its end."""
        return replace(self, notes=notes)

    def __str__(self) -> str:
        lines = [f"{self.model_id}: {self.question} → {self.chosen or 'no handler'}"]
        lines += [f"  {v.handler}: {v.verdict} ({v.reason})" for v in self.verdicts]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


class _HookManager(pluggy.PluginManager):
    """pluggy's manager, for which a handler's plain methods are hook implementations."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        if isinstance(plugin, InferenceHandler) and name in HANDLER_METHODS:
            return pluggy.HookimplOpts(
                wrapper=False,
                hookwrapper=False,
                optionalhook=False,
                tryfirst=False,
                trylast=False,
                specname=None,
            )
        if not inspect.isroutine(inspect.getattr_static(plugin, name, None)):
            return None  # to read a property or a module's lazy name could run anything
        return super().parse_hookimpl_opts(plugin, name)


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
        self._manager = _HookManager(PROJECT)
        self._manager.add_hookspecs(ObserverSpec)
        self._manager.add_hookspecs(InferenceHandler)
        for name in self._disabled:
            self._manager.set_blocked(f"handler:{name}")
            self._manager.set_blocked(f"plugin:{name}")
        self._order: list[InferenceHandler] = []
        self._explicit = 0  # how many at the front of the order were registered by hand
        self._records: list[PluginRecord] = []
        self._pending = discover
        self._checked = not discover  # all names of the allow-list are there
        self._discovered = not discover
        self._choices: WeakKeyDictionary[LoadedModel, InferenceHandler] = WeakKeyDictionary()

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
                for record in self._usable():
                    self._load(record)
                if self._allow is not None:
                    rank = {name: place for place, name in enumerate(self._allow)}
                    found = self._order[self._explicit :]
                    found.sort(key=lambda handler: rank.get(handler.name, -1))
                    self._order[self._explicit :] = found
            if not self._checked:
                self._check_allow_list()
            self._discovered = True

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
        self._checked = True

    def _usable(self) -> list[PluginRecord]:
        chosen: list[PluginRecord] = []
        for record in self._records:
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
            else:
                chosen.append(record)
        return chosen

    def _load(self, record: PluginRecord) -> None:
        """Import one plugin. The border to foreign code: whatever it does ends here."""
        assert record.entry_point is not None
        try:
            plugin = record.entry_point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign; _quarantine logs it
            self._quarantine(
                record, error, f"reinstall or upgrade it: pip install -U {record.distribution}"
            )
            return
        try:
            if record.group == HANDLER_GROUP:
                self._add_discovered(record, plugin)
            else:
                self.register_plugin(plugin, name=record.name)
        except Exception as error:  # noqa: BLE001 - foreign code; _quarantine logs it
            remedy = "mend the plugin" if isinstance(error, EngineRoomError) else "report it"
            self._quarantine(record, error, f"{remedy} ({record.distribution} {record.version})")
            return
        if record.status == "found":
            record.status = "active"

    def _add_discovered(self, record: PluginRecord, plugin: object) -> None:
        handler = plugin() if isinstance(plugin, type) else plugin
        name = getattr(handler, "name", None)
        if name != record.name:
            raise ConfigurationError(
                f"handler {record.value}: its entry point is called {record.name!r} but its "
                f"class has name = {name!r}; give both the same name"
            )
        valid = validate_handler(handler)
        record.api_version = valid.api_version
        if reason := valid.unavailable():
            record.status, record.reason = "unavailable", str(reason)
            logger.info("plugin %r cannot be used here: %s", record.name, reason)
            return
        self._insert(valid, len(self._order), record.distribution)

    def _quarantine(self, record: PluginRecord, error: BaseException, remedy: str) -> None:
        record.status = "quarantined"
        record.reason = f"{type(error).__name__}: {error}"
        record.remedy = remedy
        record.traceback = "".join(traceback.format_exception(error))
        logger.error(
            "plugin %r of %s %s was quarantined: %s; to use it, %s; the rest goes on without it",
            record.name,
            record.distribution,
            record.version,
            record.reason,
            remedy,
            exc_info=error,
        )

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
            try:
                self._manager.register(handler, name=f"handler:{handler.name}")
            except (pluggy.PluginValidationError, ValueError) as error:
                raise ConfigurationError(f"handler {handler.name!r}: {error}") from error
            self._order.insert(place, handler)
            self._choices.clear()

    def register_plugin(self, plugin: object, name: str | None = None) -> None:
        """Add an observer: an object or module with hooks (see :mod:`engineroom.handlers.markers`).

        :raises ConfigurationError: it has a hook that does not exist, asks for an argument
            that the hook does not have, is ``async`` or a wrapper, or its name is taken.
        """
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        if isinstance(plugin, type):
            raise ConfigurationError(
                f"plugin {name!r}: a class was given where an instance belongs; write {name}()"
            )
        with self._lock:
            if self._manager.is_blocked(f"plugin:{name}"):
                return
            if (taken := self._manager.get_plugin(f"plugin:{name}")) is not None:
                raise ConfigurationError(
                    f"plugin {name!r}: the name is taken by {taken!r}; give one of them another"
                )
            if (other := self._manager.get_name(plugin)) is not None:
                raise ConfigurationError(
                    f"plugin {name!r}: it is registered already, as {other!r}; register it once"
                )
            try:
                self._manager.register(plugin, name=f"plugin:{name}")
                self._check_observer(plugin, name)
                self._call_register_handlers(plugin, name)
            except BaseException as error:
                if self._manager.is_registered(plugin):  # pluggy 1.5 leaves it so, by half
                    self._manager.unregister(plugin)
                if isinstance(error, pluggy.PluginValidationError):
                    raise ConfigurationError(f"plugin {name!r}: {error}") from error
                raise

    def _check_observer(self, plugin: object, name: str) -> None:
        known = [n for n in vars(ObserverSpec) if n.startswith("engineroom_")]
        for caller in self._manager.get_hookcallers(plugin) or ():
            if caller.spec is None:
                raise ConfigurationError(
                    f"plugin {name!r}: there is no hook {caller.name!r}"
                    f"{did_you_mean(caller.name, known) or '; hooks are ' + ', '.join(known)}"
                )
            for implementation in caller.get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                if implementation.hookwrapper or implementation.wrapper:
                    raise ConfigurationError(
                        f"plugin {name!r}: {caller.name} is a wrapper; observers only look on"
                    )
                if inspect.iscoroutinefunction(implementation.function):
                    raise ConfigurationError(
                        f"plugin {name!r}: {caller.name} is async; write a plain function that "
                        "hands long work to a task or thread of its own"
                    )

    def _call_register_handlers(self, plugin: object, name: str) -> None:
        hook = self._manager.hook.engineroom_register_handlers
        for implementation in hook.get_hookimpls():
            if implementation.plugin is plugin:
                given = {"register": self._registering(name)}
                implementation.function(*[given[a] for a in implementation.argnames])

    def _registering(self, origin: str) -> Callable[[InferenceHandler], None]:
        def register(handler: InferenceHandler) -> None:
            validate_handler(handler)
            if self._allow is not None and handler.name not in self._allow:
                return
            if handler.name in self._disabled:
                return
            self._insert(handler, len(self._order), origin)

        return register

    # ── observers ────────────────────────────────────────────────────────────────────────────

    def listens(self, hook: str) -> bool:
        """Whether any observer has this hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def plugins_with(self, method: str) -> list[Any]:
        """The handlers and observers that have a method of this name."""
        return [plugin for plugin in self._manager.get_plugins() if hasattr(plugin, method)]

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call an observer hook. An observer that raises is logged; the rest are called."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                implementation.function(*[arguments[a] for a in implementation.argnames])
            except (Exception, asyncio.CancelledError):
                logger.exception(
                    "observer %r failed in %s; the request is not affected",
                    implementation.plugin_name,
                    hook,
                )

    # ── dispatch ─────────────────────────────────────────────────────────────────────────────

    def select(self, loaded_model: LoadedModel) -> InferenceHandler:
        """The first handler whose ``can_handle`` is ``True``; remembered for the model.

        :raises NoSuitableHandlerError: there is none; the message has every handler's reason.
        """
        if (known := self._choices.get(loaded_model)) is not None:
            return known
        for handler in self.handlers:
            verdict, _ = _ask(handler, "can_handle", loaded_model)
            if verdict:
                self._choices[loaded_model] = handler
                return handler
        report = self.explain(loaded_model)
        raise NoSuitableHandlerError(
            f"no handler takes model {loaded_model.model_id!r}: {self._reasons(report)}",
            model_id=loaded_model.model_id,
        )

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
        if report.chosen is not None:
            return self.get(report.chosen)
        raise NoSuitableHandlerError(
            f"no handler loads {config.source!r} for model {config.model_id!r}: "
            f"{self._reasons(report)}; name one with runtime: if its own format differs",
            model_id=config.model_id,
        )

    def explain(self, model: LoadedModel | ModelConfig) -> DispatchReport:
        """Ask every handler, and say which is used and why each of the others is not."""
        question: Literal["can_handle", "can_load"] = (
            "can_handle" if isinstance(model, LoadedModel) else "can_load"
        )
        chosen: str | None = None
        verdicts: list[HandlerVerdict] = []
        wanted = model.runtime if isinstance(model, ModelConfig) else None
        answer: bool | None
        for handler in self.handlers:
            if wanted is not None:
                answer, reason = handler.name == wanted, f"the model names runtime {wanted!r}"
            else:
                answer, reason = _ask(handler, question, model)
            verdict: Verdict = "no"
            if answer and chosen is None:
                chosen, verdict = handler.name, "chosen"
                if isinstance(model, LoadedModel) and (note := _note(handler, model)):
                    reason = f"{reason}; {note}"
            elif answer:
                verdict, reason = "yes", f"{reason}, but {chosen!r} comes first"
            elif answer is None:
                verdict = "error"
            verdicts.append(HandlerVerdict(handler.name, verdict, reason))
        asked = {v.handler for v in verdicts}
        verdicts += [
            HandlerVerdict(r.name, r.status, "; ".join(filter(None, (r.reason, r.remedy))))
            for r in self.plugins
            if r.group == HANDLER_GROUP
            and r.status not in ("active", "found")
            and r.name not in asked
        ]
        return DispatchReport(model.model_id, question, tuple(verdicts), chosen)

    def _reasons(self, report: DispatchReport) -> str:
        if not report.verdicts:
            return f"none is installed; {install_hint()}"
        return "; ".join(f"{v.handler}: {v.verdict}, {v.reason}" for v in report.verdicts)

    def _why_not(self, name: str) -> str:
        for record in self._records:
            if record.group == HANDLER_GROUP and record.name == name:
                remedy = f"; {record.remedy}" if record.remedy else ""
                return f"is {record.status}: {record.reason}{remedy}"
        known = [handler.name for handler in self._order]
        return f"is not installed (there is: {', '.join(known) or 'none'})" + (
            did_you_mean(name, known) or f"; {install_hint(name)}"
        )


def _note(handler: InferenceHandler, model: LoadedModel) -> str:
    """What the handler has to say of a model that is well."""
    try:
        health = handler.health(model)
    except Exception:
        logger.exception("handler %r: health failed", handler.name)
        return "health failed; see the log"
    return health.detail if health.ok else f"it is not well: {health.detail}"


def _ask(
    handler: InferenceHandler, question: str, model: LoadedModel | ModelConfig
) -> tuple[bool | None, str]:
    """The handler's answer and its reason; ``None`` where the answer is a defect."""
    try:
        answer = getattr(handler, question)(model)
    except Exception as error:
        logger.exception("handler %r: %s raised; it counts as no", handler.name, question)
        return None, f"{question} raised {type(error).__name__}: {error}; mend the plugin"
    if not isinstance(answer, bool):
        logger.error(
            "handler %r: %s returned %r instead of True or False; it counts as no",
            handler.name,
            question,
            type(answer).__name__,
        )
        return None, (
            f"{question} returned {type(answer).__name__} instead of a bool; mend the plugin"
        )
    return answer, f"{question} is {answer}"


def _names(text: str | None) -> list[str]:
    return [name for part in (text or "").split(",") if (name := part.strip())]
