"""Other libraries' private parts: one module each, with a bound that the requirements repeat."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT)
    for folder in (ROOT / "core", *(ROOT / "plugins").iterdir())
    for path in (folder / "src").rglob("compat_*.py")
)
of_each_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)


def library_of(module: Path) -> str:
    return module.stem.removeprefix("compat_")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def bound_of(module: Path) -> str:
    """Read, not imported: the library need not be installed."""
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "BELOW":
            return ast.literal_eval(node.value)
    raise AssertionError(f'{module} says no bound: BELOW: Final = "…"')


def requirements_of(module: Path) -> list[str]:
    """What the distribution's requirements say of the library; of Python, for a part of it."""
    project = module.parents[len(module.parents) - (2 if module.parts[0] == "core" else 3)]
    data = tomllib.loads((ROOT / project / "pyproject.toml").read_text(encoding="utf-8"))
    if library_of(module) in sys.stdlib_module_names:
        return [data["project"]["requires-python"]]
    requirements = [
        *data["project"]["dependencies"],
        *(r for e in data["project"].get("optional-dependencies", {}).values() for r in e),
        *(r for g in data.get("dependency-groups", {}).values() for r in g if isinstance(r, str)),
    ]
    name = re.compile(rf"{library_of(module)}(?![\w-])".replace("_", "[-_]"))
    return [r for r in requirements if name.match(r)]


def test_there_are_such_modules():
    libraries = {library_of(module) for module in MODULES}
    assert libraries >= {"huggingface_hub", "torch", "typer", "uvicorn"}


@of_each_module
def test_the_bound_stands_in_every_requirement(module):
    requirements = requirements_of(module)
    assert requirements
    for requirement in requirements:
        assert re.search(rf",<{re.escape(bound_of(module))}(?![.\d])", requirement), requirement


@of_each_module
def test_what_is_installed_is_below_the_bound(module):
    library = library_of(module)
    try:
        stdlib = library in sys.stdlib_module_names
        installed = "{}.{}".format(*sys.version_info) if stdlib else version(library)
    except PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    assert numbers(installed) < numbers(bound_of(module))


@pytest.mark.nightly
@of_each_module
def test_no_version_is_out_that_nobody_has_looked_at(module):
    """Fails when the bound is to be lifted: how, says the module's ``BELOW``."""
    if library_of(module) in sys.stdlib_module_names:
        pytest.skip("comes with Python, whose newest version the sessions run")
    command = [sys.executable, "-m", "pip", "index", "versions", library_of(module)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    newest = re.match(r"\S+ \(([^)]+)\)", asked.stdout)
    if newest is None:
        pytest.skip(f"the index does not say: {asked.stderr.strip()[-200:]}")
    assert numbers(newest[1]) < numbers(bound_of(module)), (
        f"{library_of(module)} {newest[1]} is out: read it, and lift BELOW of {module}"
    )
