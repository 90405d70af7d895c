"""Long texts, over which llama.cpp overflows the stack.

Its pre-tokenizers of many models (Mistral's, DeepSeek's, GPT-OSS's, Llama 4's) are expressions for
``std::regex``, which calls itself once a character of what it matches: 27,000 letters without a
space take the 8 MiB of a thread's stack, and the process ends. Some (EXAONE's) match whole texts,
spaces and all. So long texts are read by a thread with a stack that is large enough.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from engineroom import ConfigurationError, ResourceNotAvailableError

__all__ = ["MOST_CHARACTERS", "with_stack_for"]

MOST_CHARACTERS: Final = 2**18
"""Of a run without a space, or of spaces. Some expressions take time by the square of it."""
_FEW: Final = 1000
"""So many fit any stack."""
_BYTES: Final = 512
"""Of the stack for each character; 314 to 334 were measured. It is memory once it is used."""
_BASE: Final = 2**20
_PAGE: Final = 2**16
"""A stack is a whole number of pages; none of today's are larger."""
_PART: Final = MOST_CHARACTERS // 2
_END_OF_RUN: Final = {False: re.compile(r"\s"), True: re.compile(r"\S")}
"""What ends a run that begins with a space, or with none."""
_lock: Final = threading.Lock()
_T = TypeVar("_T")


def with_stack_for(text: str, call: Callable[[], _T]) -> _T:
    """Call what reads the text, in a thread of its own where it is long. Blocks.

    :raises ConfigurationError: a run is longer than :data:`MOST_CHARACTERS`.
    :raises ResourceNotAvailableError: there is no memory for the stack.
    """
    if len(text) < _FEW:
        return call()
    if (longest := _longest_run(text)) > MOST_CHARACTERS:
        raise ConfigurationError(
            f"the text has {longest} characters without a space between them, or as many spaces; "
            f"this model's tokenizer reads at most {MOST_CHARACTERS}; break them up"
        )
    with ThreadPoolExecutor(1, thread_name_prefix="llamacpp-tokenize") as pool:
        with _lock:
            size = _BASE + len(text) * _BYTES
            before = threading.stack_size(size + -size % _PAGE)
            try:
                future = pool.submit(call)
            except RuntimeError as error:
                raise ResourceNotAvailableError(
                    f"no thread can be started with a stack for {len(text)} characters: {error}"
                ) from error
            finally:
                threading.stack_size(before)
        try:
            return future.result()
        finally:
            del future  # with what it raised, whose frames hold this one


def _longest_run(text: str) -> int:
    """Length of the longest run, if it is more than :data:`MOST_CHARACTERS`.

    Such a run has all of some part, of those that the text is cut into; most parts end theirs with
    their first word. A search keeps the interpreter, and so none is for more than a part.
    """
    longest = begin_of_next = 0
    for start in range(0, len(text) - _PART + 1, _PART):
        if start < begin_of_next:
            continue
        end_of_run = _END_OF_RUN[text[start].isspace()]
        end, match = start, None
        while match is None and end < len(text):
            match = end_of_run.search(text, end, end + _PART)
            end = min(end + _PART, len(text)) if match is None else match.start()
        if end - start < _PART:
            continue
        before = text[max(0, start - _PART) : start][::-1]
        match = end_of_run.search(before)
        longest = max(longest, end - start + (len(before) if match is None else match.start()))
        begin_of_next = end
    return longest
