"""Every real client against an engine that breaks, a server that is full, and one that is slow."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("openai", reason="needs OpenAI's client")
pytest.importorskip("anthropic", reason="needs Anthropic's client")
pytest.importorskip("httpx", reason="needs httpx")

import anthropic
import httpx
import openai

CHAT = "/v1/chat/completions"
BROKEN = "the model's engine has ended"


class Answer:
    """What a client made of it, whichever it is."""

    def __init__(self, text="", status=200, retry_after=None, error="") -> None:
        self.text, self.status = text, status
        self.retry_after, self.error = retry_after, error

    @classmethod
    def of(cls, error, text=""):
        """What an exception of a client of OpenAI's or Anthropic's says."""
        response = getattr(error, "response", None)
        if response is None or response.status_code == 200:
            return cls(text, 200, error=str(error))
        headers = response.headers
        return cls(text, response.status_code, headers.get("retry-after"), str(error))


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def openai_sync(url: str, text: str, retries: int) -> Answer:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=retries) as client:
        try:
            answer = client.chat.completions.create(model="m", messages=messages(text))
        except openai.APIError as error:
            return Answer.of(error)
    return Answer(answer.choices[0].message.content)


def openai_async(url: str, text: str, retries: int) -> Answer:
    async def ask() -> Answer:
        key = {"base_url": f"{url}/v1", "api_key": "x", "max_retries": retries}
        async with openai.AsyncOpenAI(**key) as client:
            try:
                answer = await client.chat.completions.create(model="m", messages=messages(text))
            except openai.APIError as error:
                return Answer.of(error)
        return Answer(answer.choices[0].message.content)

    return asyncio.run(ask())


def openai_stream(url: str, text: str, retries: int) -> Answer:
    got = ""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=retries) as client:
        try:
            for chunk in client.chat.completions.create(
                model="m", messages=messages(text), stream=True
            ):
                got += chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            return Answer.of(error, got)
    return Answer(got)


def openai_async_stream(url: str, text: str, retries: int) -> Answer:
    async def ask() -> Answer:
        got = ""
        key = {"base_url": f"{url}/v1", "api_key": "x", "max_retries": retries}
        async with openai.AsyncOpenAI(**key) as client:
            try:
                stream = await client.completions.create(
                    model="m", prompt=text, stream=True, max_tokens=999
                )
                async for chunk in stream:
                    got += chunk.choices[0].text
            except openai.APIError as error:
                return Answer.of(error, got)
        return Answer(got)

    return asyncio.run(ask())


def openai_raw(url: str, text: str, retries: int) -> Answer:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=retries) as client:
        raw = client.chat.completions.with_raw_response
        try:
            answer = raw.create(model="m", messages=messages(text)).parse()
        except openai.APIError as error:
            return Answer.of(error)
    return Answer(answer.choices[0].message.content)


def openai_responses(url: str, text: str, retries: int) -> Answer:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=retries) as client:
        try:
            return Answer(client.responses.create(model="m", input=text).output_text)
        except openai.APIError as error:
            return Answer.of(error)


def anthropic_sync(url: str, text: str, retries: int) -> Answer:
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=retries) as client:
        try:
            answer = client.messages.create(model="m", max_tokens=99, messages=messages(text))
        except anthropic.APIError as error:
            return Answer.of(error)
    return Answer(answer.content[0].text)


def anthropic_stream(url: str, text: str, retries: int) -> Answer:
    got = ""
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=retries) as client:
        try:
            with client.messages.stream(
                model="m", max_tokens=99, messages=messages(text)
            ) as stream:
                for piece in stream.text_stream:
                    got += piece
        except anthropic.APIError as error:
            return Answer.of(error, got)
    return Answer(got)


def _of_http(status: int, retry_after: str | None, body: str) -> Answer:
    if status != 200:
        return Answer("", status, retry_after, json.loads(body)["error"]["message"])
    if not body.startswith(("data: ", ": ping")):
        return Answer(json.loads(body)["choices"][0]["message"]["content"])
    lines = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    text = "".join(c["delta"].get("content") or "" for e in events for c in e.get("choices", ()))
    errors = [e["error"]["message"] for e in events if "error" in e]
    return Answer(text, error="".join(errors))


def httpx_whole(url: str, text: str, retries: int, stream: bool = False) -> Answer:
    body = {"model": "m", "messages": messages(text), "stream": stream}
    answer = httpx.post(url + CHAT, json=body, timeout=60)
    return _of_http(answer.status_code, answer.headers.get("retry-after"), answer.text)


def httpx_stream(url: str, text: str, retries: int) -> Answer:
    return httpx_whole(url, text, retries, stream=True)


def curl(url: str, text: str, retries: int, stream: bool = False) -> Answer:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    body = json.dumps({"model": "m", "messages": messages(text), "stream": stream})
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "60"]
    command += ["--retry", str(retries), "-w", "%{http_code} %header{retry-after}"]
    command += ["-H", "content-type: application/json", "--data-binary", "@-", url + CHAT]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answer")  # a retry begins it anew
        command += ["--output", str(file)]
        done = subprocess.run(command, input=body.encode(), capture_output=True, check=True)
        said = file.read_text(encoding="utf-8")
    status, _, retry_after = done.stdout.decode().strip().partition(" ")
    return _of_http(int(status), retry_after or None, said)


def curl_stream(url: str, text: str, retries: int) -> Answer:
    return curl(url, text, retries, stream=True)


WHOLE = [openai_sync, openai_async, openai_raw, openai_responses, anthropic_sync, httpx_whole, curl]
STREAMS = [openai_stream, openai_async_stream, anthropic_stream, httpx_stream, curl_stream]
RETRYING = [
    openai_sync, openai_async, openai_raw, openai_stream, openai_responses, anthropic_sync,
    anthropic_stream, curl,
]  # fmt: skip


def named(clients):
    return pytest.mark.parametrize("client", clients, ids=lambda client: client.__name__)


# ── an engine that is dead, or dies ──────────────────────────────────────────────────────────


@named([*WHOLE, *STREAMS])
def test_a_dead_engine_is_503_before_the_first_text(shared, client):
    answer = client(shared.url, "one !dead", 0)
    assert answer.status == 503 and answer.text == "" and answer.retry_after == "1"
    assert BROKEN in answer.error and "/opt/engine" not in answer.error


@named(WHOLE)
def test_an_engine_that_dies_midway_gives_no_half_answer(shared, client):
    answer = client(shared.url, "one two !die four", 0)
    assert answer.status == 503 and answer.text == "" and BROKEN in answer.error


@named(STREAMS)
def test_an_engine_that_dies_midway_ends_the_stream_with_an_error(shared, client):
    answer = client(shared.url, "one two !die four", 2)
    assert answer.status == 200 and answer.text == "one two"
    assert BROKEN in answer.error and "/opt/engine" not in answer.error
    assert client(shared.url, "and on", 0).text == "and on"


@named(RETRYING)
def test_a_clients_own_retries_find_the_engine_that_lives_again(shared, client):
    shared.handler.deaths, begun = 1, shared.handler.begun
    answer = client(shared.url, "now !mortal", 2)
    assert (answer.status, answer.text, answer.error) == (200, "now !mortal", "")
    assert shared.handler.begun == begun + 2


# ── a server that is full ────────────────────────────────────────────────────────────────────


@pytest.fixture
def full(start):
    """A server with one place and no queue; who holds the place goes when ``release`` is called."""
    with start(max_running=1, max_queued=0) as run:
        body = {"model": "m", "messages": messages("!wait"), "stream": True}
        holder = threading.Thread(target=lambda: httpx.post(run.url + CHAT, json=body, timeout=60))
        holder.start()
        run.until(lambda: run.handler.running == 1, "the place is taken")
        run.release = lambda: run.loop.call_soon_threadsafe(run.handler.gate.set)
        try:
            yield run
        finally:
            run.release()
            holder.join()


@named([*WHOLE, *STREAMS])
def test_a_full_server_says_when_to_try_again(full, client):
    answer = client(full.url, "one", 0)
    assert (answer.status, answer.retry_after) == (429, "1")
    assert "queue" in answer.error
    assert full.handler.begun == 1


@named(RETRYING)
def test_a_clients_own_retries_get_in_when_there_is_room(full, client):
    # The place becomes free once the client was refused.
    registry = full.server.context.service.registry
    notify = registry.notify

    def noted(hook, **what):
        notify(hook, **what)
        if hook == "engineroom_request_rejected":
            full.handler.gate.set()

    registry.notify = noted
    answer = client(full.url, "after all", 5)
    assert (answer.status, answer.text, answer.error) == (200, "after all", "")


@named([openai_sync, openai_stream, anthropic_sync, httpx_whole])
def test_a_full_engine_says_when_to_try_again(start, client):
    with start(max_requests=1) as run:
        body = {"model": "m", "messages": messages("!wait")}
        holder = threading.Thread(target=lambda: httpx.post(run.url + CHAT, json=body, timeout=60))
        holder.start()
        try:
            run.until(lambda: run.handler.running == 1, "the place is taken")
            answer = client(run.url, "one", 0)
            assert (answer.status, answer.retry_after) == (429, "1")
        finally:
            run.loop.call_soon_threadsafe(run.handler.gate.set)
            holder.join()


@named([*WHOLE, *STREAMS])
def test_a_server_that_stops_sends_clients_elsewhere(shared, client):
    begun = shared.handler.begun
    shared.server.context.draining = True
    try:
        answer = client(shared.url, "one", 0)
    finally:
        shared.server.context.draining = False
    assert (answer.status, answer.retry_after) == (503, "5")
    assert shared.handler.begun == begun


# ── a server that is slow ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2])
def test_a_silent_stream_has_a_comment_now_and_then(start, n):
    with start(heartbeat_s=0.05) as run:
        body = {"model": "m", "messages": messages("!wait one"), "stream": True, "n": n}
        with httpx.stream("POST", run.url + CHAT, json=body, timeout=60) as answer:
            assert answer.status_code == 200  # before there is any text
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
            run.loop.call_soon_threadsafe(run.handler.gate.set)
            rest = "\n".join(line for line in lines if line != ": ping").lstrip()
        assert _of_http(200, None, rest).text == "!wait one" * n or n == 2
        assert rest.count('"role":"assistant"') == n and rest.endswith("data: [DONE]\n")


def test_no_comment_where_none_is_wanted(start):
    with start(heartbeat_s=0) as run:
        body = {"model": "m", "messages": messages("!wait one"), "stream": True}
        timer = threading.Timer(0.3, run.loop.call_soon_threadsafe, [run.handler.gate.set])
        timer.start()
        answer = httpx.post(run.url + CHAT, json=body, timeout=60)
        assert "ping" not in answer.text and "[DONE]" in answer.text


@named(STREAMS)
@pytest.mark.parametrize("word", ["", "!dead"])
def test_clients_skip_the_comments(start, client, word, monkeypatch):
    from engineroom.server.http import heartbeat

    pings = 0

    class Counting(heartbeat.Heartbeat):
        async def _send(self):
            nonlocal pings
            await super()._send()
            pings += 1
            if pings == 3:
                run.handler.gate.set()

    monkeypatch.setattr("engineroom.server.http.exchange.Heartbeat", Counting)
    with start(heartbeat_s=0.02) as run:
        answer = client(run.url, f"!wait two {word}".strip(), 0)
    assert pings >= 3 and answer.status == 200
    if word:
        assert answer.text == "" and BROKEN in answer.error
    else:
        assert (answer.text, answer.error) == ("!wait two", "")


def test_a_client_that_goes_away_between_comments_frees_its_slot(start):
    with start(heartbeat_s=0.02) as run:
        body = {"model": "m", "messages": messages("!hang"), "stream": True}
        with httpx.stream("POST", run.url + CHAT, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": ping"
            assert run.handler.running == 1
        run.until(lambda: run.handler.running == 0, "the slot is free")


# ── the bytes on the wire, whichever way they take ───────────────────────────────────────────


@pytest.mark.parametrize("origins", [(), ("*",)])
def test_a_stream_is_the_same_with_each_parser(start, each_parser, origins):
    text = "one äöü 🦜 two " * 20
    headers = {"origin": "http://a.example"} if origins else {}
    with start(cors_origins=origins) as run:
        for client in STREAMS:
            assert client(run.url, text, 0).text == text
        body = {"model": "m", "messages": messages("one"), "stream": True}
        with httpx.Client() as one:  # the connection goes on to be used
            for _ in range(2):
                answer = one.post(run.url + CHAT, json=body, headers=headers)
                assert answer.text.endswith("data: [DONE]\n\n")
                assert ("access-control-allow-origin" in answer.headers) == bool(origins)
            assert len(run.server.server_state.connections) == 1
