"""What an installed plugin is called, and what to install."""

from __future__ import annotations

import pytest

from engineroom.handlers.discovery import (
    HANDLER_GROUP,
    PLUGIN_GROUP,
    install_hint,
    installed_plugins,
)


@pytest.mark.parametrize(
    ("runtime", "command"),
    [
        ("llamacpp", "pip install engineroom-llamacpp"),
        ("hf_transformers", "pip install engineroom-hf-transformers"),
        ("vllm", "pip install engineroom-vllm"),
        ("mine", "pip install engineroom-mine"),
    ],
)
def test_a_runtime_has_a_command_that_installs_it(runtime, command):
    assert install_hint(runtime) == command


def test_without_a_runtime_the_choice_is_told():
    hint = install_hint()
    for name in ("engineroom-llamacpp", "engineroom-hf-transformers", "engineroom-vllm"):
        assert name in hint


def test_what_this_environment_has_is_listed_in_order():
    records = installed_plugins()
    assert records == sorted(records, key=lambda r: (r.group, r.name, r.distribution))
    assert {r.group for r in records} <= {HANDLER_GROUP, PLUGIN_GROUP}
    assert {r.status for r in records} <= {"found"}
