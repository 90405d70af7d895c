"""What vLLM raises in tasks, its own and the plugin's; no engine is started."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from engineroom import ConfigurationError, EngineDeadError, EngineRoomError, InferenceError
from engineroom_vllm.failures import Failures
from engineroom_vllm.library import Library


class PanicException(BaseException):
    """Stands for pyo3's: a panic in Rust."""


class DeadError(Exception):
    """Stands for vLLM's."""


def failures(*, ended: bool = False) -> Failures:
    library: Any = SimpleNamespace(dead_error=DeadError, request_errors=(ValueError,))
    lifecycle: Any = SimpleNamespace(
        ended=ended, gone=lambda why="": EngineDeadError(f"it has died: {why}")
    )
    return Failures(library, lifecycle)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (PanicException("a Rust panic"), InferenceError, "PanicException: a Rust panic"),
        (SystemExit(3), InferenceError, "SystemExit: 3"),
        (KeyboardInterrupt(), InferenceError, "KeyboardInterrupt"),
        (GeneratorExit(), InferenceError, "GeneratorExit"),
        (ValueError("no such adapter"), ConfigurationError, "vLLM refuses the request"),
        (DeadError("gone"), EngineDeadError, "it has died"),
        (RuntimeError("odd"), InferenceError, "RuntimeError: odd"),
    ],
)
async def test_what_fails_in_one_task_of_several_is_typed_and_stops_the_others(
    raised: BaseException, kind: type[EngineRoomError], said: str
) -> None:
    stopped: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise raised

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append("another")

    # In a thread, where a KeyboardInterrupt is nobody's but a library's.
    with pytest.raises(kind, match=said):
        await asyncio.to_thread(asyncio.run, failures().together([wait(), fail()]))
    assert stopped == ["another"]
    assert await failures().together([asyncio.sleep(0, "a"), asyncio.sleep(0, "b")]) == ["a", "b"]


@pytest.mark.parametrize("raised", [PanicException("a panic"), SystemExit(3), RuntimeError("odd")])
async def test_vllms_task_is_given_an_exception_whatever_its_outputs_raise(
    raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """For that it tells its requests of; of anything else it ends, and they wait for ever."""

    def process_outputs(*_: object, **__: object) -> str:
        if "fail" in _:
            raise raised
        return "processed"

    async def get_supported_tasks() -> tuple[str, ...]:
        return ("generate",)

    llm = SimpleNamespace(
        output_processor=SimpleNamespace(process_outputs=process_outputs),
        get_supported_tasks=get_supported_tasks,
    )
    assert await Library.wake(llm) == ("generate",)
    assert llm.output_processor.process_outputs("outputs", at=1.0) == "processed"
    with pytest.raises(InferenceError, match=type(raised).__name__):
        llm.output_processor.process_outputs("fail")
    assert "in process_outputs" in caplog.text


def test_what_an_engine_died_of_on_this_side_is_told() -> None:
    cause = InferenceError("vLLM: handing outputs over failed: PanicException: a panic")
    error = RuntimeError("see above")
    error.__cause__ = cause
    with (
        pytest.raises(EngineDeadError, match="it has died: vLLM: handing outputs over failed"),
        failures(ended=True).typed(),
    ):
        raise error
