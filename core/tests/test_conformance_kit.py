"""The kit proves itself: good handlers pass it, and each broken one fails exactly its rule.

A broken handler is held against its rule and the foundations; `nightly` runs every check on it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from broken_handlers import ALSO, BROKEN, ELSEWHERE, ENDLESS
from forms_toy import FormsToy, ThinkingToy
from toy_runtime import ToyHandler

import engineroom.handlers.discovery
import engineroom.testing.conformance.base as base
from engineroom import ConfigurationError, GenerationParams, ModelConfig
from engineroom.testing import HandlerConformance, overrides
from engineroom.testing.conformance import RULES
from engineroom.testing.conformance.foundations import FOUNDATIONS
from engineroom.testing.conformance.limits import UNUSUAL
from engineroom.testing.conformance.runner import (
    CheckResult,
    Job,
    SelectionError,
    current_job,
    run_suite,
)
from engineroom.testing.conformance.suite import CHECKS

pytestmark = pytest.mark.kit_proof

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
TOY = ModelConfig(model_id="toy", source="toy:")
ROOMY = ModelConfig(model_id="toy", source="toy:", options={"n_ctx": 1200})
"""With room for the definitions of tools."""
PATIENT = {"load_cycles": 8}
IMPATIENT = {**PATIENT, "timeout_s": 4.0}
"""For handlers that hang: the kit's own patience would be the test's whole time."""
HURRIED = {**PATIENT, "timeout_s": 2.0}
"""The same where few checks are run."""
# It starts a process to import the module, which is the same for all of these handlers.
ALL = "not import_is_light"
FOUND_BEFORE_THE_LOOP_IS_LOST = {
    *("handler-is-valid", "entry-point", "capabilities", "can-load", "can-load-foreign"),
    *("model-loads", "can-handle", "can-handle-foreign", "questions-are-cheap"),
    *("questions-change-nothing", "estimate-memory", "health", "missing-source"),
    *("unknown-option", "answers"),
}


def run(handler, select: str | None = None, config: ModelConfig = TOY, **settings) -> dict:
    job = Job(handler, config, {**PATIENT, **settings})
    return {result.check: result for result in run_suite(job, select)}


def failed(results: dict[str, CheckResult]) -> list[str]:
    return [name for name, result in results.items() if result.outcome == "failed"]


# ── a good handler ──────────────────────────────────────────────────────────────────────────────


def test_the_toy_runtime_is_checked_in_whole():
    results = run(ToyHandler)
    skipped = {name: r.reason for name, r in results.items() if r.outcome == "skipped"}
    assert failed(results) == []
    assert set(skipped) == {
        "entry-point", "num-beams", "early-stopping", "structured-output", "structured-seeds",
        "tool-calls", "hostile-grammar-neighbour", "reasoning-apart",
    }  # fmt: skip
    assert "does not claim num_beams" in skipped["num-beams"]


@pytest.mark.parametrize("handler", [FormsToy, ThinkingToy])
def test_the_toy_under_grammars_is_checked_in_whole(handler):
    results = run(handler, ALL, ROOMY)
    skipped = {name for name, r in results.items() if r.outcome == "skipped"}
    assert failed(results) == []
    thinks = {"chat-template"} if handler is ThinkingToy else {"reasoning-apart"}
    assert skipped == {"entry-point", "num-beams", "early-stopping"} | thinks


def test_a_context_of_512_letters_has_room_for_calls():
    small = TOY.model_copy(update={"options": {"n_ctx": 512}})
    results = run(FormsToy, "tool_calls", small)
    assert [(r.outcome, r.reason) for r in results.values()] == [("passed", "")]


def test_what_a_small_context_has_no_room_for_begins_as_it_should():
    small = TOY.model_copy(update={"options": {"n_ctx": 512}})
    results = run(BROKEN["tool-calls__any_arguments"], "tool_calls", small)
    assert failed(results) == ["tool-calls"]
    assert "arguments that begin as its schema says" in results["tool-calls"].reason


# ── rules and checks ─────────────────────────────────────────────────────────────────────────────


def test_each_rule_has_its_check():
    assert {name.removeprefix("test_").replace("_", "-") for name in CHECKS} == set(RULES)


def test_each_parameter_has_its_rule_and_a_value_that_asks_for_something():
    fields = GenerationParams.model_fields
    assert {name.replace("_", "-") for name in fields} <= set(RULES)
    assert set(UNUSUAL) == set(fields)
    for name, value in UNUSUAL.items():
        assert getattr(GenerationParams(**{name: value}), name) not in (None, fields[name].default)


def test_each_rule_is_one_sentence():
    for rule in RULES.values():
        assert rule.title
        assert not rule.title.endswith(".")
        assert rule.text.endswith(".")


def test_each_rule_has_a_broken_handler():
    rules = {name.partition("__")[0] for name in BROKEN}
    assert rules | ELSEWHERE == set(RULES)
    assert set(ALSO) | ENDLESS <= set(BROKEN)


# ── broken handlers ──────────────────────────────────────────────────────────────────────────────


CAN_BE_STOPPED = [n for n in BROKEN if "*" not in ALSO.get(n, ((), ""))[0]]


def rules_broken_by(name: str) -> set[str]:
    return {name.partition("__")[0]} | ALSO.get(name, (set(), ""))[0]


def breaks_exactly_its_rules(name: str, select: str, patience: dict) -> None:
    rule = name.partition("__")[0]
    config = ROOMY if rule == "tool-calls" else TOY
    results = run(BROKEN[name], select, config, **(patience if name in ENDLESS else {}))
    assert set(failed(results)) == rules_broken_by(name)
    reason = results[rule].reason
    assert reason.startswith(f"{RULES[rule].title}: this rule is broken\n")
    for part in (
        "did:",
        "expected:",
        "saw:",
        RULES[rule].text,
        f"docs/plugin-rules.md#rule-{rule}",
    ):
        assert part in reason


# What cannot be stopped is left behind, and complains when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CAN_BE_STOPPED)
def test_a_broken_handler_breaks_its_rule_and_no_foundation(name):
    rules = sorted(rules_broken_by(name) | set(FOUNDATIONS))
    select = " or ".join(f"test_{rule.replace('-', '_')}" for rule in rules)
    breaks_exactly_its_rules(name, select, HURRIED)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CAN_BE_STOPPED)
def test_a_broken_handler_breaks_exactly_its_rule(name):
    breaks_exactly_its_rules(name, ALL, IMPATIENT)


def test_after_a_lost_loop_the_rest_fails_at_once():
    results = run(BROKEN["answers__blocks_the_loop"], ALL, **IMPATIENT)
    first, *others = failed(results)
    assert first == "answers"
    reason = results[first].reason
    assert "the loop has been blocked for" in reason
    assert re.search(r"in prefill \(\S+broken_text\.py:\d+\)", reason)
    assert "no other check can be run after this one" in reason
    assert {*others, "overrides"} == set(results) - FOUND_BEFORE_THE_LOOP_IS_LOST
    for other in others:
        assert results[other].reason.startswith("not checked: the event loop was lost")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_stopped_is_found_and_the_suite_ends():
    results = run(BROKEN["cancel-by-task__goes_on"], ALL, **IMPATIENT)
    assert failed(results)[0] == "cancel-by-task"
    reason = results["cancel-by-task"].reason
    assert "that it went on; it waits in ToyHandler.decode (" in reason


def test_what_stands_on_a_broken_foundation_is_not_checked():
    results = run(BROKEN["answers"], ALL)
    assert results["seed"].outcome == "skipped"
    assert results["seed"].reason == "not checked: answers is broken, and this stands on it"


def test_a_broken_foundation_fails_the_first_check_where_its_own_is_not_run():
    results = run(BROKEN["answers"], "test_seed or test_top_p")
    assert failed(results) == ["seed", "seed-beside-neighbours", "top-p"]
    assert results["seed"].reason.startswith("infer answers: this rule is broken")
    assert results["top-p"].reason.startswith("not checked: answers is broken")


def test_where_it_hangs_is_said():
    reason = run(BROKEN["stream-ends"], "stream_ends", timeout_s=1.0)["stream-ends"].reason
    assert "Broken.stream_infer (" in reason
    assert "broken_text.py" in reason


def test_a_suite_of_hanging_checks_ends(monkeypatch):
    class Hanging(ToyHandler):
        async def decode(self, model, request):
            if request.stop_sequences:
                await base.asyncio.Event().wait()
            await super().decode(model, request)

    results = run(Hanging, "stop", timeout_s=1.0)
    reasons = [results[name].reason for name in failed(results)]
    assert sum("this rule is broken" in reason for reason in reasons) == base.MAX_HUNG
    assert "not checked: 3 checks hung before" in reasons[-1]


# ── what needs an installation or a suite ────────────────────────────────────────────────────────


def installed(monkeypatch, folder: Path, name: str, value: str, api: str = "") -> None:
    info = folder / "some_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    text = f"[engineroom.handlers]\n{name} = {value}\n"
    if api:
        text += f"[engineroom.api]\n{name} = engineroom.api:{api}\n"
    (info / "entry_points.txt").write_text(text)

    def entry_points(group: str):
        found = distributions(path=[str(folder)])
        return [e for d in found for e in d.entry_points if e.group == group]

    monkeypatch.setattr(engineroom.handlers.discovery, "entry_points", entry_points)


def test_the_entry_point_of_a_good_plugin(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path / "site", "toy", "toy_runtime:ToyHandler", api="v1")
    result = run(ToyHandler, "entry_point")["entry-point"]
    assert (result.outcome, result.reason) == ("passed", "")


@pytest.mark.parametrize(
    ("name", "value", "api", "saw"),
    [
        ("other", "toy_runtime:ToyHandler", "", "name = 'toy'"),
        ("toy", "toy_runtime:NoSuchThing", "", "AttributeError"),
        ("toy", "no_such_module_at_all:ToyHandler", "", "ModuleNotFoundError"),
        ("toy", "engineroom.testing:EchoHandler", "", "EchoHandler"),
        ("toy", "toy_runtime:ToyHandler", "v2", "2"),
    ],
)
def test_an_entry_point_that_is_wrong(monkeypatch, tmp_path, name, value, api, saw):
    installed(monkeypatch, tmp_path / "site", name, value, api)
    result = run(ToyHandler, "entry_point")["entry-point"]
    assert result.outcome == "failed"
    assert saw in result.reason.partition("saw:")[2].partition("\n")[0]


@pytest.mark.parametrize("place", ["at the top", "in a question"])
def test_a_plugin_that_loads_its_runtime(monkeypatch, tmp_path, place):
    loading = "import kit_test_heavy" if place == "at the top" else ""
    asking = "import kit_test_heavy" if place == "in a question" else "pass"
    (tmp_path / "kit_test_heavy.py").touch()
    (tmp_path / "kit_test_plugin.py").write_text(
        f"from toy_runtime import ToyHandler\n{loading}\n"
        "class Handler(ToyHandler):\n"
        "    def can_load(self, config):\n"
        f"        {asking}\n"
        "        return super().can_load(config)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from kit_test_plugin import Handler  # type: ignore[import-not-found]

    try:
        results = run(Handler, runtime_modules=("kit_test_heavy",))
        quiet = run(Handler, "import_is_light")
    finally:
        for module in ("kit_test_plugin", "kit_test_heavy"):
            sys.modules.pop(module, None)
    assert failed(results) == ["import-is-light"]
    assert "kit_test_heavy was imported" in results["import-is-light"].reason
    assert failed(quiet) == []


SUITE = """
import pytest
from engineroom import ModelConfig
from engineroom.testing import HandlerConformance, overrides
from toy_runtime import ToyHandler

class TestToy(HandlerConformance):
    handler_class = ToyHandler
    load_cycles = 4

    @pytest.fixture(scope="class")
    def model_config(self):
        return ModelConfig(model_id="toy", source="toy:")
"""
WITHOUT_REASON = """
    def test_seed(self):
        pass

    test_top_k = None
"""
WITH_REASON = """
    @overrides("seeds are the engine's own")
    def test_seed(self):
        pass
"""


def pytest_run(pytester, source: str, *args: str):
    pytester.makepyfile(source)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.syspathinsert(HERE)
    return pytester.runpytest("-p", "no:cacheprovider", "-p", "no:faulthandler", *args)


def test_an_override_without_a_reason_fails(pytester):
    done = pytest_run(pytester, SUITE + WITHOUT_REASON, "-k", "overrides or seed")
    done.assert_outcomes(failed=1, passed=2, skipped=1)
    done.stdout.fnmatch_lines(
        ["*A replaced check says why: this rule is broken", "*saw: * test_seed, test_top_k"]
    )


def test_an_override_with_a_reason_is_run_instead(pytester):
    done = pytest_run(pytester, SUITE + WITH_REASON, "-k", "overrides or test_seed")
    done.assert_outcomes(passed=3)


@pytest.mark.parametrize("reason", ["", "  ", None, lambda: None])
def test_a_reason_says_something(reason):
    with pytest.raises(ValueError, match="say why"):
        overrides(reason)


def test_a_suite_that_names_no_handler(pytester):
    done = pytest_run(
        pytester, SUITE.replace("handler_class = ToyHandler", ""), "-k", "handler_is_valid"
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*say what is tested: handler_class = MyHandler*"])


def test_a_handler_by_its_installed_name(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path / "site", "toy", "toy_runtime:ToyHandler")

    class Good(HandlerConformance):
        handler_name = "toy"

    class Suite(HandlerConformance):
        handler_name = "ty"

    assert isinstance(Good().make_handler(), ToyHandler)
    with pytest.raises(ConfigurationError, match="is not installed"):
        Suite().make_handler()


# ── the runner ───────────────────────────────────────────────────────────────────────────────────


def test_a_selection_that_fits_nothing():
    with pytest.raises(SelectionError, match="fits no check"):
        run(ToyHandler, "no_such_check")
    with pytest.raises(SelectionError, match="cannot be read"):
        run(ToyHandler, "and or")
    with pytest.raises(ConfigurationError, match="run_suite"):
        current_job()


def test_the_environment_does_not_disturb(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-flag")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-flag\n")
    monkeypatch.chdir(tmp_path)
    assert run(ToyHandler, "test_seed")["seed"].outcome == "passed"


def test_without_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import engineroom.testing as testing\n"
        "from engineroom.testing.conformance import RULES\n"
        "from engineroom.testing.conformance.runner import run_suite\n"
        "assert RULES and testing.EchoHandler and testing.overrides\n"
        "for attempt in (lambda: testing.HandlerConformance, lambda: run_suite(None)):\n"
        "    try:\n"
        "        attempt()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count('pip install "engineroom[testing]"') == 2
