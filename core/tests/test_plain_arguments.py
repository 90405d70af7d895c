"""Arguments that stand as plain text between tags are valid by the JSON schemas of their tools."""

import json
from itertools import pairwise

import pytest

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

import jsonschema
from grammar_doubles import constraint, draw, drawn_calls, matches
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from engineroom import ConfigurationError, InferenceRequest
from engineroom.generation.argument_types import argument_types
from engineroom.generation.call_forms import TaggedForm
from engineroom.generation.tool_formats import TOOL_FORMATS
from engineroom.generation.traits import PLAIN, ModelTraits

TAGGED = {f.name: f for f in TOOL_FORMATS if isinstance(f.form, TaggedForm)}
GLM = TAGGED["glm"]
FORMATS = {
    "date": (["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-13-01", "0000-01-01", "x"]),
    "time": (["23:59:59Z", "01:02:03.5+01:30"], ["24:00:00Z", "01:02:03"]),
    "date-time": (["2024-02-29T00:00:00Z"], ["2024-02-29", "2024-02-29 00:00:00Z"]),
    "duration": (["P1Y2M3DT4H5M6S", "PT5M", "P3W"], ["P", "P1YT", "1D"]),
    "email": (["a.b+c@example.org"], ["a", "a@", "@b", f"{'a' * 65}@b.c"]),
    "hostname": (["a-b.example"], ["-a", "a..b", "a" * 64]),
    "ipv4": (["127.0.0.1", "255.255.255.255"], ["256.1.1.1", "1.1.1", "01.1.1.1"]),
    "ipv6": (["::", "::1", "fe80::1:2", "1:2:3:4:5:6:7:8"], [":", "1:2:3", "1::2::3", "g::"]),
    "uri": (["https://u@a.b:80/c/d?e=f#g", "urn:a:b"], ["a", "//a.b", "http://a b"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
}


def ask(parameters, **fields):
    tools = [{"name": "f", "parameters": parameters}]
    message = {"role": "user", "content": "q"}
    fields = {"tools": tools, "tool_choice": "required", **fields}
    return InferenceRequest(model_id="m", messages=[message], **fields)


def object_of(schema, **more):
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **more}


def grammar(parameters, format_=GLM):
    return constraint(ModelTraits(format_, native=True), ask(parameters))


def written(text):
    return f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"


def allows(schema, text, **more):
    place = grammar(object_of(schema, **more))
    for line in ("", "\n"):  # as GLM's template has it, or not
        if matches(place.copy(), written(text).replace("</arg_key>\n", f"</arg_key>{line}")):
            return True
    return False


def refusal(parameters, **fields):
    with pytest.raises(ConfigurationError) as caught:
        constraint(ModelTraits(GLM, native=True), ask(parameters, **fields))
    return caught.value


CASES = [
    ({"pattern": "^[a-z]+$"}, ["ab"], ["", "aB", "a b"]),
    ({"pattern": "b"}, ["b", "abc", "a\nb\n"], ["", "ac"]),
    ({"pattern": "^a|b$|c/d"}, ["ax", "xb", "c/d!"], ["xa", "bx", "cd"]),
    ({"pattern": r"^\d+[^\d]$"}, ["12a"], ["12", "123", "٣a"]),
    ({"pattern": "^[&b~]+$"}, ["&~"], ["a"]),
    ({"minLength": 2, "maxLength": 3}, ["ab", "é\n🌸"], ["a", "abcd"]),
    ({"maxLength": 0}, [""], ["a"]),
    ({"pattern": "a", "maxLength": 2}, ["ba"], ["bbb", "bab"]),
    ({"enum": ["on", "<b>"]}, ["on", "<b>"], ["off", ""]),
    ({"enum": ["on", 1, None]}, ["on"], ["1", "null"]),
    ({"const": "x\ny"}, ["x\ny"], ["x"]),
    ({"enum": ["one", "two"], "pattern": "w"}, ["two"], ["one"]),
    ({"anyOf": [{"const": "a"}, {"minLength": 3}]}, ["a", "bcd"], ["b", ""]),
    ({"oneOf": [{"const": "a"}, {"const": "b"}]}, ["a", "b"], ["c"]),
    ({"allOf": [{"minLength": 2}, {"pattern": "^a"}]}, ["ab"], ["a", "ba"]),
    ({"$ref": "#/$defs/c"}, ["red"], ["blue"]),
    ({"description": "b", "default": "c"}, ["", "any\nthing"], []),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_keywords_of_strings_hold(schema, good, bad):
    schema = schema if "$ref" in schema else {"type": "string", **schema}
    definitions = {"$defs": {"c": {"enum": ["red", "green"]}}}
    validator = jsonschema.Draft202012Validator({**schema, **definitions})
    for text in good + bad:
        assert allows(schema, text, **definitions) == (text in good), text
        assert validator.is_valid(text) == (text in good) or "٣" in text


@pytest.mark.parametrize("name", FORMATS)
def test_formats_hold(name):
    schema = {"type": "string", "format": name}
    generic = constraint(PLAIN, ask(object_of(schema)))
    head, tail = '<tool_call>\n{"name": "f", "arguments": {"a": "', '"}}\n</tool_call>'
    good, bad = FORMATS[name]
    for text in good + bad:
        assert allows(schema, text) == (text in good), text
    place = grammar(object_of({**schema, "maxLength": 60}))
    for seed in range(6):
        if (text := draw(place.copy(), seed)) is not None:
            value = text.partition("<arg_value>")[2].partition("</arg_value>")[0]
            # Python takes fractions of three and six digits only.
            assert name == "time" or jsonschema.FormatChecker().conforms(value, name), value
            assert name in ("email", "uri") or matches(generic.copy(), head + value + tail), value


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": {"const": "a"}}, '"not"'),
        ({"if": {"minLength": 1}}, '"if"'),
        ({"pattern": "^(?!a)"}, "look-around"),
        ({"pattern": r"a\b"}, "WordUnicode"),
        ({"pattern": "(^a|b)c"}, "has ^ or $ within it"),
        ({"pattern": "("}, "unclosed group"),
        ({"minLength": 3, "maxLength": 2}, "minLength (3) is greater"),
        ({"pattern": "^b$", "const": "a"}, "Unsatisfiable"),
        ({"minLength": -1}, "minLength"),
        ({"allOf": 3}, "allOf"),
        ({"enum": [1]}, "Unsatisfiable"),
    ],
)
def test_what_cannot_hold_is_refused_by_name(schema, said):
    error = refusal(object_of({"type": "string", **schema}))
    assert error.field == "tools.0.function.parameters.properties.a", error
    assert said in error.message and "tool 'f'" in error.message


def test_a_format_that_no_grammar_has_is_refused_of_strict_tools():
    parameters = object_of({"type": "string", "format": "iri"})
    assert allows(parameters["properties"]["a"], "anything")
    strict = [{"name": "f", "parameters": parameters, "strict": True}]
    assert "iri" in refusal(None, tools=strict, tool_choice="auto").message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"minProperties": 2}, "minProperties"),
        ({"not": {}}, "not"),
        ({"anyOf": [{"properties": {"a": {"const": "x"}}}]}, "anyOf"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"patternProperties": {"a": {"minLength": 2}}}, "patternProperties"),
    ],
)
def test_what_is_said_of_all_arguments_together_is_refused_by_name(more, said):
    assert f"{said} of all parameters" in refusal(object_of({"type": "string"}, **more)).message


def test_arguments_that_are_needed_are_there():
    def takes(parameters, *names):
        values = [f"<arg_key>{name}</arg_key>\n<arg_value>x</arg_value>\n" for name in names]
        place = grammar(parameters)
        text = f"<tool_call>f\n{''.join(values)}</tool_call>"
        return matches(place.copy(), text) or matches(
            place, text.replace("</arg_key>\n", "</arg_key>")
        )

    text = {"type": "string"}
    either = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    parameters = {"type": "object", "properties": {"a": text, "b": text}, **either}
    assert takes(parameters, "a") and takes(parameters, "b") and takes(parameters, "a", "b")
    assert not takes(parameters)
    assert takes({"required": ["z"]}, "z") and not takes({"required": ["z"]})
    referred = {"$ref": "#/$defs/o", "$defs": {"o": {"properties": {"a": text}}}}
    assert takes(referred, "a") and not takes(referred, "b")
    assert "z" in refusal(object_of(text, required=["z"], additionalProperties=False)).message


def test_references_that_branch_are_followed_once():
    names = [f"d{i}" for i in range(20)]
    definitions = {
        name: {"anyOf": [{"$ref": f"#/$defs/{after}"}] * 20} for name, after in pairwise(names)
    }
    root = {"$defs": {**definitions, names[-1]: {"type": "string"}}}
    assert argument_types({"$ref": "#/$defs/d0"}, root) == {"string"}


# ── any schema of a string ───────────────────────────────────────────────────────────────────

PARTS = st.fixed_dictionaries(
    {},
    optional={
        "minLength": st.integers(0, 3),
        "maxLength": st.integers(2, 9),
        "pattern": st.sampled_from(["^a", "b+$", "[<>]", r"^\S*$", "a|^$", r"\n", "</"]),
        "enum": st.lists(st.sampled_from(["a", "ab", "\nb", "<a>", "b", "", 3]), min_size=1),
    },
)
SCHEMAS = st.builds(
    lambda own, parts, key: {"type": "string", **own, **({key: parts} if parts else {})},
    PARTS,
    st.lists(PARTS, max_size=2),
    st.sampled_from(["anyOf", "allOf"]),
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.sampled_from(sorted(TAGGED)), st.integers(0, 99), st.integers(1, 9))
def test_whatever_is_allowed_is_read_as_a_valid_call(schema, name, seed, size):
    parameters = object_of(schema)
    request, traits = ask(parameters), ModelTraits(TAGGED[name], native=True)
    try:
        calls = drawn_calls(traits, request, seed, size)
    except ConfigurationError:
        assume(False)
    assume(calls is not None)
    for _, arguments in calls:
        jsonschema.Draft202012Validator(parameters).validate(json.loads(arguments))
