"""Bodies that are large or slow to read: refused by their first mistake, or taken."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import re
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hypothesis import given, strategies as st
from server_doubles import TalkHandler

from engineroom import Embeddings, InferenceResponse
from engineroom.json_shape import SMALL_BODY
from engineroom.server.http.call import Call
from engineroom.server.http.frames import Answer, Pieces, dumps, slices, taken
from engineroom.server.http.rounds import Rounds
from engineroom.server.routes import APIS

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES, RESPONSES, NATIVE = "/v1/messages", "/v1/responses", "/v1/inference"
ASK = [{"role": "user", "content": "x"}]
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": ASK},
    COMPLETIONS: {"model": "m", "prompt": "x"},
    EMBEDDINGS: {"model": "m", "input": "x"},
    MESSAGES: {"model": "m", "messages": ASK, "max_tokens": 9},
    RESPONSES: {"model": "m", "input": "x"},
    NATIVE: {"model_id": "m", "prompt": "x"},
}


@pytest.fixture(scope="module")
def patient(start):
    """A server that reads whatever is no larger than a body may be."""
    with start(max_json_values=1 << 30, max_messages=1 << 30, max_parts=1 << 30) as run:
        yield run


def post(run, route: str, **more: Any) -> httpx.Response:
    return post_text(run, route, json.dumps({**LEAST[route], **more}))


def post_text(run, route: str, body: str) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(run.url + route, content=body, headers=headers, timeout=60)


def refused(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    message: str = answer.json()["error"]["message"]
    assert len(message) < 1000
    return message


def others(message: str) -> int:
    """How many mistakes were collected beside those that are told."""
    more = re.search(r"\(and (\d+) more\)", message)
    return int(more[1]) if more else 0


# ── lists of mistakes ────────────────────────────────────────────────────────────────────────

LISTS = [
    (CHAT, "messages"), (CHAT, "stop"), (MESSAGES, "messages"), (MESSAGES, "system"),
    (MESSAGES, "stop_sequences"), (RESPONSES, "input"), (COMPLETIONS, "prompt"),
    (EMBEDDINGS, "input"), (NATIVE, "messages"), (NATIVE, "stop_sequences"),
    (NATIVE, "prompt_token_ids"), (NATIVE, "tools"),
]  # fmt: skip


@pytest.mark.parametrize("item", [{}, 1.5, None, "", [[]], {"role": "user", "content": [{}]}])
@pytest.mark.parametrize(("route", "field"), LISTS)
def test_a_list_of_mistakes_is_told_by_its_first(patient, route, field, item):
    if (field, item) == ("tools", {}):
        item = 1  # any object is a tool
    if field == "input" and route == EMBEDDINGS and item == "":
        item = 1
    if (field, item) == ("prompt", ""):
        item = None  # several empty prompts are no mistake
    message = refused(post(patient, route, **{field: [item] * 20_000}))
    assert others(message) < 10, message


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
def test_parts_of_a_message_are_told_by_the_first(patient, route):
    field = "input" if route == RESPONSES else "messages"
    for part in ({}, 1, None, {"type": "text"}, {"type": 5, "text": "x"}):
        message = {"role": "user", "content": [part] * 20_000}
        assert others(refused(post(patient, route, **{field: [message]}))) < 10


@pytest.mark.parametrize("bias", [{"a": 1}, {"1": "x"}, {"1": 101}, {"-1": 1}, {"1": True}])
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, NATIVE])
def test_a_bias_of_mistakes_is_told_by_its_first(patient, route, bias):
    ((key, amount),) = bias.items()
    many = {f"{key}{number}": amount for number in range(20_000)}
    asked = {"params": {"logit_bias": many}} if route == NATIVE else {"logit_bias": many}
    message = refused(post(patient, route, **asked))
    assert "logit_bias" in message and others(message) < 10


@pytest.mark.parametrize("route", LEAST)
def test_objects_with_far_too_many_fields_are_refused_as_they_are(patient, route):
    many = {f"k{number}": 1 for number in range(20_000)}
    assert "may have 256 fields, not 200" in refused(post(patient, route, **many))
    if route == NATIVE:
        for field, name in (("params", ""), ("messages", "0")):
            value = many if field == "params" else [many]
            body = {k: v for k, v in LEAST[NATIVE].items() if k != "prompt"}
            message = refused(post_text(patient, route, json.dumps({**body, field: value})))
            assert f"{field}.{name}".rstrip(".") + ": may have 256 fields" in message


# ── one arm of a union ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("route", "change", "message"),
    [
        (CHAT, {"stop": 5}, "stop: must be a text or a list of texts (it is 5)"),
        (CHAT, {"stop": ["a", 5]}, "stop.1: Input should be a valid string (it is 5)"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages.0.content.0.type: Field required",
        ),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: must be a text or a list of parts (it is 5)",
        ),
        (MESSAGES, {"system": [5]}, "system.0: Input should be"),
        (RESPONSES, {"input": 5}, "input: must be a text or a list of messages (it is 5)"),
        (RESPONSES, {"input": [{"role": "user"}]}, "input.0.content: Field required"),
        (
            EMBEDDINGS,
            {"input": 5},
            (
                "input: must be a text, a list of texts, a list of token ids, "
                "or a list of lists of token ids (it is 5)"
            ),
        ),
        (EMBEDDINGS, {"input": ["x", 5]}, "input.1: Input should be a valid string (it is 5)"),
        (COMPLETIONS, {"prompt": ["x", 5]}, "prompt.1: Input should be a valid string (it is 5)"),
        (NATIVE, {"tool_choice": 5}, "tool_choice: must be a word or a tool (it is 5)"),
    ],
)
def test_a_mistake_in_one_of_two_kinds_is_told_of_that_kind_alone(shared, route, change, message):
    told = refused(post(shared, route, **change))
    assert told.startswith(message) and ";" not in told


# ── counted before they are looked at ────────────────────────────────────────────────────────


def test_a_body_of_too_many_values_is_refused_before_it_is_decoded(start):
    with start(max_json_values=8_000) as run:
        for unknown, words in (
            ([[]] * 1000, "values (a list or object counts as 8), and at most 8000 are taken"),
            (["x"] * 1100, "texts and names, and at most 1000 are taken"),
            ({str(n): 1 for n in range(1100)}, "texts and names, and at most 1000 are taken"),
        ):
            body = json.dumps({**LEAST[CHAT], "unknown": unknown})
            assert "the body's JSON is too much" not in post_text(run, CHAT, body).text
            message = refused(post_text(run, CHAT, body + " " * SMALL_BODY))
            assert message.startswith("the body's JSON is too much: it has") and words in message
        marks = [{"role": "user", "content": "[{," * 30_000}]
        assert post(run, CHAT, messages=marks).status_code == 200
        number = f'{{"model": "m", "seed": {"9" * 200}}}' + " " * SMALL_BODY
        assert "a number of more than 100 digits" in refused(post_text(run, CHAT, number))


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES, NATIVE])
def test_messages_and_their_parts_are_counted(start, route):
    field = "input" if route == RESPONSES else "messages"
    kind = "input_text" if route == RESPONSES else "text"
    part = {"type": kind, "text": "x"}
    with start(max_messages=3, max_parts=5) as run:
        message = refused(post(run, route, **{field: [{}] * 4}))
        assert message == f"4 {field} are more than 3"
        if route != NATIVE:  # whose messages have no parts
            several = [{"role": "user", "content": [part] * 3}] * 2
            message = refused(post(run, route, **{field: several}))
            assert message == f"{field} with 6 parts are more than 5; join them"
            assert post(run, route, **{field: several[:1]}).status_code == 200
        if route == MESSAGES:
            assert "4 system are more than 3" in refused(post(run, route, system=[part] * 4))


# ── large and right ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_several_answers_share_what_is_large(shared, route):
    bias = {str(token): -1 for token in range(50_000)}
    before = shared.handler.begun
    answer = post(shared, route, n=4, seed=7, logit_bias=bias)
    assert answer.status_code == 200, answer.text
    assert shared.handler.begun == before + 4
    seen = shared.handler.seen[-4:]
    assert len({id(request.params.logit_bias) for request in seen}) == 1
    assert seen[0].params.logit_bias == dict.fromkeys(range(50_000), -1.0)
    assert len({request.params.seed for request in seen}) == 4
    assert 7 in {request.params.seed for request in seen}
    assert len({request.request_id for request in seen}) == 4


def test_several_large_bodies_have_rounds_of_the_loop_of_their_own(shared):
    """One at a time, with the loop's other work in between."""
    rounds = shared.server.context.rounds
    order: list[str] = []

    async def heavy(name: str) -> None:
        await rounds.next()
        order.append(name)

    async def work() -> None:
        asyncio.get_running_loop().call_soon(step, 0)
        await asyncio.gather(*(heavy(f"heavy {number}") for number in range(5)))

    def step(number: int) -> None:
        order.append("between")
        if number < 30:
            asyncio.get_running_loop().call_soon(step, number + 1)

    shared.call(work)
    places = [place for place, name in enumerate(order) if name != "between"]
    assert [order[place] for place in places] == [f"heavy {number}" for number in range(5)]
    assert all(b - a > 1 for a, b in itertools.pairwise(places)), order


def test_a_refusal_does_not_say_a_giant_name_back(patient):
    name = "k" * 1_000_000
    for path, body in ((NATIVE, {name: 1}), (CHAT, {"logit_bias": {name: 1}})):
        answer = httpx.post(patient.url + path, json={**LEAST[path], **body})
        assert answer.status_code == 400 and "k" * 60 in answer.text
        assert len(answer.content) < 1000


# ── large answers ────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.lists(st.text(max_size=3), max_size=4), min_size=1, max_size=5))
def test_pieces_are_what_the_whole_would_be(lists):
    pieces = Pieces[Listed]()
    for items in lists:
        pieces.add(Listed(items=items, pairs=[(item, 1) for item in items], last=len(items)))
    items = [item for some in lists for item in some]
    whole = Listed(items=items, pairs=[(item, 1) for item in items], last=len(lists[-1]))
    assert dumps(pieces.whole()) == dumps(whole)


class Listed(Answer, kw_only=True):
    items: list[str]
    pairs: list[tuple[str, int]]
    last: int


@given(st.lists(st.integers()), st.integers(1, 5))
def test_slices_are_all_of_it(items, size):
    cut = list(slices(items, size))
    assert [item for some in cut for item in some] == items
    assert cut and all(len(some) <= size for some in cut)
    assert list(taken(items, size)) == cut and not items


@pytest.mark.parametrize("size", [0, 1, 256 << 10, (256 << 10) + 1, 1 << 20])
async def test_a_long_answer_is_sent_in_pieces(size):
    """All that copies it on its way would hold the loop at one go."""

    class Sent(list[dict[str, Any]]):
        context = SimpleNamespace(rounds=Rounds())

        async def send(self, message: dict[str, Any]) -> None:
            self.append(message)

    sent, body = Sent(), bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    await Call.finish(cast("Call", sent), body)
    assert b"".join(message["body"] for message in sent) == body
    assert [message.get("more_body", False) for message in sent[:-1]] == [True] * (len(sent) - 1)
    assert not sent[-1].get("more_body", False)
    assert max(len(message["body"]) for message in sent) <= 256 << 10
    assert len(sent) == max(1, -(-size // (256 << 10)))


@pytest.mark.parametrize("words", [0, 1, 63, 64, 65, 200, 600])
def test_log_probabilities_of_long_answers_are_whole(shared, words):
    """However many pieces they are encoded in."""
    text = "a " * words or "!refuse"
    chat = {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": 2}
    if not words:
        chat = {"messages": ASK, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    choices = post(shared, CHAT, n=2, **chat).json()["choices"]
    for choice in choices:
        tokens = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in tokens) == choice["message"]["content"]
        assert all([t["token"] for t in e["top_logprobs"]] == ["alt0", "alt1"] for e in tokens)
    if not words:
        return
    (choice,) = post(shared, COMPLETIONS, prompt=text, max_tokens=9999, logprobs=2).json()[
        "choices"
    ]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] == text
    assert {len(values) for values in logprobs.values()} == {len(logprobs["tokens"])}
    offsets = [0, *itertools.accumulate(map(len, logprobs["tokens"]))]
    assert logprobs["text_offset"] == offsets[:-1]
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    ((part,),) = (
        o["content"] for o in post(shared, RESPONSES, input=text, **asked).json()["output"]
    )
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    *_, last = post(shared, RESPONSES, input=text, stream=True, **asked).text.strip().split("\n\n")
    assert json.loads(last.partition("data: ")[2])["response"]["output"][0]["content"] == [part]
    own = {"prompt": text, "params": {"max_new_tokens": None, "logprobs": 2}}
    whole = InferenceResponse.model_validate(post(shared, NATIVE, **own).json())
    assert whole.logprobs is not None
    assert "".join(entry.token for entry in whole.logprobs) == text
    *_, last = post(shared, NATIVE, stream=True, **own).text.strip().split("\n\n")
    streamed = InferenceResponse.model_validate_json(last.partition("data: ")[2])
    assert streamed.logprobs == whole.logprobs


def test_a_text_that_looks_like_a_field_is_a_text(shared):
    text = 'x "logprobs":null, {"logprobs":null}'
    own = {"prompt": text, "params": {"max_new_tokens": None, "logprobs": 0}}
    response = InferenceResponse.model_validate(post(shared, NATIVE, **own).json())
    assert response.generated_text == text and response.logprobs
    response = InferenceResponse.model_validate(post(shared, NATIVE, prompt=text).json())
    assert response.generated_text == text and response.logprobs is None


@pytest.mark.parametrize("form", ["float", "base64"])
def test_many_vectors_are_whole(start, form):
    class Numbers(TalkHandler):
        def capabilities(self):
            return dataclasses.replace(super().capabilities(), embeddings=True)

        async def embed(self, loaded_model, texts):
            return Embeddings([[float(text)] * 5000 for text in texts], prompt_tokens=len(texts))

    with start(handler=Numbers()) as run:
        texts = [str(number) for number in range(50)]
        answer = post(run, EMBEDDINGS, input=texts, encoding_format=form).json()
    assert [entry["index"] for entry in answer["data"]] == list(range(50))
    for number, entry in enumerate(answer["data"]):
        vector = entry["embedding"]
        if form == "base64":
            vector = list(struct.unpack("<5000f", base64.b64decode(vector)))
        assert vector == [number] * 5000
    assert answer["usage"] == {"prompt_tokens": 50, "total_tokens": 50}


def test_an_echo_of_many_long_prompts_is_refused(start):
    with start(max_body_bytes=100_000) as run:
        long = {"prompt": "x " * 20_000, "echo": True, "max_tokens": 1}
        assert post(run, COMPLETIONS, **long, n=2).status_code == 200
        assert "the echo of all prompts would have 120000" in refused(
            post(run, COMPLETIONS, **long, n=3)
        )


def _lists_in(schema: Any) -> list[dict[str, Any]]:
    """Every list in one of pydantic's core schemas."""
    lists, level, seen = [], [schema], set()
    while level:
        node = level.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            if node.get("type") == "list":
                lists.append(node)
            level += node.values()
        elif isinstance(node, list | tuple):
            level += node
    return lists


def test_every_list_of_a_request_ends_with_its_first_mistake():
    requests = {r.request for api in APIS for r in api.ROUTES if r.request is not None}
    lists = [found for model in requests for found in _lists_in(model.__pydantic_core_schema__)]
    assert len(lists) > 20
    assert not [found for found in lists if not found.get("fail_fast")]
