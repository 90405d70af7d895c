"""docs/plugin*.md say what the code has: every hook and method, every field, every rule.

Their blocks are run by test_docs.py, as those of the other documents are.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import engineroom
from engineroom import (
    Capabilities,
    HandlerHealth,
    InferenceHandler,
    LoadedModel,
    TokenHandler,
    TokenStep,
    api,
)
from engineroom.handlers.discovery import API_GROUP, HANDLER_GROUP, PLUGIN_GROUP
from engineroom.handlers.observer_hooks import ObserverSpec

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("plugins.md", "plugin-reference.md", "plugin-rules.md")
TEXT = "\n".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
OWNERS: dict[str, type] = {
    "InferenceHandler": InferenceHandler,
    "TokenHandler": TokenHandler,
    "Observers": ObserverSpec,
}
HELPERS = (
    *("parse_options", "resolve_source", "find_source", "did_you_mean", "request_logger"),
    "turn_of",
)


def section(title: str, level: int = 2, text: str = TEXT) -> str:
    """A section without its heading, to the next one that is no deeper."""
    pattern = rf"^#{{{level}}} {re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)"
    found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/plugin*.md have no section {title!r}"
    return found[1]


def rendered(function: Any) -> str:
    """A signature as the document has it, whatever the Python that prints it."""
    signature = inspect.signature(function)
    arguments = []
    for parameter in signature.parameters.values():
        text = parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {_as_written(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, function
        arguments.append(text)
    prefix = "async def" if inspect.iscoroutinefunction(function) else "def"
    arrow = _as_written(signature.return_annotation)
    line = f"{prefix} {function.__name__}({', '.join(arguments)}) -> {arrow}: ..."
    return ast.unparse(ast.parse(line))


def _as_written(annotation: Any) -> str:
    """Annotations of core are strings as their module has them; None is not."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def signatures(text: str) -> dict[str, str]:
    """Functions without a body in a text's blocks of Python."""
    found = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for node in ast.parse(block).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[node.name] = ast.unparse(node)
    return found


def methods(owner: type) -> list[str]:
    """What a class adds to the contract: its public methods that its bases do not have."""
    inherited = {name for base in owner.__mro__[1:] for name in vars(base)}
    return [
        name
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in inherited
    ]


REFERENCE = section("Reference")
METHODS = [(title, name) for title, owner in OWNERS.items() for name in methods(owner)]


@pytest.mark.parametrize(("title", "name"), METHODS, ids=[name for _, name in METHODS])
def test_every_hook_and_method_is_documented_as_it_is(title: str, name: str) -> None:
    text = section(name, 4, section(title, 3, REFERENCE))
    assert signatures(text) == {name: rendered(getattr(OWNERS[title], name))}
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) >= 8, f"{name} is not explained"


@pytest.mark.parametrize("title", OWNERS)
def test_what_is_documented_is_there(title: str) -> None:
    headings = re.findall(r"^#### (\w+)$", section(title, 3, REFERENCE), re.MULTILINE)
    assert headings == methods(OWNERS[title])


def test_there_is_something_to_compare() -> None:
    names = {name for _, name in METHODS}
    assert {"can_handle", "infer", "stream_infer", "generate_tokens", "count_tokens"} <= names
    assert sum(name.startswith("engineroom_") for name in names) == 10
    assert rendered(InferenceHandler.can_load) == (
        "def can_load(self, config: ModelConfig) -> bool:\n    ..."
    )


def test_the_helpers_are_documented_as_they_are() -> None:
    documented = signatures(section("Helpers", 3, REFERENCE))
    assert documented == {name: rendered(getattr(engineroom, name)) for name in HELPERS}


def rows(name: str) -> dict[str, str]:
    """Field → default, from the table that follows the first mention of ``name``."""
    found = re.search(rf"^`{name}`.*?\n\n((?:\|.*\n)+)", REFERENCE, re.MULTILINE)
    assert found is not None, name
    cells = [[c.strip().strip("`") for c in line.split("|")] for line in found[1].splitlines()]
    return {name: default for _, name, default, *_ in cells[2:]}


def fields(schema: Any) -> dict[str, str]:
    if issubclass(schema, BaseModel):
        return {
            name: "" if field.is_required() else repr(field.get_default())
            for name, field in schema.model_fields.items()
        }
    return {field.name: repr(field.default) for field in dataclasses.fields(schema)}


@pytest.mark.parametrize("schema", [TokenStep, Capabilities, HandlerHealth, LoadedModel])
def test_every_field_is_documented_with_its_default(schema: Any) -> None:
    assert rows(schema.__name__) == fields(schema)


def test_the_version_of_the_contract_is_said() -> None:
    promise = section("What a plugin can rely on")
    assert f"now `{engineroom.API_VERSION}`" in promise
    major = engineroom.API_VERSION.partition(".")[0]
    assert f"major version {major}" in promise
    assert f"engineroom.api:v{major}" in TEXT
    assert getattr(api, f"v{major}") == engineroom.API_VERSION
    minor = ".".join(engineroom.__version__.split(".")[:2])
    assert f"engineroom>={minor}," in promise


def test_the_entry_point_groups_are_said() -> None:
    for group in (HANDLER_GROUP, API_GROUP, PLUGIN_GROUP):
        assert f"| `{group}` |" in REFERENCE


def test_every_error_is_for_a_handler_or_said_not_to_be() -> None:
    text = section("Errors to raise")
    names = {n for n in engineroom.__all__ if n.endswith("Error")} - {"EngineRoomError"}
    assert {name for name in names if f"`{name}`" not in text} == {"StreamError"}


def test_what_a_plugin_imports_is_exported() -> None:
    text = section("What a plugin imports")
    table = re.findall(r"^\| `(engineroom[.\w]*)` \|.*\| (.*) \|$", text, re.MULTILINE)
    assert len(table) >= 4
    for package, cell in table:
        names, module = re.findall(r"`(\w+)`", cell), importlib.import_module(package)
        assert names
        assert [name for name in names if name not in module.__all__] == []


# ── the rules of the kit ─────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(
    importlib.util.find_spec("engineroom.testing.conformance") is None,
    reason="the conformance kit is not installed",
)
def test_the_rules_are_those_of_the_kit() -> None:
    from engineroom.testing.conformance import RULES

    text = section("What the kit checks")
    headings = re.findall(r"^#### Rule (.+)$", text, re.MULTILINE)
    assert headings == list(RULES)
    for rule_id, rule in RULES.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule_id)  # what an anchor may have
        said = " ".join(section(f"Rule {rule_id}", 4, text).split())
        assert said.startswith(f"**{rule.title}.** {rule.text}"), rule_id


# ── the tutorial ─────────────────────────────────────────────────────────────────────────────


def test_the_tutorial_is_read_in_one_sitting() -> None:
    assert len((DOCS / PAGES[0]).read_text(encoding="utf-8").splitlines()) <= 300


def test_the_files_are_those_that_are_generated() -> None:
    from engineroom.cli.new_plugin import plugin_names, render

    (tree,) = re.findall(
        r"^```\n(engineroom-tensorlite/\n.*?)^```$", TEXT, re.DOTALL | re.MULTILINE
    )
    shown, folders = set(), [""]
    for line in tree.splitlines()[1:]:
        name = line.split()[0]
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        folders.append(f"{folders[-1]}{name}" if name.endswith("/") else folders[-1])
        if not name.endswith("/"):
            shown.add(folders[-1] + name)
    generated = {path.as_posix() for path, _ in render(plugin_names("tensorlite"))}
    assert shown == generated - {".gitignore", "src/engineroom_tensorlite/__init__.py"}
    for number in range(1, 9):  # the steps are those of the generated README
        assert re.search(rf"^\*\*{number}\. ", section("Replace the toy"), re.MULTILINE)


@pytest.mark.skipif(
    importlib.util.find_spec("engineroom.testing.conformance") is None,
    reason="the conformance kit is not installed",
)
def test_what_a_suite_can_say_is_documented_with_its_default() -> None:
    from engineroom.testing import HandlerConformance

    settings = {
        name: repr(getattr(HandlerConformance, name))
        for base in HandlerConformance.__mro__
        for name in inspect.get_annotations(base)
        if not name.startswith("_")
    }
    table = re.search(r"^\| attribute .*\n\|.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert table is not None
    cells = [[c.strip().strip("`") for c in line.split("|")] for line in table[1].splitlines()]
    assert {name: default for _, name, default, *_ in cells} == settings
