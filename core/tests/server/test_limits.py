"""The limiter by itself: who is let in, in which order, and that no place is lost."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("msgspec")

from hypothesis import example, given, settings, strategies as st

from engineroom.server.http.errors import ApiError
from engineroom.server.http.limits import Limiter, TokenBucket
from engineroom.server.keys import KeyRing
from engineroom.server.settings import ServerSettings


async def turns(count: int = 8) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Guest:
    """A request at the limiter, in a task of its own."""

    def __init__(self, limiter: Limiter, key: str, count: int = 1, priority: int = 0) -> None:
        self.key, self.count, self.priority = key, count, priority
        self.inside = False
        self.refused: ApiError | None = None
        self._leave = asyncio.Event()
        self._limiter = limiter
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        try:
            async with self._limiter.slot(self.key, self.count, 0, priority=self.priority):
                self.inside = True
                await self._leave.wait()
        except ApiError as refused:
            self.refused = refused
        finally:
            self.inside = False

    def leave(self) -> None:
        self._leave.set()

    @property
    def waits(self) -> bool:
        return not self.inside and not self.task.done()


def empty(limiter: Limiter) -> bool:
    return (limiter.running, limiter.queued, limiter._by_key) == (0, 0, {})


# ── in order ─────────────────────────────────────────────────────────────────────────────────


async def test_who_comes_does_not_overtake_who_could_go_first() -> None:
    limiter = Limiter(ServerSettings(max_running=2))
    first, big = Guest(limiter, "a"), Guest(limiter, "a", 2)
    await turns()
    assert first.inside and big.waits
    late = [Guest(limiter, "b"), Guest(limiter, "a")]  # there is a place, but one waits for two
    await turns()
    assert late[0].waits and late[1].waits
    first.leave()
    await turns()
    assert big.inside and late[0].waits and late[1].waits
    big.leave()
    await turns()
    assert late[0].inside and late[1].inside
    for guest in late:
        guest.leave()
    await turns()
    assert empty(limiter)


async def test_a_key_at_its_bound_holds_nobody_else_up() -> None:
    limiter = Limiter(ServerSettings(max_running=3, key_max_running=1))
    guests = [Guest(limiter, key) for key in "aabbc"]
    await turns()
    assert [g.inside for g in guests] == [True, False, True, False, True]
    guests[2].leave()  # the first of those that wait is held up by its own key
    await turns()
    assert [g.inside for g in guests] == [True, False, False, True, True]
    for guest in guests:
        guest.leave()
    await turns()
    assert empty(limiter)


async def test_who_waits_for_its_own_key_as_well_holds_nobody_up() -> None:
    limiter = Limiter(ServerSettings(max_running=4, key_max_running=2))
    guests = [Guest(limiter, "a", 2), Guest(limiter, "b"), Guest(limiter, "a", 2)]
    await turns()
    assert guests[2].waits  # neither its key nor the server has room for two more
    guests.append(Guest(limiter, "c"))
    await turns()
    assert guests[3].inside
    for guest in guests:
        guest.leave()
    await turns()
    assert empty(limiter)


async def test_who_is_let_in_and_cancelled_at_the_same_time_leaves_its_place() -> None:
    limiter = Limiter(ServerSettings(max_running=1))
    first, second, third = (Guest(limiter, "a") for _ in range(3))
    await turns()
    first.leave()
    while limiter.queued == 2:  # until the second is let in, which it does not know yet
        await asyncio.sleep(0)
    assert not second.inside
    second.task.cancel()
    await turns()
    assert second.task.cancelled() and third.inside
    third.leave()
    await turns()
    assert empty(limiter)


async def test_all_who_wait_can_be_sent_away() -> None:
    limiter = Limiter(ServerSettings(max_running=1))
    guests = [Guest(limiter, "a") for _ in range(3)]
    await turns()
    limiter.refuse_waiting(ApiError(503, "it stops", "stopping"))
    await turns()
    assert guests[0].inside
    assert [g.refused is not None and g.refused.status for g in guests[1:]] == [503, 503]
    guests[0].leave()
    await turns()
    assert empty(limiter)


async def test_more_at_once_than_may_ever_run_is_a_bad_request() -> None:
    limiter = Limiter(ServerSettings(max_running=4, key_max_running=2))
    for count in (3, 5):
        guest = Guest(limiter, "a", count)
        await turns()
        assert guest.refused is not None and guest.refused.status == 400
    assert empty(limiter)


async def test_keys_go_in_turn_however_many_requests_one_has_waiting() -> None:
    limiter = Limiter(ServerSettings(max_running=1, max_queued=2000))
    first = Guest(limiter, "greedy")
    await turns()
    greedy = [Guest(limiter, "greedy") for _ in range(1000)]
    await turns()
    mine, other = [Guest(limiter, "mine") for _ in range(2)], Guest(limiter, "other")
    order = []
    inside = first
    for _ in range(6):
        inside.leave()
        await turns()
        (inside,) = [guest for guest in (*greedy, *mine, other) if guest.inside]
        order.append(inside.key)
    assert sorted(order[:3]) == ["greedy", "mine", "other"] and order[:6].count("mine") == 2
    inside.leave()
    for guest in (*greedy, *mine, other):
        guest.leave()
    await asyncio.gather(*(guest.task for guest in (*greedy, *mine, other)))
    assert empty(limiter)


async def test_a_higher_priority_goes_first() -> None:
    limiter = Limiter(ServerSettings(max_running=1))
    guests = [Guest(limiter, "a")]
    await turns()
    guests += [Guest(limiter, "a"), Guest(limiter, "b"), Guest(limiter, "a", priority=5)]
    await turns()
    order = []
    for _ in range(4):
        (inside,) = [number for number, guest in enumerate(guests) if guest.inside]
        order.append(inside)
        guests[inside].leave()
        await turns()
    assert order == [0, 3, 2, 1] and empty(limiter)  # of two equals, the key that was served before


async def test_a_queue_full_of_one_keys_requests_makes_room_for_another() -> None:
    limiter = Limiter(ServerSettings(max_running=1, max_queued=4))
    greedy = [Guest(limiter, "greedy") for _ in range(6)]
    await turns()
    assert greedy[5].refused is not None and limiter.queued == 4
    mine = [Guest(limiter, "mine", count) for count in (1, 1, 1)]
    await turns()
    assert [g.refused is not None for g in greedy] == [False, False, False, True, True, True]
    assert [g.refused is not None for g in mine] == [False, False, True]
    for guest in greedy[3:]:
        assert guest.refused is not None
        assert (guest.refused.status, guest.refused.code) == (429, "queue_full")
    for guest in (*greedy, *mine):
        guest.leave()
    await turns(30)
    assert empty(limiter)


OPERATION = st.one_of(
    st.tuples(st.just("come"), st.sampled_from("abc"), st.integers(1, 2)),
    st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 30), st.booleans()),
)


@settings(max_examples=400)
@given(
    max_running=st.none() | st.integers(2, 4),
    key_max_running=st.none() | st.integers(2, 3),
    max_queued=st.integers(1, 6),
    operations=st.lists(OPERATION, max_size=30),
)
@example(None, 3, 4, [("come", "b", 2), ("come", "b", 2), ("come", "b", 1), ("come", "a", 1)])
def test_limits_hold_nobody_waits_in_vain_and_no_place_is_lost(
    max_running: int | None,
    key_max_running: int | None,
    max_queued: int,
    operations: list[tuple[Any, Any, Any]],
) -> None:
    def check(limiter: Limiter, guests: list[Guest]) -> None:
        inside = [g for g in guests if g.inside]
        waiting = [g for g in guests if g.waits]
        running = sum(g.count for g in inside)
        of_key = {k: sum(g.count for g in inside if g.key == k) for k in "abc"}
        assert limiter.running == running
        assert limiter.queued == sum(g.count for g in waiting) <= max_queued
        assert max_running is None or running <= max_running
        assert key_max_running is None or max(of_key.values()) <= key_max_running
        held: set[str] = set()
        for guest in waiting:
            mine = of_key[guest.key] + guest.count
            if guest.key in held:
                continue
            if key_max_running is not None and mine > key_max_running:
                held.add(guest.key)
                continue
            assert max_running is not None, "it waits in vain"
            assert running + guest.count > max_running, "it waits in vain"
            break  # it is next, and those behind it let it be

    async def play() -> None:
        limiter = Limiter(
            ServerSettings(
                max_running=max_running, key_max_running=key_max_running, max_queued=max_queued
            )
        )
        guests: list[Guest] = []
        for what, which, how in operations:
            if what == "come":
                guests.append(Guest(limiter, which, how))
            elif guests:
                guest = guests[which % len(guests)]
                if what == "leave":
                    guest.leave()
                else:
                    guest.task.cancel()
                if how:
                    continue  # the next thing happens before the loop turns
            await turns()
            check(limiter, guests)
        for guest in guests:
            guest.leave()
        async with asyncio.timeout(20):
            await asyncio.gather(*(g.task for g in guests), return_exceptions=True)
        assert empty(limiter)

    asyncio.run(play())


# ── tokens ───────────────────────────────────────────────────────────────────────────────────


@given(
    per_minute=st.integers(1, 10_000),
    asked=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 100)), max_size=20),
)
def test_no_more_tokens_are_taken_than_a_minute_gives(
    per_minute: int, asked: list[tuple[int, int]]
) -> None:
    now = 0.0
    bucket = TokenBucket(per_minute, lambda: now)
    taken = 0
    for tokens, later in asked:
        now += later
        wait = bucket.wait_s(tokens)
        assert wait >= 0
        now += wait
        assert bucket.wait_s(tokens) <= 1e-6  # so long, and no longer
        taken += bucket.take(tokens)
        assert taken <= per_minute * (1 + now / 60) + 1e-3


def test_what_was_not_used_comes_back_and_what_was_used_too_much_is_owed() -> None:
    now = 0.0
    bucket = TokenBucket(60, lambda: now)
    bucket.settle(bucket.take(60), 10)
    assert bucket.wait_s(50) == 0 and bucket.wait_s(51) == pytest.approx(1)
    bucket.settle(bucket.take(50), 110)
    assert bucket.wait_s(1) == pytest.approx(61)
    now = 1e6
    assert bucket.wait_s(60) == 0 and bucket.wait_s(10**9) == 0  # never more than a minute's


# ── keys ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", ["key-number-0-of-three", "key-number-2-of-three", "no such key"])
def test_every_key_is_compared_in_constant_time_with_all_that_there_are(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    ring = KeyRing([(f"k{n}", f"key-number-{n}-of-three") for n in range(3)])
    monkeypatch.setattr(hmac, "compare_digest", counted)
    found = ring.find(key)
    assert (found and found.name) == (None if key.startswith("no") else f"k{key[11]}")
    assert len(compared) == 3 and {len(part) for pair in compared for part in pair} == {32}
