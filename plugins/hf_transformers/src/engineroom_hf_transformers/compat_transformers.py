"""What relies on how Transformers works inside: its log handler, and marks of its models."""

from __future__ import annotations

import logging
from typing import Any, Final

__all__ = ["BELOW", "attention_of", "keeps_state", "put_log_handler"]

BELOW: Final = "6"
"""The first version for which nobody has read that what is used here still works so.

The distribution's requirement has it as its upper bound. To lift it, read the new
``utils.logging`` and ``modeling_utils`` for the names in this module, and run the plugin's tests.
"""


def put_log_handler(handler: logging.Handler) -> None:
    """Turn the library's bars off, and put a handler in the place of its default one.

    Handlers that an application gave it stay.
    """
    import transformers.utils.logging

    library: Any = transformers.utils.logging
    library.disable_progress_bar()
    root = library.get_logger()  # makes the default handler
    if library._default_handler in root.handlers:
        library.disable_default_handler()
        root.addHandler(handler)


def keeps_state(model: Any) -> bool:
    """Whether a model keeps a state of a fixed size instead of keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def attention_of(model: Any) -> Any:
    """The attention that a model computes with; ``set_attn_implementation`` takes it."""
    return model.config._attn_implementation
