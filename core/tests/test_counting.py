"""``service.count_prompt_tokens``: counted as for an answer, by a request of its own kind."""

from __future__ import annotations

from typing import Any

import pytest
from core_doubles import Recorder

from engineroom import (
    ConfigurationError,
    CountRequest,
    InferenceError,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelNotFoundError,
    RequestTimeoutError,
)
from engineroom.testing import EchoHandler


class Odd(EchoHandler):
    """Counts as a test says."""

    count: Any = None

    async def count_prompt_tokens(self, loaded_model: Any, request: InferenceRequest) -> Any:
        return self.count


def make(handler: EchoHandler, **options: Any) -> LLMInferenceService:
    model = {"model_id": "m", "source": "echo:", "options": options}
    return LLMInferenceService(LLMModelManager(config={"models": [model]}), handlers=[handler])


def asked(**fields: Any) -> InferenceRequest:
    messages = [{"role": "user", "content": "one two three"}]
    return InferenceRequest(**{"model_id": "m", "messages": messages, **fields})


async def test_a_prompt_has_the_tokens_that_were_counted():
    service = make(EchoHandler())
    recorder = Recorder()
    service.registry.register_plugin(recorder)
    async with service:
        request = asked(request_id="r", metadata={"who": "ann"})
        answer = await service.infer(request)
        assert await service.count_prompt_tokens(request) == answer.prompt_tokens == 3
        ids = InferenceRequest(model_id="m", prompt_token_ids=[1, 2])
        assert await service.count_prompt_tokens(ids) == 2
        assert service.num_requests == 0
    kinds = [request.kind for request, _ in recorder.finished]
    assert kinds.count("count") == 2, kinds


async def test_what_does_not_count_is_told(caplog):
    handler = Odd()
    service = make(handler)
    async with service:
        for count, error in (
            (None, ConfigurationError),
            (-1, InferenceError),
            ("3", InferenceError),
        ):
            handler.count = count
            with pytest.raises(error, match="does not count prompts|returned"):
                await service.count_prompt_tokens(asked())
        with pytest.raises(ModelNotFoundError):
            await service.count_prompt_tokens(asked(model_id="none"))
        counted = CountRequest(model_id="m", prompt="a")
        with pytest.raises(ConfigurationError, match="takes an InferenceRequest"):
            await service.count_prompt_tokens(counted)


async def test_it_takes_no_more_than_its_time():
    service = make(EchoHandler(), load_delay_s=60)
    with pytest.raises(RequestTimeoutError):
        await service.count_prompt_tokens(asked(timeout_s=0.05))
    await service.close(0)
