"""What the log has of requests without anybody's observer: how each ended, and never its texts."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from core_doubles import Bench, PlainHandler, echo_bench, gate_bench, plain_bench, until
from hypothesis import given, strategies as st

from engineroom import (
    ChatMessage,
    ConfigurationError,
    EngineDeadError,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    InferenceResponse,
    LoggingObserver,
    ModelConfig,
    QueueFullError,
    StructuredOutput,
)
from engineroom.inference.request_log import _quotes
from engineroom.testing import EchoHandler

CANARY = "the canary sings of a secret 7f3a"
NAME = CANARY.replace(" ", "-")
MESSAGES = [{"role": "user", "content": "a"}]


def tool(name):
    return {"type": "function", "function": {"name": name, "description": CANARY}}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="engineroom")
    return caplog


def of_requests(log: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in log.records if r.name == "engineroom.requests"]


def whole_log(log: pytest.LogCaptureFixture) -> str:
    """All that any formatter could write."""
    formatter = logging.Formatter()
    return "\n".join(f"{formatter.format(r)} {vars(r)}" for r in log.records)


async def answered(bench: Any, request: InferenceRequest, stream: bool) -> InferenceResponse:
    if not stream:
        response: InferenceResponse = await bench.service.infer(request)
        return response
    opened = bench.service.stream(request)
    async for _ in opened:
        pass
    assert opened.response is not None
    return opened.response


# ── a line at the end ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_one_line_at_its_end_and_one_at_its_beginning(stream, log):
    bench = echo_bench()
    request = bench.request(request_id="r-1", metadata={"api_key": "ann"}, stream=stream)
    await answered(bench, request, stream)
    (level, begun), (last, ended) = of_requests(log)
    assert (level, last) == ("DEBUG", "INFO")
    assert begun.startswith(
        f"request r-1 for echo started (stream={stream}): prompt of 13 characters"
    )
    assert ended.startswith(
        "request r-1 for echo finished: eos_token, 3 prompt and 3 generated tokens"
    )
    for part in ("handler echo", "key ann", "waited ", "first token after "):
        assert part in ended
    records = [r for r in log.records if r.name in ("engineroom.requests", "engineroom.service")]
    facts = {(r.request_id, r.model_id, r.key_name) for r in records}
    assert facts == {("r-1", "echo", "ann")}


async def test_an_observer_that_writes_them_as_well_writes_no_line_twice(log):
    bench = echo_bench()
    bench.service.registry.register_plugin(LoggingObserver(level=logging.WARNING))
    await bench.service.infer(bench.request(request_id="r-1"))
    ended = [level for level, line in of_requests(log) if "finished" in line]
    assert ended == ["WARNING"]


async def test_nothing_is_made_of_what_nobody_writes(monkeypatch):
    import engineroom.inference.request_log as request_log

    made = []
    monkeypatch.setattr(request_log, "request_logger", lambda *_: made.append(1))
    bench = echo_bench()
    logging.getLogger("engineroom").setLevel(logging.WARNING)
    try:
        await bench.service.infer(bench.request())
    finally:
        logging.getLogger("engineroom").setLevel(logging.NOTSET)
    assert not made


async def test_parameters_are_told_as_far_as_they_were_given(log):
    bench = echo_bench()
    params = GenerationParams(
        temperature=0.0, max_new_tokens=4, top_k=3, logit_bias={1: 2.0, 3: 4.0},
        structured_output=StructuredOutput(regex=CANARY),
    )  # fmt: skip
    await bench.service.infer(
        InferenceRequest(
            model_id="echo", messages=[ChatMessage(role="user", content=CANARY)], params=params,
            stop_sequences=[CANARY, "b"], tools=[tool(NAME)], priority=3,
            timeout_s=20, on_unsupported="warn", metadata={"note": CANARY},
        )
    )  # fmt: skip
    (_, begun), _ = of_requests(log)
    assert begun.partition(": ")[2] == (
        f"1 messages of {len(CANARY)} characters, max_new_tokens=4, temperature=0.0, top_k=3, "
        "logit_bias=2 entries, structured_output=regex, 2 stop_sequences, 1 tools, timeout_s=20.0, "
        "priority=3, on_unsupported=warn"
    )
    assert "canary" not in whole_log(log)


async def test_who_was_asked_and_who_was_chosen_is_told(log):
    from engineroom import LLMInferenceService, LLMModelManager

    class Never(EchoHandler):
        name = "never"

        def can_handle(self, loaded_model):
            return False

    manager = LLMModelManager(
        config={"models": [{"model_id": "m", "source": "echo:", "runtime": "echo"}]}
    )
    async with LLMInferenceService(manager, handlers=[Never(), EchoHandler()]) as service:
        for _ in range(2):  # the choice is remembered, and so is why
            await service.infer(InferenceRequest(model_id="m", prompt="x", request_id="r"))
    told = [r.getMessage() for r in log.records if "goes to handler" in r.getMessage()]
    why = "never: can_handle is False; echo: can_handle is True"
    assert told == [f"request r for m goes to handler echo: {why}"] * 2


# ── what failed, and whose mistake it was ────────────────────────────────────────────────────


class OwnHandler(PlainHandler):
    """A handler whose code is in this module."""


def own_bench(infer: Any) -> Bench:
    return Bench(OwnHandler(infer), ModelConfig(model_id="plain", source="plain:"))


def raising(error: BaseException):
    async def infer(request):
        raise error

    return infer


def in_a_library():
    """It is raised in code that is neither the handler's nor ours."""

    async def infer(request):
        json.loads("{")

    return infer


@pytest.mark.parametrize(
    ("infer", "level", "whose"),
    [
        (raising(ConfigurationError("the prompt is too long")), "WARNING", "the client's mistake"),
        (raising(QueueFullError("too many")), "WARNING", "the server's mistake"),
        (raising(EngineDeadError("it ended")), "ERROR", "the runtime's mistake"),
        (raising(ValueError("oops")), "WARNING", "the handler's mistake"),
        (in_a_library(), "WARNING", "the runtime's mistake"),
        (raising(InferenceError("no numbers")), "ERROR", "the runtime's mistake"),
    ],
)
async def test_what_failed_says_whose_mistake_it_was(infer, level, whose, log):
    bench = own_bench(infer)
    await bench.service.infer(bench.request(request_id="r-1"))
    _, (last, ended) = of_requests(log)
    assert last == level and f": {whose}, " in ended and "finished: error" in ended
    traced = [r for r in log.records if r.exc_info]
    foreign = isinstance(bench.recorder.finished[0][1]._cause.__cause__, Exception)
    assert bool(traced) == foreign, "the traceback is there where nobody foresaw it, and only there"
    assert [r.levelname for r in log.records if r.levelno >= logging.ERROR].count("ERROR") <= 1


async def test_an_answer_that_is_none_is_the_handlers_mistake(log):
    async def infer(request):
        return "text"

    bench = plain_bench(infer)
    await bench.service.infer(bench.request())
    assert ": the handler's mistake, InferenceError: " in of_requests(log)[-1][1]


async def test_a_model_that_is_none_and_a_field_that_is_not_honoured_are_the_clients(log):
    bench = plain_bench(raising(ValueError()))
    await bench.service.infer(bench.request(model_id="nothing"))
    await bench.service.infer(bench.request(params=GenerationParams(top_k=7)))
    ended = [entry for entry in of_requests(log) if "finished" in entry[1]]
    assert [level for level, _ in ended] == ["WARNING", "WARNING"]
    assert all("the client's mistake" in line for _, line in ended)
    assert not any(r.exc_info for r in log.records)


async def test_a_model_that_does_not_load_is_the_servers_or_its_handlers_mistake(log):
    bench = echo_bench(fail="load")
    await bench.service.infer(bench.request())
    level, ended = of_requests(log)[-1]
    assert level == "WARNING" and "the client's" not in ended and "the nobody" not in ended


async def test_who_is_turned_away_is_told_once(log):
    bench = echo_bench(service={"max_requests": 1}, token_delay_s=10)
    opened = bench.service.stream(bench.request())
    await anext(opened)
    await bench.service.infer(bench.request(request_id="r-2", metadata={"api_key": "ann"}))
    mine = [entry for entry in of_requests(log) if "r-2" in entry[1]]
    assert mine == [("WARNING", "request r-2 for echo was turned away: queue_full (key ann)")]
    await opened.aclose()
    assert of_requests(log)[-1][0] == "INFO" and "cancelled" in of_requests(log)[-1][1]


async def test_a_deadline_is_nobodys_mistake(log):
    bench = gate_bench()
    request = bench.request(timeout_s=1000)
    import asyncio

    waits = asyncio.create_task(bench.service.infer(request))
    await until(lambda: bench.handler.decoding(request))
    bench.expire(request)
    await waits
    level, ended = of_requests(log)[-1]
    assert level == "WARNING" and ": nobody made a mistake, RequestTimeoutError: " in ended


# ── never a text ─────────────────────────────────────────────────────────────────────────────

FIELDS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": f"before {CANARY} after"},
    "messages": {"messages": [{"role": "user", "content": f"{CANARY} {CANARY}", "name": "x"}]},
    "tool_calls": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"function": {"arguments": CANARY}}]},
        ]
    },
    "stop_sequences": {"prompt": "a", "stop_sequences": [CANARY]},
    "tools": {"messages": MESSAGES, "tools": [tool("a")]},
    "tool_choice": {
        "messages": MESSAGES,
        "tools": [tool(NAME)],
        "tool_choice": {"name": NAME},
    },
    "reasoning": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "b", "reasoning": CANARY}]
    },
    "template_args": {"messages": MESSAGES, "template_args": {"documents": [{CANARY: CANARY}]}},
    "cache_salt": {"prompt": "a", "cache_salt": CANARY},
    "metadata": {"prompt": "a", "metadata": {"note": CANARY}},
    "structured_output": {"prompt": "a", "params": {"structured_output": {"regex": CANARY}}},
}
ERRORS = [
    None,
    ConfigurationError,
    InferenceError,
    EngineDeadError,
    ValueError,
    OSError,
    SystemExit,
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("field", FIELDS)
async def test_no_text_of_a_request_is_in_the_log_whatever_becomes_of_it(field, error, log):
    """Not even where what is raised quotes it, with causes and notes."""

    def fail(request):
        if error is None:
            return
        quoted = str(request.model_dump(exclude_none=True))
        try:
            raise KeyError(f"{CANARY} was the cause")
        except KeyError as cause:
            mine = error(f"cannot do {CANARY}: {quoted}")
            mine.add_note(f"said was {CANARY}")
            raise mine from cause

    async def infer(request):
        fail(request)
        return InferenceResponse(request_id="", model_id="", generated_text=CANARY)

    async def stream(request):
        yield CANARY
        fail(request)

    from engineroom import Capabilities

    everything = Capabilities(
        params=frozenset(GenerationParams.model_fields), chat=True, tools=True
    )
    bench = plain_bench(infer, stream, everything)
    for streamed in (False, True):
        request = InferenceRequest(
            model_id="plain", **FIELDS[field], stream=streamed, on_unsupported="warn"
        )
        await answered(bench, request, streamed)
    await bench.service.close()
    assert len([line for _, line in of_requests(log) if "finished" in line]) == 2
    assert "canary" not in whole_log(log)


@pytest.mark.parametrize("error", ERRORS[1:])
async def test_no_text_to_be_embedded_is_in_the_log(error, log):
    from engineroom import EngineRoomError

    class Embedder(EchoHandler):
        async def embed(self, loaded_model, texts):
            raise error(f"cannot read {texts}")

    from engineroom import LLMInferenceService, LLMModelManager

    manager = LLMModelManager(config={"models": [{"model_id": "m", "source": "echo:"}]})
    async with LLMInferenceService(manager, handlers=[Embedder()]) as service:
        for texts in ([f"of {CANARY} we speak"], [CANARY, ""], [f"{CANARY}\ud800"]):
            with pytest.raises(EngineRoomError):
                await service.embed("m", texts)
    assert "canary" not in whole_log(log)


@given(st.text(min_size=31, max_size=200), st.text(max_size=100), st.text(max_size=50), st.data())
def test_a_long_piece_of_a_text_in_a_message_is_seen_wherever_it_stands(text, before, after, data):
    try:
        request = InferenceRequest(model_id="m", prompt=text)
    except ValueError:  # half of a surrogate pair
        return
    start = data.draw(st.integers(0, len(text) - 31))
    length = data.draw(st.integers(31, len(text) - start))
    assert _quotes(before + text[start : start + length] + after, request)


def test_what_quotes_nothing_is_not_withheld():
    request = InferenceRequest(model_id="m", prompt="Tell me of tokens and contexts, please")
    assert not _quotes("the prompt has 9000 tokens, but the context has 4096", request)


def test_a_quotation_is_seen_wherever_it_begins():
    from engineroom import GenerationParams, StructuredOutput
    from engineroom.inference.request_log import _quotes

    grammar = "anybodys ::= foo bar baz qux ("
    params = GenerationParams(structured_output=StructuredOutput(grammar=grammar))
    request = InferenceRequest(model_id="m", prompt="x " * 20_000, params=params)
    for start in range(len(grammar) - 16):
        assert _quotes(f"expected ')' at {grammar[start : start + 16]!r}", request)
    assert not _quotes("the prompt has 5 tokens", request)
