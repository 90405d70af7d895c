"""`engineroom conformance`."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for toy_runtime.py

TOY = ("toy_runtime:ToyHandler", "--model", "toy:", "--timeout", "5")
BROKEN = """
from toy_runtime import ToyHandler

class Broken(ToyHandler):
    def estimate_memory(self, config):
        return 7
"""


def rows(out: str) -> dict[str, str]:
    lines = [line.split(maxsplit=2) for line in out.split("\n\n", maxsplit=1)[0].splitlines()[1:]]
    return {line[0]: line[1] for line in lines}


def test_a_table_and_its_sum(command):
    result = command("conformance", *TOY, "-k", "test_top_p or num_beams")
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[0].split() == ["CHECK", "RESULT", "REASON"]
    assert rows(result.out) == {"top-p": "passed", "num-beams": "skipped"}
    assert "does not claim num_beams" in result.out
    assert result.out.endswith("\ntoy: 1 passed, 0 failed, 1 skipped\n")


def test_a_broken_rule_is_told_in_full(command, site):
    site.module("command_test_broken", BROKEN)
    result = command("conformance", "command_test_broken:Broken", "-m", "toy:", "-k", "memory")
    assert (result.status, result.err) == (1, "")
    assert rows(result.out) == {"estimate-memory": "failed"}
    assert "expected: a mapping" in result.out
    assert "docs/plugin-rules.md#rule-estimate-memory" in result.out
    assert "traceback" not in result.out.lower()


def test_a_report_in_json(command):
    result = command(
        "conformance", *TOY, "-k", "test_top_p", "--json", "report.json", "-o", "n_ctx=256"
    )
    assert result.status == 0
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert report["handler"]["name"] == "toy"
    assert report["handler"]["class"] == "toy_runtime:ToyHandler"
    assert report["model"]["options"] == {"n_ctx": 256}
    assert "top_p" in report["capabilities"]["params"]
    assert report["summary"] == {"passed": 1, "failed": 0, "skipped": 0}
    (check,) = report["checks"]
    assert (check["check"], check["outcome"]) == ("top-p", "passed")
    assert check["rule"] == "docs/plugin-rules.md#rule-top-p"


def test_a_report_on_standard_output(command):
    report = json.loads(command("conformance", *TOY, "-k", "test_top_p", "--json", "-").out)
    assert report["versions"].keys() == {"engineroom", "python", "pytest", "platform"}


def test_a_report_that_cannot_be_written(command):
    result = command("conformance", *TOY, "-k", "test_top_p", "--json", "no/such/place.json")
    assert result.status == 1
    assert "cannot be written" in result.error


def test_an_installed_handler(command, site):
    site.plugin("toy", "toy_runtime:ToyHandler")
    result = command("conformance", "toy", "-m", "toy:", "-k", "entry_point", "--json", "-")
    report = json.loads(result.out)
    assert report["handler"]["distribution"] == "engineroom-toy"
    assert report["handler"]["version"] == "1.2"
    assert report["checks"][0]["outcome"] == "passed"


def test_a_foreign_format(command):
    command_line = (
        "conformance",
        "toy_runtime:ToyHandler",
        "-m",
        "no:",
        "-k",
        "test_can_load and not foreign",
    )
    assert command(*command_line).status == 1
    assert command(*command_line, "--foreign").status == 0


def test_what_pytest_says(command):
    assert "1 passed" in command("conformance", *TOY, "-k", "test_top_p", "-v").out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("ehco", "-m", "echo:"), "did you mean 'echo'"),
        (("no_such_module:X", "-m", "x"), "cannot be imported: ModuleNotFoundError"),
        (("toy_runtime:NoSuch", "-m", "x"), "cannot be imported: AttributeError"),
        (("toy_runtime:EOS", "-m", "x"), "is int, not a handler's class"),
        (("toy_runtime:ToyHandler", "-m", ""), "--source"),
        (("toy_runtime:ToyHandler", "-m", "toy:", "-o", "x"), "is not KEY=VALUE"),
        (("toy_runtime:ToyHandler", "-m", "toy:", "-k", "no_such"), "fits no check"),
        (("toy_runtime:ToyHandler", "-m", "toy:", "-k", "and or"), "cannot be read"),
        (("toy_runtime:ToyHandler",), "--model"),
    ],
)
def test_wrong_arguments(command, site, args, message):
    site.echo()
    result = command("conformance", *args)
    assert (result.status, result.out) == (2, "")
    assert message in result.error


def test_without_pytest(command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pytest" else find(name, *a)
    )
    result = command("conformance", *TOY)
    assert result.status == 1
    assert result.error.endswith('pip install "engineroom[testing]"')


def test_in_colour_on_a_terminal(command, monkeypatch):
    from engineroom.cli import conformance

    written = []
    monkeypatch.setattr(conformance.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(conformance, "_show_in_colour", written.append)
    conformance._show(
        {
            "checks": [{"check": "seed", "outcome": "passed", "reason": ""}],
            "summary": {"passed": 1},
            "handler": {"name": "toy"},
        }
    )
    assert written == [[("seed", "passed", "")]]


def test_the_coloured_table(capsys):
    from engineroom.cli.conformance import _show_in_colour

    _show_in_colour([("seed", "failed", "saw [something] else")])
    out = capsys.readouterr().out
    assert "seed" in out
    assert "saw [something] else" in out
