"""The key/value cache of a model: one slot a request, allocated once, shared by copying.

A slot has room for the whole context. What a request leaves behind stays until the slot is given
to another one, so that a prompt with the same beginning need not be computed again; a request
whose beginning lies in a slot that is in use, or worth keeping, gets a copy of that part.

On the CPU the memory of a slot is taken from the system page by page, as it is written.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from engineroom.engine import common_prefix

if TYPE_CHECKING:
    import torch

__all__ = ["LayerShape", "Slot", "SlotCache"]

_WORTH_A_COPY: Final = 16
"""A shorter common beginning is computed again: about what the copy would cost."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: ``heads`` × (``key`` + ``value``) numbers."""

    heads: int
    key: int
    value: int
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False, slots=True)
class Slot:
    """A place in the cache.

    :param scope: in which cache scope that was computed: it is of use in no other.
    :param tokens: those whose keys and values lie in it, while it is free.
    :param used: when it was given back, as a count; the smallest is the longest unused.
    :param unsound: in front of this position there may be NaN or infinity.
    """

    index: int
    scope: str = ""
    tokens: list[int] = field(default_factory=list)
    used: int = 0
    unsound: int = 0


class SlotCache:
    """Keys and values of ``slots`` requests of up to ``length`` tokens each.

    :param shapes: layer index → what it keeps.
    """

    def __init__(self, shapes: dict[int, LayerShape], slots: int, length: int) -> None:
        import torch

        self.slots = slots
        self.length = length
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        with torch.inference_mode():
            for layer, shape in shapes.items():
                for store, width in ((self._keys, shape.key), (self._values, shape.value)):
                    size = (slots, length, shape.heads, width)
                    store[layer] = _zeros(size, shape.dtype, shape.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        stores = (*self._keys.values(), *self._values.values())
        return sum(tensor.nbytes for tensor in stores)

    def write(
        self, layer: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Keep what a step computed.

        :param places: slot × length + position of each token.
        :param keys: tokens × heads × numbers; ``values`` likewise.
        """
        self._keys[layer].flatten(0, 1).index_copy_(0, places, keys)
        self._values[layer].flatten(0, 1).index_copy_(0, places, values)

    def read(self, layer: int, slots: slice, positions: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and values: slots × heads × positions × numbers."""
        return (
            self._keys[layer][slots, positions].transpose(1, 2),
            self._values[layer][slots, positions].transpose(1, 2),
        )

    def gather(
        self, layer: int, slots: torch.Tensor, positions: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values of slots that do not lie side by side; as :meth:`read`."""
        return (
            self._keys[layer][:, positions].index_select(0, slots).transpose(1, 2),
            self._values[layer][:, positions].index_select(0, slots).transpose(1, 2),
        )

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first ``count`` tokens of a slot to another."""
        import torch

        with torch.inference_mode():
            for store in (self._keys, self._values):
                for tensor in store.values():
                    tensor[target, :count] = tensor[source, :count]

    def clear(self, slot: int, positions: slice) -> None:
        """Write zeros."""
        import torch

        with torch.inference_mode():
            for store in (self._keys, self._values):
                for tensor in store.values():
                    tensor[slot, positions] = 0

    def close(self) -> None:
        """Give the memory back."""
        self._keys.clear()
        self._values.clear()


class Slots:
    """Who has which slot, and which one serves a prompt best.

    :param reuse: look for common beginnings.
    """

    def __init__(self, cache: SlotCache, *, reuse: bool) -> None:
        self._cache = cache
        self._reuse = reuse
        self._free = [Slot(index) for index in range(cache.slots)]
        self._clock = 0

    @property
    def free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def take(
        self,
        tokens: Sequence[int],
        busy: Sequence[tuple[Slot, Sequence[int]]] = (),
        scope: str = "",
    ) -> tuple[Slot, int]:
        """A slot for a prompt.

        :param busy: slots in use, with the tokens that are computed in them.
        :param scope: the cache scope of the prompt: beginnings are looked for in no other.
        :returns: the slot, and how many of the tokens are in it already: not all, because the
            last one's logits are needed.
        """
        best: Slot | None = None
        common = 0
        if self._reuse:
            needed = tokens[:-1]
            for slot, content in (*((s, s.tokens) for s in self._free), *busy):
                if slot.scope == scope and (length := common_prefix(needed, content)) > common:
                    best, common = slot, length
        # Where nothing but the common part would be lost, or nothing else is free, in place.
        if best is not None and best in self._free:
            alone = len(self._free) == 1
            if alone or 2 * common >= len(best.tokens):
                return self._give(best, common, scope), common
        others = [slot for slot in self._free if slot is not best]
        # Low places first: those of a batch then lie side by side.
        slot = min(others or self._free, key=lambda s: (s.used if s.tokens else -1, s.index))
        if best is not None and slot is not best and common >= _WORTH_A_COPY:
            self._cache.copy(best.index, slot.index, common)
            return self._give(slot, common, scope), common
        return self._give(slot, 0, scope), 0

    def _give(self, slot: Slot, kept: int, scope: str) -> Slot:
        self._free.remove(slot)
        if slot.unsound > kept:
            # Requests are computed together over the longest one's stretch. What is masked there
            # has no weight, but no weight times NaN is NaN.
            self._cache.clear(slot.index, slice(kept, slot.unsound))
        slot.scope, slot.tokens, slot.unsound = scope, [], 0
        return slot

    def give_back(self, slot: Slot, tokens: Sequence[int], *, unsound: int = 0) -> None:
        """Free a slot.

        :param tokens: those whose keys and values are in it.
        :param unsound: in front of this position there may be NaN or infinity.
        """
        self._clock += 1
        slot.used = self._clock
        slot.tokens = list(tokens) if self._reuse else []
        slot.unsound = unsound
        self._free.append(slot)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU without writing them, so that unused memory costs nothing."""
    import torch

    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    count = math.prod(size) * dtype.itemsize
    if not count:
        return torch.zeros(size, dtype=dtype)
    room = mmap.mmap(-1, count)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # In pages of 2 MiB, which NumPy asks for, the first tokens of a slot would take all of it.
        with contextlib.suppress(OSError):  # a kernel without huge pages
            room.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(room, dtype=dtype).view(size)
