"""An environment of its own for the command: only the plugins that a test makes are there."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

import engineroom.handlers.discovery
from engineroom.cli import main

RECORDER = '''
from engineroom import Capabilities, GenerationParams
from engineroom.testing import EchoHandler

seen = []


class Recorder(EchoHandler):
    """An echo that claims to honour everything and keeps the requests."""

    name = "recorder"

    def can_load(self, config):
        return (config.source or "").startswith("recorder:")

    def capabilities(self):
        return Capabilities(params=frozenset(GenerationParams.model_fields), chat=True)

    async def load_model(self, config):
        seen.append(config)
        return await super().load_model(config)

    async def generate_tokens(self, loaded_model, request):
        seen.append(request)
        steps = super().generate_tokens(loaded_model, request)
        async for step in steps:
            yield step
'''


class Site:
    """A folder of installed distributions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def module(self, name: str, source: str) -> None:
        (self.path / f"{name}.py").write_text(source, encoding="utf-8")

    def plugin(
        self,
        name: str,
        value: str,
        *,
        distribution: str | None = None,
        group: str = "engineroom.handlers",
        requires: Sequence[str] = (),
    ) -> None:
        distribution = distribution or f"engineroom-{name}"
        info = self.path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", "Version: 1.2"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n", encoding="utf-8")

    def echo(self) -> None:
        self.plugin("echo", "engineroom.testing.echo:EchoHandler")

    def recorder(self) -> None:
        self.module("command_test_recorder", RECORDER)
        self.plugin("recorder", "command_test_recorder:Recorder")

    def agent(self) -> None:
        source = Path(__file__).with_name("agent_double.py").read_text(encoding="utf-8")
        self.module("command_test_agent", source)
        self.plugin("agent", "command_test_agent:Agent")


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error."""
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


class TerminalInput(io.StringIO):
    def isatty(self) -> bool:
        return True


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("ENGINEROOM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


@pytest.fixture
def command(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Command]:
    """The command, in this process: ``command("run", "echo:", "hello")``."""

    def entry_points(group: str) -> list[Any]:
        found = distributions(path=[str(site.path)])
        return [e for d in found for e in d.entry_points if e.group == group]

    monkeypatch.syspath_prepend(site.path)
    monkeypatch.setattr(engineroom.handlers.discovery, "entry_points", entry_points)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = set(sys.modules)

    def run(*args: str, stdin: bytes | None = None) -> Result:
        replacement: io.TextIOBase = (
            TerminalInput() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        )
        monkeypatch.setattr(sys, "stdin", replacement)
        capsys.readouterr()
        status = main(args)
        return Result(status, *capsys.readouterr())

    yield run
    for name in set(sys.modules) - before:
        if name.startswith("command_test_"):
            del sys.modules[name]


@pytest.fixture
def seen(command: Command, site: Site) -> Callable[[], Any]:
    """The last request that the recorder plugin was given."""
    site.recorder()

    def last() -> Any:
        import command_test_recorder  # type: ignore[import-not-found]

        return command_test_recorder.seen[-1]

    return last


@pytest.fixture
def environment(site: Site) -> dict[str, str]:
    """The environment of a process that has the site's plugins and uses ``echo`` only."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("ENGINEROOM_")}
    path = os.pathsep.join(filter(None, (str(site.path), keep.get("PYTHONPATH"))))
    return {**keep, "PYTHONPATH": path, "ENGINEROOM_HANDLERS": "echo"}


@pytest.fixture
def spawn(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the command as a process; whatever is left of it ends with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: str, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "engineroom", *args],
            env=environment,
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                **options,
            },
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def start_server() -> Iterator[Callable[..., str]]:
    """Start a server that wants a key; its URL."""
    for needed, extra in (("uvicorn", "server"), ("msgspec", "server"), ("httpx", "chat")):
        pytest.importorskip(needed, reason=f"needs the extra engineroom[{extra}]")
    import contextlib

    sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
    from server_running import running

    from engineroom.server.keys import KeyRing

    with contextlib.ExitStack() as stack:
        keys = KeyRing([("ann", "ann-key-0123456789")])
        yield lambda **more: stack.enter_context(running(keys=keys, **more)).url
