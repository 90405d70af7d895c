"""How large a grammar may be, and that whatever is refused is the request's own mistake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from functools import partial

import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

from pydantic import ValidationError

from engineroom import (
    ConfigurationError,
    GenerationParams,
    InferenceRequest,
    StructuredOutput,
)
from engineroom.engine import GrammarCompiler, grammar_of
from engineroom.generation.grammar_bounds import MAX_RULES, check_grammar, check_schema
from engineroom.generation.grammars import grammar_text, is_gbnf
from engineroom.prompts import ModelTokens, stop_reading
from engineroom.prompts.threads import PromptLane
from engineroom.prompts.work import ReadingStoppedError, check_stopped
from engineroom.schemas import MAX_GRAMMAR_CHARS, MAX_LITERAL_CHARS

BYTES = [bytes([byte]) for byte in range(256)]


class FakeCodec:
    """A codec whose vocabulary is bytes, and an end."""

    def model_tokens(self):
        return ModelTokens([*BYTES, b""], frozenset(), [256], lambda text: list(text.encode()))


class MarkingCodec(FakeCodec):
    """It has a special token as well."""

    def model_tokens(self):
        pieces = [*BYTES, b"", b"<|mark|>"]
        return ModelTokens(pieces, frozenset({257}), [256], lambda text: list(text.encode()))


def compiled(**output):
    params = GenerationParams(structured_output=StructuredOutput(**output))
    request = InferenceRequest(model_id="m", prompt="p", params=params)
    return asyncio.run(GrammarCompiler(FakeCodec()).compile(request))


def for_another(**output):
    """As a runtime gets it that compiles itself."""
    params = {"structured_output": output}
    request = InferenceRequest(model_id="m", prompt="x", params=params)
    return asyncio.run(grammar_of(FakeCodec(), request))


def rules_in_a_chain(count):
    rules = "".join(f'r{i}: r{i + 1} | "x{i}"\n' for i in range(count))
    return f'start: r0\n{rules}r{count}: "x"\n'


def definitions_in_a_chain(count, depth=1):
    definitions = {f"d{count}": {"type": "string"}}
    for i in range(count):
        schema = {"$ref": f"#/$defs/d{i + 1}"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        definitions[f"d{i}"] = schema
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def alternatives(count):
    return " | ".join(f'"a{i}"' for i in range(count))


def optional(count):
    return {"properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


def const(size):
    return {"properties": {"a": {"const": "x" * size}}}


TOO_MUCH = {
    "a chain of rules": {"grammar": rules_in_a_chain(5000)},
    "a chain of rules, in GBNF": {
        "grammar": "root ::= r0\n"
        + "".join(f"r{i} ::= r{i + 1}\n" for i in range(5000))
        + 'r5000 ::= "x"\n'
    },
    "rules with attributes": {"grammar": rules_in_a_chain(3000).replace(": ", '[capture="a"] : ')},
    "a chain of definitions": {"json_schema": definitions_in_a_chain(2000)},
    "deep definitions": {"json_schema": definitions_in_a_chain(120, 15)},
    "a chain of definitions, in a grammar": {
        "grammar": f"start: %json {json.dumps(definitions_in_a_chain(2000))}\n"
    },
    "many properties": {"json_schema": optional(1001)},
    "a long text of a schema": {"json_schema": const(MAX_LITERAL_CHARS + 1)},
    "a long name": {"json_schema": {"properties": {"x" * (MAX_LITERAL_CHARS + 1): {}}}},
    "a long text of a grammar": {"grammar": f'start: "{"x" * (MAX_LITERAL_CHARS + 1)}"'},
    "a long regex of a grammar": {"grammar": f"start: /{'x' * (MAX_LITERAL_CHARS + 1)}/"},
    "a large schema": {"json_schema": {"enum": [f"{i:50}" for i in range(6000)]}},
    "many alternatives": {"grammar": f"start: {alternatives(9000)}"},
    "an automaton that grows": {"regex": "x?" * 8000},
}


@pytest.mark.parametrize("output", TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_is_too_large_is_refused_before_it_can_end_the_process(output):
    with pytest.raises(ConfigurationError) as caught:
        compiled(**output)
    assert len(caught.value.message) < 500
    with pytest.raises(ConfigurationError):
        for_another(**output)


def test_what_llguidance_refuses_only_after_the_first_token_is_refused_before_it():
    closed = {"type": "object", "additionalProperties": False}
    each = ({f"{letter}{i}": {"type": "integer"} for i in range(900)} for letter in "abc")
    several = {"anyOf": [{**closed, "properties": properties} for properties in each]}
    for refusing in (compiled, for_another):
        with pytest.raises(ConfigurationError, match="8000"):
            refusing(json_schema=several)


def test_a_runtime_that_compiles_itself_gets_what_others_do():
    assert compiled(json_schema=optional(900)).allows(ord("{"))
    assert "p899" in for_another(json_schema=optional(900))


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "x" * (MAX_LITERAL_CHARS + 1)},
        {"choice": ["x" * (MAX_LITERAL_CHARS + 1)]},
        {"choice": ["x" * 1000] * 300},
        {"grammar": "x" * (MAX_GRAMMAR_CHARS + 1)},
    ],
)
def test_long_texts_are_refused_by_the_name_of_their_field(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        StructuredOutput(**fields)


@pytest.mark.parametrize(
    "output",
    [
        {"regex": "x" * MAX_LITERAL_CHARS},
        {"choice": ["x" * MAX_LITERAL_CHARS, "x"]},
        {"json_schema": const(MAX_LITERAL_CHARS)},
        {"grammar": rules_in_a_chain(MAX_RULES - 2)},
        {"json_schema": definitions_in_a_chain(200)},
        {"json_schema": definitions_in_a_chain(40, 14)},
        {"json_schema": {"description": "x" * 100_000, "type": "string"}},
    ],
)
def test_what_is_just_within_the_bounds_compiles(output):
    assert compiled(**output).allowed().any() and for_another(**output)


def test_thousands_of_choices_are_one_automaton():
    choices = [f"choice {i} of some more" for i in range(9000)]
    place = compiled(choice=choices)
    for byte in choices[4711].encode():
        assert place.allowed()[byte]
        place.take(byte)
    assert place.complete
    for_another(choice=choices)


def test_a_grammar_of_a_client_cannot_have_what_must_follow_written_out():
    for grammar in (
        'start: "ab"',
        '%llguidance {"no_forcing": false}\nstart: "ab"',
        'root ::= "ab"',
    ):
        assert grammar_text(StructuredOutput(grammar=grammar)).rstrip().endswith("true}")


def test_a_grammar_that_fails_at_a_token_is_the_requests_mistake():
    def go_on(text):
        for byte in text:
            place.allowed()
            place.take(byte)

    place = compiled(grammar=f'start: "bc" many\nmany: {alternatives(9000)}')
    with pytest.raises(ConfigurationError, match="too complex"):
        go_on(b"bca1")


@pytest.mark.parametrize(
    "text",
    [
        "a[" * 100_000, "a" * 200_000, "a " * 100_000, '"' * 200_000, '\\"' * 100_000,
        "/" * 200_000,
        '"' + '\\"' * 16_000 + "\n", "\n" * 200_000, "a\n" * 100_000, "%json [" * 30_000,
        "%json {" * 30_000, "a{ " * 60_000, " " * 200_000, "::=" * 60_000, "a::" * 60_000,
    ],
)  # fmt: skip
def test_reading_a_grammar_takes_a_time_that_grows_with_its_length_alone(text):
    """Squares of these lengths would take minutes."""
    is_gbnf(text)
    try:
        check_grammar(text)
    except ConfigurationError as error:
        assert len(error.message) < 300  # noqa: PT017


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)
references = st.sampled_from(["#", "#/a", "#/$defs/a", "#/a~1b", "#/%24defs/a", "other", "#/a/0"])


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=3), references)
@settings(max_examples=60)
def test_no_small_schema_is_refused_whatever_it_refers_to(schema, reference):
    check_schema(schema | {"$ref": reference, "$defs": {"a": {"$ref": "#"}}})


class StoppedCodec(FakeCodec):
    """A codec whose reading has been stopped by the time the first text of a grammar is read."""

    def __init__(self):
        self.lane = PromptLane()
        self.stop = None

    def model_tokens(self):
        self.stop()
        with contextlib.suppress(ReadingStoppedError):
            while True:
                check_stopped()
                time.sleep(0.001)
        return ModelTokens([*BYTES, b""], frozenset(), [256], self.encode)

    def encode(self, text):
        check_stopped()
        return list(text.encode())


def test_a_grammar_that_nobody_waits_for_any_more_is_no_failure(caplog):
    """llguidance panics where asking for the tokens of a text raises."""
    codec, params = StoppedCodec(), {"structured_output": {"json_schema": {"type": "object"}}}
    request = InferenceRequest(model_id="m", prompt="x", params=params)

    async def compiled_and_dropped():
        task = asyncio.create_task(GrammarCompiler(codec).compile(request))
        codec.stop = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(compiled_and_dropped())
    stop_reading(codec)  # waits for its end
    assert not caplog.records


@pytest.mark.parametrize("spelt", ["x-guidance", "x\\u002dguidance", "\\u0078-guidance"])
def test_no_grammar_switches_checks_off(spelt):
    schema = json.dumps({"type": "string", "not": {}, "GUIDE": {"lenient": True}})
    schema = schema.replace("GUIDE", spelt)
    with pytest.raises(ConfigurationError, match="switches checks"):
        compiled(grammar=f"start: %json {schema}")


def test_characters_of_gbnf_as_llama_cpp_writes_them():
    place = compiled(grammar='root ::= "\\u00e9" [\\u00e0-\\u00ff] "\\U0001F338" "\\\\u00e9"')
    for byte in "é\u00f6🌸\\u00e9".encode():
        assert place.allows(byte)
        place.take(byte)
    assert place.complete


@pytest.mark.parametrize("closed", [False, True])
def test_blanks_may_stand_behind_reasoning_that_was_ended_for_a_runtime_too(closed):
    """As they may where the grammar goes on from before the end."""
    params = {"structured_output": {"choice": ["yes"]}}
    request = InferenceRequest(model_id="m", prompt="x", params=params)
    grammar = asyncio.run(grammar_of(FakeCodec(), request, closed=closed))
    params = {"structured_output": {"grammar": grammar}}
    asked = InferenceRequest(model_id="m", prompt="x", params=params)
    constraint = asyncio.run(GrammarCompiler(FakeCodec()).compile(asked))
    assert constraint.allows(ord("\n")) is closed
    assert constraint.allows(ord("y"))


@pytest.mark.parametrize("grammar", ['start: <|mark|> "a"', 'start: "a" <|mark|> | "b"'])
def test_special_tokens_may_be_named_whoever_compiles(grammar):
    params = {"structured_output": {"grammar": grammar}}
    request = InferenceRequest(model_id="m", prompt="x", params=params)
    codec = MarkingCodec()
    assert asyncio.run(GrammarCompiler(codec).compile(request)) is not None
    assert "<|mark|>" in asyncio.run(grammar_of(codec, request))
    with pytest.raises(ConfigurationError):
        asyncio.run(grammar_of(FakeCodec(), request))
