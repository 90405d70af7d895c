"""``service.rerank``: what it takes, what it raises, and that it lives as other requests do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from core_doubles import Recorder

from engineroom import (
    Capabilities,
    ConfigurationError,
    InferenceError,
    LLMInferenceService,
    LLMModelManager,
    LoadedModel,
    RequestTimeoutError,
    RerankRequest,
    Scores,
)
from engineroom.testing import EchoHandler


class Ranker(EchoHandler):
    """Echo models whose ranking waits or lies as a test says."""

    def __init__(self, answer: Any = None, *, claims: bool = True) -> None:
        super().__init__()
        self.claims = claims
        self.answer = answer
        self.go = asyncio.Event()
        self.go.set()
        self.ended = 0

    def capabilities(self) -> Capabilities:
        return Capabilities(rerank=self.claims)

    async def rerank(self, loaded_model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> Scores:
        try:
            await self.go.wait()
            if self.answer is None:
                return await super().rerank(loaded_model, pairs)
            answer: Scores = self.answer
            return answer
        finally:
            self.ended += 1


def make(handler: EchoHandler, **options: Any) -> LLMInferenceService:
    manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "echo:"}]})
    return LLMInferenceService(manager, handlers=[handler], **options)


async def test_each_document_has_its_score() -> None:
    async with make(EchoHandler()) as service:
        one = await service.rerank("m", "abc", ["abc", "xyz", "a b"])
        each = await service.rerank("m", ["xyz", "abc"], ["xyz", "abc"])
    assert one.scores == pytest.approx([1.0, 0.0, (2 / 3) ** 0.5])
    assert one.prompt_tokens == 7
    assert each.scores == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("query", "documents", "says"),
    [
        ("", ["a"], "queries.0"),
        ("a", [], "documents"),
        ("a", "a text", "documents"),
        ("a", ["b", ""], "documents.1"),
        ("a", [1], "documents.0"),
        (None, ["a"], "queries"),
        (["a", "b"], ["a", "b", "c"], "2 queries and 3 documents"),
        (["a", "b"], ["a"], "2 queries and 1 documents"),
        ("a", ["\ud800"], "surrogate"),
    ],
)
async def test_what_is_no_request_is_refused_before_anything_is_loaded(
    query: Any, documents: Any, says: str
) -> None:
    handler = EchoHandler()
    async with make(handler) as service:
        with pytest.raises(ConfigurationError, match=says):
            await service.rerank("m", query, documents)
        with pytest.raises(ConfigurationError, match="id of a model"):
            await service.rerank(None, "a", ["b"])  # type: ignore[arg-type]
        request = RerankRequest(model_id="m", queries=["a"], documents=["b"])
        with pytest.raises(ConfigurationError, match="service.rerank"):
            await service.infer(request)
    assert handler.loads == 0


async def test_a_handler_that_does_not_claim_it_is_not_asked() -> None:
    handler = Ranker(claims=False)
    async with make(handler) as service:
        with pytest.raises(ConfigurationError, match="'echo' ranks no documents"):
            await service.rerank("m", "a", ["b"])
    assert handler.ended == 0


@pytest.mark.parametrize("answer", [[1.0], Scores([1.0, 2.0], 1)])
async def test_an_answer_that_is_none_is_the_plugins_fault(answer: Any) -> None:
    async with make(Ranker(answer)) as service:
        with pytest.raises(InferenceError, match="mend the plugin"):
            await service.rerank("m", "a", ["b"])


async def test_what_is_no_number_is_no_score() -> None:
    async with make(Ranker(Scores([float("nan")], 1))) as service:
        with pytest.raises(InferenceError, match="no number"):
            await service.rerank("m", "a", ["b"])


async def test_it_is_stopped_logged_and_observed_as_other_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler, seen = Ranker(), Recorder()
    async with make(handler) as service:
        service.registry.register_plugin(seen)
        with caplog.at_level(logging.DEBUG, "engineroom"):
            await service.rerank("m", "secret query", ["secret text"], request_id="r1")
        handler.go.clear()
        with pytest.raises(RequestTimeoutError):
            await service.rerank("m", "a", ["b"], timeout_s=0.01)
        caller = asyncio.create_task(service.rerank("m", "a", ["b"]))
        while service.num_requests == 0:
            await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert service.num_requests == 0
    lines = [record.getMessage() for record in caplog.records]
    assert any("r1 for m started (rerank): 1 documents of 11" in line for line in lines)
    assert any("r1 for m finished: rerank, done, 4 prompt tokens" in line for line in lines)
    assert not any("secret" in line for line in lines)
