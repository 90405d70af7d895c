"""As an author of a plugin would: generate one, install it, see it listed, run it, test it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import engineroom.testing

for needed in ("editables", "hatchling", "pip", "typer"):
    pytest.importorskip(needed, reason="generating and installing a plugin needs it")

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SOURCE = "package:engineroom_afternoon/toy.txt"
KIT = importlib.util.find_spec("engineroom.testing.conformance") is not None
needs_kit = pytest.mark.skipif(not KIT, reason="the conformance kit is not installed")


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A new environment beside the one that runs the tests, and a plugin installed in it."""
    folder = tmp_path_factory.mktemp("author")
    venv.create(folder / "venv", symlinks=os.name == "posix")
    base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    scheme = "nt_venv" if os.name == "nt" else "posix_venv"
    site = Path(sysconfig.get_path("purelib", scheme, base))
    python = Path(sysconfig.get_path("scripts", scheme, base)) / "python"
    # What is installed here is to be had there, too: editable packages included.
    here = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    lines = [f"import site; site.addsitedir({path!r})\n" for path in here]
    (site / "outer.pth").write_text("".join(lines), encoding="utf-8")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ENGINEROOM_", "PIP_", "PYTHON", "PYTEST_", "VIRTUAL_ENV"))
    }

    def run(*arguments: str, cwd: Path = folder, status: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(python), "-m", *arguments],
            cwd=cwd,
            env={**inherited, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    run("engineroom", "new-plugin", "afternoon")
    plugin = folder / "engineroom-afternoon"
    run("pip", "install", "--no-deps", "--no-build-isolation", "--quiet", "-e", str(plugin))
    return run, plugin


def test_the_plugin_is_listed(author: tuple[Run, Path]) -> None:
    run, _ = author
    listed = {p["name"]: p for p in json.loads(run("engineroom", "plugins", "--json").stdout)}
    plugin = listed["afternoon"]
    assert (plugin["distribution"], plugin["version"]) == ("engineroom-afternoon", "0.1.0")
    assert (plugin["status"], plugin["api_version"]) == ("active", "1.0")


def test_it_answers_a_chat_and_a_prompt(author: tuple[Run, Path]) -> None:
    run, _ = author
    limit = ("--max-new-tokens", "40", "--greedy")
    answer = json.loads(run("engineroom", "run", SOURCE, "Who are you?", "--json", *limit).stdout)
    assert (answer["handler"], answer["finish_reason"]) == ("afternoon", "length")
    assert answer["generated_tokens"] == 40
    told = run("engineroom", "run", SOURCE, "Full ahead, said the", "--raw", *limit)
    assert "engine room answered" in told.stdout


def test_what_it_does_not_honour_is_refused_by_name(author: tuple[Run, Path]) -> None:
    run, _ = author
    done = run("engineroom", "run", SOURCE, "Ahoy", "--num-beams", "2", status=1)
    assert "handler 'afternoon' does not honour num_beams" in done.stderr


def test_nobody_elses_file_is_taken(author: tuple[Run, Path]) -> None:
    run, plugin = author
    done = run("engineroom", "plugins", "--why", str(plugin / "README.md"), status=1)
    assert "afternoon: no" in done.stdout


def test_its_own_tests_pass(author: tuple[Run, Path]) -> None:
    run, plugin = author
    done = run("pytest", "-q", "-p", "no:cacheprovider", "tests/test_handler.py", cwd=plugin)
    assert " passed" in done.stdout and "failed" not in done.stdout


@needs_kit
def test_the_kit_passes_from_its_own_tests(author: tuple[Run, Path]) -> None:
    run, plugin = author
    done = run("pytest", "-q", "-p", "no:cacheprovider", "tests/test_conformance.py", cwd=plugin)
    assert " passed" in done.stdout and "failed" not in done.stdout


@needs_kit
def test_all_its_tests_pass_on_several_workers(author: tuple[Run, Path]) -> None:
    pytest.importorskip("xdist", reason="it is run on several workers")
    run, plugin = author
    done = run("pytest", "-q", "-n", "2", "-p", "no:cacheprovider", cwd=plugin)
    assert " passed" in done.stdout and "failed" not in done.stdout


@needs_kit
def test_the_kit_passes_from_the_command(author: tuple[Run, Path]) -> None:
    run, _ = author
    run("engineroom", "conformance", "engineroom_afternoon:AfternoonHandler", "--model", SOURCE)


def test_a_wheel_of_it_has_all_that_it_needs(author: tuple[Run, Path], tmp_path: Path) -> None:
    import zipfile

    run, plugin = author
    run(
        "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
        "--wheel-dir", str(tmp_path), str(plugin),
    )  # fmt: skip
    (wheel,) = tmp_path.glob("engineroom_afternoon-0.1.0-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {p.relative_to(plugin / "src").as_posix() for p in plugin.glob("src/*/*.*")}
    assert {f"engineroom_afternoon/{n}" for n in ("py.typed", "toy.txt", "handler.py")} <= wanted
    assert {name for name in wanted if "__pycache__" not in name} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_core_wheel_has_the_templates(author: tuple[Run, Path], tmp_path: Path) -> None:
    import zipfile

    run, _ = author
    core = Path(engineroom.testing.__file__).parents[3]
    if not (core / "pyproject.toml").is_file():
        pytest.skip("engineroom is not run from its sources")
    run(
        "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
        "--wheel-dir", str(tmp_path), str(core),
    )  # fmt: skip
    (wheel,) = tmp_path.glob("engineroom-*.whl")
    templates = core / "src" / "engineroom" / "cli" / "templates"
    wanted = {p.relative_to(core / "src").as_posix() for p in templates.rglob("*") if p.is_file()}
    assert len(wanted) > 12
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())
