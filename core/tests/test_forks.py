"""A service that is used after a fork says which process it belongs to, instead of hanging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")


def test_in_a_child_a_service_of_the_parent_says_so_and_one_of_its_own_works():
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",  # threads and a fork: that is what this is about
            str(Path(__file__).with_name("forked_service.py")),
            "engineroom.testing.echo:EchoHandler",
            "echo:",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    came = json.loads(done.stdout)
    for name, (kind, message) in {**came["old"], **came["blocking"]}.items():
        assert (name, kind) == (name, "ConfigurationError")
        assert f"belongs to process {came['pid']}, and this is process" in message, name
    assert came["unused"] == came["new"] == ["done", came["text"]]
    assert came["again"] == came["text"] == "one two three"
