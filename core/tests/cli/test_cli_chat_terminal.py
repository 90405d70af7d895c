"""``engineroom chat`` on a pseudo-terminal, with prompt_toolkit and without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals of this kind", allow_module_level=True)

import pty
import select

PATIENCE_S = 30
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"
_READS_KEYS = b"\x1b[?2004h"
"""What prompt_toolkit writes once keys are its own: texts that are pasted shall be marked."""
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07|\r|\x07|\x08")


_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Makes the terminal the process's own, so that Ctrl-C is sent to it."""


class Terminal:
    """A process on a terminal of its own; what it shows is read without control sequences."""

    def __init__(self, environment: dict[str, str], folder, *args: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, "-m", "engineroom", "chat", *args],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, start_new_session=True,
            env={**environment, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )  # fmt: skip
        os.close(theirs)
        self.raw = b""

    def shown(self) -> str:
        return _CONTROL.sub(b"", self.raw).decode("utf-8", "replace")

    def until(self, wanted: str, begin: int = 0) -> int:
        """Read until it is shown after ``begin``; where it ends."""
        self._read_until(lambda: wanted in self.shown()[begin:], wanted, begin)
        return begin + self.shown()[begin:].index(wanted) + len(wanted)

    def _read_until(self, shown, what: str, begin: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while not shown():
            assert time.monotonic() < end, f"{what!r} is not in {self.shown()[begin:]!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                data = self._read()
                assert data, f"it has ended: {self.shown()!r}"
                self.raw += data
                # A terminal is asked where its cursor is, and answers.
                for _ in range(data.count(b"\x1b[6n")):
                    os.write(self.ours, b"\x1b[1;1R")

    def _read(self) -> bytes:
        try:
            return os.read(self.ours, 65536)
        except OSError:  # the other side is closed
            return b""

    def type(self, keys: str | bytes) -> int:
        """Press keys; how much was shown before."""
        place = len(self.shown())
        os.write(self.ours, keys.encode() if isinstance(keys, str) else keys)
        return place

    def forget(self, *, editing: bool) -> None:
        """Press Ctrl-C at a prompt; wait until the next one reads keys.

        :param editing: prompt_toolkit draws the line again before it leaves it, with its prompt.
        """
        prompts = self.raw.count(_READS_KEYS)
        place = self.type(CTRL_C)
        self.until(">", place)
        if editing:
            self._read_until(lambda: self.raw.count(_READS_KEYS) > prompts, "another prompt", place)

    def say(self, line: str, wanted: str, prompt: str = ">") -> None:
        """Type a line; wait for what is shown after it, and for the next prompt."""
        self.until(prompt, self.until(wanted, self.enter(line)))

    def enter(self, line: str) -> int:
        """Type a line; where what is shown after it begins."""
        place = self.until(line, self.type(line))
        self.type(b"\r")
        return place

    def end(self) -> int:
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.ours], [], [], 0.05)[0]:
                self.raw += self._read()
        return self.process.wait(1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)


@pytest.fixture(params=["prompt_toolkit", "plain"])
def terminal(site, environment, tmp_path, request):
    if request.param == "plain":
        site.module("prompt_toolkit", "raise ImportError('not here')")
    else:
        pytest.importorskip("prompt_toolkit", reason="needs the extra engineroom[chat]")
    site.echo()
    opened = []

    def start(*args: str) -> Terminal:
        opened.append(Terminal(environment, tmp_path, *args))
        opened[-1].until("Ctrl-D leaves")
        return opened[-1]

    start.editing = request.param == "prompt_toolkit"
    yield start
    for each in opened:
        each.close()


def test_a_conversation(terminal, tmp_path):
    on = terminal("echo:")
    on.say("one two", "one two")
    on.say("/system Be brief.", "system: Be brief.")
    on.say("/params temperature=0.5", "temperature=0.5")
    on.say("/model", "* echo:")
    on.say("first\\", "", ".")
    on.say("second", "second")
    on.say("/save talk.json", "saved to talk.json")
    on.type(CTRL_D)
    assert on.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [(m["role"], m["content"]) for m in saved["messages"]] == [
        ("system", "Be brief."), ("user", "one two"), ("assistant", "one two"),
        ("user", "first\nsecond"), ("assistant", "first\nsecond"),
    ]  # fmt: skip
    assert saved["params"]["temperature"] == 0.5


def test_the_arrow_brings_back_what_was_typed(terminal, tmp_path):
    if not terminal.editing:
        pytest.skip("without prompt_toolkit there is no history")
    on = terminal("echo:")
    on.say("remember me", "remember me")
    place = on.type(UP)
    on.until("remember me", place)
    on.type(b"\r")
    on.say("/save talk.json", "saved to talk.json")
    on.type(CTRL_D)
    assert on.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    asked = [m["content"] for m in saved["messages"] if m["role"] == "user"]
    assert asked == ["remember me", "remember me"]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(terminal, tmp_path):
    on = terminal("echo:", "-o", "token_delay_s=0.05", "-o", "repeat=10000", "-n", "none")
    place = on.enter("tick tock")
    # The answer has begun, and it is not the line that is drawn again.
    place = on.until("tick tocktick", place)
    on.type(CTRL_C)
    place = on.until("(stopped)", place)
    on.until(">", place)
    on.say("/save talk.json", "saved to talk.json")
    place = on.type("half a line")
    on.until("half a line", place)
    on.forget(editing=terminal.editing)
    on.say("/save again.json", "saved to again.json")
    on.type(CTRL_D)
    assert on.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][1]["content"].startswith("tick")


def test_with_a_server(terminal, start_server, environment):
    url = start_server()
    environment["ENGINEROOM_API_KEY"] = "ann-key-0123456789"
    on = terminal("--url", url)
    on.say("one two", "one two")
    on.say("/model m", "model: m")
    place = on.enter("on and on !drip")
    place = on.until("on !dripon", place)
    on.type(CTRL_C)
    on.until(">", on.until("(stopped)", place))
    on.say("three", "three")
    on.enter("/quit")
    assert on.end() == 0


def test_what_a_model_thinks_is_dimmed(site, environment, tmp_path):
    site.agent()
    on = Terminal({**environment, "ENGINEROOM_HANDLERS": "agent"}, tmp_path, "agent:")
    try:
        on.until("Ctrl-D leaves")
        on.until("I look", on.enter("hm"))
        thought = b"\x1b[2mlet me \x1b[22m\x1b[2mthink\xef\xbf\xbd[5m\x1b[22m"
        assert thought in on.raw, on.raw[-500:]
    finally:
        on.close()
