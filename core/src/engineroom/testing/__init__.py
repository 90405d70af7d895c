"""For tests of handlers, and of applications that use engineroom. Needs no pytest."""

from __future__ import annotations

from engineroom.testing.echo import EchoHandler, EchoModel, EchoOptions

__all__ = ["EchoHandler", "EchoModel", "EchoOptions"]
