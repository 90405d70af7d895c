"""The whole corpus of hostile requests."""

from __future__ import annotations

from typing import Final

import corpus_fields
import corpus_texts
import corpus_wire
from corpus_base import Row

ROWS: Final[tuple[Row, ...]] = (*corpus_fields.ROWS, *corpus_texts.ROWS, *corpus_wire.ROWS)
