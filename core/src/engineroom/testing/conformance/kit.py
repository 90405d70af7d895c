"""What the checks work with: one handler, one loaded model, a service over it, and a clock.

A :class:`Kit` belongs to one class of checks. Its coroutines run on the kit's own event loop;
each thing that a handler is asked for has a time limit, so that one that hangs is named.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from engineroom.config.model import ModelConfig
from engineroom.errors import ConfigurationError
from engineroom.handlers.base import Capabilities, InferenceHandler
from engineroom.handlers.token_handler import effective_capabilities
from engineroom.schemas import GenerationParams, InferenceRequest, InferenceResponse
from engineroom.testing.conformance.bench import Bench, Streamed, again, quietly, said
from engineroom.testing.conformance.clock import Clock
from engineroom.testing.conformance.loop import LoopThread, where
from engineroom.testing.conformance.outcomes import HungError, skip

__all__ = ["PROMPTS", "Kit", "Settings"]

_T = TypeVar("_T")

PROMPTS: Final = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the",
    "a b c d e f g h a b c d e f g h a b c d e f g h a b c d",
    "Dear reader, this is the story of the old lighthouse at the end of the world:\n",
)
"""Besides the suite's own ``prompt``."""

_MOST_STEPS: Final = 20
"""A stream that goes on may take so many times the limit for one chunk."""
_QUICK_TURNS: Final = 32
_LONGEST_PAUSE_S: Final = 0.02
_LONGEST_GOODBYE_S: Final = 5.0
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


class Kit:
    """Everything that the checks of one class share.

    :param handler: the handler under test.
    :param config: the model to test it with.
    :param embedding_config: one that makes embeddings; ``None``: the same.
    """

    def __init__(
        self,
        handler: InferenceHandler,
        config: ModelConfig,
        settings: Settings,
        embedding_config: ModelConfig | None = None,
    ) -> None:
        self.handler = handler
        self.config = config
        self.settings = settings
        self.embedding_config = embedding_config
        self.loop = LoopThread(settings.timeout_s)
        self.opened: list[Callable[[], Awaitable[Any]]] = []
        self.prompts = (settings.prompt, *PROMPTS)
        self._tasks: list[asyncio.Task[Any]] = []
        self._bench: Bench | None = None
        self._capabilities: Capabilities | None = None
        self._known: dict[Any, Any] = {}

    # ── the model ────────────────────────────────────────────────────────────────────────────

    @property
    def bench(self) -> Bench:
        """The service and the model that the checks share."""
        if self._bench is None:
            self._bench = Bench(self, self.config)
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
        bench = Bench(self, config)
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
        given = dict(params or {})
        if self.honours("max_new_tokens"):
            given.setdefault("max_new_tokens", n)
        if prompt is None and not {"messages", "prompt_token_ids"} & fields.keys():
            prompt = self.settings.prompt
        return InferenceRequest(
            model_id=fields.pop("model_id", self.config.model_id),
            prompt=prompt,
            params=GenerationParams(**given),
            **fields,
        )

    def greedy(self) -> dict[str, Any]:
        """Parameters for the likeliest text, as far as the handler has any for that."""
        wanted = {"do_sample": False, "temperature": 0.0}
        found = {name: value for name, value in wanted.items() if self.honours(name)}
        return found or ({"top_k": 1} if self.honours("top_k") else {})

    async def plain(self, prompt: str | None = None, n: int = 24) -> InferenceResponse:
        """The greedy answer; asked for once, then remembered."""
        key = ("plain", prompt, n)
        if key not in self._known:
            await self.need_determinism()
            self._known[key] = await self.bench.answer(
                self.request(prompt, n, params=self.greedy())
            )
        found: InferenceResponse = self._known[key]
        return found

    async def need_determinism(self) -> None:
        """Skip the check where the handler has no way to ask for the same text twice."""
        if self.greedy():
            return
        if "determined" not in self._known:
            answers = [await self.bench.answer(self.request()) for _ in range(3)]
            self._known["determined"] = len({a.generated_text for a in answers}) == 1
        if not self._known["determined"]:
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
        context = bench.loaded.max_context_tokens or 4096
        n = min(_LENGTHY, max(context * 2 // 3, 16))
        key = ("lengthy", bench.config.model_id)
        if key not in self._known:
            longest: tuple[int, InferenceRequest] | None = None
            for prompt in (*self.prompts, "one two three four " * 60):
                request = self.request(
                    prompt, n, params=self.greedy(), model_id=bench.config.model_id
                )
                response = await bench.infer(request)
                count = response.generated_tokens or 0
                if response.error_message is None and (longest is None or count > longest[0]):
                    longest = (count, request)
                if count >= n * 3 // 4:
                    break
            self._known[key] = longest
        found = self._known[key]
        if found is None or found[0] < min(least, n // 2):
            skip("no prompt gave a long text: the model ends too soon for this check")
        request_: InferenceRequest = found[1]
        return again(request_)

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
        each = max((more.prompt_tokens - few.prompt_tokens) / 4, 0.25)
        return word * max(1, min(most, int((context * share - 8) / each)))

    def alike(self, expected: str | None, found: str | None) -> bool:
        """Whether a text beside other requests is the one that the request has alone.

        Where the batch changes the last digits of the logits, greedy texts part sooner or later:
        then their beginning must be the same, and none may be cut short.
        """
        if expected == found or self.settings.batch_invariant:
            return expected == found
        expected, found = expected or "", found or ""
        begins = found.startswith(expected[:_SURE_CHARS])
        return begins and len(found) * 4 >= len(expected)

    async def has_choice(self) -> bool:
        """Whether the model wavers between tokens at all, so that sampling can show."""
        if "choice" not in self._known:
            self._known["choice"] = await self._look_for_choice()
        found: bool = self._known["choice"]
        return found

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
        if "seed" not in self._known:
            self._known["seed"] = False
            if self.honours("seed"):
                texts = [await self.sampled(11) for _ in range(2)]
                self._known["seed"] = texts[0] == texts[1]
        found: bool = self._known["seed"]
        return found

    async def sampled(self, seed: int, prompt: str | None = None, **params: Any) -> str:
        """A seeded text at temperature 1."""
        given: dict[str, Any] = {"seed": seed, **params}
        if self.honours("temperature"):
            given.setdefault("temperature", 1.0)
        response = await self.bench.answer(self.request(prompt, params=given))
        return response.generated_text or ""

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    async def within(self, work: Awaitable[_T], did: str) -> _T:
        """Wait for something that a handler does, at most ``timeout_s`` seconds.

        :raises HungError: it did not end; it was cancelled, and left behind if that did nothing.
        """
        task = asyncio.ensure_future(work)
        await self._bounded(task, did, lambda: 0)
        return task.result()

    async def progressing(
        self, work: Awaitable[None], request: InferenceRequest, streamed: Streamed
    ) -> None:
        """Read a stream; the limit is for each chunk, and there is one for their number."""
        did = f"stream({said(request)})"
        task = asyncio.ensure_future(work)
        await self._bounded(task, did, lambda: len(streamed.chunks))
        task.result()

    async def _bounded(
        self, task: asyncio.Future[Any], did: str, progress: Callable[[], int]
    ) -> None:
        if await self.ended(task, progress=progress):
            return
        place = where(task) if isinstance(task, asyncio.Task) else "in a future"
        task.cancel()
        stopped = await self.ended(task, limit_s=self._goodbye_s)
        raise HungError(
            did=did,
            expected=f"its end, or its next chunk, within {self.settings.timeout_s:g} s",
            saw=f"it waited {place}"
            + ("" if stopped else "; it did not end when it was cancelled, either"),
        )

    async def ended(
        self,
        *work: asyncio.Future[Any],
        limit_s: float | None = None,
        progress: Callable[[], int] = lambda: 0,
    ) -> bool:
        """Wait for tasks; ``False``: they go on, and that for too long without any progress.

        :param limit_s: seconds that count; ``None``: ``timeout_s``.
        :param progress: a number that grows while something comes of the work; the limit is then
            for each step, and there is another for all of them.
        """
        limit = self.settings.timeout_s if limit_s is None else limit_s
        pause = min(limit / 4, 0.5)
        clock = Clock(pause)
        patience, most, count = limit, _MOST_STEPS * limit, progress()
        while patience > 0 and most > 0:
            _, going = await asyncio.wait(work, timeout=pause)
            if not going:
                return True
            passed = clock.passed()
            if (now := progress()) != count:
                count, patience = now, limit
            patience -= passed
            most -= passed
        return False

    async def until(self, condition: Callable[[], bool]) -> bool:
        """Let the loop turn until something is so; ``False``: it did not come to be."""
        clock = Clock(_LONGEST_PAUSE_S)
        waited, turns, pause = 0.0, 0, 0.0
        while not condition():
            if waited > self.settings.timeout_s:
                return False
            await asyncio.sleep(pause)
            waited += clock.passed()
            turns += 1
            # Turns first: what runs on the loop alone would be over after a pause.
            if turns > _QUICK_TURNS:
                pause = min(_LONGEST_PAUSE_S, pause * 2 + 0.0005)
        return True

    async def turns(self, count: int = 12) -> None:
        """Let the loop turn, so that what was begun gets somewhere."""
        for _ in range(count):
            await asyncio.sleep(0)

    def spawn(self, work: Awaitable[_T]) -> asyncio.Task[_T]:
        """A task that is cancelled with the check."""
        task: asyncio.Task[_T] = asyncio.ensure_future(work)
        self._tasks.append(task)
        return task

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Tasks of the loop that are not the kit's own."""
        return asyncio.all_tasks() - set(self._tasks) - {asyncio.current_task()}

    async def clean_up(self) -> None:
        """End what the check has left open."""
        tasks, self._tasks = [t for t in self._tasks if not t.done()], []
        for task in tasks:
            task.cancel()
        if tasks:
            await self.ended(*tasks, limit_s=self._goodbye_s)
        closers, self.opened = self.opened, []
        for closer in closers:
            closing = asyncio.ensure_future(quietly(closer()))
            if not await self.ended(closing, limit_s=self._goodbye_s):
                closing.cancel()

    @property
    def _goodbye_s(self) -> float:
        """Seconds for what was cancelled; what has not ended then is left behind."""
        return min(self.settings.timeout_s, _LONGEST_GOODBYE_S)

    async def close(self) -> None:
        """Unload the model."""
        await self.clean_up()
        if self._bench is not None:
            await self.within(self._bench.service.close(drain_timeout_s=1.0), "unload_model")
