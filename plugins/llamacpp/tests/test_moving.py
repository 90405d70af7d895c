"""Idle prompts go out of the cache and come back: where, when, whose, and to the letter."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from llama_benches import ask, move_eagerly

from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.prompt_store import PIECE, PromptStore
from engineroom_llamacpp.sequences import Origin

Make = Callable[..., Awaitable[Any]]
TEXT = "all of this is written by someone who knows how long a prompt can become, and why. " * 4
OTHERS = [f"{i}: something else that is long enough to be moved, too; " * 6 for i in range(6)]

# ── the store ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Cells:
    """What would be the cells of these tokens, from the first of a prompt on."""

    tokens: list[int]
    start: int

    @property
    def size(self) -> int:
        return len(self.tokens) - self.start


def put(store: PromptStore[Cells], origin: Origin, tokens: Sequence[int]) -> None:
    """As an idle sequence is put away."""
    path = [p for p, common in store.find(origin, tokens) if common == len(p.tokens)]
    start = sum(len(p.tokens) for p in path if len(p.tokens) == PIECE)
    while start < len(tokens):
        upto = list(tokens[: start + PIECE])
        if not store.add(origin, start, upto, Cells(upto, start)):
            return
        start = len(upto)


class StoreMachine(RuleBasedStateMachine):
    """Whatever is put and dropped: what is found is right, of the origin, and within the budget."""

    def __init__(self) -> None:
        super().__init__()
        self.store: PromptStore[Cells] = PromptStore(3 * PIECE + 50)
        self.origins = [Origin(), Origin("one"), Origin("one", "lora")]
        self.put: list[tuple[Origin, list[int]]] = []

    @rule(which=st.integers(0, 2), forks=st.lists(st.integers(0, 2), min_size=1, max_size=3),
          more=st.integers(0, PIECE))  # fmt: skip
    def goes_out(self, which: int, forks: list[int], more: int) -> None:
        tokens = [fork for fork in forks for _ in range(PIECE - 40)] + [7] * more
        put(self.store, self.origins[which], tokens)
        self.put.append((self.origins[which], tokens))

    @rule(which=st.integers(0, 2), forks=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def is_looked_for(self, which: int, forks: list[int]) -> None:
        origin = self.origins[which]
        tokens = [fork for fork in forks for _ in range(PIECE - 40)]
        path = self.store.find(origin, tokens)
        at = 0
        for piece, common in path:
            assert piece.start == at
            assert piece.data is not None
            assert piece.data.tokens[:at] == tokens[:at]
            assert piece.tokens[:common] == tokens[at : at + common]
            at += common
        assert not at or any(o == origin and t[:at] == tokens[:at] for o, t in self.put)
        self.store.touch([piece for piece, _ in path])

    @rule()
    def all_of_it_goes(self) -> None:
        self.store.clear()

    @invariant()
    def the_budget_is_kept(self) -> None:
        pieces = [piece for root in self.store._roots.values() for piece in below(root)]
        assert self.store.used == sum(piece.data.size for piece in pieces) <= self.store.budget
        assert set(self.store._leaves) == {piece for piece in pieces if not piece.children}
        assert all(root.children for root in self.store._roots.values())


def below(piece: Any) -> list[Any]:
    children = [child for siblings in piece.children.values() for child in siblings]
    return children + [deeper for child in children for deeper in below(child)]


TestStore = StoreMachine.TestCase


def test_what_is_used_stays_longer_than_what_is_younger() -> None:
    store: PromptStore[Cells] = PromptStore(3 * PIECE)
    prompts = [[i] * PIECE for i in range(6)]
    for prompt in prompts[:3]:
        put(store, Origin(), prompt)
    store.touch([piece for piece, _ in store.find(Origin(), prompts[0])])
    for prompt in prompts[3:5]:
        put(store, Origin(), prompt)
    assert [bool(store.find(Origin(), p)) for p in prompts[:5]] == [True, False, False, True, True]


def test_what_is_dearer_to_read_stays_longer() -> None:
    store: PromptStore[Cells] = PromptStore(4 * PIECE)
    store.dearer = 1 / 100
    put(store, Origin(), [1] * (3 * PIECE))
    put(store, Origin(), [2] * PIECE)
    put(store, Origin(), [3] * PIECE)
    assert len(store.find(Origin(), [1] * (3 * PIECE))) == 3
    assert not store.find(Origin(), [2] * PIECE)


# ── in the engine ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    move_eagerly(monkeypatch)


@pytest.mark.usefixtures("eager")
async def test_an_idle_prompt_leaves_the_cells_and_comes_back(make: Make) -> None:
    bench = await make(n_ctx=2048)
    first = await bench.service.infer(ask(TEXT))
    await bench.service.infer(ask("other"))
    sequences = bench.engine.sequences
    assert sequences.cells.used < 64
    assert bench.engine.mover.store.used > 0
    again = await bench.service.infer(ask(TEXT))
    assert again.cached_prompt_tokens == first.prompt_tokens - 1 > 300
    assert again.generated_text == first.generated_text
    longer = await bench.service.infer(ask(TEXT + first.generated_text + "and more"))
    assert longer.cached_prompt_tokens >= first.prompt_tokens // 16 * 16
    await bench.idle()


@pytest.mark.usefixtures("eager")
async def test_what_went_out_is_another_scopes_no_more_than_what_stays(make: Make) -> None:
    bench = await make(n_ctx=2048)
    first = await bench.service.infer(ask(TEXT, cache_salt="one"))
    await bench.service.infer(ask("other"))
    for salt, known in (("two", 0), (None, 0), ("one", first.prompt_tokens - 1)):
        found = await bench.service.infer(ask(TEXT, cache_salt=salt))
        assert found.cached_prompt_tokens == known
        assert found.generated_text == first.generated_text


@pytest.mark.usefixtures("eager")
async def test_those_that_come_together_bring_a_common_beginning_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_ctx=2048, n_parallel=6)
    fresh = await make(n_ctx=2048, prefix_cache=False)
    await bench.service.infer(ask(TEXT))
    await bench.service.infer(ask("other"))
    prompts = [TEXT + f"{i} and what is new" for i in range(6)]
    expected = [(await fresh.service.infer(ask(p))).generated_text for p in prompts]
    brought: list[int] = []
    restore = LlamaContext.restore

    def noted(context: LlamaContext, sequence: int, saved: Any, *where: Any) -> bool:
        brought.append(len(saved))
        return restore(context, sequence, saved, *where)

    monkeypatch.setattr(LlamaContext, "restore", noted)
    running = bench.service.stream(ask("beside", max_new_tokens=200))
    await anext(running)
    found = await asyncio.gather(*(bench.service.infer(ask(p)) for p in prompts))
    await running.aclose()
    assert [r.generated_text for r in found] == expected
    shared = len(bench.engine.model.tokenize(TEXT))
    assert shared - 32 < sum(brought) <= shared + PIECE
    assert all(r.cached_prompt_tokens >= shared // 16 * 16 for r in found)
    await bench.idle()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("fails", ["restore", "save"])
async def test_what_cannot_be_copied_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(LlamaContext, fails, lambda *_: None)
    bench = await make(n_ctx=2048)
    first = await bench.service.infer(ask(TEXT))
    await bench.service.infer(ask("other"))
    again = await bench.service.infer(ask(TEXT))
    assert again.cached_prompt_tokens == 0
    assert again.generated_text == first.generated_text
    await bench.idle()


async def test_few_idle_cells_stay_where_they_are(make: Make) -> None:
    bench = await make(n_ctx=2048)
    await bench.service.infer(ask("a few"))
    await bench.service.infer(ask("other", max_new_tokens=400))
    assert bench.engine.mover.store.used == 0
    assert bench.engine.sequences.idle == 2


async def test_many_idle_cells_go_out_by_themselves(make: Make) -> None:
    bench = await make(n_ctx=4096)
    for text in OTHERS:
        await bench.service.infer(ask(text, max_new_tokens=8))
    await bench.service.infer(ask("other", max_new_tokens=400))
    cells = bench.engine.sequences.cells
    assert cells.used < 256 + 450
    assert bench.engine.mover.store.used > 0


@pytest.mark.usefixtures("eager")
async def test_without_memory_for_it_nothing_moves(make: Make) -> None:
    bench = await make(n_ctx=2048, prompt_cache_memory=0)
    for text in (TEXT, "other"):
        await bench.service.infer(ask(text))
    assert bench.engine.mover.store.used == 0
    assert bench.engine.sequences.idle == 2


@pytest.mark.usefixtures("eager")
async def test_no_more_waits_than_the_budget_and_the_account_has_it(
    make: Make, tiny_model: Path
) -> None:
    bench = await make(n_ctx=2048, prompt_cache_memory="256KiB")
    without = await make(n_ctx=2048, prompt_cache_memory=0)
    taken = [b.manager.get_loaded_model("m").memory_bytes for b in (bench, without)]
    assert taken[0] - taken[1] == 256 * 1024
    store = bench.engine.mover.store
    for text in (*OTHERS, TEXT, *OTHERS):
        await bench.service.infer(ask(text))
        assert store.used <= 256 * 1024
    assert store.used > 128 * 1024
    await bench.idle()


@pytest.mark.usefixtures("eager")
async def test_a_piece_that_goes_while_room_is_made_for_it_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(n_ctx=2048)
    first = await bench.service.infer(ask(TEXT))
    await bench.service.infer(ask("other"))
    sequences, store = bench.engine.sequences, bench.engine.mover.store
    make_room = sequences.make_room

    def made(count: int) -> bool:
        store.clear()
        return make_room(count)

    monkeypatch.setattr(sequences, "make_room", made)
    again = await bench.service.infer(ask(TEXT))
    assert again.cached_prompt_tokens == 0
    assert again.generated_text == first.generated_text
