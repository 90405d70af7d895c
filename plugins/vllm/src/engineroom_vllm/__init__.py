"""The vLLM runtime for engineroom: Hugging Face models, many requests at once, in processes.

Start reading in :mod:`engineroom_vllm.handler`; what differs between versions of vLLM is in
:mod:`engineroom_vllm.library`. Importing this package does not load vLLM.
Chat templates and headers of files are engineroom's; what is here knows vLLM.
"""

from __future__ import annotations

from engineroom_vllm.handler import VLLMHandler
from engineroom_vllm.options import VLLMOptions

__all__ = ["VLLMHandler", "VLLMOptions"]
