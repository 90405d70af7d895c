"""A fake runtime with memory: models that are as large, slow and faulty as a test says."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict

from core_doubles import FakeProbe, bare_registry

from engineroom import LLMModelManager, LoadedModel, TokenHandler, TokenStep, hookimpl


class FakeSizedHandler(TokenHandler):
    """A fake: says the prompt back; ``options: {size: bytes}`` is what a model takes.

    :param gated: ``load`` and ``unload`` wait for ``end(kind, model)`` where they are named here.
    """

    def __init__(self, name: str = "sized", *, gated: tuple[str, ...] = ()) -> None:
        self.name = name
        self.gated = gated
        self.gates: dict[tuple[str, str], asyncio.Future] = {}
        self.loads: Counter[str] = Counter()
        self.unloads: Counter[str] = Counter()
        self.failing: dict[str, list[Exception]] = defaultdict(list)
        self.in_memory: Counter[str] = Counter()
        self.most_bytes = 0
        self.bytes = 0
        self.probe: FakeProbe | None = None

    def can_load(self, config):
        return (config.source or "").startswith(f"{self.name}:")

    def can_handle(self, loaded_model):
        return loaded_model.handler_name == self.name

    def estimate_memory(self, config):
        size = config.options.get("size")
        return None if size is None else {config.options.get("device", "cpu"): size}

    async def _gate(self, kind: str, name: str) -> None:
        if kind in self.gated:
            gate = self.gates[kind, name] = asyncio.get_running_loop().create_future()
            try:
                await gate
            finally:
                del self.gates[kind, name]

    def end(self, kind: str, name: str, error: Exception | None = None) -> None:
        gate = self.gates[kind, name]
        if error is None:
            gate.set_result(None)
        else:
            gate.set_exception(error)

    async def load_model(self, config):
        self.loads[config.model_id] += 1
        await self._gate("load", config.model_id)
        if self.failing[config.model_id]:
            raise self.failing[config.model_id].pop(0)
        size = config.options.get("takes", config.options.get("size", 0))
        self._use(size)
        self.in_memory[config.model_id] += 1
        return LoadedModel(
            model_id=config.model_id,
            model_object=self.name,
            config=config,
            memory_bytes=config.options.get("says", size),
        )

    async def unload_model(self, loaded_model):
        self.unloads[loaded_model.model_id] += 1
        self.in_memory[loaded_model.model_id] -= 1
        options = loaded_model.config.options
        self._use(options.get("leaks", 0) - options.get("takes", options.get("size", 0)))
        await self._gate("unload", loaded_model.model_id)
        if options.get("unload_fails"):
            raise OSError("asked to fail in unloading")

    def _use(self, size: int) -> None:
        self.bytes += size
        self.most_bytes = max(self.most_bytes, self.bytes)
        if self.probe is not None:
            self.probe.usage["cpu"] = self.probe.usage.get("cpu", 0) + size

    async def generate_tokens(self, loaded_model, request):
        for number, word in enumerate((request.prompt or "").split(" ")):
            await asyncio.sleep(0)
            yield TokenStep((number,), word if number == 0 else f" {word}")


class FakeTransitions:
    """An observer that remembers every transition."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.unloaded: list[dict[str, int]] = []
        self.reports: list[object] = []

    @hookimpl
    def engineroom_model_state_changed(self, model_id, old_state, new_state, reason):
        assert reason
        self.seen.append((model_id, old_state, new_state))

    @hookimpl
    def engineroom_model_unloaded(self, not_returned):
        self.unloaded.append(dict(not_returned))

    @hookimpl
    def engineroom_deployment_reloaded(self, report):
        self.reports.append(report)


def model(model_id: str, size: int | None = None, **fields) -> dict:
    options = dict(fields.pop("options", {}))
    if size is not None:
        options["size"] = size
    if "variants" in fields:
        return {"model_id": model_id, **fields}
    return {"model_id": model_id, "source": "sized:", "options": options, **fields}


def manager_of(
    *models: dict, memory: dict | None = None, handlers=None, probe=None, **deployment
) -> LLMModelManager:
    registry = bare_registry()
    for handler in handlers or [FakeSizedHandler()]:
        registry.register(handler)
    return LLMModelManager(
        config={"models": list(models), "memory": memory or {}, **deployment},
        registry=registry,
        probe=probe or FakeProbe(),
    )


def status(manager: LLMModelManager, model_id: str):
    (found,) = [s for s in manager.list_models() if s.model_id == model_id]
    return found


def states(manager: LLMModelManager) -> dict[str, str]:
    return {s.model_id: s.state for s in manager.list_models()}


def cpu(manager: LLMModelManager):
    (found,) = [d for d in manager.memory() if d.device == "cpu"]
    return found
