"""The log of an engine's processes: progress, and the cause of a failure."""

from __future__ import annotations

import json
import logging
import logging.config
import subprocess
import sys
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
