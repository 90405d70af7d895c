"""Keys: what their files say, and what a change of them does to those who are at work."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx
from hypothesis import example, given, settings, strategies as st

from engineroom import work_priority
from engineroom.errors import ConfigurationError
from engineroom.server.keys import KeyRing, KeySpec, new_key
from engineroom.testing import EchoHandler

ANN, BOB, BOSS, LOW = (f"{name}-key-0123456789" for name in ("ann", "bob", "boss", "low"))
CHAT = "/v1/chat/completions"


def talk(text="one two", **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# ── what a file says ─────────────────────────────────────────────────────────────────────────


def test_a_line_may_say_more_than_name_and_key(tmp_path):
    _, hashed = new_key()
    (tmp_path / "keys").write_text(
        f"ann {ANN} priority=5\nbob {hashed} metrics=all priority=-100\ncarl carl-key-0123456789\n"
    )
    owners = KeyRing.read(tmp_path / "keys", None, {"ENGINEROOM_ADMIN_KEYS": BOSS}).owners
    assert [(o.max_priority, o.all_metrics, o.admin) for o in owners.values()] == [
        (5, False, False), (-100, True, False), (None, False, False), (None, True, True),
    ]  # fmt: skip
    assert "digest" not in repr(owners["ann"])


@pytest.mark.parametrize(
    "more",
    [
        "priority=x",
        "priority=101",
        "priority=-101",
        "priority=1 priority=2",
        "metrics=some",
        "secret",
    ],
)
def test_what_it_may_not_say_is_refused_and_not_shown(tmp_path, more):
    (tmp_path / "keys").write_text(f"ann {ANN}\nbob {BOB} {more}\n")
    with pytest.raises(ConfigurationError) as caught:
        KeyRing.read(tmp_path / "keys", None, {})
    assert BOB not in caught.value.message and "secret" not in caught.value.message
    assert "priority" in caught.value.message


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4))
@example(["ann", "supersecretsupersecret", "supersecret=1"])
def test_no_message_about_a_line_shows_what_stands_behind_the_name(words):
    from engineroom.server.keys import _LINE, _spec

    line = " ".join(words).split()
    spec = _spec(line)
    if spec is None:
        assert not any(len(word) > 15 and word in _LINE for word in line[1:])
        return
    said = ""
    try:
        KeyRing([spec])
    except ConfigurationError as error:
        said = error.message
    assert len(spec.key) < 8 or spec.key == spec.name or spec.key not in said


NAMES, KEYS = (
    st.sampled_from("abcd"),
    st.sampled_from([f"key-number-{n}-0123456" for n in range(4)]),
)
RING = st.dictionaries(NAMES, st.tuples(KEYS, st.none() | st.integers(-100, 100)), max_size=4)


@given(RING, RING)
def test_a_ring_that_is_replaced_opens_for_the_new_keys_alone(before, after):
    def ring(keys):
        return KeyRing([KeySpec(name, key, most) for name, (key, most) in keys.items()])

    old, new = ring(before), ring(after)
    digests = {key: o.digest for name, (key, _) in before.items() if (o := old.owners[name])}
    changes = old.replace(new)
    still = {key for key, _ in after.values()}
    assert {k for k in (f"key-number-{n}-0123456" for n in range(4)) if old.find(k)} == still
    assert changes.revoked == {digest for key, digest in digests.items() if key not in still}
    assert set(changes.added) == after.keys() - before.keys()
    assert set(changes.removed) == before.keys() - after.keys()
    assert set(changes.changed) == {n for n in after if n in before and after[n] != before[n]}


# ── read anew ────────────────────────────────────────────────────────────────────────────────


class Files:
    """A server's key files, and their being read anew as at SIGHUP."""

    def __init__(self, folder: Path) -> None:
        self.keys, self.admin = folder / "keys", folder / "admin"
        self.run = None

    def write(self, keys: str, admin: str = f"boss {BOSS}\n") -> None:
        self.keys.write_text(keys)
        self.admin.write_text(admin)
        if self.run is not None:
            self.run.call(self.run.server.context.callers.reload_keys)


BOTH = f"ann {ANN}\nbob {BOB}\n"


@pytest.fixture
def files(tmp_path):
    files = Files(tmp_path)
    files.write(BOTH)
    return files


@pytest.fixture
def locked(files, start):
    with start(keys=KeyRing.read(files.keys, files.admin, {})) as run:
        files.run = run
        yield run


def status(run, key, path="/v1/models"):
    return httpx.get(run.url + path, headers=bearer(key)).status_code


def test_a_key_that_is_taken_away_opens_nothing_any_more_and_a_new_one_does(files, locked):
    assert status(locked, ANN) == status(locked, BOB) == 200
    files.write(f"bob {BOB}\ncarl carl-key-0123456789\n")
    assert [status(locked, k) for k in (ANN, BOB, "carl-key-0123456789")] == [401, 200, 200]
    files.write("ann another-key-of-ann-1\n")
    assert [status(locked, k) for k in (BOB, "another-key-of-ann-1")] == [401, 200]


def test_who_is_admin_is_so_as_the_files_say_now(files, locked):
    admin = "/v1/admin/models"
    assert [status(locked, k, admin) for k in (ANN, BOSS)] == [403, 200]
    files.write(f"boss {BOSS}\n", f"ann {ANN}\n")
    assert [status(locked, k, admin) for k in (ANN, BOSS)] == [200, 403]


def test_the_route_of_admins_reads_the_keys_anew_as_well(files, locked):
    files.keys.write_text(f"bob {BOB}\ncarl carl-key-0123456789\n")
    url = locked.url + "/v1/admin/reload"
    answer = httpx.post(url, headers=bearer(BOSS)).json()
    assert answer["keys"] == {"added": ["carl"], "removed": ["ann"], "changed": []}
    assert [status(locked, k) for k in (ANN, BOB, "carl-key-0123456789")] == [401, 200, 200]
    files.keys.write_text("bob tiny-9\n")
    refused = httpx.post(url, headers=bearer(BOSS))
    assert refused.status_code == 400 and "tiny-9" not in refused.text
    assert status(locked, BOB) == 200


@pytest.mark.parametrize("wrong", ["", "ann short\n", f"ann {ANN}\nann {BOB}\n", "\udc80", None])
def test_a_broken_file_leaves_the_old_keys(files, locked, wrong, caplog):
    if wrong is None:
        files.keys.unlink()
    else:
        files.keys.write_bytes(wrong.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigurationError):
        locked.call(locked.server.context.callers.reload_keys)
    assert [status(locked, k) for k in (ANN, BOB, BOSS)] == [200, 200, 200]
    (record,) = [r for r in caplog.records if r.name == "engineroom.server.keys"]
    assert record.levelname == "ERROR" and "the old ones go on" in record.getMessage()
    assert ANN not in caplog.text and BOB not in caplog.text


class Answer(threading.Thread):
    """A request whose answer is read to its end beside the test."""

    def __init__(self, run, path, body, key):
        super().__init__(daemon=True)
        self.status: int | None = None
        self.text = ""
        self._what = (run.url + path, body, key)
        self.start()

    def run(self):
        url, body, key = self._what
        with httpx.stream("POST", url, json=body, headers=bearer(key), timeout=30) as answer:
            for chunk in answer.iter_text():
                self.status = answer.status_code
                self.text += chunk
            self.status = answer.status_code

    def ended(self):
        self.join(20)
        assert not self.is_alive(), "it goes on"
        return self.text


BODIES = {
    CHAT: talk("!drip x", stream=True),
    "/v1/completions": {
        "model": "m", "prompt": ["!drip x", "!drip y"], "stream": True, "max_tokens": 4000,
    },
    "/v1/responses": {"model": "m", "input": "!drip x", "stream": True},
    "/v1/messages": {**talk("!drip x", stream=True), "max_tokens": 4000},
    "/v1/inference": {
        "model_id": "m", "prompt": "!drip x", "stream": True, "params": {"max_new_tokens": None},
    },
}  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_ends_with_an_error_when_its_key_is_taken_away(files, locked, path):
    others = [Answer(locked, path, BODIES[path], BOB) for _ in range(2)]
    mine = [Answer(locked, path, BODIES[path], ANN) for _ in range(2)]
    locked.until(lambda: all(len(answer.text) > 500 for answer in (*mine, *others)))
    per_request = 2 if path == "/v1/completions" else 1
    assert locked.handler.running == 4 * per_request
    files.write(f"bob {BOB}\n")
    for answer in mine:
        text = answer.ended()
        assert answer.status == 200
        assert "the key holds no more" in text
        assert "authentication_error" in text or "api_key_revoked" in text
        if path in (CHAT, "/v1/completions"):
            assert text.endswith("data: [DONE]\n\n")
    locked.until(lambda: locked.handler.running == 2 * per_request, "their places are free")
    lengths = [len(answer.text) for answer in others]
    locked.until(lambda: all(len(a.text) > n for a, n in zip(others, lengths, strict=True)))
    files.write(f"carl {BOB[::-1]}\n")
    assert all("the key holds no more" in answer.ended() for answer in others)
    locked.until(lambda: locked.handler.running == locked.server.context.limiter.running == 0)


@pytest.mark.parametrize("body", [talk("!hang"), talk("!hang", n=2), talk("!hang", stream=True)])
def test_an_answer_that_has_not_begun_is_refused_when_its_key_is_taken_away(files, locked, body):
    answer = Answer(locked, CHAT, body, ANN)
    locked.until(lambda: locked.handler.running == body.get("n", 1))
    files.write(f"bob {BOB}\n")
    error = json.loads(answer.ended())["error"]
    assert (answer.status, error["code"]) == (401, "api_key_revoked")
    locked.until(lambda: locked.handler.running == locked.server.context.limiter.running == 0)


def test_a_silent_stream_ends_as_a_stream_when_its_key_is_taken_away(files, start):
    with start(keys=KeyRing.read(files.keys, None, {}), heartbeat_s=0.05) as run:
        files.run = run
        answer = Answer(run, CHAT, talk("!hang", stream=True), ANN)
        run.until(lambda: ": ping" in answer.text)
        files.write(f"bob {BOB}\n")
        assert "the key holds no more" in answer.ended()


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_in_line_is_refused_when_its_key_is_taken_away(files, start, stream):
    with start(keys=KeyRing.read(files.keys, None, {}), max_running=1) as run:
        files.run = run
        limiter = run.server.context.limiter
        first = Answer(run, CHAT, talk("!drip", stream=True), BOB)
        run.until(lambda: limiter.running == 1)
        waits = Answer(run, CHAT, talk(stream=stream), ANN)
        run.until(lambda: limiter.queued == 1)
        files.write(f"bob {BOB}\n")
        assert json.loads(waits.ended())["error"]["code"] == "api_key_revoked"
        assert (limiter.running, limiter.queued) == (1, 0) and first.is_alive()


def test_whose_body_is_still_coming_is_refused_when_its_key_is_taken_away(files, locked):
    body = json.dumps(talk()).encode()
    with locked.connect() as client:
        client.sendall(
            b"POST %s HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % (CHAT.encode(), ANN.encode(), len(body))
        )
        locked.until(lambda: locked.server.context.callers._calls)
        files.write(f"bob {BOB}\n")
        client.sendall(body)
        assert client.recv(65536).startswith(b"HTTP/1.1 401")
    assert locked.handler.begun == 0


# ── priority ─────────────────────────────────────────────────────────────────────────────────


def priorities(**more):
    """Bodies of every route that has a priority."""
    return {
        CHAT: talk(**more),
        "/v1/completions": {"model": "m", "prompt": ["a", "b"], "n": 2, "max_tokens": 2, **more},
        "/v1/responses": {"model": "m", "input": "a", **more},
        "/v1/messages": {**talk(**more), "max_tokens": 2},
        "/v1/inference": {"model_id": "m", "prompt": "a", **more},
    }


@pytest.fixture(scope="module")
def ranked(start):
    keys = [KeySpec("ann", ANN), KeySpec("bob", BOB, 7), KeySpec("low", LOW, -20)]
    with start(keys=KeyRing(keys), max_priority=3) as run:
        yield run


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", priorities())
@pytest.mark.parametrize(
    ("key", "asked", "runs_with"),
    [
        (ANN, 3, 3), (ANN, 4, 3), (ANN, 100, 3), (ANN, -100, -100), (ANN, None, 0),
        (BOB, 100, 7), (BOB, 7, 7), (LOW, 0, -20), (LOW, None, -20), (LOW, -30, -30),
    ],
)  # fmt: skip
def test_no_key_goes_before_others_by_more_than_it_may(
    ranked, path, stream, key, asked, runs_with, caplog
):
    caplog.set_level("INFO", logger="engineroom.server.fields")
    body = {**priorities(stream=stream)[path], **({} if asked is None else {"priority": asked})}
    answer = httpx.post(ranked.url + path, json=body, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    assert ranked.handler.seen[-1].priority == runs_with
    told = answer.headers.get("x-engineroom-warning", "")
    lowered = [r for r in caplog.records if r.name == "engineroom.server.fields"]
    if asked is None or asked == runs_with:
        assert not told and not lowered
        return
    assert told == f"priority {asked} is more than this key may ask for; it goes as {runs_with}"
    assert len(lowered) == 1 and lowered[0].key_name == ranked.handler.seen[-1].key_name
    assert lowered[0].levelname == "WARNING"
    if path == "/v1/inference":
        data = answer.text.rpartition("data: ")[2] if stream else answer.text
        assert json.loads(data)["warnings"] == [told]


def test_without_a_word_nobody_goes_before_others(start):
    with start(max_priority=0) as run:
        httpx.post(run.url + CHAT, json=talk(priority=1))
        assert run.handler.seen[-1].priority == 0


class Ranks(EchoHandler):
    """Says with which priority it was asked for vectors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    async def embed(self, loaded_model, texts):
        self.seen.append(work_priority())
        return await super().embed(loaded_model, texts)


@pytest.fixture(scope="module")
def vectors(start):
    keys = [KeySpec("ann", ANN), KeySpec("bob", BOB, 7), KeySpec("low", LOW, -20)]
    models = [{"model_id": "m", "source": "echo:"}]
    with start(models, Ranks(), keys=KeyRing(keys), max_priority=3) as run:
        yield run


@pytest.mark.parametrize(
    ("key", "asked", "runs_with"),
    [(ANN, 4, 3), (ANN, -9, -9), (ANN, None, 0), (BOB, 9, 7), (LOW, 0, -20), (LOW, None, -20)],
)
def test_nor_do_texts_for_vectors(vectors, key, asked, runs_with, caplog):
    caplog.set_level("DEBUG", logger="engineroom")
    body = {"model": "m", "input": "a", **({} if asked is None else {"priority": asked})}
    answer = httpx.post(f"{vectors.url}/v1/embeddings", json=body, headers=bearer(key))
    assert answer.status_code == 200 and vectors.handler.seen[-1] == runs_with
    lowered = "x-engineroom-warning" in answer.headers
    assert lowered == (asked not in (None, runs_with)) == (" was lowered to " in caplog.text)
    assert "unknown field" not in caplog.text
    vectors.until(lambda: "finished: embed, done" in caplog.text)


@pytest.mark.parametrize(
    "wrong", [{"priority": "x"}, {"priority": 101}, {"timeout_s": "x"}, {"timeout_s": -1}]
)
def test_what_such_a_request_asks_for_is_checked(vectors, wrong):
    body = {"model": "m", "input": "a", **wrong}
    answer = httpx.post(f"{vectors.url}/v1/embeddings", json=body, headers=bearer(ANN))
    assert answer.status_code == 400 and answer.json()["error"]["param"] in wrong
