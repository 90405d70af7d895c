"""Anthropic's API with Anthropic's own client."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("anthropic", reason="needs Anthropic's client")

import anthropic

SAY = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def client(shared):
    with anthropic.Anthropic(base_url=shared.url, api_key="any", max_retries=0) as client:
        yield client


def test_a_conversation_is_continued(client, shared):
    answer = client.messages.create(
        model="m",
        max_tokens=100,
        messages=SAY,
        system="be brief",
        metadata={"user_id": "ann"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    )
    assert (answer.type, answer.role, answer.content[0].text) == (
        "message", "assistant", "one two three",
    )  # fmt: skip
    assert answer.stop_reason == "end_turn"
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 1, 3)
    request = shared.handler.seen[-1]
    assert (request.messages[0].role, request.messages[0].content) == ("system", "be brief")
    params = request.params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 5)
    assert request.metadata["user_id"] == "ann"


def test_stop_sequences_and_the_limit(client):
    answer = client.messages.create(
        model="m", max_tokens=100, messages=SAY, stop_sequences=["three", " two"]
    )
    assert answer.content[0].text == "one"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " two")
    answer = client.messages.create(model="m", max_tokens=2, messages=SAY)
    assert (answer.content[0].text, answer.stop_reason) == ("one two", "max_tokens")


def test_blocks_of_text(client):
    blocks = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    answer = client.messages.create(
        model="m", max_tokens=9, system=blocks, messages=[{"role": "user", "content": blocks}]
    )
    assert answer.content[0].text == "one two"


def test_a_stream_has_the_events_in_order(client):
    events = list(client.messages.create(model="m", max_tokens=9, messages=SAY, stream=True))
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.usage.input_tokens == 3
    assert events[-2].usage.output_tokens == 3
    assert events[-2].delta.stop_reason == "end_turn"


def test_the_clients_own_way_of_streaming(client):
    with client.messages.stream(model="m", max_tokens=9, messages=SAY) as stream:
        assert "".join(stream.text_stream) == "one two three"
        assert stream.get_final_message().usage.output_tokens == 3


async def test_the_asynchronous_client(shared):
    async with (
        anthropic.AsyncAnthropic(base_url=shared.url, api_key="x") as client,
        client.messages.stream(model="m", max_tokens=9, messages=SAY) as stream,
    ):
        text = [part async for part in stream.text_stream]
    assert "".join(text) == "one two three"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("word", "kind"),
    [("!refuse", anthropic.BadRequestError), ("!fail", anthropic.InternalServerError)],
)
def test_a_failure_before_the_first_token_has_its_status(client, word, kind, stream):
    with pytest.raises(kind) as caught:
        client.messages.create(
            model="m", max_tokens=9, messages=[{"role": "user", "content": word}], stream=stream
        )
    body = caught.value.response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] in ("invalid_request_error", "api_error")
    assert body["request_id"] == caught.value.response.headers["x-request-id"]
    assert body["request_id"] == caught.value.request_id


def test_a_stream_that_fails_midway_says_so(client):
    say = [{"role": "user", "content": "a b !break c"}]
    stream = client.messages.create(model="m", max_tokens=9, messages=say, stream=True)
    got = []
    with pytest.raises(anthropic.APIStatusError, match="the model failed"):
        got.extend(event for event in stream)
    assert got[-1].type == "message_delta"
    assert got[-1].usage.output_tokens == 2


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"temperature": 1.5},
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"tools": [{"name": "no name", "input_schema": {}}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"system": 5},
    ],
)
def test_what_cannot_be_is_refused(client, change):
    body = {"model": "m", "max_tokens": 9, "messages": SAY, **change}
    with pytest.raises(anthropic.BadRequestError):
        client.post("/v1/messages", body=body, cast_to=object)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nonsense", max_tokens=9, messages=SAY)


def test_the_key_is_sent_anthropics_way(start):
    from engineroom.server.keys import KeyRing

    with start(keys=KeyRing([("ann", "ann-key-0123456789")])) as run:
        with anthropic.Anthropic(
            base_url=run.url, api_key="ann-key-0123456789", max_retries=0
        ) as client:
            client.messages.create(model="m", max_tokens=9, messages=SAY)
        with (
            anthropic.Anthropic(
                base_url=run.url, api_key="wrong-key-0123456789", max_retries=0
            ) as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(model="m", max_tokens=9, messages=SAY)
