"""Half of a surrogate pair is no text: refused by the name of its field, wherever one is."""

from __future__ import annotations

import pytest
from core_doubles import echo_bench
from pydantic import ValidationError

from engineroom import ConfigurationError, InferenceRequest, ModelConfig, ModelVariant

HALF = "a\ud800"


def user(**more):
    return {"messages": [{"role": "user", "content": "a"} | more]}


REQUESTS = {
    "model_id": {"model_id": HALF},
    "request_id": {"request_id": HALF},
    "prompt": {"prompt": HALF},
    "adapter": {"adapter": HALF},
    "cache_salt": {"cache_salt": HALF},
    "stop_sequences": {"stop_sequences": ["a", HALF]},
    "content": user(content=HALF),
    "name": user(name=HALF),
    "tool_call_id": user(tool_call_id=HALF),
    "tool_choice": {"tool_choice": HALF},
    "metadata": {"metadata": {"user": HALF}},
    "metadata's key": {"metadata": {HALF: 1}},
    "regex": {"params": {"structured_output": {"regex": HALF}}},
    "grammar": {"params": {"structured_output": {"grammar": HALF}}},
    "json_schema": {"params": {"structured_output": {"json_schema": {"a": [{"b": HALF}]}}}},
}


@pytest.mark.parametrize("field", REQUESTS)
def test_a_request_is_refused_with_the_fields_name(field):
    fields = {"model_id": "m", **REQUESTS[field]}
    if "messages" not in fields:
        fields.setdefault("prompt", "a")
    with pytest.raises(ValidationError) as caught:
        InferenceRequest(**fields)
    assert field.split("'")[0] in str(caught.value)


def test_the_callers_own_in_metadata_may_be_anything_else():
    own = {"a": object(), "b": b"\xff", "c": {"d": "e"}}
    assert InferenceRequest(model_id="m", prompt="a", metadata=own).metadata == own


@pytest.mark.parametrize(
    "arguments",
    [
        {"texts": ["a", HALF]},
        {"model_id": HALF},
        {"request_id": HALF},
        {"metadata": {"user": HALF}},
    ],
    ids=str,
)
async def test_texts_for_embeddings_are_refused_alike(arguments):
    service = echo_bench().service
    with pytest.raises(ConfigurationError, match="embed: "):
        await service.embed(**{"model_id": "echo", "texts": ["a"], **arguments})


@pytest.mark.parametrize("kind", [ModelConfig, ModelVariant])
@pytest.mark.parametrize("field", ["source", "runtime"])
def test_names_of_models_and_runtimes_are_refused(kind, field):
    fields = {"source": "echo:", field: HALF} | ({"model_id": "m"} if kind is ModelConfig else {})
    with pytest.raises(ValidationError, match=field):
        kind(**fields)
