"""Log probabilities under a grammar; vLLM's modules are made up."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engineroom_vllm.unmasked_logprobs import install_unmasked

MASKS, RUNNER, SAMPLER = (
    "vllm.v1.structured_output.utils",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.sample.sampler",
)


class Logits:
    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.copies = 0

    def clone(self) -> Logits:
        self.copies += 1
        return Logits([*self.values])


def mask(_scheduled: Any, _grammars: Any, _input_batch: Any, logits: Logits) -> None:
    """Lets the last token follow alone, in place."""
    logits.values[:-1] = [-math.inf] * (len(logits.values) - 1)


def log_softmax(logits: Logits) -> list[float]:
    total = math.log(sum(map(math.exp, logits.values)))
    return [value - total for value in logits.values]


@pytest.fixture(params=[False, True])
def modules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """With the runner imported before, or after."""
    made: dict[str, Any] = {name: ModuleType(name) for name in (MASKS, RUNNER, SAMPLER)}
    made[MASKS].apply_grammar_bitmask = mask
    made[SAMPLER].Sampler = type("Sampler", (), {"compute_logprobs": staticmethod(log_softmax)})
    if request.param:
        made[RUNNER].apply_grammar_bitmask = mask
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    if not request.param:
        monkeypatch.delitem(sys.modules, RUNNER)
    install_unmasked()
    install_unmasked()
    if not request.param:
        made[RUNNER].apply_grammar_bitmask = made[MASKS].apply_grammar_bitmask
    return made


def test_log_probabilities_are_the_models_under_a_grammar(modules: dict[str, Any]) -> None:
    logits = Logits([2.0, 1.0, 0.0])
    expected = log_softmax(Logits([2.0, 1.0, 0.0]))
    batch = SimpleNamespace(num_logprobs={"a": 2})
    modules[RUNNER].apply_grammar_bitmask(None, None, batch, logits)
    sampler = modules[SAMPLER].Sampler()
    assert sampler.compute_logprobs(logits) == expected
    assert logits.values == [-math.inf, -math.inf, 0.0] and logits.copies == 1


def test_nothing_is_copied_where_nobody_asks_for_any(modules: dict[str, Any]) -> None:
    logits = Logits([2.0, 1.0, 0.0])
    batch = SimpleNamespace(num_logprobs={})
    modules[RUNNER].apply_grammar_bitmask(None, None, batch, logits)
    assert logits.copies == 0 and modules[SAMPLER].Sampler.compute_logprobs(logits)[-1] == 0.0
