"""vLLM's own log as engineroom's: levels, and tracebacks that keep nothing alive."""

from __future__ import annotations

import gc
import logging
import os
import weakref

import pytest

from engineroom_vllm.library import _Forward, _imported_quietly


class EngineDeadError(Exception):
    """A fake: named as vLLM's, which is not installed here."""


class Socket:
    """A fake: what a frame of vLLM's has."""


def log_failure(error: Exception) -> weakref.ref[Socket]:
    """Have vLLM's log told of an error, as vLLM does."""
    theirs = logging.getLogger("fake vllm")
    theirs.propagate = False
    theirs.handlers = [_Forward()]
    socket = Socket()
    try:
        raise error
    except Exception:
        theirs.exception("output_handler failed.")
    return weakref.ref(socket)


def test_a_traceback_is_text_and_keeps_nothing_alive(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "engineroom.vllm.library"):
        socket = log_failure(RuntimeError("no room"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "output_handler failed." in record.getMessage()
    assert "RuntimeError: no room" in record.getMessage() and "log_failure" in record.getMessage()
    gc.collect()
    assert socket() is None, "the record has the frames"


def test_the_end_of_an_engine_is_told_by_who_watches_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "engineroom.vllm.library"):
        log_failure(EngineDeadError("it has ended"))
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_what_an_import_says_goes_nowhere_else(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level(logging.DEBUG, "engineroom.vllm.library"), _imported_quietly():
        # Whose value keeps vLLM from setting up a log that writes to the standard output.
        assert os.environ["VLLM_CONFIGURE_LOGGING"] == "0"
        logging.getLogger("vllm.fake_module").info("a part is missing")
    assert "VLLM_CONFIGURE_LOGGING" not in os.environ
    assert "a part is missing" in caplog.messages
    assert capfd.readouterr() == ("", "")


def test_who_has_set_up_vllms_log_keeps_it_while_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "1")
    before = list(logging.getLogger("vllm").handlers)
    with _imported_quietly():
        assert os.environ["VLLM_CONFIGURE_LOGGING"] == "1"
        assert logging.getLogger("vllm").handlers == before
