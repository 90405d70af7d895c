"""The llama.cpp runtime for engineroom: GGUF models, many requests at once, in process.

Start reading in :mod:`engineroom_llamacpp.handler`; the scheduler is
:mod:`engineroom_llamacpp.engine`. Importing this package does not load llama.cpp.
Chat templates and headers of files are engineroom's; what is here knows llama.cpp.
"""

from __future__ import annotations

from engineroom_llamacpp.handler import LlamaCppHandler
from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["LlamaCppHandler", "LlamaCppOptions"]
