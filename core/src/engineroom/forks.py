"""Processes that are forked: what has threads or engines belongs to the process that it began in.

A child of ``os.fork()`` has one thread, the one that forked. The others, and with them engines and
event loops, are there as copies that nothing will ever wake: whoever asks them for something waits
for ever, whatever the deadline says. So what has threads notes its process when it is first used
(:class:`Home`), and says so in any other; what is the process's own rather than a service's begins
anew in a child (:func:`renew_in_child`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from engineroom.errors import ConfigurationError

__all__ = ["Home", "renew_in_child"]

_renewals: Final[list[Callable[[], object]]] = []


class _Process:
    """This one. Kept, because asking the system for each request would cost more than comparing."""

    id = os.getpid()


def _forked() -> None:
    _Process.id = os.getpid()
    for renew in _renewals:
        renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def renew_in_child(renew: Callable[[], object]) -> None:
    """Have ``renew`` called in each child that is forked, for as long as this process lives."""
    _renewals.append(renew)


class Home:
    """The process that something belongs to: the one in which it was first used.

    :param what: it, as a message begins with it: "this service".
    """

    __slots__ = ("_process", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._process: int | None = None

    def settle(self) -> None:
        """It is used. :raises ConfigurationError: it belongs to another process."""
        if self._process is None:
            self._process = _Process.id
        elif self._process != _Process.id:
            raise self._elsewhere()

    def check(self) -> None:
        """It is asked for something. :raises ConfigurationError: it belongs to another process."""
        if self._process not in (None, _Process.id):
            raise self._elsewhere()

    def _elsewhere(self) -> ConfigurationError:
        return ConfigurationError(
            f"{self._what} belongs to process {self._process}, and this is process {_Process.id}, "
            "which was forked from it: threads and engines stay behind in a fork; make one here "
            "that is first used here, or start this process anew (multiprocessing's 'spawn')"
        )
