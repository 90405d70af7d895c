"""A text that comes in pieces, read by generators that wait where it has not come yet.

Whoever reads says ``yield from source.…``; the generator is resumed with the next piece. A reader
takes what it has understood, so that no more than a marker's length of text waits here, whatever
the pieces are: every character costs the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import Final, TypeAlias, TypeVar

__all__ = ["ANY", "LINE", "WORD", "CutError", "MalformedError", "Markers", "Reading", "TextSource"]

_T = TypeVar("_T")
Reading: TypeAlias = Generator[None, None, _T]
"""A reader at work; it yields where it waits for text, and returns what it has read."""

MAX_BLANKS: Final = 64
"""White space that is looked through for what follows; more of it is text."""
ANY: Final = re.compile(r"[\s\S]*")
WORD: Final = re.compile(r"\s*\S*\s*")
LINE: Final = re.compile(r"\s*[^\n]*")
_BLANKS: Final = re.compile(r"\s+")


class MalformedError(Exception):
    """The text is not what it seemed to begin."""


class CutError(Exception):
    """The text has ended where more had to come."""


class Markers:
    """Texts to look for, also where only the beginning of one has come."""

    def __init__(self, markers: Sequence[str]) -> None:
        self.texts = tuple(sorted({text for text in markers if text}, key=len, reverse=True))
        self.longest = max(map(len, self.texts), default=0)
        self._whole = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        begun = [f"(?:{_begun(text[:-1])})\\Z" for text in self.texts if len(text) > 1]
        self._begun = re.compile("|".join(begun) or r"(?!)")

    def find(self, text: str, at: int) -> re.Match[str] | None:
        """The first one at or behind this place."""
        return self._whole.search(text, at)

    def may_begin(self, text: str, at: int) -> int:
        """Where one may begin that the end of the text cuts; the text's length, where none does."""
        match = self._begun.search(text, max(at, len(text) - self.longest + 1))
        return len(text) if match is None else match.start()


def _begun(marker: str) -> str:
    """A pattern for every beginning of a marker."""
    pattern = ""
    for character in reversed(marker):
        pattern = re.escape(character) + (f"(?:{pattern})?" if pattern else "")
    return pattern


class TextSource:
    """What has come of a text and is not read yet."""

    __slots__ = ("_at", "_kept", "_last", "_text", "dropped", "ended", "limited", "position")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept: list[str] | None = None
        self._last = ""
        self.position = 0
        """Characters that were read."""
        self.ended = False
        self.limited = False
        """It was ended from outside, in the midst of what would have come."""
        self.dropped = ""
        """The beginning of a marker that was read over at the end."""

    def feed(self, text: str) -> None:
        """The next piece has come."""
        self._text = self._text[self._at :] + text
        self._at = 0

    # ── What was read, to be given back as text where it turns out not to be a call ──────────

    def keep(self, *begun: str) -> None:
        """Keep what is read from here on, behind ``begun``, which was read before."""
        self._kept = list(begun)

    def kept(self) -> str:
        """What was read since :meth:`keep`; keeps no more."""
        kept, self._kept = self._kept or [], None
        return "".join(kept)

    # ── Reading ──────────────────────────────────────────────────────────────────────────────

    def take(self, count: int) -> str:
        """Read characters that are known to have come."""
        text = self._text[self._at : self._at + count]
        self._at += count
        self.position += len(text)
        self._last = text[-1:] or self._last
        if self._kept is not None:
            self._kept.append(text)
        return text

    def peek(self) -> Reading[str]:
        """The next character. :raises CutError: there is none."""
        while self._at >= len(self._text):
            if self.ended:
                raise CutError
            yield
        return self._text[self._at]

    def at_end(self) -> Reading[bool]:
        """Whether nothing comes any more."""
        while self._at >= len(self._text) and not self.ended:
            yield
        return self._at >= len(self._text)

    def match(self, pattern: re.Pattern[str]) -> str:
        """Read as much as matches of what has come; the rest of a match may still come."""
        match = pattern.match(self._text, self._at)
        return self.take(match.end() - self._at) if match is not None else ""

    def ahead(self, count: int) -> Reading[str]:
        """The next characters, unread; fewer where the text ends."""
        while len(self._text) - self._at < count and not self.ended:
            yield
        return self._text[self._at : self._at + count]

    def blanks(self) -> Reading[str]:
        """Read white space."""
        parts: list[str] = []
        while True:
            if blank := self.match(_BLANKS):
                parts.append(blank)
            if self._at < len(self._text) or self.ended:
                return "".join(parts)
            yield

    def begins(self, markers: Markers) -> Reading[str | None]:
        """Which marker comes next, unread; the longest of those that do."""
        while True:
            text = self._text[self._at : self._at + markers.longest]
            for marker in markers.texts:
                if text.startswith(marker):
                    return marker
                if marker.startswith(text) and not self.ended:
                    break  # a longer one may still come
            else:
                return None
            yield

    def take_one(self, markers: Markers) -> Reading[str | None]:
        """Read the marker that comes next, if one does."""
        if marker := (yield from self.begins(markers)):
            self.take(len(marker))
        return marker

    def requires(self, markers: Markers) -> Reading[str]:
        """Read the marker that has to come next.

        :raises MalformedError: something else comes. :raises CutError: the text ends in it.
        """
        if (marker := (yield from self.take_one(markers))) is not None:
            return marker
        rest = self._text[self._at :]
        if self.ended and any(marker.startswith(rest) for marker in markers.texts):
            self.take(len(rest))
            raise CutError
        raise MalformedError

    def passes(self, markers: Markers) -> Reading[bool]:
        """Read the marker that comes next, also if the end of the text cuts it; or nothing."""
        try:
            yield from self.requires(markers)
        except MalformedError:
            return False
        except CutError:
            pass
        return True

    def follows(self, offset: int, markers: Markers, *, end: bool = False) -> Reading[bool]:
        """Whether a marker follows behind so many characters and some white space.

        :param end: the end of the text counts as well, also where it cuts a marker.
        """
        while True:
            start = self._at + offset
            text = self._text[start : start + MAX_BLANKS + markers.longest]
            rest = text.lstrip()
            if len(text) - len(rest) > MAX_BLANKS:
                return False
            if any(rest.startswith(marker) for marker in markers.texts):
                return True
            if self.ended:
                return end and any(marker.startswith(rest) for marker in markers.texts)
            if not any(marker.startswith(rest) for marker in markers.texts):
                return False
            yield

    def until(
        self,
        markers: Markers,
        write: Callable[[str], None],
        *,
        drop: int | None = None,
        glued: bool = False,
    ) -> Reading[str | None]:
        """Read up to the first marker, which stays unread; ``None``: there was none to the end.

        :param write: takes what is read, piece by piece.
        :param drop: read over a marker that the end of the text cuts behind so many characters, or
            anywhere where the text was :attr:`limited`.
        :param glued: a marker's first character is taken for one behind a letter as well.
        """
        while True:
            text, at = self._text, self._at
            match = markers.find(text, at)
            safe = len(text) if self.ended else markers.may_begin(text, at)
            if match is not None and (self.ended or match.start() < safe):
                safe = match.start()
            else:
                match = None
                if self.ended and drop is not None:
                    safe = self._without_cut(markers, drop, glued=glued)
            if safe > at:
                write(self.take(safe - at))
            if match is not None:
                return match[0]
            if self.ended:
                self.dropped = self.take(len(text) - safe)
                return None
            yield

    def _without_cut(self, markers: Markers, drop: int, *, glued: bool) -> int:
        """Where the text ends, without a marker that is cut."""
        text, end = self._text, markers.may_begin(self._text, self._at)
        count = len(text) - end
        if count == 1 and not glued:  # text as well: "a<b", "list[int]"
            before = text[end - 1] if end > self._at else self._last
            limited = self.limited and not before.isalnum()
        else:
            limited = self.limited
        return end if limited or count >= drop else len(text)

    def begun(self, markers: Markers) -> str:
        """The beginning of a marker, where the text that has come is that and no more."""
        rest = self._text[self._at :].lstrip()
        return rest if any(marker.startswith(rest) for marker in markers.texts) else ""

    def until_short(
        self, markers: Markers, most: int, shape: re.Pattern[str] = ANY
    ) -> Reading[tuple[str, str]]:
        """Read up to the first marker; return what was read, and the marker, which stays unread.

        :param shape: what stands before it is like this, and so is every beginning of it.
        :raises MalformedError: it does not come within so many characters, or they are not like
            it; nothing is read.
        :raises CutError: the text has ended before.
        """
        while True:
            text = self._text[self._at : self._at + most + markers.longest + 1]
            match = markers.find(text, 0)
            safe = markers.may_begin(text, 0)
            if match is not None and (self.ended or match.start() < safe):
                safe = match.start()
            else:
                match = None
            if safe > most or not shape.fullmatch(text, 0, safe):
                raise MalformedError
            if match is not None:
                return self.take(safe), match[0]
            if self.ended:
                self.take(len(text))
                raise CutError
            yield

    def run(self, pattern: re.Pattern[str], most: int) -> Reading[str]:
        """Read all characters that a pattern matches one or more of.

        :raises MalformedError: there are more than ``most``; none is read.
        :raises CutError: the text ends with them.
        """
        while True:
            text = self._text[self._at : self._at + most + 1]
            match = pattern.match(text)
            count = 0 if match is None else match.end()
            if count > most:
                raise MalformedError
            if count < len(text):
                return self.take(count)
            if self.ended:
                raise CutError
            yield
