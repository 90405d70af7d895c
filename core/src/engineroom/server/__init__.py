"""The HTTP server: OpenAI's, Anthropic's and engineroom's own API in front of one service.

Start reading in :mod:`engineroom.server.app`. What HTTP asks for is put into the service's
words here, and its answers into each API's; what becomes of a request is the service's matter.
Needs the extra: ``pip install 'engineroom[server]'``; importing this package loads nothing of it::

    from engineroom.server import ServerSettings, create_app

    app = create_app(service, ServerSettings())   # any ASGI server runs it; `engineroom serve` does
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engineroom.errors import ConfigurationError

if TYPE_CHECKING:
    from engineroom.server.app import create_app
    from engineroom.server.keys import KeyRing
    from engineroom.server.runner import serve
    from engineroom.server.settings import ServerSettings

__all__ = ["KeyRing", "ServerSettings", "create_app", "serve"]

_MODULES = {"KeyRing": "keys", "ServerSettings": "settings", "create_app": "app", "serve": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "engineroom").startswith("engineroom"):
            raise
        raise ConfigurationError(
            f"the server needs {error.name}, which is not installed; "
            "pip install 'engineroom[server]'"
        ) from error
