"""A fake runtime: thinks, then calls the first tool, or says what a tool has returned."""

from engineroom import Capabilities, GenerationParams, InferenceResponse, StreamEnd, ToolCall
from engineroom.generation.deltas import ReasoningDelta, ToolCallDelta
from engineroom.testing import EchoHandler

seen = []


class Agent(EchoHandler):
    name = "agent"

    def can_load(self, config):
        return (config.source or "").startswith("agent:")

    def capabilities(self):
        return Capabilities(
            params=frozenset(GenerationParams.model_fields),
            chat=True,
            tools=True,
            template_args=True,
            structured_output=frozenset({"json_schema", "grammar"}),
        )

    async def infer(self, loaded_model, request):
        chunks = [chunk async for chunk in self.stream_infer(loaded_model, request)]
        return chunks[-1].response

    async def stream_infer(self, loaded_model, request):
        seen.append(request)
        last = request.messages[-1]
        thoughts = ["let me ", "think\x1b[5m"] if request.reasoning is not False else []
        calls = []
        cut = "cut" in last.content
        for thought in thoughts:
            yield ReasoningDelta(thought)
        text = f"it returned {last.content}" if last.role == "tool" else "I look"
        yield text
        if request.tools and last.role != "tool":
            name = request.tools[0]["function"]["name"]
            for place in range(2 if "twice" in last.content else 1):
                yield ToolCallDelta(place, f"call_{place}", name)
                yield ToolCallDelta(place, arguments='{"city": ')
                if cut and place == request.messages[-1].content.count("twice"):
                    continue
                yield ToolCallDelta(place, arguments=f'"Zürich {place}"}}')
                calls.append(
                    ToolCall(
                        id=f"call_{place}", name=name, arguments=f'{{"city": "Zürich {place}"}}'
                    )
                )
        yield StreamEnd(
            InferenceResponse(
                request_id=request.request_id,
                model_id=request.model_id,
                generated_text=text,
                finish_reason="length" if cut else "tool_calls" if calls else "eos_token",
                tool_calls=calls or None,
                cut_call=cut,
                reasoning="".join(thoughts) or None,
                prompt_tokens=1,
                generated_tokens=1,
            )
        )
