"""Other libraries' private parts: one module each, with a bound that the requirements repeat."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import engineroom

SOURCES = Path(engineroom.__path__[0])
PROJECT = Path(__file__).parents[1] / "pyproject.toml"
MODULES = sorted(".".join(path.relative_to(SOURCES.parent).with_suffix("").parts)
                 for path in SOURCES.rglob("compat_*.py"))  # fmt: skip


def library_of(module: str) -> str:
    return module.rpartition(".compat_")[2]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def bound_of(module: str) -> str:
    return importlib.import_module(module).BELOW


def test_there_are_such_modules():
    assert "engineroom.sources.compat_huggingface_hub" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_the_bound_stands_in_every_requirement(module):
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    requirements = [
        *project["project"]["dependencies"],
        *(r for extra in project["project"]["optional-dependencies"].values() for r in extra),
        *(r for group in project["dependency-groups"].values() for r in group),
    ]
    name = re.compile(rf"{library_of(module)}(?![\w-])".replace("_", "[-_]"))
    ours = [r for r in requirements if name.match(r)]
    assert ours
    for requirement in ours:
        assert re.search(rf",<{re.escape(bound_of(module))}(?![.\d])", requirement), requirement


@pytest.mark.parametrize("module", MODULES)
def test_what_is_installed_is_below_the_bound(module):
    try:
        installed = version(library_of(module))
    except PackageNotFoundError:
        pytest.skip(f"{library_of(module)} is not installed")
    assert numbers(installed) < numbers(bound_of(module))


@pytest.mark.nightly
@pytest.mark.parametrize("module", MODULES)
def test_no_version_is_out_that_nobody_has_looked_at(module):
    """Fails when the bound is to be lifted: how, says the module's ``BELOW``."""
    command = [sys.executable, "-m", "pip", "index", "versions", library_of(module)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    newest = re.match(r"\S+ \(([^)]+)\)", asked.stdout)
    if newest is None:
        pytest.skip(f"the index does not say: {asked.stderr.strip()[-200:]}")
    assert numbers(newest[1]) < numbers(bound_of(module)), (
        f"{library_of(module)} {newest[1]} is out: read it, and lift {module}.BELOW"
    )
