"""What the checks work with: one handler, one loaded model, a service over it, and patience.

A :class:`Kit` belongs to one class of checks. Its coroutines run on the kit's own event loop;
each thing that a handler is asked for has a time limit, so that one that hangs is named.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from engineroom.config.model import ModelConfig
from engineroom.errors import ConfigurationError
from engineroom.handlers.base import Capabilities, InferenceHandler
from engineroom.handlers.token_handler import effective_capabilities
from engineroom.schemas import GenerationParams, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.bench import Bench, again, said
from engineroom.testing.conformance.loop import LoopThread
from engineroom.testing.conformance.outcomes import BrokenRuleError, broken, skip, told
from engineroom.testing.conformance.patience import Patience
from engineroom.testing.conformance.ties import MOST_BOUND, TOP, bound_of, differences, parting

__all__ = ["PROMPTS", "Kit", "Settings"]

_T = TypeVar("_T")

PROMPTS: Final = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the",
    "a b c d e f g h a b c d e f g h a b c d e f g h a b c d",
    "Dear reader, this is the story of the old lighthouse at the end of the world:\n",
)
"""Besides the suite's own ``prompt``."""

_LENGTHY: Final = 128
"""Tokens of a long request: enough to do something meanwhile, on a slow model as well."""
_SURE_CHARS: Final = 4
"""So long a beginning two texts of different requests do not share by chance."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a suite's class attributes say; see :class:`HandlerConformance`."""

    prompt: str
    timeout_s: float
    max_stall_s: float
    load_cycles: int
    batch_invariant: bool
    exclusive: bool
    queue_options: Mapping[str, Any] | None
    runtime_modules: tuple[str, ...]


class Kit(Patience):
    """Everything that the checks of one class share.

    :param handler: the handler under test.
    :param config: the model to test it with.
    :param embedding_config: one that makes embeddings; ``None``: the same.
    :param ranking_config: one that ranks documents; ``None``: the same.
    """

    def __init__(
        self,
        handler: InferenceHandler,
        config: ModelConfig,
        settings: Settings,
        embedding_config: ModelConfig | None = None,
        ranking_config: ModelConfig | None = None,
    ) -> None:
        super().__init__(settings.timeout_s)
        self.handler = handler
        self.config = config
        self.settings = settings
        self.embedding_config = embedding_config
        self.ranking_config = ranking_config
        self.loop = LoopThread(settings.timeout_s)
        self.prompts = (settings.prompt, *PROMPTS)
        self._bench: Bench | None = None
        self._capabilities: Capabilities | None = None
        self._known: dict[object, Any] = {}

    # ── the model ────────────────────────────────────────────────────────────────────────────

    @property
    def bench(self) -> Bench:
        """The service and the model that the checks share."""
        if self._bench is None:
            self._bench = Bench(self.handler, self.config, self)
        return self._bench

    @property
    def capabilities(self) -> Capabilities:
        """What the handler says that it can do."""
        if self._capabilities is None:
            self._capabilities = effective_capabilities(self.handler)
        return self._capabilities

    def honours(self, name: str) -> bool:
        """Whether the handler claims a field of ``GenerationParams``."""
        return name in self.capabilities.params

    def need(self, *names: str) -> None:
        """Skip the check unless the handler claims these fields."""
        for name in names:
            if not self.honours(name):
                skip(f"capabilities() does not claim {name}; the service refuses it by name")

    @asynccontextmanager
    async def own_model(self, options: Mapping[str, Any] | None = None) -> AsyncIterator[Bench]:
        """A model of the check's own, unloaded at its end."""
        merged = {**self.config.options, **(options or {})}
        config = self.config.model_copy(
            update={"model_id": f"{self.config.model_id}-own", "options": merged, "aliases": []}
        )
        async with self.other_model(config) as bench:
            yield bench

    @asynccontextmanager
    async def other_model(self, config: ModelConfig) -> AsyncIterator[Bench]:
        """A model as ``config`` says, unloaded at the end."""
        if self.settings.exclusive:
            await self.within(self.bench.manager.unload(self.config.model_id), "unload_model")
        bench = Bench(self.handler, config, self)
        try:
            yield bench
        finally:
            await self.clean_up()
            await self.within(bench.manager.close(), "unload_model")
            if self.settings.exclusive:
                await self.bench.load()

    @asynccontextmanager
    async def narrow_model(self) -> AsyncIterator[Bench]:
        """A model that runs one request and lets one wait, as ``queue_options`` say."""
        options = self.settings.queue_options
        if options is None:
            skip("the suite sets queue_options = None: the runtime has no queue to bound")
        async with self.own_model(options) as bench:
            try:
                await bench.load()
            except ConfigurationError as error:
                skip(
                    f"queue_options {dict(options)} are refused ({error.message}); set "
                    "queue_options to the runtime's own options for one running and one waiting "
                    "request"
                )
            yield bench

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def request(
        self,
        prompt: str | None = None,
        n: int | None = 16,
        *,
        params: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> InferenceRequest:
        """A request for ``n`` tokens with exactly these parameters."""
        parameters = dict(params or {})
        if self.honours("max_new_tokens"):
            parameters.setdefault("max_new_tokens", n)
        if prompt is None and not {"messages", "prompt_token_ids"} & fields.keys():
            prompt = self.settings.prompt
        return InferenceRequest(
            model_id=fields.pop("model_id", self.config.model_id),
            prompt=prompt,
            params=GenerationParams(**parameters),
            **fields,
        )

    def greedy(self) -> dict[str, Any]:
        """Parameters for the likeliest text, as far as the handler has any for that."""
        both = {"do_sample": False, "temperature": 0.0}
        claimed = {name: value for name, value in both.items() if self.honours(name)}
        return claimed or ({"top_k": 1} if self.honours("top_k") else {})

    def likely(
        self, prompt: str | None = None, n: int | None = 16, **fields: Any
    ) -> InferenceRequest:
        """A request for the likeliest text."""
        return self.request(
            prompt, n, params={**self.greedy(), **fields.pop("params", {})}, **fields
        )

    async def text(self, request: InferenceRequest) -> str:
        """The text of the answer to a request like this one."""
        return (await self.bench.answer(again(request))).generated_text or ""

    async def both(self, request: InferenceRequest) -> list[tuple[str, InferenceResponse]]:
        """What ``infer`` and, if it is told, the end of a stream say; neither may fail."""
        streamed = (await self.bench.stream(again(request))).response
        ends = [("infer", await self.bench.answer(again(request))), ("stream", streamed)]
        return [(f"{way}({said(request)})", end) for way, end in ends if end is not None]

    async def once(self, key: object, ask: Callable[[], Awaitable[_T]]) -> _T:
        """What ``ask`` gives; asked the first time, then remembered under ``key``."""
        if key not in self._known:
            self._known[key] = await ask()
        value: _T = self._known[key]
        return value

    async def plain(self, prompt: str | None = None, n: int = 24) -> InferenceResponse:
        """The greedy answer; asked for once, then remembered."""

        async def ask() -> InferenceResponse:
            await self.need_determinism()
            return await self.bench.answer(self.request(prompt, n, params=self.greedy()))

        return await self.once(("plain", prompt, n), ask)

    async def need_determinism(self) -> None:
        """Skip the check where the handler has no way to ask for the same text twice."""

        async def is_determined() -> bool:
            answers = [await self.bench.answer(self.request()) for _ in range(3)]
            return len({a.generated_text for a in answers}) == 1

        if not self.greedy() and not await self.once("determined", is_determined):
            skip("the handler claims none of temperature, do_sample and top_k, and its text varies")

    async def sample_prompt(
        self, least: int = 12, n: int = 24, fits: Callable[[str], bool] = bool
    ) -> tuple[str, str]:
        """A prompt whose greedy text has at least so many characters, and that text.

        :param fits: what else the text must be.
        """
        for prompt in self.prompts:
            text = (await self.plain(prompt, n)).generated_text or ""
            if len(text) >= least and len(set(text)) > 2 and fits(text):
                return prompt, text
        return skip(f"no prompt gave a text of {least} characters to look into")

    async def lengthy(self, bench: Bench | None = None, least: int = 48) -> InferenceRequest:
        """A greedy request that goes on for long."""
        bench = bench or self.bench
        n = min(_LENGTHY, max((bench.loaded.max_context_tokens or 4096) * 2 // 3, 16))

        async def longest() -> tuple[int, InferenceRequest] | None:
            best: tuple[int, InferenceRequest] | None = None
            for prompt in (*self.prompts, "one two three four " * 60):
                request = self.request(
                    prompt, n, params=self.greedy(), model_id=bench.config.model_id
                )
                response = await bench.infer(request)
                count = response.generated_tokens or 0
                if response.error_message is None and (best is None or count > best[0]):
                    best = (count, request)
                if count >= n * 3 // 4:
                    break
            return best

        best = await self.once(("lengthy", bench.config.model_id), longest)
        if best is None or best[0] < min(least, n // 2):
            skip("no prompt gave a long text: the model ends too soon for this check")
        return again(best[1])

    async def long_prompt(self, share: float = 0.75, most: int = 1500) -> str:
        """A prompt that fills this share of the context, or has ``most`` words."""
        context = self.bench.loaded.max_context_tokens
        word = "river "
        if context is None:
            return word * most
        # A word may be one token, or one for each of its bytes.
        few = await self.bench.answer(self.request(word * 4, 1, params=self.greedy()))
        more = await self.bench.answer(self.request(word * 8, 1, params=self.greedy()))
        if few.prompt_tokens is None or more.prompt_tokens is None:
            return word * max(1, min(most, int(context * share // 8)))
        tokens_a_word = max((more.prompt_tokens - few.prompt_tokens) / 4, 0.25)
        return word * max(1, min(most, int((context * share - 8) / tokens_a_word)))

    def watched(self, request: InferenceRequest) -> InferenceRequest:
        """The request, with what tells a near tie from another text, where that is needed."""
        if self.settings.batch_invariant or not self.honours("logprobs"):
            return request
        if not request.params.greedy:
            return request
        return again(request, params=request.params.model_copy(update={"logprobs": TOP}))

    async def difference(
        self, request: InferenceRequest, alone: InferenceResponse, beside: InferenceResponse
    ) -> str | None:
        """What is wrong with an answer beside other requests; ``None``: it is the one alone.

        Where the batch changes the last digits of the logits, greedy texts part sooner or later:
        it must be at two tokens that are nearly as likely. Without log probabilities, texts must
        have the same beginning, and none may be cut short.
        """
        expected, actual = alone.generated_text or "", beside.generated_text or ""
        if expected == actual:
            return None
        if self.settings.batch_invariant:
            return repr(actual)
        if alone.logprobs and beside.logprobs and request.params.greedy:
            reason = parting(request.params, alone, beside, await self.near())
            return reason and f"{actual!r}: {reason}"
        begins = actual.startswith(expected[:_SURE_CHARS])
        return None if begins and len(actual) * 4 >= len(expected) else repr(actual)

    async def near(self) -> float:
        """Nats between two tokens that are as likely, as company changes them here.

        :raises BrokenRuleError: company changes more than digits.
        """

        async def measure() -> float:
            requests = [
                self.watched(self.likely(f"{prompt} {n}")) for n in "12" for prompt in self.prompts
            ]
            alone = [await self.bench.answer(again(r)) for r in requests]
            beside = await asyncio.gather(*(self.bench.answer(again(r)) for r in requests))
            pairs = zip(alone, beside, strict=True)
            noise = [gap for one, other in pairs for gap in differences(one, other)]
            middle = statistics.median(noise) if noise else 0.0
            if middle > MOST_BOUND:
                broken(
                    did=f"{len(requests)} requests, one by one and at once",
                    expected="the same log probabilities for the same text, but for last digits",
                    saw=f"differences of {middle:.2f} nats in the middle",
                )
            return bound_of(noise)

        return await self.once("near", measure)

    async def unchanged(
        self,
        did: str,
        what: str,
        request: InferenceRequest,
        beside: Callable[[InferenceRequest], Awaitable[InferenceResponse]],
    ) -> None:
        """Whatever else happens, a text must be the one that its request has alone.

        :param beside: the answer to that request while, or after, something else happens.
        :raises BrokenRuleError: it is another, where the batch changes digits four times.
        """
        request = self.watched(request)
        alone = await self.bench.answer(again(request))
        seen: list[str] = []
        for _ in range(1 if self.settings.batch_invariant else 4):
            wrong = await self.difference(request, alone, await beside(request))
            if wrong is None:
                return
            seen.append(wrong)
        broken(did=did, expected=f"{what}, {alone.generated_text!r}", saw=" / ".join(seen))

    async def outcome(
        self, work: Awaitable[_T], did: str, *right: type[Exception]
    ) -> _T | Exception:
        """What comes of foreign code: a result, or one of the errors that are ``right``.

        :raises BrokenRuleError: another error.
        """
        try:
            return await self.within(work, did)
        except BrokenRuleError:
            raise
        except right as error:
            return error
        except Exception as error:  # noqa: BLE001 - foreign code, told as the finding
            names = " or ".join(kind.__name__ for kind in right)
            broken(did=did, expected=f"a {names}", saw=told(error))

    async def has_choice(self) -> bool:
        """Whether the model wavers between tokens at all, so that sampling can show."""
        return await self.once("choice", self._look_for_choice)

    async def _look_for_choice(self) -> bool:
        if self.honours("logprobs"):
            params = {**self.greedy(), "logprobs": 2}
            response = await self.bench.infer(self.request(n=16, params=params))
            for entry in response.logprobs or ():
                if len(entry.top) > 1 and entry.top[1][2] > -3.0:
                    return True
        plain = (await self.plain(n=16)).generated_text
        tries = [{"temperature": 2.0}] * 4 if self.honours("temperature") else []
        for params in tries:
            response = await self.bench.infer(self.request(n=16, params=params))
            if response.error_message is None and response.generated_text != plain:
                return True
        return False

    async def can_seed(self) -> bool:
        """Whether a seed makes sampled text the same twice."""

        async def is_same() -> bool:
            return self.honours("seed") and await self.sampled(11) == await self.sampled(11)

        return await self.once("seed", is_same)

    async def sampled(self, seed: int, prompt: str | None = None, **params: Any) -> str:
        """A seeded text at temperature 1."""
        return await self.text(self.seeded(seed, prompt, **params))

    def seeded(self, seed: int, prompt: str | None = None, **params: Any) -> InferenceRequest:
        """A request for a seeded text at temperature 1."""
        params = {"seed": seed, **params}
        if self.honours("temperature"):
            params.setdefault("temperature", 1.0)
        return self.request(prompt, params=params)

    async def close(self) -> None:
        """Unload the model."""
        await self.clean_up()
        if self._bench is not None:
            await self.within(self._bench.service.close(drain_timeout_s=1.0), "unload_model")
