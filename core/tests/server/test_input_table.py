"""Inputs that have broken other servers, and the tests that send each, whole and streamed."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = "core/tests/server/test_tool_inputs.py"
FORMS = "core/tests/server/test_form_inputs.py"
REAL = "tests/test_form_inputs.py"
SAME = "test_a_seed_and_a_schema_twice_and_beside_others"
THOUGHTS = "test_thoughts_are_free_and_what_follows_them_is_not"
ROWS: dict[str, list[tuple[str, str]]] = {
    "the marker of a call's end inside of an argument: one call, no text": [
        (TOOLS, "test_what_looks_like_markup_inside_of_a_call"),
    ],
    "braces and brackets inside of arguments, cut anywhere: one call": [
        (TOOLS, "test_what_looks_like_markup_inside_of_a_call"),
    ],
    "max_tokens 10, 12, 16, 24, 32, 48 inside of a call: length, no broken call": [
        (TOOLS, "test_a_limit_inside_of_a_call"),
    ],
    "text, then a call cut by the end; cut right behind the marker: no call, no markup": [
        (TOOLS, "test_a_call_that_the_end_cuts_is_no_call_and_no_content"),
    ],
    "characters unescaped, escaped, and a lone half: once, one character, never a half": [
        (TOOLS, "test_what_looks_like_markup_inside_of_a_call"),
        (TOOLS, "test_half_of_a_character_is_never_sent"),
    ],
    "thinking and a JSON schema: reasoning free, content valid": [
        (FORMS, THOUGHTS),
        (REAL, THOUGHTS),
    ],
    "a pattern with an escaped sign: valid, the server lives": [
        (FORMS, "test_an_escaped_sign_in_a_pattern"),
    ],
    "pattern and maxLength; required without properties: valid, the server lives": [
        (FORMS, "test_a_pattern_beside_a_length"),
        (FORMS, "test_what_is_required_and_described_nowhere"),
    ],
    "an invalid grammar: 400, the server lives": [
        (FORMS, "test_what_is_no_grammar_is_refused_and_the_server_lives"),
    ],
    "log probabilities with tools or reasoning: as many entries as completion tokens": [
        (TOOLS, "test_there_are_as_many_log_probabilities_as_tokens"),
    ],
    "stop sequences of a line break or a brace with tools: on content alone": [
        (TOOLS, "test_stops_are_looked_for_in_content_alone"),
    ],
    "three beams and a regex: every beam under it": [
        (REAL, "test_every_beam_is_under_the_grammar")
    ],
    "only a tool's description changes: the same grammar, no crash": [
        (FORMS, "test_another_description_of_a_tool_is_the_same_grammar"),
    ],
    "content that begins with a brace and is no call: content": [
        (TOOLS, "test_what_is_no_call_is_content"),
    ],
    "a tool that was not offered: passed on with a warning": [
        (TOOLS, "test_a_tool_that_nobody_offered_is_passed_on_with_a_warning"),
    ],
    "a seed, a temperature and a schema, twice and beside neighbours: the same text": [
        (FORMS, SAME),
        (REAL, SAME),
    ],
}


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_its_tests(row: str) -> None:
    assert ROWS[row]
    assert all(test in names_in(file) for file, test in ROWS[row])
