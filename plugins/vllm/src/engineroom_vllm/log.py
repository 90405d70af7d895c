"""What an engine's own processes write to their log: progress while they load, and causes.

vLLM's processes have loggers of their own, which no handler of this process reaches. They are
told to write to a file in a folder of ours; it is read while a model loads, and again where the
cause of a failure is looked for.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engineroom import Border
from engineroom_vllm.library import logging_is_the_users

__all__ = ["EngineLog"]

logger = logging.getLogger("engineroom.vllm")
library_logger = logging.getLogger("engineroom.vllm.library")

_LINE: Final = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\t(.*)")
_STAGES: Final = (
    (re.compile(r"Starting to load model"), "loading the weights"),
    (re.compile(r"Loading weights took ([\d.]+)"), "the weights were loaded in {0} s"),
    (re.compile(r"torch\.compile takes ([\d.]+)"), "compiled in {0} s"),
    (re.compile(r"Dynamo bytecode transform"), "compiling"),
    (re.compile(r"Warming up model"), "warming up"),
    (re.compile(r"Capturing (?:CUDA|cuda)? ?graphs?"), "capturing CUDA graphs"),
    (re.compile(r"KV cache size: ([\d,]+) tokens"), "the cache has room for {0} tokens"),
)
_CAUSE: Final = re.compile(
    r"(?:\([^)]*\) *)?(?:\[[^]]*\] *)?(?P<kind>(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)): ?"
    r"(?P<text>.+)"
)
_HOLLOW: Final = ("See root cause", "root cause above", "WorkerProc initialization failed")
_LOOK_S: Final = 0.3
_TAIL: Final = 1 << 20


class EngineLog:
    """The log of one engine's processes.

    :param name: the model, for messages.
    :param folder: where it lies; the caller removes it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self._file = self._folder / "engine.log"
        self._read = 0
        self._rest = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def variables(self) -> dict[str, str]:
        """Environment variables that make the processes write here."""
        if logging_is_the_users():
            return {}
        self._file.touch()
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(levelname)s\t%(message)s"}},
            "handlers": {
                "file": {
                    "class": "logging.FileHandler",
                    "filename": str(self._file),
                    "encoding": "utf-8",
                    "formatter": "plain",
                }
            },
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
        path = self._folder / "logging.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return {"VLLM_LOGGING_CONFIG_PATH": str(path), "VLLM_CONFIGURE_LOGGING": "1"}

    @property
    def silent(self) -> bool:
        """Whether the processes write here, and none has written of an exception."""
        return self._file.exists() and not self.cause()

    def follow(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Tell what is written from now on, until :meth:`rest`.

        :param meanwhile: called now and then, in the thread that does so.
        """
        self._done.clear()
        self._thread = threading.Thread(
            target=self._follow, args=(meanwhile,), name="vllm-log", daemon=True
        )
        self._thread.start()

    def rest(self) -> None:
        """Stop following; what is there is told. Harmless when done twice."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def cause(self) -> str:
        """The exception that began it all, as far as the processes wrote one; else nothing."""
        try:
            with self._file.open("rb") as file:
                file.seek(max(0, self._file.stat().st_size - _TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        causes = [match for line in text.splitlines() if (match := _cause(line))]
        return causes[0] if causes else ""

    def _follow(self, meanwhile: Callable[[], None]) -> None:
        while not self._done.wait(_LOOK_S):
            self._undisturbed(self._tell)
            self._undisturbed(meanwhile)
        self._undisturbed(self._tell)

    def _undisturbed(self, call: Callable[[], None]) -> None:
        """Call what may raise anything, as an application's log handlers: the thread goes on."""
        try:
            with Border(logger, "following the log of vLLM's processes", self._name):
                call()
        except BaseException:  # noqa: BLE001, S110 - it was logged, or it is the log that fails
            pass

    def _tell(self) -> None:
        try:
            with self._file.open("rb") as file:
                file.seek(self._read)
                data = file.read(_TAIL)
        except OSError:
            return
        self._read += len(data)
        *lines, self._rest = (self._rest + data.decode("utf-8", "replace")).split("\n")
        for line in lines:
            match = _LINE.match(line)
            level, text = (match[1], match[2]) if match else ("DEBUG", line)
            serious = level in ("ERROR", "CRITICAL")
            library_logger.log(logging.WARNING if serious else logging.DEBUG, "%s", text)
            for pattern, said in _STAGES:
                if stage := pattern.search(text):
                    logger.info("model %r: %s", self._name, said.format(*stage.groups()))


def _cause(line: str) -> str:
    text = line.partition("\t")[2] if _LINE.match(line) else line
    match = _CAUSE.fullmatch(text.strip())
    if match is None or any(hollow in match["text"] for hollow in _HOLLOW):
        return ""
    return f"{match['kind'].rpartition('.')[2]}: {match['text'].strip()}"
