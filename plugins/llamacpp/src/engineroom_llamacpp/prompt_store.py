"""Prompts that nobody computes with, in host memory: a tree of pieces. Pure.

A piece is the cells of some tokens behind those of the pieces above it, so that prompts that begin
alike have their beginning once. When the budget is used up, that piece at the end of a prompt goes
which saves least for each byte: what reading its tokens takes, times how often it was used, and
aged by what has gone before it (GreedyDual-Size with frequency).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

from engineroom.engine import common_prefix
from engineroom_llamacpp.sequences import Origin

__all__ = ["PIECE", "Piece", "PromptStore"]

PIECE: Final = 128
"""Tokens of a piece; the last one of a prompt may have fewer."""
_KEY: Final = 16
"""Pieces are looked up by so many of their first tokens; to agree in fewer is worth nothing."""


class _Sized(Protocol):
    @property
    def size(self) -> int:
        """Bytes."""


_T = TypeVar("_T", bound=_Sized)


class Piece(Generic[_T]):
    """Some tokens of a prompt.

    :param start: tokens before it.
    :param data: their cells; ``None``: it has gone.
    """

    __slots__ = ("children", "data", "parent", "start", "tokens", "uses", "worth")

    def __init__(
        self, parent: Piece[_T] | None, start: int, tokens: list[int], data: _T | None
    ) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.data = data
        self.children: dict[tuple[int, ...], list[Piece[_T]]] = {}
        self.uses = 0
        self.worth = 0.0

    @property
    def end(self) -> int:
        """Tokens before its end."""
        return self.start + len(self.tokens)


class PromptStore(Generic[_T]):
    """Pieces of prompts, by what they were computed in and with.

    :param budget: most bytes of all of them.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        """Bytes of what is there."""
        self.dearer = 0.0
        """By what share a token takes longer to read, for each that comes before it."""
        self._roots: dict[Origin, Piece[_T]] = {}
        self._leaves: dict[Piece[_T], None] = {}
        self._clock = 0.0

    def find(self, origin: Origin, tokens: Sequence[int]) -> list[tuple[Piece[_T], int]]:
        """The pieces from the beginning on that agree with a prompt, and in how many tokens each.

        Those before the last one agree whole.
        """
        path: list[tuple[Piece[_T], int]] = []
        piece = self._roots.get(origin)
        while piece is not None:
            at = piece.end
            following = tokens[at : at + PIECE]
            best: Piece[_T] | None = None
            common = 0
            for child in piece.children.get(tuple(following[:_KEY]), ()):
                if (length := common_prefix(following, child.tokens)) > common:
                    best, common = child, length
            if best is not None:
                path.append((best, common))
            piece = best if best is not None and common == PIECE else None
        return path

    def add(self, origin: Origin, start: int, tokens: list[int], data: _T) -> bool:
        """Keep the cells of ``tokens``, whose last :data:`PIECE` or fewer are the new ones.

        :param start: where the new ones begin: where a piece ends that is there.
        :returns: whether there is room for it; what is worth less has gone.
        """
        root = parent = self._roots.get(origin) or Piece(None, 0, [], None)
        for piece, length in self.find(origin, tokens[:start]):
            if length == PIECE:
                parent = piece
        if parent.end != start or not self._make_room(data.size, parent):
            return False
        new = Piece(parent, start, tokens[start:], data)
        siblings = parent.children.get(tuple(new.tokens[:_KEY]), ())
        for other in [s for s in siblings if common_prefix(s.tokens, new.tokens) == len(s.tokens)]:
            new.uses = max(new.uses, other.uses)
            self._remove(other)
        parent.children.setdefault(tuple(new.tokens[:_KEY]), []).append(new)
        self._roots[origin] = root
        self._leaves.pop(parent, None)
        self._leaves[new] = None
        self.used += data.size
        self._weigh(new)
        return True

    def touch(self, pieces: Sequence[Piece[_T]]) -> None:
        """They were of use."""
        for piece in pieces:
            piece.uses += 1
            self._weigh(piece)

    def clear(self) -> None:
        """Let all of it go."""
        for root in self._roots.values():
            for piece in _below(root):
                piece.data = None
        self._roots.clear()
        self._leaves.clear()
        self.used = 0

    def _weigh(self, piece: Piece[_T]) -> None:
        if piece.data is not None:
            middle = piece.start + len(piece.tokens) / 2
            saves = len(piece.tokens) * (1 + self.dearer * middle)
            piece.worth = self._clock + saves * (1 + piece.uses) / piece.data.size

    def _make_room(self, size: int, keep: Piece[_T]) -> bool:
        if size > self.budget:
            return False
        while self.used + size > self.budget:
            # A search through all: it takes less than the copy that it makes room for.
            leaves = (leaf for leaf in self._leaves if leaf is not keep)
            victim = min(leaves, key=lambda leaf: leaf.worth, default=None)
            if victim is None:
                return False
            self._clock = max(self._clock, victim.worth)
            self._remove(victim)
        return True

    def _remove(self, piece: Piece[_T]) -> None:
        """Take a piece out that has none below it."""
        if piece.data is not None:
            self.used -= piece.data.size
        piece.data = None
        self._leaves.pop(piece, None)
        parent = piece.parent
        assert parent is not None
        key = tuple(piece.tokens[:_KEY])
        siblings = parent.children[key]
        siblings.remove(piece)
        if not siblings:
            del parent.children[key]
        if not parent.children:
            if parent.parent is not None:
                self._leaves[parent] = None
            else:
                self._roots = {o: root for o, root in self._roots.items() if root.children}


def _below(piece: Piece[_T]) -> Iterator[Piece[_T]]:
    waiting = [piece]
    while waiting:
        for children in waiting.pop().children.values():
            waiting += children
            yield from children
