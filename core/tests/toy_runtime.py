"""A runtime small enough to be read: real logits over bytes, and every parameter but beams.

What it writes depends on the last three bytes alone, so that texts repeat themselves. It answers
in capital letters, which prompts seldom have, and in characters of several bytes where the prompt
ends with one. A good citizen: the broken handlers of the tests each spoil one thing in it.
"""

from __future__ import annotations

import asyncio
import math
import random
import zlib
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from engineroom import (
    Capabilities,
    ConfigurationError,
    ContextLengthExceededError,
    Embeddings,
    GenerationParams,
    HandlerHealth,
    InferenceRequest,
    LoadedModel,
    ModelConfig,
    ModelNotFoundError,
    PromptLogprob,
    QueueFullError,
    ResourceNotAvailableError,
    Scores,
    TokenHandler,
    TokenLogprob,
    TokenStep,
    parse_options,
)
from engineroom.engine import common_prefix

EOS = 256
FLOOR = -60.0
LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ ,."
WIDE = [char.encode() for char in "你好世界🙂🚀"]
HONOURED = frozenset(GenerationParams.model_fields) - {
    "num_beams",
    "early_stopping",
    "structured_output",
}


class ToyOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    n_ctx: Annotated[int, Field(ge=8)] = 320
    n_parallel: Annotated[int, Field(ge=1)] = 8
    max_queue: Annotated[int, Field(ge=0)] = 64


class ToyTemplate:
    """Renders messages; the ``tokenizer`` of a toy model."""

    def render(self, messages):
        roles = [message.role for message in messages]
        if "tool" in roles or roles[0] == "assistant":
            raise ConfigurationError(f"this model does not know the roles {' → '.join(roles)}")
        return "".join(f"<{m.role}>{m.content}\n" for m in messages) + "<assistant>"

    def encode(self, text):
        return list(text.encode())


@dataclass(eq=False)
class ToyModel:
    """The ``model_object`` of a toy model."""

    options: ToyOptions
    slots: asyncio.Semaphore
    running: int = 0
    waiting: int = 0
    unloaded: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1 << 14)
def toy_logits(tail: tuple[int, ...]) -> tuple[float, ...]:
    logits = [FLOOR] * 257
    candidates = list(LETTERS)
    data = bytes(token for token in tail if token < 256)
    begun = next((data[-n:] for n in (3, 2, 1) if _begins(data[-n:])), b"")
    if begun:
        candidates = sorted({w[len(begun)] for w in WIDE if w.startswith(begun)})
    elif data[-1:] and data[-1] >= 0x80:
        candidates = sorted({w[0] for w in WIDE})
    state = zlib.crc32(bytes(data))
    for token in candidates:
        state = (state * 1103515245 + 12345 + token) & 0x7FFFFFFF
        logits[token] = (state >> 8) % 6000 / 1000
    if not begun:
        logits[EOS] = -2.0
    return tuple(logits)


def _begins(data: bytes) -> bool:
    return bool(data) and any(w.startswith(data) and w != data for w in WIDE)


def letters(data: bytes) -> list[float]:
    """How often each letter is there."""
    return [float(data.count(bytes([byte]))) for byte in range(97, 123)]


class ToyHandler(TokenHandler):
    """Runs ``toy:`` models."""

    name = "toy"
    api_version = "1.0"

    def capabilities(self) -> Capabilities:
        return Capabilities(
            params=HONOURED,
            chat=True,
            embeddings=True,
            prompt_token_ids=True,
            continue_final_message=True,
            rerank=True,
        )

    async def embed(self, loaded_model: LoadedModel, texts) -> Embeddings:
        if any(id_ > 255 for t in texts if not isinstance(t, str) for id_ in t):
            raise ConfigurationError("there are 256 tokens")
        data = [text.encode() if isinstance(text, str) else bytes(text) for text in texts]
        if any(len(each) > loaded_model.max_context_tokens for each in data):
            raise ConfigurationError("a text is longer than the context")
        for _ in texts:
            await asyncio.sleep(0)
        return Embeddings([self.vector(each) for each in data], sum(map(len, data)))

    async def rerank(self, loaded_model: LoadedModel, pairs) -> Scores:
        data = [(first.encode(), second.encode()) for first, second in pairs]
        if any(len(a) + len(b) > loaded_model.max_context_tokens for a, b in data):
            raise ConfigurationError("a document is longer than the context")
        await asyncio.sleep(0)
        return Scores(
            [sum(map(float.__mul__, *map(letters, both))) for both in data],
            sum(len(a) + len(b) for a, b in data),
        )

    def vector(self, data: bytes) -> list[float]:
        return letters(data)

    def can_load(self, config: ModelConfig) -> bool:
        return (config.source or "").startswith("toy:")

    def can_handle(self, loaded_model: LoadedModel) -> bool:
        return isinstance(loaded_model.model_object, ToyModel)

    async def load_model(self, config: ModelConfig) -> LoadedModel:
        options = parse_options(ToyOptions, config)
        if not self.can_load(config):
            raise ModelNotFoundError(f"{config.source!r} is no toy; write source: toy:")
        await asyncio.sleep(0)
        return LoadedModel(
            model_id=config.model_id,
            model_object=ToyModel(options, asyncio.Semaphore(options.n_parallel)),
            config=config,
            handler_name=self.name,
            tokenizer=ToyTemplate(),
            max_context_tokens=options.n_ctx,
            memory_bytes=1024,
        )

    async def unload_model(self, loaded_model: LoadedModel) -> None:
        loaded_model.model_object.unloaded = True

    def estimate_memory(self, config: ModelConfig):
        return {"cpu": 1024}

    def count_tokens(self, loaded_model: LoadedModel, text: str) -> int:
        return len(text.encode())

    async def count_prompt_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> int:
        return len(self.tokens(loaded_model, request))

    async def tokenize(self, loaded_model: LoadedModel, request: InferenceRequest) -> list[int]:
        return self.tokens(loaded_model, request)

    async def token_bytes(self, loaded_model: LoadedModel, tokens) -> list[bytes]:
        if max(tokens, default=0) > EOS:
            raise ConfigurationError("the model has 257 tokens")
        return [b"<end>" if token == EOS else bytes([token]) for token in tokens]

    def health(self, loaded_model: LoadedModel) -> HandlerHealth:
        model: ToyModel = loaded_model.model_object
        return HandlerHealth(
            ok=not model.unloaded,
            num_requests_running=model.running,
            num_requests_waiting=model.waiting,
            kv_cache_usage=model.running / model.options.n_parallel,
        )

    # ── what broken handlers replace ─────────────────────────────────────────────────────────

    def render(self, loaded_model: LoadedModel, messages) -> str:
        return loaded_model.tokenizer.render(messages)

    def continued(self, loaded_model: LoadedModel, messages) -> str:
        return self.render(loaded_model, messages).rpartition("\n<assistant>")[0]

    def tokens(self, loaded_model: LoadedModel, request: InferenceRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        text = request.prompt
        if text is None and request.continues:
            text = self.continued(loaded_model, request.messages)
        elif text is None:
            text = self.render(loaded_model, request.messages)
        return list(text.encode())

    def check(self, model: ToyModel, request: InferenceRequest, prompt: list[int]) -> None:
        if not prompt:
            raise ConfigurationError("the prompt is empty; send at least one character")
        if len(prompt) >= model.options.n_ctx:
            raise ContextLengthExceededError(
                f"the prompt has {len(prompt)} tokens, the context {model.options.n_ctx}"
            )
        if max(prompt) > EOS:
            raise ConfigurationError("the prompt has a token that is none; there are 257")
        if any(token > EOS for token in request.params.logit_bias or ()):
            raise ConfigurationError("logit_bias names a token that is none; there are 257")

    def logits(self, model: ToyModel, tail: tuple[int, ...]) -> Sequence[float]:
        return toy_logits(tail)

    def random(self, request: InferenceRequest) -> random.Random:
        return random.Random(request.params.seed)

    def adjusted(
        self, params: GenerationParams, logits: Sequence[float], prompt: list[int], new: list[int]
    ) -> list[float]:
        """Bias and penalties."""
        found = list(logits)
        for token, bias in (params.logit_bias or {}).items():
            found[token] += bias
        if params.repetition_penalty:
            for token in {*prompt, *new}:
                value = found[token]
                found[token] = (
                    value / params.repetition_penalty
                    if value > 0
                    else value * params.repetition_penalty
                )
        if len(new) < params.least_tokens:
            found[EOS] = 10 * FLOOR
        for token, count in Counter(new).items():
            found[token] -= params.presence_penalty or 0.0
            found[token] -= (params.frequency_penalty or 0.0) * count
        return found

    def temperature(self, params: GenerationParams) -> float:
        """0: greedy."""
        if params.do_sample is False:
            return 0.0
        return 1.0 if params.temperature is None else params.temperature

    def choose(self, params: GenerationParams, logits: list[float], source: random.Random) -> int:
        likeliest = max(range(len(logits)), key=logits.__getitem__)
        temperature = self.temperature(params)
        if temperature == 0:
            return likeliest
        best = logits[likeliest]
        weights = {
            token: math.exp((value - best) / temperature)
            for token, value in enumerate(logits)
            if value > FLOOR / 2
        } or {likeliest: 1.0}
        order = sorted(weights, key=lambda token: (-weights[token], token))
        if params.top_k:
            order = order[: params.top_k]
        total = sum(weights[token] for token in order)
        if params.top_p is not None:
            kept, mass = [], 0.0
            for token in order:
                kept.append(token)
                mass += weights[token] / total
                if mass >= params.top_p:
                    break
            order = kept
        if params.min_p:
            order = [t for t in order if weights[t] >= params.min_p * weights[order[0]]]
        return source.choices(order, [weights[token] for token in order])[0]

    def logprobs(self, params: GenerationParams, logits: Sequence[float], token: int):
        best = max(logits)
        norm = best + math.log(sum(math.exp(value - best) for value in logits))
        order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))[: params.logprobs]
        return TokenLogprob(
            token_id=token,
            token=_shown(token),
            logprob=logits[token] - norm,
            top=[(t, _shown(t), logits[t] - norm) for t in order],
            bytes=[] if token == EOS else [token],
        )

    def prompt_logprobs(
        self, model: ToyModel, params: GenerationParams, prompt: list[int], cached: int
    ) -> list[PromptLogprob]:
        first = PromptLogprob(token_id=prompt[0], token=_shown(prompt[0]), logprob=None)
        told = params.model_copy(update={"logprobs": params.prompt_logprobs})
        return [first] + [
            self.logprobs(told, self.logits(model, tuple(prompt[max(0, i - 3) : i])), prompt[i])
            for i in range(1, len(prompt))
        ]

    @asynccontextmanager
    async def slot(self, model: ToyModel, request: InferenceRequest) -> AsyncIterator[None]:
        if model.slots.locked() and model.waiting >= model.options.max_queue:
            raise QueueFullError(f"{model.waiting} requests wait already (max_queue)")
        model.waiting += 1
        try:
            await model.slots.acquire()
        finally:
            model.waiting -= 1
        model.running += 1
        try:
            yield
        finally:
            model.running -= 1
            model.slots.release()

    async def prefill(self, model: ToyModel, prompt: list[int], request: InferenceRequest) -> None:
        for _ in range(0, len(prompt), 32):
            await asyncio.sleep(0)

    def scope(self, request: InferenceRequest) -> str:
        return request.cache_scope

    def known(self, model: ToyModel, prompt: list[int], request: InferenceRequest) -> int:
        """How many of the prompt's tokens an earlier one of its cache scope had."""
        kept = model.notes.setdefault("kept", deque(maxlen=32))
        scope, needed = self.scope(request), prompt[:-1]
        lengths = [common_prefix(needed, other) for owner, other in kept if owner == scope]
        kept.append((scope, prompt))
        return max(lengths, default=0)

    async def decode(self, model: ToyModel, request: InferenceRequest) -> None:
        await asyncio.sleep(0)
        if model.unloaded:
            raise ResourceNotAvailableError("the model was unloaded; send the request again")

    def limit(self, params: GenerationParams) -> float:
        return math.inf if params.max_new_tokens is None else params.max_new_tokens

    async def generate_tokens(
        self, loaded_model: LoadedModel, request: InferenceRequest
    ) -> AsyncGenerator[TokenStep, None]:
        model: ToyModel = loaded_model.model_object
        params = request.params
        prompt = self.tokens(loaded_model, request)
        self.check(model, request, prompt)
        source = self.random(request)
        async with self.slot(model, request):
            await self.prefill(model, prompt, request)
            new: list[int] = []
            cached = self.known(model, prompt, request)
            step = TokenStep(prompt_tokens=len(prompt), cached_prompt_tokens=cached)
            if params.prompt_logprobs is not None:
                step.prompt_logprobs = self.prompt_logprobs(model, params, prompt, cached)
            yield step
            while True:
                await self.decode(model, request)
                logits = self.logits(model, tuple([*prompt[-3:], *new][-3:]))
                token = self.choose(params, self.adjusted(params, logits, prompt, new), source)
                if token == EOS:
                    yield TokenStep(finish="eos_token")
                    return
                new.append(token)
                full = len(prompt) + len(new) >= model.options.n_ctx
                ends = full or len(new) >= self.limit(params)
                step = TokenStep((token,), bytes([token]), finish="length" if ends else None)
                if params.logprobs is not None:
                    step.logprobs = [self.logprobs(params, logits, token)]
                yield step
                if ends:
                    return


def _shown(token: int) -> str:
    return "" if token == EOS else bytes([token]).decode("utf-8", "replace")
