"""What is refused of schemas, tools and grammars names the tool and the place, in plain words."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs the extra engineroom[structured]")

from hypothesis import given, settings, strategies as st

from engineroom import ConfigurationError, InferenceRequest
from engineroom.engine.constraints import GrammarCompiler
from engineroom.generation.json_schemas import endless, place_of
from engineroom.generation.tool_formats import TOOL_FORMATS
from engineroom.generation.traits import PLAIN, ModelTraits
from engineroom.prompts import ModelTokens

END = 256
PIECES = [bytes([byte]) for byte in range(256)] + [b"<end>"]
FORM = "params.structured_output"
XML = ModelTraits(next(f for f in TOOL_FORMATS if f.name == "glm"))


class Codec:
    """A fake model's: its tokens are bytes."""

    def __init__(self, traits: ModelTraits = PLAIN) -> None:
        self.traits = traits

    def model_tokens(self) -> ModelTokens:
        return ModelTokens(PIECES, frozenset({END}), [END], lambda text: list(text.encode()))


def compiled(traits: ModelTraits = PLAIN, **fields: Any) -> Any:
    request = InferenceRequest(model_id="m", messages=[{"role": "user", "content": "a"}], **fields)
    compiler = GrammarCompiler(Codec(traits))
    return compiler._match(request, None)


def refused(traits: ModelTraits = PLAIN, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        compiled(traits, **fields)
    error = caught.value
    assert error.message.startswith(f"{error.field}: ")
    assert "coerce_one_of" not in str(error) and "Enable" not in str(error)
    return error.message


def city(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"ok": {"type": "string"}, "city": schema}}


WRONG = [
    ({"not": {}}, '"not"'),
    ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, "oneOf is not supported where"),
    ({"type": "string", "format": "iri"}, "iri"),
    ({"type": "strin"}, "strin"),
    ({"$ref": "#/$defs/none"}, "/$defs/none"),
    ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": r"\bfoo\b"}, r"/\bfoo\b/"),
    ({"type": "string", "minLength": "a"}, "minLength"),
    ({"enum": 3}, "enum must be"),
    ({"$ref": "#/properties/city"}, "leads to nothing but itself"),
]


@pytest.mark.parametrize(("schema", "said"), WRONG)
@pytest.mark.parametrize("traits", [PLAIN, XML])
def test_a_refusal_names_the_tool_and_the_place(schema, said, traits):
    if traits is XML and "#/properties" in str(schema):
        return  # each property has a grammar of its own there
    tools = [
        {"name": "now", "parameters": city({"type": "integer"})},
        {"name": "weather", "parameters": city(schema), "strict": True},
    ]
    for choice in ("auto", "required", {"name": "weather"}):
        message = refused(traits, tools=tools, tool_choice=choice)
        assert message.startswith("tools.1.function.parameters.properties.city: tool 'weather'")
        assert said in message


@pytest.mark.parametrize(("schema", "said"), WRONG)
def test_a_refusal_names_the_place_in_a_schema(schema, said):
    message = refused(params={"structured_output": {"json_schema": city(schema)}})
    assert message.startswith(f"{FORM}.json_schema.properties.city: ") and said in message


@pytest.mark.parametrize("kind", ["regex", "grammar"])
@pytest.mark.parametrize("wrong", ["(", 'root ::= "a" none', "(?=a)"])
def test_a_refusal_names_the_kind(kind, wrong):
    if kind == "regex" and "::=" in wrong:
        wrong = "a{3,2}"
    assert refused(params={"structured_output": {kind: wrong}}).startswith(f"{FORM}.{kind}: ")


@pytest.mark.parametrize("traits", [PLAIN, XML])
def test_what_is_too_deep_is_told_where_and_by_how_much(traits):
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(50):
        schema = {"type": "object", "properties": {"a": schema, "b": {"type": "string"}}}
    advice = "64 levels of objects and lists, and is deeper at properties"
    message = refused(params={"structured_output": {"json_schema": city(schema)}})
    assert message.startswith(f"{FORM}.json_schema: ") and len(message) < 500
    assert f"{advice}.city.properties.a.properties.a" in message
    assert "it has 103; move what is deep into $defs, and refer to it by $ref" in message
    tools = [{"name": "f", "parameters": city(schema)}]
    message = refused(traits, tools=tools, tool_choice="required")
    assert message.startswith("tools.0.function.parameters") and "tool 'f'" in message
    assert advice in message and "refer to it by $ref" in message


def test_a_schema_in_a_grammar_is_looked_at_as_well():
    grammar = 'start: %json {"properties": {"a": {"$ref": "#/properties/a"}}}'
    message = refused(params={"structured_output": {"grammar": grammar}})
    assert message.startswith(f"{FORM}.grammar.properties.a: ") and "itself" in message


def test_what_may_be_at_several_places_is_placed_in_what_they_share():
    one = {"oneOf": [{"type": "string"}, {"minLength": 1}]}
    schema = {"properties": {"a": {"properties": {"b": one, "c": one}}}}
    assert place_of(schema, "oneOf constraints") == "properties.a.properties"
    assert place_of(schema, 'Unimplemented keys: ["none"]') == ""


# ── what leads to nothing but itself ─────────────────────────────────────────────────────────

ITSELF = {"$ref": "#/properties/a"}
PAIR = {"b": {"$ref": "#/$defs/c"}, "c": {"allOf": [{"$ref": "#/$defs/b"}]}}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"$ref": "#"}, ()),
        ({"properties": {"a": ITSELF}}, ("properties", "a")),
        ({"properties": {"a": {"allOf": [ITSELF]}}}, ("properties", "a")),
        ({"properties": {"a": {"anyOf": [ITSELF, ITSELF]}}}, ("properties", "a")),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": PAIR}, ("properties", "a")),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, ()),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, ()),
        ({"properties": {"a": {"anyOf": [ITSELF, {"type": "null"}]}}}, None),
        ({"properties": {"a": {"$ref": "#"}}, "additionalProperties": False}, None),
        ({"type": "array", "items": {"$ref": "#"}}, None),
        ({"type": "string", "$defs": PAIR}, None),
        ({"$ref": "#/$defs/b", "$defs": {"b": True}}, None),
        ({"$ref": "other.json"}, None),
        ({"properties": {"a": {"$id": "x", "$ref": "#"}}}, None),
        ({"properties": 3, "allOf": 3, "required": 3, "$ref": 3, "items": [3]}, None),
    ],
)
def test_what_leads_to_nothing_but_itself(schema, place):
    assert endless(schema) == place


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.sampled_from([{"type": "null"}, {"$ref": "#"}, {"$ref": "#/anyOf/0"}, True, 3]),
        lambda inner: st.one_of(
            st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)}),
            st.fixed_dictionaries({"allOf": st.lists(inner, max_size=3)}),
            st.fixed_dictionaries({"properties": st.dictionaries(st.just("a"), inner)}),
        ),
        max_leaves=8,
    )
)
def test_any_schema_is_read_to_its_end(schema):
    place = endless(schema)
    node = schema
    for step in place or ():
        node = node[int(step)] if isinstance(node, list) else node[step]


# ── formats ──────────────────────────────────────────────────────────────────────────────────


def test_formats_that_json_schema_does_not_know_are_annotations():
    schema = city({"type": "string", "format": "phone"}) | {"required": ["city"]}
    named = {"properties": {"format": {"enum": ["phone"]}}, "const": {"format": "phone"}}
    for traits in (PLAIN, XML):
        tools = [{"name": "f", "parameters": schema, "strict": True}]
        assert compiled(traits, tools=tools, tool_choice="required")
    for form in (schema, named):
        assert compiled(params={"structured_output": {"json_schema": form}})
    assert named["properties"]["format"] and schema["properties"]["city"]["format"]


def test_formats_that_no_grammar_has_are_left_out_of_tools_with_a_warning():
    schema = city({"type": "array", "items": {"type": "string", "format": "iri"}})
    request = InferenceRequest(
        model_id="m",
        messages=[{"role": "user", "content": "a"}],
        tools=[{"name": "f", "parameters": schema}],
        tool_choice="required",
    )
    assert GrammarCompiler(Codec())._match(request, None)
    (warning,) = PLAIN.warnings(request)
    assert warning.startswith("tools.0.function.parameters.properties.city.items: the format 'iri'")


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"properties": {f"p{number}": {"format": "iri"} for number in range(4000)}}, 17),
        ({"allOf": [{}] * 12_000 + [{"format": "iri"}]}, 1),
    ],
    ids=["many", "far behind"],
)
def test_formats_of_tools_are_looked_for_as_far_as_the_event_loop_can_wait(schema, told):
    request = InferenceRequest(
        model_id="m",
        messages=[{"role": "user", "content": "a"}],
        tools=[{"name": "f", "parameters": {"type": "object", **schema}}],
        tool_choice="required",
    )
    *formats, further = PLAIN.warnings(request)
    assert all("the format 'iri' of tool 'f' is not kept to" in warning for warning in formats)
    assert further == (
        "tools.0.function.parameters: further formats may not be kept to, here and in later tools"
    )
    assert len(formats) + 1 == told


def test_what_only_a_chat_template_can_be_told_is_warned_of_where_there_is_a_prompt() -> None:
    fields = {"reasoning": "high", "reasoning_budget": 3, "template_args": {"a": 1}}
    request = InferenceRequest(model_id="m", prompt="a", **fields)
    warnings = list(PLAIN.warnings(request))
    assert [warning.partition(" ")[0] for warning in warnings] == list(fields)
    assert all("send messages instead" in warning for warning in warnings)
