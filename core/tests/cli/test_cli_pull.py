"""`engineroom models pull` and `rm-cache`, against a fake hub over real HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="pulling needs engineroom[hub]")

COMMIT = "c" * 40


class FakeHub:
    """Stands for the Hugging Face hub: one repository, and the faults that a test asks for."""

    def __init__(self) -> None:
        self.files = {
            "config.json": b'{"small": true}',
            "weights/model.gguf": bytes(range(256)) * 8192,
        }
        self.said: dict[str, bytes] = {}  # what the hub says that a file is, where that differs
        self.gets: list[tuple[str, str | None]] = []
        self.break_after: int | None = None
        self.stall_after: int | None = None
        self.gone_on = threading.Event()  # ends a stall
        self.corrupt = 0
        self.etag_prefix = ""
        self.status: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(head=True)

            def do_GET(self):
                self.answer(head=False)

            def answer(self, head: bool) -> None:
                path = self.path.partition("?")[0]
                if hub.status is not None:
                    self.reply(hub.status, b"{}", {})
                elif path.startswith("/api/models/owner/name"):
                    self.reply(200, json.dumps(hub.info()).encode(), {})
                elif path.startswith(
                    ("/owner/name/resolve/main/", f"/owner/name/resolve/{COMMIT}/")
                ):
                    self.file(path.split("/", 5)[5], head)
                else:
                    self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            def file(self, name: str, head: bool) -> None:
                content = hub.files[name]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.etag_prefix}{hub.etag(name)}"'}
                if head:
                    self.reply(200, content, headers, body=False)
                    return
                wanted = self.headers.get("Range")
                hub.gets.append((name, wanted))
                status, start = 200, 0
                if wanted:
                    status, start = 206, int(wanted.removeprefix("bytes=").rstrip("-"))
                    size = len(content)
                    headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
                content = content[start:]
                if hub.corrupt:
                    hub.corrupt -= 1
                    content = b"x" + content[1:]
                if hub.break_after is not None and len(content) > hub.break_after:
                    whole, content = len(content), content[: hub.break_after]
                    hub.break_after = None
                    self.reply(status, content, headers, length=whole)
                    self.close_connection = True
                    return
                if hub.stall_after is not None and len(content) > hub.stall_after:
                    whole, content = len(content), content[: hub.stall_after]
                    hub.stall_after = None
                    self.reply(status, content, headers, length=whole)
                    self.wfile.flush()
                    hub.gone_on.wait(80)
                    self.close_connection = True
                    return
                self.reply(status, content, headers)

            def reply(self, status, content, headers, *, body=True, length=None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def etag(self, name: str) -> str:
        content = self.said.get(name, self.files[name])
        if name.endswith(".gguf"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def info(self) -> dict:
        siblings = []
        for name in self.files:
            size = len(self.said.get(name, self.files[name]))
            sibling = {"rfilename": name, "size": size, "blobId": self.etag(name)}
            if name.endswith(".gguf"):
                sibling["blobId"] = "b" * 40
                sibling["lfs"] = {"sha256": self.etag(name), "size": size, "pointerSize": 130}
            siblings.append(sibling)
        return {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False}

    def close(self) -> None:
        self.gone_on.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    yield fake
    fake.close()


@pytest.fixture
def engineroom(hub: FakeHub, tmp_path: Path):
    """The command in a process of its own: the library reads the environment once."""

    def run(*arguments: str, before: str = "", kill=None, **environment: str):
        """:param kill: what it is killed as soon as it says so."""
        process = subprocess.Popen(
            [sys.executable, "-c",
             f"{before}\nimport sys; from engineroom.cli import main; sys.exit(main())",
             *arguments],
            env={**{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ENGINEROOM"))},
                 "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
                 "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            try:
                while kill is not None and process.poll() is None:
                    if kill():
                        process.kill()
                    time.sleep(0.01)
                out, err = process.communicate(timeout=90)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run


def test_a_file_is_fetched_checked_and_its_path_printed(hub, engineroom):
    done = engineroom("models", "pull", "hf:owner/name:weights/model.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == hub.files["weights/model.gguf"]
    assert "fetching weights/model.gguf (2 MiB)" in done.stderr
    assert [name for name, _ in hub.gets] == ["weights/model.gguf"]
    again = engineroom("models", "pull", "hf:owner/name:weights/model.gguf")
    assert again.stdout == done.stdout and len(hub.gets) == 1
    # A runtime that estimates its memory finds it; what is not here is not fetched for that.
    show = (
        "from engineroom import find_source\n"
        "print(find_source('hf:owner/name:weights/model.gguf'))\n"
        "print(find_source('hf:owner/name:config.json'), find_source('hf:owner/other'))\n"
        "raise SystemExit"
    )
    assert engineroom(before=show).stdout == f"{done.stdout}None None\n"
    assert len(hub.gets) == 1


def test_the_first_file_of_several_stands_for_all(hub, engineroom):
    names = [f"q4/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    hub.files |= {name: name.encode() * 99 for name in names}
    done = engineroom("models", "pull", f"hf:owner/name:{names[0]}")
    assert done.returncode == 0, done.stderr
    assert [Path(line).read_bytes() for line in done.stdout.splitlines()] == [
        hub.files[name] for name in names
    ]
    show = f"from engineroom import find_source\nprint(find_source('hf:owner/name:{names[0]}'))"
    shown = engineroom("--version", before=show).stdout.splitlines()[0]
    assert shown == done.stdout.splitlines()[0]
    Path(done.stdout.splitlines()[1]).unlink()
    assert engineroom("--version", before=show).stdout.splitlines()[0] == "None"
    del hub.files[names[1]]
    done = engineroom("models", "pull", f"hf:owner/name:{names[0]}")
    assert done.returncode == 1 and f"there is no file {names[1]}; the repository" in done.stderr


def test_a_whole_repository_from_the_deployment(hub, engineroom, tmp_path):
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "models:\n  - {model_id: chat, aliases: [default], source: 'hf:owner/name'}\n"
        "  - {model_id: local, source: ./x.gguf}\n"
    )
    for arguments in (("chat",), ("default",), ()):
        done = engineroom("models", "pull", *arguments, "--config", str(file))
        assert done.returncode == 0, done.stderr
        names = {Path(line).name for line in done.stdout.splitlines()}
        assert names == {"config.json", "model.gguf"}
    refused = engineroom("models", "pull", "local", "--config", str(file))
    assert refused.returncode == 1 and "'local' is not on the hub" in refused.stderr
    unknown = engineroom("models", "pull", "cat", "--config", str(file))
    assert unknown.returncode == 1 and "did you mean 'chat'" in unknown.stderr


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, engineroom):
    # The library writes 10 MiB at a time: what it has not written it has to ask for again.
    hub.files["weights/model.gguf"] = bytes(range(256)) * (24 << 12)
    hub.break_after = 15 << 20
    done = engineroom("models", "pull", "hf:owner/name:weights/model.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == hub.files["weights/model.gguf"]
    first, second = hub.gets
    assert first[1] is None and second[1] not in (None, "bytes=0-")


@pytest.fixture
def stopped(hub, engineroom, tmp_path):
    """A pull of 24 MiB that was killed when more than nothing of it had come."""
    hub.files["weights/model.gguf"] = bytes(range(256)) * (24 << 12)
    hub.stall_after = 15 << 20

    def come() -> int:
        size = 0
        for folder, _, names in os.walk(tmp_path / "home"):  # which minds no folder that goes
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if name.endswith(".incomplete"):
                        size += Path(folder, name).stat().st_size
        return size

    done = engineroom("models", "pull", "hf:owner/name", kill=lambda: come() >= 8 << 20)
    assert done.returncode not in (0, 1), done.stderr  # killed, not failed
    hub.gone_on.set()
    return come()


def test_a_pull_that_was_killed_goes_on_where_it_was(hub, engineroom, tmp_path, stopped):
    done = engineroom("models", "pull", "hf:owner/name")
    assert done.returncode == 0, done.stderr
    paths = {path.name: path for path in map(Path, done.stdout.splitlines())}
    assert paths["model.gguf"].read_bytes() == hub.files["weights/model.gguf"]
    assert hub.gets[-1] == ("weights/model.gguf", f"bytes={stopped}-")
    assert [name for name, _ in hub.gets].count("config.json") == 1
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_what_is_damaged_of_a_pull_that_was_killed_is_fetched_anew(
    hub, engineroom, tmp_path, stopped
):
    (partial,) = (tmp_path / "home").rglob("*.incomplete")
    partial.write_bytes(b"\0" * stopped)
    done = engineroom("models", "pull", "hf:owner/name:weights/model.gguf")
    assert done.returncode == 0, done.stderr
    assert "fetching again" in done.stderr
    assert Path(done.stdout.strip()).read_bytes() == hub.files["weights/model.gguf"]
    # One that is larger than the file can only be another's: it is not even gone on with.
    Path(done.stdout.strip()).resolve().unlink()
    Path(done.stdout.strip()).unlink()
    partial.write_bytes(b"\0" * (25 << 20))
    done = engineroom("models", "pull", "hf:owner/name:weights/model.gguf")
    assert done.returncode == 0 and "fetching again" not in done.stderr, done.stderr
    assert hub.gets[-1] == ("weights/model.gguf", None)


def test_what_a_pull_that_was_killed_has_left_is_shown_and_removed(engineroom, tmp_path, stopped):
    listed = engineroom("models", "rm-cache").stdout.splitlines()
    assert listed[1].split()[:3] == ["hf:owner/name", str(stopped >> 20), "MiB"]
    done = engineroom("models", "rm-cache", "owner/name")
    assert (done.returncode, done.stdout) == (0, f"{stopped >> 20} MiB freed\n")
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_room_is_looked_for_only_for_what_has_not_come(engineroom, stopped):
    small = (
        "import shutil, types\n"
        "shutil.disk_usage = lambda _: types.SimpleNamespace(total=1, used=0, free=17 << 20)"
    )
    assert engineroom("models", "pull", "hf:owner/name", before=small).returncode == 0


def test_a_hub_that_names_contents_otherwise_is_left_to_the_library(hub, engineroom):
    hub.etag_prefix = "v1-"
    done = engineroom("models", "pull", "hf:owner/name:weights/model.gguf")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == hub.files["weights/model.gguf"]
    assert len(hub.gets) == 1


def test_what_comes_damaged_is_fetched_again(hub, engineroom):
    hub.corrupt = 1
    done = engineroom("models", "pull", "hf:owner/name:weights/model.gguf")
    assert done.returncode == 0, done.stderr
    assert "fetching again weights/model.gguf" in done.stderr
    assert Path(done.stdout.strip()).read_bytes() == hub.files["weights/model.gguf"]


@pytest.mark.parametrize("name", ["config.json", "weights/model.gguf"])
def test_what_stays_damaged_is_refused_and_removed(hub, engineroom, tmp_path, name):
    hub.corrupt = 99
    done = engineroom("models", "pull", f"hf:owner/name:{name}")
    assert done.returncode == 1 and "its hash is another" in done.stderr
    hub.corrupt = 0
    assert not list((tmp_path / "home").rglob(Path(name).name))
    assert engineroom("models", "pull", f"hf:owner/name:{name}").returncode == 0


def test_a_file_that_was_damaged_on_this_machine_is_found(hub, engineroom):
    done = engineroom("models", "pull", "hf:owner/name:config.json")
    Path(done.stdout.strip()).resolve().write_bytes(b'{"small": tru}}')
    again = engineroom("models", "pull", "hf:owner/name:config.json")
    assert again.returncode == 0 and "fetching again" in again.stderr
    assert Path(again.stdout.strip()).read_bytes() == hub.files["config.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no limit of a file's size")
def test_a_disk_that_fills_up_is_told_and_what_is_complete_is_kept(hub, engineroom):
    assert engineroom("models", "pull", "hf:owner/name:config.json").returncode == 0
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    done = engineroom("models", "pull", "hf:owner/name", before=full)
    assert done.returncode == 1 and "the disk is full" in done.stderr
    assert "rm-cache" in done.stderr and "Traceback" not in done.stderr
    done = engineroom("models", "pull", "hf:owner/name")
    assert done.returncode == 0
    assert hub.gets[-1] == ("weights/model.gguf", f"bytes={1 << 20}-")
    assert [name for name, _ in hub.gets].count("config.json") == 1


def test_a_disk_without_room_is_refused_before_the_first_byte(hub, engineroom):
    small = (
        "import shutil, types\n"
        "shutil.disk_usage = lambda _: types.SimpleNamespace(total=1, used=0, free=1 << 20)"
    )
    done = engineroom("models", "pull", "hf:owner/name", before=small)
    assert done.returncode == 1 and hub.gets == []
    assert "needs 2 MiB more on the disk" in done.stderr and "1 MiB free" in done.stderr


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("hf:owner/name:nothing.gguf", "the repository has config.json, weights/model.gguf"),
        ("hf:owner/other", "could not be fetched"),
        ("hf:owner", "is no hub source"),
    ],
)
def test_what_is_not_there_is_told(engineroom, what, said):
    done = engineroom("models", "pull", what)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert done.stderr.startswith("error: ")


def test_a_hub_out_of_reach_is_told(hub, engineroom):
    done = engineroom(
        "models", "pull", "hf:owner/name", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="1"
    )
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert "hf:owner/name" in done.stderr
    offline = engineroom("models", "pull", "hf:owner/name", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "Traceback" not in offline.stderr


def test_the_cache_is_listed_and_emptied(hub, engineroom, tmp_path):
    empty = engineroom("models", "rm-cache")
    assert empty.returncode == 0 and empty.stdout.count("\n") == 1
    engineroom("models", "pull", "hf:owner/name")
    listed = engineroom("models", "rm-cache").stdout.splitlines()
    assert listed[1].split()[:4] == ["hf:owner/name", "2", "MiB", "2"]
    wrong = engineroom("models", "rm-cache", "owner/nothing")
    assert wrong.returncode == 1 and "owner/name" in wrong.stderr
    done = engineroom("models", "rm-cache", "hf:owner/name")
    assert (done.returncode, done.stdout) == (0, "2 MiB freed\n")
    assert not list((tmp_path / "home").rglob("model.gguf"))


def test_without_the_library_it_says_what_to_install(engineroom):
    gone = "import sys; sys.modules['huggingface_hub'] = None"
    for arguments in (("pull", "hf:owner/name"), ("rm-cache",)):
        done = engineroom("models", *arguments, before=gone)
        assert done.returncode == 1 and 'pip install "engineroom[hub]"' in done.stderr


def test_pulling_nothing_says_what_to_name(engineroom):
    done = engineroom("models", "pull")
    assert done.returncode == 1 and "or give hf:owner/name" in done.stderr
