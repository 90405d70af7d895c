"""Text from anywhere is safe to show: in logs, in errors, on terminals."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from engineroom import (
    ConfigurationError,
    InferenceRequest,
    ModelConfig,
    __all__ as public,
    errors,
)
from engineroom.printable import MAX_TRACE, printable, printable_lines, terminal_text

EVIL = "\x1b[2J\x9b31m\r\b\x07\u202egpj.exe\u2066\u200b\u2028\x85\ud800\U000e0041\ufeff"
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
texts = st.text(st.characters() | st.sampled_from(EVIL + "\n\t"))


def harm(text: str, allowed: str = "") -> list[str]:
    """What a reader would not see, or a terminal obey."""
    return [
        character
        for character in text
        if character not in allowed
        and (
            unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(character) in TURNING
            or character in EVIL + "\u200c\u200d\u2060\xad\u200e\u200f"
        )
        and not character.isascii() | (character == " ")
    ] + [c for c in text if c not in allowed and c.isascii() and not c.isprintable()]


@given(text=texts)
def test_nothing_is_left_that_is_obeyed_or_not_seen(text: str) -> None:
    assert harm(printable(text)) == []
    assert harm(printable_lines(text), "\n\t") == []
    assert len(printable_lines(text + "|").split("\n")) == len((text + "|").splitlines())
    for safe in (printable, printable_lines, terminal_text):
        assert safe(safe(text)) == safe(text)
    shown = terminal_text(text)
    assert not any(
        (unicodedata.category(c) == "Cc" and c not in "\n\t")
        or unicodedata.bidirectional(c) in TURNING
        for c in shown
    )


@given(text=st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_what_is_seen_stays_as_it_is(text: str) -> None:
    plain = "".join(c for c in text if unicodedata.bidirectional(c) not in TURNING)
    assert printable(plain) == printable_lines(plain) == terminal_text(plain) == plain


def test_the_escapes_are_pythons() -> None:
    assert printable("a\x1b[0m\n\u202e\U000e0041") == "a\\x1b[0m\\n\\u202e\\U000e0041"
    assert printable_lines("a\n\tb\x1b") == "a\n\tb\\x1b"


def test_a_models_text_keeps_what_joins_its_letters() -> None:
    family = "👨\u200d👩\u200d👧 می\u200cخواهم\u200e\n\t"
    assert terminal_text(family) == family
    assert terminal_text("one\r\ntwo\rthree\x1b[2J\u202e") == "one\ntwothree�[2J�"


# ── errors ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "error_class"])
def test_no_error_carries_them(name: str) -> None:
    error = getattr(errors, name)(f"there is no {EVIL}\nnor that", model_id="m")
    assert harm(str(error) + error.message + error.describe(), "\n") == []
    assert "nor that" in error.message and name in public


def test_an_error_may_be_made_of_another() -> None:
    error: Any = ValueError("\x1bno")
    assert ConfigurationError(error).describe() == "Configuration error: \\x1bno"


@pytest.mark.parametrize("character", "\x1b\x9b\n\u2028\u202e\u2066\u200f")
def test_no_name_has_them(character: str) -> None:
    for values in (
        {"model_id": f"a{character}b"},
        {"request_id": character},
        {"adapter": "x" + character},
    ):
        with pytest.raises(ValidationError, match="control characters"):
            InferenceRequest(**{"model_id": "m", "prompt": "", **values})
    with pytest.raises(ValidationError, match="control characters"):
        ModelConfig(model_id="m", source="s", aliases=[character])


# ── logs ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def written() -> Iterator[list[str]]:
    """What a handler of the application writes, formatted as plainly as can be."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Lines()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("engineroom")
    root.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.DEBUG)
    yield lines
    ours.setLevel(level)
    root.removeHandler(handler)


def test_no_record_of_ours_carries_them(written: list[str]) -> None:
    logger = logging.getLogger("engineroom.of.anybody")
    logger.info("a name: %s, a number: %d, %.1f", EVIL + "\n", 3, 0.5)
    logger.info("a mapping: %(name)s", {"name": EVIL})
    logger.info("an error: %s", ValueError(f"{EVIL}\nof two lines"))
    logger.info("a text %r, as Python writes it", "\x1b")
    logger.info(f"made before: {EVIL}")
    logger.info(ValueError(EVIL))
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.exception("with a traceback")
    assert len(written) == 7
    assert [harm(line, "\n") for line in written] == [[]] * 7
    assert written[0].endswith("\\n, a number: 3, 0.5")
    assert written[2].endswith("\nof two lines")
    assert written[3] == "a text '\\x1b', as Python writes it"
    assert "Traceback" in written[6] and "\\x1b[2J" in written[6]


def test_a_traceback_has_a_bound(written: list[str]) -> None:
    try:
        try:
            raise KeyError("first " + "x" * 3_000_000)
        except KeyError as error:
            raise ValueError("y" * 3_000_000 + " last") from error
    except ValueError:
        logging.getLogger("engineroom.of.anybody").debug("failed", exc_info=True)
    assert len(written[0]) < MAX_TRACE + 200
    assert "first" in written[0] and written[0].endswith(" last")
    assert "characters left out" in written[0]


def test_a_record_that_cannot_be_written_is_left_to_its_handlers(written: list[str]) -> None:
    with pytest.raises(TypeError) as caught:
        logging.getLogger("engineroom.of.anybody").info("%d", "no number")
    assert "emit" in [entry.name for entry in caught.traceback]


def test_what_is_safe_keeps_its_arguments() -> None:
    kept: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record)

    handler = Keep()
    logging.getLogger().addHandler(handler)
    error = ConfigurationError("x")
    logging.getLogger("engineroom.of.anybody").warning("%s and %s", "é", error)
    logging.getLogger().removeHandler(handler)
    assert (kept[0].msg, kept[0].args) == ("%s and %s", ("é", error))
