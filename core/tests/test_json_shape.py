"""What is counted of a body's JSON before it is decoded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from engineroom.json_shape import (
    CONTAINER,
    MAX_DIGITS,
    SMALL_BODY,
    VALUES_A_TEXT,
    excess,
)

WORDS = st.text() | st.text('"\\[]{},:\n\u20ac', max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | WORDS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(WORDS, inner, max_size=6),
    max_leaves=30,
)


def counted(value: Any) -> tuple[int, int]:
    """Texts and values, by walking over what was decoded."""
    if isinstance(value, str):
        return 1, 0
    if not isinstance(value, list | dict):
        return 0, 0
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    texts, values = 0, CONTAINER + max(0, len(value) - 1)
    for item in inside:
        more_texts, more_values = counted(item)
        texts, values = texts + more_texts, values + more_values
    return texts, values


def large(text: str) -> bytes:
    return text.encode() + b" " * SMALL_BODY


@given(JSON, st.integers(0, 200), st.booleans())
@example(["\\", '"', "[{,"], 20, True)
def test_it_counts_what_is_outside_of_texts(value, most, ascii_only):
    texts, values = counted(value)
    body = large(json.dumps(value, ensure_ascii=ascii_only))
    found = excess(body, most)
    if texts > most // VALUES_A_TEXT:
        assert found is not None and f"it has {texts} texts and names" in found
    elif values > most:
        assert found is not None and f"it has {values} values" in found
    else:
        assert found is None


@given(st.binary() | st.text('"\\[{,1').map(str.encode), st.integers(0, 50))
def test_it_takes_whatever_comes(data, most):
    excess(data + b" " * SMALL_BODY, most)


@pytest.mark.parametrize("text", ["[%s]", '{"a": -%s.5}', '["\\"", %s]'])
def test_long_numbers_are_refused_and_long_digits_in_texts_are_not(text):
    digits = "9" * (MAX_DIGITS + 1)
    assert "digits" in (excess(large(text % digits), 1000) or "")
    assert excess(large(text % digits[1:]), 1000) is None
    assert excess(large(text % json.dumps(f'"{digits}')), 1000) is None


def test_a_small_body_is_decoded_whatever_it_holds():
    assert excess(b"[" * SMALL_BODY, 1) is None
