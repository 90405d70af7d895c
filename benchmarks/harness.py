"""How a bar is measured: two sides in turn, the median of the ratios, what disturbed it.

The machine is never quiet, so the two sides of a comparison run A B A B …, each pair gives one
value, and the median of the values counts. A pair in which one side took more than three times
what it took at its fastest was disturbed from outside: it is thrown away and measured again.
The fastest and not the median, which on a busy machine may well be a disturbed one.

A bar is a function that yields a :class:`Measurement` or more::

    bar = Bars()

    @bar(3)
    def eight_at_once(settings: Settings) -> Iterator[Measurement]:
        "What A is, what B is, and what is left out."
        pairs = interleave(service_seconds, bare_seconds, settings.rounds)
        yield Measurement("…", at_least(0.95), pairs.values(lambda a, b: b / a), pairs.discarded)

The module stands in ``GROUPS`` of ``benchmarks/__main__.py``, and imports runtimes only inside
of such functions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "Bar",
    "BarFunction",
    "Bars",
    "DiscardError",
    "Measurement",
    "Pair",
    "Pairs",
    "Settings",
    "Target",
    "Ticks",
    "UnavailableError",
    "at_least",
    "at_most",
    "collect",
    "interleave",
    "repeat",
]

STALL: Final = 3.0
"""A side that took more than this many times its fastest time was disturbed."""
MAX_ATTEMPTS: Final = 2
"""Pairs that are measured at most, as a multiple of the pairs that are wanted."""


class UnavailableError(Exception):
    """The bar cannot be measured here. The message says why and what to do."""


class DiscardError(Exception):
    """Raised by a side: what was measured is not comparable; measure the pair again."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says.

    :param rounds: pairs of every comparison.
    :param quick: fewer tokens and requests, for trying out.
    :param llm_python: interpreter that has both ``engineroom`` and ``llm``.
    """

    rounds: int = 5
    quick: bool = False
    llm_python: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What the median is held against."""

    limit: float
    lower: bool
    unit: str = ""

    def met(self, value: float) -> bool:
        """Whether ``value`` reaches it."""
        return value >= self.limit if self.lower else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.lower else '≤'} {self.limit:g}{self.unit}"


def at_least(limit: float, unit: str = "") -> Target:
    """Reached by ``limit`` and more."""
    return Target(limit, True, unit)


def at_most(limit: float, unit: str = "") -> Target:
    """Reached by ``limit`` and less."""
    return Target(limit, False, unit)


@dataclass(slots=True)
class Measurement:
    """A line of the table.

    :param values: one a pair that counted.
    :param discarded: pairs that did not count.
    :param note: what else was seen, below the table.
    """

    what: str
    target: Target
    values: Sequence[float]
    discarded: int = 0
    note: str = ""

    @property
    def median(self) -> float:
        """The value that counts."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether it reaches the target."""
        return self.target.met(self.median)


# ── pairs ────────────────────────────────────────────────────────────────────────────────────


class Pair(NamedTuple):
    """What the two sides took, in the same unit."""

    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs that count, and how many did not."""

    kept: Sequence[Pair]
    discarded: int

    def values(self, value: Callable[[float, float], float]) -> list[float]:
        """``value(a, b)`` of each pair."""
        return [value(pair.a, pair.b) for pair in self.kept]

    def ratios(self) -> list[float]:
        """``a / b`` of each pair."""
        return self.values(lambda a, b: a / b)

    def median_a(self) -> float:
        """The median of the first side alone, for notes."""
        return statistics.median(pair.a for pair in self.kept)

    def median_b(self) -> float:
        """The median of the second side alone, for notes."""
        return statistics.median(pair.b for pair in self.kept)


def undisturbed(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in which neither side took more than :data:`STALL` times its fastest."""
    if not pairs:
        return []
    most_a = STALL * min(pair.a for pair in pairs)
    most_b = STALL * min(pair.b for pair in pairs)
    return [pair for pair in pairs if pair.a <= most_a and pair.b <= most_b]


def collect(measure: Callable[[], Pair], rounds: int) -> Pairs:
    """Measure until ``rounds`` pairs count, but not for ever.

    :raises UnavailableError: not one pair counts.
    """
    pairs: list[Pair] = []
    refused = 0
    why = "all took much longer than the fastest"
    kept: list[Pair] = []
    while len(kept) < rounds and len(pairs) + refused < MAX_ATTEMPTS * rounds:
        try:
            pairs.append(measure())
        except DiscardError as error:
            refused += 1
            why = str(error)
        kept = undisturbed(pairs)
    if not kept:
        raise UnavailableError(
            f"none of {refused + len(pairs)} rounds could be compared ({why}); try again"
        )
    return Pairs(kept, refused + len(pairs) - len(kept))


def interleave(a: Callable[[], float], b: Callable[[], float], rounds: int) -> Pairs:
    """Measure A B A B …

    :param a: does the work once and returns what it took.
    """
    return collect(lambda: Pair(a(), b()), rounds)


def repeat(measure: Callable[[], float], rounds: int) -> tuple[list[float], int]:
    """Measure what has no other side; no value is left out for its size.

    :returns: a value a round, and how many rounds were refused.
    :raises UnavailableError: not one round counts.
    """
    found: list[float] = []
    refused = 0
    why = ""
    while len(found) < rounds and len(found) + refused < MAX_ATTEMPTS * rounds:
        try:
            found.append(measure())
        except DiscardError as error:
            refused += 1
            why = str(error)
    if not found:
        raise UnavailableError(f"none of {refused} rounds can be used ({why}); try again")
    return found, refused


# ── bars ─────────────────────────────────────────────────────────────────────────────────────

BarFunction: TypeAlias = Callable[[Settings], Iterator[Measurement]]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: its number, and the function that measures it."""

    number: int
    measure: BarFunction


@dataclass(slots=True)
class Bars:
    """The bars of a module: ``bar = Bars()``, then ``@bar(1)`` above each function."""

    all: list[Bar] = field(default_factory=list)

    def __call__(self, number: int) -> Callable[[BarFunction], BarFunction]:
        def add(function: BarFunction) -> BarFunction:
            self.all.append(Bar(number, function))
            return function

        return add


# ── the machine ──────────────────────────────────────────────────────────────────────────────


class Ticks(NamedTuple):
    """Time that the machine's processors have spent since it started, and how much was stolen."""

    total: int
    stolen: int

    @classmethod
    def parse(cls, text: str) -> Ticks | None:
        """From the text of ``/proc/stat``; ``None``: it has no such line."""
        for line in text.splitlines():
            name, *rest = line.split()
            if name == "cpu" and len(rest) >= 8:
                # user nice system idle iowait irq softirq steal; guests count as user already
                numbers = [int(number) for number in rest[:8]]
                return cls(sum(numbers), numbers[7])
        return None

    @classmethod
    def now(cls) -> Ticks | None:
        """As they are; ``None``: this system does not tell."""
        try:
            return cls.parse(Path("/proc/stat").read_text(encoding="utf-8"))
        except OSError:
            return None

    def stolen_since(self, before: Ticks) -> float:
        """The share that was stolen since ``before``, 0 to 1."""
        total = self.total - before.total
        return (self.stolen - before.stolen) / total if total > 0 else 0.0
