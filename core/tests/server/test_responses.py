"""OpenAI's newer API with OpenAI's own client."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("openai", reason="needs OpenAI's client")

import openai


@pytest.fixture(scope="module")
def client(shared, openai_at):
    return openai_at(shared.url)


def test_a_text_is_answered(client):
    answer = client.responses.create(model="m", input="one two three")
    assert answer.output_text == "one two three"
    assert (answer.status, answer.object, answer.store) == ("completed", "response", False)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 3)
    assert answer.usage.input_tokens_details.cached_tokens == 1


def test_a_conversation_is_answered(client, shared):
    answer = client.responses.create(
        model="m",
        instructions="be brief",
        input=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "one two"}]},
        ],
        max_output_tokens=1,
        temperature=0.2,
        metadata={"who": "ann"},
    )
    assert answer.output_text == "one"
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    request = shared.handler.seen[-1]
    assert [(m.role, m.content) for m in request.messages] == [
        ("system", "be brief"), ("user", "hello"), ("assistant", "yes"), ("user", "one two"),
    ]  # fmt: skip
    assert request.params.temperature == 0.2
    assert request.metadata["who"] == "ann"


def test_a_stream_has_the_events_in_order(client):
    events = list(client.responses.create(model="m", input="one two three", stream=True))
    kinds = [event.type for event in events]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "one two three"
    final = events[-1].response
    assert final.output_text == "one two three"
    assert final.usage.total_tokens == 6
    assert {e.item_id for e in events if hasattr(e, "item_id")} == {final.output[0].id}


def test_the_clients_own_way_of_streaming(client):
    with client.responses.stream(model="m", input="one two") as stream:
        assert stream.get_final_response().output_text == "one two"


def test_a_stream_that_reached_its_limit_is_incomplete(client):
    *_, last = client.responses.create(model="m", input="one two", max_output_tokens=1, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_a_stream_that_fails_midway_says_so(client):
    events = list(client.responses.create(model="m", input="a b !break c", stream=True))
    error, failed = events[-2:]
    assert error.type == "error" and "the model failed" in error.message
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.usage.output_tokens == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "web_search"}]),
        ("previous_response_id", "resp_1"),
        ("background", True),
        ("reasoning", {"effort": "lots"}),
        ("top_logprobs", 2),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input="x", **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "input_",
    [
        [],
        [{"type": "function_call_output", "call_id": "", "output": "x"}],
        [{"type": "item_reference", "id": "msg_1"}],
        [{"type": "function_call", "call_id": "1", "name": "f"}],
        [{"type": "reasoning", "summary": []}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
        [{"role": "tool", "content": "x"}],
        5,
    ],
)
def test_input_that_cannot_be_is_refused(client, input_):
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="m", input=input_)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("word", "status"), [("!fail", 500), ("!refuse", 400), ("!dead", 503)])
def test_a_failure_before_the_first_token_has_its_status(client, word, status, stream):
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(model="m", input=word, stream=stream)
    assert caught.value.status_code == status


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client, stream):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = client.responses.create(model="m", input="one two three", stream=stream, **asked)
    if stream:
        events = list(answer)
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert [e.token for event in deltas for e in event.logprobs] == ["one", " two", " three"]
        (done,) = [event for event in events if event.type == "response.output_text.done"]
        assert [entry.token for entry in done.logprobs] == ["one", " two", " three"]
        answer = events[-1].response
    entries = answer.output[0].content[0].logprobs
    assert [(e.token, bytes(e.bytes)) for e in entries] == [
        ("one", b"one"), (" two", b" two"), (" three", b" three"),
    ]  # fmt: skip
    assert [top.token for top in entries[0].top_logprobs] == ["alt0", "alt1"]
    assert answer.top_logprobs == 2
