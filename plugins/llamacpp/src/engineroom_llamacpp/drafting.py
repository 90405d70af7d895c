"""Proposing tokens that may come next, so that one step can check several.

What is proposed changes no answer: the model chooses each token as it would have anyway, and a
proposal only saves the step in which it would have been computed (Leviathan et al., 2023,
arXiv:2211.17192, with the model's own draw in place of their rejection test).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeAlias

from engineroom_llamacpp.cells import common_prefix
from engineroom_llamacpp.context import LlamaContext
from engineroom_llamacpp.model import LlamaModel
from engineroom_llamacpp.options import LlamaCppOptions

__all__ = ["DraftModel", "Drafter", "PromptLookup", "Wish", "make_drafter"]

Wish: TypeAlias = tuple[int, Sequence[int], int]
"""A sequence of the context, the tokens of its request, and how many more are wanted."""

_NGRAM: Final = 3


class Drafter(Protocol):
    """Proposes what may come next."""

    def propose(self, wishes: Sequence[Wish]) -> dict[int, list[int]]:
        """Sequence → tokens, as many as wanted or fewer."""

    def forget(self, sequence: int) -> None:
        """The sequence's request has ended."""

    def interrupt(self, on: bool) -> None:
        """Abort what is being computed; from any thread."""

    def close(self) -> None:
        """Give everything back."""


def make_drafter(draft: LlamaModel | None, options: LlamaCppOptions, n_ctx: int) -> Drafter | None:
    """What the options ask for.

    :param draft: the draft model, which the drafter closes.
    :param n_ctx: cells that the draft's cache is to have.
    """
    if options.prompt_lookup:
        return PromptLookup()
    return None if draft is None else DraftModel(draft, options, n_ctx)


class PromptLookup:
    """Proposes what followed the last words where they stood before."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, wishes: Sequence[Wish]) -> dict[int, list[int]]:
        """See :class:`Drafter`. What was said before is indexed once, as it comes."""
        return {wish[0]: self._look_up(*wish) for wish in wishes}

    def _look_up(self, sequence: int, tokens: Sequence[int], count: int) -> list[int]:
        known, index = self._places.get(sequence, (_NGRAM, {}))
        for end in range(known, len(tokens)):  # not the last one: nothing follows it yet
            index[tuple(tokens[end - _NGRAM : end])] = end
        self._places[sequence] = (max(known, len(tokens)), index)
        place = index.get(tuple(tokens[-_NGRAM:]))
        if place is None:
            return []
        found = list(tokens[place : place + count])
        while len(found) < count:  # as if it went on repeating itself
            found.append(found[place + len(found) - len(tokens)])
        return found

    def forget(self, sequence: int) -> None:
        """See :class:`Drafter`."""
        self._places.pop(sequence, None)

    def interrupt(self, on: bool) -> None:
        """See :class:`Drafter`. There is nothing to abort."""

    def close(self) -> None:
        """See :class:`Drafter`."""
        self._places.clear()


class DraftModel:
    """A smaller model that writes ahead, always the likeliest token.

    :param model: it; closed with the drafter.
    :param n_ctx: cells of its cache. Beginnings are not shared there: where what the requests
        have together is more, the last ones get no proposals.
    """

    def __init__(self, model: LlamaModel, options: LlamaCppOptions, n_ctx: int) -> None:
        self._model = model
        update = {"n_ctx": n_ctx, "lora": [], "rope_freq_base": None, "rope_freq_scale": None}
        self._context = LlamaContext(model, options.model_copy(update=update))
        self._longest = model.n_ctx_train or n_ctx
        self._content: dict[int, list[int]] = {}
        """Sequence → tokens in the draft's own cache."""

    def propose(self, wishes: Sequence[Wish]) -> dict[int, list[int]]:
        """See :class:`Drafter`. Beyond what it was trained for it proposes nothing."""
        wishes = self._that_fit(wishes)
        found = self._read(wishes)
        wanted = {sequence: count for sequence, _, count in wishes}
        context = self._context
        while True:
            going = [each for each in found if len(found[each]) < wanted[each]]
            if not going:
                return found
            context.begin()
            rows = [
                context.add(each, len(self._content[each]), found[each][-1:], 1) for each in going
            ]
            if context.decode():
                self._forget_all()
                return {}
            for each, row in zip(going, rows, strict=True):
                self._content[each].append(found[each][-1])
                found[each].append(int(context.logits(row).argmax()))

    def _that_fit(self, wishes: Sequence[Wish]) -> list[Wish]:
        """Those that there are cells for, beside what others have; these make room if need be."""
        chosen: list[Wish] = []
        room = self._context.n_ctx
        for wish in wishes:
            size = len(wish[1]) + wish[2]
            if size <= min(room, self._longest):
                chosen.append(wish)
                room -= size
        kept = {sequence for sequence, *_ in chosen}
        for sequence in [each for each in self._content if each not in kept]:
            if len(self._content[sequence]) <= room:
                room -= len(self._content[sequence])
            else:
                self.forget(sequence)
        return chosen

    def _read(self, wishes: Sequence[Wish]) -> dict[int, list[int]]:
        """Read what is new of each request; the first proposals of those that are through."""
        context = self._context
        context.begin()
        budget = context.n_batch
        through: list[tuple[int, int]] = []
        read: dict[int, list[int]] = {}
        for sequence, tokens, _ in wishes:
            content = self._content.get(sequence, [])
            start = min(common_prefix(content, tokens), len(tokens) - 1)
            count = min(len(tokens) - start, budget)
            if count < 1:
                continue
            budget -= count
            if start < len(content):
                context.forget(sequence, start)
                del content[start:]
            done = start + count == len(tokens)
            row = context.add(sequence, start, tokens[start : start + count], int(done))
            read[sequence] = list(tokens[: start + count])
            if done:
                through.append((sequence, row))
        if not read:
            return {}
        if context.decode():
            self._forget_all()
            return {}
        self._content.update(read)
        return {sequence: [int(context.logits(row).argmax())] for sequence, row in through}

    def _forget_all(self) -> None:
        """A step failed or was aborted: what is in the cache is not known."""
        self._context.clear()
        self._content.clear()

    def forget(self, sequence: int) -> None:
        """See :class:`Drafter`."""
        if self._content.pop(sequence, None) is not None:
            self._context.forget(sequence)

    def interrupt(self, on: bool) -> None:
        """See :class:`Drafter`."""
        self._context.abort.set(on)

    def close(self) -> None:
        """See :class:`Drafter`."""
        self._context.close()
        self._model.close()
