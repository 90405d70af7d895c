"""The names of the environment variables that a deployment hears."""

from __future__ import annotations

from typing import Final

__all__ = ["CONFIG_VARIABLE", "DISABLED_VARIABLE", "HANDLERS_VARIABLE"]


CONFIG_VARIABLE: Final = "ENGINEROOM_CONFIG"
DISABLED_VARIABLE: Final = "ENGINEROOM_DISABLED_HANDLERS"
HANDLERS_VARIABLE: Final = "ENGINEROOM_HANDLERS"
