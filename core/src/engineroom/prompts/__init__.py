"""Prompts: chat templates, special tokens, tokens' bytes, and what a prompt may not exceed.

Public for plugins (``from engineroom.prompts import …``): text and conversations become token ids
here, alike on every runtime. Sampling, decoding loops and anything that needs a model's weights
have no place here. Needs the extra ``engineroom[prompts]``.
"""

from __future__ import annotations

from engineroom.lazy_names import attach

__getattr__, __dir__, __all__ = attach(__name__)
