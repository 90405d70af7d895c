"""What a text must match, by the names that each API has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engineroom.generation.grammars import FORM
from engineroom.schemas import MAX_GRAMMAR_CHARS, StructuredOutput
from engineroom.server.apis.request_fields import Sampling, SubSchema
from engineroom.server.apis.tool_fields import Effort
from engineroom.server.http.call import Call
from engineroom.server.http.errors import ApiError, invalid_fields

__all__ = [
    "AnthropicFormat",
    "AnthropicOutputConfig",
    "OllamaFormat",
    "ResponseFormat",
    "StructuredSampling",
    "TextConfig",
    "of_ollama",
    "structured_output",
]

_Schema = dict[str, Any] | bool


def _from_text(value: Any) -> Any:
    """A schema may come as a text, as vLLM takes it."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"has more than {MAX_GRAMMAR_CHARS} characters")
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError("is a text that is no JSON; send the schema itself") from error


_SchemaOrText = Annotated[_Schema, BeforeValidator(_from_text)]
OllamaFormat = _SchemaOrText | Literal["json", ""]
"""A schema, any object, or none of either."""


class NamedSchema(SubSchema):
    """A JSON schema with a name. It is always kept to, whatever ``strict`` says."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[_Schema, Field(alias="schema")] = Field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(SubSchema):
    """Text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[_Schema | None, Field(alias="schema")] = None
    """The same without a name, with either type, as llama-server takes it."""

    @property
    def schema_in(self) -> str | None:
        """Where its schema is, if not in ``json_schema``."""
        return None if self.schema_ is None else "response_format.schema"

    def asked(self, where: str) -> dict[str, Any]:
        """Fields of ``StructuredOutput``."""
        if self.json_schema is not None and self.type == "json_schema":
            return {"json_schema": self.json_schema.schema_}
        return _format(self.type, self.schema_, where)


class TextFormat(SubSchema):
    """The same, as the newer API writes it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[_Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    def asked(self, where: str) -> dict[str, Any]:
        """Fields of ``StructuredOutput``."""
        return _format(self.type, self.schema_, where)


class TextConfig(SubSchema):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None
    """Without effect: the answer is as long as the model makes it."""


class AnthropicFormat(SubSchema):
    """JSON by a schema."""

    type: Literal["json_schema"]
    schema_: Annotated[_Schema, Field(alias="schema")]


class AnthropicOutputConfig(SubSchema):
    """How the answer is to be."""

    format: AnthropicFormat | None = None
    effort: Effort | None = None
    """How hard to think."""


_FORMS: Final = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputs(SubSchema):
    """As vLLM has it: one of these, and nothing else: it would be a promise that is not kept."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """What is switched off may be anything else, too."""
        if not isinstance(value, Mapping):
            return value
        for key, switch in value.items():
            if key not in _FORMS and switch is not None and switch is not False:
                raise ValueError(f"cannot have {key[:64]!r} here; give one of {', '.join(_FORMS)}")
        return {key: value[key] for key in _FORMS if key in value}

    json_: Annotated[_SchemaOrText | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredSampling(Sampling):
    """Extensions by which vLLM's clients, and llama-server's, ask for a form."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: _SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    """In Lark, or in GBNF."""
    json_schema: _SchemaOrText | None = None
    """As llama-server has it."""
    format: OllamaFormat | None = None
    """As Ollama has it: a schema, or ``json``."""

    def extensions(self) -> dict[str, dict[str, Any]]:
        """What they ask for, by the field's name. :raises ApiError: 400: it cannot be had."""
        asked: dict[str, dict[str, Any]] = {
            "guided_json": {"json_schema": self.guided_json},
            "guided_regex": {"regex": self.guided_regex},
            "guided_choice": {"choice": self.guided_choice},
            "guided_grammar": {"grammar": self.guided_grammar},
            "grammar": {"grammar": self.grammar or None},
            "json_schema": {"json_schema": self.json_schema},
            "format": of_ollama(self.format),
        }
        if (of_vllm := self.structured_outputs) is not None:
            asked["structured_outputs"] = {
                "json_schema": of_vllm.json_,
                "regex": of_vllm.regex,
                "choice": of_vllm.choice,
                "grammar": of_vllm.grammar,
                "json_object": of_vllm.json_object or None,
            }
            values = asked["structured_outputs"].values()
            if sum(value is not None for value in values) > 1:
                raise ApiError(
                    400,
                    f"structured_outputs: give exactly one of {', '.join(_FORMS)}",
                    "invalid_value",
                    "structured_outputs",
                )
        return asked


_SCHEMAS_IN: Final[Mapping[str, str]] = {
    "response_format": "response_format.json_schema.schema",
    "text.format": "text.format.schema",
    "output_config": "output_config.format.schema",
    "output_format": "output_format.schema",
    "structured_outputs": "structured_outputs.json",
}


def structured_output(
    call: Call, asked: Mapping[str, Mapping[str, Any]], schema_in: str | None = None
) -> StructuredOutput | None:
    """What the request asks for.

    :param call: whose errors will name the field.
    :param asked: fields of the body → fields of ``StructuredOutput``, those that are none left out
        or ``None``.
    :param schema_in: where ``response_format`` has its schema, if not where OpenAI has it.
    :raises ApiError: 400: two fields ask for something, or one is not as it should be.
    """
    given = {
        name: fields
        for name, values in asked.items()
        if (fields := {kind: value for kind, value in values.items() if value is not None})
    }
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(given)
        raise ApiError(400, f"give one of {names}", "invalid_value", next(iter(given)))
    ((name, fields),) = given.items()
    inner = name == "structured_outputs"
    places = {kind: f"{name}.{kind}" if inner else name for kind in fields}
    if "json_schema" in fields:
        own = schema_in if name == "response_format" else None
        places["json_schema"] = own or _SCHEMAS_IN.get(name, name)
    call.places |= {f"{FORM}.{kind}": place for kind, place in places.items()}
    try:
        return StructuredOutput(**fields)
    except ValidationError as error:
        raise invalid_fields(error, places) from error


def of_ollama(form: Any) -> dict[str, Any]:
    """Fields of ``StructuredOutput``, as Ollama asks for them."""
    if form == "json":
        return {"json_object": True}
    return {"json_schema": None if form == "" else form}


def _format(kind: str, schema: Any, where: str) -> dict[str, Any]:
    if kind == "text":
        return {}
    if kind == "json_object" and schema is None:
        return {"json_object": True}
    if schema is None:
        raise ApiError(400, f"{where}: json_schema has no schema", "invalid_value", where)
    return {"json_schema": schema}
