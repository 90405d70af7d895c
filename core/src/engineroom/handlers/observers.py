"""Who looks on: pluggy's manager with the checks of an observer, and how its hooks are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pluggy

from engineroom.border import get_logger, log_failure
from engineroom.config.suggestions import did_you_mean
from engineroom.errors import ConfigurationError
from engineroom.handlers.base import InferenceHandler
from engineroom.handlers.markers import PROJECT
from engineroom.handlers.observer_hooks import ObserverSpec
from engineroom.handlers.validation import HANDLER_METHODS

__all__ = ["HookManager"]

logger = get_logger("engineroom.registry")


class HookManager(pluggy.PluginManager):
    """pluggy's manager, for which a handler's plain methods are hook implementations.

    :param blocked: names of handlers and observers that are never to be used.
    """

    def __init__(self, blocked: Iterable[str] = ()) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(ObserverSpec)
        self.add_hookspecs(InferenceHandler)
        for name in blocked:
            self.set_blocked(f"handler:{name}")
            self.set_blocked(f"plugin:{name}")

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

    def add_handler(self, handler: InferenceHandler) -> None:
        """Let pluggy check the handler's signatures, and call what observer hooks it has.

        :raises ConfigurationError: pluggy refuses it.
        """
        try:
            self.register(handler, name=f"handler:{handler.name}")
        except (pluggy.PluginValidationError, ValueError) as error:
            raise ConfigurationError(f"handler {handler.name!r}: {error}") from error

    def add_observer(
        self,
        plugin: object,
        name: str | None,
        publish_handler: Callable[[str, InferenceHandler], None],
    ) -> None:
        """Check an observer and add it, unless its name is blocked.

        :param publish_handler: takes the observer's name and each handler that it registers.
        :raises ConfigurationError: it has a hook that does not exist, asks for an argument
            that the hook does not have, is ``async`` or a wrapper, or its name is taken.
        """
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        if isinstance(plugin, type):
            raise ConfigurationError(
                f"plugin {name!r}: a class was given where an instance belongs; write {name}()"
            )
        if self.is_blocked(f"plugin:{name}"):
            return
        if (taken := self.get_plugin(f"plugin:{name}")) is not None:
            raise ConfigurationError(
                f"plugin {name!r}: the name is taken by {taken!r}; give one of them another"
            )
        if (other := self.get_name(plugin)) is not None:
            raise ConfigurationError(
                f"plugin {name!r}: it is registered already, as {other!r}; register it once"
            )
        try:
            self.register(plugin, name=f"plugin:{name}")
            self._check_hooks(plugin, name)
            for implementation in self.hook.engineroom_register_handlers.get_hookimpls():
                if implementation.plugin is plugin:
                    _call(implementation, {"register": partial(publish_handler, name)})
        except BaseException as error:
            if self.is_registered(plugin):  # pluggy 1.5 leaves it so, by half
                self.unregister(plugin)
            if isinstance(error, pluggy.PluginValidationError):
                raise ConfigurationError(f"plugin {name!r}: {error}") from error
            raise

    def _check_hooks(self, plugin: object, name: str) -> None:
        known = [n for n in vars(ObserverSpec) if n.startswith("engineroom_")]
        for caller in self.get_hookcallers(plugin) or ():
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

    def listens(self, hook: str) -> bool:
        """Whether any observer has this hook."""
        return bool(getattr(self.hook, hook).get_hookimpls())

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call an observer hook. An observer that raises is logged; the rest are called."""
        for implementation in getattr(self.hook, hook).get_hookimpls():
            try:
                _call(implementation, arguments)
            except BaseException as error:  # noqa: BLE001 - foreign code
                log_failure(
                    logger,
                    error,
                    "observer %r failed in %s; the request is not affected",
                    implementation.plugin_name,
                    hook,
                )


def _call(implementation: pluggy.HookImpl, arguments: dict[str, Any]) -> None:
    """Call an implementation with those of the arguments that it takes."""
    implementation.function(*[arguments[name] for name in implementation.argnames])
