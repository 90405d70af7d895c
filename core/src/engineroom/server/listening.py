"""Where the server listens, and what it speaks there: addresses, unix sockets, TLS."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from engineroom.errors import ConfigurationError
from engineroom.server.settings import ServerSettings

__all__ = ["TLS_PASSWORD", "bind", "removed_at_end", "tls_context", "url_of"]

TLS_PASSWORD: Final = "ENGINEROOM_TLS_KEY_PASSWORD"  # noqa: S105 - the name of a variable
_MODE: Final = 0o660
"""Of a unix socket: who may write to it may use the server."""
_STALE_S: Final = 5.0


def bind(settings: ServerSettings) -> socket.socket:
    """The socket to listen on.

    :raises ConfigurationError: the address is no address, or in use.
    """
    if settings.uds is not None:
        return _bind_unix(Path(settings.uds))
    host = settings.host.strip("[]")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {settings.host!r}: {error.strerror}; check --host"
        ) from error
    try:
        if hasattr(signal, "SIGALRM"):  # on Windows the option means something else
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "give another --port, or stop what uses this one"
        ) from error
    return bound


def _bind_unix(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigurationError("this system has no unix sockets; give --host and --port")
    try:
        _remove_stale(path)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            bound.bind(os.fspath(path))
            path.chmod(_MODE)  # before anybody is listened to
            bound.setblocking(False)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on the unix socket {os.fspath(path)!r}: {error.strerror or error}; "
            "give another --uds"
        ) from error
    return bound


def _remove_stale(path: Path) -> None:
    """Remove a socket that a server has left behind. :raises ConfigurationError: it is none."""
    try:
        mode = path.stat(follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    shown = os.fspath(path)
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"{shown!r} is there and is no socket; give another --uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_STALE_S)
        try:
            asking.connect(shown)
        except ConnectionRefusedError:  # nobody listens
            path.unlink()
            return
        except TimeoutError:
            pass  # somebody does, who has much to do
    raise ConfigurationError(
        f"somebody listens on the unix socket {shown!r} already; give another --uds, or stop it"
    )


@contextlib.contextmanager
def removed_at_end(bound: socket.socket) -> Iterator[None]:
    """Remove the file of a unix socket in the end, unless another server has put its own there."""
    name = bound.getsockname()
    if not isinstance(name, str):
        yield
        return
    path = Path(name)
    own = path.stat(follow_symlinks=False)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(own, path.stat(follow_symlinks=False)):
                path.unlink()


def url_of(bound: socket.socket, settings: ServerSettings) -> str:
    """Where a server that listens on a socket is reached."""
    name = bound.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://{host}:{name[1]}"


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """What TLS is spoken with; ``None``: it is not.

    :raises ConfigurationError: certificate or key cannot be read, or are not one another's.
    """
    if settings.tls_cert is None:
        return None
    for flag, file in (("--tls-cert", settings.tls_cert), ("--tls-key", settings.tls_key)):
        if file is not None:
            try:
                Path(file).read_bytes()
            except OSError as error:
                raise ConfigurationError(
                    f"{flag}: cannot read {file!r}: {error.strerror}"
                ) from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    password = os.environ.get(TLS_PASSWORD, "")
    try:
        # A function, else OpenSSL would ask for a password at the terminal.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, lambda: password)
    except (OSError, ValueError) as error:
        raise ConfigurationError(_tls_mistake(settings, error, password)) from error
    return context


def _tls_mistake(settings: ServerSettings, error: Exception, password: str) -> str:
    files = " and ".join(repr(f) for f in (settings.tls_cert, settings.tls_key) if f is not None)
    reason = getattr(error, "reason", None) or str(error)
    if reason == "KEY_VALUES_MISMATCH":
        return f"--tls-key: the key is not that of the certificate ({files})"
    if _is_encrypted(settings.tls_key or settings.tls_cert):
        what = "does not open it" if password else "is not set"
        return f"--tls-key: the key is encrypted, and {TLS_PASSWORD} {what} ({files})"
    return (
        f"--tls-cert and --tls-key: {files} have no certificate and key in PEM form ({reason}); "
        "without --tls-key both are looked for in the same file"
    )


def _is_encrypted(file: str | None) -> bool:
    text = b"" if file is None else Path(file).read_bytes()
    return b"BEGIN ENCRYPTED" in text or b"ENCRYPTED\n" in text.replace(b"\r", b"")
