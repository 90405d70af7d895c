"""Cells of a sequence outside of the cache, in one format for both layouts.

llama.cpp writes a sequence's state as: magic number, number of the sequence, number of the cache's
streams; for each stream how many cells of it the sequence has; and for the one where it has some
their positions, then the keys of each layer and the values of each. A unified cache has one stream.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["SavedSequence"]

_STREAMS: Final = 8
"""Where the number of streams is."""
_COUNTS: Final = 12
"""Where the streams' numbers of cells are."""


class SavedSequence:
    """Cells of a sequence. Its length is that in tokens.

    :param data: as llama.cpp writes it with one stream.
    """

    def __init__(self, data: NDArray[np.uint8], length: int) -> None:
        self.data = data
        self._length = length

    def __len__(self) -> int:
        return self._length

    @property
    def size(self) -> int:
        """Bytes."""
        return self.data.nbytes

    @classmethod
    def of_stream(
        cls, data: NDArray[np.uint8], stream: int, streams: int, length: int
    ) -> SavedSequence:
        """What llama.cpp wrote of a sequence that has a stream of its own, one of ``streams``."""
        start = _COUNTS + 4 * stream
        end = data.nbytes - 4 * (streams - 1 - stream)
        one = np.array([1], np.uint32).view(np.uint8)
        return cls(np.concatenate([data[:_STREAMS], one, data[start:end]]), length)

    def for_streams(self, streams: int) -> NDArray[np.uint8]:
        """As llama.cpp reads it where the cache has so many streams."""
        if streams == 1:
            return self.data
        counts = np.zeros(streams, np.uint32)
        counts[0] = streams  # all but one are empty: which, is not read
        return np.concatenate([self.data[:_STREAMS], counts.view(np.uint8), self.data[_COUNTS:]])
