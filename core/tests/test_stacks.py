"""Where threads are is read without frame objects of theirs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from engineroom import stacks as module
from engineroom.stacks import Call, StackReader, stacks


def in_a_thread(wait: Callable[[], object]) -> dict[int, list[Call]]:
    """What is seen while another thread does this, which ends when it has been seen."""
    began = threading.Event()

    def outer() -> None:
        began.set()
        wait()

    thread = threading.Thread(target=outer)
    thread.start()
    began.wait()
    try:
        return {thread.ident or 0: stacks()[thread.ident or 0], 0: stacks()[threading.get_ident()]}
    finally:
        done.set()
        thread.join()


done = threading.Event()


def test_the_innermost_call_comes_first_with_its_module() -> None:
    done.clear()

    def inner() -> None:
        done.wait(60)

    seen = in_a_thread(inner)
    own = seen.pop(0)
    (other,) = seen.values()
    assert own[0].function == "in_a_thread"
    assert own[0].module == __name__
    functions = [call.function for call in other]
    assert functions.index("wait") < functions.index("inner") < functions.index("outer")
    call = other[functions.index("inner")]
    assert str(call) == f"{__name__}:{inner.__code__.co_firstlineno + 1} inner"
    assert next(c for c in other if c.function == "wait").module == "threading"


def test_a_file_of_no_module_has_its_name() -> None:
    names: dict[str, Any] = {"stacks": stacks, "get": threading.get_ident}
    exec(compile("def f():\n    return stacks()[get()]\n", "/nowhere/ein dö.py", "exec"), names)
    call = names["f"]()[0]
    assert (call.line, call.function) == (2, "f")
    assert call.module.startswith("ein d")


def test_no_frame_object_of_another_thread_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError

    monkeypatch.setattr(sys, "_current_frames", never)
    assert threading.main_thread().ident in stacks()


def test_where_nothing_can_be_written_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no room")

    monkeypatch.setattr(module, "_file", refuse)
    assert stacks() == {}


def test_other_systems_have_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create", raising=False)
    assert threading.get_ident() in stacks()


def test_a_look_is_of_its_moment_and_leaves_nothing_to_the_next() -> None:
    with StackReader() as reader:

        def early() -> None:
            reader.look()

        def late() -> None:
            reader.look()

        seen = []
        for function in (early, late):
            function()
            seen.append([call.function for call in reader.read()[threading.get_ident()]])
        assert [functions[0] for functions in seen] == ["early", "late"]
        assert seen[0][1:] == seen[1][1:]
        assert reader.read() == {}
