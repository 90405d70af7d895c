"""Plugins that raise whatever there is while they are imported, made or asked: the rest works."""

from __future__ import annotations

import json

import pytest
from raisers import RAISERS

HANDLER = """
import raisers
from engineroom.testing import EchoHandler


def at(place):
    if place == {place!r}:
        raisers.RAISERS[{name!r}]()


class Meta(type(EchoHandler)):
    def __call__(cls, *arguments):
        at("call")
        return super().__call__(*arguments)


class Handler(EchoHandler, metaclass=Meta):
    name = "bad"

    def __init__(self):
        at("constructor")
        super().__init__()

    def unavailable(self):
        at("unavailable")

    def can_load(self, config):
        at("can_load")
        return False

    def can_handle(self, loaded_model):
        at("can_handle")
        return False


at("import")
"""
LAZY = """
import raisers


def __getattr__(name):
    raisers.RAISERS[{name!r}]()
"""
OBSERVER = """
import raisers
from engineroom import hookimpl

if {place!r} == "import":
    raisers.RAISERS[{name!r}]()


@hookimpl
def engineroom_register_handlers(register):
    raisers.RAISERS[{name!r}]()
"""
NAMES = [name for name in RAISERS if name != "interrupt"]
"""In the command's main thread a ``KeyboardInterrupt`` is the user's."""
FEW = ["panic", "leave", "end_generator", "cancel", "mute_by_panic"]


def quarantined(command, plugin: str, name: str) -> None:
    """It is told, with its traceback where that is asked for; and the echo beside it answers."""
    result = command("--debug", "plugins", "--json")
    assert result.status == 0 and len(result.out) < 100_000
    facts = {fact["name"]: fact for fact in json.loads(result.out)}
    assert facts[plugin]["status"] == "quarantined" and facts[plugin]["reason"]
    assert f"in {name}" in facts[plugin]["traceback"]
    assert facts["echo"]["status"] == "active"
    answer = command("run", "echo:", "hello")
    assert (answer.status, answer.out) == (0, "hello\n")
    assert f"plugin {plugin!r}" in answer.err and len(answer.err) < 5_000


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(("constructor", name) for name in NAMES),
        *((place, name) for place in ("import", "call", "unavailable") for name in FEW),
    ],
)
def test_a_handler_that_cannot_be_had(command, site, place, name):
    site.echo()
    site.module("command_test_bad", HANDLER.format(place=place, name=name))
    site.plugin("bad", "command_test_bad:Handler")
    quarantined(command, "bad", name)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("place", ["can_load", "can_handle"])
def test_a_handler_that_cannot_be_asked(command, site, place, name):
    site.echo()
    site.module("command_test_bad", HANDLER.format(place=place, name=name))
    site.plugin("bad", "command_test_bad:Handler")
    answer = command("run", "echo:", "hello")
    assert (answer.status, answer.out) == (0, "hello\n")
    report = command("plugins", "--why", "echo:")
    assert report.status == 0 and "echo: chosen" in report.out


@pytest.mark.parametrize("name", FEW)
def test_an_entry_point_that_raises_as_it_is_looked_up(command, site, name):
    site.echo()
    site.module("command_test_bad", LAZY.format(name=name))
    site.plugin("bad", "command_test_bad:Handler")
    quarantined(command, "bad", name)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("place", ["import", "registering"])
def test_an_observer_that_cannot_be_had(command, site, place, name):
    site.echo()
    site.module("command_test_watch", OBSERVER.format(place=place, name=name))
    site.plugin("watch", "command_test_watch", group="engineroom.plugins")
    quarantined(command, "watch", name)


def test_ctrl_c_while_plugins_are_imported_ends_the_command(command, site):
    site.echo()
    site.module("command_test_bad", HANDLER.format(place="import", name="interrupt"))
    site.plugin("bad", "command_test_bad:Handler")
    assert command("plugins").status == 130


@pytest.mark.parametrize("place", ["import", "constructor"])
@pytest.mark.parametrize("name", ["panic", "leave", "endless"])
def test_the_doctor_and_the_kit_outlive_it(command, site, place, name):
    site.echo()
    site.module("command_test_bad", HANDLER.format(place=place, name=name))
    site.plugin("bad", "command_test_bad:Handler")
    diagnosis = command("doctor")
    assert diagnosis.status == 1 and "'bad'" in diagnosis.out and len(diagnosis.out) < 20_000
    if place == "import":
        checked = command("conformance", "bad", "--model", "echo:")
        assert checked.status == 2 and "cannot be imported" in checked.error


RUNTIME = """
import raisers
from engineroom.testing import EchoHandler


class Handler(EchoHandler):
    name = "bad"

    def can_load(self, config):
        return config.source == "bad:"

    async def load_model(self, config):
        if {place!r} == "load":
            raisers.RAISERS[{name!r}]()
        return await super().load_model(config)

    async def generate_tokens(self, loaded_model, request):
        async for step in super().generate_tokens(loaded_model, request):
            if {place!r} == "generate":
                raisers.RAISERS[{name!r}]()
            yield step
"""


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("place", ["load", "generate"])
def test_a_model_whose_runtime_raises_is_one_line_of_error(command, site, place, name):
    site.module("command_test_bad", RUNTIME.format(place=place, name=name))
    site.plugin("bad", "command_test_bad:Handler")
    for more in ((), ("--json",)):
        answer = command("run", "bad:", "hello", *more)
        assert answer.status == 1 and answer.error
