"""Rows of the corpus that hold the loop for too long today, and why.

A pattern of ``runtime/route/row`` and its reason. Each must still match a row that fails, else it
is to be taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

KNOWN: Final[Mapping[str, str]] = {
    "*/list *": "every wrong item is collected and formatted",
    "*/object *": "every wrong member is collected and formatted",
    "*/many right items and a wrong one": "all of them are checked before the first is counted",
    "*/as many messages as fit": "all of them are checked before they are counted",
    "*/one message in as many parts as fit": "all of them are checked before they are counted",
    "*/lists of token ids, as many as fit": "all of them are checked before they are counted",
    "*/logit_bias: *": "a whole vocabulary is checked for each answer",
    "hf_transformers/*/a prompt of special tokens, *": "the tokenizer keeps the interpreter",
}
