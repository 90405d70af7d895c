"""The conformance kit: what every handler has to do, as tests that a plugin derives from.

``RULES`` can be read without pytest; :class:`HandlerConformance` needs the extra
``engineroom[testing]``. What is checked is what the service relies on, not how good or how
quick a runtime is: that is what benchmarks are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engineroom.testing.conformance.overriding import overrides
from engineroom.testing.conformance.rules import RULES, Rule

if TYPE_CHECKING:
    from engineroom.testing.conformance.suite import HandlerConformance

__all__ = ["RULES", "HandlerConformance", "Rule", "overrides"]


def __getattr__(name: str) -> Any:
    if name != "HandlerConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from engineroom.testing.conformance.suite import HandlerConformance
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        raise ModuleNotFoundError(
            'HandlerConformance needs pytest; pip install "engineroom[testing]"', name="pytest"
        ) from error
    return HandlerConformance
