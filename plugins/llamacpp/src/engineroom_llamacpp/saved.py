"""Cells of a sequence outside of the cache, in one format for both layouts: cut, and put together.

llama.cpp writes a sequence's state as: magic number, number of the sequence, number of the cache's
streams; for each stream how many cells of it the sequence has; and for the one where it has some
position, 1 and number of the sequence of each, whether values stand transposed, the number of
layers, then the keys of each layer and the values of each, a row for each cell or, transposed, for
each element. A unified cache has
one stream. Whatever does not read like that is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["SavedSequence"]

_Bytes: TypeAlias = NDArray[np.uint8]

_SEQUENCE: Final = 4
"""Where the number of the sequence is."""
_STREAMS: Final = 8
"""Where the number of streams is."""
_COUNTS: Final = 12
"""Where the streams' numbers of cells are."""
_CELLS: Final = 16
"""Where the cells begin, where there is one stream."""
_PLACES: Final = (12, 20, 24)
"""Bytes of a cell's position and sequence, without and with what some models have beside them."""
_HEAD: Final = 12
"""Bytes before the keys or the values of a layer: type, and size."""
_MOST: Final = 4096
"""A model has no more layers."""


class _Block(NamedTuple):
    """Bytes of all cells: ``outer`` times ``width`` for each of them."""

    start: int
    outer: int
    width: int


class SavedSequence:
    """Cells of a sequence. Its length is that in tokens.

    :param data: as llama.cpp writes it with one stream.
    """

    def __init__(self, data: _Bytes, length: int) -> None:
        self.data = data
        self._length = length

    def __len__(self) -> int:
        return self._length

    @property
    def size(self) -> int:
        """Bytes."""
        return self.data.nbytes

    @classmethod
    def of_stream(cls, data: _Bytes, stream: int, streams: int) -> SavedSequence | None:
        """What llama.cpp wrote of a sequence that has a stream of its own, one of ``streams``.

        Nothing is copied: ``data`` is changed, and kept.

        :returns: ``None``: it is of another kind than is known here.
        """
        start = _COUNTS + 4 * stream
        end = data.nbytes - 4 * (streams - 1 - stream)
        if end < start + 4 or _number(data, _STREAMS) != streams:
            return None
        head = data[:_STREAMS].copy()
        begin = start - _COUNTS  # of the same with one stream, over the counts of those before it
        data[begin : begin + _STREAMS] = head
        data[begin + _STREAMS : start].view(np.uint32)[:] = 1
        whole = cls(data[begin:end], _number(data, start))
        return whole if whole.blocks() else None

    @classmethod
    def joined(cls, parts: Sequence[SavedSequence]) -> SavedSequence:
        """What follows one another in a sequence."""
        if len(parts) == 1:
            return parts[0]
        every = [(part, part.blocks(), slice(None)) for part in parts]
        return cls(_assemble(every), sum(map(len, parts)))

    def part(self, start: int, end: int) -> SavedSequence:
        """The cells of the tokens from ``start`` to ``end``, which it must have."""
        if end - start == len(self):
            return self
        blocks = self.blocks()
        places = _cells(self.data, blocks[0], len(self))[0, :, :4].copy().view(np.int32)[:, 0]
        which = np.flatnonzero((start <= places) & (places < end))
        chosen: slice | NDArray[np.intp] = which
        if which.size and which[-1] - which[0] + 1 == which.size:
            chosen = slice(int(which[0]), int(which[-1]) + 1)
        return SavedSequence(_assemble([(self, blocks, chosen)]), end - start)

    def for_streams(self, streams: int) -> _Bytes:
        """As llama.cpp reads it where the cache has so many streams."""
        if streams == 1:
            return self.data
        counts = np.zeros(streams, np.uint32)
        counts[0] = streams  # all but one are empty: which, is not read
        return np.concatenate([self.data[:_STREAMS], counts.view(np.uint8), self.data[_COUNTS:]])

    def blocks(self) -> list[_Block]:
        """Where the cells' bytes are; none, where that cannot be told."""
        return next(filter(None, map(self._read, _PLACES)), [])

    def _read(self, width: int) -> list[_Block]:
        """The blocks, if the data ends with the last of them."""
        data, cells = self.data, len(self)
        blocks = [_Block(_CELLS, 1, width)]
        at = _CELLS + cells * width
        if at + 8 > data.nbytes or _number(data, _COUNTS) != cells:
            return []
        each = _cells(data, blocks[0], cells)[0]
        alone, sequence = np.array([1], np.uint32).view(np.uint8), data[_SEQUENCE:_STREAMS]
        if (each[:, 4:8] != alone).any() or (each[:, -4:] != sequence).any():
            return []
        transposed, layers = _number(data, at), _number(data, at + 4)
        if transposed > 1 or not 0 < layers <= _MOST:
            return []
        at += 8
        for number in range(2 * layers):
            if at == data.nbytes and number >= layers:  # some models keep no values
                break
            if at + _HEAD > data.nbytes:
                return []
            width, outer = _number(data, at + 4), 1
            if transposed and number >= layers:
                outer = _number(data, at + 8)
            at += _HEAD
            blocks.append(_Block(at, outer, width))
            at += outer * cells * width
        return blocks if at == data.nbytes else []


def _number(data: _Bytes, at: int) -> int:
    return int(data[at : at + 4].view(np.uint32)[0])


def _cells(data: _Bytes, block: _Block, cells: int) -> _Bytes:
    """A block's bytes: by its outer index, cell, and byte."""
    end = block.start + block.outer * cells * block.width
    return data[block.start : end].reshape(block.outer, cells, block.width)


def _assemble(
    parts: Sequence[tuple[SavedSequence, list[_Block], slice | NDArray[np.intp]]],
) -> _Bytes:
    """A state of the cells that are chosen of each part; what is between is the first one's."""
    first, blocks, _ = parts[0]
    made: list[_Bytes] = []
    at = 0
    for number, block in enumerate(blocks):
        made.append(first.data[at : block.start])
        at = block.start + block.outer * len(first) * block.width
        chosen = [_cells(p.data, own[number], len(p))[:, which] for p, own, which in parts]
        if not number:
            count = np.array([sum(cells.shape[1] for cells in chosen)], np.uint32)
            made[0] = np.concatenate([made[0][:_COUNTS], count.view(np.uint8)])
        if block.outer > 1:
            chosen = [np.concatenate(chosen, axis=1)]
        made += [cells.reshape(-1) for cells in chosen]
    return np.concatenate(made)
