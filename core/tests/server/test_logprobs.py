"""Log probabilities on the wire where tokens are halves of characters, in every API."""

from __future__ import annotations

import gc
import json
from typing import Any, ClassVar

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from server_doubles import TalkHandler

from engineroom import TokenLogprob, TokenStep
from engineroom.engine import logprob_maker
from engineroom.server.apis.openai_logprobs import ENTRIES, encoded, listed
from engineroom.server.http.rounds import Rounds

TEXT = "é 🌸x"
PIECES = (b"\xc3", b"\xa9", b" ", b"\xf0\x9f", b"\x8c", b"\xb8", b"x")
SHOWN = [r"bytes:\xc3", r"bytes:\xa9", " ", r"bytes:\xf0\x9f", r"bytes:\x8c", r"bytes:\xb8", "x"]


class HalvesHandler(TalkHandler):
    """A fake runtime: whatever is asked, it says a text in pieces of characters."""

    knows_bytes: ClassVar[bool] = True

    async def generate_tokens(self, loaded_model, request):
        make = logprob_maker(PIECES.__getitem__)
        yield TokenStep(prompt_tokens=1)
        for token, piece in enumerate(PIECES):
            step = TokenStep((token,), piece)
            if (top := request.params.logprobs) is not None:
                likeliest = [(t, -0.5 - t) for t in range(min(top, len(PIECES)))]
                entry = make(token, -0.5, likeliest)
                if not self.knows_bytes:
                    entry = entry.model_copy(update={"bytes": None, "top_bytes": None})
                step.logprobs = (entry,)
            yield step
        yield TokenStep(finish="eos_token")


class TextsHandler(HalvesHandler):
    """The same, of a runtime that tells only texts."""

    knows_bytes: ClassVar[bool] = False


@pytest.fixture(scope="module")
def halves(start):
    with start(handler=HalvesHandler()) as run:
        yield run


def ask(run: Any, path: str, **body: Any) -> list[Any]:
    """The answer, or what its events say."""
    answer = httpx.post(run.url + path, json={"model": "m", **body})
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return [answer.json()]
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return list(map(json.loads, lines))


CHAT = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}


@pytest.mark.parametrize("stream", [False, True])
def test_chat_has_the_bytes_of_halves(halves, stream):
    parts = ask(halves, "/v1/chat/completions", **CHAT, top_logprobs=5, stream=stream)
    choices = [part["choices"][0] for part in parts]
    entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert [bytes(entry["bytes"]) for entry in entries] == [*PIECES]
    assert [bytes(top["bytes"]) for top in entries[0]["top_logprobs"]] == [*PIECES[:5]]
    texts = [(c["delta"] if stream else c["message"]).get("content") or "" for c in choices]
    assert "".join(texts) == TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_completions_write_halves_as_bytes(halves, stream):
    """So that one is not taken for another; the offsets are those of characters."""
    parts = ask(halves, "/v1/completions", prompt="x", logprobs=7, stream=stream)
    found = [c["logprobs"] for part in parts for c in part["choices"] if c["logprobs"]]
    assert [token for part in found for token in part["tokens"]] == SHOWN
    offsets = [offset for part in found for offset in part["text_offset"]]
    assert offsets == [0, 0, 1, 2, 2, 2, 3]
    assert [TEXT[offset] for offset in offsets] == ["é", "é", " ", "🌸", "🌸", "🌸", "x"]
    assert [*found[0]["top_logprobs"][0]] == SHOWN


@pytest.mark.parametrize("stream", [False, True])
def test_responses_have_the_bytes_of_halves(halves, stream):
    include = ["message.output_text.logprobs"]
    parts = ask(halves, "/v1/responses", input="x", include=include, top_logprobs=3, stream=stream)
    whole = parts[-1]["response"] if stream else parts[-1]
    (part,) = whole["output"][0]["content"]
    assert part["text"] == TEXT
    assert [bytes(entry["bytes"]) for entry in part["logprobs"]] == [*PIECES]
    if stream:
        deltas = [p for p in parts if p["type"] == "response.output_text.delta"]
        assert [bytes(e["bytes"]) for d in deltas for e in d["logprobs"]] == [*PIECES]


def test_the_own_api_has_the_bytes_of_halves(halves):
    body = {"model_id": "m", "prompt": "x", "params": {"logprobs": 2}}
    answer = httpx.post(halves.url + "/v1/inference", json=body).json()
    assert [bytes(entry["bytes"]) for entry in answer["logprobs"]] == [*PIECES]
    assert answer["logprobs"][0]["top_bytes"] == [[0xC3], [0xA9]]


def test_bytes_that_nobody_knows_are_not_made_up(start):
    with start(handler=TextsHandler()) as run:
        (answer,) = ask(run, "/v1/chat/completions", **CHAT, top_logprobs=3, stream=False)
        (other,) = ask(run, "/v1/completions", prompt="x", logprobs=0, stream=False)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries] == [None, None, [32], None, None, None, [120]]
    assert [top["bytes"] for top in entries[0]["top_logprobs"]] == [None, None, [32]]
    assert other["choices"][0]["logprobs"]["tokens"][0] == "�"


def test_more_alternatives_than_twenty_are_refused(halves):
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 21}),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}),
        ("/v1/responses", {"input": "x", "top_logprobs": 21}),
    ):
        answer = httpx.post(halves.url + path, json={"model": "m", **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in ("top_logprobs", "logprobs")


def test_entries_are_made_of_bytes():
    entry = logprob_maker(PIECES.__getitem__)(0, -1.0, [(1, -0.5), (6, -2.0)])
    assert entry == TokenLogprob(
        token_id=0,
        token="�",
        logprob=-1.0,
        top=[(1, "�", -0.5), (6, "x", -2.0)],
        bytes=(0xC3,),
        top_bytes=((0xA9,), (0x78,)),
    )


def test_the_collector_has_little_to_walk_over() -> None:
    """A long answer with many alternatives would hold up everybody while it is walked over."""
    make = logprob_maker(lambda token: b"abc")
    gc.collect()
    before = len(gc.get_objects())
    entries = [make(1, -0.5, [(i, -float(i)) for i in range(20)]) for _ in range(100)]
    gc.collect()
    assert len(gc.get_objects()) - before < 3 * len(entries)


async def test_entries_are_let_go_of_as_they_are_encoded() -> None:
    """All at once would take as long as a round of the loop may."""
    alive: list[int] = []

    class Entry(TokenLogprob):
        def __del__(self) -> None:
            alive.remove(self.token_id)

    class Counting(Rounds):
        async def next(self) -> None:
            left.append(len(alive))

    left: list[int] = []
    alive += range(5 * ENTRIES)
    entries = [Entry(token_id=i, token="a", logprob=-0.5) for i in alive]
    body = await encoded(Counting(), entries)
    assert len(json.loads(bytes(listed(body)))) == 5 * ENTRIES
    assert left == [n * ENTRIES for n in (5, 4, 3, 2, 1)] and not alive
