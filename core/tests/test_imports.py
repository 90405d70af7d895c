"""What importing costs, and which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import engineroom
import engineroom.engine

PACKAGE = Path(engineroom.__file__).parent
HEAVY = {
    "fastapi",
    "huggingface_hub",
    "hypothesis",
    "llama_cpp",
    "numpy",
    "opentelemetry",
    "prometheus_client",
    "pytest",
    "rich",
    "ruamel",
    "starlette",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
    "vllm",
}


@pytest.mark.parametrize(
    "module", ["engineroom", "engineroom.testing", "engineroom.api", "engineroom.engine"]
)
def test_importing_core_loads_nothing_heavy(module):
    code = (
        f"import sys, {module}; loaded = {{m.partition('.')[0] for m in sys.modules}}; "
        f"print(','.join(sorted({HEAVY!r} & loaded)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", [engineroom, engineroom.engine], ids=lambda p: p.__name__)
def test_all_is_what_the_stub_says(package):
    tree = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    declared = [
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert None not in declared
    assert sorted(declared) == sorted(package.__all__)
    for name in declared:
        assert getattr(package, name) is not None


def test_names_are_imported_when_they_are_used_and_kept():
    code = (
        "import sys, engineroom; assert 'pydantic' not in sys.modules; "
        "first = engineroom.GenerationParams; assert 'pydantic' in sys.modules; "
        "assert vars(engineroom)['GenerationParams'] is first; "
        "assert set(engineroom.__all__) <= set(dir(engineroom)); "
        "from engineroom import *; assert LLMInferenceService is engineroom.LLMInferenceService; "
        "assert engineroom.__version__ == __import__('importlib.metadata').metadata"
        ".version('engineroom')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute .Nonsense."):
        _ = engineroom.Nonsense


LIGHT = [
    path.relative_to(PACKAGE)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("cli", "server", "otel.py", "__main__.py")
]
"""Modules whose dependencies are always there."""


@pytest.mark.parametrize("path", LIGHT, ids=str)
def test_every_name_that_a_module_gives_out_is_there(path):
    dotted = ".".join(("engineroom", *path.with_suffix("").parts))
    module = __import__(dotted.removesuffix(".__init__"), fromlist=["*"])
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), name


@pytest.mark.parametrize("stub", sorted(PACKAGE.rglob("__init__.pyi")), ids=str)
def test_no_public_name_is_that_of_a_module_beside_it(stub):
    """Else it would depend on what was imported before whether the name is the module."""
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    names = {a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert names & {path.stem for path in stub.parent.iterdir()} == set()


# ── in a zip file ────────────────────────────────────────────────────────────────────────────


def zipped(folder: Path, *, stubs: bool = True) -> Path:
    path = folder / "engineroom.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in PACKAGE.rglob("*.py*"):
            if file.suffix == ".py" or (stubs and file.suffix == ".pyi"):
                archive.write(file, file.relative_to(PACKAGE.parent))
    return path


def test_it_is_imported_from_a_zip_file(tmp_path):
    code = """
import sys
import zipfile
sys.path.insert(0, sys.argv[1])
import engineroom, engineroom.engine, engineroom.memory, engineroom.prompts, engineroom.sources
assert engineroom.__file__.startswith(sys.argv[1]), engineroom.__file__
assert engineroom.sources.is_gguf.__module__ == "engineroom.sources.gguf"
from engineroom import InferenceRequest, LLMInferenceService, LLMModelManager
from engineroom.testing import EchoHandler
manager = LLMModelManager(config=[{"model_id": "m", "source": "echo:"}])
with LLMInferenceService(manager, handlers=[EchoHandler()]) as service:
    print(service.run(InferenceRequest(model_id="m", prompt="one two")).generated_text)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, zipped(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("one two\n", "")


def test_without_its_stubs_it_says_what_is_missing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import engineroom"
    packed = zipped(tmp_path, stubs=False)
    done = subprocess.run(
        [sys.executable, "-c", code, packed], capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the file __init__.pyi of engineroom is missing")
    assert "--collect-data engineroom" in last
