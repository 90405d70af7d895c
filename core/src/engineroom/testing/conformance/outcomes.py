"""How a check ends that does not pass; no test runner is needed to say it."""

from __future__ import annotations

from typing import NoReturn

from engineroom.border import words

__all__ = [
    "BrokenRuleError",
    "HungError",
    "InapplicableError",
    "LoopLostError",
    "broken",
    "same",
    "skip",
    "told",
]


class BrokenRuleError(Exception):
    """A rule is broken.

    :param did: what the check did.
    :param expected: what the rule makes one expect.
    :param saw: what happened instead.
    """

    def __init__(self, *, did: str, expected: str, saw: str) -> None:
        super().__init__(f"{did}: expected {expected}; saw {saw}")
        self.did = did
        self.expected = expected
        self.saw = saw


class HungError(BrokenRuleError):
    """Something did not end in its time; the event loop lives."""


class LoopLostError(BrokenRuleError):
    """The event loop does not turn any more: nothing else can be checked."""


class InapplicableError(Exception):
    """The check does not apply; the text says why."""


def broken(*, did: str, expected: str, saw: str) -> NoReturn:
    """:raises BrokenRuleError: always."""
    raise BrokenRuleError(did=did, expected=expected, saw=saw)


def same(did: str, what: str, expected: object, actual: object) -> None:
    """:raises BrokenRuleError: the actual text, or value, is another than ``what`` was expected."""
    if actual != expected:
        broken(did=did, expected=f"{what}, {expected!r}", saw=repr(actual))


def told(error: BaseException) -> str:
    """An error by its class and its text."""
    return words(error)


def skip(reason: str) -> NoReturn:
    """:raises InapplicableError: always."""
    raise InapplicableError(reason)
