"""Stand-ins whose every step a test lets happen: no test has to wait for a clock."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from engineroom import (
    Capabilities,
    EngineRoomError,
    HandlerRegistry,
    InferenceError,
    InferenceHandler,
    InferenceRequest,
    InferenceResponse,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    Mailbox,
    ModelConfig,
    TokenHandler,
    TokenStep,
    hookimpl,
)
from engineroom.testing import EchoHandler, EchoModel


async def until(predicate: Callable[[], bool], what: str = "") -> None:
    """Let the loop turn until something is so; threads get their time, too."""
    for turn in range(2000):
        if predicate():
            return
        await asyncio.sleep(0 if turn < 200 else 0.001)
    raise AssertionError(f"never came to be: {what or predicate}")


class Recorder:
    """Observes, and remembers in what order."""

    def __init__(self) -> None:
        self.started: list[InferenceRequest] = []
        self.finished: list[tuple[InferenceRequest, InferenceResponse]] = []
        self.loaded: list[tuple[LoadedModel, float]] = []
        self.unloaded: list[tuple[LoadedModel, float]] = []
        self.rejected: list[tuple[InferenceRequest, str]] = []
        self.waited: list[tuple[InferenceRequest, float]] = []
        self.gaps: list[tuple[InferenceRequest, str, tuple[float, ...]]] = []
        self.transitions: list[tuple[str, str, str, str]] = []
        self.reloads: list[object] = []
        self.order: list[str] = []
        self.ended = asyncio.Event()

    @hookimpl
    def engineroom_request_started(self, request):
        self.started.append(request)
        self.order.append("started")

    @hookimpl
    def engineroom_request_rejected(self, request, reason):
        self.rejected.append((request, reason))

    @hookimpl
    def engineroom_request_waited(self, request, waited_s):
        self.waited.append((request, waited_s))

    @hookimpl
    def engineroom_request_gaps(self, request, handler, gaps_s):
        self.gaps.append((request, handler, gaps_s))

    @hookimpl
    def engineroom_request_finished(self, request, response):
        self.finished.append((request, response))
        self.order.append("finished")
        self.ended.set()

    @hookimpl
    def engineroom_model_loaded(self, loaded_model, duration_s):
        self.loaded.append((loaded_model, duration_s))
        self.order.append("loaded")

    @hookimpl
    def engineroom_model_unloaded(self, loaded_model, duration_s):
        self.unloaded.append((loaded_model, duration_s))
        self.order.append("unloaded")

    @hookimpl
    def engineroom_model_state_changed(self, model_id, old_state, new_state, reason):
        self.transitions.append((model_id, old_state, new_state, reason))

    @hookimpl
    def engineroom_deployment_reloaded(self, report):
        self.reloads.append(report)

    @property
    def reasons(self) -> list[str | None]:
        return [response.finish_reason for _, response in self.finished]

    def balanced(self) -> bool:
        started = sorted(request.request_id for request in self.started)
        return started == sorted(request.request_id for request, _ in self.finished)


class GateHandler(TokenHandler):
    """Says the prompt back, a word for each permit; loads and unloads wait where asked to."""

    name = "gate"

    def __init__(self, name: str = "gate", *, gated: frozenset[str] = frozenset()) -> None:
        self.name = name
        self.gated = gated  # of "load" and "unload"
        self.gates: dict[str, list[asyncio.Future[None]]] = defaultdict(list)
        self.loads = self.unloads = 0
        self.loading = 0
        self.permits: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(0))
        self.waiting: list[str] = []  # request ids that wait for their next token
        self.said: Counter[str] = Counter()
        self.ended: list[str] = []
        self.cleanup: Callable[[], object] | None = None
        self.swallow = False  # cancellation, as a careless runtime would
        self.seen: list[InferenceRequest] = []

    def capabilities(self) -> Capabilities:
        return Capabilities(params=frozenset({"max_new_tokens", "temperature"}))

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return loaded_model.model_object == self.name

    def can_load(self, config: ModelConfig) -> bool:
        return (config.source or "").startswith(f"{self.name}:")

    async def _gate(self, kind: str) -> None:
        if kind in self.gated:
            gate = asyncio.get_running_loop().create_future()
            self.gates[kind].append(gate)
            await gate

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        self.loads += 1
        self.loading += 1
        try:
            await self._gate("load")
        finally:
            self.loading -= 1
        return LoadedModel(model_id=config.model_id, model_object=self.name, config=config)

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        self.unloads += 1
        await self._gate("unload")

    def permit(self, request_id: str, tokens: int = 1) -> None:
        for _ in range(tokens):
            self.permits[request_id].release()

    def decoding(self, request: InferenceRequest, after: int = 0) -> bool:
        """Whether the request waits for its next token after so many."""
        key = request.request_id
        return key in self.waiting and self.said[key] == after

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        key = request.request_id
        self.seen.append(request)
        try:
            for number, word in enumerate((request.prompt or "").split(" ")):
                self.waiting.append(key)
                try:
                    await self.permits[key].acquire()
                except asyncio.CancelledError:
                    if not self.swallow:
                        raise
                finally:
                    self.waiting.remove(key)
                self.said[key] += 1
                yield TokenStep((number,), word if number == 0 else f" {word}")
        finally:
            self.ended.append(key)
            if self.cleanup is not None:
                result = self.cleanup()
                if result is not None:
                    await result


def through_mailboxes(handler: type[TokenHandler]) -> Callable[..., AsyncGenerator[Mailbox, None]]:
    """A handler's ``generate_tokens`` whose steps come through a mailbox.

    A task stands for the engine's thread.
    """
    steps_of = handler.generate_tokens

    async def generate_tokens(self, loaded_model, request):
        mailbox = Mailbox()

        async def work():
            try:
                async for step in steps_of(self, loaded_model, request):
                    mailbox.put(step)
                    await asyncio.sleep(0)
                mailbox.put(TokenStep(finish="eos_token"))
            except EngineRoomError as error:
                mailbox.put(error)
            except Exception as error:
                told = InferenceError(f"{type(error).__name__}: {error}")
                told.__cause__ = error
                mailbox.put(told)

        engine = asyncio.create_task(work())
        try:
            yield mailbox
        finally:
            engine.cancel()
            await asyncio.wait([engine])

    return generate_tokens


class PlainHandler(InferenceHandler):
    """An InferenceHandler whose two methods a test writes as functions."""

    name = "plain"

    def __init__(self, infer=None, stream=None, capabilities=None, name: str = "plain") -> None:
        self.name = name
        self._infer, self._stream, self._can = infer, stream, capabilities

    def can_handle(self, loaded_model):
        return loaded_model.model_object == self.name

    def can_load(self, config):
        return config.source == f"{self.name}:"

    async def load_model(self, config):
        return LoadedModel(model_id=config.model_id, model_object=self.name, config=config)

    def capabilities(self):
        return self._can or Capabilities(params=frozenset({"max_new_tokens"}))

    async def infer(self, loaded_model, request):
        return await self._infer(request)

    async def stream_infer(self, loaded_model, request):
        async for chunk in self._stream(request):
            yield chunk


class Source:
    """A ModelSource that is no manager."""

    def __init__(self, loaded_model: LoadedModel) -> None:
        self.loaded_model = loaded_model
        self.leases = 0

    @asynccontextmanager
    async def lease(self, model_id):
        self.leases += 1
        try:
            yield self.loaded_model
        finally:
            self.leases -= 1


def echo_config(model_id: str = "echo", **options) -> ModelConfig:
    return ModelConfig(model_id=model_id, source="echo:", options=options)


class FakeProbe:
    """Stands for the machine: has the memory that a test says, uses what it says."""

    def __init__(self, **capacity: int) -> None:
        self.capacities = capacity
        self.usage: dict[str, int] = {}
        self.children: dict[int, int] = {}
        """Main memory of child processes, by their ids."""

    def capacity(self, device):
        return self.capacities.get(device)

    def used(self, devices, without=()):
        found = {device: self.usage[device] for device in devices if device in self.usage}
        if "cpu" in found:
            found["cpu"] += sum(n for pid, n in self.children.items() if pid not in without)
        return found


def without_threads(manager: LLMModelManager) -> LLMModelManager:
    """Let what blocks be done on the loop at once: then every run takes the same way."""

    async def at_once(call):
        return call()

    manager._lifecycle.loader.in_thread = at_once
    return manager


class Bench:
    """A service over one model and one handler, observed."""

    def __init__(self, handler: InferenceHandler, *models: ModelConfig, **service) -> None:
        self.handler = handler
        self.manager = LLMModelManager(config=list(models))
        self.service = LLMInferenceService(self.manager, handlers=[handler], **service)
        self.recorder = Recorder()
        self.service.registry.register_plugin(self.recorder)

    def request(self, prompt: str = "one two three", **fields) -> InferenceRequest:
        fields.setdefault("model_id", self.manager.config.models[0].model_id)
        return InferenceRequest(prompt=prompt, **fields)

    def expire(self, request: InferenceRequest) -> None:
        """Let the request's deadline come now."""
        (scope,) = [s for s in self.service._running if s.request is request]
        timer, scope._timer = scope._timer, None
        arguments = timer._args
        timer.cancel()
        scope.interrupt(*arguments)

    def leases(self) -> int:
        return sum(status.leases for status in self.manager.list_models())

    def at_rest(self) -> bool:
        """Everything was given back, and each start has had its one end."""
        held = self.leases() or self.service.num_requests
        for status in self.manager.list_models():
            loaded = self.manager.get_loaded_model(status.model_id)
            if loaded is not None and isinstance(loaded.model_object, EchoModel):
                held = held or loaded.model_object.running or loaded.model_object.waiting
        return not held and self.recorder.balanced()


def echo_bench(*, service: dict | None = None, **options) -> Bench:
    return Bench(EchoHandler(), echo_config(**options), **(service or {}))


def gate_bench(handler: GateHandler | None = None, **service) -> Bench:
    handler = handler or GateHandler()
    config = ModelConfig(model_id="gate", source=f"{handler.name}:")
    return Bench(handler, config, **service)


def plain_bench(infer=None, stream=None, capabilities=None, **service) -> Bench:
    handler = PlainHandler(infer, stream, capabilities)
    return Bench(handler, ModelConfig(model_id="plain", source="plain:"), **service)


def bare_registry(**kwargs) -> HandlerRegistry:
    """A registry that sees nothing of what this environment has installed."""
    return HandlerRegistry(discover=False, environ={}, **kwargs)


async def drained(stream) -> list[str]:
    return [chunk async for chunk in stream]
