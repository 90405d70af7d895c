"""The text pipeline against rules that are written down once more, slowly, over the whole text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from engineroom.generation.text import StopMatcher, TextPipeline, Utf8Decoder, _Automaton

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Two letters make stop sequences that overlap, begin and contain one another, all the time.
DENSE = st.text(alphabet="ab", max_size=24)
DENSE_STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)
WIDE = st.text(alphabet="aé€😀", max_size=16)
WIDE_STOPS = st.lists(st.text(alphabet="aé€😀", min_size=1, max_size=3), min_size=1, max_size=3)
CUTS = st.lists(st.integers(min_value=0, max_value=64), max_size=24)

# Whole characters, their beginnings and their ends, and bytes that no character has.
ODD_BYTES = st.lists(
    st.one_of(
        st.sampled_from(["a", "é", "€", "😀"]).map(str.encode),
        st.sampled_from([b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xff", b"\xed\xa0\x80"]),
        st.binary(max_size=3),
    ),
    max_size=12,
).map(b"".join)


def cut(whole: Any, places: Iterable[int]) -> list[Any]:
    """Cut text or bytes at these places; empty pieces among them."""
    edges = [0, *sorted(min(place, len(whole)) for place in places), len(whole)]
    return [whole[a:b] for a, b in pairwise(edges)]


def held_suffix(text: str, stops: Sequence[str]) -> str:
    """The longest end of the text that a stop sequence begins with."""
    for start in range(len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[start:]
    return ""


def expected(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """What is shown of the text and which stop sequence ended it."""
    for end in range(len(text) + 1):
        seen = text[:end]
        found = [
            (start, stop) for stop in stops for start in range(end) if seen[start:].startswith(stop)
        ]
        if not found:
            continue
        first = min(start for start, _ in found)
        undecided = any(stop.startswith(seen[start:]) for start in range(first) for stop in stops)
        if end == len(text) or not undecided:
            return text[:first], max((s for at, s in found if at == first), key=len)
    return text, None


def run(pieces: Iterable[str | bytes], stops: Iterable[str] | None) -> tuple[str, str | None]:
    pipeline = TextPipeline(stops)
    shown = "".join([pipeline.feed(piece) for piece in pieces]) + pipeline.finish()
    return shown, pipeline.matched


# ── stop sequences ───────────────────────────────────────────────────────────────────────────


@untimed
@given(text=DENSE, stops=DENSE_STOPS, places=CUTS)
@example(text="xabcd", stops=["abcz", "b"], places=[])  # the earlier one breaks off
@example(text="abc", stops=["abcd", "b"], places=[1, 2])  # … or the text ends
@example(text="xab", stops=["xabz", "a", "ab"], places=[2])
def test_any_cutting_gives_what_the_whole_text_gives(
    text: str, stops: list[str], places: list[int]
) -> None:
    assert run(cut(text, places), stops) == expected(text, stops)


@untimed
@given(text=WIDE, stops=WIDE_STOPS, places=CUTS)
def test_any_cutting_of_the_bytes_gives_what_the_whole_text_gives(
    text: str, stops: list[str], places: list[int]
) -> None:
    assert run(cut(text.encode(), places), stops) == expected(text, stops)


@untimed
@given(data=ODD_BYTES, stops=st.lists(st.sampled_from(["a", "é", "€a", "�", "😀�"]), max_size=3))
@example(data=b"a\xc3", stops=["�"])
def test_invalid_bytes_are_replaced_before_stop_sequences_are_looked_for(
    data: bytes, stops: list[str]
) -> None:
    pieces = [bytes([byte]) for byte in data]
    assert run(pieces, stops) == expected(data.decode("utf-8", "replace"), stops)


@untimed
@given(text=DENSE, stops=DENSE_STOPS, places=CUTS)
def test_what_is_held_is_the_longest_suffix_that_begins_a_stop_sequence(
    text: str, stops: list[str], places: list[int]
) -> None:
    matcher = StopMatcher(stops)
    fed = shown = ""
    for piece in cut(text, places):
        fed += piece
        shown += matcher.feed(piece)
        assert fed.startswith(shown)
        if matcher.matched is None:
            assert fed[len(shown) :] == held_suffix(fed, stops)


@untimed
@given(text=DENSE, stops=DENSE_STOPS, places=CUTS)
def test_what_is_shown_contains_no_stop_sequence(
    text: str, stops: list[str], places: list[int]
) -> None:
    shown, matched = run(cut(text, places), stops)
    assert not any(stop in shown for stop in stops)
    assert (matched is None) == (shown == text)
    if matched is not None:
        assert text.startswith(shown + matched)


@untimed
@given(text=DENSE, stops=DENSE_STOPS, data=st.data())
def test_order_and_repetition_of_the_stop_sequences_mean_nothing(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(stops + stops[:1]))
    assert run([text], shuffled) == run([text], stops)


def test_the_earliest_start_wins_over_the_earliest_end() -> None:
    assert run(["a", "b", "c", "d"], ["b", "abcd"]) == ("", "abcd")


def test_a_later_match_stands_once_the_earlier_one_breaks_off() -> None:
    pipeline = TextPipeline(["b", "abcd"])
    assert [pipeline.feed(piece) for piece in ("xa", "b", "c")] == ["x", "", ""]
    assert pipeline.matched is None
    assert pipeline.feed("!") == "a"
    assert pipeline.matched == "b"


def test_at_the_same_place_the_longest_complete_one_wins() -> None:
    assert run(["xab?"], ["xab!", "a", "ab"]) == ("x", "ab")


def test_a_match_is_final_at_once_when_nothing_earlier_is_open() -> None:
    pipeline = TextPipeline(["a", "ab"])
    assert pipeline.feed("xa") == "x"
    assert pipeline.matched == "a"


def test_a_match_that_waits_at_the_end_of_the_stream_counts() -> None:
    pipeline = TextPipeline(["b", "abcd"])
    assert pipeline.feed("xabc") == "x"
    assert pipeline.matched is None
    assert pipeline.finish() == "a"
    assert pipeline.matched == "b"


def test_an_unfinished_stop_sequence_is_shown_at_the_end() -> None:
    pipeline = TextPipeline(["</s>"])
    assert pipeline.feed("Hello</") == "Hello"
    assert pipeline.finish() == "</"
    assert pipeline.matched is None


def test_nothing_is_shown_after_a_match() -> None:
    pipeline = TextPipeline(["END"])
    assert pipeline.feed("one END two") == "one "
    assert pipeline.feed(" three") == ""
    assert pipeline.feed(b" four \xc3") == ""
    assert pipeline.finish() == ""
    assert pipeline.matched == "END"


def test_a_second_finish_gives_nothing() -> None:
    pipeline = TextPipeline(["ab"])
    pipeline.feed("a")
    pipeline.feed(b"\xe2\x82")
    assert pipeline.finish() == "a�"
    assert pipeline.finish() == ""


def test_an_empty_stop_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        TextPipeline(["a", ""])


@pytest.mark.parametrize("stops", [None, [], ()])
def test_without_stop_sequences_everything_is_shown_at_once(stops: list[str] | None) -> None:
    pipeline = TextPipeline(stops)
    assert pipeline.feed("ab") == "ab"
    assert pipeline.feed("é".encode()) == "é"
    assert pipeline.matched is None


# ── UTF-8 ────────────────────────────────────────────────────────────────────────────────────


@untimed
@given(data=ODD_BYTES, places=CUTS)
@example(data=b"\xf0\x9f\x98", places=[1, 2])
@example(data=b"\xf0\x80\x80", places=[1])
def test_pieces_of_bytes_decode_like_the_whole(data: bytes, places: list[int]) -> None:
    decoder = Utf8Decoder()
    text = "".join([decoder.feed(piece) for piece in cut(data, places)]) + decoder.finish()
    assert text == data.decode("utf-8", "replace")
    assert run(cut(data, places), None) == (text, None)


@untimed
@given(text=st.text(max_size=12), places=CUTS)
def test_valid_text_is_never_shown_in_part(text: str, places: list[int]) -> None:
    pipeline = TextPipeline()
    shown, fed = "", b""
    for piece in cut(text.encode(), places):
        fed += piece
        shown += pipeline.feed(piece)
        assert shown == fed.decode("utf-8", "ignore")  # the whole characters so far, all of them
    assert pipeline.finish() == ""


def test_a_character_split_over_pieces_is_held() -> None:
    pipeline = TextPipeline()
    assert [pipeline.feed(bytes([byte])) for byte in "😀".encode()] == ["", "", "", "😀"]


@pytest.mark.parametrize("begun", [b"\xc3", b"\xe2\x82", b"\xf0\x9f", b"\xf0\x9f\x98"])
def test_an_incomplete_character_at_the_end_is_replaced_once(begun: bytes) -> None:
    pipeline = TextPipeline()
    assert pipeline.feed(b"a" + begun) == "a"
    assert pipeline.finish() == "�"


def test_an_incomplete_character_can_complete_a_stop_sequence_at_the_end() -> None:
    assert run([b"x a", b"\xc3"], ["a�"]) == ("x ", "a�")


@untimed
@given(
    pieces=st.lists(
        st.one_of(
            st.text(alphabet="aé😀", max_size=3),
            st.sampled_from([b"", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b"a"]),
        ),
        max_size=10,
    ),
    stops=WIDE_STOPS,
)
@example(pieces=[b"\xc3", "", b"\xa9"], stops=["x"])
@example(pieces=[b"\xc3", b"", "a"], stops=["x"])
def test_text_ends_a_run_of_bytes_and_an_empty_piece_does_not(
    pieces: list[str | bytes], stops: list[str]
) -> None:
    runs = [list(items) for _, items in groupby(filter(None, pieces), type)]
    whole = "".join(
        "".join(str(piece) for piece in items)
        if isinstance(items[0], str)
        else b"".join(piece for piece in items if isinstance(piece, bytes)).decode(errors="replace")
        for items in runs
    )
    assert run(pieces, stops) == expected(whole, stops)
    assert run(pieces, None) == (whole, None)


# ── cost ─────────────────────────────────────────────────────────────────────────────────────


class CountingList(list[Any]):
    """Counts how often the automaton is asked."""

    asked = 0

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return super().__getitem__(index)


def counted(stops: Sequence[str]) -> tuple[StopMatcher, CountingList]:
    matcher = StopMatcher(stops)
    automaton = _Automaton(stops)
    steps = CountingList(automaton.goto)
    automaton.goto = steps  # type: ignore[misc]
    matcher._automaton = automaton
    return matcher, steps


def adversarial(length: int) -> Iterator[str]:
    """Almost the stop sequence, again and again."""
    yield from (("a" * 49 + "c") * length)[:length]


def test_the_cost_of_a_character_does_not_depend_on_what_came_before() -> None:
    stops = ["a" * 50 + "b", "a" * 20 + "b"]
    matcher, steps = counted(stops)
    for _ in range(20):
        before = steps.asked
        for char in adversarial(1000):
            matcher.feed(char)
        # One step ahead for each character, and back never further than it went ahead.
        assert steps.asked - before <= 2 * 1000 + 51
    assert matcher.matched is None


@untimed
@given(text=DENSE, stops=DENSE_STOPS)
def test_no_more_is_kept_than_a_stop_sequence_is_long(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    for char in text * 3:
        matcher.feed(char)
        assert len(matcher._held) < max(map(len, stops))


def test_text_that_begins_no_stop_sequence_never_reaches_the_automaton() -> None:
    matcher, steps = counted(["###"])
    assert matcher.feed("plain text, " * 100) == "plain text, " * 100
    assert steps.asked == 0
    assert matcher.feed("a###b") == "a"
    assert matcher.matched == "###"
