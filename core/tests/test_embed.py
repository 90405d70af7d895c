"""``service.embed``: what it takes, what it raises, and that it ends with its caller."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from core_doubles import Recorder

from engineroom import (
    Capabilities,
    ConfigurationError,
    EmbeddingRequest,
    Embeddings,
    InferenceError,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    LoggingObserver,
    ModelNotFoundError,
    QueueFullError,
    RequestTimeoutError,
    ResourceNotAvailableError,
)
from engineroom.testing import EchoHandler


class FakeEmbedder(EchoHandler):
    """Echo models whose embedding waits, fails or lies as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.claims = True
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.ended = 0
        self.answer: Any = None

    def capabilities(self) -> Capabilities:
        return Capabilities(embeddings=self.claims)

    async def embed(self, loaded_model: LoadedModel, texts: Sequence[str]) -> Embeddings:
        self.entered.set()
        try:
            await self.go.wait()
            if isinstance(self.answer, BaseException):
                raise self.answer
            found: Embeddings = self.answer
            return await super().embed(loaded_model, texts) if found is None else found
        finally:
            self.ended += 1


def make(handler: EchoHandler, **options: Any) -> LLMInferenceService:
    manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "echo:"}]})
    return LLMInferenceService(manager, handlers=[handler], **options)


async def test_each_text_has_its_vector() -> None:
    async with make(EchoHandler()) as service:
        found = await service.embed("m", ["ab", "b b", "ba"])
    assert [round(sum(x * x for x in vector), 6) for vector in found.vectors] == [1, 1, 1]
    assert found.vectors[0] == found.vectors[2] != found.vectors[1]
    assert found.prompt_tokens == 4


@pytest.mark.parametrize("texts", [[], "a text", [""], ["a", ""], [1], None, {"a": 1}])
async def test_what_are_no_texts_is_refused_before_anything_is_loaded(texts: Any) -> None:
    handler = EchoHandler()
    async with make(handler) as service:
        with pytest.raises(ConfigurationError, match="list of texts"):
            await service.embed("m", texts)
    assert handler.loads == 0


@pytest.mark.parametrize("method", ["process_inference", "infer", "stream", "run", "stream_sync"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (EmbeddingRequest(model_id="m", texts=["a"]), "service.embed"),
        ({"model_id": "m"}, "build one with"),
    ],
    ids=["embedding", "mapping"],
)
async def test_only_a_request_to_generate_is_answered(method: str, wrong: Any, said: str) -> None:
    async def answer() -> None:
        made = getattr(service, method)(wrong)
        if asyncio.iscoroutine(made):
            await made

    handler = EchoHandler()
    async with make(handler) as service:
        with pytest.raises(ConfigurationError, match=f"{method} takes an .*{said}"):
            await answer()
    assert handler.loads == 0


@pytest.mark.parametrize(
    "wrong", [InferenceRequest(model_id="m", prompt="a"), None], ids=["a request", "None"]
)
async def test_a_request_is_no_id_of_a_model(wrong: Any) -> None:
    async with make(EchoHandler()) as service:
        with pytest.raises(ConfigurationError, match="id of a model and a list of texts"):
            await service.embed(wrong, ["a"])


async def test_a_handler_that_does_not_claim_it_is_not_asked() -> None:
    handler = FakeEmbedder()
    handler.claims = False
    async with make(handler) as service:
        with pytest.raises(ConfigurationError, match="'echo' makes no embeddings"):
            await service.embed("m", ["a"])
    assert handler.ended == 0


async def test_plugins_are_discovered_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    async with make(EchoHandler()) as service:
        discover = service.registry.discover

        def noting() -> None:
            threads.append(threading.get_ident())
            discover()

        monkeypatch.setattr(service.registry, "discover", noting)
        await service.embed("m", ["a"])
    assert threads and threads[0] != threading.get_ident()


async def test_an_unknown_model_is_named() -> None:
    async with make(EchoHandler()) as service:
        with pytest.raises(ModelNotFoundError) as caught:
            await service.embed("n", ["a"])
    assert caught.value.model_id == "n"


async def test_a_failure_is_typed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    handler = FakeEmbedder()
    handler.answer = ValueError("bad")
    with caplog.at_level(logging.ERROR, "engineroom"):
        async with make(handler) as service:
            with pytest.raises(InferenceError, match="ValueError: bad") as caught:
                await service.embed("m", ["a"])
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.model_id == "m"
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("answer", [[[1.0]], Embeddings([[1.0], [2.0]], 1)])
async def test_an_answer_that_is_none_is_the_plugins_fault(answer: Any) -> None:
    handler = FakeEmbedder()
    handler.answer = answer
    async with make(handler) as service:
        with pytest.raises(InferenceError, match="mend the plugin"):
            await service.embed("m", ["a"])


async def test_a_deadline_stops_the_work() -> None:
    handler = FakeEmbedder()
    handler.go.clear()
    async with make(handler) as service:
        with pytest.raises(RequestTimeoutError, match=r"timeout_s=0\.01"):
            await service.embed("m", ["a"], timeout_s=0.01)
        assert service.num_requests == 0
    # Under load the deadline may come before the handler was asked.
    assert handler.ended == int(handler.entered.is_set())


async def test_cancelling_the_caller_stops_the_work() -> None:
    handler = FakeEmbedder()
    handler.go.clear()
    async with make(handler) as service:
        caller = asyncio.create_task(service.embed("m", ["a"]))
        await handler.entered.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert handler.ended == 1


async def test_it_counts_among_the_requests() -> None:
    handler = FakeEmbedder()
    handler.go.clear()
    async with make(handler, max_requests=1) as service:
        first = asyncio.create_task(service.embed("m", ["a"]))
        await handler.entered.wait()
        assert service.num_requests == 1
        with pytest.raises(QueueFullError):
            await service.embed("m", ["a"])
        handler.go.set()
        await first


async def test_closing_waits_and_then_stops_it() -> None:
    handler = FakeEmbedder()
    handler.go.clear()
    service = make(handler)
    waited = asyncio.create_task(service.embed("m", ["a"]))
    await handler.entered.wait()
    closing = asyncio.create_task(service.close(drain_timeout_s=60))
    await asyncio.sleep(0.02)
    assert not closing.done()
    with pytest.raises(ResourceNotAvailableError, match="closed"):
        await service.embed("m", ["a"])
    handler.go.set()
    assert (await waited).prompt_tokens == 1
    await closing

    handler = FakeEmbedder()
    handler.go.clear()
    service = make(handler)
    stopped = asyncio.create_task(service.embed("m", ["a"]))
    await handler.entered.wait()
    await service.close(drain_timeout_s=0)
    with pytest.raises(ResourceNotAvailableError, match="was closed"):
        await stopped
    assert handler.ended == handler.unloads == 1


# ── one life with all other requests ─────────────────────────────────────────────────────────


def watched(handler: EchoHandler, **options: Any) -> tuple[LLMInferenceService, Recorder]:
    service, recorder = make(handler, **options), Recorder()
    service.registry.register_plugin(recorder)
    return service, recorder


async def test_observers_see_it_as_a_request_of_its_kind() -> None:
    service, seen = watched(EchoHandler())
    async with service:
        await service.embed("m", ["a b", "c"], request_id="r", metadata={"tenant": "t"})
        await service.embed("m", ["a"])
    assert seen.order[:3] == ["started", "loaded", "finished"] and seen.balanced()
    (request, response), (other, _) = seen.finished
    assert seen.started == [request, other]
    assert isinstance(request, EmbeddingRequest) and request.texts == ["a b", "c"]
    assert (request.kind, request.model_id, request.request_id) == ("embed", "m", "r")
    assert (request.metadata, request.prompt, request.messages) == ({"tenant": "t"}, "", None)
    assert other.request_id not in {"", "r"}
    assert (response.request_id, response.handler, response.finish_reason) == (
        "r", "echo", "eos_token",
    )  # fmt: skip
    assert (response.prompt_tokens, response.generated_tokens) == (3, None)
    assert response.inference_time_ms is not None and response.inference_time_ms > 0


async def test_however_it_ends_observers_are_told_once() -> None:
    handler = FakeEmbedder()
    service, seen = watched(handler)
    handler.answer = ValueError("bad")
    with pytest.raises(InferenceError) as caught:
        await service.embed("m", ["a"], request_id="r")
    assert (caught.value.request_id, caught.value.model_id) == ("r", "m")
    handler.answer = None
    handler.go.clear()
    with pytest.raises(RequestTimeoutError):
        await service.embed("m", ["a"], timeout_s=0.01)
    handler.entered.clear()
    caller = asyncio.create_task(service.embed("m", ["a"]))
    await handler.entered.wait()
    caller.cancel()
    await asyncio.wait([caller])
    handler.entered.clear()
    stopped = asyncio.create_task(service.embed("m", ["a"]))
    await handler.entered.wait()
    await service.close(drain_timeout_s=0)
    with pytest.raises(ResourceNotAvailableError, match="was closed"):
        await stopped
    with pytest.raises(ResourceNotAvailableError):
        await service.embed("m", ["a"])
    assert seen.reasons == ["error", "timeout", "cancelled", "cancelled"] and seen.balanced()
    assert [response.error_type for _, response in seen.finished] == [
        "InferenceError", "RequestTimeoutError", None, "ResourceNotAvailableError",
    ]  # fmt: skip
    assert [reason for _, reason in seen.rejected] == ["closed"]


async def test_a_handler_that_swallows_its_cancellation_is_stopped_all_the_same() -> None:
    class Careless(FakeEmbedder):
        async def embed(self, loaded_model: LoadedModel, texts: Sequence[str]) -> Embeddings:
            try:
                return await super().embed(loaded_model, texts)
            except asyncio.CancelledError:
                return Embeddings([[1.0]], 1)

    handler = Careless()
    handler.go.clear()
    async with make(handler) as service:
        with pytest.raises(RequestTimeoutError):
            await service.embed("m", ["a"], timeout_s=0.01)
        handler.entered.clear()
        caller = asyncio.create_task(service.embed("m", ["a"]))
        await handler.entered.wait()
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()


async def test_its_log_names_request_and_model_and_never_a_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = FakeEmbedder()
    service, _ = watched(handler)
    service.registry.register_plugin(LoggingObserver())
    with caplog.at_level(logging.DEBUG, logger="engineroom"):
        async with service:
            await service.embed("m", ["confidential"], request_id="r-1")
            handler.answer = ValueError("bad")
            with pytest.raises(InferenceError):
                await service.embed("m", ["confidential"], request_id="r-1")
    mine = [r for r in caplog.records if getattr(r, "request_id", None) == "r-1"]
    assert all(r.model_id == "m" for r in mine)  # type: ignore[attr-defined]
    told = [(r.levelname, r.getMessage()) for r in mine if r.name == "engineroom.requests"]
    assert [level for level, _ in told] == ["DEBUG", "INFO", "DEBUG", "WARNING"]
    assert "started (embed)" in told[0][1]
    assert "finished: embed, done, 1 prompt tokens in" in told[1][1]
    assert [r.name for r in mine if r.exc_info] == ["engineroom.service"]
    assert "confidential" not in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"timeout_s": 0}, {"request_id": "a\nb"}, {"metadata": {1: 2}}, {"timeout_s": "x"}]
)
async def test_what_makes_no_request_is_refused_before_anything_is_loaded(
    wrong: dict[str, Any],
) -> None:
    handler = EchoHandler()
    service, seen = watched(handler)
    async with service:
        with pytest.raises(ConfigurationError, match=f"embed: {next(iter(wrong))}"):
            await service.embed("m", ["a"], **wrong)
    assert handler.loads == 0 and not seen.started


async def test_its_request_is_none_that_is_generated_from() -> None:
    async with make(EchoHandler()) as service:
        with pytest.raises(ConfigurationError, match="not EmbeddingRequest"):
            await service.process_inference(EmbeddingRequest(model_id="m", texts=["a"]))
