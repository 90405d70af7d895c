"""CTranslate2 as a runtime of engineroom: a plugin as a third party would publish it.

Start reading in :mod:`engineroom_ctranslate2.handler`. Importing this package loads neither
CTranslate2 nor the tokenizer.
"""

from __future__ import annotations

from engineroom_ctranslate2.handler import CTranslate2Handler
from engineroom_ctranslate2.options import CTranslate2Options

__all__ = ["CTranslate2Handler", "CTranslate2Options"]
