"""What lives long is set aside from the garbage collector, and taken back before a model goes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from server_doubles import TalkHandler

from engineroom.server import long_lived


@pytest.fixture(autouse=True)
def every_collection_is_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(long_lived, "LONG_S", 0.0)
    gc.unfreeze()
    yield
    assert gc.get_freeze_count() == 0


def test_what_survives_is_set_aside_until_the_server_ends(start):
    with start() as run:
        gc.collect()
        frozen = gc.get_freeze_count()
        assert frozen > 10_000
        mine = [[] for _ in range(5000)]
        gc.collect()
        assert gc.get_freeze_count() >= frozen + 5000
        assert httpx.get(run.url + "/healthz").status_code == 200
        del mine


class Cyclic(TalkHandler):
    """Whose models only the collector frees, as modules of torch are."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen_at_unload: list[int] = []
        self.freed = threading.Event()

    async def load_model(self, config):
        model = await super().load_model(config)
        self.seen_model = None
        return model

    async def unload_model(self, loaded_model):
        self.frozen_at_unload.append(gc.get_freeze_count())
        gc.collect()
        assert gc.get_freeze_count() == 0


def test_it_is_taken_back_before_a_model_goes(start):
    handler = Cyclic()
    with start(handler=handler) as run:
        gc.collect()
        assert gc.get_freeze_count() > 10_000
        answer = httpx.post(run.url + "/v1/admin/models/m/unload")
        assert answer.json()["state"] == "unloaded", answer.text
        assert handler.frozen_at_unload == [0]
        gc.collect()
        assert gc.get_freeze_count() > 10_000


def test_short_collections_set_nothing_aside(start, monkeypatch):
    monkeypatch.setattr(long_lived, "LONG_S", 1e9)
    with start():
        gc.collect()
        assert gc.get_freeze_count() == 0
