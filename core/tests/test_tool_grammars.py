"""Grammars of answers with tools: what they allow is what the parser reads back."""

import json

import pytest

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

from grammar_doubles import constraint, draw, matches, text_end

from engineroom import ConfigurationError, InferenceRequest
from engineroom.generation.call_forms import TaggedForm
from engineroom.generation.format_choice import tool_formats
from engineroom.generation.outputs import OutputParser, read_events, read_output
from engineroom.generation.tool_formats import GENERIC, REASONING_FORMATS, TOOL_FORMATS
from engineroom.generation.tool_grammars import call_rules
from engineroom.generation.traits import ModelTraits
from engineroom.tools import callable_tools

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": "integer"},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "days"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
THINK = next(format_ for format_ in REASONING_FORMATS if format_.name == "think")
BY_NAME = {format_.name: format_ for format_ in (GENERIC, *TOOL_FORMATS)}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def ask(**fields):
    message = {"role": "user", "content": "q"}
    return InferenceRequest(model_id="m", messages=[message], **{"tools": TOOLS, **fields})


@pytest.mark.parametrize("name", BY_NAME)
def test_calls_that_are_allowed_are_read_back(name):
    traits = ModelTraits(BY_NAME[name], native=True)
    end = text_end(BY_NAME[name].form)
    for choice in ("required", {"name": "weather"}):
        request = ask(tool_choice=choice)
        compiled = constraint(traits, request)
        drawn = 0
        for seed in range(4):
            text = draw(compiled.copy(), seed, end)
            if text is None:
                continue
            drawn += 1
            parser = OutputParser(traits.written_as(request), TOOLS)
            parser.begin("")
            output = read_output(read_events(parser, text))
            assert output.calls and not output.content.strip(), text
            for called, arguments in output.calls:
                values = json.loads(arguments)
                if called == "weather":
                    assert {"city", "days"} <= values.keys() <= PARAMETERS["properties"].keys()
                    assert isinstance(values["city"], str) and type(values["days"]) is int, text
                else:
                    assert (called, values, choice) == ("now", {}, "required")
        assert drawn


def test_names_that_a_format_cannot_write_are_called_generically():
    named = [{"name": "f", "parameters": {"properties": {"first name": {"type": "string"}}}}]
    for format_ in tool_formats():
        traits = ModelTraits(format_, native=True)
        assert traits.written_as(ask(tool_choice="required")) is format_
        request = ask(tools=named, tool_choice="required")
        assert constraint(traits, request).allowed().any()
        assert traits.written_as(ask(tools=named)) is format_
    for name in ("pythonic", "gemma4", "glm"):
        assert ModelTraits(BY_NAME[name]).written_as(request) is GENERIC
    assert ModelTraits(BY_NAME["hermes"]).written_as(request) is BY_NAME["hermes"]


def test_how_many_calls_there_may_be():
    def allows(text, **fields):
        return matches(constraint(ModelTraits(), ask(**fields)), text)

    assert allows(CALL, tool_choice="required")
    assert allows(f"{CALL}\n{CALL}", tool_choice="required")
    assert not allows(f"{CALL}\n{CALL}", tool_choice="required", parallel_tool_calls=False)
    assert not allows(f"{CALL}\n{CALL}", tool_choice={"name": "now"})
    assert not allows(CALL, tool_choice={"name": "weather"})
    assert not allows("", tool_choice="required") and not allows("hi", tool_choice="required")


def test_a_strict_tool_holds_from_what_a_call_begins_with():
    strict = '<tool_call>\n{"name": "weather", "arguments": {"city": "a", "days": 1}}\n</tool_call>'
    place = constraint(ModelTraits(), ask(tools=STRICT))
    for text in ("hi", "", f"hi {strict}", f"hi {strict} and {strict} bye", '{"name": "x"}'):
        assert matches(place.copy(), text)
    for text in (CALL, f"hi {CALL}", "hi <tool_call>", "<tool_call>hi", strict.replace("1", "x")):
        assert not matches(place.copy(), text)
    one = constraint(ModelTraits(), ask(tools=STRICT, parallel_tool_calls=False))
    assert matches(one.copy(), f"hi {strict}") and matches(one.copy(), "hi")
    assert not matches(one.copy(), f"{strict}{strict}")
    marked = '<|python_tag|>{"name": "x", "parameters": {}}'
    llama = constraint(ModelTraits(BY_NAME["llama3-json"], native=True), ask(tools=STRICT))
    assert not matches(llama.copy(), marked) and not matches(llama.copy(), ' {"name": "x"}')
    assert matches(llama.copy(), "hi {}") and not matches(llama.copy(), '{"name": "x"}')
    assert matches(llama.copy(), '{"name": "weather", "parameters": {"city": "a", "days": 1}}')


def test_content_of_a_form_or_calls():
    request = ask(params={"structured_output": {"choice": ["yes", "no"]}})
    place = constraint(ModelTraits(), request)
    assert matches(place.copy(), "yes") and matches(place.copy(), CALL)
    assert not matches(place.copy(), "maybe")
    own = {"structured_output": {"grammar": "start: A\nA: /[0-9]+/"}}
    place = constraint(ModelTraits(), ask(params=own))
    assert matches(place.copy(), "12") and matches(place.copy(), CALL)
    place = constraint(ModelTraits(), ask(params=own, tool_choice="required"))
    assert not matches(place.copy(), "12") and matches(place.copy(), CALL)


@pytest.mark.parametrize(
    ("tail", "allowed", "refused"),
    [
        ("<think>\n", ["hm</think>\n\nyes", "</think>yes"], ["yes", "hm</think>maybe"]),
        ("<think>\n\n</think>\n\n", ["yes"], ["hm</think>yes", "<think>hm</think>yes"]),
        (
            "assistant\n",
            ["yes", "<think>hm</think>\nyes", "\n<think>hm</think>yes"],
            ["hm</think>yes", "\nyes", " yes"],  # blanks before content would be content
        ),
    ],
)
def test_reasoning_is_free_and_what_comes_behind_it_is_not(tail, allowed, refused):
    for output in ({"choice": ["yes", "no"]}, {"regex": "yes|no"}, {"grammar": 'start: "yes"'}):
        request = ask(tools=None, params={"structured_output": output})
        place = constraint(ModelTraits(reasoning=THINK), request, tail)
        assert all(matches(place.copy(), text) for text in allowed)
        assert not any(matches(place.copy(), text) for text in refused)
    request = ask(tool_choice="required")
    place = constraint(ModelTraits(reasoning=THINK), request, tail)
    assert all(matches(place.copy(), text.replace("yes", CALL)) for text in allowed)
    assert not any(matches(place.copy(), text.replace("yes", CALL)) for text in refused)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "string"}, "tool 'f': its parameters must be of type object"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "tool 'f' cannot be .*not"),
    ],
)
def test_what_cannot_hold_is_refused_by_name(parameters, words):
    tools = [{"name": "f", "parameters": parameters, "strict": True}]
    with pytest.raises(ConfigurationError, match=words):
        constraint(ModelTraits(), ask(tools=tools))


def test_arguments_are_those_that_the_schema_names():
    def allows(arguments, parameters):
        text = CALL.replace("{}", arguments)
        tools = [{"name": "now", "parameters": parameters}]
        return matches(constraint(ModelTraits(), ask(tools=tools, tool_choice="required")), text)

    named = {"properties": {"a": {"type": "integer"}}}
    assert allows('{"a": 1}', named) and not allows('{"b": 1}', named)
    assert allows('{"b": 1}', {**named, "additionalProperties": True})
    assert allows('{"b": 1}', {"type": "object"}) and not allows("[]", {"type": "object"})
    assert allows("{}", None) and not allows('{"b": 1}', {})


def test_definitions_are_written_where_they_are_referred_to():
    """In formats that have a rule for each argument; a thousand copies would be hundreds of MB."""
    form = next(f for f in TOOL_FORMATS if isinstance(f.form, TaggedForm))
    large = {"$defs": {"d": {"enum": ["x" * 90 + str(i) for i in range(900)]}}}

    def rules(**property_):
        fields = {f"p{i}": property_ for i in range(300)}
        tools = callable_tools(
            [{"function": {"name": "f", "parameters": large | {"properties": fields}}}]
        )
        return "".join(call_rules(form, tools, several=False))

    assert len(rules(type="integer")) < 100_000
    with pytest.raises(ConfigurationError, match="characters as it is written out, or more"):
        rules(type="array", items={"$ref": "#/$defs/d"})
