"""The toy runtime with one defect at a time: for each rule of the kit, a handler that breaks it.

Each function of these modules makes a class; its name, with dashes, is the rule that alone must
fail, or is followed by ``__`` and what kind of defect it is. ``ALSO`` has those that cannot but
break more.
"""

from __future__ import annotations

import broken_calls
import broken_discovery
import broken_forms
import broken_hygiene
import broken_parameters
import broken_running
import broken_text
from broken_table import BROKEN

__all__ = ["ALSO", "BROKEN", "ELSEWHERE", "ENDLESS", "MODULES"]

MODULES = (
    broken_calls,
    broken_discovery,
    broken_forms,
    broken_hygiene,
    broken_parameters,
    broken_running,
    broken_text,
)
"""Those that fill the table."""

ALSO: dict[str, tuple[set[str], str]] = {
    "nothing-after-the-end__text": (
        {"stream-equals-infer"},
        "text after the end is text that infer does not have",
    ),
    "loop-is-free__for_good": (
        {"no-leaked-tasks"},
        "nothing can be checked on a loop that does not turn any more",
    ),
    "structured-output": (
        {"hostile-grammar-neighbour"},
        "what knows of no grammar cannot refuse one that is none",
    ),
    "prompt-too-long": (
        {"prompt-token-ids-refused"},
        "token ids that are too many are a prompt that is too long",
    ),
    "can-handle__exits": (
        {"questions-are-cheap", "questions-change-nothing"},
        "they ask the same question, over and over",
    ),
    "cancel-by-task__goes_on": (
        {"*"},
        "what cannot be stopped keeps its slot, and later checks wait for it or for the next",
    ),
    "answers__blocks_the_loop": (
        {"*"},
        "nothing can be checked on a loop that does not turn any more",
    ),
}
"""Defect → the other rules that it cannot but break, and why; ``*``: every check after it."""

ENDLESS = {
    "answers__blocks_the_loop",
    "cancel-by-deadline",
    "cancel-by-task__goes_on",
    "cancel-while-queued__stays",
    "loop-is-free__for_good",
    "no-leaked-tasks",
    "slots-return",
    "stream-ends",
    "unload-in-use",
}
"""Defects for which the kit waits as long as ``timeout_s`` says, because something never comes."""

# What never fails in a run of the whole kit over a handler: needs an installation, or a suite.
ELSEWHERE = frozenset({"entry-point", "import-is-light", "overrides"})
