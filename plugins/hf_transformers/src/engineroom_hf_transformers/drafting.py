"""Proposing tokens that may come next, so that one step can check several.

What is proposed changes no answer: the model chooses each token as it would have anyway, and a
proposal only saves the step in which it would have been computed (Leviathan et al., 2023,
arXiv:2211.17192, with the model's own draw in place of their rejection test).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from engineroom_hf_transformers.attention import Span
from engineroom_hf_transformers.cache import common_prefix

if TYPE_CHECKING:
    from engineroom_hf_transformers.loading import Parts
    from engineroom_hf_transformers.model import Forward
    from engineroom_hf_transformers.options import HfTransformersOptions

__all__ = ["DraftModel", "Drafter", "PromptLookup", "Wish", "make_drafter"]

Wish: TypeAlias = tuple[int, Sequence[int], int]
"""A slot, the tokens of its request, and how many more are wanted."""

_NGRAM: Final = 3


class Drafter(Protocol):
    """Proposes what may come next."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes for itself, weights apart."""

    def propose(self, wishes: Sequence[Wish]) -> dict[int, list[int]]:
        """Slot → tokens, as many as wanted or fewer."""

    def forget(self, slot: int) -> None:
        """The slot's request has ended."""

    def close(self) -> None:
        """Give everything back."""


def make_drafter(parts: Parts, options: HfTransformersOptions, most: int) -> Drafter | None:
    """What the options ask for.

    :param most: tokens of a step.
    """
    if options.prompt_lookup:
        return PromptLookup()
    if parts.draft is not None:
        from engineroom_hf_transformers.model import forward_of, why_not_driven

        if why := why_not_driven(parts.draft, options):
            from engineroom import ConfigurationError

            raise ConfigurationError(f"draft_model: this model cannot propose tokens: {why}")
        return DraftModel(forward_of(parts.draft, options), most)
    return None


class PromptLookup:
    """Proposes what followed the last words where they stood before."""

    nbytes = 0

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, wishes: Sequence[Wish]) -> dict[int, list[int]]:
        """See :class:`Drafter`. What was said before is indexed once, as it comes."""
        return {slot: self._look_up(slot, tokens, count) for slot, tokens, count in wishes}

    def _look_up(self, slot: int, tokens: Sequence[int], count: int) -> list[int]:
        known, index = self._places.get(slot, (_NGRAM, {}))
        for end in range(known, len(tokens)):  # not the last one: nothing follows it yet
            index[tuple(tokens[end - _NGRAM : end])] = end
        self._places[slot] = (max(known, len(tokens)), index)
        place = index.get(tuple(tokens[-_NGRAM:]))
        if place is None:
            return []
        found = list(tokens[place : place + count])
        while len(found) < count:  # as if it went on repeating itself
            found.append(found[place + len(found) - len(tokens)])
        return found

    def forget(self, slot: int) -> None:
        """See :class:`Drafter`."""
        self._places.pop(slot, None)

    def close(self) -> None:
        """See :class:`Drafter`."""
        self._places.clear()


class DraftModel:
    """A smaller model that writes ahead, always the likeliest token.

    :param most: tokens that it reads in a step; a longer beginning is read over several, in
        which it proposes nothing.
    """

    def __init__(self, forward: Forward, most: int) -> None:
        self._forward = forward
        self._most = most
        self._content: dict[int, list[int]] = {}
        """Slot → tokens in the draft's own cache."""

    @property
    def nbytes(self) -> int:
        """See :class:`Drafter`."""
        return self._forward.cache.nbytes

    def propose(self, wishes: Sequence[Wish]) -> dict[int, list[int]]:
        """See :class:`Drafter`. Beyond its own context it proposes nothing."""
        room = self._forward.cache.length
        wishes = [wish for wish in wishes if len(wish[1]) + wish[2] <= room]
        ready = self._read(wishes)
        found: dict[int, list[int]] = {slot: [first] for slot, first in ready.items()}
        wanted = {slot: count for slot, _, count in wishes}
        while True:
            going = sorted(slot for slot in found if len(found[slot]) < wanted[slot])
            if not going:
                return found
            spans = [Span(row, slot, len(self._content[slot]), 1) for row, slot in enumerate(going)]
            last = [found[slot][-1] for slot in going]
            logits = self._forward(last, spans, [], range(len(going)))
            for slot, token, written in zip(
                going, logits.argmax(dim=-1).tolist(), last, strict=True
            ):
                self._content[slot].append(written)
                found[slot].append(token)

    def _read(self, wishes: Sequence[Wish]) -> dict[int, int]:
        """Read what is new of each request; the first proposals of those that are through."""
        spans: list[Span] = []
        packed: list[int] = []
        through: list[tuple[int, int]] = []
        read: dict[int, list[int]] = {}
        for slot, tokens, _ in wishes:
            content = self._content.get(slot, [])
            start = min(common_prefix(content, tokens), len(tokens) - 1)
            count = min(len(tokens) - start, self._most - len(packed))
            if count <= 0:
                continue
            spans.append(Span(len(packed), slot, start, count))
            packed += tokens[start : start + count]
            # Until the step is through, the cache has no more than what is kept of it.
            self._content[slot] = content[:start]
            read[slot] = list(tokens[: start + count])
            if start + count == len(tokens):
                through.append((slot, len(packed) - 1))
        if not packed:
            return {}
        logits = self._forward(packed, [], spans, [place for _, place in through])
        self._content.update(read)
        chosen = logits.argmax(dim=-1).tolist() if through else []
        return {slot: token for (slot, _), token in zip(through, chosen, strict=True)}

    def forget(self, slot: int) -> None:
        """See :class:`Drafter`. What the cache has stays: another may begin alike."""

    def close(self) -> None:
        """See :class:`Drafter`."""
        self._forward.close()
        self._content.clear()
