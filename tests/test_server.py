"""The server on each real runtime that is installed: SmolLM2, the command, and real clients.

One word differs between the runtimes: the value of ``--runtime``. vLLM reads no GGUF file, so that
it gets the same model as Transformers saves it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.smollm2 import float32_folder
from serving import SMOLLM2, serving

pytest.importorskip("uvicorn", reason="needs engineroom[server]")
httpx = pytest.importorskip("httpx", reason="the clients' tests need httpx")
openai = pytest.importorskip("openai", reason="the server is tried with OpenAI's client")
anthropic = pytest.importorskip("anthropic", reason="the server is tried with Anthropic's client")

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = {
    "llamacpp": ("llama_cpp", ["n_ctx=4096", "n_parallel=2"]),
    "hf_transformers": ("transformers", ["max_context=4096", "max_batch_size=2"]),
    "vllm": ("vllm", ["max_model_len=4096", "max_num_seqs=2"]),
}
"""Runtime → what it needs, and how it has two places and a context of 4096 tokens."""
SAY = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=RUNTIMES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``engineroom serve`` as a new user would start it, ended by SIGTERM."""
    needed, options = RUNTIMES[request.param]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}, which the runtime {request.param} runs on")
    model = str(float32_folder("")) if request.param == "vllm" else SMOLLM2
    command = ["--model", model, "--runtime", request.param]
    command += [word for option in options for word in ("-o", option)]
    with serving(tmp_path_factory.mktemp("serve"), *command) as url:
        yield url


def gauge(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return sum(float(v) for v in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_readmes_curl_works_as_printed(url):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^curl .*?\n(?=```)", readme, re.MULTILINE | re.DOTALL)
    command = command.replace("\\\n", " ").replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        [*shlex.split(command), "--silent", "--show-error"],
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_the_readmes_openai_example_works_as_printed(url, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "from openai import" in block]
    assert "http://127.0.0.1:8000" in block
    namespace: dict[str, object] = {}
    exec(compile(block.replace("http://127.0.0.1:8000", url), "README.md", "exec"), namespace)
    namespace["client"].close()
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_is_answered(client, stream):
    asked = {"model": "default", "messages": SAY, "temperature": 0, "max_tokens": 24}
    if stream:
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
        reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        answer = client.chat.completions.create(**asked)
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        usage = answer.usage
    assert len(text) > 8
    assert reason in ("stop", "length")
    assert usage.prompt_tokens > 5 and 3 < usage.completion_tokens <= 24


def test_log_probabilities_seeds_and_stops(client):
    asked = {"model": "default", "messages": SAY, "max_tokens": 8}
    answer = client.chat.completions.create(**asked, temperature=0, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert "".join(e.token for e in entries).strip() == answer.choices[0].message.content.strip()
    assert all(e.logprob <= 0 and len(e.top_logprobs) == 2 for e in entries)
    # Together in a batch, numbers differ in their last digits: the texts are not compared.
    drawn = client.chat.completions.create(**asked, seed=5, n=2, temperature=1).choices
    assert [c.index for c in drawn] == [0, 1] and all(c.message.content for c in drawn)
    answer = client.chat.completions.create(
        model="default", messages=SAY, max_tokens=64, temperature=0, stop=["a", "e"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert not set("ae") & set(answer.choices[0].message.content)


def test_the_other_apis(client, url):
    answer = client.completions.create(model="default", prompt=["One, two,", "A, b,"], max_tokens=4)
    assert len(answer.choices) == 2 and all(c.text for c in answer.choices)
    answer = client.responses.create(model="default", input="Say hello.", max_output_tokens=8)
    assert answer.output_text
    with anthropic.Anthropic(base_url=url, api_key="none") as other:
        message = other.messages.create(model="default", max_tokens=8, messages=SAY)
    assert message.content[0].text and message.usage.output_tokens > 0


def test_token_ids_are_the_prompt_whose_tokens_they_are(client):
    asked = {"model": "default", "temperature": 0, "max_tokens": 8}
    text = client.completions.create(**asked, prompt="The capital of France is")
    tokens = [504, 3575, 282, 4649, 314]
    (one,) = client.completions.create(**asked, prompt=tokens).choices
    assert one.text == text.choices[0].text
    assert text.usage.prompt_tokens == len(tokens)
    streamed = client.completions.create(**asked, prompt=[tokens], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.text
    with pytest.raises(openai.BadRequestError, match="prompt_token_ids has 49152"):
        client.completions.create(model="default", prompt=[504, 49152])


def test_a_prompt_that_is_too_long_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model="default", prompt="word " * 5000)


CITY = {"type": "string", "enum": ["Paris", "Rome"]}
PARAMETERS = {
    "type": "object",
    "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "description": "How the weather is", "parameters": PARAMETERS}


def check_arguments(arguments):
    assert set(arguments) == {"city", "days"}, arguments
    assert arguments["city"] in CITY["enum"] and 1 <= arguments["days"] <= 9


@pytest.mark.nightly
def test_openais_client_calls_tools_and_hears_of_results(client):
    tools = [{"type": "function", "function": TOOL}]
    asked = {"model": "default", "max_tokens": 200, "tools": tools}
    wanted = {**asked, "messages": SAY, "tool_choice": "required", "parallel_tool_calls": False}
    for seed in range(2):
        (choice,) = client.chat.completions.create(**wanted, seed=seed, temperature=1).choices
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        check_arguments(json.loads(call.function.arguments))
    with client.chat.completions.stream(**wanted, temperature=0) as events:
        for _ in events:
            pass
        (choice,) = events.get_final_completion().choices
    (call,) = choice.message.tool_calls
    check_arguments(json.loads(call.function.arguments))
    made = {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    answer = client.chat.completions.create(
        model="default",
        messages=[
            *SAY,
            {"role": "assistant", "tool_calls": [made]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ],
        max_tokens=8,
    )
    assert answer.choices[0].message.content


@pytest.mark.nightly
def test_anthropics_client_calls_tools_and_hears_of_results(url):
    tool = {"name": "weather", "description": "How it is", "input_schema": PARAMETERS}
    asked = {"model": "default", "tools": [tool], "max_tokens": 200}
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        choice = {"type": "any", "disable_parallel_tool_use": True}
        with client.messages.stream(**asked, messages=SAY, tool_choice=choice) as events:
            message = events.get_final_message()
        assert message.stop_reason == "tool_use"
        (block,) = message.content
        check_arguments(block.input)
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
        said = {"role": "assistant", "content": message.content}
        answer = client.messages.create(
            **asked,
            messages=[*SAY, said, {"role": "user", "content": [result]}],
            tool_choice={"type": "none"},
        )
    assert [block.type for block in answer.content] == ["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_free_their_slots(client, url, stream):
    endless = {"0": -100, "2": -100}  # neither <|endoftext|> nor <|im_end|>
    body = {"model": "default", "prompt": "Count: 1, 2, 3,", "max_tokens": 4000}
    body |= {"logit_bias": endless, "stream": stream}
    for _ in range(3):  # more than there are slots
        if stream:  # each leaves in the middle of the answer
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=0.5)
    for _ in range(200):
        if gauge(url, "engineroom_num_requests_running") == 0:
            break
        time.sleep(0.05)
    assert gauge(url, "engineroom_num_requests_running") == 0
    assert gauge(url, "engineroom_num_requests_waiting") == 0
    client.completions.create(model="default", prompt="Hello", max_tokens=2)
