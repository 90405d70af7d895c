"""The sides of the server's bar: three ASGI applications that stream the same chunks.

Each is run by uvicorn with uvloop and httptools where they are installed, in a process of its own,
and is driven by the same engine: eight streams, one chunk a step for each.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

from benchmarks.fake import FakeEngine, SteppedHandler
from engineroom import LLMInferenceService, LLMModelManager, Mailbox, TokenStep

__all__ = ["STREAMS", "Served", "drive"]

STREAMS = 8
TEXT = " word"


class Served:
    """A server in this process; its CPU time is the process's.

    :param kind: ``engineroom``, ``raw`` or ``fastapi``.
    :param tokens: chunks of a stream.
    """

    def __init__(self, kind: str, tokens: int) -> None:
        self._kind, self._tokens = kind, tokens
        self._port = 0
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._stop: Any = None
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait(60)
        if self._failed is not None:
            raise self._failed

    def port(self) -> int:
        """Where it listens."""
        return self._port

    def cpu(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    def close(self) -> None:
        """End it."""
        self._stop()

    def _run(self) -> None:
        try:
            from engineroom.server.runner import loop_factory

            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._main())
        except BaseException as error:  # noqa: BLE001 - raised in the constructor
            self._failed = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        import uvicorn

        from engineroom.server.runner import EngineRoomServer, bind
        from engineroom.server.settings import ServerSettings

        settings = ServerSettings(port=0, drain_timeout_s=0)
        listening = bind(settings)
        self._port = listening.getsockname()[1]
        if self._kind == "engineroom":
            await self._engineroom(listening, settings, EngineRoomServer)
            return
        app = _raw(self._tokens) if self._kind == "raw" else _fastapi(self._tokens)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", proxy_headers=False
        )
        server = uvicorn.Server(config)
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        serving = asyncio.create_task(server.serve([listening]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        self._ready.set()
        await serving

    async def _engineroom(self, listening: socket.socket, settings: Any, kind: Any) -> None:
        steps = [TokenStep((number,), TEXT) for number in range(self._tokens)]
        steps.append(TokenStep(finish="eos_token"))

        class Handler(SteppedHandler):
            name: ClassVar[str] = "fake_stepped"

            def capabilities(self) -> Any:
                from engineroom import Capabilities

                return Capabilities(params=frozenset({"max_new_tokens", "temperature"}), chat=True)

            def _open(self) -> Any:
                if self.opened % STREAMS == 0:
                    self.engine = FakeEngine(STREAMS, steps)
                    self.running = asyncio.get_running_loop().create_task(self.engine.run())
                self.opened += 1
                return self.engine.open()

            opened = 0

            async def generate_tokens(
                self, loaded_model: Any, request: Any
            ) -> AsyncGenerator[Mailbox, None]:
                yield self._open()

        manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "fake:"}]})
        service = LLMInferenceService(manager, handlers=[Handler()])
        server = kind(service, settings)
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(server.stop)
        await server.run_until_stopped([listening], started=self._ready.set)


class _Queues:
    """The engine of the other two: a queue a stream, one text a step."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._queues: list[asyncio.Queue[str | None]] = []

    def open(self) -> asyncio.Queue[str | None]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._queues.append(queue)
        if len(self._queues) == STREAMS:
            self._task = asyncio.create_task(self._run(self._queues))
            self._queues = []
        return queue

    async def _run(self, queues: list[asyncio.Queue[str | None]]) -> None:
        for _ in range(self._tokens):
            for queue in queues:
                queue.put_nowait(TEXT)
            await asyncio.sleep(0)
        for queue in queues:
            queue.put_nowait(None)


def _raw(tokens: int) -> Any:
    """ASGI by hand: a queue, a frame put together of bytes, a send."""
    import msgspec

    encode = msgspec.json.Encoder().encode
    queues = _Queues(tokens)
    base = {"id": "chatcmpl-0123456789abcdef01234567", "object": "chat.completion.chunk"}
    choice = {"index": 0, "delta": {"content": "@"}, "logprobs": None, "finish_reason": None}
    whole = {**base, "created": 1, "model": "m", "system_fingerprint": None, "choices": [choice]}
    before, _, after = (b"data: " + encode(whole) + b"\n\n").partition(b'"@"')

    async def app(_: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        queue = queues.open()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while (text := await queue.get()) is not None:
            frame = before + encode(text) + after
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


def _fastapi(tokens: int) -> Any:
    """As it is often done: FastAPI, and a pydantic model for each chunk."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from pydantic import BaseModel

    class Delta(BaseModel):
        role: str | None = None
        content: str | None = None

    class Choice(BaseModel):
        index: int
        delta: Delta
        logprobs: dict[str, Any] | None = None
        finish_reason: str | None = None

    class Chunk(BaseModel):
        id: str
        object: str = "chat.completion.chunk"
        created: int
        model: str
        system_fingerprint: str | None = None
        choices: list[Choice]

    queues = _Queues(tokens)
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        assert body["stream"]
        queue = queues.open()

        async def frames() -> AsyncGenerator[str, None]:
            while (text := await queue.get()) is not None:
                choice = Choice(index=0, delta=Delta(content=text))
                chunk = Chunk(
                    id="chatcmpl-0123456789abcdef01234567", created=1, model="m", choices=[choice]
                )
                yield f"data: {chunk.model_dump_json()}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(frames(), media_type="text/event-stream")

    return app


async def _client(port: int, body: bytes) -> tuple[float, int]:
    """One stream; seconds to its first byte, and its chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.perf_counter()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    chunks, first, tail = 0, 0.0, b""
    while data := await reader.read(1 << 18):
        first = first or time.perf_counter() - started
        chunks += data.count(b'"delta":{"content":') + data.count(b'"delta":{"role":null')
        tail = (tail + data)[-64:]
    writer.close()
    if b"[DONE]" not in tail:
        raise RuntimeError(f"the stream did not end well: {tail!r}")
    return first, chunks


async def drive(port: int, streams: int = STREAMS) -> list[tuple[float, int]]:
    """So many streams at once."""
    message = {"role": "user", "content": "Hello"}
    body = json.dumps({"model": "m", "messages": [message], "stream": True}).encode()
    return await asyncio.gather(*(_client(port, body) for _ in range(streams)))
