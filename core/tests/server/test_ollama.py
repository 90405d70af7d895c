"""Ollama's API on the wire: each field, whole and streamed, and by Ollama's own client."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("ollama", reason="needs Ollama's client")

import httpx
import ollama
from tool_doubles import ARGUMENTS, CALL, SECOND, THOUGHT, TOOLS

SAY = [{"role": "user", "content": "one two three"}]
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
COUNTS = ("prompt_eval_count", "eval_count")
WARNING = "x-engineroom-warning"


@pytest.fixture(scope="module")
def client(shared: Any) -> Any:
    with ollama.Client(shared.url) as client:
        yield client


def post(run: Any, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{run.url}/api/{path}", json={"model": "m", **body}, timeout=20)


def has_null(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(has_null, value.values() if isinstance(value, dict) else value))
    return value is None


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n") and "\n\n" not in answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def ask_both(run: Any, path: str, **body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the lines of the streamed one, which say the same."""
    whole = post(run, path, **body, stream=False)
    assert whole.status_code == 200, whole.text
    assert whole.headers["content-type"] == "application/json"
    streamed = lines(post(run, path, **body))
    *pieces, last = streamed
    assert not any(piece["done"] for piece in pieces)
    once = whole.json()
    held = ollama.ChatResponse if path == "chat" else ollama.GenerateResponse
    for answer in (once, *streamed):
        held.model_validate(answer, strict=True)
        assert not has_null(answer), answer  # its Go types leave out what there is not
    for answer in (once, last):
        assert answer["done"] and answer["done_reason"] in ("stop", "length")
    timeless = {"created_at", "message", "response", "thinking", "logprobs", *DURATIONS}
    assert {k: v for k, v in once.items() if k not in timeless} == {
        k: v for k, v in last.items() if k not in timeless
    }
    return once, streamed


# ── answers ──────────────────────────────────────────────────────────────────────────────────


def test_a_conversation_has_all_that_ollamas_has(shared):
    once, streamed = ask_both(shared, "chat", messages=SAY)
    assert once["message"] == {"role": "assistant", "content": "one two three"}
    assert [each["message"] for each in streamed] == [
        {"role": "assistant", "content": text} for text in ("one", " two", " three", "")
    ]
    for answer in (once, streamed[-1]):
        assert set(answer) == {
            "model", "created_at", "message", "done", "done_reason", *DURATIONS, *COUNTS,
        }  # fmt: skip
        assert (answer["model"], answer["done_reason"]) == ("m", "stop")
        assert (answer["prompt_eval_count"], answer["eval_count"]) == (3, 3)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", answer["created_at"])
        parts = [answer[name] for name in DURATIONS]
        assert all(isinstance(part, int) and part >= 0 for part in parts)
        assert sum(parts[1:]) <= parts[0]
    assert set(streamed[0]) == {"model", "created_at", "message", "done"}


def test_a_prompt_is_a_message_and_raw_as_it_stands(shared):
    once, streamed = ask_both(shared, "generate", prompt="one two", system="be brief")
    assert once["response"] == "".join(each["response"] for each in streamed) == "one two"
    roles = [(m.role, m.content) for m in shared.handler.seen[-1].messages]
    assert roles == [("system", "be brief"), ("user", "one two")]
    assert "message" not in once and "context" not in once
    once, _ = ask_both(shared, "generate", prompt="one two", raw=True)
    assert once["response"] == "one two" and shared.handler.seen[-1].prompt == "one two"


def test_thoughts_and_calls_are_told_when_they_are_whole(run):
    run.handler.script = [*THOUGHT, "hm", *CALL, *SECOND]
    run.handler.finish = "tool_calls"
    once, streamed = ask_both(run, "chat", messages=SAY, tools=TOOLS, think=True)
    calls = [
        {
            "id": "call_1",
            "function": {"index": 0, "name": "weather", "arguments": json.loads(ARGUMENTS)},
        },
        {"id": "call_2", "function": {"index": 1, "name": "time", "arguments": {}}},
    ]
    assert once["message"] == {
        "role": "assistant", "content": "hm", "thinking": "let me think", "tool_calls": calls,
    }  # fmt: skip
    assert once["done_reason"] == "stop"
    assert [{k: v for k, v in each["message"].items() if k != "role"} for each in streamed] == [
        {"content": "", "thinking": "let me"},
        {"content": "", "thinking": " think"},
        {"content": "hm"},
        {"content": "", "tool_calls": calls[:1]},
        {"content": "", "tool_calls": calls[1:]},
        {"content": ""},
    ]
    request = run.handler.seen[-1]
    assert request.reasoning is True and len(request.tools) == 2
    # Of what is not known nothing is told: this handler does not say when its first token came.
    assert "eval_duration" not in once


def test_a_call_that_the_end_cuts_is_none(run):
    run.handler.script, run.handler.finish, run.handler.cut = [*CALL, *SECOND], "length", True
    try:
        once, streamed = ask_both(run, "chat", messages=SAY, tools=TOOLS)
    finally:
        run.handler.cut = False
    assert [call["function"]["name"] for call in once["message"]["tool_calls"]] == ["weather"]
    told = [call for each in streamed for call in each["message"].get("tool_calls", ())]
    assert told == once["message"]["tool_calls"] and once["done_reason"] == "length"


def test_thoughts_of_a_prompt(run):
    run.handler.script, run.handler.finish = [*THOUGHT, "yes"], "eos_token"
    once, streamed = ask_both(run, "generate", prompt="x", think="high")
    assert (once["response"], once["thinking"]) == ("yes", "let me think")
    assert [each.get("thinking") for each in streamed] == ["let me", " think", None, None]
    assert run.handler.seen[-1].reasoning == "high"
    ask_both(run, "generate", prompt="x", think="max")
    assert run.handler.seen[-1].reasoning == "high"


@pytest.mark.parametrize("path", ["chat", "generate"])
def test_log_probabilities(shared, path):
    asked = {"messages": SAY} if path == "chat" else {"prompt": "one two three"}
    once, streamed = ask_both(shared, path, **asked, logprobs=True, top_logprobs=2)
    assert [entry["token"] for entry in once["logprobs"]] == ["one", " two", " three"]
    assert once["logprobs"] == [entry for each in streamed for entry in each.get("logprobs", ())]
    assert once["logprobs"][0] == {
        "token": "one", "logprob": -0.5, "bytes": [111, 110, 101],
        "top_logprobs": [
            {"token": "alt0", "logprob": -1.0, "bytes": [97, 108, 116, 48]},
            {"token": "alt1", "logprob": -2.0, "bytes": [97, 108, 116, 49]},
        ],
    }  # fmt: skip
    once, _ = ask_both(shared, path, **asked, logprobs=True)
    assert "top_logprobs" not in once["logprobs"][0]
    once, _ = ask_both(shared, path, **asked, top_logprobs=3)
    assert "logprobs" not in once


# ── what is asked ────────────────────────────────────────────────────────────────────────────


def test_the_options_are_those_of_generation(shared):
    options = {
        "temperature": 0.5, "top_k": 5, "top_p": 0.7, "min_p": 0.1, "seed": 7.0, "num_predict": 2,
        "stop": ["three"], "repeat_penalty": 1.1, "repeat_last_n": -1, "presence_penalty": 0.2,
        "frequency_penalty": -0.3, "mirostat": 0, "typical_p": 1.0, "num_keep": 4,
        "mirostat_tau": 5.0, "num_ctx": 4096,
    }  # fmt: skip
    answer = post(shared, "chat", messages=SAY, options=options)
    assert lines(answer)[-1]["done_reason"] == "length" and WARNING not in answer.headers
    request = shared.handler.seen[-1]
    assert request.stop_sequences == ["three"]
    asked = request.params.model_dump()
    assert {
        "temperature": 0.5, "top_k": 5, "top_p": 0.7, "min_p": 0.1, "seed": 7, "max_new_tokens": 2,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3,
    }.items() <= asked.items()  # fmt: skip


def test_what_is_not_said_is_as_at_ollama(shared):
    post(shared, "chat", messages=SAY)
    params = shared.handler.seen[-1].params
    assert (params.temperature, params.top_k, params.top_p) == (0.8, 40, 0.9)
    assert params.max_new_tokens is None and params.seed is None
    neutral = {"num_predict": -1, "seed": -1, "top_k": -1, "temperature": None, "stop": []}
    post(shared, "chat", messages=SAY, options=neutral | {"repeat_last_n": 0, "repeat_penalty": 2})
    params = shared.handler.seen[-1].params
    assert params.max_new_tokens is None and params.seed is None and params.top_k == 0
    assert params.repetition_penalty is None and params.temperature == 0.8
    post(shared, "chat", messages=SAY, options={"num_predict": -2})
    assert shared.handler.seen[-1].params.max_new_tokens is None


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"options": {"num_ctx": 99999}}, "num_ctx changed nothing.*4096"),
        ({"options": {"num_gpu": 1, "num_thread": 2}}, r"options\.num_gpu, options\.num_thread"),
        ({"options": {"repeat_penalty": 1.5, "repeat_last_n": 64}}, "repeat_last_n was ignored"),
        ({"options": {"repeat_penalty": 1.5, "penalize_newline": False}}, "penalize_newline"),
        ({"keep_alive": "5m"}, "keep_alive changed nothing: the deployment says"),
        ({"keep_alive": 0}, "keep_alive changed nothing"),
        ({"truncate": True}, "truncate changed nothing"),
        ({"shift": True}, "shift changed nothing"),
    ],
)
def test_what_is_asked_in_vain_is_told(shared, body, told):
    for stream in (False, True):
        answer = post(shared, "chat", messages=SAY, stream=stream, **body)
        assert answer.status_code == 200
        assert re.search(told, answer.headers[WARNING])


def test_what_asks_for_nothing_is_not_told(shared):
    neutral = {"keep_alive": -1, "truncate": False, "shift": False, "format": ""}
    answer = post(shared, "chat", messages=SAY, **neutral, options={"repeat_last_n": 64})
    assert answer.status_code == 200 and WARNING not in answer.headers
    neutral = {"suffix": "", "template": "", "context": [], "images": [], "system": ""}
    answer = post(shared, "generate", prompt="x", **neutral)
    assert answer.status_code == 200 and WARNING not in answer.headers


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("chat", {"options": {"mirostat": 2}}, r"options\.mirostat is not supported"),
        ("chat", {"options": {"typical_p": 0.5}}, r"options\.typical_p is not supported"),
        ("chat", {"options": {"temperature": 9}}, r"options\.temperature: .*\(it is 9\)"),
        ("chat", {"options": {"num_predict": 0}}, r"options\.num_predict"),
        ("chat", {"options": []}, "options"),
        ("chat", {"temperature": 0.5}, r"temperature is not supported.*use options\.temperature"),
        ("chat", {"response_format": {"type": "json_object"}}, "use format"),
        ("chat", {"tool_choice": "required"}, "tool_choice is not supported"),
        ("chat", {"keep_alive": "5 minutes"}, "keep_alive: must be seconds or a duration"),
        ("chat", {"format": "yaml"}, "format"),
        ("chat", {"think": "a bit"}, "think"),
        ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("chat", {"messages": [SAY[0] | {"images": ["aGk="]}]}, r"messages\.0\.images: images"),
        ("chat", {"messages": [{"role": "nobody", "content": "x"}]}, "role"),
        ("generate", {"prompt": "x", "images": ["aGk="]}, "images is not supported"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template is not supported"),
        ("generate", {"prompt": "x", "context": [1, 2]}, "context is not supported.*/api/chat"),
        ("generate", {"prompt": "x", "raw": True, "system": "s"}, "raw mode does not support"),
        ("generate", {"prompt": "x", "raw": True, "think": True}, "think beside raw"),
        ("embed", {"input": [1]}, "input"),
        ("embed", {"input": "x"}, "makes no embeddings"),
        ("embeddings", {"prompt": "x"}, "makes no embeddings"),
        ("show", {"model": None}, "model is required"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(shared, path, body, told):
    messages = {"messages": SAY} if path == "chat" else {}
    answer = post(shared, path, **{**messages, **body})
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"} and re.search(told, answer.json()["error"])


def test_unknown_fields_and_options_are_refused_where_the_server_says_so(start):
    with start(unknown_fields="refuse") as run:
        for body in ({"whatever": 1}, {"options": {"whatever": 1}}):
            answer = post(run, "chat", messages=SAY, **body)
            assert answer.status_code == 400 and "'whatever'" in answer.json()["error"]


def test_a_history_of_calls_without_ids(run):
    run.handler.script, run.handler.finish = ["yes"], "eos_token"
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    other = {"function": {"name": "time", "arguments": {}}}
    history = [
        *SAY,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call, other, call]},
        {"role": "tool", "tool_name": "time", "content": "noon"},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "tool_name": "weather", "content": "snow"},
        {"role": "TOOL", "tool_call_id": "mine", "content": "?"},
    ]
    answer = post(run, "chat", messages=history, tools=TOOLS, stream=False)
    assert answer.status_code == 200, answer.text
    _, made, *results = run.handler.seen[-1].messages
    assert made.content is None and made.reasoning == "hm"
    assert [c["function"]["arguments"] for c in made.tool_calls][:2] == ['{"city":"Oslo"}', "{}"]
    ids = [c["id"] for c in made.tool_calls]
    assert len(set(ids)) == 3
    assert [r.tool_call_id for r in results] == [ids[1], ids[0], ids[2], "mine"]
    assert results[0].name == "time"


def test_a_form(run):
    run.handler.script = ["{}"]
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    for form, kind in (("json", "json_object"), (schema, "json_schema")):
        ask_both(run, "chat", messages=SAY, format=form)
        assert run.handler.seen[-1].params.structured_output.kind == kind
    assert run.handler.seen[-1].params.structured_output.json_schema == schema


# ── names, loads, errors ─────────────────────────────────────────────────────────────────────


def test_a_name_may_end_with_its_version(shared):
    for name in ("m:latest", "default", "default:latest"):
        once, streamed = ask_both(shared, "chat", model=name, messages=SAY)
        assert once["model"] == streamed[0]["model"] == name
        assert shared.handler.seen[-1].model_id == name.removesuffix(":latest")


@pytest.mark.parametrize("path", ["chat", "generate", "embed", "embeddings", "show"])
def test_an_unknown_model(shared, path):
    answer = post(shared, path, model="nobody")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("model 'nobody' not found")


def test_a_failure_before_the_first_text_has_its_status_and_one_after_it_is_a_line(shared):
    answer = post(shared, "chat", messages=[{"role": "user", "content": "!refuse"}])
    assert answer.status_code == 400 and "9000 tokens" in answer.json()["error"]
    said = lines(post(shared, "chat", messages=[{"role": "user", "content": "a b !break d"}]))
    assert [each.get("message", {}).get("content") for each in said] == ["a", " b", None]
    assert set(said[-1]) == {"error"}
    answer = post(shared, "chat", stream=False, messages=[{"role": "user", "content": "a !fail"}])
    assert answer.status_code == 500 and set(answer.json()) == {"error"}


def test_a_sign_of_life_is_a_line_like_any_other(start):
    with start(heartbeat_s=0.02) as run:
        body = {"model": "m", "messages": [{"role": "user", "content": "!wait one"}]}
        with httpx.stream("POST", f"{run.url}/api/chat", json=body) as answer:
            read = answer.iter_lines()
            first = json.loads(next(read))
            assert first["message"] == {"role": "assistant", "content": ""} and not first["done"]
            run.call(run.handler.gate.set)
            rest = [json.loads(line) for line in read]
        assert "".join(each["message"]["content"] for each in rest) == "!wait one"


def test_a_client_that_goes_away_stops_the_work(start):
    with start() as run:
        body = {"model": "m", "prompt": "!drip", "raw": True}
        with httpx.stream("POST", f"{run.url}/api/generate", json=body) as answer:
            next(answer.iter_lines())
        run.until(lambda: run.handler.running == 0, "stopped")


def test_nothing_to_answer_loads_and_unloads(start):
    with start(models=[{"model_id": "m", "source": "talk:", "preload": False}]) as run:
        state = lambda: run.manager.list_models()[0].state  # noqa: E731
        assert state() == "unloaded" and httpx.get(f"{run.url}/api/ps").json() == {"models": []}
        answer = post(run, "generate", keep_alive="1h")
        assert "keep_alive changed nothing" in answer.headers[WARNING]
        said = answer.json()
        assert (said["response"], said["done"], said["done_reason"]) == ("", True, "load")
        assert state() == "ready"
        said = post(run, "chat", messages=[], keep_alive="0s", stream=True).json()
        assert said["message"] == {"role": "assistant", "content": ""}
        assert said["done_reason"] == "unload" and state() == "unloaded"
        assert post(run, "embed", input=[]).json() == {"model": "m", "embeddings": []}
        assert state() == "ready"
        post(run, "embeddings", keep_alive=0)
        assert state() == "unloaded"


def test_only_an_admin_unloads(start):
    from engineroom.server.keys import KeyRing

    keys = KeyRing([("ann", "k" * 20)], [("root", "r" * 20)])
    with start(keys=keys) as run:
        url, body = f"{run.url}/api/generate", {"model": "m", "keep_alive": 0}
        assert httpx.get(f"{run.url}/").text == "Ollama is running"
        assert set(httpx.get(f"{run.url}/api/tags").json()) == {"error"}
        answer = httpx.post(url, json=body, headers={"authorization": "Bearer " + "k" * 20})
        assert answer.status_code == 403 and "admin key" in answer.json()["error"]
        answer = httpx.post(url, json=body, headers={"authorization": "Bearer " + "r" * 20})
        assert answer.json()["done_reason"] == "unload"


# ── vectors ──────────────────────────────────────────────────────────────────────────────────


def test_texts_into_vectors_of_length_one(start):
    from engineroom.testing import EchoHandler

    models = [{"model_id": "m", "source": "echo:"}]
    with start(models=models, handler=EchoHandler()) as run, ollama.Client(run.url) as client:
        made = client.embed("m", ["one two", "three"], options={"num_ctx": 1})
        assert len(made.embeddings) == 2 and made.prompt_eval_count > 0
        for vector in made.embeddings:
            assert sum(number * number for number in vector) == pytest.approx(1)
        (alone,) = client.embed("m:latest", "three").embeddings
        assert alone == pytest.approx(made.embeddings[1])
        assert client.show("m").capabilities == ["embedding"]
        older = client.embeddings("m", "three").embedding
        plain = httpx.post(f"{run.url}/v1/embeddings", json={"model": "m", "input": "three"})
        assert older == plain.json()["data"][0]["embedding"]
        answer = post(run, "embed", input="three", truncate=True, dimensions=0)
        assert "truncate changed nothing" in answer.headers[WARNING]
        body = answer.json()
        assert set(body) == {"model", "embeddings", "total_duration", "prompt_eval_count"}
        answer = post(run, "embed", input="three", dimensions=len(older) - 1)
        assert answer.status_code == 400 and "dimensions" in answer.json()["error"]
        assert post(run, "embed", input=["x", ""]).status_code == 400


# ── models ───────────────────────────────────────────────────────────────────────────────────


def test_the_models_and_what_is_known_of_them(start, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_file_type(7)
    writer.add_chat_template("{{ messages }}")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("x", numpy.zeros((1000, 1200), dtype=numpy.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    from server_doubles import TalkHandler

    class OnFiles(TalkHandler):
        def can_load(self, config):
            return True

    models = [
        {"model_id": "m", "source": str(path), "aliases": ["default", "a:b"], "keep_alive": 60},
        {"model_id": "other", "source": "elsewhere:", "preload": False},
    ]
    with start(models=models, handler=OnFiles()) as run, ollama.Client(run.url) as client:
        listed = httpx.get(f"{run.url}/api/tags").json()["models"]
        assert [each["name"] for each in listed] == [
            "m:latest", "default:latest", "a:b", "other:latest",
        ]  # fmt: skip
        size = path.stat().st_size
        assert listed[0] | {"digest": ""} == {
            "name": "m:latest", "model": "m:latest", "modified_at": listed[0]["modified_at"],
            "size": size, "digest": "", "capabilities": ["completion", "tools"],
            "details": {
                "parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"],
                "parameter_size": "1.20M", "quantization_level": "Q8_0",
                "context_length": 2048, "embedding_length": 64,
            },
        }  # fmt: skip
        assert re.fullmatch("[0-9a-f]{64}", listed[0]["digest"])
        assert "size" not in listed[3] and "modified_at" not in listed[3]
        assert listed[3]["details"]["family"] == ""
        assert client.list().models[0].size == size
        shown = client.show("default")
        assert shown.template == "{{ messages }}" and shown.details.quantization_level == "Q8_0"
        assert shown.modelinfo["general.architecture"] == "llama"
        assert shown.modelinfo["llama.context_length"] == 4096  # of the loaded one
        assert shown.modelinfo["general.parameter_count"] == 1_200_000
        assert "tokenizer.ggml.tokens" not in shown.modelinfo
        assert client.show("other").modelinfo == {}
        (loaded,) = client.ps().models
        assert (loaded.name, loaded.size, loaded.size_vram) == ("m:latest", 1000, 0)
        assert loaded.context_length == 4096 and loaded.expires_at.year < 2100


def test_what_would_change_the_models_is_refused(client):
    for refused in (
        lambda: client.pull("m"),
        lambda: list(client.pull("m", stream=True)),
        lambda: client.push("m"),
        lambda: client.create("m", from_="other"),
        lambda: client.copy("m", "other"),
        lambda: client.delete("m"),
    ):
        with pytest.raises(ollama.ResponseError, match="not to be had here") as raised:
            refused()
        assert raised.value.status_code == 501


def test_the_server_looks_like_ollamas(shared):
    version = httpx.get(f"{shared.url}/api/version").json()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version["version"]) and version["engineroom"]
    assert httpx.get(shared.url).text == "Ollama is running"
    for path in ("", "/api/version", "/api/tags"):
        answer = httpx.head(f"{shared.url}{path}")
        assert answer.status_code == 200 and answer.content == b""


# ── Ollama's client ──────────────────────────────────────────────────────────────────────────


def test_ollamas_client_reads_it(client):
    answer = client.chat("m", messages=SAY, options={"num_predict": 2}, logprobs=True)
    assert answer.message.content == "one two" and answer.done_reason == "length"
    assert answer.eval_count == 2 and answer.logprobs[0].token == "one"
    parts = list(client.generate("m", "one two", stream=True, keep_alive="5m"))
    assert "".join(part.response for part in parts) == "one two" and parts[-1].done
    with pytest.raises(ollama.ResponseError, match="model 'nobody' not found") as raised:
        client.chat("nobody", messages=SAY)
    assert raised.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="the model failed"):
        list(client.generate("m", "a b !break d", raw=True, stream=True))


async def test_ollamas_asynchronous_client(shared):
    async with ollama.AsyncClient(shared.url) as client:
        parts = [part async for part in await client.chat("m", messages=SAY, stream=True)]
    assert "".join(part.message.content for part in parts) == "one two three"
