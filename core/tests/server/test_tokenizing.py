"""``/tokenize`` and ``/detokenize``, as clients of vLLM and of llama.cpp's server send them."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs the extra engineroom[chat]")

import httpx
import jsonschema_rs
from toy_runtime import ToyHandler

from engineroom.server.routes import document
from engineroom.testing import EchoHandler

MODELS = [{"model_id": "m", "source": "toy:", "options": {"n_ctx": 512}}]
USER = {"role": "user", "content": "hi"}


def described(name, answer):
    schema = {"$ref": f"#/components/schemas/{name}", "components": document()["components"]}
    jsonschema_rs.validate(schema, answer)


def test_a_text_has_its_tokens_and_they_its_text(start):
    with start(MODELS, ToyHandler()) as run:

        def post(path, **body):
            answer = httpx.post(run.url + path, json={"model": "m", **body})
            assert answer.status_code == 200, answer.text
            described("TokenList" if path == "/tokenize" else "TokensText", answer.json())
            return answer.json()

        told = post("/tokenize", prompt="aé")
        assert told == {"count": 3, "max_model_len": 512, "tokens": [97, 195, 169]}
        told = post("/tokenize", prompt="aé", add_special_tokens=False, return_token_strs=True)
        assert told["token_strs"] == ["a", "�", "�"]
        assert post("/tokenize", content="aé", add_special=True)["tokens"] == [97, 195, 169]
        pieces = post("/tokenize", content="aé", with_pieces=True)["tokens"]
        assert pieces == [
            {"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]},
        ]  # fmt: skip
        assert post("/tokenize", prompt="")["count"] == 0
        text = post("/detokenize", tokens=[97, 195, 169, 256, 195])
        assert text == {"prompt": "aé<end>�", "content": "aé<end>�"}
        assert post("/detokenize", tokens=[])["content"] == ""
        long = "é" * 100_000
        told = post("/tokenize", prompt=long, return_token_strs=True)
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) == 200_000
        assert post("/detokenize", tokens=told["tokens"])["prompt"] == long


def test_a_conversation_has_the_tokens_that_an_answer_reads(start):
    body = {"model": "m", "messages": [USER]}
    with start(MODELS, ToyHandler()) as run:
        told = httpx.post(run.url + "/tokenize", json=body).json()
        chat = httpx.post(
            run.url + "/v1/chat/completions", json=body | {"max_completion_tokens": 1}
        ).json()
        assert told["count"] == chat["usage"]["prompt_tokens"] > len("hi")
        said = body | {"messages": [USER, {"role": "assistant", "content": "yes"}]}
        goes_on = httpx.post(run.url + "/tokenize", json=said | {"continue_final_message": True})
        new = httpx.post(run.url + "/tokenize", json=said | {"add_generation_prompt": True})
        assert bytes(goes_on.json()["tokens"]).endswith(b"yes")
        assert new.json()["count"] > goes_on.json()["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "messages"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "content"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/tokenize", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [USER], "mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens"),
        ("/detokenize", {"tokens": [1, 1.5]}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens"),
        ("/detokenize", {"tokens": [[1]]}, "tokens"),
        ("/detokenize", {"tokens": [256] * 4500}, "tokens"),  # more text than a body may have
    ],
)
def test_mistakes_are_told_by_name(start, path, body, param):
    with start(MODELS, ToyHandler(), max_body_bytes=20_000) as run:
        answer = httpx.post(run.url + path, json={"model": "m", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_what_does_not_tell_says_so(start):
    with start([{"model_id": "m", "source": "echo:"}], EchoHandler()) as run:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            answer = httpx.post(run.url + path, json={"model": "m", **body})
            assert answer.status_code == 400
            assert "use another runtime" in answer.json()["error"]["message"]
