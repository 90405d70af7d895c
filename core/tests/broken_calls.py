"""The toy runtime with one defect at a time: of calls of tools."""

from __future__ import annotations

import dataclasses

from broken_table import defect
from forms_toy import FormsToy, ThinkingToy

from engineroom.generation.deltas import ToolCallDelta
from engineroom.prompts.tool_messages import tools_as_messages


class _OwnTools(FormsToy):
    """Tells the model of tools itself."""

    def capabilities(self):
        return dataclasses.replace(super().capabilities(), tools=True)

    def tokens(self, loaded_model, request):
        if request.messages is not None:
            messages = tools_as_messages(self.history(request), self.offered(request))
            request = request.model_copy(update={"messages": messages})
        return super().tokens(loaded_model, request)

    def history(self, request):
        return request.messages

    def offered(self, request):
        return request.offered_tools


@defect
def tool_calls():
    class Broken(FormsToy):
        """A tool that was not offered."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            calls = [call.model_copy(update={"name": "fly"}) for call in response.tool_calls or ()]
            response.tool_calls = calls or None
            return response

    return Broken


@defect
def tool_calls__untold():
    class Broken(_OwnTools):
        def offered(self, request):
            return None

    return Broken


@defect
def tool_calls__told_in_vain():
    class Broken(_OwnTools):
        def offered(self, request):
            return request.tools

    return Broken


@defect
def tool_calls__results():
    class Broken(_OwnTools):
        """What tools returned is told without its text."""

        def history(self, request):
            return [
                message.model_copy(update={"content": ""}) if message.role == "tool" else message
                for message in request.messages
            ]

    return Broken


@defect
def tool_calls__another_one():
    class Broken(_OwnTools):
        """Any tool will do where one is named."""

        async def compile(self, request):
            if request.requires_call:
                request = request.model_copy(update={"tool_choice": "required"})
            return await super().compile(request)

    return Broken


@defect
def tool_calls__same_id():
    class Broken(FormsToy):
        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            calls = [call.model_copy(update={"id": "call_0"}) for call in response.tool_calls or ()]
            response.tool_calls = calls or None
            return response

    return Broken


@defect
def tool_calls__at_the_end():
    class Broken(FormsToy):
        """Streams tell of calls in their response alone."""

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if not isinstance(chunk, ToolCallDelta):
                    yield chunk

    return Broken


@defect
def tool_calls__thoughts():
    class Broken(ThinkingToy):
        """Thoughts are content beside calls."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            if response.tool_calls:
                response.generated_text = response.reasoning
            return response

    return Broken


def _with_parameters(tools, change):
    """The tools, their parameters as ``change`` has them."""
    return [
        {**tool, "function": {**tool["function"], "parameters": change(tool["function"])}}
        for tool in tools
    ]


@defect
def tool_calls__wrong_arguments():
    class Broken(FormsToy):
        """A value that the schema does not have."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            wrong = {"arguments": '{"u": "F"}'}
            calls = [
                call.model_copy(update=wrong) if call.name == "t" else call
                for call in response.tool_calls or ()
            ]
            response.tool_calls = calls or None
            return response

    return Broken


@defect
def tool_calls__any_arguments():
    class Broken(_OwnTools):
        """Arguments are any object."""

        async def compile(self, request):
            if request.tools is not None:
                tools = _with_parameters(request.tools, lambda function: {"type": "object"})
                request = request.model_copy(update={"tools": tools})
            return await super().compile(request)

    return Broken


@defect
def tool_calls__hot():
    class Broken(_OwnTools):
        """Where it is hot, the calls' grammar is forgotten."""

        async def compile(self, request):
            if request.tools is not None and (request.params.temperature or 0) > 1:
                request = request.model_copy(update={"tools": None, "tool_choice": None})
            return await super().compile(request)

    return Broken


@defect
def tool_calls__two():
    class Broken(_OwnTools):
        """``parallel_tool_calls`` is forgotten."""

        async def compile(self, request):
            request = request.model_copy(update={"parallel_tool_calls": None})
            return await super().compile(request)

    return Broken


class _Calls(_OwnTools):
    """What the model reads of a history's calls is what ``read(calls)`` leaves of them."""

    def history(self, request):
        return [
            message.model_copy(update={"tool_calls": self.read(message.tool_calls)})
            if message.tool_calls
            else message
            for message in request.messages
        ]


@defect
def tool_calls__forgotten():
    class Broken(_Calls):
        def read(self, calls):
            return None

    return Broken


@defect
def tool_calls__arguments_forgotten():
    class Broken(_Calls):
        def read(self, calls):
            return [{**call, "function": {**call["function"], "arguments": "{}"}} for call in calls]

    return Broken


@defect
def tool_calls__first_one_read():
    class Broken(_Calls):
        def read(self, calls):
            return calls[:1]

    return Broken


@defect
def tool_calls__markers():
    class Broken(FormsToy):
        """What begins a call is content, too."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            if response.tool_calls:
                response.generated_text = "<tool_call>"
            return response

    return Broken


@defect
def tool_calls__streamed_markers():
    class Broken(FormsToy):
        """What begins a call is streamed as content."""

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, ToolCallDelta) and chunk.name:
                    yield "<tool_call>"
                yield chunk

    return Broken


@defect
def tool_calls__marked_thoughts():
    class Broken(ThinkingToy):
        """Thoughts before calls have their end with them."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            if response.tool_calls and response.reasoning:
                response.reasoning += "</think>"
            return response

    return Broken
