"""The log of an engine's processes: progress, and the cause of a failure."""

from __future__ import annotations

import itertools
import json
import logging
import logging.config
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engineroom_vllm.log import EngineLog

FAILURE = """\
INFO\tStarting to load model /models/m...
ERROR\tWorkerProc failed to start.
Traceback (most recent call last):
  File "/x/worker.py", line 3, in load
    raise ValueError("no weights")
ValueError: There is no module or parameter named 'odd' in LlamaForCausalLM
ERROR\tEngineCore failed to start.
Exception: WorkerProc initialization failed due to an exception in a background process. \
See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above.
"""


def file_of(log: EngineLog) -> Path:
    config = json.loads(Path(log.variables()["VLLM_LOGGING_CONFIG_PATH"]).read_text("utf-8"))
    return Path(config["handlers"]["file"]["filename"])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("plain")
def test_another_process_writes_where_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EngineLog("m", tmp_path)
    config = log.variables()["VLLM_LOGGING_CONFIG_PATH"]
    code = (
        "import json, logging, logging.config, sys\n"
        "logging.config.dictConfig(json.load(open(sys.argv[1])))\n"
        "logging.getLogger('vllm.engine').info('Loading weights took 2.50 seconds')\n"
        "logging.getLogger('vllm.engine').error('it went wrong')\n"
    )
    with caplog.at_level(logging.DEBUG, logger="engineroom.vllm"):
        log.follow()
        subprocess.run([sys.executable, "-c", code, config], check=True)
        log.rest()
    said = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    assert ("engineroom.vllm", "INFO", "model 'm': the weights were loaded in 2.50 s") in said
    assert ("engineroom.vllm.library", "WARNING", "it went wrong") in said
    assert Path(config).parent == tmp_path


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("whose", ["log handler", "log handler of all", "footprint"])
def test_the_thread_that_tells_goes_on_whatever_is_raised_in_it(tmp_path: Path, whose: str) -> None:
    log, raised, looks = EngineLog("m", tmp_path), list[str](), itertools.count(1)
    file = file_of(log)
    heard: list[str] = []
    went_on = threading.Event()

    class Hostile(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())
            if "second" in heard[-1]:
                went_on.set()
            if whose != "footprint" and not went_on.is_set():
                raised.append(record.getMessage())
                raise SystemExit(3)

    def look() -> None:
        if whose == "footprint" and next(looks) == 1:
            raised.append("looked")
            raise SystemExit(3)

    handler = Hostile()
    told = logging.getLogger(
        "engineroom.vllm" if whose == "log handler of all" else "engineroom.vllm.library"
    )
    told.addHandler(handler)
    told.setLevel(logging.DEBUG)
    try:
        log.follow(look)
        file.write_text("INFO\tfirst\n", encoding="utf-8")
        while not raised:
            time.sleep(0.01)
        with file.open("a", encoding="utf-8") as more:
            more.write("INFO\tsecond\n")
        assert went_on.wait(20)
    finally:
        log.rest()
        told.removeHandler(handler)
        told.setLevel(logging.NOTSET)


@pytest.mark.usefixtures("plain")
def test_the_first_exception_that_says_something_is_the_cause(tmp_path: Path) -> None:
    log = EngineLog("m", tmp_path)
    file = file_of(log)
    assert log.cause() == "" and log.silent
    file.write_text(FAILURE, encoding="utf-8")
    assert log.cause() == (
        "ValueError: There is no module or parameter named 'odd' in LlamaForCausalLM"
    )
    assert not log.silent
    # What came first began it; what only points to something else says nothing.
    hollow = "RuntimeError: Engine core initialization failed. See root cause above.\n"
    file.write_text(f"{hollow}KeyError: 'a'\nzmq.error.ZMQError: closed\n", encoding="utf-8")
    assert log.cause() == "KeyError: 'a'"
    file.write_text("torch.OutOfMemoryError: CUDA out of memory.\n", encoding="utf-8")
    assert log.cause() == "OutOfMemoryError: CUDA out of memory."
    file.write_text("INFO\tall is well: 3 Errors: none\n", encoding="utf-8")
    assert log.cause() == ""
    file.unlink()
    assert log.cause() == ""


def test_who_has_set_up_vllms_log_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    log = EngineLog("m", tmp_path)
    assert log.variables() == {}
    assert not log.silent
    log.follow()
    log.rest()
    log.rest()
