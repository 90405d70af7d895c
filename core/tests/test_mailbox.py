"""From the engine's thread to asyncio: order, errors, and one wake-up for many."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from engineroom import EngineDeadError, InferenceError, TokenStep
from engineroom.generation.mailbox import Mailbox, deliver
from engineroom.generation.waker import LoopWaker


def step(token: int) -> TokenStep:
    return TokenStep((token,))


def elsewhere(work: Callable[[], None]) -> None:
    """Run in a thread of its own, to its end; an error of it fails the test."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


async def tokens(mailbox: Mailbox, count: int) -> list[int]:
    return [(await mailbox.get()).token_ids[0] for _ in range(count)]


async def test_steps_come_in_the_order_in_which_they_were_put() -> None:
    mailbox = Mailbox()
    for token in range(5):
        mailbox.put(step(token))
    assert await tokens(mailbox, 5) == [0, 1, 2, 3, 4]


async def test_one_that_waits_is_woken() -> None:
    mailbox = Mailbox()
    waiting = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)  # it waits now
    assert not waiting.done()
    elsewhere(lambda: deliver([(mailbox, step(7))]))
    async with asyncio.timeout(5):
        assert (await waiting).token_ids == (7,)


async def test_several_steps_before_it_wakes_are_not_lost() -> None:
    mailbox = Mailbox()
    waiting = asyncio.create_task(tokens(mailbox, 3))
    await asyncio.sleep(0)
    for token in range(3):  # the second finds a waiter that is woken already
        mailbox.put(step(token))
    async with asyncio.timeout(5):
        assert await waiting == [0, 1, 2]


async def test_an_error_comes_in_its_turn_and_is_raised() -> None:
    mailbox = Mailbox()
    error = EngineDeadError("it died")
    elsewhere(lambda: deliver([(mailbox, step(1)), (mailbox, error)]))
    assert await tokens(mailbox, 1) == [1]
    with pytest.raises(EngineDeadError) as caught:
        await mailbox.get()
    assert caught.value is error


async def test_one_that_waits_is_woken_by_an_error() -> None:
    mailbox = Mailbox()
    waiting = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    elsewhere(lambda: deliver([(mailbox, InferenceError("no"))]))
    async with asyncio.timeout(5):
        with pytest.raises(InferenceError, match="no"):
            await waiting


async def test_a_wait_may_be_cancelled_and_begun_again() -> None:
    mailbox = Mailbox()
    waiting = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    mailbox.put(step(3))  # nobody waits: it is kept
    assert await tokens(mailbox, 1) == [3]


async def test_a_step_put_while_the_wait_is_being_cancelled_is_kept() -> None:
    mailbox = Mailbox()
    waiting = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    waiting.cancel()
    mailbox.put(step(4))  # between cancel() and its taking effect
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await tokens(mailbox, 1) == [4]


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[LoopWaker]:
    """Which event loops were woken."""
    found: list[LoopWaker] = []
    original = LoopWaker.call

    def noted(waker: LoopWaker, callback: Any, argument: Any) -> None:
        found.append(waker)
        original(waker, callback, argument)

    monkeypatch.setattr(LoopWaker, "call", noted)
    return found


async def test_a_step_of_many_requests_wakes_their_loop_once(rung: list[LoopWaker]) -> None:
    mailboxes = [Mailbox() for _ in range(8)]
    elsewhere(lambda: deliver([(mailbox, step(i)) for i, mailbox in enumerate(mailboxes)]))
    assert rung == [mailboxes[0].waker]
    assert [(await tokens(mailbox, 1))[0] for mailbox in mailboxes] == list(range(8))


async def test_nothing_to_deliver_wakes_nobody(rung: list[LoopWaker]) -> None:
    elsewhere(lambda: deliver([]))
    assert not rung


def test_each_event_loop_gets_its_own(rung: list[LoopWaker]) -> None:
    loops = [asyncio.new_event_loop() for _ in range(2)]
    try:
        first, second = (loop.run_until_complete(_mailbox()) for loop in loops)
        parcels = [(first, step(1)), (second, step(2)), (first, step(3)), (second, step(4))]
        elsewhere(lambda: deliver(parcels))
        assert rung == [first.waker, second.waker]
        assert loops[0].run_until_complete(tokens(first, 2)) == [1, 3]
        assert loops[1].run_until_complete(tokens(second, 2)) == [2, 4]
    finally:
        for loop in loops:
            loop.close()


async def test_a_closed_loop_does_not_keep_the_others_from_their_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = asyncio.new_event_loop()

    def in_another_loop() -> Mailbox:
        try:
            return gone.run_until_complete(_mailbox())
        finally:
            gone.close()

    dead = await asyncio.to_thread(in_another_loop)
    alive = Mailbox()
    with caplog.at_level(logging.DEBUG, "engineroom.mailbox"):
        elsewhere(lambda: deliver([(dead, step(1)), (dead, step(2)), (alive, step(3))]))
    assert await tokens(alive, 1) == [3]
    assert "2 steps had no event loop" in caplog.text


async def _mailbox() -> Mailbox:
    return Mailbox()


# ── pushing ──────────────────────────────────────────────────────────────────────────────────


class Taken:
    """Takes steps until it has had ``most``; raises instead at the token ``bad``."""

    def __init__(self, most: int, bad: int | None = None) -> None:
        self.tokens: list[int] = []
        self.most, self.bad = most, bad

    def __call__(self, step: TokenStep) -> bool:
        (token,) = step.token_ids
        if token == self.bad:
            raise ValueError(f"no {token}")
        self.tokens.append(token)
        return len(self.tokens) < self.most


@pytest.mark.parametrize("before", [0, 1, 2, 3])
async def test_steps_are_pushed_in_order_those_from_before_first(before: int) -> None:
    mailbox, taken = Mailbox(), Taken(3)
    for token in range(before):
        mailbox.put(step(token))
    pushing = asyncio.create_task(mailbox.push_to(taken))
    await asyncio.sleep(0)
    assert taken.tokens == list(range(before))
    for token in range(before, 5):
        mailbox.put(step(token))
    async with asyncio.timeout(5):
        await pushing
    assert taken.tokens == [0, 1, 2]
    assert await tokens(mailbox, 2) == [3, 4]  # what was not taken is kept


async def test_a_pushed_step_is_taken_in_the_callback_that_brings_it() -> None:
    mailbox, taken = Mailbox(), Taken(9)
    pushing = asyncio.create_task(mailbox.push_to(taken))
    await asyncio.sleep(0)
    mailbox.put(step(1))
    assert taken.tokens == [1]  # and the loop has not turned
    elsewhere(lambda: deliver([(mailbox, step(2))]))
    async with asyncio.timeout(5):
        while taken.tokens != [1, 2]:
            await asyncio.sleep(0)
    assert not pushing.done()
    pushing.cancel()
    await asyncio.wait([pushing])


@pytest.mark.parametrize("waits", [True, False])
async def test_an_error_ends_the_pushing_in_its_turn(waits: bool) -> None:
    mailbox, taken, error = Mailbox(), Taken(9), EngineDeadError("it died")
    pushing = asyncio.create_task(mailbox.push_to(taken))
    if waits:
        await asyncio.sleep(0)
    mailbox.put(step(1))
    mailbox.put(error)
    mailbox.put(step(2))
    with pytest.raises(EngineDeadError) as caught:
        async with asyncio.timeout(5):
            await pushing
    assert caught.value is error and taken.tokens == [1]
    assert await tokens(mailbox, 1) == [2]


@pytest.mark.parametrize("waits", [True, False])
async def test_what_the_taker_raises_is_raised_by_the_pushing_and_harms_no_neighbour(
    waits: bool,
) -> None:
    mailbox, neighbour, taken = Mailbox(), Mailbox(), Taken(9, bad=2)
    pushing = asyncio.create_task(mailbox.push_to(taken))
    if waits:
        await asyncio.sleep(0)
    elsewhere(
        lambda: deliver(
            [(mailbox, step(1)), (mailbox, step(2)), (mailbox, step(3)), (neighbour, step(4))]
        )
    )
    async with asyncio.timeout(5):
        with pytest.raises(ValueError, match="no 2"):
            await pushing
        assert taken.tokens == [1]
        assert await tokens(neighbour, 1) == [4]
    assert await tokens(mailbox, 1) == [3]
    again = asyncio.create_task(mailbox.push_to(Taken(1)))  # nothing of the failure is left
    await asyncio.sleep(0)
    mailbox.put(step(5))
    async with asyncio.timeout(5):
        await again


async def test_a_step_that_comes_while_the_pushing_is_being_cancelled_is_kept() -> None:
    mailbox, taken = Mailbox(), Taken(9)
    pushing = asyncio.create_task(mailbox.push_to(taken))
    await asyncio.sleep(0)
    pushing.cancel()
    mailbox.put(step(4))
    with pytest.raises(asyncio.CancelledError):
        await pushing
    assert not taken.tokens
    mailbox.put(step(5))
    assert not taken.tokens and await tokens(mailbox, 2) == [4, 5]


async def test_pushing_that_is_cancelled_as_it_ends_is_cancelled() -> None:
    mailbox, taken = Mailbox(), Taken(9, bad=1)
    pushing = asyncio.create_task(mailbox.push_to(taken))
    await asyncio.sleep(0)
    mailbox.put(step(1))  # the failure is on its way
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    mailbox.put(step(2))
    assert await tokens(mailbox, 1) == [2]


@pytest.mark.parametrize("raises", [False, True])
async def test_a_taker_that_cancels_its_own_reader_harms_no_neighbour(raises: bool) -> None:
    mailbox, neighbour = Mailbox(), Mailbox()

    def take(step: TokenStep) -> bool:
        pushing.cancel()
        if raises:
            raise ValueError("no")
        return False

    pushing = asyncio.create_task(mailbox.push_to(take))
    await asyncio.sleep(0)
    elsewhere(lambda: deliver([(mailbox, step(1)), (neighbour, step(2))]))
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await pushing
        assert await tokens(neighbour, 1) == [2]
