"""Checks of what is asked before a request comes: the plugin, its questions, its loading."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from engineroom.border import is_interrupt
from engineroom.config.model import LoadedModel, ModelConfig
from engineroom.errors import (
    ConfigurationError,
    ModelNotFoundError,
    ResourceNotAvailableError,
)
from engineroom.handlers.base import API_VERSION, HandlerHealth
from engineroom.handlers.discovery import HANDLER_GROUP, installed_plugins
from engineroom.testing.conformance.base import Checks, check, foundation
from engineroom.testing.conformance.fresh_import import RUNTIMES, loaded_by
from engineroom.testing.conformance.kit import Kit
from engineroom.testing.conformance.outcomes import broken, skip, told

__all__ = ["DiscoveryChecks"]

_MOMENT_S: Final = 0.1
"""More than any look at a name or a few bytes takes, on a machine that is busy as well."""
_TRIES: Final = 10


class DiscoveryChecks(Checks):
    """Before a request comes."""

    test_handler_is_valid = foundation("handler-is-valid")

    @check(needs="handler-is-valid")
    async def test_entry_point(self, kit: Kit) -> None:
        handler = kit.handler
        value = f"{type(handler).__module__}:{type(handler).__qualname__}"
        records = [r for r in installed_plugins() if r.group == HANDLER_GROUP]
        mine = [r for r in records if r.name == handler.name or r.value == value]
        if not mine:
            skip(f"no installed distribution publishes {handler.name!r} or {value}")
        for record in mine:
            did = (
                f"loaded the entry point {record.name} = {record.value!r} of {record.distribution}"
            )
            assert record.entry_point is not None
            try:
                loaded = record.entry_point.load()
            except BaseException as error:
                if is_interrupt(error):
                    raise
                broken(did=did, expected="the handler", saw=told(error))
            name = getattr(loaded, "name", None)
            same = loaded is type(handler) or isinstance(loaded, type(handler))
            if record.name != handler.name or name != record.name or not same:
                broken(
                    did=did,
                    expected=f"{type(handler).__qualname__} with the entry's own name, "
                    f"{handler.name!r}",
                    saw=f"{loaded!r} with name = {name!r}",
                )
            if record.api_version is not None and not _same_major(record.api_version):
                broken(
                    did=f"read the entry {record.name!r} in the group engineroom.api",
                    expected=f"the contract's version, {API_VERSION}",
                    saw=record.api_version,
                )

    @check(needs="handler-is-valid")
    async def test_import_is_light(self, kit: Kit) -> None:
        handler = type(kit.handler)
        modules = [*RUNTIMES, *kit.settings.runtime_modules]
        loaded = await asyncio.to_thread(loaded_by, handler, modules, kit.timeout_s)
        if "absent" in loaded:
            skip(f"{handler.__module__} cannot be imported by a fresh process: {loaded['absent']}")
        for when, did in (
            ("import", f"import {handler.__module__}, in a fresh process"),
            ("questions", "capabilities(), can_load() and can_handle(), in a fresh process"),
        ):
            if names := loaded.get(when):
                broken(
                    did=did,
                    expected="that the runtime waits until load_model",
                    saw=f"{', '.join(names)} was imported",
                )

    test_capabilities = foundation("capabilities")
    test_can_load = foundation("can-load")

    @check(needs="handler-is-valid")
    async def test_can_load_foreign(self, kit: Kit) -> None:
        with _foreign_sources() as sources:
            for kind, source in sources.items():
                _say_no(
                    f"can_load({kind}: {source!r})",
                    kit.handler.can_load,
                    ModelConfig(model_id="foreign", source=source),
                )

    test_model_loads = foundation("model-loads")

    test_can_handle = foundation("can-handle")

    @check(needs="handler-is-valid")
    async def test_can_handle_foreign(self, kit: Kit) -> None:
        config = ModelConfig(model_id="foreign", source="/no/such/place/model.unknown")
        for owner, whose in (("some_other_runtime", "of another runtime"), (None, "of nobody")):
            for thing in (None, object(), "a text", b"bytes", 0, {}, [], _Touchy()):
                model = LoadedModel(
                    model_id="foreign", model_object=thing, config=config, handler_name=owner
                )
                _say_no(
                    f"can_handle(a model {whose}, model_object={type(thing).__name__})",
                    kit.handler.can_handle,
                    model,
                )

    @check(needs="model-loads")
    async def test_questions_are_cheap(self, kit: Kit) -> None:
        loaded, config = kit.bench.loaded, kit.config.choices()[0]
        questions: dict[str, Callable[[], object]] = {
            "can_load": lambda: kit.handler.can_load(config),
            "can_handle": lambda: kit.handler.can_handle(loaded),
            "capabilities": kit.handler.capabilities,
            "health": lambda: kit.handler.health(loaded),
        }
        for name, ask in questions.items():
            took = min(_timed(ask) for _ in range(_TRIES))
            if took > _MOMENT_S:
                broken(
                    did=f"{name}(), {_TRIES} times",
                    expected=f"an answer within {_MOMENT_S:g} s, at least once",
                    saw=f"{took:.2f} s for the quickest",
                )

    @check(needs="model-loads")
    async def test_questions_change_nothing(self, kit: Kit) -> None:
        loaded, config = kit.bench.loaded, kit.config.choices()[0]
        questions: dict[str, Callable[[], object]] = {
            "can_load": lambda: kit.handler.can_load(config),
            "can_handle": lambda: kit.handler.can_handle(loaded),
        }
        for name, ask in questions.items():
            ask()  # the first time may import
            threads, tasks = set(threading.enumerate()), kit.tasks()
            before = _state(loaded, config)
            for _ in range(3):
                ask()
            await kit.turns(2)
            after = _state(loaded, config)
            changed = [
                f"{key}: {value} became {after[key]}"
                for key, value in before.items()
                if after[key] != value
            ]
            # What an earlier check has left may end meanwhile; only what is new is the question's.
            changed += [
                f"a new {kind}: {shown}"
                for kind, shown in (
                    *(("thread", thread.name) for thread in set(threading.enumerate()) - threads),
                    *(("task", task.get_name()) for task in kit.tasks() - tasks),
                )
            ]
            if changed:
                broken(
                    did=f"{name}(), three times",
                    expected="that nothing changes",
                    saw=", ".join(changed),
                )

    @check(needs="capabilities")
    async def test_estimate_memory(self, kit: Kit) -> None:
        estimate: object = kit.handler.estimate_memory(kit.config.choices()[0])
        right = estimate is None or (
            isinstance(estimate, Mapping)
            and all(isinstance(device, str) for device in estimate)
            and all(type(size) is int and size >= 0 for size in estimate.values())
        )
        if not right:
            broken(
                did="estimate_memory()",
                expected='a mapping such as {"cpu": bytes}, or None',
                saw=repr(estimate),
            )

    @check(needs="model-loads")
    async def test_health(self, kit: Kit) -> None:
        health = kit.handler.health(kit.bench.loaded)
        if not isinstance(health, HandlerHealth):
            broken(did="health()", expected="a HandlerHealth", saw=repr(health))
        usage = health.kv_cache_usage
        if (
            not health.ok
            or health.num_requests_running < 0
            or health.num_requests_waiting < 0
            or not (usage is None or 0 <= usage <= 1)
        ):
            broken(
                did="health(), of a model that serves",
                expected="ok, counts from 0, and a cache usage from 0 to 1 or None",
                saw=repr(health),
            )

    @check(needs="capabilities")
    async def test_missing_source(self, kit: Kit) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = str(Path(folder) / "there-is-no-such-model")
            config = _plain(kit, source, kit.config.choices()[0].options)
            did = f"load_model(source={source!r}), where there is nothing"
            right = (ModelNotFoundError, ConfigurationError, ResourceNotAvailableError)
            loaded = await kit.outcome(kit.handler.load_model(config), did, *right)
            if isinstance(loaded, Exception):
                return
            await kit.within(kit.handler.unload_model(loaded), "unload_model")
        skip("the runtime loads a model from any source at all")

    @check(needs="model-loads")
    async def test_unknown_option(self, kit: Kit) -> None:
        option = "no_such_option_of_any_runtime"
        choice = kit.config.choices()[0]
        config = _plain(kit, choice.source or "", {**choice.options, option: 1})
        did = f"load_model(options={{…, {option!r}: 1}})"
        loaded = await kit.outcome(kit.handler.load_model(config), did, ConfigurationError)
        if isinstance(loaded, Exception):
            if option not in str(loaded):
                broken(did=did, expected="that the message names the option", saw=str(loaded))
            return
        await kit.within(kit.handler.unload_model(loaded), "unload_model")
        broken(did=did, expected="a ConfigurationError that names it", saw="that it was ignored")


class _Touchy:
    """A foreign model_object: to look for anything in it fails."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _plain(kit: Kit, source: str, options: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        model_id=f"{kit.config.model_id}-try",
        source=source,
        runtime=kit.handler.name,
        options=dict(options),
    )


def _say_no(did: str, question: Callable[[Any], object], about: object) -> None:
    try:
        answer = question(about)
    except BaseException as error:
        if is_interrupt(error):
            raise
        broken(did=did, expected="the bool False", saw=told(error))
    if answer is not False:
        broken(did=did, expected="the bool False", saw=repr(answer))


@contextmanager
def _foreign_sources() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty-folder").mkdir()
        (folder / "empty.bin").touch()
        (folder / "text.md").write_text("# Not a model\n", encoding="utf-8")
        (folder / "noise.unknown").write_bytes(bytes(range(256)) * 4)
        yield {
            "nothing there": str(folder / "nothing-there"),
            "an empty folder": str(folder / "empty-folder"),
            "an empty file": str(folder / "empty.bin"),
            "a text": str(folder / "text.md"),
            "a file of another format": str(folder / "noise.unknown"),
            "an unknown scheme": "no-such-scheme:model",
            "a name that no file can have": f"{folder}/no\0file",
            "a name that is too long": str(folder / ("long" * 1200)),
            "a package that is not installed": "package:no_such_package_of_anyone/model",
        }


def _same_major(version: str) -> bool:
    return version.partition(".")[0] == API_VERSION.partition(".")[0]


def _timed(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


def _state(loaded: LoadedModel, config: ModelConfig) -> dict[str, Any]:
    return {
        "the configuration": repr(config),
        "the model's configuration": repr(loaded.config),
        "the model's fields": repr(
            {name: id(getattr(loaded, name)) for name in LoadedModel.model_fields}
        ),
        "the environment": dict(os.environ),
        "the working directory": Path.cwd(),
    }
