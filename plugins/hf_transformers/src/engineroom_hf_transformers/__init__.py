"""The Hugging Face Transformers runtime for engineroom: any causal language model, batched.

Start reading in :mod:`engineroom_hf_transformers.handler`; the scheduler is
:mod:`engineroom_hf_transformers.engine`, and what makes batching possible
:mod:`engineroom_hf_transformers.attention`. Importing this package loads neither torch nor
transformers.
Chat templates and headers of files are engineroom's; what is here knows torch.
"""

from __future__ import annotations

from engineroom_hf_transformers.handler import HuggingFaceTransformersHandler
from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["HfTransformersOptions", "HuggingFaceTransformersHandler"]
