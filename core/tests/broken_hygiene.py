"""The toy runtime with one defect at a time: of chat, vectors and what a handler leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from broken_table import defect
from toy_runtime import ToyHandler

from engineroom import (
    ConfigurationError,
    Embeddings,
    Scores,
    TokenStep,
)

# ── chat ─────────────────────────────────────────────────────────────────────────────────────────


@defect
def chat_template():
    class Broken(ToyHandler):
        def render(self, loaded_model, messages):
            return super().render(loaded_model, [m for m in messages if m.role != "system"]) + " "

    return Broken


@defect
def continued_message():
    class Broken(ToyHandler):
        def continued(self, loaded_model, messages):
            return self.render(loaded_model, messages)

    return Broken


@defect
def continued_message__repeats():
    class Broken(ToyHandler):
        async def generate_tokens(self, loaded_model, request):
            async for step in super().generate_tokens(loaded_model, request):
                yield step
                if step.prompt_tokens is not None and request.continues:
                    yield TokenStep(text=request.messages[-1].content)

    return Broken


@defect
def chat_roles():
    class Broken(ToyHandler):
        def render(self, loaded_model, messages):
            wanted = {"system": "S", "user": "U", "assistant": "A"}
            [wanted[message.role] for message in messages]
            return super().render(loaded_model, messages)

    return Broken


@defect
def chat_roles__unclear():
    class Broken(ToyHandler):
        def render(self, loaded_model, messages):
            try:
                return super().render(loaded_model, messages)
            except ConfigurationError:
                raise ConfigurationError("this cannot be done") from None

    return Broken


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────


@defect
def embeddings_fit():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            found = await super().embed(loaded_model, texts)
            counted = all(not isinstance(text, str) for text in texts)
            return Embeddings(found.vectors, found.prompt_tokens if counted else 0)

    return Broken


@defect
def embeddings_fit__infinite():
    class Broken(ToyHandler):
        def vector(self, data):
            return [*super().vector(data), float("nan")]

    return Broken


@defect
def embeddings_alone():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            found = await super().embed(loaded_model, texts)
            first = found.vectors[0]
            mixed = [[a + b for a, b in zip(v, first, strict=True)] for v in found.vectors]
            return Embeddings(mixed, found.prompt_tokens)

    return Broken


@defect
def embeddings_alone__all_the_same():
    class Broken(ToyHandler):
        def vector(self, data):
            return [1.0, 2.0]

    return Broken


@defect
def embeddings_cancelled():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            try:
                return await super().embed(loaded_model, texts)
            except asyncio.CancelledError:
                raise ValueError("somebody cancelled it") from None

    return Broken


@defect
def embeddings_refused():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            return await super().embed(loaded_model, [text[:100] for text in texts])

    return Broken


@defect
def embeddings_refused__unclaimed():
    class Broken(ToyHandler):
        def capabilities(self):
            return dataclasses.replace(super().capabilities(), embeddings=False)

    return Broken


@defect
def embeddings_token_ids():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            begun = [text if isinstance(text, str) else [1, *text] for text in texts]
            return await super().embed(loaded_model, begun)

    return Broken


@defect
def embeddings_token_ids__out_of_range():
    class Broken(ToyHandler):
        async def embed(self, loaded_model, texts):
            known = [t if isinstance(t, str) else [i & 255 for i in t] for t in texts]
            return await super().embed(loaded_model, known)

    return Broken


# ── ranking ──────────────────────────────────────────────────────────────────────────────────────


@defect
def rerank():
    class Broken(ToyHandler):
        async def rerank(self, loaded_model, pairs):
            found = await super().rerank(loaded_model, pairs)
            return Scores(sorted(found.scores), found.prompt_tokens)

    return Broken


@defect
def rerank__too_few():
    class Broken(ToyHandler):
        async def rerank(self, loaded_model, pairs):
            return await super().rerank(loaded_model, pairs[:3])

    return Broken


@defect
def rerank__cut():
    class Broken(ToyHandler):
        async def rerank(self, loaded_model, pairs):
            return await super().rerank(loaded_model, [(a, b[:100]) for a, b in pairs])

    return Broken


@defect
def rerank__unclaimed():
    class Broken(ToyHandler):
        def capabilities(self):
            return dataclasses.replace(super().capabilities(), rerank=False)

    return Broken


# ── hygiene ──────────────────────────────────────────────────────────────────────────────────────


@defect
def loop_is_free():
    class Broken(ToyHandler):
        async def prefill(self, model, prompt, request):
            if len(prompt) > 150 and request.model_id.endswith("-own"):
                time.sleep(1.6)  # noqa: ASYNC251 - the defect
            await super().prefill(model, prompt, request)

    return Broken


@defect
def loop_is_free__for_good():
    class Broken(ToyHandler):
        async def prefill(self, model, prompt, request):
            if len(prompt) > 150 and request.model_id.endswith("-own"):
                time.sleep(12)  # noqa: ASYNC251 - the defect
            await super().prefill(model, prompt, request)

    return Broken


@defect
def no_leaked_tasks():
    class Broken(ToyHandler):
        async def generate_tokens(self, loaded_model, request):
            kept = loaded_model.model_object.notes.setdefault("tasks", [])
            kept.append(asyncio.create_task(asyncio.sleep(60)))
            async for step in super().generate_tokens(loaded_model, request):
                yield step

    return Broken
