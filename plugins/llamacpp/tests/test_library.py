"""llama.cpp itself: its log, its callbacks, and what is said where it is not there."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engineroom_llamacpp import library
from engineroom_llamacpp.library import AbortFlag, last_error, load

LOGGER = "engineroom.llamacpp.library"
DEBUG, INFO, WARNING, ERROR, CONTINUED = 1, 2, 3, 4, 5


@pytest.fixture
def llama() -> Iterator[Any]:
    found = load()
    last_error("")  # what earlier tests left
    yield found
    last_error("")


def say(level: int, line: bytes | None) -> None:
    """As llama.cpp does, through C."""
    library._state["callback"](level, line, None)


# ── loading ─────────────────────────────────────────────────────────────────────────────────────


def test_the_library_is_initialised_once() -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [load()] * 4


def python(code: str, path: Path | None = None) -> str:
    """What a fresh process prints."""
    start = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


TRY_TO_LOAD = """
from engineroom import ConfigurationError
from engineroom_llamacpp.library import load
for _ in range(2):  # the second time as well
    try:
        load()
    except ConfigurationError as error:
        print(type(error.__cause__).__name__, error)
"""


def test_a_package_that_is_not_there_is_a_configuration_error() -> None:
    out = python("import sys; sys.modules['llama_cpp'] = None\n" + TRY_TO_LOAD)
    assert out.count("llama-cpp-python cannot be loaded") == 2
    assert "ModuleNotFoundError" in out
    assert "pip install" in out


@pytest.mark.parametrize("kind", ["RuntimeError", "OSError", "FileNotFoundError"])
def test_a_shared_library_that_cannot_be_loaded_is_a_configuration_error(
    kind: str, tmp_path: Path
) -> None:
    # What llama_cpp raises when its shared library, or one that it needs, is not there.
    (tmp_path / "llama_cpp.py").write_text(f"raise {kind}('libgomp.so.1: not found')\n")
    out = python(TRY_TO_LOAD, tmp_path)
    assert out.count("libgomp.so.1: not found") == 2
    assert kind in out


def test_importing_the_plugin_loads_neither_llama_cpp_nor_what_it_needs() -> None:
    code = (
        "import sys, engineroom_llamacpp\n"
        "print([m for m in ('llama_cpp', 'numpy', 'jinja2', 'psutil') if m in sys.modules])"
    )
    assert python(code) == "[]\n"


# ── values of C enums ───────────────────────────────────────────────────────────────────────────


def test_names_stand_for_the_librarys_own_values(llama: Any) -> None:
    import gguf

    for name, value in library.CACHE_TYPES.items():
        assert value == gguf.GGMLQuantizationType[name.upper()].value
    names = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}
    for name, value in library.FLASH_ATTENTION.items():
        assert value == getattr(llama, f"LLAMA_FLASH_ATTN_TYPE_{names[name]}")


# ── the log ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def failing(llama: Any, tmp_path: Path) -> Any:
    """Let the library fail over a file, and log why."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + (99).to_bytes(4, "little") + bytes(64))

    def fail() -> None:
        params = llama.llama_model_default_params()
        assert not llama.llama_model_load_from_file(str(path).encode(), params)

    return fail


def test_the_log_goes_to_logging_and_not_to_the_terminal(
    failing: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        failing()
    assert capfd.readouterr() == ("", "")
    lines = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert any("99" in line for line in lines)
    assert all(line == line.strip() and line for line in lines)
    # What the library calls errors, by its own numbers: this test knows when they change.
    assert {r.levelno for r in caplog.records if "99" in r.getMessage()} == {logging.WARNING}


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0, logging.DEBUG),
        (DEBUG, logging.DEBUG),
        (INFO, logging.DEBUG),
        (WARNING, logging.WARNING),
        (ERROR, logging.WARNING),
        (CONTINUED, logging.DEBUG),
        (77, logging.DEBUG),
    ],
)
def test_levels_of_the_library_have_levels_of_logging(
    llama: Any, level: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        say(level, "größe %s\n".encode())
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(expected, "größe %s")]


@pytest.mark.parametrize("line", [None, b"", b"\n", b".", b" . \n"])
def test_dots_and_empty_lines_are_not_logged(
    llama: Any, line: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        say(ERROR, line)
    assert not caplog.records
    assert last_error("nothing") == "nothing"


def test_bytes_that_are_no_text_are_logged_all_the_same(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, LOGGER):
        say(WARNING, b"odd \xff byte")
    assert caplog.messages == ["odd \ufffd byte"]


def test_the_last_error_says_why_and_is_told_once(failing: Any) -> None:
    failing()
    assert "99" in last_error("nothing")
    assert last_error("nothing") == "nothing"


def test_the_last_error_is_of_errors_alone(llama: Any) -> None:
    for level in (DEBUG, INFO, WARNING, CONTINUED):
        say(level, b"no error")
    assert last_error("nothing") == "nothing"


def test_the_last_error_has_the_last_few_lines_each_once(llama: Any) -> None:
    for line in ("a", "b", "b", "c", "d", "e"):
        say(ERROR, line.encode())
    assert last_error("nothing") == "b; c; d; e"


# ── the abort flag ──────────────────────────────────────────────────────────────────────────────


def test_the_abort_callback_says_what_the_flag_says(llama: Any) -> None:
    flag = AbortFlag(llama)
    # Called as C does, with the pointer that C is given.
    assert flag.callback(flag.data) is False
    for value in (True, True, False, True, False, False):
        flag.set(value)
        assert flag.callback(flag.data) is value


def test_flags_do_not_know_of_each_other(llama: Any) -> None:
    first, second = AbortFlag(llama), AbortFlag(llama)
    first.set(True)
    assert (first.callback(first.data), second.callback(second.data)) == (True, False)


def test_another_thread_raises_the_flag(llama: Any) -> None:
    flag = AbortFlag(llama)
    thread = threading.Thread(target=flag.set, args=(True,))
    thread.start()
    thread.join()
    assert flag.callback(flag.data) is True


@pytest.mark.parametrize(("raised", "expected"), [(False, logging.WARNING), (True, logging.DEBUG)])
def test_what_is_logged_of_an_abort_is_for_those_who_debug(
    llama: Any, raised: bool, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    flag = AbortFlag(llama)

    def compute(status: int) -> int:
        flag.set(raised)
        say(ERROR, b"failed to decode")
        return status

    with caplog.at_level(logging.DEBUG, LOGGER):
        assert flag.compute(compute, 2) == 2
        say(ERROR, b"later")
    assert [r.levelno for r in caplog.records] == [expected, logging.WARNING]
    assert ("failed to decode" in last_error("nothing")) is not raised
