"""Tools, calls and reasoning of handlers that yield nothing but steps: all of it is core's."""

import asyncio
import json

import pytest

from engineroom import (
    Capabilities,
    InferenceRequest,
    LLMInferenceService,
    LoadedModel,
    ModelConfig,
    ReasoningDelta,
    TokenHandler,
    TokenStep,
    ToolCallDelta,
)
from engineroom.generation.tool_formats import REASONING_FORMATS, TOOL_FORMATS
from engineroom.generation.traits import ModelTraits

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "weather", "parameters": CITY}, {"name": "now"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🌸"}}\n</tool_call>'
THINK = next(format_ for format_ in REASONING_FORMATS if format_.name == "think")
HERMES = next(format_ for format_ in TOOL_FORMATS if format_.name == "hermes")


class Source:
    """One model, which is no more than its name."""

    def lease(self, model_id):
        return self

    async def __aenter__(self):
        return LoadedModel(model_id="m", model_object=None, config=ModelConfig(
            model_id="m", source="s"
        ))  # fmt: skip

    async def __aexit__(self, *_):
        return None


class Scripted(TokenHandler):
    """Writes a text, some characters a step, and keeps the requests that it gets."""

    name = "scripted"
    api_version = "1.0"
    tail = None

    def __init__(self, text, traits=None, *, structured=(), size=3, finish=None):
        self.text, self.size, self.finish = text, size, finish
        self._traits, self._structured = traits, frozenset(structured)
        self.requests = []

    def can_handle(self, loaded_model):
        return True

    def capabilities(self):
        params = frozenset({"structured_output"}) if self._structured else frozenset()
        return Capabilities(chat=True, params=params, structured_output=self._structured)

    def traits(self, loaded_model):
        return self._traits or super().traits(loaded_model)

    async def generate_tokens(self, loaded_model, request):
        self.requests.append(request)
        yield TokenStep(prompt_tokens=1, prompt_tail=self.tail)
        data = self.text.encode()
        for at in range(0, len(data), self.size):
            yield TokenStep((1,), data[at : at + self.size])
        yield TokenStep(finish=self.finish or "eos_token")


def ask(**fields):
    fields = {"messages": [{"role": "user", "content": "q"}], "tools": TOOLS, **fields}
    return InferenceRequest(model_id="m", **fields)


def answer(handler, request):
    """The whole answer, which the streamed one must be like."""

    async def both():
        async with LLMInferenceService(Source(), [handler]) as service:
            whole = await service.infer(request)
            stream = service.stream(request)
            chunks = [chunk async for chunk in stream]
            return whole, chunks, stream.response

    whole, chunks, streamed = asyncio.run(both())
    if whole.error_message is None:
        assert "".join(chunks) == whole.generated_text == streamed.generated_text
        thoughts = "".join(c.text for c in chunks if isinstance(c, ReasoningDelta))
        assert thoughts == (whole.reasoning or "") == (streamed.reasoning or "")
        written = {}
        for chunk in chunks:
            if isinstance(chunk, ToolCallDelta):
                written[chunk.call] = written.get(chunk.call, "") + chunk.arguments
        calls = [(c.name, c.arguments) for c in whole.tool_calls or ()]
        assert calls == [(c.name, c.arguments) for c in streamed.tool_calls or ()]
        assert list(written.values())[: len(calls)] == [arguments for _, arguments in calls]
        assert whole.finish_reason == streamed.finish_reason
        assert whole.warnings == streamed.warnings
    return whole


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_handler_that_knows_no_tools_gets_them_in_messages_and_calls_out_of_its_text(size):
    handler = Scripted(f"Let me see.\n{CALL}", size=size)
    response = answer(handler, ask())
    (call,) = response.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Zürich 🌸"})
    assert response.generated_text.strip() == "Let me see."
    assert response.finish_reason == "tool_calls"
    request = handler.requests[0]
    assert request.tools is None and request.params.structured_output is None
    system, user = request.messages
    assert '"weather"' in system.content and user.content == "q"


def test_its_results_go_back_as_text():
    handler = Scripted("It is warm.")
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "20", "tool_call_id": "1"},
    ]
    response = answer(handler, ask(messages=history))
    assert (response.generated_text, response.tool_calls) == ("It is warm.", None)
    roles = [message.role for message in handler.requests[0].messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert "<tool_response>" in handler.requests[0].messages[-1].content
    answer(handler, ask(messages=history, tools=None))
    assert [m.role for m in handler.requests[-1].messages] == ["user", "assistant", "user"]


def test_no_call_is_read_where_there_may_be_none():
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        handler = Scripted(CALL)
        response = answer(handler, ask(**fields))
        assert (response.generated_text, response.tool_calls) == (CALL, None)
        assert response.finish_reason == "eos_token"
        assert [m.role for m in handler.requests[0].messages] == ["user"]


def test_a_call_that_has_to_be_is_a_grammar():
    handler = Scripted(CALL, structured=["grammar"])
    for fields in ({"tool_choice": "required"}, {"tool_choice": {"name": "weather"}}):
        assert answer(handler, ask(**fields)).tool_calls
        request = handler.requests[-1]
        assert request.tool_choice is None
        grammar = request.params.structured_output.grammar
        assert "<tool_call>" in grammar and ('"now"' in grammar) is False
    assert "now" not in grammar
    strict = [{**TOOLS[0], "strict": True}]
    answer(handler, ask(tools=strict))
    assert "trigger[lazy]" in handler.requests[-1].params.structured_output.grammar
    answer(handler, ask())
    assert handler.requests[-1].params.structured_output is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{**TOOLS[0], "strict": True}]}, "tools.strict"),
        ({"reasoning": True}, "reasoning"),
        ({"template_args": {"a": 1}}, "template_args"),
    ],
)
def test_what_a_handler_cannot_do_is_refused_by_name(fields, name):
    response = answer(Scripted(CALL), ask(**fields))
    assert response.finish_reason == "error" and f"not honour {name}" in response.error_message
    response = answer(Scripted(CALL), ask(**fields, on_unsupported="warn"))
    assert response.finish_reason == "tool_calls" and name in response.warnings[0]


def test_a_bound_of_reasoning_is_refused_where_there_is_reasoning():
    request = ask(reasoning_budget=5)
    assert answer(Scripted(CALL), request).finish_reason == "tool_calls"
    response = answer(Scripted(CALL, ModelTraits(reasoning=THINK)), request)
    assert "not honour reasoning_budget" in response.error_message


def test_a_tool_that_was_not_offered_is_passed_on_with_a_warning():
    response = answer(Scripted(CALL), ask(tools=TOOLS[1:]))
    assert response.tool_calls[0].name == "weather"
    assert "not offered" in response.warnings[0]


def test_of_many_tools_that_were_not_offered_the_first_are_told_and_the_log_is_not(caplog):
    """A response's warnings go into a header, and the log knows whose a request is."""
    written = "".join(CALL.replace("weather", f"w{i}") for i in range(200))
    response = answer(Scripted(written, size=500), ask())
    assert len(response.tool_calls) == 200
    assert [w for w in response.warnings if "not offered" in w] == [
        *(f"the model calls 'w{i}', a tool that was not offered" for i in range(4)),
        "the model calls 196 more tools that were not offered",
    ]
    assert not [record for record in caplog.records if not hasattr(record, "key_name")]


@pytest.mark.parametrize("limit", [11, 12, 16, 24, 32, 48])
def test_a_call_that_is_cut_is_none(limit):
    handler = Scripted(CALL, size=1)
    request = ask(params={"max_new_tokens": limit})
    response = answer(handler, request)
    assert (response.finish_reason, response.tool_calls) == ("length", None)
    assert response.generated_text == ""


@pytest.mark.parametrize("stop", ["\n", "}", "weather"])
def test_stop_sequences_end_content_and_no_call(stop):
    response = answer(Scripted(f"{CALL}one{stop}two"), ask(stop_sequences=[stop]))
    assert response.tool_calls[0].name == "weather"
    assert (response.generated_text, response.finish_reason) == ("one", "stop_sequence")


# ── reasoning ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tail", "text"),
    [
        ("<|assistant|>\n", "<think>\nhm, 1\n</think>\n\nYes."),
        ("<|assistant|>\n<think>\n", "hm, 1\n</think>\n\nYes."),
    ],
)
def test_reasoning_comes_apart_by_how_the_prompt_ends(tail, text):
    handler = Scripted(text, ModelTraits(reasoning=THINK))
    handler.tail = tail
    response = answer(handler, ask(tools=None, stop_sequences=["1"]))
    assert response.reasoning.strip() == "hm, 1"
    assert (response.generated_text.strip(), response.finish_reason) == ("Yes.", "eos_token")


def test_where_no_step_tells_the_prompt_that_of_the_template_counts():
    handler = Scripted("hm</think>Yes.", ModelTraits(reasoning=THINK, tail="<think>\n"))
    response = answer(handler, ask(tools=None))
    assert (response.reasoning, response.generated_text) == ("hm", "Yes.")
    handler.tail = "<think>\n\n</think>\n\n"
    assert answer(handler, ask(tools=None)).generated_text == "hm</think>Yes."


def test_a_prompt_is_continued_as_it_is():
    handler = Scripted("<think>hm</think>Yes.", ModelTraits(reasoning=THINK))
    request = InferenceRequest(model_id="m", prompt="p")
    response = answer(handler, request)
    assert (response.generated_text, response.reasoning) == ("<think>hm</think>Yes.", None)


def test_reasoning_then_a_call():
    handler = Scripted(f"<think>hm</think>\n\n{CALL}", ModelTraits(HERMES, reasoning=THINK))
    response = answer(handler, ask())
    assert (response.reasoning, response.tool_calls[0].name) == ("hm", "weather")
    assert (response.generated_text, response.finish_reason) == ("", "tool_calls")
