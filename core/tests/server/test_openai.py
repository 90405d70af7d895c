"""OpenAI's API with OpenAI's own client."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("openai", reason="needs OpenAI's client")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
import openai
from server_doubles import TalkHandler

CHAT = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def client(shared, openai_at):
    return openai_at(shared.url)


def test_a_conversation_is_continued(client):
    answer = client.chat.completions.create(model="m", messages=CHAT)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "m"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 3, 6)
    assert usage.prompt_tokens_details.cached_tokens == 1


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_gives_the_same_text(client, include_usage):
    stream = client.chat.completions.create(
        model="default",
        messages=CHAT,
        stream=True,
        stream_options={"include_usage": include_usage},
    )
    chunks = list(stream)
    last = chunks.pop() if include_usage else None
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one two three"
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert len({c.id for c in chunks}) == 1
    if last is not None:
        assert last.choices == [] and last.usage.total_tokens == 6


async def test_the_asynchronous_client_streams(shared):
    async with openai.AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="x") as client:
        stream = await client.chat.completions.create(model="m", messages=CHAT, stream=True)
        text = [c.choices[0].delta.content or "" async for c in stream]
    assert "".join(text) == "one two three"


def test_the_raw_stream_is_as_documented(shared):
    body = {"model": "m", "messages": CHAT, "stream": True}
    with httpx.stream("POST", f"{shared.url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = response.read().decode()
    events = text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])


@pytest.mark.parametrize("stop", ["two", ["two"], ["nine", "two"]])
def test_stop_sequences_end_the_text(client, stop):
    answer = client.chat.completions.create(model="m", messages=CHAT, stop=stop)
    assert answer.choices[0].message.content == "one "
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_of_tokens_is_kept(client, name, stream):
    answer = client.chat.completions.create(model="m", messages=CHAT, stream=stream, **{name: 2})
    if stream:
        assert [c.choices[0].finish_reason for c in answer][-1] == "length"
    else:
        assert answer.choices[0].message.content == "one two"
        assert answer.choices[0].finish_reason == "length"


def test_parameters_arrive(client, shared):
    client.chat.completions.create(
        model="m",
        messages=[{"role": "system", "content": "be brief"}, *CHAT],
        temperature=0.3,
        top_p=0.5,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        seed=7,
        logit_bias={"5": -100},
        user="ann",
        extra_body={
            "top_k": 9,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "timeout_s": 5,
            "priority": 3,
        },
    )
    request = shared.handler.seen[-1]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.3, 0.5, 9, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.1, -0.2)
    assert (params.seed, params.logit_bias, params.repetition_penalty) == (7, {5: -100.0}, 1.1)
    assert params.max_new_tokens is None
    assert (request.timeout_s, request.priority) == (5, 3)
    assert request.metadata["user"] == "ann"
    assert [m.role for m in request.messages] == ["system", "user"]


def test_a_client_cannot_say_whose_key_it_has(client, shared):
    client.chat.completions.create(model="m", messages=CHAT)
    own = shared.handler.seen[-1].metadata["api_key"]
    said = {"api_key": "boss", "who": "ann"}
    client.chat.completions.create(model="m", messages=CHAT, metadata=said)
    assert shared.handler.seen[-1].metadata == {"api_key": own, "who": "ann"}
    assert shared.handler.seen[-1].key_name == own


def test_an_adapter_arrives_by_its_name(client, shared):
    client.chat.completions.create(model="m", messages=CHAT)
    assert shared.handler.seen[-1].adapter is None
    client.chat.completions.create(model="m", messages=CHAT, extra_body={"adapter": "legal"})
    assert shared.handler.seen[-1].adapter == "legal"
    client.completions.create(model="m", prompt="x", extra_body={"adapter": "other"})
    assert shared.handler.seen[-1].adapter == "other"
    for wrong in ("", 5):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=CHAT, extra_body={"adapter": wrong})
        assert caught.value.param == "adapter"


def test_what_is_not_said_is_as_at_openai(client, shared):
    client.chat.completions.create(model="m", messages=CHAT)
    params = shared.handler.seen[-1].params
    assert params.temperature is None  # 1
    assert params.max_new_tokens is None
    client.completions.create(model="m", prompt="x")
    assert shared.handler.seen[-1].params.max_new_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client, stream):
    answer = client.chat.completions.create(
        model="m", messages=CHAT, logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    entries = [e for c in choices if c.logprobs for e in c.logprobs.content]
    assert [entry.token for entry in entries] == ["one", " two", " three"]
    assert entries[0].logprob == -0.5
    assert [top.token for top in entries[0].top_logprobs] == ["alt0", "alt1"]
    assert entries[0].bytes == list(b"one")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_tokens_without_text_have_log_probabilities_too(client, stream, n):
    answer = client.chat.completions.create(
        model="m", messages=CHAT, logprobs=True, stop=" three", n=n, stream=stream
    )
    choices = [c for part in answer for c in part.choices] if stream else answer.choices
    for index in range(n):
        mine = [c for c in choices if c.index == index]
        entries = [e for c in mine if c.logprobs for e in c.logprobs.content]
        assert [entry.token for entry in entries] == ["one", " two", " three"]
        texts = [c.delta.content if stream else c.message.content for c in mine]
        assert "".join(text or "" for text in texts) == "one two"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_seeds_of_their_own(client, shared, stream):
    answer = client.chat.completions.create(
        model="m", messages=CHAT, n=3, seed=11, stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    texts = ["", "", ""]
    if stream:
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
            usage = chunk.usage
    else:
        for choice in answer.choices:
            texts[choice.index] = choice.message.content
        usage = answer.usage
    assert texts == ["one two three"] * 3
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 9)
    seeds = [request.params.seed for request in shared.handler.seen[-3:]]
    assert len(set(seeds)) == 3 and 11 in seeds
    client.chat.completions.create(model="m", messages=CHAT, n=3, seed=11)
    assert {request.params.seed for request in shared.handler.seen[-3:]} == set(seeds)


def test_parts_of_text_are_joined(client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    answer = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": parts}]
    )
    assert answer.choices[0].message.content == "one two"


# ── completions ──────────────────────────────────────────────────────────────────────────────


def test_prompts_are_continued(client):
    answer = client.completions.create(model="m", prompt=["a b", "c"], n=2, echo=True)
    assert answer.object == "text_completion"
    assert [(c.index, c.text) for c in answer.choices] == [
        (0, "a ba b"), (1, "a ba b"), (2, "cc"), (3, "cc"),
    ]  # fmt: skip
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)


def test_prompts_are_continued_as_a_stream(client):
    stream = client.completions.create(
        model="m", prompt=["a b", "c"], echo=True, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["a ba b", "cc"]
    assert chunk.usage.total_tokens == 6


def of_prompt(*rest: float | None) -> list[float | None]:
    """Log probabilities as the fake runtime has them of a prompt of two words."""
    return [None, -2.5, *rest]


@pytest.mark.parametrize("prompt", ["a b", list(map(ord, "a b"))], ids=["text", "ids"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_prompts_are_echoed_with_their_log_probabilities(client, prompt, stream, limit):
    answer = client.completions.create(
        model="m", prompt=[prompt, prompt], echo=True, logprobs=1, max_tokens=limit, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    for index in (0, 1):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(c.text for c in choices) == ["a b", "a ba", "a ba b"][limit]
        told = [c.logprobs for c in choices if c.logprobs is not None]
        values = [value for part in told for value in part.token_logprobs]
        assert values == of_prompt(*[-0.5] * limit)
        tokens = [token for part in told for token in part.tokens]
        assert tokens == ["a", " b", "a", " b"][: 2 + limit]
        offsets = [offset for part in told for offset in part.text_offset]
        assert offsets == [0, 1, 3, 4][: 2 + limit]
        alternatives = [top for part in told for top in part.top_logprobs]
        assert alternatives == [None, *[{"alt0": -1.0}] * (1 + limit)]
        assert choices[-1].finish_reason == "length"
    if not stream:
        assert answer.usage.completion_tokens == 2 * limit


def test_token_ids_are_echoed_as_their_text(client):
    answer = client.completions.create(model="m", prompt=[97, 32, 98], echo=True)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("a ba b", None)


def test_what_a_tokenizer_puts_before_a_prompt_is_no_part_of_its_text(start):
    class Begins(TalkHandler):
        def _of_prompt(self, words, top):
            return super()._of_prompt(["<s>", *words], top)

    with start(handler=Begins()) as run:
        body = {"model": "m", "prompt": "a b", "echo": True, "logprobs": 0, "max_tokens": 1}
        answer = httpx.post(f"{run.url}/v1/completions", json=body).json()["choices"][0]
    assert answer["text"] == "a ba"
    assert answer["logprobs"]["tokens"] == ["<s>", "a", " b", "a"]
    assert answer["logprobs"]["text_offset"] == [0, 0, 1, 3]


def test_no_token_may_be_asked_for(client):
    answer = client.completions.create(model="m", prompt="a b", max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(client, stream):
    answer = client.completions.create(model="m", prompt="a bc d", logprobs=1, stream=stream)
    choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    parts = [c.logprobs for c in choices if c.logprobs]
    assert [t for p in parts for t in p.tokens] == ["a", " bc", " d"]
    assert [o for p in parts for o in p.text_offset] == [0, 1, 4]
    assert parts[0].top_logprobs[0] == {"alt0": -1.0}


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_token_ids(client, stream):
    ids = [[ord(c) for c in text] for text in ("a b", "c")]
    for prompt, texts in ((ids[0], ["a b"]), (ids, ["a b", "c"])):
        answer = client.completions.create(model="m", prompt=prompt, stream=stream)
        got = [""] * len(texts)
        for part in answer if stream else [answer]:
            for choice in part.choices:
                got[choice.index] += choice.text
        assert got == texts


def test_token_ids_where_the_runtime_takes_none(start):
    class TextHandler(TalkHandler):
        def capabilities(self):
            return replace(super().capabilities(), prompt_token_ids=False)

    with (
        start(handler=TextHandler()) as run,
        openai.OpenAI(base_url=f"{run.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.completions.create(model="m", prompt=[97, 98])
    assert "does not honour prompt_token_ids" in caught.value.message


@pytest.mark.parametrize(
    "prompt",
    [
        [], [[]], [[1], []], [-1], [1, True], [True], [1.5], [1, "a"], ["a", 1], [[1], "a"],
        [2**31], [["a"]], [[[1]]], [None], None, 5, {"a": 1},
    ],
)  # fmt: skip
def test_prompts_that_are_none_are_named(shared, prompt):
    body = {"model": "m", "prompt": prompt}
    answer = httpx.post(f"{shared.url}/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == ("prompt", "invalid_request_error")
    assert len(error["message"]) < 200


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["m", "default"]
    assert client.models.retrieve("default").id == "default"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nonsense")


# ── what is refused ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=CHAT, extra_body={field: value})
    assert caught.value.param == field
    assert caught.value.code == "unsupported_parameter"
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tools", None),
        ("tool_choice", "none"),
        ("response_format", {"type": "text"}),
        ("store", False),
        ("service_tier", "auto"),
        ("parallel_tool_calls", True),
        ("something_new", {"deep": [1]}),
    ],
)
def test_what_asks_for_nothing_is_let_pass(client, field, value):
    client.chat.completions.create(model="m", messages=CHAT, extra_body={field: value})


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [
        ("tool_calls", [], True),
        ("tool_calls", None, True),
        ("function_call", {"name": "f", "arguments": "{}"}, False),
        ("audio", {"id": "1"}, False),
        ("audio", None, True),
        ("refusal", None, True),
    ],
)
def test_what_an_answer_that_is_sent_back_may_have(shared, field, value, taken):
    said = {"role": "assistant", "content": "Hello.", field: value}
    body = {"model": "m", "messages": [*CHAT, said, *CHAT]}
    answer = httpx.post(f"{shared.url}/v1/chat/completions", json=body)
    if taken:
        assert answer.status_code == 200, answer.text
        return
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages")
    assert error["message"].startswith(f"messages.1.{field} is not supported")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
    ],
)
def test_what_completions_do_not_support_is_refused_by_name(client, body, field):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", **body)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 20_000]}, None),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"model": 5}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_values_that_cannot_be_are_named(shared, change, param):
    body = {"model": "m", "messages": CHAT, **change}
    answer = httpx.post(f"{shared.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("word", "kind", "status"),
    [
        ("!refuse", openai.BadRequestError, 400),
        ("!fail", openai.InternalServerError, 500),
        ("!leak", openai.InternalServerError, 500),
        ("!dead", openai.InternalServerError, 503),
    ],
)
def test_a_failure_before_the_first_token_has_its_status(client, word, kind, status, stream):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": word}], stream=stream
        )
    assert caught.value.status_code == status
    text = caught.value.response.text
    assert "/srv" not in text and "/opt" not in text and "Traceback" not in text
    assert caught.value.response.headers["x-request-id"] in text


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(client, stream):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="mm", messages=CHAT, stream=stream)
    assert caught.value.code == "model_not_found"
    assert "did you mean 'm'" in caught.value.message


def test_a_stream_that_fails_midway_says_so_and_ends(client, shared):
    stream = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "one two !break four"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    got = []
    with pytest.raises(openai.APIError) as caught:
        got.extend(chunk for chunk in stream)
    assert "the model failed" in caught.value.message
    assert "".join(c.choices[0].delta.content or "" for c in got[:-1]) == "one two"
    assert (got[-1].usage.prompt_tokens, got[-1].usage.completion_tokens) == (4, 2)
    body = {"model": "m", "prompt": "one two !break four", "stream": True}
    raw = httpx.post(f"{shared.url}/v1/completions", json=body).text
    assert raw.endswith("data: [DONE]\n\n") and raw.count('"error":') == 1


def test_one_of_several_answers_that_fails_ends_the_stream_and_counts_all(client, shared):
    stream = client.completions.create(
        model="m",
        prompt=["!drip for ever", "a b !break d"],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=10**6,
    )
    got = []
    with pytest.raises(openai.APIError):
        got.extend(stream)
    assert got[-1].usage.prompt_tokens == 3 + 4
    written = sum(bool(c.choices[0].text) for c in got[:-1])
    assert got[-1].usage.completion_tokens >= written >= 2
    shared.until(lambda: shared.handler.running == 0, "the other one has stopped, too")


async def test_many_at_once_get_their_own(shared):
    async with openai.AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="x") as client:

        async def one(i: int) -> str:
            text = f"word{i} " * 20
            stream = await client.completions.create(
                model="m", prompt=text, stream=True, max_tokens=1000
            )
            return "".join([c.choices[0].text async for c in stream])

        texts = await asyncio.gather(*(one(i) for i in range(40)))
    assert texts == [f"word{i} " * 20 for i in range(40)]
