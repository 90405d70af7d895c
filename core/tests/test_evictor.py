"""What fits and who has to go, over plain values: no manager, no loop, no handler."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, strategies as st

from engineroom import ModelConfig
from engineroom.memory.account import MemoryAccount
from engineroom.models.eviction import Evictor

NOW = 1000.0


@dataclass(eq=False)
class Plain:
    config: ModelConfig
    state: str = "ready"
    retired: bool = False
    leases: int = 0
    waiting_callers: int = 0
    last_used: float | None = None
    ready_at: float = 0.0
    load_duration_s: float | None = None
    load_timeout_s: float = 120.0

    def __str__(self) -> str:
        return self.config.model_id


def plain(name: str, *, pinned: bool = False, priority: int = 0, **fields) -> Plain:
    config = ModelConfig(model_id=name, source="plain:", pinned=pinned, priority=priority)
    return Plain(config, **fields)


def evictor_of(budget: int, holdings: dict[Plain, int]) -> Evictor:
    account = MemoryAccount({"cpu": budget})
    for holder, amount in holdings.items():
        if amount:
            account.reserve(holder, {"cpu": amount})
            account.settle(holder, {"cpu": amount})
    return Evictor(account, holdings, clock=lambda: NOW)


def names(victims: list[Plain] | None) -> list[str] | None:
    return None if victims is None else [str(victim) for victim in victims]


@pytest.mark.parametrize(
    ("fields", "ever", "now", "victims"),
    [
        ({}, True, True, ["other"]),
        ({"leases": 1}, True, False, ["other"]),
        ({"leases": 1, "priority": 1}, True, False, None),
        ({"leases": 1, "ready_at": NOW, "load_duration_s": 9.0}, True, False, None),
        ({"waiting_callers": 1}, True, False, None),
        ({"state": "loading"}, True, False, None),
        ({"state": "draining"}, True, False, []),
        ({"pinned": True}, False, False, None),
        ({"pinned": True, "retired": True}, True, True, ["other"]),
    ],
)
def test_who_may_go(fields, ever, now, victims):
    other, new = plain("other", **fields), plain("new", state="loading", waiting_callers=1)
    evictor = evictor_of(10, {other: 8, new: 0})
    need = {"cpu": 8}
    assert evictor.can_ever_fit(new, need) is ever
    assert evictor.fits_now(new, need) is now
    assert names(evictor.victims(new, need)) == victims


def test_a_model_that_was_just_loaded_is_protected_for_its_load_or_half_of_ones_patience():
    short = plain("short", leases=1, ready_at=NOW - 1, load_duration_s=9.0)
    long = plain("long", leases=1, ready_at=NOW - 1, load_duration_s=600.0)
    new = plain("new", state="loading", load_timeout_s=60.0)
    assert evictor_of(10, {short: 5, long: 5, new: 0}).seconds_until_next(new) == 8.0
    assert evictor_of(10, {long: 10, new: 0}).seconds_until_next(new) == 29.0
    short.ready_at = long.ready_at = NOW - 100
    assert evictor_of(10, {short: 5, long: 5, new: 0}).seconds_until_next(new) is None


models = st.builds(
    plain,
    st.uuids().map(str),
    pinned=st.booleans(),
    priority=st.integers(0, 2),
    state=st.sampled_from(["unloaded", "loading", "ready", "draining", "failed"]),
    retired=st.booleans(),
    leases=st.integers(0, 2),
    waiting_callers=st.integers(0, 1),
    last_used=st.none() | st.floats(0, NOW),
    ready_at=st.floats(0, NOW),
    load_duration_s=st.none() | st.floats(0, 300),
)


@given(st.dictionaries(models, st.integers(0, 10), max_size=6), models, st.integers(1, 20))
def test_victims_are_ready_are_needed_and_are_enough(holdings, new, amount):
    evictor, need = evictor_of(20, {**holdings, new: 0}), {"cpu": amount}
    account, victims = evictor.account, evictor.victims(new, need)
    going = [m for m in holdings if m.state == "draining"]
    if victims is None:
        assert not evictor.fits_now(new, need)
        return
    assert not account.lacking(need, without=[*going, *victims])
    for victim in victims:
        assert victim.state == "ready" and victim is not new and not victim.waiting_callers
        assert not victim.config.pinned or victim.retired
        assert not victim.leases or victim.config.priority <= new.config.priority
        rest = [v for v in victims if v is not victim]
        assert account.lacking(need, without=[*going, *rest]), "one too many"
    if evictor.fits_now(new, need):
        assert not any(victim.leases for victim in victims), "idle ones would have been enough"
