"""What is used of Transformers' insides is there, and means what it is used for."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import transformers

from engineroom_hf_transformers.compat_transformers import attention_of, keeps_state
from engineroom_hf_transformers.noise import quieten


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
