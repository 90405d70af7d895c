"""In an engine's process: grammars that take too long for a token end their own request.

vLLM looks for what may come next on the thread that computes for all requests, however long that
takes. And where llguidance gives a grammar up, it would let the text end as if it were complete.

It compiles with llguidance's own bounds, which are tighter than core's, and writes what clients
sent into the log where something is wrong. Here it compiles as all runtimes do.

vLLM calls :func:`install` in each of its processes, by the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final

from engineroom_vllm.unmasked_logprobs import install_unmasked

__all__ = ["OURS", "compiles_as_core", "install", "patient"]

OURS: Final = "ENGINEROOM_VLLM_ENGINE"
"""Set in the environment of the engines that engineroom starts; others are none of our business."""
_LEFT: Final = "_engineroom_left_s"
_MARK: Final = "_engineroom"


def install() -> None:
    """Bound what grammars may take, in an engine of engineroom's. Harmless when done twice."""
    if os.environ.get(OURS) != "1":
        return
    install_unmasked()
    backend: Any = importlib.import_module("vllm.v1.structured_output.backend_guidance")
    grammar = backend.GuidanceGrammar
    if not issubclass(grammar, _Patient):
        backend.GuidanceGrammar = patient(grammar)
    # Its class is imported elsewhere by name, so that this one stays.
    compile_grammar = backend.GuidanceBackend.compile_grammar
    if not hasattr(compile_grammar, _MARK):
        backend.GuidanceBackend.compile_grammar = compiles_as_core(backend, compile_grammar)


def compiles_as_core(backend: Any, compile_grammar: Callable[..., Any]) -> Callable[..., Any]:
    """The method of vLLM's that compiles; grammars, of which engineroom makes all, as core does.

    :param backend: the module that it stands in.
    """
    from engineroom.engine import compiled

    @wraps(compile_grammar)
    def compile_(self: Any, request_type: Any, grammar_spec: str, *more: Any, **named: Any) -> Any:
        if getattr(request_type, "name", "") != "GRAMMAR":
            return compile_grammar(self, request_type, grammar_spec, *more, **named)
        return backend.GuidanceGrammar(
            ll_matcher=compiled(self.ll_tokenizer, grammar_spec),
            ll_tokenizer=self.ll_tokenizer,
            vocab_size=self.vocab_size,
        )

    setattr(compile_, _MARK, True)
    return compile_


class _Patient:
    """Marks classes that :func:`patient` has made."""


def patient(grammar: type) -> type:
    """The class of vLLM's grammars, with a bound on the time of the processor that each may take.

    It is that of :class:`engineroom.engine.Constraint`. A grammar that has spent it, or that
    llguidance has given up, accepts no token, and vLLM ends its request with an error.
    """
    from engineroom.engine import FREE_S, PER_TOKEN_S

    class Patient(grammar, _Patient):  # type: ignore[misc] # what vLLM has
        @contextmanager
        def _timed(self) -> Iterator[None]:
            began = time.thread_time()
            yield
            left = getattr(self, _LEFT, FREE_S)
            setattr(self, _LEFT, left - (time.thread_time() - began))

        def fill_bitmask(self, bitmask: Any, idx: int) -> None:
            with self._timed():
                super().fill_bitmask(bitmask, idx)

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            with self._timed():
                accepted = bool(super().accept_tokens(request_id, tokens))
            left = getattr(self, _LEFT) + PER_TOKEN_S * len(tokens)
            setattr(self, _LEFT, left)
            return accepted and left >= 0 and not self.ll_matcher.is_error()

    return Patient
