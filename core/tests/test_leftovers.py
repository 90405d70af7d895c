"""What a request leaves behind, however it ends: nothing that the garbage collector would have to
free, and nothing that is kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref

import pytest
from core_doubles import drained, through_mailboxes

from engineroom import (
    ConfigurationError,
    EngineRoomError,
    InferenceError,
    InferenceRequest,
    LLMInferenceService,
    LLMModelManager,
    ModelConfig,
    QueueFullError,
    ResourceNotAvailableError,
    TokenStep,
    hookimpl,
)
from engineroom.testing import EchoHandler, uncollected

BODY = "x" * 4096


@pytest.fixture(autouse=True)
def _silent():
    """pytest keeps log records, and so all that they are about."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Moody(EchoHandler):
    """Ends a request as the first word of its prompt says."""

    async def load_model(self, config):
        if config.model_id == "broken":
            weights = BODY + "!"
            raise ResourceNotAvailableError(f"no room for {len(weights)}") from MemoryError(weights)
        return await super().load_model(config)

    async def generate_tokens(self, loaded_model, request):
        word = request.prompt.split(" ")[0]
        prompt = request.prompt + "!"
        self.begun = asyncio.Event() if not hasattr(self, "begun") else self.begun
        self.begun.set()
        if word == "refused":
            raise ConfigurationError("the prompt is too long")
        if word == "full":
            problem = QueueFullError("8 requests wait")
            raise problem
        if word == "foreign":
            try:
                prompt.encode("ascii").index(b"?")
            except ValueError as error:
                raise KeyError("odd") from error
        if word == "thread":
            await asyncio.to_thread(_fail, prompt)
        if word == "hangs":
            await asyncio.sleep(1000)
        if word == "swallows":
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError as error:
                raise RuntimeError("swallowed") from error
        yield TokenStep((1,), "a", prompt_tokens=1)
        await asyncio.sleep(0)
        if word == "breaks":
            raise RuntimeError(prompt)
        if word == "sticks":
            await asyncio.sleep(1000)
        yield TokenStep((2,), "b")

    async def embed(self, loaded_model, texts):
        words = [text + "!" for text in texts]
        if words[0].startswith("foreign"):
            raise RuntimeError(words[0])
        if words[0].startswith("hangs"):
            await asyncio.sleep(1000)
        return await super().embed(loaded_model, texts)


def _fail(text):
    problem = ConfigurationError("refused in a thread")
    raise problem


class Watcher:
    """Looks on, and fails at it; keeps responses, as an audit might."""

    def __init__(self) -> None:
        self.responses = []

    @hookimpl
    def engineroom_request_finished(self, request, response):
        self.responses.append(response)
        raise RuntimeError(f"{request.request_id} is not to my liking")


class Case:
    def __init__(self, **service) -> None:
        self.watcher = Watcher()
        self.handler = Moody()
        models = [ModelConfig(model_id=name, source="echo:") for name in ("m", "broken")]
        self.manager = LLMModelManager(config=models)
        self.service = LLMInferenceService(self.manager, handlers=[self.handler], **service)
        self.service.registry.register_plugin(self.watcher)
        self.alive: list[weakref.ref[InferenceRequest]] = []

    def request(self, prompt: str, **fields) -> InferenceRequest:
        request = InferenceRequest(
            **{"model_id": "m", "prompt": f"{prompt} {BODY}", **fields},
        )
        self.alive.append(weakref.ref(request))
        return request


async def infer(case: Case, request: InferenceRequest) -> None:
    response = await case.service.infer(request)
    with contextlib.suppress(EngineRoomError):
        response.raise_for_error()


async def stream(case: Case, request: InferenceRequest) -> None:
    await drained(case.service.stream(request))


async def pump(case: Case, request: InferenceRequest) -> None:
    opened = case.service.stream(request)
    chunks: list[str] = []
    await opened.pump(chunks.append)
    await opened.aclose()


async def cancelled(case: Case, request: InferenceRequest) -> None:
    for work in (case.service.infer(request), drained(case.service.stream(request))):
        case.handler.begun = asyncio.Event()
        task = asyncio.create_task(work)
        await case.handler.begun.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task


async def closed(case: Case, request: InferenceRequest) -> None:
    opened = case.service.stream(request)
    assert await anext(opened) == "a"
    await opened.aclose()


async def unread(case: Case, request: InferenceRequest) -> None:
    await case.service.stream(request).aclose()


WAYS = {"whole": infer, "streamed": stream, "pumped": pump}
ENDS = ["refused", "full", "foreign", "thread", "breaks", "good"]


async def leaves_nothing(case: Case, work, times: int = 3) -> None:
    await work()  # what is made once is made
    with uncollected() as left:
        case.alive.clear()
        for _ in range(times):
            await work()
        await asyncio.sleep(0)
        assert case.service.num_requests == 0
        assert not left()
        assert not [alive for alive in case.alive if alive() is not None]
    assert not [r for r in case.watcher.responses if r._cause and r._cause.__traceback__]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ENDS)
async def test_a_request_leaves_nothing_whether_it_ends_well_or_not(end, way, monkeypatch):
    case = Case()
    await leaves_nothing(case, lambda: WAYS[way](case, case.request(end)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ENDS)
async def test_nor_where_its_steps_come_through_a_mailbox(end, way, monkeypatch):
    monkeypatch.setattr(Moody, "generate_tokens", through_mailboxes(Moody))
    case = Case()
    await leaves_nothing(case, lambda: WAYS[way](case, case.request(end)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "fields",
    [
        {"model_id": "nobody"},
        {"model_id": "broken"},
        {"params": {"top_k": 3}},
        {"adapter": "none"},
        {"timeout_s": 1e-9},
        {"prompt": "hangs", "timeout_s": 0.01},
        {"prompt": "swallows", "timeout_s": 0.01},
        {"prompt": "sticks", "timeout_s": 0.01},
    ],
    ids=str,
)
async def test_nor_one_that_is_refused_by_the_service_or_comes_too_late(fields, way):
    case = Case()
    prompt = fields.get("prompt", "good")
    fields = {name: value for name, value in fields.items() if name != "prompt"}
    await leaves_nothing(case, lambda: WAYS[way](case, case.request(prompt, **fields)))


@pytest.mark.parametrize("way", WAYS)
async def test_nor_one_that_a_full_service_does_not_let_in(way):
    case = Case(max_requests=1)
    running = asyncio.create_task(infer(case, case.request("hangs")))
    await asyncio.sleep(0.01)
    with uncollected() as left:
        case.alive.clear()
        for _ in range(3):
            await WAYS[way](case, case.request("good"))
        assert not left()
        assert not [alive for alive in case.alive if alive() is not None]
    running.cancel()
    await asyncio.wait([running])
    await case.service.close()
    await leaves_nothing(case, lambda: WAYS[way](case, case.request("good")))


@pytest.mark.parametrize("prompt", ["hangs", "sticks"])
async def test_nor_one_whose_caller_is_cancelled(prompt):
    case = Case()
    await leaves_nothing(case, lambda: cancelled(case, case.request(prompt)))


@pytest.mark.parametrize("leave", [closed, unread])
async def test_nor_a_stream_that_nobody_reads_on(leave):
    case = Case()
    await leaves_nothing(case, lambda: leave(case, case.request("sticks")))


@pytest.mark.parametrize(
    ("texts", "fields"),
    [
        ([BODY], {}),
        ([BODY, ""], {}),
        ([BODY, "a\ud800"], {}),
        ([BODY], {"timeout_s": -1}),
        ([BODY], {"model_id": "nobody"}),
        ([BODY], {"model_id": "broken"}),
        (["foreign" + BODY], {}),
        (["hangs" + BODY], {"timeout_s": 0.01}),
    ],
)
async def test_nor_texts_for_embeddings(texts, fields):
    case = Case()

    async def embed() -> None:
        with contextlib.suppress(EngineRoomError):
            await case.service.embed(**{"model_id": "m", "texts": list(texts), **fields})

    await leaves_nothing(case, embed)


def test_nor_a_request_that_is_none():
    with uncollected() as left:
        for _ in range(3):
            with pytest.raises(ValueError, match="prompt"):
                InferenceRequest(model_id="m", prompt=BODY + "\ud800")
        assert not left()


def test_nor_a_blocking_call_that_is_refused():
    case = Case()
    with uncollected() as left:
        for prompt in ("refused", "good"):
            case.service.run(case.request(prompt))
            list(case.service.stream_sync(case.request(prompt)))
        assert not left()
    case.service.close_sync()


async def test_a_model_that_failed_to_load_keeps_nothing_of_the_load_or_of_who_asked():
    case = Case()

    async def load() -> None:
        asked = case.request("good")
        with pytest.raises(ResourceNotAvailableError, match="no room"):
            await case.manager.load("broken")
        assert asked

    await leaves_nothing(case, load)
    await leaves_nothing(case, lambda: infer(case, case.request("good", model_id="broken")))
    entry = case.manager._table.find("broken")
    assert entry.error is not None and entry.error.__traceback__ is None
    assert isinstance(entry.error.__cause__, MemoryError)


async def test_the_collector_would_have_freed_what_the_test_is_blind_to():
    """The test itself: it sees a cycle."""

    def ring() -> None:
        kept = InferenceError(BODY)
        try:
            raise kept
        except InferenceError:
            pass

    with uncollected() as left:
        ring()
        told = left()
        assert told["InferenceError"] == 1 and any("ring" in kind for kind in told)
        assert told["characters of texts"] == len(BODY)
        assert not left()
