"""The plugin stands on public names alone, and loads its runtime only when a model is loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engineroom
import engineroom.engine
import engineroom.prompts
import engineroom.testing
import engineroom_ctranslate2

PUBLIC = {
    module.__name__: set(module.__all__)
    for module in (engineroom, engineroom.engine, engineroom.prompts, engineroom.testing)
}
FILES = [
    *sorted(Path(engineroom_ctranslate2.__file__).parent.glob("*.py")),
    *sorted(Path(__file__).parent.glob("*.py")),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_only_public_names_of_engineroom_are_used(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
                assert not [
                    m for m in modules if m.split(".")[0] == "engineroom" and m not in PUBLIC
                ]
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] == "engineroom":
                    assert {alias.name for alias in names} <= PUBLIC.get(module, set()), module
            case ast.ImportFrom(level=level):
                assert level == 0


def test_importing_the_plugin_does_not_load_its_runtime():
    code = (
        "import sys, engineroom_ctranslate2 as p; p.CTranslate2Handler().capabilities();"
        "print(*sorted({'ctranslate2', 'tokenizers', 'jinja2', 'numpy', 'gguf'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_process_that_unloads_nothing_ends_well(tiny_model):
    code = f"""
from engineroom import GenerationParams, InferenceRequest, LLMInferenceService, LLMModelManager
from engineroom_ctranslate2 import CTranslate2Handler
model = {{"model_id": "m", "source": {str(tiny_model)!r}, "options": {{"n_threads": 1}}}}
service = LLMInferenceService(LLMModelManager(config={{"models": [model]}}),
                              handlers=[CTranslate2Handler()])
stream = service.stream_sync(InferenceRequest(
    model_id="m", prompt="x", params=GenerationParams(temperature=0), stream=True))
print(len(next(iter(stream))) > 0)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
