"""What an engine's grammars may take of the processor; vLLM's class is made up."""

from __future__ import annotations

import enum
import sys
import time
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from engineroom import StructuredOutput
from engineroom.generation.grammars import grammar_text
from engineroom_vllm.patient_grammars import OURS, compiles_as_core, install, patient

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


class Options(enum.Enum):
    JSON = enum.auto()
    GRAMMAR = enum.auto()


class Grammar:
    """As vLLM makes its own."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts


class Backend:
    """Stands for vLLM's, with a vocabulary of bytes."""

    vocab_size = 257

    def __init__(self, tokenizer: Any = None) -> None:
        self.ll_tokenizer = tokenizer

    def compile_grammar(
        self, request_type: Options, grammar_spec: str, stop_token_ids: Any = None
    ) -> Any:
        return grammar_spec, stop_token_ids


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
    own = Backend.compile_grammar
    module.GuidanceBackend = type("GuidanceBackend", (), {"compile_grammar": own})
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr("engineroom_vllm.patient_grammars.install_unmasked", unmasked := Mock())
    monkeypatch.delenv(OURS, raising=False)
    if ours:
        monkeypatch.setenv(OURS, "1")
    install()
    made = module.GuidanceGrammar
    assert issubclass(made, GuidanceGrammar) and (made is GuidanceGrammar) is not ours
    assert unmasked.called is ours
    compiles = module.GuidanceBackend.compile_grammar
    assert (compiles is own) is not ours
    install()
    assert module.GuidanceGrammar is made
    assert module.GuidanceBackend.compile_grammar is compiles


def matcher_of(grammar: str, capfd: pytest.CaptureFixture[str]) -> Any:
    """What the engine goes through such a text with, of a vocabulary of bytes."""
    llguidance = pytest.importorskip("llguidance", reason="needs engineroom[structured]")
    backend: Any = ModuleType(MODULE)
    backend.GuidanceGrammar = Grammar
    pieces = [bytes([byte]) for byte in range(256)]

    class Tokens:
        eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
        tokens = (*pieces, b"<end>")

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()), n_vocab=257)
    compile_ = compiles_as_core(backend, Backend.compile_grammar)
    made = compile_(Backend(tokenizer), Options.GRAMMAR, grammar, stop_token_ids={1})
    assert made.parts.keys() == {"ll_matcher", "ll_tokenizer", "vocab_size"}
    assert capfd.readouterr() == ("", "")  # clients' texts are not for the log
    return made.parts["ll_matcher"]


def test_the_engine_compiles_what_core_lets_pass(capfd: pytest.CaptureFixture[str]) -> None:
    many = {f"property_{number}": {"type": "string"} for number in range(900)}
    form = StructuredOutput(json_schema={"type": "object", "properties": many})
    matcher = matcher_of(grammar_text(form), capfd)
    text = b'{"property_7": "a", "property_899": "b"}'
    assert not matcher.is_error() and matcher.try_consume_tokens(list(text)) == len(text)
    assert matcher.is_accepting()


def test_what_is_wrong_with_a_grammar_says_nothing_of_its_text(
    capfd: pytest.CaptureFixture[str],
) -> None:
    matcher = matcher_of('start: "my secret"', capfd)
    assert not matcher.consume_tokens(list(b"my x"))
    assert matcher.is_error() and "secret" not in matcher.get_error()


def test_other_forms_than_grammars_are_compiled_by_vllm() -> None:
    compile_ = compiles_as_core(ModuleType(MODULE), Backend.compile_grammar)
    assert compile_(Backend(), Options.JSON, "{}") == ("{}", None)
    assert compile_(Backend(), Options.JSON, "{}", stop_token_ids={1}) == ("{}", {1})
