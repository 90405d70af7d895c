"""Forms on the wire of real runtimes, on tiny random models: whole and streamed.

What they write is noise; that it fits, and is the same again, is the runtimes' doing.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hostile_models
import pytest
from serving import serving

pytest.importorskip("uvicorn", reason="needs engineroom[server]")
pytest.importorskip("llguidance", reason="needs engineroom[structured]")
httpx = pytest.importorskip("httpx", reason="the server is asked with httpx")

pytestmark = pytest.mark.xdist_group("form_inputs")

CONTEXT = 1024
RUNTIMES = {
    "llamacpp": ("llama_cpp", "gguf"),
    "hf_transformers": ("torch", "transformers"),
    "vllm": ("vllm",),
}
THINKING = hostile_models.TEMPLATE.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}",
)
OFF = {"reasoning_effort": "none"}
FORM = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": FORM}}
SAY = [{"role": "user", "content": "yes or no"}]


@pytest.fixture(
    scope="module",
    # An engine of vLLM's takes a minute to start.
    params=[pytest.param(n, marks=pytest.mark.nightly) if n == "vllm" else n for n in RUNTIMES],
)
def runtime(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    for module in RUNTIMES[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}, which the runtime {name} runs on")
    return name


@pytest.fixture(scope="module")
def url(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp(runtime)
    deployment = hostile_models.deployment(folder, runtime, CONTEXT)
    model, *_ = deployment["models"]
    model["options"]["chat_template"] = THINKING
    file = folder / "deployment.json"
    file.write_text(json.dumps({"models": [model]}), encoding="utf-8")
    with serving(folder, "--config", str(file)) as url:
        yield url


def ask(url: str, *, stream: bool, **body: Any) -> tuple[str, str, str]:
    """Reasoning, content, and why it ended."""
    asked = {"model": "m", "messages": SAY, "max_tokens": 200, **body, "stream": stream}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        parts = [choice["delta"] for choice in choices]
    else:
        choices = answer.json()["choices"]
        parts = [choice["message"] for choice in choices]
    reasoning = "".join(part.get("reasoning_content") or "" for part in parts)
    content = "".join(part.get("content") or "" for part in parts)
    return reasoning, content, choices[-1]["finish_reason"]


def is_form(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"ok", "n"} and value["ok"] in (True, False) and value["n"] in (1, 2, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_every_beam_is_under_the_grammar(url: str, runtime: str, stream: bool) -> None:
    beams = {"num_beams": 3, "temperature": 0, **OFF}
    if runtime == "vllm":  # its beams know no grammars: never silently without
        body = {"model": "m", "messages": SAY, "stream": stream, "guided_choice": ["a"], **beams}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 400 and "num_beams" in answer.text
        return
    assert ask(url, stream=stream, guided_regex="(yes|no)", **beams)[1] in ("yes", "no")
    assert is_form(ask(url, stream=stream, response_format=SCHEMA, **beams)[1])


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_free_and_what_follows_them_is_not(url: str, stream: bool) -> None:
    body = {"response_format": SCHEMA, "reasoning_budget": 9}
    for seed in range(2):
        reasoning, content, finish = ask(url, stream=stream, seed=seed, temperature=1, **body)
        assert reasoning and is_form(content) and finish == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_seed_and_a_schema_twice_and_beside_others(url: str, stream: bool) -> None:
    def draw(seed: int) -> str:
        form = {**FORM, "properties": {**FORM["properties"], "t": {"type": "string"}}}
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": form}}
        body = {"response_format": schema, "temperature": 1, "max_tokens": 40, **OFF}
        return ask(url, stream=stream, seed=seed, **body)[1]

    alone = [draw(seed) for seed in range(8)]
    assert draw(3) == alone[3] and len(set(alone)) > 1
    with ThreadPoolExecutor(8) as clients:
        assert [*clients.map(draw, range(8))] == alone


TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {}}}}
CALLED = [
    {"role": "user", "content": [
        {"type": "text", "text": "how"}, {"type": "text", "text": " is it"},
    ]},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "let me ask", "signature": ""},
        {"type": "text", "text": "I ask."},
        {"type": "tool_use", "id": "call00001", "name": "weather", "input": {"city": "Zürich"}},
    ]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "call00001", "content": "rain"},
        {"type": "text", "text": "thanks"},
    ]},
]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        {"messages": SAY},
        {
            "messages": SAY,
            "system": [{"type": "text", "text": "be brief"}],
            "stop_sequences": ["x"],
        },
        {"messages": SAY, "tools": [TOOL], "tool_choice": {"type": "none"}},
        {"messages": CALLED, "tools": [TOOL], "thinking": {"type": "disabled"}},
        {"messages": CALLED, "chat_template_kwargs": {"enable_thinking": True}},
    ],
)
def test_a_conversation_has_the_tokens_that_were_counted(url, body):
    asked = {"model": "m", "max_tokens": 2, **body}
    answer = httpx.post(f"{url}/v1/messages", json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    counted = httpx.post(
        f"{url}/v1/messages/count_tokens", json={"model": "m", **body}, timeout=120
    )
    read = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    assert counted.json() == {"input_tokens": read}


def test_what_is_longer_than_the_context_is_counted_as_well(url):
    lengths = []
    for words in (10, 2 * CONTEXT):
        body = {"model": "m", "messages": [{"role": "user", "content": "a b " * words}]}
        counted = httpx.post(f"{url}/v1/messages/count_tokens", json=body, timeout=120)
        lengths.append(counted.json()["input_tokens"])
        answer = httpx.post(f"{url}/v1/messages", json={**body, "max_tokens": 1}, timeout=120)
        assert answer.status_code == (200 if words == 10 else 400)
    assert lengths[1] > CONTEXT > lengths[0]
