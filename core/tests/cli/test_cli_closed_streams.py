"""Standard streams that the shell has closed: each command works as with ``/dev/null``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import typer

from engineroom.cli.app import app

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes them")

CLOSED = [[], [0], [1], [2], [0, 1, 2]]
"""The first is what the others are compared with."""
DEPLOYMENT = "models: [{model_id: m, source: 'echo:'}]\n"
NOWHERE = "http://127.0.0.1:9"
COMMANDS = {
    "run": ["echo:", "one two"],
    "chat": ["echo:"],
    "new-key": ["ann"],
    "plugins": [],
    "doctor": [],
    "new-plugin": ["made"],
    "conformance": ["no.such:Handler", "--source", "echo:"],
    "models pull": ["echo:"],
    "models rm-cache": ["hf:nobody/nothing"],
    "models ls": ["--config", "deployment.yaml"],
    "models plan": ["--config", "deployment.yaml"],
    "models show": ["m", "--config", "deployment.yaml"],
    "models load": ["m", "--url", NOWHERE],
    "models unload": ["m", "--url", NOWHERE],
    "models reload": ["--url", NOWHERE],
    "serve": ["--config", "missing.yaml"],
    "--version": [],
    "--help": [],
    "nothing": [],
}
"""Each command with arguments; and what is none."""


def leaves(command, path=()):
    for name, sub in getattr(command, "commands", {}).items():
        yield from leaves(sub, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path)


def run(cases: list, environment: dict[str, str], folder: Path) -> list[list]:
    """Exit status and what was written of each case; see ``closed_streams.py``."""
    script = Path(__file__).with_name("closed_streams.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(cases).encode(),
        env=environment,
        cwd=folder,
        capture_output=True,
        timeout=110,
        check=True,
    )
    came: list[list] = json.loads(done.stdout)
    return came


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
def test_what_cannot_be_written_is_said_in_one_line(site, environment, tmp_path):
    site.echo()
    commands = [
        "run echo: one",
        "chat echo:",
        "plugins",
        "plugins --json",
        "--version",
        "--help",
        "",
    ]
    cases = [(command.split(), "full") for command in commands]
    for command, (status, written) in zip(commands, run(cases, environment, tmp_path), strict=True):
        if command != "chat echo:":  # nothing was said, and nothing is answered
            assert status == 1, command
            assert written == "error: standard output cannot be written: No space left on device\n"


def test_each_command_works_whatever_is_closed(site, environment, tmp_path):
    assert set(leaves(typer.main.get_command(app))) < set(COMMANDS)
    site.echo()
    (tmp_path / "deployment.yaml").write_text(DEPLOYMENT)
    cases = []
    for name, arguments in COMMANDS.items():
        for number, closed in enumerate(CLOSED):
            given = [f"made{number}"] if name == "new-plugin" else arguments
            cases.append(([*name.split(), *given], closed))
    came = dict(zip(map(str, cases), run(cases, environment, tmp_path), strict=True))
    wrong = []
    for arguments, closed in cases:
        status, written = came[str((arguments, closed))]
        if not closed:
            right = status
        if status != right or "defect" in written or "Traceback" in written:
            wrong.append((arguments, closed, right, status, written[-300:]))
    assert not wrong
    assert came[str((["run", "echo:", "one two"], [0]))] == [0, "one two\n"]
    assert came[str((["run", "echo:", "one two"], [1]))] == [0, ""]
    assert "No such command" in came[str((["nothing"], [0]))][1]


@pytest.mark.parametrize("closing", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_a_server_serves_and_ends_in_good_order(site, environment, closing):
    pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
    pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
    site.echo()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f'exec "{sys.executable}" -m engineroom serve --model echo: --port {port} {closing}'
    process = subprocess.Popen(["/bin/sh", "-c", command], env=environment)
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
