"""TLS, unix sockets, and proxies: where the server is reached, and whom it believes."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import stat
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra engineroom[server]")
pytest.importorskip("msgspec", reason="needs the extra engineroom[server]")
pytest.importorskip("httpx", reason="needs httpx")

import httpx

from engineroom import ConfigurationError
from engineroom.server.keys import KeyRing, new_key
from engineroom.server.listening import TLS_PASSWORD, bind, removed_at_end, tls_context
from engineroom.server.proxies import TrustedProxies
from engineroom.server.settings import ServerSettings

BODY = {"model": "m", "messages": [{"role": "user", "content": "one two"}]}
CHAT = "/v1/chat/completions"
unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs unix sockets")

# ── TLS ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Certificates of ``localhost``, and their keys."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make certificates")
    folder = tmp_path_factory.mktemp("tls")

    def made(name, *more):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2"]
        command += [
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ]
        command += ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem", *more]
        subprocess.run(command, check=True, capture_output=True)

    made("a", "-nodes")
    made("b", "-nodes")
    made("locked", "-passout", "pass:secret")
    both = (folder / "a.pem").read_text() + (folder / "a.key").read_text()
    (folder / "both.pem").write_text(both)
    (folder / "empty").write_text("nothing\n")
    return folder


@pytest.mark.parametrize("files", [("a.pem", "a.key"), ("both.pem", None)])
def test_tls_is_spoken_whole_and_streamed(start, each_parser, tls, files):
    cert, key = files
    settings = {"tls_cert": f"{tls}/{cert}", "tls_key": key and f"{tls}/{key}"}
    with start(**settings) as run:
        assert run.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=f"{tls}/a.pem")
        with httpx.Client(base_url=run.url, verify=trusted) as client:
            answer = client.post(CHAT, json=BODY)
            assert answer.json()["choices"][0]["message"]["content"] == "one two"
            streamed = client.post(CHAT, json={**BODY, "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n") and "two" in streamed.text
        with run.connect() as plain:  # who does not speak it is cut off, and nobody else
            plain.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"200 OK" not in plain.recv(1000)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{run.url}/healthz", verify=ssl.create_default_context())
        assert httpx.get(f"{run.url}/healthz", verify=trusted).status_code == 200


def test_a_password_opens_the_key(tls, monkeypatch):
    settings = ServerSettings(tls_cert=f"{tls}/locked.pem", tls_key=f"{tls}/locked.key")
    for password, said in ((None, "is not set"), ("wrong", "does not open it")):
        if password is not None:
            monkeypatch.setenv(TLS_PASSWORD, password)
        with pytest.raises(ConfigurationError, match=f"{TLS_PASSWORD} {said}"):
            tls_context(settings)
    monkeypatch.setenv(TLS_PASSWORD, "secret")
    assert tls_context(settings) is not None


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        ("a.pem", "b.key", "the key is not that of the certificate"),
        ("a.pem", None, "have no certificate and key in PEM form"),
        ("empty", "a.key", "have no certificate and key in PEM form"),
        ("a.pem", "empty", "have no certificate and key in PEM form"),
        ("none.pem", "a.key", "--tls-cert: cannot read .*none.pem.*No such file"),
        ("a.pem", "none.key", "--tls-key: cannot read .*none.key.*No such file"),
        (".", "a.key", "--tls-cert: cannot read .*directory"),
    ],
)
def test_files_that_do_not_do_are_told(tls, cert, key, said):
    settings = ServerSettings(tls_cert=f"{tls}/{cert}", tls_key=key and f"{tls}/{key}")
    with pytest.raises(ConfigurationError, match=said):
        tls_context(settings)


def test_without_a_certificate_there_is_no_tls():
    assert tls_context(ServerSettings()) is None
    with pytest.raises(ConfigurationError, match="give tls_cert, too"):
        ServerSettings(tls_key="key.pem")


# ── unix sockets ─────────────────────────────────────────────────────────────────────────────


@unix
def test_a_unix_socket_is_listened_on(start, each_parser, tmp_path):
    path = tmp_path / "socket"
    with start(uds=str(path)) as run:
        assert run.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            answer = client.post(f"http://localhost{CHAT}", json=BODY)
            assert answer.json()["choices"][0]["message"]["content"] == "one two"
            streamed = client.post(f"http://localhost{CHAT}", json={**BODY, "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
        with pytest.raises(ConfigurationError, match="somebody listens on the unix socket"):
            bind(ServerSettings(uds=str(path)))
    bind(ServerSettings(uds=str(path))).close()  # it was left behind: nobody listens
    assert path.is_socket()


@unix
def test_a_unix_socket_is_removed_at_the_end_if_it_is_ones_own(tmp_path):
    settings = ServerSettings(uds=str(tmp_path / "socket"))
    path = Path(settings.uds)
    with bind(settings) as bound, removed_at_end(bound):
        assert path.is_socket()
    assert not path.exists()
    with bind(settings) as bound, removed_at_end(bound):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"
    with pytest.raises(ConfigurationError, match="is there and is no socket"):
        bind(settings)
    for name, said in ((tmp_path / "none" / "s", "No such file"), (tmp_path / ("s" * 120), "long")):
        with pytest.raises(ConfigurationError, match=said):
            bind(ServerSettings(uds=str(name)))


# ── proxies ──────────────────────────────────────────────────────────────────────────────────


def scope(peer, *forwarded):
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    return {"client": peer and (peer, 5), "headers": headers}


@pytest.mark.parametrize(
    ("peer", "forwarded", "seen"),
    [
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("9.9.9.9", ["1.2.3.4"], "9.9.9.9"),  # nobody named it
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),  # what stands before is the client's word
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4, 192.168.7.9"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["192.168.7.8, 10.0.0.1"], "192.168.7.8"),
        ("10.0.0.1", ["1.2.3.4:8080"], "1.2.3.4"),
        ("10.0.0.1", ["[2001:db8::1]:8080"], "2001:db8::1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("10.0.0.1", ["1.2.3.4, nonsense"], "10.0.0.1"),
        ("10.0.0.1", [","], "10.0.0.1"),
        (None, ["1.2.3.4"], "1.2.3.4"),
    ],
)
def test_proxies_that_are_named_are_believed(peer, forwarded, seen):
    proxies = TrustedProxies(("10.0.0.1", "192.168.0.0/16", "unix"))
    assert proxies.client_of(scope(peer, *forwarded))[0] == seen


def test_nobody_else_is():
    assert not TrustedProxies(())
    assert TrustedProxies(("10.0.0.1",)).client_of(scope(None, "1.2.3.4")) is None
    for wrong in ("*", "proxy.example.com", "10.0.0.0/99"):
        with pytest.raises(ConfigurationError, match="forwarded_allow_ips"):
            ServerSettings(forwarded_allow_ips=(wrong,))


@pytest.mark.parametrize("named", [True, False])
def test_failed_keys_come_from_who_is_behind_the_proxy(start, caplog, named):
    ring = KeyRing([("ann", new_key()[1])])
    proxies = ("127.0.0.1",) if named else ()
    caplog.set_level(logging.WARNING, "engineroom.server.keys")
    with start(keys=ring, forwarded_allow_ips=proxies) as run:
        headers = {"x-forwarded-for": "1.2.3.4", "authorization": "Bearer wrong"}
        assert httpx.post(run.url + CHAT, json=BODY, headers=headers).status_code == 401
    (said,) = [r.getMessage() for r in caplog.records if "unknown key" in r.getMessage()]
    assert f"came from {'1.2.3.4' if named else '127.0.0.1'} " in said


def test_a_prefix_is_understood_and_told(start, each_parser):
    with start(root_path="/llm", keys=KeyRing([("ann", new_key()[1])])) as run:
        for path in ("/llm/healthz", "/healthz"):  # open routes stay open, others closed
            assert httpx.get(run.url + path).status_code == 200
        assert httpx.get(run.url + "/llm/v1/models").status_code == 401
        assert httpx.get(run.url + "/llmx/healthz").status_code == 401
    with start(root_path="/llm") as run:
        for path in ("/llm", ""):
            answer = httpx.post(run.url + path + CHAT, json=BODY)
            assert answer.json()["choices"][0]["message"]["content"] == "one two"
        refused = httpx.post(f"{run.url}/llm/v1/messages", json={})
        assert refused.json()["type"] == "error"  # in the form of its API
        assert httpx.get(f"{run.url}/llm/none").status_code == 404
        described = httpx.get(f"{run.url}/llm/openapi.json").json()
        assert described["servers"] == [{"url": "/llm"}] and described["paths"]
    with start() as run:
        assert "servers" not in httpx.get(f"{run.url}/openapi.json").json()
    for wrong in ("llm", "/llm/", "/"):
        with pytest.raises(ConfigurationError, match="root_path"):
            ServerSettings(root_path=wrong)
