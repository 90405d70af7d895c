"""The registry's parts, each by itself: discovery, observers, dispatch."""

from __future__ import annotations

import types

import pytest
from core_doubles import PlainHandler, echo_config

from engineroom import ConfigurationError, hookimpl
from engineroom.handlers.discovery import HANDLER_GROUP, PluginRecord, handler_of, load_plugin
from engineroom.handlers.dispatch import explain
from engineroom.handlers.observers import HookManager
from engineroom.testing import EchoHandler


class Entry:
    """An entry point that gives, or raises, what a test says."""

    def __init__(self, value):
        self.value = value

    def load(self):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


def record(value=None) -> PluginRecord:
    return PluginRecord(
        "mine", HANDLER_GROUP, "x:Mine", "mine-dist", "1.2", entry_point=Entry(value)
    )


def test_a_plugin_is_imported_and_used():
    plugin, used = record("the plugin"), []
    load_plugin(plugin, lambda *arguments: used.append(arguments))
    assert used == [(plugin, "the plugin")] and plugin.status == "active"


@pytest.mark.parametrize("error", [ImportError("no runtime"), SystemExit(1)], ids=repr)
def test_what_fails_to_import_is_quarantined_with_the_command_that_renews_it(error):
    plugin = record(error)
    load_plugin(plugin, lambda *_: pytest.fail("it was used"))
    assert plugin.status == "quarantined" and type(error).__name__ in plugin.reason
    assert plugin.remedy.endswith("pip install -U mine-dist") and plugin.traceback


def test_what_fails_to_register_is_quarantined():
    def use(plugin_record, plugin):
        raise KeyError("x")

    plugin = record()
    load_plugin(plugin, use)
    assert (plugin.status, plugin.remedy) == ("quarantined", "report it (mine-dist 1.2)")


def test_an_entry_point_names_a_handler_or_its_class():
    echo = PluginRecord("echo", HANDLER_GROUP, "x:Echo")
    assert isinstance(handler_of(echo, EchoHandler), EchoHandler)
    made = EchoHandler()
    assert handler_of(echo, made) is made and echo.api_version == made.api_version
    with pytest.raises(ConfigurationError, match="give both the same name"):
        handler_of(record(), made)


def test_a_handler_that_cannot_work_here_is_none():
    class Elsewhere(PlainHandler):
        def unavailable(self):
            return "needs another machine"

    plugin = record()
    assert handler_of(plugin, Elsewhere(name="mine")) is None
    assert (plugin.status, plugin.reason) == ("unavailable", "needs another machine")


def test_hooks_are_called_without_a_registry():
    started, published = [], []

    @hookimpl
    def engineroom_request_started(request):
        started.append(request)

    observer = types.SimpleNamespace(
        engineroom_request_started=engineroom_request_started,
        engineroom_register_handlers=hookimpl(lambda register: register("a handler")),
    )
    hooks = HookManager(blocked=["other"])
    hooks.add_observer(observer, "mine", lambda *arguments: published.append(arguments))
    hooks.add_observer(observer, "other", lambda *_: pytest.fail("it is blocked"))
    assert published == [("mine", "a handler")]
    assert hooks.listens("engineroom_request_started")
    assert not hooks.listens("engineroom_request_finished")
    hooks.notify("engineroom_request_started", request=1)
    assert started == [1]


def test_a_report_needs_no_registry():
    plugin = record()
    plugin.status, plugin.reason, plugin.remedy = "quarantined", "it broke", "mend it"
    report = explain(echo_config("m"), [EchoHandler()], [plugin])
    assert report.chosen == "echo"
    assert report.reasons.endswith("mine: quarantined, it broke; mend it")
    assert "pip install" in explain(echo_config("m"), []).reasons
