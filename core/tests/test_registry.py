"""Discovery, order, blocking, quarantine, dispatch, explanation."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core_doubles import GateHandler, PlainHandler, bare_registry, echo_config

from engineroom import (
    ConfigurationError,
    HandlerHealth,
    HandlerRegistry,
    LoadedModel,
    ModelConfig,
    NoSuitableHandlerError,
)
from engineroom.handlers.discovery import installed_plugins
from engineroom.testing import EchoHandler

HANDLER = """
    from engineroom import InferenceHandler, InferenceResponse

    class Handler(InferenceHandler):
        name = {name!r}

        def can_handle(self, loaded_model):
            return loaded_model.model_object == self.name

        async def infer(self, loaded_model, request):
            return InferenceResponse(request_id="", model_id="", generated_text=self.name)

        async def stream_infer(self, loaded_model, request):
            yield self.name
"""

Publish = Callable[..., Path]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publish]:
    """Install a distribution: a module and the metadata that points to it; nothing else is."""

    def no_others(group):
        from importlib.metadata import EntryPoints, distributions

        found = EntryPoints(e for d in distributions(path=folders) for e in d.entry_points)
        return found.select(group=group)

    folders: list[str] = []
    monkeypatch.setattr("engineroom.handlers.discovery.entry_points", no_others)

    def publish(
        distribution: str,
        entries: str,
        module: str = "",
        *,
        module_name: str = "",
        metadata: str | None = None,
    ) -> Path:
        folder = tmp_path / f"site{len(folders)}"
        info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        (info / "METADATA").write_text(text if metadata is None else metadata)
        (info / "entry_points.txt").write_text(textwrap.dedent(entries))
        if module:
            name = module_name or distribution.replace("-", "_")
            (folder / f"{name}.py").write_text(textwrap.dedent(module))
        monkeypatch.syspath_prepend(folder)
        folders.append(str(folder))
        return folder

    yield publish
    for name in [name for name in sys.modules if name.startswith("er_")]:
        del sys.modules[name]


@pytest.fixture
def publish_handler(publish: Publish) -> Callable[..., Path]:
    def publish_handler(name: str, module: str | None = None, entry: str | None = None) -> Path:
        source = HANDLER.format(name=name) if module is None else module
        entries = f"[engineroom.handlers]\n{entry or name} = er_{name}:Handler\n"
        return publish(f"er-{name}", entries, source)

    return publish_handler


def registry(**kwargs) -> HandlerRegistry:
    return HandlerRegistry(environ=kwargs.pop("environ", {}), **kwargs)


def names(registry: HandlerRegistry) -> list[str]:
    return [handler.name for handler in registry.handlers]


def model(model_object: object = "x", model_id: str = "m") -> LoadedModel:
    return LoadedModel(model_id=model_id, model_object=model_object, config=echo_config(model_id))


# ── discovery and order ──────────────────────────────────────────────────────────────────────


def test_installed_handlers_are_found_in_the_order_of_their_names(publish_handler):
    for name in ("zeta", "alpha", "mid"):
        publish_handler(name)
    assert names(registry()) == ["alpha", "mid", "zeta"]


def test_registered_handlers_come_first_in_call_order(publish_handler):
    publish_handler("alpha")
    found = registry()
    found.register(PlainHandler(name="second"))
    assert names(found) == ["second", "alpha"]
    found.register(PlainHandler(name="third"))
    assert names(found) == ["second", "third", "alpha"]


def test_the_list_is_order_and_allow_list_in_one(publish_handler):
    for name in ("alpha", "mid", "zeta"):
        publish_handler(name)
    found = registry(allow=["zeta", "alpha"])
    assert names(found) == ["zeta", "alpha"]
    (record,) = [r for r in found.plugins if r.name == "mid"]
    assert record.status == "not listed" and "zeta, alpha" in record.reason


def test_all_three_tiers_together(publish_handler):
    for name in ("alpha", "mid", "zeta"):
        publish_handler(name)
    found = registry(allow=["zeta", "alpha"])
    found.register(PlainHandler(name="mine"))
    found.register(PlainHandler(name="also"))
    assert names(found) == ["mine", "also", "zeta", "alpha"]


def test_the_environment_lists_handlers_where_the_deployment_does_not(publish_handler):
    for name in ("alpha", "mid", "zeta"):
        publish_handler(name)
    environ = {"ENGINEROOM_HANDLERS": " zeta , mid,"}
    assert names(registry(environ=environ)) == ["zeta", "mid"]
    assert names(registry(environ=environ, allow=["alpha"])) == ["alpha"]
    assert names(registry(environ={"ENGINEROOM_HANDLERS": ""})) == ["alpha", "mid", "zeta"]


def test_the_processes_own_environment_is_read(publish_handler, monkeypatch):
    publish_handler("alpha")
    publish_handler("zeta")
    monkeypatch.setenv("ENGINEROOM_HANDLERS", "zeta")
    assert names(HandlerRegistry()) == ["zeta"]


def test_a_listed_handler_that_is_not_installed_is_named_each_time(publish_handler):
    publish_handler("alpha")
    found = registry(allow=["alpha", "alpah"])
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"'alpah' is not installed.*'alpha'\?"):
            found.discover()
    with pytest.raises(ConfigurationError, match="pip install engineroom-llamacpp"):
        registry(allow=["llamacpp"]).discover()


def test_a_listed_handler_may_be_registered_by_hand(publish_handler):
    publish_handler("alpha")
    found = registry(allow=["alpha", "mine"])
    with pytest.raises(ConfigurationError, match="'mine' is not installed"):
        found.discover()
    found.register(PlainHandler(name="mine"))
    assert names(found) == ["mine", "alpha"]


def test_a_name_that_is_listed_twice_is_refused():
    with pytest.raises(ConfigurationError, match="'a' is listed twice"):
        registry(allow=["a", "b", "a"])


def test_disabled_handlers_are_blocked_wherever_they_come_from(publish_handler):
    publish_handler("alpha", module="raise RuntimeError('must not be imported')")
    publish_handler("beta")
    environ = {"ENGINEROOM_DISABLED_HANDLERS": "alpha, mine"}
    found = registry(environ=environ, disabled=["theirs"])
    assert names(found) == ["beta"]
    assert [r.status for r in found.plugins] == ["disabled", "active"]
    for name in ("mine", "theirs"):
        with pytest.raises(ConfigurationError, match=rf"{name}.*disabled"):
            found.register(PlainHandler(name=name))
    report = found.explain(model())
    assert ("alpha", "disabled") in [(v.handler, v.verdict) for v in report.verdicts]
    with pytest.raises(ConfigurationError, match="'alpha' is disabled"):
        found.get("alpha")


def test_listing_plugins_imports_nothing(publish):
    publish(
        "er-dear",
        """
        [engineroom.handlers]
        dear = er_dear:Handler
        [engineroom.plugins]
        watch = er_dear
        [engineroom.api]
        dear = engineroom.api:v1.0
        """,
        "raise AssertionError('imported')",
    )
    first, second = installed_plugins()
    assert (first.name, first.distribution, first.version) == ("dear", "er-dear", "1.2")
    assert (first.api_version, first.status) == ("1.0", "found")
    assert (second.name, second.group, second.api_version) == ("watch", "engineroom.plugins", None)


def test_the_api_version_comes_from_the_class_where_the_metadata_has_none(publish_handler):
    publish_handler("alpha")
    found = registry()
    found.discover()
    assert found.plugins[0].api_version == "1.0"


def test_an_entry_that_is_listed_twice_is_one(publish, monkeypatch):
    entries = "[engineroom.handlers]\nalpha = er_alpha:Handler\n"
    publish("er-alpha", entries, HANDLER.format(name="alpha"))
    publish("er-alpha", entries)  # as an editable install may
    found = registry()
    assert names(found) == ["alpha"] and len(found.plugins) == 1


def test_an_entry_point_may_be_an_instance(publish):
    source = textwrap.dedent(HANDLER.format(name="made")) + "\nhandler = Handler()\n"
    publish("er-made", "[engineroom.handlers]\nmade = er_made:handler\n", source)
    assert names(registry()) == ["made"]


def test_discovery_happens_once_and_only_when_needed(publish_handler):
    publish_handler("alpha")
    found = registry()
    assert "er_alpha" not in sys.modules
    first = found.handlers
    assert "er_alpha" in sys.modules
    publish_handler("late")
    assert found.handlers == first


# ── quarantine ───────────────────────────────────────────────────────────────────────────────

ABSTRACT = """
    from engineroom import InferenceHandler

    class Handler(InferenceHandler):
        name = "bad"

        def can_handle(self, loaded_model):
            return True
"""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_runtime_at_all", "ModuleNotFoundError"),
        ("raise ValueError('at import')", "ValueError: at import"),
        ("import sys; sys.exit('no GPU here')", "SystemExit: no GPU here"),
        ("Handler = None", "name = None"),
        ("x = 1", "AttributeError"),
        ("def oops(:", "SyntaxError"),
        (ABSTRACT, "abstract method"),
        (HANDLER.format(name="other"), "'bad' but its class has name = 'other'"),
        (HANDLER.format(name="bad").replace("async def infer", "def infer"), "bad.*infer"),
    ],
    ids=["missing", "raises", "exits", "none", "no-name", "syntax", "abstract", "renamed", "kind"],
)
def test_a_broken_plugin_is_quarantined_and_the_rest_work(publish_handler, caplog, module, reason):
    publish_handler("bad", module=module)
    publish_handler("good")
    with caplog.at_level(logging.ERROR):
        found = registry()
        assert names(found) == ["good"]
    record = found.plugins[0]
    assert (record.name, record.status) == ("bad", "quarantined")
    assert re.search(reason, record.reason)
    assert record.traceback.startswith(("Traceback", "  File")) and record.remedy
    (log,) = caplog.records
    assert log.exc_info and "'bad' of er-bad 1.2" in log.getMessage()
    assert record.remedy in log.getMessage()
    (verdict,) = [v for v in found.explain(model()).verdicts if v.handler == "bad"]
    assert verdict.verdict == "quarantined"
    assert record.reason in verdict.reason and record.remedy in verdict.reason
    with pytest.raises(ConfigurationError, match="'bad' is quarantined"):
        found.get("bad")


def test_a_plugin_without_its_runtime_is_listed_and_not_used(publish_handler, caplog):
    module = HANDLER.format(name="bare") + (
        "\n        def unavailable(self):\n            return 'no runtime; pip install runtime'\n"
    )
    publish_handler("bare", module=module)
    publish_handler("good")
    with caplog.at_level(logging.WARNING):
        found = registry()
        assert names(found) == ["good"]
    assert not caplog.records
    record = found.plugins[0]
    assert (record.name, record.status) == ("bare", "unavailable")
    (verdict,) = [v for v in found.explain(model()).verdicts if v.handler == "bare"]
    assert verdict.verdict == "unavailable" and "pip install runtime" in verdict.reason
    with pytest.raises(ConfigurationError, match="'bare' is unavailable.*pip install runtime"):
        found.get("bare")


def test_a_name_that_two_distributions_claim_goes_to_one_and_the_other_is_told(publish):
    for distribution in ("er-first", "er-second"):
        module = distribution.replace("-", "_")
        entries = f"[engineroom.handlers]\nsame = {module}:Handler\n"
        publish(distribution, entries, HANDLER.format(name="same"))
    found = registry()
    assert names(found) == ["same"]
    assert [r.status for r in found.plugins] == ["active", "quarantined"]
    assert "name is taken by er_first.Handler" in found.plugins[1].reason


def test_damaged_metadata_costs_a_plugin_its_label_and_nobody_their_work(publish, publish_handler):
    folder = publish(
        "er-damaged",
        "[engineroom.handlers]\ndamaged = er_damaged:Handler\n[engineroom.api]\ndamaged = ???\n",
        HANDLER.format(name="damaged"),
    )
    (folder / "er_damaged-1.2.dist-info" / "METADATA").unlink()
    publish_handler("good")
    assert names(registry()) == ["damaged", "good"]


def test_a_value_that_is_no_entry_point_is_quarantined(publish, publish_handler):
    publish("er-odd", "[engineroom.handlers]\nodd = ???\n")
    publish_handler("good")
    found = registry()
    assert names(found) == ["good"]
    assert [r.status for r in found.plugins] == ["active", "quarantined"]


# ── plugins that publish handlers and observers ──────────────────────────────────────────────

SEVERAL = (
    HANDLER.format(name="x")
    + """
    from engineroom import hookimpl

    class Named(Handler):
        def __init__(self, name):
            self.name = name

    @hookimpl
    def engineroom_register_handlers(register):
        register(Named("several_b"))
        register(Named("several_a"))
"""
)


def test_a_plugin_may_publish_several_handlers(publish, publish_handler):
    publish("er-several", "[engineroom.plugins]\nseveral = er_several\n", SEVERAL)
    publish_handler("zeta")
    assert names(registry()) == ["zeta", "several_b", "several_a"]


def test_published_handlers_are_listed_like_installed_ones(publish, publish_handler):
    publish("er-several", "[engineroom.plugins]\nseveral = er_several\n", SEVERAL)
    publish_handler("zeta")
    publish_handler("alpha")
    found = registry(allow=["several_a", "zeta"])
    assert names(found) == ["several_a", "zeta"]
    environ = {"ENGINEROOM_DISABLED_HANDLERS": "several_b"}
    assert names(registry(environ=environ)) == ["alpha", "zeta", "several_a"]


def test_a_plugin_that_fails_while_it_registers_is_quarantined_whole(publish):
    module = SEVERAL.replace('register(Named("several_a"))', "raise OSError('no licence')") + (
        """
    seen = []

    @hookimpl
    def engineroom_request_started(request):
        seen.append(request)
"""
    )
    publish("er-several", "[engineroom.plugins]\nseveral = er_several\n", module)
    found = registry()
    found.discover()
    (record,) = found.plugins
    assert record.status == "quarantined" and "no licence" in record.traceback
    found.notify("engineroom_request_started", request=None)
    import er_several

    assert er_several.seen == []


def test_a_disabled_plugin_is_not_imported(publish):
    publish("er-watch", "[engineroom.plugins]\nwatch = er_watch\n", "raise RuntimeError")
    found = registry(disabled=["watch"])
    found.discover()
    assert [r.status for r in found.plugins] == ["disabled"]


# ── register ─────────────────────────────────────────────────────────────────────────────────


def test_before_puts_a_handler_directly_before_another(publish_handler):
    publish_handler("alpha")
    publish_handler("zeta")
    found = registry()
    found.register(PlainHandler(name="one"))
    found.register(PlainHandler(name="nearly"), before="zeta")
    found.register(PlainHandler(name="zero"), before="one")
    found.register(PlainHandler(name="two"))
    assert names(found) == ["zero", "one", "two", "alpha", "nearly", "zeta"]


def test_before_an_unknown_handler_is_refused_with_the_known_ones():
    found = bare_registry()
    found.register(PlainHandler(name="alpha"))
    with pytest.raises(ConfigurationError, match=r"no handler 'alpah' \(there is: alpha\).*alpha"):
        found.register(PlainHandler(name="x"), before="alpah")
    assert names(found) == ["alpha"]
    found.register(PlainHandler(name="x"))  # the refusal left nothing behind


def test_a_name_is_taken_once():
    found = bare_registry()
    found.register(GateHandler("same"))
    with pytest.raises(ConfigurationError, match=r"'same'.*taken by .*GateHandler"):
        found.register(PlainHandler(name="same"))
    assert len(found.handlers) == 1


def test_a_property_of_a_handler_is_not_looked_at():
    class Lazy(PlainHandler):
        @property
        def engine(self):
            raise RuntimeError("not loaded yet")

    found = bare_registry()
    found.register(Lazy())
    assert names(found) == ["plain"]


def test_get_tells_what_to_install():
    found = bare_registry()
    found.register(EchoHandler())
    assert found.get("echo").name == "echo"
    with pytest.raises(ConfigurationError, match="did you mean 'echo'"):
        found.get("ecko")
    with pytest.raises(ConfigurationError, match="pip install engineroom-hf-transformers"):
        found.get("hf_transformers")


# ── dispatch ─────────────────────────────────────────────────────────────────────────────────


class Answers(PlainHandler):
    """Says what it is told to, and counts how often it was asked."""

    def __init__(self, name, answer):
        super().__init__(name=name)
        self.answer = answer
        self.asked = 0

    def can_handle(self, loaded_model):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def can_load(self, config):
        return self.can_handle(config)


def given(*handlers) -> HandlerRegistry:
    found = bare_registry()
    for handler in handlers:
        found.register(handler)
    return found


def test_the_first_that_says_true_is_taken_and_no_later_one_is_asked():
    no, yes, later = Answers("no", False), Answers("yes", True), Answers("later", True)
    assert given(no, yes, later).select(model()) is yes
    assert (no.asked, yes.asked, later.asked) == (1, 1, 0)


@pytest.mark.parametrize("answer", [ValueError("boom"), None, 1, "yes", [True]], ids=repr)
def test_an_answer_that_is_a_defect_counts_as_no_and_is_logged(answer, caplog):
    bad, good = Answers("bad", answer), Answers("good", True)
    found = given(bad, good)
    assert found.select(model()) is good
    (record,) = caplog.records
    assert "'bad': can_handle" in record.getMessage() and "counts as no" in record.getMessage()
    assert bool(record.exc_info) == isinstance(answer, Exception)
    first, second = found.explain(model()).verdicts
    assert (first.verdict, second.verdict) == ("error", "chosen")
    assert "mend the plugin" in first.reason
    assert ("ValueError: boom" if record.exc_info else type(answer).__name__) in first.reason


def test_the_choice_is_remembered_for_the_model_and_forgotten_on_register():
    handler = Answers("yes", True)
    found = given(handler)
    one, other = model(), model()
    for _ in range(3):
        assert found.select(one) is handler
    assert handler.asked == 1
    found.select(other)
    assert handler.asked == 2
    earlier = Answers("earlier", True)
    found.register(earlier, before="yes")
    assert found.select(one) is earlier


def test_a_refusal_is_not_remembered():
    handler = Answers("later", False)
    found = given(handler)
    loaded = model("telling")
    with pytest.raises(NoSuitableHandlerError):
        found.select(loaded)
    handler.answer = True
    assert found.select(loaded) is handler


def test_without_any_plugin_the_error_says_which_to_install():
    for ask in (bare_registry().select, lambda m: bare_registry().select_loader(m.config)):
        with pytest.raises(NoSuitableHandlerError, match="none is installed") as caught:
            ask(model())
        for hint in ("engineroom-llamacpp", "engineroom-hf-transformers", "engineroom-vllm"):
            assert f"{hint} (" in caught.value.message
        assert caught.value.model_id == "m"


def test_no_suitable_handler_has_every_handlers_reason():
    found = given(Answers("a", False), Answers("b", KeyError("x")))
    with pytest.raises(NoSuitableHandlerError) as caught:
        found.select(model())
    assert "a: no, can_handle is False" in caught.value.message
    assert "b: error, can_handle raised KeyError" in caught.value.message


def test_explain_reports_on_a_loaded_model():
    report = given(Answers("a", False), Answers("b", True), Answers("c", True)).explain(model())
    assert (report.model_id, report.question, report.chosen) == ("m", "can_handle", "b")
    assert [(v.handler, v.verdict) for v in report.verdicts] == [
        ("a", "no"),
        ("b", "chosen"),
        ("c", "yes"),
    ]
    assert "'b' comes first" in report.verdicts[2].reason
    assert str(report).splitlines()[0] == "m: can_handle → b"
    assert "  a: no (can_handle is False)" in str(report).splitlines()


def test_explain_reports_on_a_configuration():
    found = given(Answers("a", False), EchoHandler())
    report = found.explain(echo_config("m"))
    assert (report.question, report.chosen) == ("can_load", "echo")
    assert found.select_loader(echo_config("m")).name == "echo"
    assert str(given(Answers("a", False)).explain(echo_config())).endswith(
        "a: no (can_load is False)"
    )


def test_a_named_runtime_is_taken_whatever_the_source():
    found = given(EchoHandler(), Answers("a", False))
    config = ModelConfig(model_id="m", source="echo:", runtime="a")
    assert found.select_loader(config).name == "a"
    report = found.explain(config)
    assert report.chosen == "a" and "names runtime 'a'" in report.verdicts[1].reason
    with pytest.raises(ConfigurationError, match=r"model 'm': handler 'b' is not installed") as c:
        found.select_loader(ModelConfig(model_id="m", source="echo:", runtime="b"))
    assert c.value.model_id == "m"


def test_no_loader_says_how_to_name_one():
    found = given(EchoHandler(unloadable=False))
    with pytest.raises(NoSuitableHandlerError, match=r"loads 'echo:' .*echo: no.*runtime:"):
        found.select_loader(echo_config())


@pytest.mark.parametrize(
    ("health", "reason"),
    [
        (HandlerHealth(), "can_handle is True"),
        (HandlerHealth(detail="one at a time"), "can_handle is True; one at a time"),
        (HandlerHealth(ok=False, detail="gone"), "can_handle is True; it is not well: gone"),
        (
            ValueError("boom"),
            "can_handle is True; it is not well: health raised ValueError; see the log",
        ),
    ],
)
def test_what_a_handler_has_to_say_of_its_model_is_explained(health, reason, caplog):
    class Telling(PlainHandler):
        def health(self, loaded_model):
            if isinstance(health, Exception):
                raise health
            return health

    found = registry()
    found.register(Telling(name="telling"))
    loaded = model("telling")
    verdict = found.explain(loaded).verdicts[0]
    assert (verdict.verdict, verdict.reason) == ("chosen", reason)
    assert bool(caplog.records) == isinstance(health, Exception)
