"""Plugins whose import or constructor raises whatever it likes, over HTTP with real sockets."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("numpy", reason="the models are made with numpy")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hostile_models import deployment
from test_hostile_engines import ask, served
from test_hostile_requests import NEEDED
from test_hostile_threads import RAISED

from engineroom import LLMModelManager


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("where", ["import", "constructor"])
def test_a_plugin_that_cannot_be_used(
    where: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The one that is installed for another runtime; the server begins, and serves its own."""
    for module in NEEDED["llamacpp"]:
        pytest.importorskip(module)
    pytest.importorskip("engineroom_hf_transformers")
    load: Any = EntryPoint.load

    def fail(*_: Any) -> Any:
        error = RAISED[name]()
        raise error

    def hostile(self: EntryPoint) -> Any:
        if self.name != "hf_transformers":
            return load(self)
        return fail() if where == "import" else type("Hostile", (), {"__init__": fail})

    monkeypatch.setattr(EntryPoint, "load", hostile)
    talks = deployment(tmp_path, "llamacpp", 256)["models"][0]
    other = {"model_id": "bad", "source": str(tmp_path), "runtime": "hf_transformers"}
    with served(LLMModelManager(config={"models": [talks, {**other, "preload": False}]})) as at:
        url = at[0]
        answers = [
            httpx.post(f"{url}/v1/completions", json=ask(model, 4, False), timeout=60)
            for model in ("m", "bad", "m")
        ]
        assert [answer.status_code == 200 for answer in answers] == [True, False, True]
        assert answers[1].json()["error"]["code"] == "model_not_loaded"
        assert "quarantined" in caplog.text and "Traceback" in caplog.text
        assert httpx.get(f"{url}/readyz").status_code == 200
