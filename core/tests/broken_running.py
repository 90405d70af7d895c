"""The toy runtime with one defect at a time: of requests at once, of cancelling and of faults."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import ClassVar

from broken_table import defect
from toy_runtime import ToyHandler

from engineroom import (
    ConfigurationError,
    ContextLengthExceededError,
    HandlerHealth,
    LoadedModel,
)

# ── concurrency ──────────────────────────────────────────────────────────────────────────────────


@defect
def requests_do_not_mix():
    class Broken(ToyHandler):
        """A batch of more than five takes its penalties from the request that came last."""

        def adjusted(self, params, logits, prompt, new):
            if self.model.running > 5:
                params = self.last
            return super().adjusted(params, logits, prompt, new)

        def check(self, model, request, prompt):
            super().check(model, request, prompt)
            self.model, self.last = model, request.params

    return Broken


@defect
def cache_scopes_apart():
    class Broken(ToyHandler):
        def scope(self, request):
            return ""

    return Broken


@defect
def cache_scopes_apart__of_those_without():
    class Broken(ToyHandler):
        def scope(self, request):
            return request.cache_salt or "conformance-1"

    return Broken


@defect
def short_overtakes_long():
    class Broken(ToyHandler):
        """One request at a time, and says nothing of those that wait."""

        @asynccontextmanager
        async def slot(self, model, request):
            async with super().slot(model, request):
                lock = model.notes.setdefault("lock", asyncio.Lock())
                async with lock:
                    yield

    return Broken


@defect
def queue_bound():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            options = model.options
            model.options = options.model_copy(update={"max_queue": 1000})
            try:
                async with super().slot(model, request):
                    yield
            finally:
                model.options = options

    return Broken


@defect
def queue_bound__untyped():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            if model.slots.locked() and model.waiting >= model.options.max_queue:
                raise asyncio.QueueFull
            async with super().slot(model, request):
                yield

    return Broken


# ── cancellation ─────────────────────────────────────────────────────────────────────────────────


@defect
def cancel_by_task():
    class Broken(ToyHandler):
        """Swallows the cancellation while it decodes."""

        async def decode(self, model, request):
            try:
                await super().decode(model, request)
            except asyncio.CancelledError:
                pass

    return Broken


@defect
def cancel_by_task__goes_on():
    class Broken(ToyHandler):
        """Turns in a circle once it was cancelled."""

        async def decode(self, model, request):
            stubborn = False
            while True:
                try:
                    await super().decode(model, request)
                except asyncio.CancelledError:
                    stubborn = True
                if not stubborn:
                    return

    return Broken


@defect
def cancel_by_aclose():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):
            inner = super().stream_infer(loaded_model, request)
            try:
                async for chunk in inner:
                    yield chunk
            except GeneratorExit:
                await inner.aclose()
                if not request.timeout_s:
                    yield "one more"

    return Broken


@defect
def cancel_by_deadline():
    class Broken(ToyHandler):
        """Has a deadline of its own, and does not end before."""

        async def stream_infer(self, loaded_model, request):
            inner = super().stream_infer(loaded_model, request)
            try:
                async for chunk in inner:
                    yield chunk
            finally:
                await inner.aclose()
                if request.timeout_s:
                    await asyncio.sleep(60)

    return Broken


@defect
def cancel_in_prefill():
    class Broken(ToyHandler):
        async def prefill(self, model, prompt, request):
            try:
                await super().prefill(model, prompt, request)
            except asyncio.CancelledError:
                if len(prompt) < 150:
                    raise

    return Broken


@defect
def cancel_while_queued():
    class Broken(ToyHandler):
        """A request that leaves the queue takes the one that runs with it."""

        @asynccontextmanager
        async def slot(self, model, request):
            ready = False
            try:
                async with super().slot(model, request):
                    ready = True
                    yield
            except asyncio.CancelledError:
                if not ready and model.options.n_parallel == 1:
                    model.notes["stop"] = True
                raise

        async def generate_tokens(self, loaded_model, request):
            model = loaded_model.model_object
            async for step in super().generate_tokens(loaded_model, request):
                if model.notes.pop("stop", False):
                    step.finish = "eos_token"
                yield step

    return Broken


@defect
def cancel_while_queued__stays():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            ready = False
            try:
                async with super().slot(model, request):
                    ready = True
                    yield
            except asyncio.CancelledError:
                if not ready:
                    model.waiting += 1
                raise

    return Broken


@defect
def slots_return():
    class Broken(ToyHandler):
        @asynccontextmanager
        async def slot(self, model, request):
            try:
                async with super().slot(model, request):
                    yield
            except (asyncio.CancelledError, GeneratorExit):
                model.notes["lost"] = model.notes.get("lost", 0) + 1
                raise

        def health(self, loaded_model):
            found = super().health(loaded_model)
            lost = loaded_model.model_object.notes.get("lost", 0)
            return HandlerHealth(
                ok=found.ok,
                num_requests_running=found.num_requests_running + lost,
                num_requests_waiting=found.num_requests_waiting,
            )

    return Broken


@defect
def neighbours_go_on():
    class Broken(ToyHandler):
        """A request that is stopped takes along those that run beside it."""

        async def generate_tokens(self, loaded_model, request):
            notes = loaded_model.model_object.notes
            begun = notes.setdefault("epoch", 0)
            last = False
            try:
                async for step in super().generate_tokens(loaded_model, request):
                    last = step.finish is not None or bool(request.stop_sequences)
                    if notes["epoch"] != begun:
                        step.finish = "eos_token"
                    yield step
            except (GeneratorExit, asyncio.CancelledError):
                if loaded_model.model_object.running > 1 and not last:
                    notes["epoch"] += 1
                raise

    return Broken


# ── faults ───────────────────────────────────────────────────────────────────────────────────────


@defect
def prompt_too_long():
    class Broken(ToyHandler):
        """Cuts the prompt."""

        def tokens(self, loaded_model, request):
            return super().tokens(loaded_model, request)[-loaded_model.max_context_tokens + 8 :]

    return Broken


@defect
def prompt_too_long__untyped():
    class Broken(ToyHandler):
        """Says so in words alone."""

        def check(self, model, request, prompt):
            try:
                super().check(model, request, prompt)
            except ContextLengthExceededError as error:
                raise ConfigurationError(error.message) from None

    return Broken


@defect
def failing_request():
    class Broken(ToyHandler):
        """One that is refused ends the batch."""

        def check(self, model, request, prompt):
            try:
                super().check(model, request, prompt)
            except ConfigurationError:
                model.notes["failed"] = model.running > 0
                raise

        async def generate_tokens(self, loaded_model, request):
            notes = loaded_model.model_object.notes
            async for step in super().generate_tokens(loaded_model, request):
                if notes.pop("failed", False):
                    step.finish = "eos_token"
                yield step

    return Broken


@defect
def unload_in_use():
    class Broken(ToyHandler):
        async def decode(self, model, request):
            await asyncio.sleep(0)
            if model.unloaded:
                await asyncio.Event().wait()

    return Broken


@defect
def unload_in_use__untyped():
    class Broken(ToyHandler):
        async def decode(self, model, request):
            await asyncio.sleep(0)
            if model.unloaded:
                raise AttributeError("'NoneType' object has no attribute 'decode'")

    return Broken


@defect
def load_cycles():
    class Broken(ToyHandler):
        def __init__(self):
            self.models: list[LoadedModel] = []

        async def load_model(self, config):
            loaded = await super().load_model(config)
            self.models.append(loaded)
            return loaded

    return Broken


@defect
def load_cycles__thread():
    class Broken(ToyHandler):
        async def load_model(self, config):
            threading.Thread(target=threading.Event().wait, args=(3,), daemon=True).start()
            return await super().load_model(config)

    return Broken


@defect
def load_cycles__memory():
    class Broken(ToyHandler):
        kept: ClassVar[list[bytes]] = []

        async def load_model(self, config):
            if config.model_id.endswith("-own"):
                self.kept.append(b"\x01" * (16 << 20))
            return await super().load_model(config)

    return Broken
