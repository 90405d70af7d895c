"""Names that plugins' metadata refers to, so that their contract is known before they load.

.. code-block:: toml

    [project.entry-points."engineroom.api"]
    my_runtime = "engineroom.api:v1"
"""

from __future__ import annotations

from typing import Final

from engineroom.handlers.base import API_VERSION

__all__ = ["v1"]

v1: Final = API_VERSION
