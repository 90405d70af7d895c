"""The text pipeline: bytes or text in, safe text out. Pure: no I/O, no clock, no runtime.

A runtime yields pieces that end anywhere, in the middle of a character or of a stop sequence.
:class:`TextPipeline` turns them into text that can be shown at once. Its rules:

* A multi-byte character that is split over pieces is held until it is whole. What is not whole
  at the end of the stream becomes one U+FFFD.
* The earliest match of a stop sequence wins (the one that starts first); at the same place the
  longest of those that are complete. Text before it is output, nothing from it on is.
* A match is final as soon as no stop sequence that began earlier can still be completed.
* Only the longest suffix that is a prefix of some stop sequence is held back, never more.
* Cutting the same text into other pieces gives the same output.

Stop sequences are found with the automaton of Aho and Corasick (CACM 18:6, 1975), whose state
is exactly that suffix. The cost is constant per character, whatever came before, and next to
nothing for a piece with no character that begins a stop sequence.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from typing import Final

__all__ = ["StopMatcher", "TextPipeline", "Utf8Decoder"]

_new_decoder: Final = codecs.getincrementaldecoder("utf-8")


class Utf8Decoder:
    """Decode UTF-8 that arrives in pieces; invalid bytes become U+FFFD, never an error."""

    __slots__ = ("_begun", "_decoder")

    def __init__(self) -> None:
        self._decoder = _new_decoder(errors="replace")
        self._begun = False  # the decoder holds the first bytes of a character

    def feed(self, data: bytes) -> str:
        """The characters that ``data`` completes."""
        if not self._begun:
            try:
                return data.decode()  # as good as always, at a quarter of the decoder's cost
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(data)
        self._begun = self._decoder.getstate()[0] != b""
        return text

    def finish(self) -> str:
        """End the stream: one U+FFFD for a character that was begun, else nothing."""
        self._begun = False
        return self._decoder.decode(b"", True)


class _Automaton:
    """States are numbers; 0 is the start. ``depth`` is the length of the held suffix."""

    __slots__ = ("depth", "first", "goto", "match")

    def __init__(self, stops: Sequence[str]) -> None:
        trie: list[dict[str, int]] = [{}]
        depth = [0]
        match = [0]
        for stop in stops:
            state = 0
            for char in stop:
                if (following := trie[state].get(char)) is None:
                    following = len(trie)
                    trie[state][char] = following
                    trie.append({})
                    depth.append(depth[state] + 1)
                    match.append(0)
                state = following
            match[state] = len(stop)

        fail = [0] * len(trie)
        queue = deque(trie[0].values())
        while queue:
            state = queue.popleft()
            for char, child in trie[state].items():
                queue.append(child)
                suffix = fail[state]
                while suffix and char not in trie[suffix]:
                    suffix = fail[suffix]
                fail[child] = trie[suffix].get(char, 0)
                # The longest match that ends here starts first, so it is the one to keep.
                match[child] = match[child] or match[fail[child]]
        self.goto: Final = [(branches, fail[state]) for state, branches in enumerate(trie)]
        self.depth: Final = depth
        self.match: Final = match
        self.first: Final = frozenset(trie[0])


@lru_cache(maxsize=64)
def _automaton(stops: frozenset[str]) -> _Automaton:
    return _Automaton(sorted(stops))


@dataclass(slots=True, eq=False, repr=False)
class StopMatcher:
    """Find the first stop sequence in text that arrives in pieces.

    :param stops: the stop sequences; none may be empty.
    :raises ValueError: where one is empty.
    """

    stops: InitVar[Iterable[str]]
    matched: str | None = None
    """The stop sequence that ended the text; ``None`` while there is none."""
    _automaton: _Automaton = field(init=False)
    _state: int = 0
    _held: str = ""
    _position: int = 0  # of the first held character, in the whole text
    _best_start: int = -1
    _best_length: int = 0

    def __post_init__(self, stops: Iterable[str]) -> None:
        sequences = frozenset(stops)
        if "" in sequences:
            raise ValueError("a stop sequence must not be empty")
        self._automaton = _automaton(sequences)

    def feed(self, text: str) -> str:
        """Take a piece of text and return what may be shown; nothing once one has matched."""
        if self.matched is not None:
            return ""
        automaton = self._automaton
        if self._state == 0 and automaton.first.isdisjoint(text):
            self._position += len(text)
            return text

        state, goto, depth, match = self._state, automaton.goto, automaton.depth, automaton.match
        start = self._position
        end = start + len(self._held)
        self._held += text
        for char in text:
            end += 1
            branches, suffix = goto[state]
            while (following := branches.get(char)) is None and state:
                state = suffix
                branches, suffix = goto[state]
            state = following or 0
            if length := match[state]:
                begin = end - length
                if (
                    self._best_start < 0
                    or begin < self._best_start
                    or (begin == self._best_start and length > self._best_length)
                ):
                    self._best_start, self._best_length = begin, length
            if 0 <= self._best_start <= end - depth[state]:
                return self._settle()
        self._state = state
        keep = depth[state]
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self._position = start + cut
        return shown

    def finish(self) -> str:
        """End the stream and return what was held back, up to a match if there is one."""
        if self.matched is not None:
            return ""
        if self._best_start >= 0:
            return self._settle()
        shown, self._held, self._state = self._held, "", 0
        self._position += len(shown)
        return shown

    def _settle(self) -> str:
        begin = self._best_start - self._position
        shown = self._held[:begin]
        self.matched = self._held[begin : begin + self._best_length]
        self._held = ""
        return shown


class TextPipeline:
    """Pieces of one generation, bytes or text, into text that is safe to show.

    :param stops: the request's stop sequences, if any.
    :param later: they are looked for only in what comes after :meth:`look_for_stops`.
    """

    __slots__ = ("_decoder", "_matcher", "_stops", "_undecoded", "matched")

    def __init__(self, stops: Iterable[str] | None = None, *, later: bool = False) -> None:
        self._stops = tuple(stops or ())
        self._matcher: StopMatcher | None = None
        if not later:
            self.look_for_stops()
        self._decoder = Utf8Decoder()
        self._undecoded = False
        self.matched: str | None = None
        """The stop sequence that ended the text; ``None`` while there is none."""

    def look_for_stops(self) -> None:
        """From here on, a stop sequence ends the text."""
        if self._matcher is None and self._stops:
            self._matcher = StopMatcher(self._stops)

    def feed(self, piece: str | bytes) -> str:
        """Take a piece; return what may be shown now (often nothing, never a half character)."""
        if not piece:
            return ""
        if isinstance(piece, str):
            if self._undecoded:
                piece = self._decoder.finish() + piece
                self._undecoded = False
        else:
            self._undecoded = True
            piece = self._decoder.feed(piece)
        matcher = self._matcher
        if matcher is None or not piece:
            return piece
        shown = matcher.feed(piece)
        self.matched = matcher.matched
        return shown

    def finish(self) -> str:
        """End the stream; return what was still held back."""
        rest = self._decoder.finish()
        self._undecoded = False
        matcher = self._matcher
        if matcher is None:
            return rest
        shown = matcher.feed(rest) if rest else ""
        shown += matcher.finish()
        self.matched = matcher.matched
        return shown
