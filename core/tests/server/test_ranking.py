"""``/v1/rerank`` and ``/v1/score``, as their clients send them."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs the extra engineroom[chat]")

import httpx
import jsonschema_rs

from engineroom.server.routes import document
from engineroom.testing import EchoHandler

MODELS = [{"model_id": "m", "source": "echo:"}]


def described(name, answer):
    schema = {"$ref": f"#/components/schemas/{name}", "components": document()["components"]}
    jsonschema_rs.validate(schema, answer)


def test_documents_come_in_the_order_of_their_scores(start):
    documents = ["xyz", {"text": "abc"}, "a b"]
    body = {"model": "m", "query": "abc", "documents": documents}
    with start(MODELS, EchoHandler()) as run:
        for path in ("/v1/rerank", "/rerank", "/v2/rerank", "/v1/reranking", "/reranking"):
            answer = httpx.post(run.url + path, json=body).json()
            described("Ranking", answer)
            results = answer["results"]
            assert [each["index"] for each in results] == [1, 2, 0]
            assert [each["document"]["text"] for each in results] == ["abc", "a b", "xyz"]
            scores = [each["relevance_score"] for each in results]
            assert scores == pytest.approx([1.0, (2 / 3) ** 0.5, 0.0])
            assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
            assert (answer["object"], answer["model"]) == ("list", "m")
        few = {"top_n": 1, "return_documents": False}
        answer = httpx.post(run.url + "/v1/rerank", json=body | few).json()
        assert [set(each) for each in answer["results"]] == [{"index", "relevance_score"}]
        answer = httpx.post(run.url + "/v1/rerank", json=body | {"top_n": 99}).json()
        assert len(answer["results"]) == 3


def test_pairs_of_texts_are_scored(start):
    with start(MODELS, EchoHandler()) as run:
        for first, second, scores in (
            ("abc", "abc", [1.0]),
            ("abc", ["abc", "xyz"], [1.0, 0.0]),
            (["abc", "xyz"], ["abc", "xyz"], [1.0, 1.0]),
        ):
            for path in ("/v1/score", "/score"):
                body = {"model": "m", "text_1": first, "text_2": second}
                answer = httpx.post(run.url + path, json=body).json()
                described("ScoreList", answer)
                assert [each["score"] for each in answer["data"]] == pytest.approx(scores)
                other = {"model": "m", "queries": first, "documents": second}
                assert httpx.post(run.url + path, json=other).json()["data"] == answer["data"]
                assert [each["index"] for each in answer["data"]] == list(range(len(scores)))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [""]}, "documents"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a", 1]}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "a"}]}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": ["a"], "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": "a"}, "documents"),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["a"], "max_tokens_per_doc": 9},
            "max_tokens_per_doc",
        ),
        ("/v2/rerank", {"query": "a", "documents": ["a"], "rank_fields": ["title"]}, "rank_fields"),
        ("/v1/score", {"text_1": "a", "text_2": "a", "use_activation": False}, "use_activation"),
        ("/v1/score", {}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"queries": "a", "text_2": "a"}, "text_1"),
        ("/v1/score", {"queries": ["a", "b"], "documents": "a"}, "queries"),
        ("/v1/score", {"queries": "a", "documents": []}, "documents"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": ["a", ""], "text_2": ["a", "b"]}, "text_1"),
        ("/v1/score", {"text_1": [1], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": {"text": "a"}}, "text_2"),
    ],
)
def test_mistakes_are_told_by_name(start, path, body, param):
    with start(MODELS, EchoHandler()) as run:
        answer = httpx.post(run.url + path, json={"model": "m", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_runtime_that_ranks_none_says_so(shared):
    body = {"model": "m", "query": "a", "documents": ["b"]}
    answer = httpx.post(shared.url + "/v1/rerank", json=body)
    assert answer.status_code == 400
    assert "ranks no documents; use a cross-encoder" in answer.json()["error"]["message"]


def test_what_asks_for_nothing_is_taken(start):
    neutral = {"max_tokens_per_doc": 0, "truncate_prompt_tokens": None, "use_activation": True}
    with start(MODELS, EchoHandler(), unknown_fields="refuse") as run:
        body = {"model": "m", "query": "a", "documents": ["a"], "top_n": 0, **neutral}
        assert httpx.post(run.url + "/v1/rerank", json=body).status_code == 200
        body = {"model": "m", "text_1": "a", "text_2": "a", "queries": None, **neutral}
        assert httpx.post(run.url + "/v1/score", json=body).status_code == 200
