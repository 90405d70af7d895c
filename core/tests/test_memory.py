"""The account of memory, and who has to go: pure, over any numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engineroom.memory.account import (
    TOLERANCE_BYTES,
    Footprint,
    MemoryAccount,
    choose_victims,
    settled,
    spread,
)

DEVICES = ["cpu", "cuda:0", "cuda:1"]
GIB = 1 << 30

devices = st.sampled_from(DEVICES)
amounts = st.dictionaries(devices, st.integers(0, 100))


# ── the account ──────────────────────────────────────────────────────────────────────────────


class AccountLife(RuleBasedStateMachine):
    """Reservations, settlements and releases, against plain sums."""

    def __init__(self) -> None:
        super().__init__()
        self.account = MemoryAccount()
        self.expected: dict[str, dict[str, int]] = {}
        self.kept: dict[str, int] = {}

    @initialize(budgets=st.dictionaries(devices, st.none() | st.integers(0, 300)))
    def begin(self, budgets):
        self.budgets = budgets
        for device, budget in budgets.items():
            self.account.set_budget(device, budget)

    @rule(owner=st.sampled_from("abc"), need=amounts)
    def reserve(self, owner, need):
        if owner in self.expected:
            with pytest.raises(ValueError, match="holds memory already"):
                self.account.reserve(owner, need)
            return
        self.account.reserve(owner, need)
        self.expected[owner] = need

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), held=amounts)
    def settle(self, data, held):
        owner = data.draw(st.sampled_from(sorted(self.expected)))
        self.account.settle(owner, held)
        self.expected[owner] = held

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), lost=amounts)
    def release(self, data, lost):
        owner = data.draw(st.sampled_from(sorted(self.expected)))
        self.account.release(owner, lost)
        del self.expected[owner]
        for device, amount in lost.items():
            self.kept[device] = self.kept.get(device, 0) + amount

    @rule(device=devices, amount=st.integers(0, 100))
    def reuse(self, device, amount):
        self.account.reused(device, amount)
        self.kept[device] = max(0, self.kept.get(device, 0) - amount)

    @invariant()
    def it_adds_up(self):
        for device in DEVICES:
            held = sum(need.get(device, 0) for need in self.expected.values())
            assert self.account.taken(device) == held
            budget = getattr(self, "budgets", {}).get(device)
            free = None if budget is None else budget - held - self.kept.get(device, 0)
            assert self.account.free(device) == free
        for report in self.account.report():
            assert report.held + report.reserved == sum(report.holders.values())
            if report.budget is not None:
                assert report.budget == (
                    report.held + report.reserved + report.not_returned + report.free
                )
        assert self.account.owners == frozenset(self.expected)


TestAccountLife = AccountLife.TestCase


@given(st.dictionaries(devices, st.integers(0, 100)), amounts, amounts)
def test_what_is_lacking_is_what_must_become_free(budgets, held, need):
    account = MemoryAccount(budgets)
    account.reserve("holder", held)
    lacking = account.lacking(need)
    for device, amount in need.items():
        free = account.free(device)
        assert lacking.get(device, 0) == (
            0 if free is None or not amount else max(0, amount - free)
        )
    assert set(account.lacking(need, without=["holder"])) <= set(lacking)


def test_releasing_what_nobody_holds_is_a_mistake():
    account = MemoryAccount({"cpu": 1})
    with pytest.raises(KeyError):
        account.release("nobody")
    with pytest.raises(KeyError):
        account.settle("nobody", {})


def test_a_copy_is_its_own():
    account = MemoryAccount({"cpu": 10})
    account.reserve("a", {"cpu": 4})
    copy = account.copy({owner: owner.upper() for owner in account.owners})
    copy.release("A", {"cpu": 1})
    assert account.free("cpu") == 6 and account.owners == {"a"}
    assert copy.free("cpu") == 9 and copy.owners == frozenset()


def test_devices_come_in_order():
    account = MemoryAccount({"cuda:10": 1, "cuda:2": 1, "cpu": 1})
    assert [report.device for report in account.report()] == ["cpu", "cuda:2", "cuda:10"]


# ── what a model really takes ────────────────────────────────────────────────────────────────


@given(st.none() | st.integers(0, 10**12), amounts)
def test_a_handlers_number_is_spread_whole(total, estimate):
    shares = spread(total, estimate)
    if total is None:
        assert shares == estimate
    else:
        assert sum(shares.values()) == total
        assert all(amount >= 0 for amount in shares.values())


def test_what_is_held_is_the_larger_of_word_and_measurement():
    estimate = {"cpu": 2 * GIB}
    assert settled(estimate, None, {}) == estimate
    assert settled(estimate, 3 * GIB, {"cpu": GIB}) == {"cpu": 3 * GIB}
    assert settled(estimate, 3 * GIB, {"cpu": 4 * GIB}) == {"cpu": 4 * GIB}
    # Noise counts for nothing, and neither does what a fake claims without taking it.
    assert settled({}, None, {"cpu": TOLERANCE_BYTES}) == {}


def test_memory_that_stays_behind_is_counted_once_and_found_again():
    footprint = Footprint()
    assert footprint.loaded({"cpu": 5 * GIB}) == {}
    assert footprint.unloaded({"cpu": 4 * GIB}) == {"cpu": GIB}
    # The next load uses it, so that it grows the process by less.
    assert footprint.loaded({"cpu": 4 * GIB}) == {"cpu": GIB}
    assert footprint.unloaded({"cpu": 4 * GIB}) == {"cpu": GIB}
    # Where nobody could measure, it is taken to.
    assert footprint.beside_left({"cpu": 5 * GIB, "cuda:0": GIB}) == {
        "cpu": 4 * GIB, "cuda:0": GIB,
    }  # fmt: skip
    assert footprint.loaded({}) == {"cpu": GIB}
    assert footprint.beside_left({"cpu": 5 * GIB}) == {"cpu": 5 * GIB}
    assert footprint.unloaded({"cpu": 4 * GIB}) == {"cpu": GIB}
    # A real leak goes on growing.
    assert footprint.loaded({"cpu": 5 * GIB}) == {}
    assert footprint.unloaded({"cpu": 4 * GIB}) == {"cpu": GIB}


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=30))
def test_what_is_not_returned_never_exceeds_what_was_taken(cycles):
    """Over any loads and unloads: the account keeps at most what the process grew by."""
    account, footprint, grown = MemoryAccount({"cpu": 0}), Footprint(), 0
    for growth, freed in ((g * GIB, min(f, g) * GIB) for g, f in cycles):
        for device, amount in footprint.loaded({"cpu": growth}).items():
            account.reused(device, amount)
        account.reserve("m", {})
        account.release("m", footprint.unloaded({"cpu": freed}))
        grown += growth
        assert 0 <= -account.free("cpu") <= max(grown, footprint.grown["cpu"])


def test_small_differences_are_noise():
    footprint = Footprint()
    footprint.loaded({"cpu": 10 * GIB})
    assert footprint.unloaded({"cpu": 10 * GIB - TOLERANCE_BYTES}) == {}
    assert footprint.unloaded({"cpu": 9 * GIB}) == {"cpu": GIB}
    assert footprint.unloaded({"cpu": -GIB}) == {"cpu": 10 * GIB}


# ── who has to go ────────────────────────────────────────────────────────────────────────────

candidates = st.lists(amounts, max_size=6).map(lambda given: list(enumerate(given)))


def total(holdings, device):
    return sum(holding.get(device, 0) for holding in holdings)


@given(amounts, candidates)
def test_the_victims_are_enough_and_none_is_needless(lacking, given):
    victims = choose_victims(lacking, given)
    holdings = dict(given)
    wanted = {d: n for d, n in lacking.items() if n > 0}
    if victims is None:
        assert any(total(holdings.values(), d) < n for d, n in wanted.items())
        return
    assert victims == sorted(set(victims)), "in the order of the candidates"
    for device, amount in wanted.items():
        assert total([holdings[v] for v in victims], device) >= amount
    for spared in victims:
        rest = [holdings[v] for v in victims if v != spared]
        assert any(total(rest, d) < n for d, n in wanted.items()), "one too many"


@given(amounts, candidates)
def test_nobody_goes_where_nothing_is_lacking(lacking, given):
    assert choose_victims(dict.fromkeys(lacking, 0), given) == []


def test_the_most_dispensable_goes_first():
    three = [("a", {"cpu": 4}), ("b", {"cpu": 4}), ("c", {"cpu": 4})]
    assert choose_victims({"cpu": 3}, three) == ["a"]
    assert choose_victims({"cpu": 6}, three) == ["a", "b"]
    # One that is large enough alone spares those before it.
    assert choose_victims({"cpu": 6}, [("a", {"cpu": 1}), ("b", {"cpu": 9})]) == ["b"]
    # Whoever holds nothing of what is lacking stays.
    assert choose_victims({"cuda:0": 1}, [("a", {"cpu": 9}), ("b", {"cuda:0": 1})]) == ["b"]
