"""The toy runtime with one defect at a time: of beams, structured output, calls and reasoning."""

from __future__ import annotations

import dataclasses
import random

from broken_table import defect
from forms_toy import FormsToy, ThinkingToy
from toy_runtime import ToyHandler

from engineroom import (
    ConfigurationError,
    StreamEnd,
)
from engineroom.generation.deltas import ReasoningDelta


class _Claims(ToyHandler):
    claims: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()

    def capabilities(self):
        found = super().capabilities()
        return dataclasses.replace(
            found, params=found.params | self.claims, structured_output=self.kinds
        )


@defect
def num_beams():
    class Broken(_Claims):
        claims = frozenset({"num_beams"})

    return Broken


@defect
def early_stopping():
    class Broken(_Claims):
        claims = frozenset({"early_stopping"})

    return Broken


@defect
def structured_output():
    class Broken(_Claims):
        claims = frozenset({"structured_output"})
        kinds = frozenset({"regex"})

    return Broken


@defect
def structured_output__no_kind():
    class Broken(_Claims):
        claims = frozenset({"structured_output"})

    return Broken


class _Forgets(FormsToy):
    """Its grammar is forgotten where ``forgets(params)`` says so."""

    def adjusted(self, params, logits, prompt, new):
        if self.forgets(params):
            return ToyHandler.adjusted(self, params, logits, prompt, new)
        return super().adjusted(params, logits, prompt, new)


@defect
def structured_output__any_json():
    class Broken(_Forgets):
        def forgets(self, params):
            return params.structured_output is not None and params.structured_output.json_object

    return Broken


@defect
def structured_output__stops():
    class Broken(FormsToy):
        """Stop sequences are forgotten beside a form."""

        async def infer(self, loaded_model, request):
            if request.params.structured_output is not None:
                request = request.model_copy(update={"stop_sequences": None})
            return await super().infer(loaded_model, request)

    return Broken


@defect
def structured_output__unknown_kind():
    class Broken(FormsToy):
        def capabilities(self):
            return dataclasses.replace(
                super().capabilities(), structured_output=frozenset({"regex", "xml"})
            )

    return Broken


@defect
def structured_seeds():
    class Broken(_Forgets):
        """A form is forgotten where it is hot."""

        def forgets(self, params):
            return params.structured_output is not None and (params.temperature or 0) > 1

    return Broken


@defect
def structured_seeds__likely():
    class Broken(FormsToy):
        """Where it draws, what a form does not allow is unlikely, and no more than that."""

        def adjusted(self, params, logits, prompt, new):
            allowed = super().adjusted(params, logits, prompt, new)
            if params.greedy:
                return allowed
            likely = ToyHandler.adjusted(self, params, logits, prompt, new)
            return [max(value, other - 50) for value, other in zip(allowed, likely, strict=True)]

    return Broken


@defect
def structured_seeds__bias():
    class Broken(FormsToy):
        """A bias weighs more than a form."""

        def adjusted(self, params, logits, prompt, new):
            found = super().adjusted(params, logits, prompt, new)
            for token, bias in (params.logit_bias or {}).items():
                if bias > 0:
                    found[token] = max(found[token], bias)
            return found

    return Broken


@defect
def structured_seeds__penalties():
    class Broken(_Forgets):
        def forgets(self, params):
            return bool(params.presence_penalty)

    return Broken


@defect
def structured_seeds__logprobs():
    class Broken(FormsToy):
        """The first token has no log probability beside a form."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            if request.params.structured_output is not None and response.logprobs:
                response.logprobs = response.logprobs[1:]
            return response

    return Broken


@defect
def structured_seeds__draws_anew():
    class Broken(FormsToy):
        """Among what is allowed, it draws from a generator of its own."""

        def choose(self, params, logits, source):
            if params.structured_output is None or params.greedy:
                return super().choose(params, logits, source)
            allowed = [token for token, value in enumerate(logits) if value > -1e8]
            return random.choice(allowed)

    return Broken


@defect
def hostile_grammar_neighbour():
    class Broken(FormsToy):
        """What the library says of a grammar that is none goes out as it is."""

        async def compile(self, request):
            try:
                return await super().compile(request)
            except ConfigurationError as error:
                raise ValueError(error.message) from error

    return Broken


@defect
def hostile_grammar_neighbour__ends_others():
    class Broken(FormsToy):
        """A grammar that is none ends whatever runs beside it."""

        async def compile(self, request):
            try:
                return await super().compile(request)
            except ConfigurationError:
                self.failures = getattr(self, "failures", 0) + 1
                raise

        async def prefill(self, model, prompt, request):
            request.params.__dict__["failures"] = getattr(self, "failures", 0)
            await super().prefill(model, prompt, request)

        def limit(self, params):
            ended = getattr(self, "failures", 0) > params.__dict__.get("failures", 0)
            return 1 if ended else super().limit(params)

    return Broken


@defect
def hostile_grammar_neighbour__grows():
    class Broken(FormsToy):
        """A grammar that grows fails in its midst, in words of the library's."""

        def adjusted(self, params, logits, prompt, new):
            form = params.structured_output
            if form is not None and "s: s s" in (form.grammar or "") and len(new) > 9:
                raise ValueError("too many items")
            return super().adjusted(params, logits, prompt, new)

    return Broken


@defect
def hostile_grammar_neighbour__grows_alone():
    class Broken(FormsToy):
        """With nothing beside it, a grammar that grows is waited for in vain, and given up."""

        async def prefill(self, model, prompt, request):
            form = request.params.structured_output
            grows = form is not None and "s: s s" in (form.grammar or "")
            if grows and model.running == 1:
                raise RuntimeError("no step is to come")
            await super().prefill(model, prompt, request)

    return Broken


@defect
def hostile_grammar_neighbour__ends_forms():
    class Broken(FormsToy):
        """A grammar that is none is the end of all that come later."""

        refuses = False

        async def compile(self, request):
            if self.refuses and request.constrained:
                raise ConfigurationError("the compiler has ended")
            try:
                return await super().compile(request)
            except ConfigurationError:
                self.refuses = True
                raise

    return Broken


@defect
def hostile_grammar_neighbour__forms_beside():
    class Broken(FormsToy):
        """A grammar that is none takes the forms of those beside it."""

        failures = 0

        async def compile(self, request):
            try:
                return await super().compile(request)
            except ConfigurationError:
                self.failures += 1
                raise

        async def prefill(self, model, prompt, request):
            request.params.__dict__["failures"] = self.failures
            await super().prefill(model, prompt, request)

        def adjusted(self, params, logits, prompt, new):
            if self.failures > params.__dict__["failures"]:
                return ToyHandler.adjusted(self, params, logits, prompt, new)
            return super().adjusted(params, logits, prompt, new)

    return Broken


@defect
def reasoning_apart__markers():
    class Broken(ThinkingToy):
        """The end of thoughts is left at them."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            if response.reasoning:
                response.reasoning += "</think>"
            return response

        async def stream_infer(self, loaded_model, request):
            begun = False
            async for chunk in super().stream_infer(loaded_model, request):
                if begun and not isinstance(chunk, ReasoningDelta):
                    yield ReasoningDelta("</think>")
                begun = isinstance(chunk, ReasoningDelta)
                if isinstance(chunk, StreamEnd) and chunk.response.reasoning:
                    chunk.response.reasoning += "</think>"
                yield chunk

    return Broken


@defect
def reasoning_apart():
    class Broken(ThinkingToy):
        """Thoughts are content."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            thoughts, response.reasoning = response.reasoning or "", None
            response.generated_text = thoughts + (response.generated_text or "")
            return response

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if isinstance(chunk, StreamEnd):
                    thoughts, chunk.response.reasoning = chunk.response.reasoning or "", None
                    chunk.response.generated_text = thoughts + chunk.response.generated_text
                    yield chunk
                else:
                    yield getattr(chunk, "text", chunk)

    return Broken


@defect
def reasoning_apart__not_streamed():
    class Broken(ThinkingToy):
        """Thoughts are told at the end alone."""

        async def stream_infer(self, loaded_model, request):
            async for chunk in super().stream_infer(loaded_model, request):
                if not isinstance(chunk, ReasoningDelta):
                    yield chunk

    return Broken


@defect
def reasoning_apart__streamed_forms():
    class Broken(ThinkingToy):
        """Thoughts are content where what has to have a form is streamed."""

        async def stream_infer(self, loaded_model, request):
            form = request.params.structured_output
            async for chunk in super().stream_infer(loaded_model, request):
                yield chunk.text if form and isinstance(chunk, ReasoningDelta) else chunk

    return Broken


@defect
def reasoning_apart__stops():
    class Broken(ThinkingToy):
        """Stop sequences end thoughts, too."""

        async def infer(self, loaded_model, request):
            response = await super().infer(loaded_model, request)
            for stop in request.stop_sequences or ():
                if stop in (response.reasoning or ""):
                    response.reasoning = response.reasoning.partition(stop)[0]
                    response.generated_text = ""
                    response.finish_reason = "stop_sequence"
            return response

    return Broken


@defect
def reasoning_apart__form():
    class Broken(ThinkingToy):
        """What has to have a form is not thought about."""

        async def compile(self, request):
            if request.params.structured_output is not None:
                request = request.model_copy(update={"reasoning_budget": 0})
            return await super().compile(request)

    return Broken
