"""Calls in Python's and Gemma's forms: what their grammars allow is read as valid calls."""

import json

import pytest

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

import jsonschema
from grammar_doubles import constraint, drawn_calls, matches
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from engineroom import ConfigurationError, InferenceRequest
from engineroom.generation.outputs import OutputParser, read_output
from engineroom.generation.tool_formats import TOOL_FORMATS
from engineroom.generation.traits import ModelTraits

BY_NAME = {f.name: f for f in TOOL_FORMATS}
OWN = ["pythonic", "lfm2", "olmo3", "gemma4", "functiongemma"]
MARK = '<|"|>'


def ask(parameters, **fields):
    fields = {"tool_choice": "required", **fields}
    tools = [{"name": "f", "parameters": parameters}, {"name": "now"}]
    message = {"role": "user", "content": "q"}
    return InferenceRequest(model_id="m", messages=[message], tools=tools, **fields)


def grammar(name, parameters, **fields):
    return constraint(ModelTraits(BY_NAME[name], native=True), ask(parameters, **fields))


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z]"},
        "days": {"type": "integer", "maximum": 9},
        "loud": {"type": "boolean"},
        "unit": {"anyOf": [{"enum": ["c", "f"]}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "n": {"type": "string"}},
            "required": ["x"],
        },
    },
    "required": ["city"],
}
GEMMA = (
    f'city:{MARK}Ro"m\\e{MARK},days:3,loud:true,unit:null,tags:[{MARK}a{MARK},{MARK}b{MARK}],'
    f"at:{{x:1.5,n:{MARK}{MARK}}}"
)
CASES = [
    ("pythonic", '[f(city="Rome")]', True),
    ("pythonic", '[f(city="Rome", days=3, loud=True, unit=None), now()]', True),
    ("pythonic", '[f(city="Rome", loud=true, unit="c", tags=["a", "b"], at={"x": 1.5})]', True),
    ("pythonic", "[now()]", True),
    ("pythonic", '[f(city="rome")]', False),
    ("pythonic", "[f()]", False),
    ("pythonic", '[f(city="Rome", days=12)]', False),
    ("pythonic", '[f(city="Rome", unit="k")]', False),
    ("pythonic", '[f(city="Rome", loud=None)]', False),
    ("pythonic", '[f(city="Rome", tags=["abc"])]', False),
    ("pythonic", "[g()]", False),
    ("lfm2", '<|tool_call_start|>[f(city="Rome")]<|tool_call_end|>', True),
    ("lfm2", '[f(city="Rome")]', False),
    ("olmo3", '<function_calls>f(city="Rome")\nnow()</function_calls>', True),
    ("gemma4", f"<|tool_call>call:f{{city:{MARK}Rome{MARK}}}<tool_call|>", True),
    (
        "gemma4",
        f"<|tool_call>call:f{{{GEMMA}}}<tool_call|>",
        True,
    ),
    ("gemma4", "<|tool_call>call:now{}<tool_call|>", True),
    ("gemma4", f"<|tool_call>call:f{{city:{MARK}rome{MARK}}}<tool_call|>", False),
    ("gemma4", '<|tool_call>call:f{city:"Rome"}<tool_call|>', False),
    ("gemma4", f"<|tool_call>call:f{{days:3,city:{MARK}Rome{MARK}}}<tool_call|>", False),
    (
        "functiongemma",
        "<start_function_call>call:f{city:<escape>Rome<escape>}<end_function_call>",
        True,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "allowed"), CASES)
def test_a_model_writes_its_own_form(name, text, allowed):
    assert matches(grammar(name, PARAMETERS), text) == allowed
    if allowed:
        request = ask(PARAMETERS)
        parser = OutputParser(BY_NAME[name], request.tools)
        output = read_output(parser.feed(text) + parser.finish())
        assert output.calls and not output.content
        for called, arguments in output.calls:
            if called == "f":
                jsonschema.validate(json.loads(arguments), PARAMETERS)


@pytest.mark.parametrize("name", OWN)
def test_a_strict_tool_in_its_own_form(name):
    tools = [{"name": "f", "parameters": PARAMETERS, "strict": True}, {"name": "now"}]
    request = InferenceRequest(
        model_id="m", messages=[{"role": "user", "content": "q"}], tools=tools
    )
    place = constraint(ModelTraits(BY_NAME[name], native=True), request)
    assert matches(place.copy(), "Hello (you).") and matches(place.copy(), "")
    good = next(text for n, text, fits in CASES if n == name and fits)
    assert matches(place.copy(), good) and not matches(place.copy(), good.replace("Rome", "rome"))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "integer", "not": {}}, '"not"'),
        ({"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 1}, "minItems"),
        ({"type": "array", "items": {"type": "string", "not": {}}}, '"not"'),
        ({"type": "object", "properties": {"b": {"if": {}}}}, '"if"'),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "not": {}}]}, '"not"'),
    ],
)
def test_what_cannot_hold_is_refused_by_name(name, schema, said):
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    with pytest.raises(ConfigurationError) as caught:
        grammar(name, parameters)
    assert caught.value.field.startswith("tools.0.function.parameters.properties.a")
    assert said in caught.value.message


# ── any schema ───────────────────────────────────────────────────────────────────────────────

TEXT = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={
        "maxLength": st.integers(1, 4),
        "pattern": st.sampled_from(["^a", '["<>]', r"^\S*$", "\\\\"]),
    },
)
LEAF = st.one_of(
    TEXT,
    st.just({"type": "boolean"}),
    st.just({"type": ["boolean", "null"]}),
    st.just({"type": ["string", "null"]}),
    st.just({"type": "integer", "minimum": 0, "maximum": 30}),
    st.just({"enum": ["a", 1, None, True]}),
    st.just({"const": False}),
    st.just({"enum": ['x"', "y\\"]}),
)
KINDS = ["null", "integer", "boolean", "string"]
VALUES = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.builds(lambda i: {"type": "array", "items": i, "minItems": 1, "maxItems": 2}, inner),
        st.builds(lambda i: {"type": "array", "items": i, "maxItems": 3}, inner),
        st.builds(lambda i: {"anyOf": [i, {"type": "null"}]}, inner),
        st.builds(lambda i, k: {"oneOf": [i, {"type": k}]}, inner, st.sampled_from(KINDS)),
        st.builds(
            lambda i, names: {
                "type": "object",
                "properties": {"k": i, "a b": i} if names else {"k": i, "l": i},
                "required": ["l"] if not names else ["k"],
                "additionalProperties": False,
            },
            inner,
            st.booleans(),
        ),
    ),
    max_leaves=3,
)


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(["a", "b_c", "d-e"]), VALUES, max_size=3),
    st.sets(st.sampled_from(["a", "d-e"])),
    st.sampled_from(OWN),
    st.integers(0, 99),
    st.integers(1, 9),
)
def test_whatever_is_allowed_is_read_as_valid_calls(properties, required, name, seed, size):
    needed = sorted(required & properties.keys())
    parameters = {"type": "object", "properties": properties, "required": needed}
    request, traits = ask(parameters), ModelTraits(BY_NAME[name], native=True)
    try:
        calls = drawn_calls(traits, request, seed, size)
    except ConfigurationError:
        assume(False)
    assume(calls is not None)
    for called, arguments in calls:
        if called == "f":
            jsonschema.validate(json.loads(arguments), parameters)


@pytest.mark.parametrize("name", OWN)
def test_what_may_hold_twice_of_one_of_several_is_refused(name):
    both = {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]}
    with pytest.raises(ConfigurationError, match="oneOf"):
        grammar(name, {"type": "object", "properties": {"a": both}})
