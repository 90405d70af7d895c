"""The repository fits together: metadata, licences, entry points, sessions, documents."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = {
    path.parent.name: path
    for path in (ROOT / "core" / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml")))
}
PLUGINS = [name for name in PROJECTS if name != "core"]


def metadata(name: str) -> dict[str, Any]:
    return tomllib.loads(PROJECTS[name].read_text(encoding="utf-8"))["project"]


def module_of(name: str) -> str:
    return metadata(name)["name"].replace("-", "_")


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    pytest.importorskip("nox", reason="nox is not installed here; its sessions install it")
    spec = importlib.util.spec_from_file_location("engineroom_noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = dict(os.environ)
    try:
        spec.loader.exec_module(module)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return module


# ── metadata ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("field", ["version", "requires-python", "license", "license-files"])
def test_plugins_say_what_the_core_says(name, field):
    said = metadata(name)[field]
    if field == "requires-python":  # a plugin may have an upper bound of its own
        said = said.partition(",<")[0]
    assert said == metadata("core")[field]


@pytest.mark.parametrize("name", PROJECTS)
def test_classifiers_name_the_supported_pythons(name, noxfile):
    prefix = "Programming Language :: Python :: 3."
    minors = [c.rpartition(" ")[2] for c in metadata(name)["classifiers"] if c.startswith(prefix)]
    assert minors == list(noxfile.MINORS[: len(minors)])
    assert metadata(name)["requires-python"].partition(",<")[0] == f">={minors[0]}"
    assert "Typing :: Typed" in metadata(name)["classifiers"]
    # PEP 639: the licence is said by an expression, and then by no classifier.
    assert not any(c.startswith("License ::") for c in metadata(name)["classifiers"])


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_ask_for_the_python_that_the_packages_ask_for(document):
    wanted = metadata("core")["requires-python"].removeprefix(">=")
    text = (ROOT / document).read_text(encoding="utf-8")
    assert re.findall(r"Python (3\.\d+) or newer", text) == [wanted]


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_needs_the_core_of_its_own_minor_version(name):
    major, minor, *_ = metadata("core")["version"].split(".")
    wanted = f"engineroom>={major}.{minor},<{major}.{int(minor) + 1}"
    needed = [re.sub(r"\[.*?\]", "", line) for line in metadata(name)["dependencies"]]
    assert wanted in needed


@pytest.mark.parametrize("name", PROJECTS)
def test_every_dependency_has_a_lower_bound(name, noxfile):
    for requirement in metadata(name)["dependencies"]:
        assert re.search(r"==\d", noxfile.lowest(requirement)), requirement


@pytest.mark.parametrize("name", PROJECTS)
def test_the_package_is_typed_and_licensed(name):
    folder = PROJECTS[name].parent
    assert (folder / "src" / module_of(name) / "py.typed").read_bytes() == b""
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (folder / metadata(name)["readme"]).is_file()


@pytest.mark.parametrize("name", PROJECTS)
def test_entry_points_and_commands_exist(name):
    source = PROJECTS[name].parent / "src"
    groups = metadata(name).get("entry-points", {}) | {"scripts": metadata(name).get("scripts", {})}
    for group, entries in groups.items():
        for entry, value in entries.items():
            module, _, attribute = value.partition(":")
            base = ROOT / "core" / "src" if module.split(".")[0] == "engineroom" else source
            path = base / Path(*module.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert file.is_file(), f"{group}: {entry} = {value}"
            assert attribute in top_level_names(file), f"{group}: {entry} = {value}"


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_states_the_contract_of_its_handlers(name):
    groups = metadata(name)["entry-points"]
    assert set(groups["engineroom.api"]) == set(groups["engineroom.handlers"])


def top_level_names(file: Path) -> set[str]:
    """What a module binds, without importing it."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.ImportFrom() | ast.Import():
                names.update(alias.asname or alias.name for alias in node.names)
            case ast.Assign():
                names.update(t.id for t in node.targets if isinstance(t, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=target)):
                names.add(target)
    return names


# ── documents ────────────────────────────────────────────────────────────────────────────────


def test_the_changelog_has_the_current_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[:2] == ["Unreleased", metadata("core")["version"]]


@pytest.mark.parametrize(
    "document",
    [p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *ROOT.glob("plugins/*/*.md"))],
)
def test_sessions_that_documents_name_exist(document, noxfile):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"nox (?:-\w+ )*-s (\w+)", text)
    if document == "CONTRIBUTING.md":
        rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
        assert set(rows) == set(sessions(noxfile))
        named += rows
    assert set(named) <= set(sessions(noxfile))


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npython -m pip install nox && python -m nox -s demo\n" in text
    assert "\npython -m nox -s tests\n" in text


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        assert "://" in link or (ROOT / link).exists(), link


def test_licences_of_all_dependencies_are_noted(noxfile):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").lower()
    for name in PROJECTS:
        extras = metadata(name).get("optional-dependencies", {}).values()
        for requirement in [*noxfile.dependencies(name), *(r for e in extras for r in e)]:
            written = re.match(r"[\w.-]+", requirement)[0].lower()
            assert f" {written}" in text, requirement


def test_ci_runs_the_sessions_that_it_should():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "for session in tests ci; do" in text
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    if os.name == "posix":
        assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_file_has_a_path_of_somebodys_machine():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("only a git checkout says which files belong to the repository")
    listed = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    # Put together here, or this file would be the first to be found.
    personal = re.compile(
        rb"(?<![\w.])/(?:" + b"|".join((b"ro" + b"ot", b"wo" + b"rk")) + rb")/"
        rb"|/(?:home|Users)/(?!user\b|me\b|you\b)\w+/"
        rb"|C:\\+Users\\+\w"
    )
    found = []
    for name in filter(None, listed):
        file = ROOT / os.fsdecode(name)
        if file.is_file() and (match := personal.search(file.read_bytes())):
            found.append(f"{os.fsdecode(name)}: {match[0].decode(errors='replace')}")
    assert not found


# ── the sessions' own logic ──────────────────────────────────────────────────────────────────


def sessions(noxfile: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(noxfile).items()
        if type(value).__name__ == "Func" and hasattr(value, "python")
    }


def test_every_plugin_has_its_tests_run(noxfile):
    assert noxfile.PLUGINS == PLUGINS


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("pluggy>=1.5", "pluggy==1.5"),
        ("ruamel.yaml >= 0.18.6", "ruamel.yaml==0.18.6"),
        ("numpy>=1.26,<3", "numpy==1.26"),
        ("numpy<3,>=1.26", "numpy==1.26"),
        ("uvicorn[standard]>=0.30", "uvicorn[standard]==0.30"),
        ("uvloop>=0.20 ; sys_platform != 'win32'", "uvloop==0.20 ; sys_platform != 'win32'"),
    ],
)
def test_lowest_version_of_a_requirement(noxfile, requirement, expected):
    assert noxfile.lowest(requirement) == expected


def test_a_requirement_without_lower_bound_is_refused(noxfile):
    with pytest.raises(ValueError, match="no lower bound"):
        noxfile.lowest("pluggy")


def test_cmake_arguments_survive_a_path_with_spaces(noxfile, monkeypatch, tmp_path):
    import shlex

    monkeypatch.setattr(noxfile, "ROOT", tmp_path / "my own" / "folder")
    include = f"{(tmp_path / 'my own' / 'folder').as_posix()}/plugins/llamacpp/cmake/minimal.cmake"
    assert shlex.split(noxfile.cmake_args("-DGGML_CUDA=on -DX='a b'")) == [
        "-DLLAVA_BUILD=OFF",
        f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={include}",
        "-DGGML_CUDA=on",
        "-DX=a b",
    ]
    assert (ROOT / "plugins" / "llamacpp" / "cmake" / "minimal.cmake").is_file()


def fake_python(file: Path, *, says: str = "", status: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


posix = pytest.mark.skipif(os.name != "posix", reason="makes interpreters out of shell scripts")


@posix
def test_a_shim_that_fails_is_passed_over(noxfile, tmp_path):
    fake_python(tmp_path / "shims" / "python3.12", says="not found", status=127)
    good = tmp_path / "usr" / "python3.12"
    fake_python(good, says=f"cpython|3.12|{good}")
    path = os.pathsep.join([str(tmp_path / "shims"), str(tmp_path / "usr")])
    assert noxfile.installed_pythons(path, tmp_path / "none") == {"3.12": good}


@posix
def test_the_newest_patch_of_pyenv_is_taken(noxfile, tmp_path):
    fake_python(tmp_path / "shims" / "python3.12", status=127)
    for patch in ("3.12.2", "3.12.10", "3.12.9", "3.12-dev"):
        file = tmp_path / "pyenv" / "versions" / patch / "bin" / "python3.12"
        fake_python(file, says=f"cpython|3.12|{file}")
    found = noxfile.installed_pythons(str(tmp_path / "shims"), tmp_path / "pyenv")
    assert found == {"3.12": tmp_path / "pyenv" / "versions" / "3.12.10" / "bin" / "python3.12"}


@posix
@pytest.mark.parametrize("says", ["pypy|3.12|/x", "cpython|3.11|/x", "cpython|3.12|", "", "|||"])
def test_what_is_not_the_python_asked_for_is_passed_over(noxfile, tmp_path, says):
    fake_python(tmp_path / "python3.12", says=says)
    assert noxfile.installed_pythons(str(tmp_path), tmp_path, ["3.12"]) == {}


@posix
def test_nothing_installed_is_nothing_found(noxfile, tmp_path):
    assert noxfile.installed_pythons("", tmp_path / "none") == {}


@posix
def test_a_python_that_the_name_does_not_find_is_put_on_the_path(noxfile, tmp_path, monkeypatch):
    shim = fake_python(tmp_path / "shims" / "python3.12", status=127)
    good = tmp_path / "versions" / "bin" / "python3.12"
    fake_python(good, says=f"cpython|3.12|{good}")
    monkeypatch.setenv("PATH", os.pathsep.join([str(shim.parent), os.environ["PATH"]]))
    noxfile.make_findable({"3.12": good})
    assert shutil.which("python3.12") == str(good)
    before = os.environ["PATH"]
    noxfile.make_findable({"3.12": good})
    assert os.environ["PATH"] == before


@pytest.mark.skipif(sys.version_info[:2] > (3, 14), reason="newer than the sessions know")
def test_the_running_python_is_among_the_cores(noxfile):
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" == noxfile.CORE_PYTHONS[0]
