"""The command as a process: signals, pipes, terminals, encodings, help, and what it imports."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from engineroom import InferenceResponse
from engineroom.cli.stats import stats_line, tokens_per_second

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")

FOREIGN = ("torch", "transformers", "llama_cpp", "vllm", "fastapi", "starlette")

BUSY = """
import asyncio, threading
from engineroom.testing import EchoHandler

class Busy(EchoHandler):
    '''Loads in a thread that nothing can stop, as C code may.'''

    name = "echo"

    async def load_model(self, config):
        print("loading", flush=True)
        await asyncio.to_thread(threading.Event().wait)
"""


# ── Ctrl-C ───────────────────────────────────────────────────────────────────────────────────────


@POSIX
@pytest.mark.parametrize("how", [(), ("--json",)])
def test_an_interrupt_while_loading(site, spawn, how):
    site.echo()
    process = spawn("--log-level", "info", "run", "echo:", "x", "-o", "load_delay_s=3600", *how)
    assert b"loading model" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err and b"finished: cancelled" in err


@POSIX
def test_an_interrupt_while_decoding_stops_the_compute_and_unloads(site, spawn):
    site.echo()
    process = spawn(
        "--log-level", "info", "run", "echo:", "one two", "-n", "none",
        "-o", "repeat=1000000", "-o", "token_delay_s=0.001",
    )  # fmt: skip
    assert process.stdout.read(3) == b"one"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"finished: cancelled" in err and b"was unloaded" in err
    assert b"Traceback" not in err and b"error:" not in err


@POSIX
def test_an_interrupt_while_the_prompt_is_read(site, spawn):
    site.echo()
    site.module(
        "sitecustomize",
        "import sys\nclass Input:\n    buffer = property(lambda self: self)\n"
        "    def isatty(self): return False\n"
        "    def read(self):\n        print('reading', flush=True)\n"
        "        return sys.__stdin__.buffer.read()\n"
        "sys.stdin = Input()\n",
    )
    process = spawn("run", "echo:", stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"reading\n"
    process.send_signal(signal.SIGINT)
    # No communicate(): it would close the standard input that is being read.
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == b""


ELSEWHERE = """
import os, signal, sys, threading, time
from engineroom.testing import EchoHandler


def strike():
    time.sleep(1)  # the loop has nothing to do by then, and waits
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


class Struck(EchoHandler):
    # While it is at work, the signal is delivered to a thread that is not the main one.

    name = "echo"

    def begin(self):
        threading.Thread(target=strike, daemon=True).start()

    async def load_model(self, config):
        if "load_delay_s" in config.options:
            self.begin()
        return await super().load_model(config)

    async def generate_tokens(self, loaded_model, request):
        self.begin()
        async for step in super().generate_tokens(loaded_model, request):
            yield step
"""


@POSIX
@pytest.mark.parametrize("where", ["load_delay_s=3600", "token_delay_s=3600"])
def test_an_interrupt_that_another_thread_is_given_is_not_waited_for(site, spawn, where):
    site.module("command_test_struck", ELSEWHERE)
    site.plugin("echo", "command_test_struck:Struck")
    process = spawn("run", "echo:", "x", "-o", where)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, b"")
    assert err == b""


@POSIX
def test_a_second_interrupt_forces_the_end(site, spawn):
    site.module("command_test_busy", BUSY)
    site.plugin("echo", "command_test_busy:Busy")
    process = spawn("run", "echo:", "x")
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two that wait to be delivered are one
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


@POSIX
def test_an_ignored_interrupt_stays_ignored(site, environment):
    site.echo()
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from engineroom.cli import main\n"
        "status = main(['run', 'echo:', 'x'])\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
        "sys.exit(status)\n"
    )
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


# ── pipes and encodings ──────────────────────────────────────────────────────────────────────────


@POSIX
def test_a_reader_that_goes_away_ends_it_quietly(site, spawn):
    site.echo()
    process = spawn(
        "--log-level", "info", "run", "echo:", "one two", "-n", "none", "-o", "repeat=10000000"
    )
    assert process.stdout.read(3) == b"one"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"finished: cancelled" in err
    assert b"Traceback" not in err and b"error:" not in err and b"BrokenPipe" not in err


@POSIX
@pytest.mark.parametrize("args", [("plugins",), ("--help",), ("run", "echo:", "x", "--json")])
def test_lists_and_help_into_a_closed_pipe(site, spawn, args):
    site.echo()
    reader, writer = os.pipe()
    os.close(reader)
    process = spawn(*args, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in err and b"Exception ignored" not in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_the_output_lacks_do_no_harm(site, environment, encoding):
    site.echo()
    text = "na\u00efve \u2192 \U0001f600"
    done = subprocess.run(
        [sys.executable, "-m", "engineroom", "run", "echo:", "--stats"],
        input=text.encode(),
        capture_output=True,
        env={**environment, "PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == [text.encode(encoding, "replace")]
    assert b"2 tokens" not in done.stdout and b"3 tokens" in done.stderr


@POSIX
def test_the_locale_c(site, environment):
    site.echo()
    done = subprocess.run(
        [sys.executable, "-m", "engineroom", "run", "echo:", "gr\u00fc\u00dfe", "--stats"],
        capture_output=True,
        env={**environment, "LC_ALL": "C", "LANG": "C"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ── terminals ────────────────────────────────────────────────────────────────────────────────────


def in_terminal(environment, *args):
    """Run the command in a terminal; give its exit status and all that was shown."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "engineroom", *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # Linux says EIO when the other side is closed
        pass
    finally:
        os.close(ours)
    return process.wait(timeout=60), shown


@POSIX
def test_a_terminal_sees_a_spinner_and_the_stats_but_no_escape_sequences_of_the_model(
    site, environment
):
    site.echo()
    status, shown = in_terminal(environment, "run", "echo:", "a \x1b]52;c;aGk=\x07 [red]b")
    assert status == 0
    hidden, shown_again = shown.find(b"\x1b[?25l"), shown.find(b"\x1b[?25h")
    assert 0 <= hidden < shown_again < shown.find(b"[red]b")
    assert b"tokens/s" in shown and b"stopped by eos_token" in shown
    assert b"\x1b]52" not in shown and b"[red]b" in shown


@POSIX
def test_a_terminal_without_a_prompt_gets_the_error(site, environment):
    site.echo()
    status, shown = in_terminal(environment, "run", "echo:")
    assert status == 2 and b"there is no prompt" in shown


# ── help and imports ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--help"], ["run", "models", "plugins", "doctor", "ENGINEROOM_CONFIG", "Exit status"]),
        (["run", "--help"], ["MODEL", "--max-new-tokens", "hf:owner/name", "Examples:"]),
        (["models", "--help"], ["ls", "--config", "Examples:"]),
        (["models", "ls", "--help"], ["--json", "Examples:"]),
        (["plugins", "--help"], ["--why", "quarantined", "Examples:"]),
        (["doctor", "--help"], ["--json", "Examples:"]),
    ],
)
def test_help_teaches(command, args, shown):
    result = command(*args)
    assert (result.status, result.err) == (0, "")
    assert "Usage: engineroom" in result.out
    for text in shown:
        assert text in result.out
    assert "\x1b" not in result.out


def test_no_command_shows_the_help(command):
    result = command()
    assert "Usage: engineroom" in result.out + result.err


def test_version(command):
    from engineroom import __version__

    assert command("--version").out == f"engineroom {__version__}\n"


def test_an_unknown_command(command):
    result = command("runn")
    assert result.status == 2 and "runn" in result.error


def test_a_defect_is_one_line_and_with_debug_a_traceback(command, monkeypatch):
    import engineroom.cli.models as models

    def defect(_: object) -> None:
        raise TypeError("oh no")

    monkeypatch.setattr(models, "deployment_or_none", defect)
    result = command("models")
    assert result.status == 1 and "TypeError: oh no" in result.error and "--debug" in result.error
    assert "Traceback" in command("--debug", "models").err


@pytest.mark.parametrize(
    "statement",
    [
        "import engineroom.cli",
        "import engineroom.cli.stats",
        "from engineroom.cli import main; main(['--help'])",
        "from engineroom.cli import main; main(['run', '--help'])",
        "from engineroom.cli import main; main(['doctor'])",
    ],
)
def test_no_runtime_is_imported(site, environment, statement):
    site.module("command_test_plugin", "from engineroom.testing import EchoHandler")
    site.plugin("echo", "command_test_plugin:EchoHandler")
    names = FOREIGN if "doctor" in statement else (*FOREIGN, "command_test_plugin")
    script = (
        f"import sys, json\n{statement}\n"
        f"loaded = [n for n in {names!r} if n in sys.modules]\n"
        "print('\\n' + json.dumps(loaded))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, timeout=60, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_package_itself_imports_no_parser(environment):
    script = "import engineroom.cli.stats, sys; assert 'typer' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=True)


# ── the line of figures ──────────────────────────────────────────────────────────────────────────


def _response(**fields):
    return InferenceResponse(request_id="r", model_id="smollm2", **fields)


def test_the_stats_line():
    response = _response(
        handler="llamacpp",
        generated_tokens=57,
        inference_time_ms=2000.0,
        time_to_first_token_ms=600.0,
        finish_reason="eos_token",
    )
    assert tokens_per_second(response) == pytest.approx(40.0)
    assert stats_line(response) == (
        "smollm2 · llamacpp · 57 tokens · 40.0 tokens/s · stopped by eos_token"
    )


def test_the_stats_line_leaves_out_what_is_not_known():
    assert stats_line(_response()) == "smollm2"
    assert stats_line(_response(generated_tokens=0, inference_time_ms=5.0)) == "smollm2 · 0 tokens"
    one = _response(generated_tokens=1, inference_time_ms=500.0, time_to_first_token_ms=499.0)
    assert stats_line(one) == "smollm2 · 1 token · 2.0 tokens/s"
    stopped = _response(finish_reason="stop_sequence", stop_sequence="\n")
    assert stats_line(stopped) == "smollm2 · stopped by stop_sequence '\\n'"


@pytest.mark.parametrize("group", [(), ("models",)])
def test_summaries_of_commands_are_whole(command, group):
    lines = command(*group, "--help").out.partition("Commands:")[2].partition("Examples:")[0]
    assert lines.strip() and "..." not in lines and "…" not in lines
