"""What the machine is measured to have; GPUs stand for themselves in a fake NVML."""

from __future__ import annotations

import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

import engineroom.memory.machine as machine
import engineroom.memory.probe as probe_module
from engineroom.memory.probe import MachineProbe, give_back_memory

MIB = 1 << 20


@pytest.fixture
def cgroup(tmp_path: Path):
    """A control group of version 2, written as files."""

    def make(**files: str) -> MachineProbe:
        (tmp_path / "membership").write_text("0::/service\n")
        folder = tmp_path / "root" / "service"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".", 1)).write_text(text)
        return MachineProbe(tmp_path / "root", tmp_path / "membership")

    return make


def test_the_budget_of_the_cpu_is_what_is_free_less_a_twentieth(cgroup, monkeypatch):
    found = namedtuple("found", "available")(1000 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    assert cgroup().capacity("cpu") == 950 * MIB


def test_a_control_group_that_allows_less_counts(cgroup):
    probe = cgroup(
        memory_max=str(800 * MIB),
        memory_current=str(500 * MIB),
        memory_stat=f"anon 1\ninactive_file {100 * MIB}\nactive_file 3\n",
    )
    # 800 allowed, 500 used, of which 100 are files that can be dropped: 400 are left.
    assert probe.capacity("cpu") == 380 * MIB


def test_a_control_group_that_is_full_leaves_nothing(cgroup):
    probe = cgroup(memory_max=str(MIB), memory_current=str(2 * MIB), memory_stat="")
    assert probe.capacity("cpu") == 0


def test_a_group_without_limit_does_not_count(cgroup):
    assert cgroup(memory_max="max", memory_current="5").capacity("cpu") > MIB


def test_version_1_of_control_groups(tmp_path):
    (tmp_path / "membership").write_text("4:memory:/a\n3:cpu,cpuacct:/a\n")
    folder = tmp_path / "root" / "memory" / "a"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(100 * MIB))
    (folder / "memory.usage_in_bytes").write_text(str(60 * MIB))
    (folder / "memory.stat").write_text(f"cache 3\ntotal_inactive_file {20 * MIB}\n")
    assert machine.cgroup_used(tmp_path / "root", tmp_path / "membership") == 40 * MIB
    probe = MachineProbe(tmp_path / "root", tmp_path / "membership")
    assert probe.capacity("cpu") == 57 * MIB


def test_the_process_is_measured_with_its_children():
    probe = MachineProbe()
    before = probe.used(["cpu"])["cpu"]
    assert before > MIB
    code = "data = bytearray(64 << 20); print('there', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "there\n"
        assert probe.used(["cpu"])["cpu"] > before + 60 * MIB
        assert probe.used(["cpu"], {child.pid})["cpu"] < before + 30 * MIB
        child.communicate("\n")


def test_what_psutil_cannot_tell_is_left_out(monkeypatch):
    def refuse(*_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(psutil.Process, "memory_info", refuse)
    assert MachineProbe().capacity("cpu") is None
    assert MachineProbe().used(["cpu"]) == {}


def test_other_devices_have_no_bound():
    assert MachineProbe().capacity("metal") is None
    assert MachineProbe().used(["metal", "xpu:0"]) == {}


# ── GPUs ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def fake_nvml(monkeypatch):
    """Stands for NVML: two GPUs with 10 GiB, of which the second has 4 in use."""
    library = types.ModuleType("pynvml")
    info = namedtuple("info", "total free used")
    gpus = {0: info(10240 * MIB, 10240 * MIB, 0), 1: info(10240 * MIB, 6144 * MIB, 4096 * MIB)}
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.open = 0

    def init():
        library.open += 1

    def shutdown():
        library.open -= 1

    def by_index(number):
        if number not in gpus:
            raise library.NVMLError
        return number

    library.nvmlInit, library.nvmlShutdown = init, shutdown
    library.nvmlDeviceGetHandleByIndex = by_index
    library.nvmlDeviceGetHandleByUUID = {"GPU-1": 1}.__getitem__
    library.nvmlDeviceGetMemoryInfo = gpus.__getitem__
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield library
    assert library.open == 0


def test_a_gpu_is_asked_through_nvml(fake_nvml):
    probe = MachineProbe()
    assert probe.capacity("cuda:0") == int(10240 * MIB * 0.95)
    assert probe.capacity("cuda:1") == int(6144 * MIB * 0.95)
    assert probe.capacity("cuda:7") is None
    assert probe.used(["cuda:1", "cuda:7"]) == {"cuda:1": 4096 * MIB}


@pytest.mark.parametrize("visible", ["1", "GPU-1", " 1 , 0"])
def test_the_numbers_are_those_of_the_process(fake_nvml, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert MachineProbe().used(["cuda:0"]) == {"cuda:0": 4096 * MIB}


def test_a_process_that_may_see_no_gpu_has_none(fake_nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert MachineProbe().capacity("cuda:0") is None


def test_without_nvml_nvidia_smi_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [machine.Device("cuda:0", "T4", 1000 * MIB, 600 * MIB)]
    monkeypatch.setattr(probe_module, "devices", lambda: (found, None))
    assert MachineProbe().capacity("cuda:0") == 570 * MIB
    assert MachineProbe().used(["cuda:0"]) == {"cuda:0": 400 * MIB}
    assert MachineProbe().capacity("cuda:1") is None


def test_nvml_without_a_driver_is_as_none(fake_nvml, monkeypatch):
    def refuse():
        raise fake_nvml.NVMLError

    fake_nvml.nvmlInit = refuse
    monkeypatch.setattr(probe_module, "devices", lambda: ([], None))
    assert MachineProbe().capacity("cuda:0") is None


def test_memory_may_be_given_back_at_any_time():
    give_back_memory()
    give_back_memory()
