"""The account of cells, and who gets which sequence: against an account kept cell by cell."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engineroom_llamacpp.cells import Cells, Chain
from engineroom_llamacpp.sequences import CellSequence, Origin, Sequences

# ── the account ──────────────────────────────────────────────────────────────────────────────


class CellsMachine(RuleBasedStateMachine):
    """Whatever is shared, cut and dropped: each cell counts once, as long as somebody has it."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(10_000)
        self.chains: list[tuple[Chain, list[int]]] = []
        self.new = itertools.count()

    def one(self, data: st.DataObject) -> tuple[Chain, list[int]]:
        return data.draw(st.sampled_from(self.chains))

    @rule()
    def begin(self) -> None:
        self.chains.append((self.cells.begin(), []))

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), count=st.integers(1, 9))
    def grow(self, data: st.DataObject, count: int) -> None:
        chain, owned = self.one(data)
        self.cells.grow(chain, count)
        owned.extend(itertools.islice(self.new, count))

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        chain, owned = self.one(data)
        length = data.draw(st.integers(0, len(owned)))
        self.chains.append((self.cells.share(chain, length), owned[:length]))

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        chain, owned = self.one(data)
        length = data.draw(st.integers(0, len(owned) + 2))
        self.cells.cut(chain, length)
        del owned[length:]

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        entry = self.one(data)
        self.cells.drop(entry[0])
        self.chains.remove(entry)

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), busy=st.booleans())
    def rest_or_wake(self, data: st.DataObject, busy: bool) -> None:
        chain, _ = self.one(data)
        (self.cells.wake if busy else self.cells.rest)(chain)

    @invariant()
    def as_counted_cell_by_cell(self) -> None:
        everything = [set(owned) for _, owned in self.chains]
        busy = [set(owned) for chain, owned in self.chains if chain.busy]
        assert self.cells.used == len(set().union(*everything))
        assert self.cells.busy == len(set().union(*busy))
        assert self.cells.free == self.cells.count - self.cells.used
        for chain, owned in self.chains:
            assert chain.length == len(owned)
            others = set().union(*(set(o) for c, o in self.chains if c is not chain))
            assert chain.own <= len(set(owned) - others)
            # What is its own alone is at its end, and nothing is hidden from who makes room.
            assert (chain.own > 0) == bool(owned and owned[-1] not in others)


TestCells = CellsMachine.TestCase


# ── who gets which sequence ──────────────────────────────────────────────────────────────────


class Memory:
    """A fake of llama.cpp's memory, which keeps for each sequence the cells it has."""

    def __init__(self, count: int) -> None:
        self.owned: list[list[Any]] = [[] for _ in range(count)]

    def forget(self, sequence: int, position: int = 0) -> None:
        del self.owned[sequence][position:]

    def share(self, source: int, target: int, length: int) -> None:
        assert not self.owned[target], "llama.cpp would mix what is there with what comes"
        assert len(self.owned[source]) >= length
        self.owned[target] = self.owned[source][:length]

    def write(self, sequences: Sequences, sequence: CellSequence, tokens: Sequence[int]) -> None:
        """As a step does."""
        self.owned[sequence.index] += [(token, object()) for token in tokens]
        sequences.cells.grow(sequence.chain, len(tokens))

    def read(self, sequence: CellSequence) -> list[int]:
        return [token for token, _ in self.owned[sequence.index]]


def make(count: int = 4, cells: int = 1000, *, reuse: bool = True) -> tuple[Sequences, Memory]:
    memory = Memory(count)
    return Sequences(memory, count, cells, reuse=reuse), memory


def run(sequences: Sequences, memory: Memory, tokens: Sequence[int]) -> tuple[int, int]:
    """A request that ends: which sequence it had, and what was reused."""
    sequence, known = sequences.take(tokens)
    assert memory.read(sequence) == list(tokens[:known])
    memory.write(sequences, sequence, tokens[known:])
    sequences.give_back(sequence, tokens)
    return sequence.index, known


TEXT = list(range(100, 200))
# Beginnings of 16 tokens and more are shared.


def test_never_all_of_a_prompt_is_taken_as_computed() -> None:
    sequences, memory = make()
    run(sequences, memory, TEXT)
    assert run(sequences, memory, TEXT)[1] == 99
    assert run(sequences, memory, TEXT[:97])[1] == 96
    assert run(sequences, memory, TEXT[:17])[1] == 16
    assert run(sequences, memory, TEXT[:16])[1] == 0
    assert sequences.take([100])[1] == 0


def test_what_goes_on_from_all_that_is_there_goes_on_in_place() -> None:
    sequences, memory = make()
    index, _ = run(sequences, memory, TEXT)
    assert run(sequences, memory, [*TEXT, 1, 2]) == (index, 100)
    assert sequences.idle == 1


def test_what_leaves_something_behind_shares_the_common_part() -> None:
    sequences, memory = make()
    first, _ = run(sequences, memory, TEXT)
    second, known = run(sequences, memory, [*TEXT[:60], *range(40)])
    assert (second != first, known) == (True, 60)
    assert sequences.cells.used == 140
    assert run(sequences, memory, [*TEXT, 7])[1] == 100  # the first one is still whole


def test_a_running_requests_beginning_is_shared_too() -> None:
    sequences, memory = make()
    busy, _ = sequences.take(TEXT)
    memory.write(sequences, busy, TEXT[:80])
    other, known = sequences.take([*TEXT[:70], 5], [(busy, TEXT[:80])])
    assert known == 70
    assert sequences.cells.busy == sequences.cells.used == 80
    memory.write(sequences, other, [5])
    assert memory.read(busy) == TEXT[:80]
    assert sequences.cells.used == 81


def test_of_two_that_read_the_same_the_second_gets_what_the_first_has_read() -> None:
    sequences, memory = make()
    first, _ = sequences.take(TEXT)
    second, _ = sequences.take(TEXT)
    memory.write(sequences, first, TEXT[:64])
    memory.write(sequences, second, TEXT[:3])
    busy = [(first, TEXT[:64]), (second, TEXT[:3])]
    assert sequences.longer(second, TEXT, 3, busy) == 64
    assert memory.read(second) == TEXT[:64]
    assert sequences.cells.used == 64
    assert sequences.longer(first, TEXT, 64, busy) == 64


def test_without_reuse_nothing_is_kept_or_shared() -> None:
    sequences, memory = make(reuse=False)
    busy, _ = sequences.take(TEXT)
    memory.write(sequences, busy, TEXT)
    assert sequences.take(TEXT, [(busy, TEXT)])[1] == 0
    assert sequences.common(TEXT, [(busy, TEXT)]) == 0
    sequences.give_back(busy, TEXT)
    assert (sequences.idle, sequences.cells.used) == (0, 0)


def test_the_longest_unused_goes_first_and_from_its_end() -> None:
    sequences, memory = make(cells=300)
    run(sequences, memory, TEXT)
    run(sequences, memory, range(100))
    assert sequences.make_room(150)  # the youngest is untouched, the oldest has lost its end
    assert sequences.take([*range(100), 1])[1] == 100
    assert 0 < sequences.take([*TEXT, 1])[1] < 100


def test_what_is_used_again_is_no_longer_the_longest_unused() -> None:
    sequences, memory = make(cells=300)
    run(sequences, memory, TEXT)
    run(sequences, memory, range(100))
    run(sequences, memory, TEXT)
    assert sequences.make_room(190)
    assert sequences.take([*TEXT, 1])[1] == 100


def test_running_requests_never_lose_a_cell() -> None:
    sequences, memory = make(cells=200)
    run(sequences, memory, TEXT)
    busy, known = sequences.take([*TEXT[:50], 1])
    assert known == 50
    assert not sequences.make_room(151)
    assert sequences.cells.free == 150
    assert memory.read(busy) == TEXT[:50]


def test_a_sequence_is_emptied_where_none_is_free() -> None:
    sequences, memory = make(count=2)
    run(sequences, memory, TEXT)
    run(sequences, memory, range(50))
    assert run(sequences, memory, range(300, 350))[1] == 0
    assert sequences.take([*range(50), 1])[1] == 50


def test_the_last_one_left_is_cut_where_it_is_needed_itself() -> None:
    sequences, memory = make(count=2)
    run(sequences, memory, TEXT)
    busy, _ = sequences.take([1, 2, 3])
    assert run(sequences, memory, [*TEXT[:40], *range(30)])[1] == 40
    assert busy.chain.busy


def test_what_says_nothing_new_is_not_kept_twice() -> None:
    sequences, memory = make()
    run(sequences, memory, TEXT[:50])
    run(sequences, memory, TEXT)
    assert sequences.idle == 1
    one, _ = sequences.take([*TEXT, 1])
    two, _ = sequences.take([*TEXT[:70], 2], [(one, TEXT[:96])])
    sequences.give_back(one, TEXT[:96])
    sequences.give_back(two, TEXT[:64])
    assert sequences.idle == 1
    assert sequences.cells.used == 96


ORIGINS = (Origin(), Origin("one"), Origin("two"), Origin("one", "adapter"))


def test_nothing_of_another_origin_is_shared_kept_for_it_or_given_up_for_it() -> None:
    sequences, memory = make(count=6)
    for origin in ORIGINS:
        sequence, known = sequences.take(TEXT, origin=origin)
        assert known == 0
        memory.write(sequences, sequence, TEXT)
        sequences.give_back(sequence, TEXT)
    assert sequences.idle == len(ORIGINS)
    assert [sequences.take([*TEXT, 1], origin=origin)[1] for origin in ORIGINS] == [100] * 4


class SequencesMachine(RuleBasedStateMachine):
    """Requests come, read, fork and go: each has its own tokens, and the account is true."""

    TOKENS = 240
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=60).map(lambda t: [9, *t * 3])

    def __init__(self) -> None:
        super().__init__()
        self.sequences, self.memory = make(count=5, cells=self.TOKENS)
        self.busy: dict[CellSequence, list[int]] = {}

    def of(self, origin: Origin) -> list[tuple[CellSequence, list[int]]]:
        return [entry for entry in self.busy.items() if entry[0].origin == origin]

    @precondition(lambda self: len(self.busy) < 4)
    @rule(tokens=tokens, origin=st.sampled_from(ORIGINS[:3]))
    def take(self, tokens: list[int], origin: Origin) -> None:
        sequence, known = self.sequences.take(tokens, self.of(origin), origin)
        assert known < len(tokens)
        self.busy[sequence] = tokens[:known]
        if self.sequences.make_room(len(tokens) - known):
            self.memory.write(self.sequences, sequence, tokens[known:])
            self.busy[sequence] = tokens

    @precondition(lambda self: self.busy and len(self.busy) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(list(self.busy)))
        self.busy[self.sequences.fork(source)] = list(self.busy[source])

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), tokens=tokens)
    def longer(self, data: st.DataObject, tokens: list[int]) -> None:
        sequence = data.draw(st.sampled_from(list(self.busy)))
        tokens = self.busy[sequence] + tokens
        known = self.sequences.longer(
            sequence, tokens, len(self.busy[sequence]), self.of(sequence.origin)
        )
        self.busy[sequence] = tokens[:known]

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), share=st.floats(0, 1))
    def give_back(self, data: st.DataObject, share: float) -> None:
        sequence = data.draw(st.sampled_from(list(self.busy)))
        tokens = self.busy.pop(sequence)
        self.sequences.give_back(sequence, tokens[: int(share * len(tokens))])

    @rule(count=st.integers(1, TOKENS))
    def make_room(self, count: int) -> None:
        room = self.sequences.room
        assert self.sequences.make_room(count) == (count <= room)

    @invariant()
    def each_has_its_own(self) -> None:
        for sequence, tokens in self.busy.items():
            assert self.memory.read(sequence) == tokens
        for sequence in self.sequences._idle:
            assert self.memory.read(sequence) == sequence.tokens
        for index in self.sequences._free:
            assert not self.memory.owned[index]
        owners: dict[Any, set[Origin]] = {}
        for sequence in (*self.busy, *self.sequences._idle):
            for cell in self.memory.owned[sequence.index]:
                owners.setdefault(cell, set()).add(sequence.origin)
        assert all(len(origins) == 1 for origins in owners.values())
        assert len(self.busy) + self.sequences.unused == 5
        cells = {cell for owned in self.memory.owned for cell in owned}
        assert self.sequences.cells.used == len(cells) <= self.TOKENS
        busy = {cell for sequence in self.busy for cell in self.memory.owned[sequence.index]}
        assert self.sequences.room == self.TOKENS - len(busy)


TestSequences = SequencesMachine.TestCase
