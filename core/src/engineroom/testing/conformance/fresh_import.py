"""What comes with importing a plugin, seen in a process that has imported nothing yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from engineroom.testing.conformance.outcomes import broken

__all__ = ["RUNTIMES", "loaded_by"]

RUNTIMES: Final = (
    "torch",
    "transformers",
    "tensorflow",
    "jax",
    "llama_cpp",
    "vllm",
    "ctranslate2",
    "onnxruntime",
    "onnxruntime_genai",
    "mlx",
    "mlx_lm",
    "exllamav2",
    "tensorrt_llm",
    "openvino",
    "sglang",
)
"""Modules that no plugin may load by being imported; a suite adds its own runtime's."""

_ASK: Final = """
import importlib, json, sys
task = json.load(sys.stdin)
sys.path[:] = task["path"]
names = set(task["modules"])
try:
    holder = importlib.import_module(task["module"])
except ModuleNotFoundError as error:
    print(json.dumps({"absent": str(error)}))
    raise SystemExit
def loaded():
    return sorted(n for n in names if n in sys.modules)
result = {"import": loaded()}
for part in task["class"].split("."):
    holder = getattr(holder, part, None)
if holder is not None:
    from engineroom import LoadedModel, ModelConfig
    try:
        handler = holder()
    except TypeError:
        handler = None
    if handler is not None:
        config = ModelConfig(model_id="m", source="/no/such/place/model.unknown")
        handler.capabilities()
        handler.can_load(config)
        handler.can_handle(LoadedModel(model_id="m", model_object=object(), config=config))
        result["questions"] = loaded()
print(json.dumps(result))
"""


def loaded_by(handler: type[object], modules: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Which of the modules come with importing a handler's module, in a fresh process.

    :param limit_s: seconds for it, where that is more than five minutes.
    :returns: names under ``import`` and, if the handler can be made and asked about models,
        under ``questions``; or why the module cannot be found, under ``absent``.
    :raises BrokenRuleError: it cannot be imported.
    """
    task = {
        "path": [str(Path(entry or os.curdir).absolute()) for entry in sys.path],
        "module": handler.__module__,
        "class": handler.__qualname__,
        "modules": list(modules),
    }
    done = subprocess.run(  # noqa: S603 - this interpreter, and a program of ours
        [sys.executable, "-c", _ASK],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=max(300.0, limit_s),
        check=False,
    )
    if done.returncode != 0:
        broken(
            did=f"import {handler.__module__}, in a fresh process",
            expected="that it can be imported",
            saw=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "an exit",
        )
    loaded: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return loaded
