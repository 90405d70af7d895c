"""``service.tokenize`` and ``detokenize``: they live as other requests do."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from core_doubles import Recorder
from toy_runtime import ToyHandler

from engineroom import (
    ConfigurationError,
    InferenceError,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelNotFoundError,
    TokenizeRequest,
)


class Odd(ToyHandler):
    """Answers as a test says."""

    ids: Any = None
    made: Any = None

    async def tokenize(self, loaded_model: Any, request: Any) -> Any:
        return self.ids

    async def token_bytes(self, loaded_model: Any, tokens: Any) -> Any:
        return self.made


def make(handler: ToyHandler) -> LLMInferenceService:
    manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "toy:"}]})
    return LLMInferenceService(manager, handlers=[handler])


def asked(**fields: Any) -> InferenceRequest:
    return InferenceRequest(**{"model_id": "m", "prompt": "aé", **fields})


async def test_tokens_are_those_that_an_answer_reads(caplog):
    service, recorder = make(ToyHandler()), Recorder()
    service.registry.register_plugin(recorder)
    chat = {"prompt": None, "messages": [{"role": "user", "content": "hi"}]}
    async with service:
        with caplog.at_level(logging.DEBUG, "engineroom"):
            plain = await service.tokenize(asked(request_id="r1"))
            told = await service.tokenize(asked(), pieces=True)
            talk = await service.tokenize(asked(**chat))
            text = await service.detokenize("m", plain.ids, request_id="r2")
        assert await service.count_prompt_tokens(asked(**chat)) == len(talk.ids)
        assert service.num_requests == 0
        with pytest.raises(ConfigurationError, match="more than 2 bytes"):
            await service.detokenize("m", plain.ids, max_bytes=2)
    assert (plain.ids, plain.pieces, plain.max_context_tokens) == ([97, 195, 169], None, 320)
    assert told.pieces == [b"a", b"\xc3", b"\xa9"]
    assert text == "aé"
    kinds = [request.kind for request, _ in recorder.finished]
    assert kinds.count("tokenize") == 3 and kinds.count("detokenize") == 2
    lines = [record.getMessage() for record in caplog.records]
    assert any("r1 for m started (tokenize): prompt of 2 characters" in line for line in lines)
    assert any("r2 for m started (detokenize): 3 token ids" in line for line in lines)
    assert any("r2 for m finished: detokenize, done" in line for line in lines)


async def test_what_is_no_request_is_refused():
    async with make(ToyHandler()) as service:
        with pytest.raises(ModelNotFoundError):
            await service.tokenize(asked(model_id="none"))
        with pytest.raises(ConfigurationError, match="takes an InferenceRequest"):
            await service.tokenize(TokenizeRequest(model_id="m", prompt="a"))
        for model_id, tokens, says in (
            (None, [1], "id of a model"),
            ("m", "abc", "list of token ids"),
            ("m", [1, -1], "tokens.1"),
            ("m", [1, "a"], "tokens.1"),
            ("m", [300], "257 tokens"),
        ):
            with pytest.raises(ConfigurationError, match=says):
                await service.detokenize(model_id, tokens)  # type: ignore[arg-type]


async def test_an_answer_that_is_none_is_the_plugins_fault():
    handler = Odd()
    async with make(handler) as service:
        for ids, made, error, says in (
            (None, None, ConfigurationError, "does not tell the tokens of prompts"),
            ("abc", None, InferenceError, "tokenize returned str"),
            ([1], None, ConfigurationError, "does not tell the text of tokens"),
            ([1, 2], [b"a"], InferenceError, "token_bytes did not return"),
        ):
            handler.ids, handler.made = ids, made
            with pytest.raises(error, match=says):
                await service.tokenize(asked(), pieces=True)
