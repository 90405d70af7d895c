"""Everything public that is a value or an error can be copied, deep-copied and pickled."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

import engineroom
from engineroom import (
    Capabilities,
    ChatMessage,
    CountRequest,
    DeploymentConfig,
    DetokenizeRequest,
    DeviceMemory,
    DispatchReport,
    EmbeddingRequest,
    Embeddings,
    EngineRoomError,
    GenerationParams,
    HandlerHealth,
    HandlerVerdict,
    HubSource,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    JsonForm,
    LoadedModel,
    ModelConfig,
    ModelStatus,
    ModelTraits,
    ModelVariant,
    NamedForm,
    NamedTool,
    PackageSource,
    PathSource,
    Plan,
    PlannedModel,
    PlannedVariant,
    PreloadProgress,
    PromptLogprob,
    PythonicForm,
    QueueFullError,
    ReasoningDelta,
    ReasoningFormat,
    ReloadReport,
    RerankRequest,
    Scores,
    StreamEnd,
    StreamError,
    StructuredOutput,
    TaggedForm,
    TokenizeRequest,
    TokenLogprob,
    Tokens,
    TokenStep,
    ToolCall,
    ToolCallDelta,
    VariantOutcome,
    VectorSizes,
)

WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda value, protocol=protocol: pickle.loads(
            pickle.dumps(value, protocol)
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}
ALIVE = {
    "BatchingEngine", "Border", "DecodeLoop", "EngineHandler", "EngineTask", "HandlerRegistry",
    "InferenceHandler", "InferenceStream", "LLMInferenceService", "LLMModelManager",
    "LoggingObserver", "Mailbox", "ModelSource", "RequestLogger", "TextPipeline", "TokenHandler",
    "Utf8Decoder", "WaitingLine",
}  # fmt: skip
"""Classes of what works or has a state, and is no value."""


def failed() -> InferenceResponse:
    response = InferenceResponse(request_id="r", model_id="m")
    try:
        raise QueueFullError("8 wait") from ValueError("why")
    except QueueFullError as error:
        response.record_error(error.with_context(request_id="r", model_id="m"))
    return response


CONFIG = ModelConfig(model_id="m", source="echo:", options={"a": [1]})
PROMPT_LOGPROB = PromptLogprob(token_id=1, token="a", logprob=None, bytes=(97,))
LOGPROB = TokenLogprob(token_id=1, token="a", logprob=-0.5, top=[(1, "a", -0.5)])
ANSWER = InferenceResponse(request_id="r", model_id="m", generated_text="a", logprobs=[LOGPROB])
DEVICE = DeviceMemory("cpu", 4, False, 1, 0, 0, 3, {"m": 1})
VARIANT = PlannedVariant("echo:", "echo", {"cpu": 1}, "estimate", "chosen")
PLANNED = PlannedModel("m", "preload", "echo", "echo:", {"cpu": 1}, variants=(VARIANT,))
VALUES: list[Any] = [
    Capabilities(params=frozenset({"seed"}), chat=True),
    ChatMessage(role="user", content="a", name="n"),
    DeploymentConfig(models=[CONFIG], memory={"cpu": 1 << 30}, keep_alive=3.0),
    EmbeddingRequest(model_id="m", texts=["a", "b"]),
    Embeddings([[1.0]], 1),
    TokenizeRequest(model_id="m", prompt="a", add_special_tokens=False),
    DetokenizeRequest(model_id="m", tokens=[1, 2]),
    Tokens([1], [b"a"], 2),
    RerankRequest(model_id="m", queries=["a"], documents=["b", "c"]),
    Scores([0.5, -1.0], 2),
    GenerationParams(logit_bias={1: 2.0}, structured_output=StructuredOutput(regex="a")),
    HandlerHealth(num_requests_running=1),
    DEVICE,
    DispatchReport("m", "can_load", (HandlerVerdict("echo", "yes", "so"),), "echo", ("note",)),
    HandlerVerdict("echo", "yes", "so"),
    HubSource("owner/name", "file.gguf", "main"),
    CountRequest(model_id="m", prompt="a"),
    InferenceRequest(model_id="m", prompt="a", metadata={"a": [1]}),
    InferenceRequest(model_id="m", messages=[ChatMessage(role="user", content="a")]),
    ANSWER,
    failed(),
    LoadedModel(model_id="m", model_object={"a": 1}, config=CONFIG, handler_name="echo"),
    CONFIG,
    ModelStatus("m", "ready", memory={"cpu": 1}, variants=(VariantOutcome("e", "e", "used"),)),
    ModelVariant(source="echo:", runtime="echo"),
    PackageSource("package", "file"),
    PathSource(Path("a")),
    Plan((PLANNED,), (DEVICE,)),
    PLANNED,
    VARIANT,
    PreloadProgress("m", 1, 1, "ready", 0.1),
    ReloadReport(added=("m",)),
    StreamEnd(ANSWER),
    StreamError(QueueFullError("8 wait", request_id="r", model_id="m")),
    StructuredOutput(json_schema={"type": "object"}),
    LOGPROB,
    PROMPT_LOGPROB,
    NamedTool(name="n"),
    ModelTraits(native=True),
    ReasoningDelta("hm"),
    ReasoningFormat("mine", "<hm>", "</hm>"),
    ToolCall(id="call_1", name="n", arguments='{"a": 1}'),
    ToolCallDelta(1, "call_1", "n", '{"a'),
    ModelTraits().tools,
    JsonForm(),
    NamedForm(),
    PythonicForm(),
    TaggedForm("<p>", ">", "</p>", "</call>"),
    TokenStep((1,), b"a", logprobs=(LOGPROB,), finish="length"),
    VariantOutcome("echo:", "echo", "used"),
    VectorSizes(4, frozenset({2})),
]


def facts(value: Any) -> Any:
    """What has to be the same: for errors and strings with more than the text, all of it."""
    if isinstance(value, BaseException):
        return type(value), value.args, value.__dict__
    if isinstance(value, ReasoningDelta):
        return type(value), str(value), value.text
    if isinstance(value, ToolCallDelta):
        return type(value), str(value), value.call, value.id, value.name, value.arguments
    if isinstance(value, StreamError):
        return type(value), str(value), facts(value.error)
    if isinstance(value, StreamEnd):
        return type(value), str(value), facts(value.response)
    if isinstance(value, InferenceResponse):
        return value.model_dump(), facts(value._cause) if value._cause else None
    if isinstance(value, LoadedModel):
        return vars(value)
    return value


def test_every_public_class_is_here_or_is_alive() -> None:
    classes = {n for n in engineroom.__all__ if inspect.isclass(getattr(engineroom, n))}
    errors = {n for n in classes if issubclass(getattr(engineroom, n), BaseException)}
    here = {type(value).__name__ for value in VALUES}
    assert classes == here | errors | ALIVE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_the_same_afterwards(value: Any, way: str) -> None:
    again = WAYS[way](value)
    assert type(again) is type(value)
    assert facts(again) == facts(value)


class OfAPlugin(InferenceError):
    """Not made of a message."""

    def __init__(self, count: int, *, limit: int) -> None:
        super().__init__(f"{count} of {limit}", model_id="m")
        self.limit = limit


ERRORS = [
    value
    for name in engineroom.__all__
    if inspect.isclass(value := getattr(engineroom, name)) and issubclass(value, EngineRoomError)
]
made = st.one_of(
    st.builds(
        lambda kind, text, request, model: kind(text, request_id=request, model_id=model),
        st.sampled_from(ERRORS),
        st.text(),
        st.none() | st.text(),
        st.none() | st.text(),
    ),
    st.builds(lambda count: OfAPlugin(count, limit=9), st.integers()),
)


@given(made, st.sampled_from(list(WAYS)), st.booleans())
def test_an_error_is_the_same_afterwards(error: EngineRoomError, way: str, last: bool) -> None:
    again = WAYS[way](error)
    assert facts(again) == facts(error) and str(again) == str(error)
    assert again.describe() == error.describe()
    chunk = WAYS[way](StreamError(error))
    assert facts(chunk) == facts(StreamError(error))
    response = InferenceResponse(request_id="r", model_id="m")
    response.record_error(error)
    with pytest.raises(EngineRoomError) as caught:
        WAYS[way](response).raise_for_error()
    assert facts(caught.value.__cause__) == facts(error)
