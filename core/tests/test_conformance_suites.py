"""The kit as a plugin's tests adopt it: good handlers pass, whatever runs the tests.

It is run on every Python, on the oldest pytest that the extra ``testing`` allows, and on several
workers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import pytest
from toy_runtime import ToyHandler

from engineroom import ModelConfig
from engineroom.testing import EchoHandler, HandlerConformance
from engineroom.testing.conformance import RULES

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent


class TestEcho(HandlerConformance):
    handler_class = EchoHandler

    @pytest.fixture(scope="class")
    def model_config(self) -> ModelConfig:
        return ModelConfig(model_id="echo", source="echo:")

    def render_chat(self, loaded_model, messages):
        return messages[-1].content


class TestEchoOfBytes(TestEcho):
    """Every character is cut."""

    @pytest.fixture
    def model_config(self) -> ModelConfig:
        return ModelConfig(model_id="echo", source="echo:", options={"split_bytes": True})


class TestToy(HandlerConformance):
    handler_class = ToyHandler
    runtime_modules: ClassVar[tuple[str, ...]] = ("numpy",)

    @pytest.fixture
    def model_config(self) -> ModelConfig:
        return ModelConfig(model_id="toy", source="toy:")


# ── in a project of its own ──────────────────────────────────────────────────────────────────────

SUITE = """
import pytest
from engineroom import ModelConfig
from engineroom.testing import HandlerConformance
from toy_runtime import ToyHandler

class TestToy(HandlerConformance):
    handler_class = ToyHandler
    load_cycles = 4

    @pytest.fixture(scope="class")
    def model_config(self):
        return ModelConfig(model_id="toy", source="toy:")
"""
UNCLAIMED = {"num-beams", "early-stopping", "structured-output"}


def outcomes(pytester: pytest.Pytester, *args: str) -> dict[str, int]:
    """Run the project's tests in a process of their own, which is what its author does."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    pytester._monkeypatch.setenv("PYTHONPATH", path)
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-ra", *args)
    assert done.ret == 0, done.stderr.str()
    text = done.stdout.str()
    for rule in UNCLAIMED:
        # The reason names the rule: all skips are told at the same line of the kit.
        assert f": {rule}: capabilities() does not claim {rule.replace('-', '_')};" in text
    return done.parseoutcomes()


LEFT_OUT = UNCLAIMED | {
    *("structured-seeds", "tool-calls", "hostile-grammar-neighbour", "reasoning-apart"),
    "entry-point",
}
"""The toy is not installed, so that it has no entry point, either."""
ALL = {"passed": len(RULES) - len(LEFT_OUT), "skipped": len(LEFT_OUT)}


def test_beside_pytest_asyncio_with_warnings_as_errors(pytester):
    pytester.makepyfile(SUITE + "\nasync def test_of_its_own():\n    pass\n")
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = error\naddopts = --strict-markers --strict-config\n"
    )
    assert outcomes(pytester) == {**ALL, "passed": ALL["passed"] + 1}


@pytest.mark.parametrize("distribution", ["load", "loadscope"])
def test_on_several_workers(pytester, distribution):
    pytester.makepyfile(SUITE)
    pytester.makeini(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    assert outcomes(pytester, "-n", "2", "--dist", distribution) == ALL
