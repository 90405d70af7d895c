"""`engineroom run`: what reaches the model, and what comes out."""

import json
from pathlib import Path

import pytest

DEPLOYMENT = """\
models:
  - model_id: parrot
    source: "echo:"
    runtime: echo
    aliases: [bird]
    options: {repeat: 2}
"""


@pytest.fixture
def deployment(tmp_path: Path) -> str:
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT, encoding="utf-8")
    return str(path)


@pytest.fixture
def echo(site, command):
    site.echo()
    return command


# ── the answer ───────────────────────────────────────────────────────────────────────────────────


def test_streams_the_answer_and_ends_the_line(echo):
    result = echo("run", "echo:", "Hello, world")
    assert (result.status, result.out, result.err) == (0, "Hello, world\n", "")


def test_a_text_that_ends_its_line_gets_no_second_line_break(echo):
    assert echo("run", "echo:", "Hello\n").out == "Hello\n"


def test_text_is_never_markup_and_never_wrapped(echo):
    text = "[bold]x[/bold] :smile: \\[a] \x1b[31mred " + "long " * 60 + "[/nonsense]"
    assert echo("run", "echo:", text).out == text + "\n"


def test_json_is_one_object_and_nothing_else(echo):
    result = echo("run", "echo:", "one two", "--json")
    response = json.loads(result.out)
    assert result.status == 0 and result.err == ""
    assert response["generated_text"] == "one two"
    assert response["finish_reason"] == "eos_token"
    assert (response["handler"], response["generated_tokens"]) == ("echo", 2)


def test_json_of_a_failure_is_printed_with_exit_status_1(echo):
    result = echo("run", "echo:", "one two three", "--json", "-o", "fail=during")
    response = json.loads(result.out)
    assert result.status == 1
    assert (response["finish_reason"], response["error_type"]) == ("error", "InferenceError")
    assert "asked to fail" in response["error_message"]
    assert "asked to fail" in result.error


def test_json_of_an_unknown_model_is_a_failed_response_too(echo):
    result = echo("run", "nothing", "hello", "--json")
    response = json.loads(result.out)
    assert result.status == 1
    assert response["error_type"] == "ModelNotFoundError"
    assert "nothing" in result.error


def test_stats_are_the_last_line_on_standard_error(echo):
    result = echo("run", "echo:", "one two", "--stats")
    assert result.out == "one two\n"
    assert result.err.startswith("echo: · echo · 2 tokens · ")
    assert result.err.endswith("tokens/s · stopped by eos_token\n")


def test_no_stats_where_standard_error_is_no_terminal(echo):
    assert echo("run", "echo:", "one").err == ""


def test_a_failure_midway_keeps_the_text_and_ends_with_status_1(echo):
    result = echo("run", "echo:", "one two three four", "-o", "fail=during", "--stats")
    assert result.status == 1
    assert result.out == "one two\n"
    assert "asked to fail after the second token" in result.error


def test_a_load_that_fails_is_one_line(echo):
    result = echo("run", "echo:", "one", "-o", "fail=load")
    assert (result.status, result.out) == (1, "")
    assert "asked to fail in loading" in result.error


def test_debug_adds_the_traceback(echo):
    result = echo("--debug", "run", "echo:", "one", "-o", "fail=load")
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: ")


def test_a_model_that_fails_to_unload_is_a_warning(echo):
    result = echo("run", "echo:", "one", "-o", "fail=unload")
    assert (result.status, result.out) == (0, "one\n")
    assert result.err.startswith("warning: ") and "asked to fail in unloading" in result.err


def test_log_level_shows_the_log_without_tracebacks(echo):
    result = echo("--log-level", "info", "run", "echo:", "one", "-o", "fail=load")
    assert "loading model 'echo:'" in result.err
    assert "Traceback" not in result.err


def test_a_log_is_not_left_behind(echo):
    assert "INFO" in echo("--log-level", "info", "run", "echo:", "one").err
    assert echo("run", "echo:", "one").err == ""


# ── the prompt ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("args", [(), ("-",), ("--file", "-")])
def test_the_prompt_from_standard_input(echo, args):
    assert echo("run", "echo:", *args, stdin=b"from a pipe\n").out == "from a pipe\n"


def test_the_prompt_from_a_file(echo, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe\r\n")
    assert echo("run", "echo:", "--file", str(file)).out == "grüße\n"


def test_a_chat_message_loses_the_last_line_break_and_raw_keeps_it(command, seen):
    command("run", "recorder:", stdin=b"hello\n\n")
    assert seen().messages[-1].content == "hello\n"
    command("run", "recorder:", "--raw", stdin=b"hello\n\n")
    assert (seen().prompt, seen().messages) == ("hello\n\n", None)


def test_a_terminal_without_a_prompt_is_told_how(echo):
    result = echo("run", "echo:")
    assert (result.status, result.out) == (2, "")
    assert "--file" in result.error and "echo Hello | engineroom run MODEL" in result.error


@pytest.mark.parametrize("data", [b"", b" \n"])
def test_an_empty_standard_input_is_no_prompt(echo, data):
    result = echo("run", "echo:", stdin=data)
    assert result.status == 1 and "empty" in result.error


def test_a_prompt_that_is_no_text(echo):
    result = echo("run", "echo:", stdin=b"ab\xff")
    assert result.status == 1 and "not UTF-8" in result.error


def test_a_missing_prompt_file(echo):
    result = echo("run", "echo:", "--file", "nowhere.txt")
    assert result.status == 1 and "nowhere.txt" in result.error


def test_a_prompt_and_a_file_are_one_too_many(echo):
    result = echo("run", "echo:", "hello", "--file", "x")
    assert result.status == 2 and "give one" in result.error


def test_a_prompt_of_several_words_without_quotes(echo):
    result = echo("run", "echo:", "what", "is", "it")
    assert result.status == 2 and "engineroom run --help" in result.error


def test_surrogates_in_an_argument_are_refused(echo):
    result = echo("run", "echo:", "ab\udcff")
    assert result.status == 2 and "the prompt" in result.error
    result = echo("run", "echo:", "ab", "--system", "\udcff")
    assert result.status == 2 and "--system" in result.error


def test_a_prompt_that_begins_with_a_dash(echo):
    assert echo("run", "echo:", "--raw", "--", "-x --y").out == "-x --y\n"


# ── flags ────────────────────────────────────────────────────────────────────────────────────────


def test_the_system_message_goes_first(command, seen):
    command("run", "recorder:", "hello", "--system", "be brief")
    assert [(m.role, m.content) for m in seen().messages] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]


def test_system_and_raw_exclude_each_other(echo):
    result = echo("run", "echo:", "x", "--raw", "--system", "y")
    assert result.status == 2 and "--raw" in result.error


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--max-new-tokens", "7"], "max_new_tokens", 7),
        (["--max-new-tokens", "none"], "max_new_tokens", None),
        (["-n", "5"], "max_new_tokens", 5),
        (["--temperature", "0"], "temperature", 0.0),
        (["--top-p", "0.9"], "top_p", 0.9),
        (["--top-k", "40"], "top_k", 40),
        (["--min-p", "0.1"], "min_p", 0.1),
        (["--repetition-penalty", "1.1"], "repetition_penalty", 1.1),
        (["--presence-penalty", "-0.5"], "presence_penalty", -0.5),
        (["--frequency-penalty", "0.5"], "frequency_penalty", 0.5),
        (["--logit-bias", "3=-100", "--logit-bias", "4=1.5"], "logit_bias", {3: -100.0, 4: 1.5}),
        (["--seed", "42"], "seed", 42),
        (["--greedy"], "do_sample", False),
        (["--num-beams", "4"], "num_beams", 4),
        (["--early-stopping"], "early_stopping", True),
        (["--json", "--logprobs", "3"], "logprobs", 3),
    ],
)
def test_each_flag_reaches_the_parameters_and_changes_nothing_else(
    command, seen, flags, field, value
):
    from engineroom import GenerationParams

    assert command("run", "recorder:", "hello", *flags).status == 0
    assert seen().params == GenerationParams(**{field: value})


def test_without_flags_the_defaults_of_the_contract_hold(command, seen):
    from engineroom import GenerationParams

    command("run", "recorder:", "hello")
    assert seen().params == GenerationParams()
    assert (seen().stop_sequences, seen().timeout_s, seen().on_unsupported) == (None, None, None)


def test_stop_timeout_and_on_unsupported(command, seen):
    result = command(
        "run", "recorder:", "a b END c", "--stop", "END", "--stop", "x",
        "--timeout", "60", "--on-unsupported", "warn",
    )  # fmt: skip
    assert result.out == "a b \n"
    assert (seen().stop_sequences, seen().timeout_s) == (["END", "x"], 60.0)
    assert seen().on_unsupported == "warn"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--temperature", "3"], "--temperature"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--min-p", "2"], "--min-p"),
        (["--repetition-penalty", "0.5"], "--repetition-penalty"),
        (["--presence-penalty", "9"], "--presence-penalty"),
        (["--frequency-penalty", "-9"], "--frequency-penalty"),
        (["--seed", "-1"], "--seed"),
        (["--num-beams", "0"], "--num-beams"),
        (["--max-new-tokens", "-1"], "--max-new-tokens"),
        (["--max-new-tokens", "many"], "--max-new-tokens"),
        (["--json", "--logprobs", "21"], "--logprobs"),
        (["--logprobs", "2"], "--json"),
        (["--logit-bias", "x=1"], "--logit-bias"),
        (["--logit-bias", "1=999"], "--logit-bias"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "warm"], "--temperature"),
        (["--stop", ""], "--stop"),
        (["--timeout", "0"], "--timeout"),
        (["--on-unsupported", "ignore"], "--on-unsupported"),
        (["--option", "no-value"], "--option"),
        (["--option", "a=1", "--option", "a=2"], "--option"),
        (["--option", "a=[1"], "--option"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_flag_that_is_wrong_is_one_line_that_names_it(echo, flags, named):
    result = echo("run", "echo:", "hello", *flags)
    assert (result.status, result.out) == (2, "")
    assert named in result.error


def test_what_the_runtime_does_not_honour_is_refused_or_warned_about(echo):
    result = echo("run", "echo:", "hello", "--top-k", "5")
    assert result.status == 1 and "top_k" in result.error
    result = echo("run", "echo:", "hello", "--top-k", "5", "--on-unsupported", "warn")
    assert (result.status, result.out) == (0, "hello\n")
    assert result.err.startswith("warning: top_k was ignored")


def test_options_are_read_as_yaml(command, seen, site):
    import engineroom.cli.parameters as parameters

    assert parameters.parse_options(
        ["a=1", "b=true", "c=[1, two]", "d=text", "e=0.5", 'f="7"', "g=a=b", "h="]
    ) == {
        "a": 1, "b": True, "c": [1, "two"], "d": "text", "e": 0.5, "f": "7", "g": "a=b", "h": None,
    }  # fmt: skip
    assert command("run", "recorder:", "x", "-o", "repeat=3").out == "xxx\n"


def test_an_option_that_the_runtime_does_not_know(echo):
    result = echo("run", "echo:", "hello", "-o", "nonsense=1")
    assert result.status == 1 and "nonsense" in result.err


# ── what MODEL means ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["parrot", "bird"])
def test_a_model_of_the_deployment_by_id_and_alias(echo, deployment, name):
    assert echo("run", name, "hi", "--config", deployment).out == "hihi\n"


def test_the_deployment_file_from_the_environment(echo, deployment, monkeypatch):
    monkeypatch.setenv("ENGINEROOM_CONFIG", deployment)
    assert echo("run", "parrot", "hi").out == "hihi\n"
    assert echo("run", "echo:", "hi").out == "hi\n"


def test_an_unknown_model_with_the_nearest_name(echo, deployment):
    result = echo("run", "parot", "hi", "--config", deployment)
    assert result.status == 1
    assert "did you mean 'parrot'?" in result.error


def test_neither_model_nor_source(echo):
    result = echo("run", "parrot", "hi")
    assert result.status == 1
    assert "--config" in result.error and "hf:owner/name" in result.error


def test_runtime_and_options_go_with_a_source_only(echo, deployment):
    for flags in (["--runtime", "echo"], ["-o", "repeat=2"]):
        result = echo("run", "parrot", "hi", "--config", deployment, *flags)
        assert result.status == 2 and "deployment file" in result.error


def test_a_path_with_a_runtime_that_is_named(echo, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights")
    result = echo("run", str(file), "hi", "--runtime", "echo", "--json")
    assert json.loads(result.out)["model_id"] == "model"


def test_a_file_that_no_handler_takes(echo, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights")
    result = echo("run", str(file), "hi")
    assert result.status == 1
    assert "no handler loads" in result.error and "echo: no" in result.error


def test_a_runtime_that_is_not_installed(echo):
    result = echo("run", "echo:", "hi", "--runtime", "vllm")
    assert result.status == 1 and "pip install engineroom-vllm" in result.error


@pytest.mark.parametrize("source", ["hf:nonsense", "package:nonsense"])
def test_a_source_that_is_badly_written(echo, source):
    result = echo("run", source, "hi")
    assert result.status == 1 and source.partition(":")[0] in result.error


def test_a_package_that_is_not_installed(echo):
    result = echo("run", "package:not_there/file.gguf", "hi", "--runtime", "echo")
    assert result.status == 0  # the echo runtime does not look; only that it got there counts
    result = echo("run", "package:not_there/file.gguf", "hi")
    assert result.status == 1 and "not_there" in result.error


@pytest.mark.parametrize("model", ["", "a\nb", "nul\0byte", "x" * 5000])
def test_a_model_that_is_no_name_at_all(echo, model):
    result = echo("run", model, "hi")
    assert result.status == 1
    assert result.err.startswith("error: ") and "Traceback" not in result.err


def test_the_handlers_of_the_deployment_hold_for_a_source_too(echo, tmp_path):
    path = tmp_path / "deployment.yaml"
    path.write_text("models: []\ndisabled_handlers: [echo]\n", encoding="utf-8")
    result = echo("run", "echo:", "hi", "--config", str(path))
    assert result.status == 1


def test_no_plugin_installed_says_which_to_install(command, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for model in (str(file), "echo:"):
        result = command("run", model, "hi")
        assert result.status == 1
        assert "pip install engineroom-llamacpp" in result.error


def test_a_quarantined_plugin_is_told_and_the_rest_works(echo, site):
    site.plugin("broken", "command_test_missing:Handler")
    result = echo("run", "echo:", "hi")
    assert (result.status, result.out) == (0, "hi\n")
    assert result.err.startswith("warning: plugin 'broken'")
    assert "Traceback" not in result.err


def test_mistakes_of_the_deployment_keep_their_lines(echo, tmp_path):
    path = tmp_path / "deployment.yaml"
    path.write_text("models:\n  - model_idd: x\n    source: y\nhandler: []\n", encoding="utf-8")
    result = echo("run", "x", "hi", "--config", str(path))
    lines = result.err.splitlines()
    assert result.status == 1
    assert lines[0].startswith("error: ") and len(lines) >= 3
    assert any(":2: models.0.model_idd: unknown key" in line for line in lines)
    assert any(":4: handler: unknown key" in line for line in lines)


def test_a_deployment_file_that_is_not_there(echo):
    result = echo("run", "x", "hi", "--config", "nowhere.yaml")
    assert result.status == 1 and "nowhere.yaml" in result.error
