"""Files of a model that are written to while ``engineroom serve`` has them mapped.

A real GGUF in a process of its own, which llama.cpp has mapped into memory. Where it is cut short
the process ends, for the pages behind the end are gone: then its log says of what, and where.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("numpy", reason="the models are made with numpy")
pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("llama_cpp", reason="needs the plugin llamacpp")
pytest.importorskip("gguf", reason="needs gguf")

import httpx
from hostile_models import TALKS, write_gguf

SERVE = (
    "import sys; import engineroom.models.files as files; files._LOOK_S = 0.1; "
    "from engineroom.cli import main; sys.exit(main(sys.argv[1:]))"
)
PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems map otherwise")


class Serving:
    """``engineroom serve`` with one model, and what it says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.said(r"serves .* on (http://\S+) ")
        self.said("is ready")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)

    def said(self, pattern: str) -> str:
        """Wait for a line of the log; its group, or all that matches."""
        while True:
            line = self._lines.get(timeout=PATIENCE_S)
            if match := re.search(pattern, line):
                return match[match.re.groups]

    def rest(self) -> str:
        """What it says to its end."""
        self._reader.join(PATIENCE_S)
        lines = []
        while True:
            try:
                lines.append(self._lines.get_nowait())
            except Empty:
                return "".join(lines)

    def ask(self) -> str:
        body = {"model": "default", "prompt": "once upon a time", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


@contextmanager
def serving(source: Path) -> Iterator[Serving]:
    options = ("n_ctx=256", "n_threads=1", "trial=false", "use_mmap=true")
    flags = [flag for option in options for flag in ("-o", option)]
    command = [sys.executable, "-c", SERVE, "--log-level", "info", "serve", "-m", str(source)]
    with subprocess.Popen(
        [*command, "--port", "0", "--runtime", "llamacpp", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Serving(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "model.gguf", 256, **TALKS)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "model.gguf"))


def touch(path: Path) -> None:
    """Write what is there already."""
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(first)


def test_who_writes_into_a_mapped_file_is_told_of(model: Path) -> None:
    with serving(model) as server:
        before = server.ask()
        touch(model)
        assert "SIGBUS" in server.said(r"somebody has written to its file model\.gguf .*")
        assert server.ask() == before
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0


def test_who_replaces_it_harms_nobody(model: Path, original: Path, tmp_path: Path) -> None:
    with serving(model) as server:
        before = server.ask()
        another = tmp_path / "another"
        another.write_bytes(b"GGUF, and nothing more")
        another.replace(model)
        assert server.ask() == before
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        assert "somebody has written" not in server.rest()


def test_one_that_is_cut_short_ends_the_process_which_says_where(model: Path) -> None:
    with serving(model) as server:
        server.ask()
        os.truncate(model, 4096)
        assert "shorter" in server.said(r"somebody has written to its file model\.gguf .*")
        with pytest.raises(httpx.TransportError):
            server.ask()
        assert server.process.wait(PATIENCE_S) == -signal.SIGBUS
        said = server.rest()
    assert "Fatal Python error: Bus error" in said
    assert re.search(r'File ".*engineroom_llamacpp/\w+\.py", line \d+ in \w+', said), said
