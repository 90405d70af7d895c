"""The Vercel AI SDK, from npm: ``ENGINEROOM_VERCEL`` names a folder with it and its script."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from client_tasks import CITIES

FOLDER = os.environ.get("ENGINEROOM_VERCEL", "")


@pytest.mark.skipif(not FOLDER, reason="ENGINEROOM_VERCEL names no folder with the AI SDK")
@pytest.mark.parametrize("provider", ["compatible", "chat", "responses", "anthropic"])
def test_calls_their_results_and_forms(url, provider):
    done = subprocess.run(
        ["node", str(Path(FOLDER) / "tools.mjs"), url, provider],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(said["ran"]) <= set(CITIES) and len(said["ran"]) >= 2
    assert set(said["calls"]) == set(said["streamedCalls"]) == {"weather"}
    assert said["text"] and said["streamed"]
    for form in (said["object"], said["streamedObject"]):
        assert set(form) == {"city", "sunny"} and form["city"] in CITIES
