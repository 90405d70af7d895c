"""The account of memory: what each device has, and who holds how much of it. Pure; no I/O.

A model's memory is reserved before its load from an estimate, settled after the load with what
it turned out to be, and given back when the model is unloaded. What did not come back stays in
the account under ``not_returned``, until a later load is seen to use it again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

__all__ = [
    "TOLERANCE_BYTES",
    "DeviceMemory",
    "Footprint",
    "MemoryAccount",
    "choose_victims",
    "settled",
    "spread",
]

TOLERANCE_BYTES: Final = 16 << 20
"""Differences between measurements that mean nothing: an allocator keeps a few pages."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The account of one device, in bytes.

    :param budget: what models may take together; ``None``: no bound is known.
    :param detected: the budget was found on the machine, not written in the deployment.
    :param held: what loaded models take.
    :param reserved: what is kept for models that are being loaded.
    :param not_returned: what unloaded models did not give back.
    :param free: what is left; ``None``: no bound is known. Negative if models turned out larger
        than was estimated.
    :param holders: what each model holds or has reserved.
    """

    device: str
    budget: int | None
    detected: bool
    held: int
    reserved: int
    not_returned: int
    free: int | None
    holders: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Holding:
    amounts: dict[str, int]
    settled: bool = False


class MemoryAccount:
    """Who holds how much of which device.

    Owners are any hashable objects; their ``str`` is what reports call them.

    :param budgets: bytes of each device; ``None``, or not there: no bound.
    """

    def __init__(self, budgets: Mapping[str, int | None] | None = None) -> None:
        self._budgets: dict[str, int | None] = dict(budgets or {})
        self._detected: set[str] = set()
        self._holdings: dict[Hashable, _Holding] = {}
        self._not_returned: dict[str, int] = {}

    # ── budgets ──────────────────────────────────────────────────────────────────────────────

    def knows(self, device: str) -> bool:
        """Whether a budget was set, be it that there is no bound."""
        return device in self._budgets

    def set_budget(self, device: str, budget: int | None, *, detected: bool = False) -> None:
        """Set or change what a device has; ``None``: no bound."""
        self._budgets[device] = budget
        (self._detected.add if detected else self._detected.discard)(device)

    def forget_budget(self, device: str) -> None:
        """The device's budget is not known any more."""
        self._budgets.pop(device, None)
        self._detected.discard(device)

    # ── holdings ─────────────────────────────────────────────────────────────────────────────

    def reserve(self, owner: Hashable, need: Mapping[str, int]) -> None:
        """Keep memory for a load. The caller has looked at :meth:`lacking`.

        :raises ValueError: the owner holds memory already.
        """
        if owner in self._holdings:
            raise ValueError(f"{owner} holds memory already")
        self._holdings[owner] = _Holding(dict(need))

    def settle(self, owner: Hashable, held: Mapping[str, int]) -> None:
        """The load is over: the owner holds this much, whatever was reserved.

        :raises KeyError: nothing was reserved.
        """
        holding = self._holdings[owner]
        holding.amounts, holding.settled = dict(held), True

    def release(self, owner: Hashable, not_returned: Mapping[str, int] | None = None) -> None:
        """The owner holds nothing any more.

        :param not_returned: what did not come back nevertheless.
        :raises KeyError: it held nothing before.
        """
        del self._holdings[owner]
        for device, lost in (not_returned or {}).items():
            if lost > 0:
                self._not_returned[device] = self._not_returned.get(device, 0) + lost

    def reused(self, device: str, amount: int) -> None:
        """A load took this much of what had not been returned."""
        left = self._not_returned.get(device, 0) - max(0, amount)
        if left > 0:
            self._not_returned[device] = left
        else:
            self._not_returned.pop(device, None)

    def holding(self, owner: Hashable) -> Mapping[str, int]:
        """What the owner holds or has reserved; empty: nothing."""
        holding = self._holdings.get(owner)
        return {} if holding is None else dict(holding.amounts)

    @property
    def owners(self) -> frozenset[Hashable]:
        """Everyone who holds or has reserved memory."""
        return frozenset(self._holdings)

    # ── questions ────────────────────────────────────────────────────────────────────────────

    def free(self, device: str) -> int | None:
        """Bytes that nobody holds; ``None``: no bound. May be negative."""
        budget = self._budgets.get(device)
        if budget is None:
            return None
        return budget - self.taken(device) - self._not_returned.get(device, 0)

    def taken(self, device: str) -> int:
        """What is held or reserved on the device, bounded or not."""
        return sum(h.amounts.get(device, 0) for h in self._holdings.values())

    def lacking(
        self, need: Mapping[str, int], without: Iterable[Hashable] | None = None
    ) -> dict[str, int]:
        """By how much ``need`` goes beyond what is free, on each device where it does.

        :param without: as it would be if these owners held nothing.
        """
        gone = set(without or ())
        lacking = {}
        for device, amount in need.items():
            free = self.free(device)
            if free is None or amount <= 0:
                continue
            free += sum(
                h.amounts.get(device, 0) for owner, h in self._holdings.items() if owner in gone
            )
            if amount > free:
                lacking[device] = amount - free
        return lacking

    def bounded(self, need: Mapping[str, int]) -> set[str]:
        """The devices of ``need`` on which it could be refused."""
        return {d for d, amount in need.items() if amount > 0 and self.free(d) is not None}

    def report(self) -> tuple[DeviceMemory, ...]:
        """The account of every device that has a budget or a holder, by name."""
        devices = {*self._budgets, *self._not_returned}
        for holding in self._holdings.values():
            devices.update(holding.amounts)
        return tuple(self._report(device) for device in sorted(devices, key=_device_order))

    def _report(self, device: str) -> DeviceMemory:
        holders: dict[str, int] = {}
        amounts = {True: 0, False: 0}
        for owner, holding in self._holdings.items():
            if amount := holding.amounts.get(device, 0):
                holders[str(owner)] = holders.get(str(owner), 0) + amount
                amounts[holding.settled] += amount
        return DeviceMemory(
            device,
            self._budgets.get(device),
            device in self._detected,
            amounts[True],
            amounts[False],
            self._not_returned.get(device, 0),
            self.free(device),
            holders,
        )

    def copy(self, owners: Mapping[Any, Hashable]) -> MemoryAccount:
        """An account that may be changed without changing this one.

        :param owners: who takes an owner's place in it; one that is not named stays.
        """
        other = MemoryAccount(self._budgets)
        other._detected = set(self._detected)
        other._not_returned = dict(self._not_returned)
        other._holdings = {
            owners.get(owner, owner): _Holding(dict(h.amounts), h.settled)
            for owner, h in self._holdings.items()
        }
        return other


def _device_order(device: str) -> tuple[bool, str, int]:
    kind, _, number = device.partition(":")
    return kind != "cpu", kind, int(number) if number.isdecimal() else -1


# ── what a model really takes ────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Footprint:
    """By how much the process grew when a model was loaded: what should come back.

    Measured anew with each load and unload that nothing else overlapped. ``grown`` remembers the
    most, because a load that finds memory that an earlier one left behind grows by less. ``left``
    is what the last unload left behind, in the account under ``not_returned``: it is the model's
    own, and taken to be used again by its next load (a library stays, an allocator keeps its pool)
    until that load is seen not to.
    """

    grown: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def beside_left(self, need: Mapping[str, int]) -> dict[str, int]:
        """What a load that needs so much takes beside what the last unload left behind."""
        return {d: max(0, amount - self.left.get(d, 0)) for d, amount in need.items()}

    def loaded(self, growth: Mapping[str, int]) -> dict[str, int]:
        """A load grew the process by this much; a device that is not named was not measured.

        :returns: what it took of memory that had not been returned, by device.
        """
        reused, self.left = self.left, {}
        for device, amount in growth.items():
            reused.pop(device, None)
            known = self.grown.get(device)
            if known is not None and amount < known:
                reused[device] = known - max(0, amount)
            self.grown[device] = max(known or 0, amount)
        return reused

    def unloaded(self, freed: Mapping[str, int]) -> dict[str, int]:
        """An unload freed this much.

        :returns: what did not come back, by device, where that is more than noise.
        """
        lost = {}
        for device, amount in freed.items():
            missing = self.grown.get(device, 0) - max(0, amount)
            if missing > max(TOLERANCE_BYTES, self.grown.get(device, 0) // 20):
                lost[device] = missing
        self.left = dict(lost)
        return lost


def spread(total: int | None, estimate: Mapping[str, int]) -> dict[str, int]:
    """A handler's one number of bytes over the devices that it estimated; else it is the CPU's."""
    if total is None:
        return dict(estimate)
    expected = sum(estimate.values())
    if expected <= 0:
        return {next(iter(estimate), "cpu"): total} if total > 0 else {}
    shares = {device: total * amount // expected for device, amount in estimate.items()}
    largest = max(estimate, key=lambda device: estimate[device])
    shares[largest] += total - sum(shares.values())
    return shares


def settled(
    estimate: Mapping[str, int], said: int | None, grown: Mapping[str, int]
) -> dict[str, int]:
    """What a model is taken to hold: what its handler says or what was measured, the larger.

    :param estimate: what was reserved.
    :param said: ``memory_bytes`` of the loaded model; ``None``: the handler does not tell.
    :param grown: its footprint; a mapped file that was not read yet is missing there.
    """
    held = spread(said, estimate)
    for device, amount in grown.items():
        if amount - held.get(device, 0) > TOLERANCE_BYTES:
            held[device] = amount
    return held


# ── who has to go ────────────────────────────────────────────────────────────────────────────


def choose_victims(
    lacking: Mapping[str, int], candidates: Sequence[tuple[_T, Mapping[str, int]]]
) -> list[_T] | None:
    """Who has to go so that what is lacking becomes free.

    Candidates are taken in the order given, those that hold nothing of what is lacking are
    passed over, and whoever turns out not to be needed in the end, the last first, stays.

    :param lacking: bytes by device.
    :param candidates: each with what it holds, the most dispensable first.
    :returns: the fewest that this order allows; ``None``: all together are not enough.
    """
    open_ = {device: amount for device, amount in lacking.items() if amount > 0}
    chosen: list[tuple[_T, Mapping[str, int]]] = []
    for candidate, holding in candidates:
        if all(amount <= 0 for amount in open_.values()):
            break
        if any(amount > 0 and holding.get(device, 0) > 0 for device, amount in open_.items()):
            chosen.append((candidate, holding))
            for device in open_:
                open_[device] -= holding.get(device, 0)
    if any(amount > 0 for amount in open_.values()):
        return None
    for place in reversed(range(len(chosen))):
        holding = chosen[place][1]
        if all(amount + holding.get(device, 0) <= 0 for device, amount in open_.items()):
            for device in open_:
                open_[device] += holding.get(device, 0)
            del chosen[place]
    return [candidate for candidate, _ in chosen]
