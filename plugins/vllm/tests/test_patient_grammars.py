"""What an engine's grammars may take of the processor; vLLM's class is made up."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest

from engineroom_vllm import patient_grammars
from engineroom_vllm.patient_grammars import OURS, install, patient

MODULE = "vllm.v1.structured_output.backend_guidance"


class Matcher:
    failed = False

    def is_error(self) -> bool:
        return self.failed


class GuidanceGrammar:
    """Stands for vLLM's: takes as long as it is told to."""

    def __init__(self, seconds: float) -> None:
        self.ll_matcher = Matcher()
        self.seconds = seconds
        self.filled: list[int] = []

    def fill_bitmask(self, bitmask: Any, idx: int) -> None:
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
        self.filled.append(idx)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return tokens != [13]


def steps(grammar: Any, most: int) -> int:
    """How many tokens it accepts."""
    for count in range(most):
        grammar.fill_bitmask(None, count)
        if not grammar.accept_tokens("r", [7]):
            return count
    return most


def test_a_quick_grammar_goes_on_and_a_slow_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engineroom.engine.FREE_S", 0.1)
    monkeypatch.setattr("engineroom.engine.PER_TOKEN_S", 0.001)
    bounded = patient(GuidanceGrammar)
    assert steps(bounded(0.0), 1000) == 1000
    slow = bounded(0.02)
    assert steps(slow, 20) < 9
    assert slow.filled and not bounded(0.0).accept_tokens("r", [13])


def test_one_that_llguidance_has_given_up_accepts_nothing() -> None:
    grammar: Any = patient(GuidanceGrammar)(0.0)
    assert grammar.accept_tokens("r", [7])
    grammar.ll_matcher.failed = True
    assert not grammar.accept_tokens("r", [2])


@pytest.mark.parametrize("ours", [True, False])
def test_it_is_installed_in_engines_that_engineroom_starts(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType(MODULE)
    module.GuidanceGrammar = GuidanceGrammar
    monkeypatch.setattr(patient_grammars.importlib, "import_module", {MODULE: module}.__getitem__)
    monkeypatch.delenv(OURS, raising=False)
    if ours:
        monkeypatch.setenv(OURS, "1")
    install()
    made = module.GuidanceGrammar
    assert issubclass(made, GuidanceGrammar) and (made is GuidanceGrammar) is not ours
    install()
    assert module.GuidanceGrammar is made
