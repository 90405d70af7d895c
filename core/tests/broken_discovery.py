"""The toy runtime with one defect at a time: of how a handler is found, asked and loaded."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

from broken_table import defect
from toy_runtime import ToyHandler, ToyModel

from engineroom import (
    ConfigurationError,
)

# ── discovery ────────────────────────────────────────────────────────────────────────────────────


@defect
def handler_is_valid():
    class Broken(ToyHandler):
        async def stream_infer(self, loaded_model, request):  # not a generator
            return "text"

    return Broken


@defect
def handler_is_valid__needs_arguments():
    class Broken(ToyHandler):
        def __init__(self, path):
            self.path = path

    return Broken


@defect
def capabilities():
    class Broken(ToyHandler):
        def capabilities(self):
            return {"params": ["temperature"]}

    return Broken


@defect
def capabilities__change():
    class Broken(ToyHandler):
        def capabilities(self):
            self.asked = getattr(self, "asked", 0) + 1
            return dataclasses.replace(super().capabilities(), tools=self.asked % 2 == 0)

    return Broken


@defect
def can_load():
    class Broken(ToyHandler):
        def can_load(self, config):
            return None if super().can_load(config) else False

    return Broken


@defect
def can_load_foreign():
    class Broken(ToyHandler):
        def can_load(self, config):
            return super().can_load(config) or Path(config.source).is_file()

        async def load_model(self, config):
            if not config.source.startswith("toy:"):
                raise ConfigurationError("no toy")
            return await super().load_model(config)

    return Broken


@defect
def can_load_foreign__raises():
    class Broken(ToyHandler):
        def can_load(self, config):
            Path(config.source).stat() if "\0" in config.source else None
            return super().can_load(config)

    return Broken


@defect
def model_loads():
    class Broken(ToyHandler):
        async def load_model(self, config):
            loaded = await super().load_model(config)
            return loaded.model_copy(update={"model_id": "another"})

    return Broken


@defect
def model_loads__raises():
    class Broken(ToyHandler):
        async def load_model(self, config):
            if config.source.startswith("toy:") and not set(config.options) - {"n_ctx"}:
                raise RuntimeError("out of luck")
            return await super().load_model(config)

    return Broken


@defect
def model_loads__exits():
    class Broken(ToyHandler):
        async def load_model(self, config):
            if config.source.startswith("toy:") and not set(config.options) - {"n_ctx"}:
                raise SystemExit(3)
            return await super().load_model(config)

    return Broken


@defect
def can_handle__exits():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            if isinstance(loaded_model.model_object, ToyModel):
                raise SystemExit(3)
            return False

    return Broken


@defect
def can_handle():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return 1 if isinstance(loaded_model.model_object, ToyModel) else False

    return Broken


@defect
def can_handle_foreign():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return loaded_model.model_object is not None

    return Broken


@defect
def can_handle_foreign__of_nobody():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return loaded_model.handler_name in (self.name, None)

    return Broken


@defect
def can_handle_foreign__raises():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            return loaded_model.model_object.options.n_ctx > 0

    return Broken


@defect
def questions_are_cheap():
    class Broken(ToyHandler):
        def health(self, loaded_model):
            if not loaded_model.model_object.running:
                time.sleep(0.11)
            return super().health(loaded_model)

    return Broken


@defect
def questions_change_nothing():
    class Broken(ToyHandler):
        def can_handle(self, loaded_model):
            if isinstance(loaded_model.model_object, ToyModel):
                loaded_model.memory_bytes = (loaded_model.memory_bytes or 0) + 2**40
            return super().can_handle(loaded_model)

    return Broken


@defect
def questions_change_nothing__thread():
    class Broken(ToyHandler):
        def can_load(self, config):
            if not config.model_id.endswith("-own"):
                threading.Thread(target=threading.Event().wait, args=(3,), daemon=True).start()
            return super().can_load(config)

    return Broken


@defect
def estimate_memory():
    class Broken(ToyHandler):
        def estimate_memory(self, config):
            return 1024

    return Broken


@defect
def health():
    class Broken(ToyHandler):
        def health(self, loaded_model):
            return {"ok": True}

    return Broken


@defect
def health__not_ok():
    class Broken(ToyHandler):
        def health(self, loaded_model):
            busy = super().health(loaded_model)
            return dataclasses.replace(busy, ok=busy.num_requests_running > 0, kv_cache_usage=None)

    return Broken


@defect
def missing_source():
    class Broken(ToyHandler):
        async def load_model(self, config):
            if not self.can_load(config):
                raise FileNotFoundError(config.source)
            return await super().load_model(config)

    return Broken


@defect
def unknown_option():
    class Broken(ToyHandler):
        async def load_model(self, config):
            known = {k: v for k, v in config.options.items() if not k.startswith("no_such")}
            loaded = await super().load_model(config.model_copy(update={"options": known}))
            return loaded.model_copy(update={"config": config})

    return Broken
