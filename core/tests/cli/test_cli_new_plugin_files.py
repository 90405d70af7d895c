"""What `engineroom new-plugin` writes: sound files, and a handler that answers."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import engineroom
from engineroom.cli.new_plugin import plugin_names, render

LONGEST = "x" * 14 + "-" + "y" * 15


@pytest.fixture(params=["b", "tensor-lite", LONGEST])
def plugin(request, tmp_path: Path) -> Path:
    return write_plugin(tmp_path, request.param)


def write_plugin(folder: Path, name: str, **options: str) -> Path:
    root = folder / plugin_names(name).distribution
    for path, text in render(plugin_names(name), **options):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


FILES = {
    ".github/workflows/tests.yml",
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "src/engineroom_foo/__init__.py",
    "src/engineroom_foo/handler.py",
    "src/engineroom_foo/options.py",
    "src/engineroom_foo/py.typed",
    "src/engineroom_foo/runtime.py",
    "src/engineroom_foo/sampling.py",
    "src/engineroom_foo/toy.txt",
    "tests/test_conformance.py",
    "tests/test_handler.py",
}


def test_the_files():
    files = {path.as_posix(): text for path, text in render(plugin_names("foo"))}
    assert set(files) == FILES
    assert files.pop("src/engineroom_foo/py.typed") == ""
    for path, text in files.items():
        assert "@@" not in text and "PACKAGE" not in path, path
        assert text.endswith("\n") and not text.endswith("\n\n"), path
    assert "${{ matrix.os }}" in files[".github/workflows/tests.yml"]
    assert files[".github/workflows/tests.yml"].count("${{") == 2
    assert len(files["src/engineroom_foo/handler.py"].splitlines()) < 400


def test_the_workflow_runs_what_the_readme_says():
    files = {path.as_posix(): text for path, text in render(plugin_names("foo"))}
    workflow = YAML(typ="safe").load(files[".github/workflows/tests.yml"])
    steps = [step.get("run", "") for step in workflow["jobs"]["tests"]["steps"]]
    for command in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest"):
        assert any(command in step for step in steps) and command in files["README.md"]


def test_the_metadata():
    files = {path.as_posix(): text for path, text in render(plugin_names("foo"))}
    data = tomllib.loads(files["pyproject.toml"])
    project = data["project"]
    assert project["name"] == "engineroom-foo"
    assert project["license"] == "Apache-2.0"
    assert project["entry-points"] == {
        "engineroom.handlers": {"foo": "engineroom_foo.handler:FooHandler"},
        "engineroom.api": {"foo": "engineroom.api:v1"},
    }
    assert "engineroom[testing]" in data["dependency-groups"]["test"]
    version = engineroom.__version__.split(".")
    assert project["dependencies"][0].startswith(f"engineroom>={version[0]}.{version[1]},<")
    assert project["license-files"] == ["LICENSE"]


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("0.1.0", ">=0.1,<0.2"), ("0.12.3.dev1", ">=0.12,<0.13"), ("1.4.2", ">=1.4,<2")],
)
def test_it_asks_for_this_engineroom_and_what_is_compatible(monkeypatch, version, wanted):
    monkeypatch.setattr(engineroom, "__version__", version)
    files = {path.as_posix(): text for path, text in render(plugin_names("foo"))}
    assert f'    "engineroom{wanted}",\n' in files["pyproject.toml"]


def test_the_licence():
    files = {p.as_posix(): text for p, text in render(plugin_names("foo"))}
    assert "Apache License" in files["LICENSE"]
    own = Path(__file__).parents[2] / "LICENSE"
    assert files["LICENSE"] == own.read_text(encoding="utf-8")
    files = {p.as_posix(): text for p, text in render(plugin_names("foo"), "MIT OR Apache-2.0")}
    assert "REPLACE" in files["LICENSE"] and "MIT OR Apache-2.0" in files["LICENSE"]
    assert tomllib.loads(files["pyproject.toml"])["project"]["license"] == "MIT OR Apache-2.0"


def test_every_step_of_the_readme_is_marked_in_the_code():
    files = {p.as_posix(): text for p, text in render(plugin_names("foo"))}
    marked: dict[int, set[str]] = {}
    for path, text in files.items():
        for number in re.findall(r"# REPLACE (\d)", text):
            marked.setdefault(int(number), set()).add(Path(path).name)
    told = re.findall(
        r"^(\d)\. \*\*.*?\*\*(?: \(`(\S+?)`.*?\))?:?", files["README.md"], re.MULTILINE
    )
    assert sorted(marked) == list(range(1, len(told)))  # the last is what is left
    for number, file in told[:-1]:
        assert file in marked[int(number)], number


def test_the_readme_has_the_options_and_their_defaults():
    files = {p.as_posix(): text for p, text in render(plugin_names("foo"))}
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", files["README.md"], re.MULTILINE))
    tree = ast.parse(files["src/engineroom_foo/options.py"])
    fields = {
        node.target.id: ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
    }
    assert rows == fields


def test_the_python_files_compile(plugin):
    files = sorted(plugin.rglob("*.py"))
    assert len(files) == 7
    for file in files:
        compile(file.read_text(encoding="utf-8"), file, "exec")


def tool(plugin: Path, *command: str) -> None:
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed here")
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=plugin,
        env={**os.environ, "MYPYPATH": str(plugin / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_is_content(plugin):
    tool(plugin, "ruff", "check", "--no-cache", ".")
    tool(plugin, "ruff", "format", "--no-cache", "--check", ".")


def test_mypy_is_content(tmp_path):
    tool(write_plugin(tmp_path, "foo"), "mypy", f"--cache-dir={tmp_path / 'cache'}")


ANSWER = """
import json, sys
from importlib.metadata import EntryPoint
import engineroom_foo
assert "engineroom_foo.runtime" not in sys.modules, "importing the plugin loads the runtime"

from engineroom import InferenceRequest, LLMInferenceService, LLMModelManager, ModelConfig
handler = EntryPoint("foo", sys.argv[1], "engineroom.handlers").load()()
assert EntryPoint("foo", "engineroom.api:v1", "engineroom.api").load() == handler.api_version
model = ModelConfig(model_id="toy", source="package:engineroom_foo/toy.txt")
with LLMInferenceService(LLMModelManager(config=[model]), handlers=[handler]) as service:
    fields = dict(model_id="toy", params={"temperature": 0, "max_new_tokens": 70})
    request = InferenceRequest(prompt="Stop, said the", stop_sequences=["🚢", "loud"], **fields)
    whole = service.run(request)
    whole.raise_for_error()
    assert "".join(service.stream_sync(request)) == whole.generated_text
    chat = InferenceRequest(messages=[{"role": "user", "content": "Who are you?"}], **fields)
    answer = service.run(chat)
    answer.raise_for_error()
    refused = service.run(InferenceRequest(model_id="toy", prompt="x", params={"num_beams": 2}))
print(json.dumps([whole.generated_text, whole.generated_tokens, answer.generated_text,
                  refused.error_message]))
"""


def test_the_handler_answers(tmp_path):
    plugin = write_plugin(tmp_path, "foo")
    data = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))
    entry = data["project"]["entry-points"]["engineroom.handlers"]["foo"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ANSWER, entry],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(plugin / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, tokens, answer, refused = json.loads(done.stdout)
    assert "engine room answered" in text
    assert tokens == 70
    assert answer
    assert "num_beams" in refused
