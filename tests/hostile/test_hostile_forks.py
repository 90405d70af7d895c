"""A fork beside an engine that runs: the child is told whose it is, and can load one of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the models are made with numpy")

from hostile_models import TALKS, write_folder, write_gguf
from test_hostile_requests import NEEDED

SCRIPT = Path(__file__).parents[2] / "core/tests/forked_service.py"


@pytest.mark.parametrize(
    ("runtime", "handler"),
    [
        ("llamacpp", "engineroom_llamacpp:LlamaCppHandler"),
        pytest.param(
            "hf_transformers",
            "engineroom_hf_transformers:HuggingFaceTransformersHandler",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_child_is_told_and_can_have_its_own(tmp_path, runtime, handler):
    for module in NEEDED[runtime]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    if runtime == "llamacpp":
        source = write_gguf(tmp_path / "model.gguf", 512, **TALKS)
    else:
        source = write_folder(tmp_path / "model", 512, **TALKS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), handler, str(source)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    came = json.loads(done.stdout)
    for name, (kind, message) in {**came["old"], **came["blocking"]}.items():
        assert (name, kind) == (name, "ConfigurationError"), message
        assert f"belongs to process {came['pid']}," in message
    assert came["unused"] == came["new"] == ["done", came["text"]]
    assert came["again"] == came["text"]
