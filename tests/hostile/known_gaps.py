"""Rows of the corpus that hold the loop for too long today, and why.

A pattern of ``runtime/route/row`` and its reason. Each must still match a row that fails, else it
is to be taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

KNOWN: Final[Mapping[str, str]] = {}
