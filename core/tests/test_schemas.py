"""What the schemas take, what they refuse, and what they mean by default."""

from __future__ import annotations

import copy
import json
import math
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import BaseModel, ValidationError

from engineroom.config.model import LoadedModel, ModelConfig, ModelVariant
from engineroom.errors import (
    EngineDeadError,
    EngineRoomError,
    InferenceError,
    __all__ as error_names,
    error_class,
)
from engineroom.other_requests import EmbeddingRequest
from engineroom.schemas import (
    FINISH_REASONS,
    MAX_STOP_CHARS,
    ChatMessage,
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    NamedTool,
    StructuredOutput,
    TokenLogprob,
)
from engineroom.tools import ToolCall

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PARAM_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 256,
    "min_tokens": None,
    "ignore_eos": None,
    "temperature": 0.7,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": None,
    "do_sample": True,
    "num_beams": 1,
    "early_stopping": False,
    "min_p": None,
    "seed": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "logit_bias": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "structured_output": None,
}

NUMBERS: dict[str, tuple[list[float], list[float]]] = {  # allowed, refused
    "max_new_tokens": ([0, 1, 10**6], [-1, 1.5]),
    "temperature": ([0, 0.0, 2.0], [-0.01, 2.01]),
    "top_p": ([0.0, 1.0], [-0.01, 1.01]),
    "top_k": ([0, 1, 10**6], [-1, 0.5]),
    "repetition_penalty": ([1.0, 100.0], [0.99, 0]),
    "num_beams": ([1, 64], [0, -1, 1.5]),
    "min_p": ([0.0, 1.0], [-0.01, 1.01]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "presence_penalty": ([-2.0, 2.0], [-2.01, 2.01]),
    "frequency_penalty": ([-2.0, 2.0], [-2.01, 2.01]),
    "logprobs": ([0, 20], [-1, 21]),
    "prompt_logprobs": ([0, 20], [-1, 21]),
}


def refused(schema: type[BaseModel], **values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        schema(**values)
    return str(caught.value)


def request(**values: Any) -> InferenceRequest:
    return InferenceRequest(**{"model_id": "m", "prompt": "Hello", **values})


# ── every schema ─────────────────────────────────────────────────────────────────────────────

MINIMAL: dict[type[BaseModel], dict[str, Any]] = {
    GenerationParams: {},
    StructuredOutput: {"regex": "a+"},
    ChatMessage: {"role": "user", "content": "Hello"},
    InferenceRequest: {"model_id": "m", "prompt": "Hello"},
    InferenceResponse: {"request_id": "r", "model_id": "m"},
    TokenLogprob: {"token_id": 1, "token": "a", "logprob": -0.5},
    ModelVariant: {"source": "model.gguf"},
    ModelConfig: {"model_id": "m", "source": "model.gguf"},
    LoadedModel: {
        "model_id": "m",
        "model_object": None,
        "config": ModelConfig(model_id="m", source="model.gguf"),
    },
}
every_schema = pytest.mark.parametrize("schema", MINIMAL)


@every_schema
def test_an_unknown_field_is_refused(schema: type[BaseModel]) -> None:
    schema(**MINIMAL[schema])
    assert "unknown\n  Extra inputs" in refused(schema, **MINIMAL[schema], unknown=1)


@every_schema
def test_a_required_field_is_required(schema: type[BaseModel]) -> None:
    required = {name for name, field in schema.model_fields.items() if field.is_required()}
    for name in required:
        others = {key: value for key, value in MINIMAL[schema].items() if key != name}
        assert "Field required" in refused(schema, **others)
    assert required <= set(MINIMAL[schema])


@pytest.mark.parametrize(
    "schema", [s for s in MINIMAL if s not in (InferenceResponse, LoadedModel)]
)
def test_what_goes_in_is_frozen(schema: type[BaseModel]) -> None:
    instance = schema(**MINIMAL[schema])
    name = next(iter(schema.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(instance, name, getattr(instance, name))


@pytest.mark.parametrize("schema", [s for s in MINIMAL if s is not LoadedModel])
def test_a_schema_survives_json(schema: type[BaseModel]) -> None:
    instance = schema(**MINIMAL[schema])
    assert schema.model_validate_json(instance.model_dump_json()) == instance


@pytest.mark.parametrize("schema", [InferenceRequest, EmbeddingRequest])
def test_none_is_the_default_of_a_request(schema: type[InferenceRequest]) -> None:
    whole = {"model_id": "m", "request_id": "r"}
    whole |= {"texts": ["a"]} if schema is EmbeddingRequest else {"prompt": "a"}
    optional = {n: None for n, f in schema.model_fields.items() if not f.is_required()}
    assert schema(**{**optional, **whole}) == schema(**whole)
    assert schema(**{**whole, "request_id": None}).request_id


# ── GenerationParams ─────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_those_of_the_contract() -> None:
    assert GenerationParams().model_dump() == PARAM_DEFAULTS


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (good, _) in NUMBERS.items() for value in good]
)
def test_a_value_at_the_edge_of_its_range_is_taken(name: str, value: float) -> None:
    assert getattr(GenerationParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, bad) in NUMBERS.items() for value in bad]
)
def test_a_value_outside_of_its_range_is_refused_by_name(name: str, value: float) -> None:
    assert f"\n{name}\n" in refused(GenerationParams, **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, False, math.nan, math.inf, -math.inf, "many"], ids=repr)
def test_what_is_no_finite_number_is_refused(name: str, value: object) -> None:
    assert f"\n{name}\n" in refused(GenerationParams, **{name: value})


@pytest.mark.parametrize("name", PARAM_DEFAULTS)
def test_every_parameter_may_be_none(name: str) -> None:
    assert getattr(GenerationParams(**{name: None}), name) is None


@untimed
@given(
    bias=st.dictionaries(
        st.integers(min_value=0, max_value=2**40), st.floats(min_value=-100, max_value=100)
    )
)
def test_a_bias_for_any_token_is_taken(bias: dict[int, float]) -> None:
    params = GenerationParams(logit_bias=bias)
    assert params.logit_bias == bias
    assert GenerationParams.model_validate_json(params.model_dump_json()) == params


WRONG_BIASES: list[Any] = [
    {-1: 1.0}, {0: 100.1}, {0: -100.1}, {0: math.nan}, {0: math.inf}, {True: 1.0}, {0: True},
    {"a": 1.0}, {"": 1.0}, {"-1": 1.0}, {" 1": 1.0}, {"\u0661": 1.0}, {"1" * 19: 1.0}, {1.5: 1.0},
    {0: "1"}, {0: None}, {0: [1]},
]  # fmt: skip


@pytest.mark.parametrize("bias", [*WRONG_BIASES, [1]], ids=repr)
def test_a_bias_out_of_range_is_refused(bias: object) -> None:
    assert "\nlogit_bias" in refused(GenerationParams, logit_bias=bias)


@pytest.mark.parametrize("bias", WRONG_BIASES, ids=repr)
@pytest.mark.parametrize("before", [0, 3000])
def test_the_first_mistake_of_a_bias_is_told_alone(bias: dict[Any, Any], before: int) -> None:
    right = {f"{token + 10}": 1.5 for token in range(before)}
    with pytest.raises(ValidationError) as caught:
        GenerationParams(logit_bias={**right, **bias, "x": "y", "z": None})
    (error, *more) = caught.value.errors()
    (key,) = bias
    assert error["loc"][0] == "logit_bias" and not more
    assert error["loc"][1] in (key, str(key))


def test_a_bias_for_a_whole_vocabulary_is_taken() -> None:
    whole = {str(token): -(token % 100) for token in range(200_000)}
    params = GenerationParams(logit_bias=whole)
    assert params.logit_bias == {token: -float(token % 100) for token in range(200_000)}
    odd = whole | {"7": OddFloat(2.5)}
    assert GenerationParams(logit_bias=odd).logit_bias == {**(params.logit_bias or {}), 7: 2.5}
    many = dict.fromkeys(range(300_000), 1)
    assert "may have 262144 tokens, not 300000" in refused(GenerationParams, logit_bias=many)


class OddFloat(float):
    """Of a class of its own, as numpy's are."""


@pytest.mark.parametrize(
    ("values", "greedy"),
    [
        ({}, False),
        ({"do_sample": None}, False),
        ({"temperature": None}, False),
        ({"top_k": 0}, False),
        ({"do_sample": False}, True),
        ({"temperature": 0}, True),
        ({"temperature": -0.0}, True),
        ({"top_k": 1}, True),
    ],
)
def test_greedy_is_what_always_takes_the_likeliest(values: dict[str, Any], greedy: bool) -> None:
    assert GenerationParams(**values).greedy is greedy


# max_new_tokens and temperature have no neutral value that asks for nothing: None is no limit
# and a temperature of 1, both of which a runtime must know how to do.
NEUTRAL: dict[str, list[Any]] = {
    "max_new_tokens": [256],
    "min_tokens": [None, 0],
    "ignore_eos": [None, False],
    "temperature": [0.7],
    "top_p": [None, 1.0, 1],
    "top_k": [None, 0],
    "repetition_penalty": [None, 1.0],
    "do_sample": [None, True],
    "num_beams": [None, 1],
    "early_stopping": [None, False],
    "min_p": [None, 0.0],
    "seed": [None],
    "presence_penalty": [None, 0.0, -0.0],
    "frequency_penalty": [None, 0.0],
    "logit_bias": [None, {}],
    "logprobs": [None],
    "prompt_logprobs": [None],
    "structured_output": [None],
}
ASKING: dict[str, list[Any]] = {
    "max_new_tokens": [None, 0, 1],
    "min_tokens": [1],
    "ignore_eos": [True],
    "temperature": [None, 0.0, 1.0],
    "top_p": [0.0, 0.99],
    "top_k": [1],
    "repetition_penalty": [1.1],
    "do_sample": [False],
    "num_beams": [2],
    "early_stopping": [True],
    "min_p": [0.1],
    "seed": [0, 1],
    "presence_penalty": [-1.0, 1.0],
    "frequency_penalty": [0.1],
    "logit_bias": [{0: 0.0}],
    "logprobs": [0, 5],
    "prompt_logprobs": [0, 5],
    "structured_output": [StructuredOutput(regex="a")],
}


def test_a_beam_search_tells_no_log_probabilities_of_the_prompt() -> None:
    with pytest.raises(ValidationError, match="prompt_logprobs cannot be told with num_beams"):
        GenerationParams(prompt_logprobs=0, num_beams=2)
    assert GenerationParams(prompt_logprobs=0, num_beams=1).prompt_logprobs == 0


def test_the_tables_of_this_file_know_every_parameter() -> None:
    assert set(NEUTRAL) == set(ASKING) == set(GenerationParams.model_fields)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in NEUTRAL.items() for v in vs])
def test_a_neutral_value_asks_for_nothing(name: str, value: object) -> None:
    assert GenerationParams(**{name: value}).requested() == frozenset()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in ASKING.items() for v in vs])
def test_any_other_value_asks_for_its_parameter(name: str, value: object) -> None:
    assert GenerationParams(**{name: value}).requested() == {name}


def test_everything_that_is_asked_for_is_named() -> None:
    asking = {name: values[-1] for name, values in ASKING.items()}
    params = GenerationParams.model_construct(**asking)  # beams and the prompt exclude each other
    assert params.requested() == set(ASKING)


# ── StructuredOutput, ChatMessage ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, "got none of them"),
        ({"regex": "a", "grammar": "b"}, "got regex and grammar"),
        ({"json_schema": {}, "regex": "a", "grammar": "b"}, "got json_schema and regex and"),
    ],
)
def test_structured_output_is_exactly_one_thing(values: dict[str, Any], found: str) -> None:
    assert found in refused(StructuredOutput, **values)


@pytest.mark.parametrize("values", [{"regex": ""}, {"grammar": ""}, {"json_schema": "{}"}])
def test_structured_output_that_is_none_is_refused(values: dict[str, Any]) -> None:
    refused(StructuredOutput, **values)


def test_an_empty_json_schema_is_one() -> None:
    assert StructuredOutput(json_schema={}).json_schema == {}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_every_role_is_taken(role: Any) -> None:
    assert ChatMessage(role=role, content="").content == ""


def test_an_unknown_role_is_refused() -> None:
    assert "\nrole\n" in refused(ChatMessage, role="robot", content="Hello")


@pytest.mark.parametrize("calls", [None, []])
def test_a_message_without_content_is_refused(calls: object) -> None:
    assert "the assistant message has no content" in refused(
        ChatMessage, role="assistant", tool_calls=calls
    )


def test_a_tool_call_is_content() -> None:
    assert ChatMessage(role="assistant", tool_calls=[{"id": "1"}]).content is None


@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_of_calls_may_be_long_but_not_have_too_many_values(as_text: bool) -> None:
    """Templates take them apart and write them: nobody else runs meanwhile."""

    def message(*arguments: Any) -> ChatMessage:
        functions = [
            {"name": "f", "arguments": json.dumps(value) if as_text else value}
            for value in arguments
        ]
        return ChatMessage(role="assistant", tool_calls=[{"function": f} for f in functions])

    for many in ([0] * 140_000, [[]] * 24_000, ["a"] * 20_000):
        with pytest.raises(ValidationError, match=r"tool_calls[\s\S]* is too much: it has"):
            message({"a": many})
    with pytest.raises(ValidationError, match=r"tool_calls[\s\S]* is too much: it has"):
        message({"a": [0] * 70_000}, {"a": [0] * 70_000})
    assert message({"a": "[{}, 1]" * 400_000}, {"a": [0] * 120_000}).tool_calls


# ── InferenceRequest ─────────────────────────────────────────────────────────────────────────


def test_the_defaults_of_a_request() -> None:
    made = request()
    uuid.UUID(made.request_id, version=4)
    assert made.model_dump(exclude={"request_id", "params"}) == {
        "model_id": "m",
        "prompt": "Hello",
        "prompt_token_ids": None,
        "messages": None,
        "stream": False,
        "stop_sequences": None,
        "timeout_s": None,
        "priority": 0,
        "tools": None,
        "tool_choice": None,
        "parallel_tool_calls": None,
        "template_args": None,
        "continue_final_message": None,
        "reasoning": None,
        "reasoning_budget": None,
        "adapter": None,
        "cache_salt": None,
        "metadata": {},
        "on_unsupported": None,
    }
    assert made.params == GenerationParams()


def test_each_request_has_an_id_and_metadata_of_its_own() -> None:
    first, second = request(), request()
    assert first.request_id != second.request_id
    assert first.metadata is not second.metadata


def test_a_request_has_a_prompt_or_messages() -> None:
    message = ChatMessage(role="user", content="Hello")
    assert InferenceRequest(model_id="m", messages=[message]).prompt is None
    assert "none of them was given" in refused(InferenceRequest, model_id="m")
    assert "prompt and messages were given" in refused(
        InferenceRequest, model_id="m", prompt="", messages=[message]
    )
    assert "prompt and prompt_token_ids were given" in refused(
        InferenceRequest, model_id="m", prompt="", prompt_token_ids=[1]
    )
    assert "\nmessages\n" in refused(InferenceRequest, model_id="m", messages=[])


@pytest.mark.parametrize("ids", [[], [-1], [True], ["1"], [1.0], [2**31], [None], "1", 1], ids=repr)
def test_token_ids_are_whole_numbers_from_nought(ids: Any) -> None:
    assert "\nprompt_token_ids" in refused(InferenceRequest, model_id="m", prompt_token_ids=ids)


def test_token_ids_are_a_prompt() -> None:
    made = InferenceRequest(model_id="m", prompt_token_ids=[0, 2**31 - 1])
    assert (made.prompt_token_ids, made.prompt, made.messages) == ([0, 2**31 - 1], None, None)


def test_an_empty_prompt_is_a_prompt() -> None:
    assert request(prompt="").prompt == ""


@pytest.mark.parametrize(
    "values",
    [
        {"model_id": "m", "prompt": "a\ud800"},
        {"model_id": "m", "messages": [{"role": "user", "content": "\udfff"}]},
        {"model_id": "m", "prompt": "a", "stop_sequences": ["\ud800"]},
        {"model_id": "\ud800", "prompt": "a"},
    ],
    ids=["prompt", "content", "stop", "id"],
)
def test_text_that_no_runtime_can_encode_is_refused(values: dict[str, Any]) -> None:
    refused(InferenceRequest, **values)


@pytest.mark.parametrize("name", ["model_id", "request_id"])
@pytest.mark.parametrize("char", ["\n", "\r", "\0", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
def test_an_id_with_a_control_character_is_refused(name: str, char: str) -> None:
    assert "control characters" in refused(
        InferenceRequest, **{"model_id": "m", "prompt": "a", name: f"a{char}b"}
    )


@pytest.mark.parametrize("name", ["model_id", "request_id"])
def test_an_id_has_a_length(name: str) -> None:
    assert getattr(request(**{name: "é" * 256}), name) == "é" * 256
    refused(InferenceRequest, **{"model_id": "m", "prompt": "a", name: "a" * 257})
    refused(InferenceRequest, **{"model_id": "m", "prompt": "a", name: ""})


def test_an_empty_stop_sequence_is_refused_with_its_place() -> None:
    assert "stop_sequences.1" in refused(
        InferenceRequest, model_id="m", prompt="a", stop_sequences=["a", ""]
    )


def test_a_stop_sequence_alone_is_no_list() -> None:
    assert "\nstop_sequences\n" in refused(
        InferenceRequest, model_id="m", prompt="a", stop_sequences="abc"
    )


def test_no_stop_sequences_are_none() -> None:
    assert request(stop_sequences=[]).stop_sequences == []


def test_stop_sequences_have_a_length_together() -> None:
    half = "a" * (MAX_STOP_CHARS // 2)
    assert request(stop_sequences=[half, half]).stop_sequences == [half, half]
    assert str(MAX_STOP_CHARS) in refused(
        InferenceRequest, model_id="m", prompt="a", stop_sequences=[half, half, "a"]
    )


@pytest.mark.parametrize("value", [0.001, 1, 1e9])
def test_a_timeout_is_a_time(value: float) -> None:
    assert request(timeout_s=value).timeout_s == value


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "soon"], ids=repr)
def test_a_timeout_that_is_no_time_is_refused(value: object) -> None:
    assert "\ntimeout_s\n" in refused(InferenceRequest, model_id="m", prompt="a", timeout_s=value)


@pytest.mark.parametrize("value", [-100, 0, 100])
def test_a_priority_in_its_range_is_taken(value: int) -> None:
    assert request(priority=value).priority == value


@pytest.mark.parametrize("value", [-101, 101, True, 0.5], ids=repr)
def test_a_priority_outside_of_its_range_is_refused(value: object) -> None:
    assert "\npriority\n" in refused(InferenceRequest, model_id="m", prompt="a", priority=value)


@pytest.mark.parametrize("value", ["error", "warn", None])
def test_what_to_do_about_the_unsupported_may_be_said(value: Any) -> None:
    assert request(on_unsupported=value).on_unsupported == value


def test_anything_else_about_the_unsupported_is_refused() -> None:
    refused(InferenceRequest, model_id="m", prompt="a", on_unsupported="ignore")


def test_params_are_taken_as_a_mapping_and_checked() -> None:
    assert request(params={"top_k": 3}).params == GenerationParams(top_k=3)
    assert "params.top_k" in refused(
        InferenceRequest, model_id="m", prompt="a", params={"top_k": -1}
    )


# ── InferenceResponse ────────────────────────────────────────────────────────────────────────


def test_the_defaults_of_a_response() -> None:
    response = InferenceResponse(request_id="r", model_id="m")
    values = response.model_dump(exclude={"request_id", "model_id"})
    assert values.pop("warnings") == []
    assert values.pop("cut_call") is False
    assert set(values) == {
        "generated_text",
        "error_message",
        "finish_reason",
        "prompt_tokens",
        "generated_tokens",
        "reasoning_tokens",
        "inference_time_ms",
        "queue_time_ms",
        "error_type",
        "time_to_first_token_ms",
        "cached_prompt_tokens",
        "logprobs",
        "prompt_logprobs",
        "handler",
        "stop_sequence",
        "reasoning",
        "tool_calls",
    }
    assert set(values.values()) == {None}


def test_finish_reasons_are_those_of_the_contract() -> None:
    assert {
        "eos_token",
        "length",
        "stop_sequence",
        "tool_calls",
        "cancelled",
        "timeout",
        "error",
    } == FINISH_REASONS
    for reason in FINISH_REASONS:
        InferenceResponse.model_validate(
            {"request_id": "r", "model_id": "m", "finish_reason": reason}
        )
    refused(InferenceResponse, request_id="r", model_id="m", finish_reason="stop")


def test_a_response_without_an_error_raises_nothing() -> None:
    InferenceResponse(request_id="r", model_id="m", generated_text="").raise_for_error()


@pytest.mark.parametrize("name", [name for name in error_names if name != "error_class"])
def test_an_error_comes_back_as_what_it_was(name: str) -> None:
    cls = error_class(name)
    original = cls("it broke")
    response = InferenceResponse(request_id="r", model_id="m")
    response.record_error(original)
    assert response.error_type == name
    assert response.error_message == f"{cls.label}: it broke"
    with pytest.raises(EngineRoomError) as caught:
        response.raise_for_error()
    assert type(caught.value) is cls
    assert caught.value.__cause__ is original
    assert (caught.value.request_id, caught.value.model_id) == ("r", "m")
    assert str(caught.value) == response.error_message
    assert caught.value.describe() == f"{cls.label}: it broke (model 'm', request 'r')"


def test_an_error_class_of_a_plugin_comes_back_as_the_nearest_known_one() -> None:
    class OverheatedError(EngineDeadError):
        pass

    response = InferenceResponse(request_id="r", model_id="m")
    response.record_error(OverheatedError("too hot"))
    assert response.error_type == "EngineDeadError"
    with pytest.raises(EngineDeadError, match="too hot"):
        response.raise_for_error()


def test_an_error_that_came_as_json_is_raised_too() -> None:
    response = InferenceResponse(request_id="r", model_id="m")
    response.record_error(EngineDeadError("it broke"))
    received = InferenceResponse.model_validate_json(response.model_dump_json())
    with pytest.raises(EngineDeadError, match="it broke") as caught:
        received.raise_for_error()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("kind", [None, "KeyError"])
def test_an_error_of_an_unknown_type_is_an_inference_error(kind: str | None) -> None:
    response = InferenceResponse(
        request_id="r", model_id="m", error_message="it broke", error_type=kind
    )
    with pytest.raises(InferenceError) as caught:
        response.raise_for_error()
    assert type(caught.value) is InferenceError


# ── models ───────────────────────────────────────────────────────────────────────────────────


def test_the_defaults_of_a_model() -> None:
    assert ModelConfig(model_id="m", source="s").model_dump() == {
        "model_id": "m",
        "source": "s",
        "runtime": None,
        "options": {},
        "aliases": [],
        "variants": [],
        "memory": None,
        "preload": True,
        "pinned": False,
        "priority": 0,
        "keep_alive": None,
        "load_timeout_s": None,
        "fallback": None,
        "prefix_cache_scope": None,
    }


@pytest.mark.parametrize("values", [{}, {"source": None}, {"runtime": "r"}, {"variants": []}])
def test_a_model_needs_a_source(values: dict[str, Any]) -> None:
    assert "give a source" in refused(ModelConfig, model_id="m", **values)


@pytest.mark.parametrize(
    "values", [{"source": "s"}, {"runtime": "r"}, {"options": {"a": 1}}], ids=repr
)
def test_variants_stand_instead_of_a_source(values: dict[str, Any]) -> None:
    assert "both were given" in refused(
        ModelConfig, model_id="m", variants=[{"source": "v"}], **values
    )


@pytest.mark.parametrize(
    "values",
    [
        {"source": ""},
        {"source": "s", "aliases": [""]},
        {"source": "s", "aliases": ["a\nb"]},
        {"source": "s", "runtime": ""},
        {"variants": [{"source": ""}]},
        {"variants": [{"runtime": "r"}]},
        {"variants": [{"source": "s", "variants": []}]},
    ],
    ids=repr,
)
def test_a_model_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    refused(ModelConfig, model_id="m", **values)


def test_a_model_without_variants_is_its_only_choice() -> None:
    config = ModelConfig(model_id="m", source="s", runtime="r", options={"a": 1})
    assert config.choices() == [config]


def test_each_variant_is_a_choice_in_their_order() -> None:
    config = ModelConfig(
        model_id="m",
        aliases=["n"],
        pinned=True,
        preload=False,
        variants=[
            ModelVariant(source="s1", runtime="r1", options={"a": 1}),
            ModelVariant(source="s2"),
        ],
    )
    shared = {"model_id": "m", "aliases": ["n"], "pinned": True, "preload": False}
    assert config.choices() == [
        ModelConfig(source="s1", runtime="r1", options={"a": 1}, **shared),
        ModelConfig(source="s2", **shared),
    ]


def loaded_model(**values: Any) -> LoadedModel:
    return LoadedModel(**{**MINIMAL[LoadedModel], **values})


def test_a_loaded_model_is_compared_by_identity() -> None:
    first, second = loaded_model(), loaded_model()
    assert first == first
    assert first != second
    assert len({first, second, first}) == 2
    assert copy.copy(first) != first


def test_a_loaded_model_may_hold_anything() -> None:
    unhashable: dict[str, Any] = {"weights": [object()]}
    loaded = loaded_model(model_object=unhashable)
    assert loaded.model_object is unhashable
    assert hash(loaded) == hash(loaded)


def _asking(**fields):
    return InferenceRequest(model_id="m", messages=[{"role": "user", "content": "q"}], **fields)


def _tool(name, **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def test_tools_are_put_into_one_form() -> None:
    request = _asking(tools=[{"name": "a", "parameters": {}}, _tool("b")], tool_choice="required")
    assert request.tools == [_tool("a", parameters={}), _tool("b")]
    beside = _asking(
        tools=[{**_tool("a"), "strict": True}, {**_tool("b", strict=True), "strict": None}]
    )
    assert beside.tools == [_tool("a", strict=True), _tool("b", strict=True)]
    named = [{"type": "function", "function": {"name": "b"}}, {"type": "function", "name": "b"}]
    for choice in (*named, {"name": "b"}, NamedTool(name="b")):
        assert _asking(tools=request.tools, tool_choice=choice).tool_choice == NamedTool(name="b")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools of type 'web_search' are not known"),
        ({"tools": [_tool("a b")]}, "'a b' is no name of a tool"),
        ({"tools": [_tool("a"), _tool("a")]}, "two tools are called 'a'"),
        ({"tools": [_tool("a", parameters=[])]}, "parameters must be a JSON schema"),
        ({"tools": [{"name": "a", "input_schema": {}}]}, "input_schema is called parameters here"),
        ({"tools": [_tool("a", inputSchema={})]}, "inputSchema is called parameters here"),
        ({"tools": [_tool("a", strict="true")]}, "strict must be true or false"),
        ({"tools": [{**_tool("a"), "strict": 1}]}, "strict must be true or false"),
        ({"tools": [_tool("a", description="\ud83c")]}, "must be JSON"),
        ({"tools": [_tool(f"t{i}") for i in range(129)]}, "at most 128"),
        ({"tools": [_tool("a", description="x" * 1_000_000)]}, "may have 1000000 bytes"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [_tool("a")], "tool_choice": {"name": "b"}}, "tool_choice names 'b'"),
        ({"tools": [_tool("a")], "tool_choice": "a"}, "Input should be 'none', 'auto'"),
        ({"tools": [_tool("a")], "tool_choice": 3}, "must be a word or a tool"),
        ({"tools": [_tool("a")], "tool_choice": {"type": "function"}}, "valid string"),
        ({"reasoning": "very"}, "reasoning"),
        ({"reasoning_budget": -1}, "greater than or equal to 0"),
        (
            {"reasoning": True, "template_args": {"enable_thinking": False}},
            "reasoning and template_args.enable_thinking contradict each other",
        ),
        ({"template_args": {"a": object()}}, "must be JSON"),
        ({"template_args": {"a": [0] * 140_000}}, "has 140015 values"),
        ({"tools": [_tool("a", parameters={"enum": [0] * 140_000})]}, "at most 131072 are taken"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        _asking(**fields)
    assert len(caught.value.errors()) <= 2 and len(str(caught.value)) < 2000


def test_tools_are_for_messages() -> None:
    with pytest.raises(ValidationError, match="a prompt is taken as it is"):
        InferenceRequest(model_id="m", prompt="p", tools=[_tool("a")])


def test_calls_are_looked_through_up_to_the_first_that_is_none() -> None:
    class Counted(list[Any]):
        seen = 0

        def __iter__(self) -> Any:
            for item in super().__iter__():
                self.seen += 1
                yield item

    calls = Counted([1] * 1000)
    with pytest.raises(ValidationError, match=r"tool_calls\.0"):
        ChatMessage(role="assistant", tool_calls=calls)
    assert calls.seen <= 2


def test_parts_of_an_answer_come_in_their_order():
    calls = [ToolCall(id=name, name=name, arguments="{}") for name in "ab"]
    answer = InferenceResponse(
        request_id="r", model_id="m", generated_text="onetwo", tool_calls=calls
    )
    assert answer.parts == ["onetwo", *calls]
    answer.place_calls([(0, True), (3, False), (3, True)])
    assert answer.parts == [calls[0], "one", calls[1], "two"]
    answer.place_calls([(6, True)])
    assert answer.parts == ["onetwo", *calls]
    assert InferenceResponse(request_id="r", model_id="m").parts == []
