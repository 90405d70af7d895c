"""What a text must match, as one grammar in Lark, and what llguidance makes of it."""

import asyncio
import json
import re
import string
from functools import cache
from importlib.metadata import version

import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

from engineroom import (
    ConfigurationError,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    StructuredOutput,
)
from engineroom.engine import GrammarCompiler
from engineroom.generation.grammar_bounds import MAX_GRAMMAR_DEPTH
from engineroom.generation.grammars import grammar_text, is_gbnf, json_rule
from engineroom.prompts import ModelTokens

END = 256
FLOWER = "🌸".encode()
WORDS = [b"the", b"name", b'": "', "é".encode(), FLOWER[:2], FLOWER[2:], b'{"', b'"}', b"ye"]
PIECES = [bytes([b]) for b in range(256)] + [b"<end>"]
PIECES += [*WORDS, b""]
"""A fake vocabulary: every byte, an end, some longer pieces, and a token that is none."""


class FakeCodec:
    """A codec that knows a vocabulary and no more."""

    def __init__(self, tokens):
        self.model_tokens = lambda: tokens


@cache
def compiler():
    tokens = ModelTokens(PIECES, frozenset({END}), [END], lambda text: list(text.encode()))
    return GrammarCompiler(FakeCodec(tokens))


def asking(**output):
    params = GenerationParams(structured_output=StructuredOutput(**output))
    return InferenceRequest(model_id="m", prompt="p", params=params)


def compiled(**output):
    return asyncio.run(compiler().compile(asking(**output)))


def matches(text, **output):
    """Whether the whole of a text is allowed, byte by byte, and may end there."""
    place = compiled(**output)
    for byte in text.encode():
        allowed = place.allowed()
        assert bool(allowed[byte]) == place.allows(byte)
        if not place.allows(byte):
            return False
        place.take(byte)
    assert place.allows(END) == place.complete
    return place.complete


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("output", "good", "bad"),
    [
        ({"json_schema": PERSON}, ['{"name": "Zoë 🌸", "age": 3}'], ['{"age": 3}', "[]", "{}"]),
        ({"json_schema": True}, ["3", '"a"', "[null]"], ["x", ""]),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "3", '{"a"}']),
        ({"regex": "(yes|no)"}, ["yes", "no"], ["ye", "yesno", "maybe"]),
        ({"regex": r"^a/b\d+$"}, ["a/b12"], ["a/b", "ab1"]),
        ({"regex": r"a\/b"}, ["a/b"], ["ab"]),
        ({"regex": "a\nb"}, ["a\nb"], ["ab"]),
        ({"regex": r"^hello there indeed\!$"}, ["hello there indeed!"], ["hello there indeed"]),
        ({"choice": ["red", "dark red"]}, ["red", "dark red"], ["dark", "redred"]),
        ({"grammar": 'root ::= "a" [0-9]+'}, ["a12"], ["a", "b1"]),
        ({"grammar": 'root ::= start "x"\nstart ::= "a" | "(" start ")"'}, ["ax", "(a)x"], ["a"]),
        (
            {
                "grammar": 'root ::= foo Foo a-b a_b\nfoo ::= "1"\nFoo ::= [a#"] "2"\n'
                'a-b ::= "start" # a_b ::= \na_b ::= "a-b"'
            },
            ["1#2starta-b", '1"2starta-b'],
            ["1#2startstart", "1#1starta-b"],
        ),
        ({"grammar": 'start: "x"+'}, ["xxx"], ["", "y"]),
    ],
)
def test_each_kind_lets_through_what_it_describes(output, good, bad):
    assert [text for text in good if not matches(text, **output)] == []
    assert [text for text in bad if matches(text, **output)] == []


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5))
@settings(max_examples=60)
def test_choices_are_taken_literally(choices):
    for choice in choices:
        assert matches(choice, choice=choices)
    assert matches(choices[0] + "x", choice=choices) == (choices[0] + "x" in choices)


@given(st.text(st.sampled_from("ab/\\\n.d"), max_size=8))
@settings(max_examples=60)
def test_a_regex_keeps_its_meaning_between_slashes(pattern):
    try:
        known = re.compile(pattern)
    except re.error:
        return
    if not pattern or re.search(r"\\[^/.d\\\n]", pattern) or pattern.endswith("\\"):
        return  # what the two dialects read differently
    for text in ("", "a", "ab", "/", "a/b", "\n", "a\n", "\\", "1", "d", "."):
        if (known.fullmatch(text) is not None) and "\n" not in text:
            assert matches(text, regex=pattern)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"json_schema": {"not": {}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"json_schema": {"type": "strin"}}, "strin"),
        ({"json_schema": False}, "allows nothing"),
        ({"json_schema": {"x": float("nan")}}, "is no JSON"),
        ({"regex": "("}, "regex"),
        ({"grammar": "start: foo"}, "foo"),
        ({"grammar": "root ::= foo"}, "foo"),
        ({"grammar": "hello"}, "structured_output"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(output, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        compiled(**output)
    assert len(str(caught.value)) < 500 and "\n" not in caught.value.message


def test_a_schema_that_is_nested_too_deep_is_refused():
    schema = {}
    for _ in range(MAX_GRAMMAR_DEPTH):
        schema = {"items": schema}
    with pytest.raises(ConfigurationError, match=r"64 levels .* deeper at items\.items"):
        json_rule(schema)


def test_no_client_switches_the_checks_off():
    sneaky = {"type": "integer", "not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(ConfigurationError, match="Unimplemented"):
        compiled(json_schema=sneaky)
    assert json.loads(json_rule(sneaky).removeprefix("%json "))["x-guidance"]["lenient"] is False


def test_white_space_in_json_is_bounded():
    assert matches('{"name" :\n"a", "age": 3}', json_schema=PERSON)
    assert matches('{"name":"a",\n    "age": 3}', json_schema=PERSON)
    # Before 1.8, llguidance bounds it by having none next to brackets.
    old = version("llguidance").split(".")[:2] == ["1", "7"]
    assert matches('{ "name": "a", "age": 3 }', json_schema=PERSON) is not old
    for blanks in ("  ", "\n\n", f"\n{' ' * 17}"):
        for text in ('{%s"name": "a", "age": 3}', '{"name":%s"a", "age": 3}',
                     '{"name": "a",%s"age": 3}', '{"name": "a", "age": 3%s}'):  # fmt: skip
            assert not matches(text % blanks, json_schema=PERSON)


def test_gbnf_is_told_by_its_rules():
    assert is_gbnf('root ::= "a"') and is_gbnf('# c\nroot-x  ::= "a"')
    assert not is_gbnf('start: "::="') and not is_gbnf("%llguidance {}\nstart: X")


def test_gbnf_that_is_nested_too_deep_leaves_no_thousand_frames_for_the_log():
    grammar = f'root ::= {"(" * 3000}"a"{")" * 3000}'
    with pytest.raises(ConfigurationError, match="recursion") as caught:
        grammar_text(StructuredOutput(grammar=grammar))
    assert caught.value.__cause__.__traceback__ is None


def test_a_copy_of_a_constraint_goes_its_own_way():
    place = compiled(regex="ab[cd]+")
    for byte in b"ab":
        place.take(byte)
    other = place.copy()
    other.take(ord("c"))
    assert other.complete and not place.complete
    place.take(ord("d"))
    assert place.complete and not place.allows(ord("a")) and other.allows(ord("c"))


def test_what_is_not_allowed_is_not_taken():
    place = compiled(regex="ab")
    with pytest.raises(InferenceError, match="does not fit"):
        place.take(ord("x"))
    place.take(ord("a"))  # it is none the worse
    place.take(ord("b"))
    assert place.ended and place.complete
    assert place.allowed().nonzero()[0].tolist() == [END]
    place.take(END)


def test_longer_tokens_and_halves_of_characters_are_allowed_where_they_fit():
    place = compiled(regex="yes 🌸")
    assert place.allows(len(PIECES) - 2) and not place.allows(len(PIECES) - 1)
    for byte in b"yes ":
        place.take(byte)
    first = PIECES.index(FLOWER[:2], END)
    assert place.allows(first)
    place.take(first)
    assert place.allows(first + 1) and not place.allows(first)


def test_a_text_that_must_follow_may_be_cut_into_any_tokens():
    place = compiled(regex="the name")
    assert place.allowed()[ord("t")] and place.allowed()[PIECES.index(b"the")]
    assert place.allows(ord("t")) and place.allows(PIECES.index(b"the"))


def test_what_is_compiled_is_kept():
    output = asking(regex="kept" * 3)
    first = asyncio.run(compiler().compile(output))
    first.take(ord("k"))
    again = asyncio.run(compiler().compile(output))
    assert again.allows(ord("k")) and not again.allows(ord("e"))


def test_a_model_without_an_end_has_no_grammar():
    tokens = ModelTokens(PIECES, frozenset(), [], lambda text: list(text.encode()))
    with pytest.raises(ConfigurationError, match="no token that ends"):
        asyncio.run(GrammarCompiler(FakeCodec(tokens)).compile(asking(regex="a")))


def test_many_properties_compile_within_the_bounds():
    letters = string.ascii_lowercase
    schema = {"properties": {a + b: {"type": "integer"} for a in letters for b in letters}}
    assert compiled(json_schema=schema).allows(ord("{"))


def test_an_ambiguous_grammar_ends_its_request_and_not_the_patience_of_others(monkeypatch):
    """It takes more for each token than for the one before."""
    monkeypatch.setattr("engineroom.engine.constraint.PER_TOKEN_S", 0.0002)
    constraint = compiled(grammar='start: s\ns: s s | s s s | /./ | ""\n')
    constraint._left_s = 0.02

    def go_on():
        for _ in range(300):
            constraint.allowed()
            constraint.take(97)

    with pytest.raises(ConfigurationError, match=r"takes too long for each token.*\(s: x\*\)"):
        go_on()


def test_a_plain_grammar_has_time_to_spare():
    constraint = compiled(json_schema={"type": "string"})
    constraint.take(ord('"'))
    for _ in range(100):
        constraint.allowed()
        constraint.copy().take(97)
        constraint.take(97)
    assert constraint._left_s > 2.0


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_reference_that_leads_to_itself_is_told_in_plain_words(schema):
    with pytest.raises(ConfigurationError, match="leads to nothing but itself"):
        compiled(json_schema=schema)
