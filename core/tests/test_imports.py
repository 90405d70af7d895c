"""What importing costs, and which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engineroom

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

LAYERS = [
    {"errors", "suggestions", "decode_loop", "doorbell"},
    {"units", "memory", "machine", "hub_partial"},
    {"schemas", "text", "sources", "meter"},
    {"hookspecs", "options", "hub", "mailbox"},
    {"handler"},
    {"generation", "plugins", "api", "validation", "telemetry", "otel"},
    {"registry", "chunks"},
    {"config", "survey", "batching"},
    {"entries", "reload"},
    {"room"},
    {"loading", "plan"},
    {"lives"},
    {"manager"},
    {"scope", "triggers"},
    {"streams"},
    {"blocking"},
    {"service"},
    {""},  # the package itself, which gives the public names out
    {"testing"},
    {"server"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@pytest.mark.parametrize("module", ["engineroom", "engineroom.testing", "engineroom.api"])
def test_importing_core_loads_nothing_heavy(module):
    code = (
        f"import sys, {module}; loaded = {{m.partition('.')[0] for m in sys.modules}}; "
        f"print(','.join(sorted({HEAVY!r} & loaded)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The top-level part of the package that a file belongs to."""
    inside = path.relative_to(PACKAGE)
    first = inside.parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> set[str]:
    """Parts of the package that a file imports when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # what only a type checker sees counts for nothing
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module or ""]
            if node.module == "engineroom":
                names = [
                    f"engineroom.{a.name}" if a.name in LEVEL else "engineroom" for a in node.names
                ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "engineroom":
                found.add(rest.partition(".")[0])
    return found


def test_every_module_has_its_place():
    assert {part(path) for path in modules()} <= set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    mine = part(path)
    for other in imported(path) - {mine}:
        assert LEVEL[other] < LEVEL[mine], f"{mine or 'engineroom'} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_core_does_not_import_its_test_kit_nor_a_plugin(path):
    text = path.read_text(encoding="utf-8")
    # The command that runs the kit, which it imports when it runs.
    if part(path) != "testing" and path != PACKAGE / "cli" / "conformance.py":
        assert "testing" not in imported(path)
    for node in ast.walk(ast.parse(text)):
        names = [getattr(node, "module", None) or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith("engineroom_") for name in names)


def test_all_is_what_is_public():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    declared = {  # for type checkers
        alias.name: (node.module or "").removeprefix("engineroom.")
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(declared) == sorted(engineroom.__all__)
    assert declared == engineroom._MODULES


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
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = engineroom.Nonsense


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if part(p) not in ("cli", "server", "otel", "__main__")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_every_name_that_a_module_gives_out_is_there(path):
    dotted = ".".join(("engineroom", *path.relative_to(PACKAGE).with_suffix("").parts))
    module = __import__(dotted.removesuffix(".__init__"), fromlist=["*"])
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), name
