"""Transformers' private parts stand in one module, whose bound the requirement repeats."""

from __future__ import annotations

import logging
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import transformers

from engineroom_hf_transformers.compat_transformers import BELOW, attention_of, keeps_state
from engineroom_hf_transformers.noise import quieten


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def test_the_bound_stands_in_the_requirement_and_what_is_installed_is_below_it() -> None:
    """Fails when the bound is to be lifted: how, says the module's ``BELOW``."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    [requirement] = [
        text for text in project["project"]["dependencies"] if text.startswith("transformers")
    ]
    assert requirement.endswith(f",<{BELOW}")
    assert numbers(version("transformers")) < numbers(BELOW)


def test_the_library_has_what_is_used() -> None:
    quieten()
    root = transformers.utils.logging.get_logger()
    assert transformers.utils.logging._default_handler not in root.handlers
    assert any(type(handler) is not logging.StreamHandler for handler in root.handlers)
    assert not keeps_state(SimpleNamespace())
    assert keeps_state(SimpleNamespace(_is_stateful=True))
    for name in ("LlamaForCausalLM", "MambaForCausalLM"):
        assert isinstance(getattr(transformers, name)._is_stateful, bool)
    assert keeps_state(transformers.MambaForCausalLM)
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        vocab_size=9, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert attention_of(model) == "eager"
    model.set_attn_implementation("sdpa")
    assert attention_of(model) == "sdpa"
