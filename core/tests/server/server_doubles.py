"""A fake runtime that says the prompt back, honours every parameter and obeys words in it.

It stands in for a runtime; what is under test is the server. Words that begin with ``!``:
``!hang`` waits for ever in prefill, ``!drip`` never ends, ``!fail`` fails before the first token,
``!break`` fails after the second, ``!dead`` is an engine that has ended, ``!die`` one that ends
after the second token, ``!mortal`` one that has ended as often as ``deaths`` says, ``!wait`` waits
in prefill for ``gate``, ``!leak`` fails with a path in the message, ``!refuse`` is a request that
cannot be honoured. Token ids of a prompt are characters.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

from engineroom import (
    Capabilities,
    GenerationParams,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    TokenHandler,
    TokenStep,
)
from engineroom.errors import ConfigurationError, EngineDeadError
from engineroom.handlers.base import HandlerHealth
from engineroom.schemas import PromptLogprob, TokenLogprob


class TalkHandler(TokenHandler):
    name = "talk"

    def __init__(self) -> None:
        self.running = 0
        self.begun = 0
        self.steps = 0
        self.ok = True
        self.dead = False
        self.seen: list[InferenceRequest] = []
        self.load_gate: asyncio.Event | None = None
        self.fail_load = False
        self.gate = asyncio.Event()
        self.deaths = 0

    def capabilities(self) -> Capabilities:
        params = frozenset(GenerationParams.model_fields)
        return Capabilities(params=params, chat=True, adapters=True, prompt_token_ids=True)

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return loaded_model.model_object == "talk"

    def can_load(self, config: ModelConfig) -> bool:
        return (config.source or "").startswith("talk:")

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        self.ok, self.dead = True, False
        if self.load_gate is not None:
            await self.load_gate.wait()
        if self.fail_load or "bad" in (config.source or ""):
            raise ConfigurationError("the file /srv/secret/model.bin is damaged")
        return LoadedModel(
            model_id=config.model_id,
            model_object="talk",
            config=config,
            max_context_tokens=4096,
            memory_bytes=1000,
        )

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        return HandlerHealth(
            ok=self.ok, num_requests_running=self.running, kv_cache_usage=0.25, dead=self.dead
        )

    async def count_prompt_tokens(self, loaded_model: LoadedModel, request: Any) -> int:
        return len(_words(request))

    async def tokenize(self, loaded_model: LoadedModel, request: Any) -> list[int]:
        return list(range(len(_words(request))))

    async def token_bytes(self, loaded_model: LoadedModel, tokens: Any) -> list[bytes]:
        return [b"%d " % token for token in tokens]

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        self.seen.append(request)
        del self.seen[:-50]
        self.running += 1
        self.begun += 1
        try:
            async for step in self._talk(request):
                self.steps += 1
                yield step
        finally:
            self.running -= 1

    async def _talk(self, request: InferenceRequest) -> AsyncGenerator[TokenStep, None]:
        text = _text(request)
        words = _words(request)
        if "!wait" in text:
            await self.gate.wait()
        if "!mortal" in text and self.deaths > 0:
            self.deaths -= 1
            raise EngineDeadError("the process at /opt/engine/bin ended with status -9")
        if "!refuse" in text:
            raise ConfigurationError("the prompt has 9000 tokens, but the context has 4096")
        if "!dead" in text:
            raise EngineDeadError("the process at /opt/engine/bin ended with status -9")
        if "!leak" in text:
            raise OSError(2, "No such file", "/srv/secret/weights.bin")
        if "!fail" in text:
            raise RuntimeError("asked to fail before the first token")
        await asyncio.sleep(0)
        if "!hang" in text:
            await asyncio.Event().wait()
        yield TokenStep(
            prompt_tokens=len(words),
            cached_prompt_tokens=len(words) // 2,
            prompt_logprobs=self._of_prompt(words, request.params.prompt_logprobs),
        )
        number = 0
        while True:
            for word in words:
                await asyncio.sleep(0.002 if "!drip" in text else 0)
                if "!break" in text and number == 2:
                    raise RuntimeError("asked to fail after the second token")
                if "!die" in text and number == 2:
                    raise EngineDeadError("the process at /opt/engine/bin ended with status -9")
                yield self._step(number, word, request)
                number += 1
            if "!drip" not in text:
                break
        yield TokenStep(finish="eos_token")

    def _of_prompt(self, words: list[str], top: int | None) -> list[PromptLogprob] | None:
        if top is None:
            return None
        first = PromptLogprob(token_id=0, token=words[0], logprob=None)
        others: Any = [(t, f"alt{t}", -1.0 - t) for t in range(top)]
        return [first] + [
            TokenLogprob(token_id=i, token=word, logprob=-2.5, top=others)
            for i, word in enumerate(words[1:], 1)
        ]

    def _step(self, number: int, word: str, request: InferenceRequest) -> TokenStep:
        logprobs: Any = None
        if (top := request.params.logprobs) is not None:
            others = [(i, f"alt{i}", -1.0 - i) for i in range(top)]
            logprobs = [TokenLogprob(token_id=number, token=word, logprob=-0.5, top=others)]
        return TokenStep((number,), word, logprobs=logprobs)


def _text(request: InferenceRequest) -> str:
    if request.prompt_token_ids is not None:
        return "".join(map(chr, request.prompt_token_ids))
    if request.prompt is not None:
        return request.prompt
    assert request.messages is not None
    return request.messages[-1].content or ""


def _words(request: InferenceRequest) -> list[str]:
    return re.findall(r"\s*\S+|\s+", _text(request))
