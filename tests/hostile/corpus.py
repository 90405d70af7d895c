"""The whole corpus of hostile requests, in parts that take minutes each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import corpus_fields
import corpus_forms
import corpus_texts
import corpus_wire
from corpus_base import Row

PARTS: Final[Mapping[str, tuple[Row, ...]]] = {
    "lists": corpus_fields.LISTS,
    "fields": corpus_fields.ROWS,
    "forms": corpus_forms.ROWS,
    "texts": corpus_texts.ROWS,
    "wire": corpus_wire.ROWS,
}
