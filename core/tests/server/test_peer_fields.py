"""What other servers' clients send: honoured under our names, refused by name, or warned of."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="requests are sent with httpx")

import httpx

from engineroom.server.apis.anthropic_messages import MessagesRequest
from engineroom.server.apis.openai_chat import ChatRequest
from engineroom.server.apis.openai_completions import CompletionRequest
from engineroom.server.apis.openai_responses import ResponsesRequest
from engineroom.server.apis.peer_fields import ALIASES, IDLE, IGNORED, REFUSED, USE_INSTEAD
from engineroom.server.apis.request_fields import known_aliases, known_fields

WARNING = "x-engineroom-warning"
CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ASK = {"messages": [{"role": "user", "content": "one two"}]}
LEAST = {
    CHAT: ASK,
    TEXTS: {"prompt": "one two"},
    RESPONSES: {"input": "one two"},
    MESSAGES: {**ASK, "max_tokens": 9},
}
SCHEMAS = {
    CHAT: ChatRequest, TEXTS: CompletionRequest, RESPONSES: ResponsesRequest,
    MESSAGES: MessagesRequest,
}  # fmt: skip
CLIENT = httpx.Client()
each_route = pytest.mark.parametrize("route", LEAST)
streamed_and_whole = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture(scope="module", autouse=True)
def _closed():
    with CLIENT:
        yield


def post(shared, route, **fields):
    body = {"model": "m", **LEAST[route], **fields}
    sent = {n: v for n, v in body.items() if v != "absent"}
    return CLIENT.post(shared.url + route, json=sent)


def asked(shared, route, **fields):
    answer = post(shared, route, **fields)
    assert answer.status_code == 200, answer.text
    return shared.handler.seen[-1]


@each_route
@streamed_and_whole
def test_what_asks_for_an_end_reaches_the_runtime(shared, route, stream):
    params = asked(shared, route, stream=stream, min_tokens=2, ignore_eos=True).params
    assert (params.min_tokens, params.ignore_eos) == (2, True)
    assert "min_tokens" in post(shared, route, min_tokens=-1).json()["error"]["message"]
    params = asked(shared, route, min_new_tokens=2).params
    assert (params.min_tokens, params.ignore_eos) == (2, None)


@each_route
def test_penalties_and_seeds_are_the_same_on_every_route(shared, route):
    fields = {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"3": 1.0},
        "seed": 7,
    }
    params = asked(shared, route, **fields, repeat_penalty=1.25).params
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
    assert (params.logit_bias, params.seed, params.repetition_penalty) == ({3: 1.0}, 7, 1.25)


@each_route
@pytest.mark.parametrize("name", ["max_new_tokens", "n_predict", "num_predict", "max_tokens",
                                  "max_output_tokens", "max_completion_tokens"])  # fmt: skip
def test_a_limit_has_many_names(shared, route, name):
    bare = {"max_tokens": "absent"} if route == MESSAGES else {}
    assert asked(shared, route, **bare | {name: 3}).params.max_new_tokens == 3


@pytest.mark.parametrize("route", [CHAT, TEXTS, RESPONSES])
@streamed_and_whole
def test_no_limit_may_be_said_as_minus_one(shared, route, stream):
    for name in ("max_tokens", "n_predict", "max_output_tokens", "max_completion_tokens"):
        assert asked(shared, route, stream=stream, **{name: -1}).params.max_new_tokens is None
    for wrong in (-2, 0.5, "9"):
        answer = post(shared, route, n_predict=wrong)
        assert answer.status_code == 400 and "n_predict" in answer.json()["error"]["message"]


@each_route
def test_two_names_with_two_values_contradict_each_other(shared, route):
    answer = post(shared, route, repetition_penalty=1.5, repeat_penalty=1.25)
    assert answer.status_code == 400
    told = answer.json()["error"]["message"]
    assert "repetition_penalty and repeat_penalty contradict each other" in told
    assert asked(shared, route, repetition_penalty=1.5, repeat_penalty=1.5)


@each_route
def test_values_that_are_too_deep_to_be_compared_are_no_failure(shared, route):
    deep = f"{'[' * 900}1{']' * 900}"
    body = json.dumps({"model": "m", **LEAST[route], "repetition_penalty": 0, "repeat_penalty": 0})
    headers = {"content-type": "application/json"}
    answer = httpx.post(
        shared.url + route, content=body.replace(": 0", f": {deep}"), headers=headers
    )
    assert answer.status_code == 400, answer.text


@each_route
def test_a_mistake_is_told_by_the_clients_name(shared, route):
    answer = post(shared, route, repeat_penalty=0.5)
    assert answer.status_code == 400 and "repeat_penalty: " in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "name", "neutral"),
    [
        (RESPONSES, "n_cmpl", 1),
        (MESSAGES, "n_cmpl", 1),
        (TEXTS, "thinking_token_budget", None),
        (TEXTS, "thinking_budget_tokens", None),
    ],
)
def test_another_name_of_what_is_refused_is_refused_by_that_name(shared, route, name, neutral):
    answer = post(shared, route, **{name: 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{name} is not supported by this server")
    assert asked(shared, route, **{name: neutral})


NEUTRAL = [("top_k", -1), ("top_k", 0), ("min_p", 0), ("repeat_penalty", 1), ("typical_p", 1)]


@each_route
@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_a_neutral_value_asks_for_nothing(shared, route, name, value):
    answer = post(shared, route, **{name: value})
    assert answer.status_code == 200 and WARNING not in answer.headers, answer.text
    assert shared.handler.seen[-1].params.requested() <= {"max_new_tokens", "temperature"}


@each_route
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_runtime_is_told_is_refused_by_name(shared, route, name):
    refused = known_fields(SCHEMAS[route]).refused
    if name not in refused:  # the API has it, and has a word of its own about it
        assert name in SCHEMAS[route].model_fields
        return
    answer = post(shared, route, **{name: "something"})
    assert answer.status_code == 400, answer.text
    told = answer.json()["error"]["message"]
    assert told.startswith(f"{name} is not supported by this server; ")
    for value in [None, *refused[name]]:
        answer = post(shared, route, **{name: value})
        assert answer.status_code == 200, answer.text


@each_route
@streamed_and_whole
def test_what_changes_no_text_is_ignored_and_told(shared, route, stream):
    ignored = known_fields(SCHEMAS[route]).ignored
    assert set(IGNORED) <= set(ignored)
    for name, (neutral, why) in ignored.items():
        answer = post(shared, route, stream=stream, **{name: "something"})
        assert answer.status_code == 200, answer.text
        assert answer.headers[WARNING] == f"{name} was ignored: {why}"
        for value in [None, *neutral]:
            assert WARNING not in post(shared, route, stream=stream, **{name: value}).headers


@each_route
def test_none_of_them_is_an_unknown_field(start, route):
    fields = known_fields(SCHEMAS[route])
    neutral = {n: next(iter(v), None) for n, v in fields.refused.items()}
    body = {"model": "m", **LEAST[route], **neutral, **dict.fromkeys(fields.ignored),
            **dict.fromkeys(fields.idle, 1)}  # fmt: skip
    with start(unknown_fields="refuse") as run:
        answer = httpx.post(run.url + route, json=body)
        assert answer.status_code == 200, answer.text
        answer = httpx.post(run.url + route, json={**body, "nonsense": 1})
        assert answer.status_code == 400, answer.text


def test_each_field_has_one_place():
    names = [*ALIASES, *REFUSED, *IGNORED, *IDLE]
    assert len(names) == len(set(names)) and set(USE_INSTEAD) <= set(REFUSED)
    for schema in SCHEMAS.values():
        fields = known_fields(schema)
        places = [*schema.model_fields, *fields.refused, *fields.ignored, *fields.idle]
        assert len(places) == len(set(places))
        assert known_aliases(schema).keys().isdisjoint(places)
        assert set(known_aliases(schema).values()) <= {*schema.model_fields, *schema.REFUSED}


# ── OpenAI's own neutral values ──────────────────────────────────────────────────────────────


def test_no_alternatives_need_no_log_probabilities(shared):
    for logprobs in (None, False):
        assert asked(shared, CHAT, top_logprobs=0, logprobs=logprobs).params.logprobs is None
    assert asked(shared, RESPONSES, top_logprobs=0).params.logprobs is None
    assert post(shared, CHAT, top_logprobs=1).status_code == 400
    assert post(shared, RESPONSES, top_logprobs=1).status_code == 400


@streamed_and_whole
@pytest.mark.parametrize(
    ("route", "fields", "told"),
    [
        (RESPONSES, {"store": True}, "store was ignored: no answer is kept here"),
        (CHAT, {"store": True}, "store was ignored: no answer is kept here"),
        (RESPONSES, {"truncation": "auto"}, "truncation was ignored: "),
        (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity was ignored: "),
        (RESPONSES, {"text": {"verbosity": "medium"}}, ""),
        (CHAT, {"verbosity": "high"}, "verbosity was ignored: "),
        (CHAT, {"verbosity": "medium"}, ""),
        (RESPONSES, {"reasoning": {"summary": "auto"}}, ""),
        (RESPONSES, {"include": ["reasoning.encrypted_content"]}, "include: reasoning.encrypted"),
        (RESPONSES, {"include": ["web_search_call.action.sources"]}, ""),
        (CHAT, {"service_tier": "flex"}, "service_tier was ignored: "),
        (CHAT, {"service_tier": "auto"}, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_told_beside_the_answer(shared, route, fields, told, stream):
    answer = post(shared, route, stream=stream, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get(WARNING, "").startswith(told)
    assert bool(told) is (WARNING in answer.headers)
    assert shared.handler.seen[-1].params.logprobs is None


def test_what_is_included_is_no_guess(shared):
    answer = post(shared, RESPONSES, include=["everything"])
    assert answer.status_code == 400 and "include" in answer.json()["error"]["message"]
    both = ["reasoning.encrypted_content", "message.output_text.logprobs"]
    assert asked(shared, RESPONSES, include=both).params.logprobs == 0


# ── histories ────────────────────────────────────────────────────────────────────────────────


REFUSAL = {"type": "refusal", "refusal": "I will not."}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
HIDDEN = {"type": "redacted_thinking", "data": "eHl6"}
QUESTION = {"role": "user", "content": "a"}


@streamed_and_whole
@pytest.mark.parametrize(
    ("route", "history", "text", "reasoning"),
    [
        (CHAT, {"content": [REFUSAL]}, "I will not.", None),
        (CHAT, {"content": None, "refusal": "I will not."}, "I will not.", None),
        (CHAT, {"content": "b", "refusal": None}, "b", None),
        (CHAT, {"content": [THOUGHT, HIDDEN, {"type": "text", "text": "b"}]}, "b", "hm"),
        (CHAT, {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                            {"type": "text", "text": "b"}]}, "b", "hm"),
        (CHAT, {"content": "b", "reasoning_content": "hm"}, "b", "hm"),
        (RESPONSES, {"content": [REFUSAL]}, "I will not.", None),
        (MESSAGES, {"content": [THOUGHT, HIDDEN, {"type": "text", "text": "b"}]}, "b", "hm"),
    ],
)  # fmt: skip
def test_what_the_assistant_did_not_say_in_text(shared, route, history, text, reasoning, stream):
    turns = [QUESTION, {"role": "assistant", **history}, QUESTION]
    turned = {"input": turns} if route == RESPONSES else {"messages": turns}
    request = asked(shared, route, stream=stream, **turned)
    answered = request.messages[1]
    assert (answered.role, answered.content, answered.reasoning) == ("assistant", text, reasoning)


def test_only_the_assistant_refuses(shared):
    for route, name in ((CHAT, "messages"), (RESPONSES, "input")):
        turns = [{"role": "user", "content": [REFUSAL]}]
        assert post(shared, route, **{name: turns}).status_code == 400
