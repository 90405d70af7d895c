"""The whole corpus of hostile requests, in parts that take at most some minutes each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

import corpus_calls
import corpus_fields
import corpus_forms
import corpus_texts
import corpus_wire
from corpus_apis import EVERY
from corpus_base import Row


def _by_route(name: str, rows: Iterable[Row]) -> dict[str, tuple[Row, ...]]:
    """A part of each route that rows go to."""
    rows = tuple(rows)
    parts = {
        f"{name} to {api.name}": tuple(replace(row, apis=(api,)) for row in rows if api in row.apis)
        for api in EVERY
    }
    return {part: of for part, of in parts.items() if of}


PARTS: Final[Mapping[str, tuple[Row, ...]]] = {
    **_by_route("lists", corpus_fields.LISTS),
    **_by_route("fields", corpus_fields.ROWS),
    "forms": corpus_forms.ROWS,
    "calls": corpus_calls.ROWS,
    **_by_route("texts", corpus_texts.ROWS),
    "wire": corpus_wire.ROWS,
}
