"""For tests of handlers, and of applications that use engineroom.

Only :class:`HandlerConformance` needs pytest (``pip install "engineroom[testing]"``), and only
when it is first used. Here are the kit, a handler that echoes, cycles of loading, and what
waits for the garbage collector; tests of engineroom itself are beside the package, not in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engineroom.testing.conformance.overriding import overrides
from engineroom.testing.cycles import LoadCycles, load_cycles
from engineroom.testing.echo import EchoHandler, EchoModel, EchoOptions
from engineroom.testing.garbage import uncollected

if TYPE_CHECKING:
    from engineroom.testing.conformance.suite import HandlerConformance

__all__ = [
    "EchoHandler",
    "EchoModel",
    "EchoOptions",
    "HandlerConformance",
    "LoadCycles",
    "load_cycles",
    "overrides",
    "uncollected",
]


def __getattr__(name: str) -> Any:
    if name != "HandlerConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engineroom.testing import conformance

    return conformance.HandlerConformance
