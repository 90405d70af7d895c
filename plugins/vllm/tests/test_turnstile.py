"""Who is let through to vLLM, and in which order. Needs no vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from engineroom import QueueFullError
from engineroom_vllm.turnstile import Turnstile


class Guest:
    """A request at the turnstile, in a task of its own."""

    def __init__(self, turnstile: Turnstile, owner: str, most: int | None = None, **more: Any):
        self.owner, self.inside = owner, False
        self._leave = asyncio.Event()
        self._pass = turnstile.passed(
            owner, most=most, full=lambda: QueueFullError("too many"), **more
        )
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with self._pass:
            self.inside = True
            try:
                await self._leave.wait()
            finally:
                self.inside = False

    def leave(self) -> None:
        self._leave.set()

    @property
    def waits(self) -> bool:
        return not self.inside and not self.task.done()


async def turns() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def test_keys_go_in_turn_however_many_one_has_waiting() -> None:
    turnstile = Turnstile(1)
    guests = [Guest(turnstile, "greedy") for _ in range(200)]
    await turns()
    guests += [Guest(turnstile, "mine"), Guest(turnstile, "mine")]
    await turns()
    order = []
    for _ in range(5):
        (inside,) = [guest for guest in guests if guest.inside]
        order.append(inside.owner)
        inside.leave()
        await turns()
    assert order == ["greedy", "greedy", "mine", "greedy", "mine"]
    for guest in guests:
        guest.task.cancel()
    await asyncio.gather(*(g.task for g in guests), return_exceptions=True)
    assert (turnstile.inside, turnstile.waiting) == (0, 0)


async def test_a_higher_priority_goes_first() -> None:
    turnstile = Turnstile(1)
    guests = [Guest(turnstile, "a"), Guest(turnstile, "a"), Guest(turnstile, "a", priority=9)]
    await turns()
    guests[0].leave()
    await turns()
    assert [guest.inside for guest in guests] == [False, False, True]
    for guest in guests:
        guest.leave()
    await asyncio.gather(*(guest.task for guest in guests))


async def test_a_line_full_of_one_keys_makes_room_for_another() -> None:
    turnstile = Turnstile(1)
    greedy = [Guest(turnstile, "greedy", 2) for _ in range(4)]
    await turns()
    mine = [Guest(turnstile, "mine", 2) for _ in range(2)]
    await turns()
    everyone = (*greedy, *mine)
    for guest in everyone:
        guest.leave()
    ends = await asyncio.gather(*(guest.task for guest in everyone), return_exceptions=True)
    refused = [isinstance(end, QueueFullError) for end in ends]
    assert refused == [False, False, True, True, False, True]


OPERATION = st.one_of(
    st.tuples(st.just("come"), st.sampled_from("abc"), st.booleans()),
    st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 30), st.booleans()),
)


@settings(max_examples=200, deadline=None)
@given(
    places=st.integers(1, 3),
    most=st.none() | st.integers(0, 4),
    operations=st.lists(OPERATION, max_size=30),
)
def test_no_place_is_lost_and_nobody_waits_in_vain(
    places: int, most: int | None, operations: list[tuple[Any, Any, Any]]
) -> None:
    async def play() -> None:
        turnstile = Turnstile(places)
        guests: list[Guest] = []
        for what, which, how in operations:
            if what == "come":
                guests.append(Guest(turnstile, which, most))
            elif guests and what == "leave":
                guests[which % len(guests)].leave()
            elif guests:
                guests[which % len(guests)].task.cancel()
            if how:
                continue  # the next thing happens before the loop turns
            await turns()
            inside = sum(guest.inside for guest in guests)
            waiting = sum(guest.waits for guest in guests)
            assert turnstile.inside == inside <= places
            assert turnstile.waiting == waiting
            assert most is None or waiting <= most
            assert not waiting or inside == places, "it waits in vain"
        for guest in guests:
            guest.leave()
        async with asyncio.timeout(20):
            await asyncio.gather(*(guest.task for guest in guests), return_exceptions=True)
        assert (turnstile.inside, turnstile.waiting) == (0, 0)

    asyncio.run(play())


async def test_what_is_refused_says_so() -> None:
    turnstile = Turnstile(1)
    first = Guest(turnstile, "a", 0)
    await turns()
    with pytest.raises(QueueFullError, match="too many"):
        await Guest(turnstile, "b", 0).task
    first.leave()
    await first.task
