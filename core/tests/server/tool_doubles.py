"""Fake runtimes that yield what a test has written down, whatever they are asked."""

from __future__ import annotations

from typing import Any

from server_doubles import TalkHandler

from engineroom import Capabilities, GenerationParams, InferenceResponse, TokenStep, ToolCall
from engineroom.engine import logprob_maker
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.generation.tool_formats import REASONING_FORMATS
from engineroom.generation.traits import ModelTraits
from engineroom.handlers.base import InferenceHandler, StreamEnd

KINDS = frozenset({"json_schema", "json_object", "regex", "choice", "grammar"})
CALL = [
    ToolCallDelta(0, "call_1", "weather"),
    ToolCallDelta(0, arguments='{"city":'),
    ToolCallDelta(0, arguments=' "Zürich 🌸"}'),
]
SECOND = [ToolCallDelta(1, "call_2", "time"), ToolCallDelta(1, arguments="{}")]
THOUGHT = [ReasoningDelta("let me"), ReasoningDelta(" think")]
ARGUMENTS = '{"city": "Zürich 🌸"}'

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "how it is", "parameters": PARAMETERS}
TIME = {"name": "time"}
TOOLS = [{"type": "function", "function": function} for function in (FUNCTION, TIME)]
THINK = next(form for form in REASONING_FORMATS if form.name == "think")


def call(name: str, arguments: str) -> str:
    """A call as the model of :class:`ScriptHandler` writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class ScriptHandler(TalkHandler):
    """Writes ``text``, ``size`` bytes a token."""

    name = "script"

    def __init__(self) -> None:
        super().__init__()
        self.text, self.size = "", 3

    def traits(self, loaded_model: Any) -> ModelTraits:
        return ModelTraits(reasoning=THINK)

    async def generate_tokens(self, loaded_model: Any, request: Any) -> Any:
        yield TokenStep(prompt_tokens=1)
        data = self.text.encode("utf-8", "surrogatepass")
        for at in range(0, len(data), self.size):
            piece = data[at : at + self.size]
            step = TokenStep((1,), piece)
            if request.params.logprobs is not None:
                step.logprobs = (logprob_maker(lambda _, own=piece: own)(1, -0.5, []),)
            yield step
        yield TokenStep(finish="eos_token")


class DeltaHandler(InferenceHandler):
    """Says ``script``, chunks of a stream, and ends for the reason ``finish``."""

    name = "deltas"

    def __init__(self) -> None:
        self.script: list[str] = []
        self.finish: Any = "eos_token"
        self.cut = False
        """The last call of the script is cut short: the whole answer does not have it."""
        self.seen: list[Any] = []
        self._loader = TalkHandler()

    def say(self, *chunks: str, finish: Any = None, cut: bool = False) -> None:
        """What the next answers are."""
        self.script, self.cut = [*chunks], cut
        calls = any(isinstance(chunk, ToolCallDelta) for chunk in chunks)
        self.finish = finish or ("tool_calls" if calls and not cut else "eos_token")

    def capabilities(self) -> Capabilities:
        params = frozenset(GenerationParams.model_fields)
        return Capabilities(
            params=params,
            chat=True,
            tools=True,
            structured_output=KINDS,
            template_args=True,
            reasoning_budget=True,
        )

    def can_handle(self, loaded_model: Any) -> bool:
        return loaded_model.model_object == "talk"

    def can_load(self, config: Any) -> bool:
        return self._loader.can_load(config)

    async def load_model(self, config: Any) -> Any:
        return await self._loader.load_model(config)

    async def infer(self, loaded_model: Any, request: Any) -> InferenceResponse:
        self.seen.append(request)
        return self._response(request)

    async def stream_infer(self, loaded_model: Any, request: Any) -> Any:
        self.seen.append(request)
        for chunk in self.script:
            yield chunk
        yield StreamEnd(self._response(request))

    def _response(self, request: Any) -> InferenceResponse:
        calls: dict[int, ToolCall] = {}
        for chunk in self.script:
            if isinstance(chunk, ToolCallDelta):
                made = calls.get(chunk.call) or ToolCall(id=chunk.id, name=chunk.name, arguments="")
                arguments = made.arguments + chunk.arguments
                calls[chunk.call] = made.model_copy(update={"arguments": arguments})
        if self.cut:
            calls.popitem()
        thoughts = [chunk.text for chunk in self.script if isinstance(chunk, ReasoningDelta)]
        return InferenceResponse(
            request_id=request.request_id,
            model_id=request.model_id,
            generated_text="".join(self.script),
            finish_reason=self.finish,
            reasoning="".join(thoughts) or None,
            tool_calls=[*calls.values()] or None,
            cut_call=self.cut,
            prompt_tokens=5,
            generated_tokens=len(self.script),
        )
