"""States of sequences as llama.cpp writes them: read, cut, put together."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from engineroom_llamacpp.saved import SavedSequence

LAYERS = 2
KEYS, VALUES, ELEMENT = 6, 3, 2  # bytes of a cell's keys; elements of its values, and their bytes


def written(places: list[int], *, transposed: bool, beside: int = 0, values: bool = True) -> bytes:
    """A unified cache's state of cells at these places; their bytes tell place and layer."""
    count = len(places)
    text = struct.pack("<4sIII", b"magi", 3, 1, count)
    for place in places:
        text += struct.pack("<iI", place, 1) + bytes([place]) * beside + struct.pack("<i", 3)
    text += struct.pack("<II", transposed, LAYERS)
    for layer in range(LAYERS):
        text += struct.pack("<iQ", 1, KEYS)
        text += b"".join(bytes([layer, place] * (KEYS // 2)) for place in places)
    for layer in range(LAYERS if values else 0):
        if transposed:
            text += struct.pack("<iII", 1, ELEMENT, VALUES)
            for element in range(VALUES):
                text += b"".join(bytes([10 * layer + element, place]) for place in places)
        else:
            text += struct.pack("<iQ", 1, VALUES)
            text += b"".join(bytes([layer, place, 7]) for place in places)
    return text


def in_stream(state: bytes, stream: int, streams: int) -> bytes:
    """The same from a cache that has so many streams."""
    empty = b"\0\0\0\0"
    head = state[:8] + struct.pack("<I", streams)
    return head + empty * stream + state[12:] + empty * (streams - 1 - stream)


def array(data: bytes) -> Any:
    return np.frombuffer(bytearray(data), np.uint8)


kinds = st.fixed_dictionaries(
    {"transposed": st.booleans(), "beside": st.sampled_from([0, 8, 12]), "values": st.booleans()}
)


@given(data=st.data(), kind=kinds, places=st.integers(1, 40).map(range).map(list))
def test_what_is_cut_and_put_together_is_as_it_was_written(
    data: st.DataObject, kind: dict[str, Any], places: list[int]
) -> None:
    shuffled = data.draw(st.permutations(places))
    streams = data.draw(st.integers(1, 5))
    stream = data.draw(st.integers(0, streams - 1))
    state = in_stream(written(shuffled, **kind), stream, streams)
    whole = SavedSequence.of_stream(array(state), stream, streams)
    assert whole is not None
    assert len(whole) == len(places)
    cuts = sorted({0, len(places), *data.draw(st.lists(st.sampled_from(places)))})
    parts = [whole.part(a, b) for a, b in pairwise(cuts)]
    for part, (start, end) in zip(parts, pairwise(cuts), strict=True):
        inside = [place for place in shuffled if start <= place < end]
        assert part.data.tobytes() == written(inside, **kind)
        assert len(part) == end - start
    together = SavedSequence.joined(parts)
    order = [p for a, b in pairwise(cuts) for p in shuffled if a <= p < b]
    assert together.data.tobytes() == written(order, **kind)
    assert len(together) == len(places)


@pytest.mark.parametrize("transposed", [True, False])
def test_what_is_written_otherwise_is_not_kept(transposed: bool) -> None:
    state = in_stream(written([0, 1, 2], transposed=transposed), 1, 3)
    assert SavedSequence.of_stream(array(state), 1, 3) is not None
    for other in (state[:-1], state + b"\0", state + state, state[:20], state[:4], b"", state[8:]):
        assert SavedSequence.of_stream(array(other), 1, 3) is None
    assert SavedSequence.of_stream(array(state), 1, 4) is None


@given(st.binary(max_size=200))
def test_anything_can_be_looked_at(data: bytes) -> None:
    SavedSequence.of_stream(array(data), 0, 1)
