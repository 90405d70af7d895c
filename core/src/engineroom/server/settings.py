"""What a server is told: where it listens, who may use it, and how much."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields
from typing import Final, Literal

from engineroom.errors import ConfigurationError
from engineroom.server.keys import KeyRing

__all__ = ["ServerSettings"]

_FROM_ZERO: Final = frozenset(
    {"port", "max_queued", "key_max_queued", "drain_timeout_s", "heartbeat_s"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Every limit of the server. ``None`` is no limit.

    :param host: address to listen on; one that others can reach needs ``keys`` or ``insecure``.
    :param port: 0: a free one.
    :param insecure: listen for others without keys.
    :param keys: who may use the server; an empty ring asks for no key.
    :param max_running: requests that are answered at one time; more wait.
    :param max_queued: requests that wait at one time; more are refused (429).
    :param key_max_running: the same for each key.
    :param key_max_queued: the same for each key.
    :param tokens_per_minute: tokens, read and written, of all requests together.
    :param key_tokens_per_minute: the same for each key.
    :param max_body_bytes: size of a request's body (413).
    :param max_messages: messages of a conversation.
    :param max_choices: answers to one HTTP request: prompts times ``n``.
    :param max_header_bytes: size of a request's headers (431).
    :param max_connections: connections at one time; more are closed at once (503).
    :param header_timeout_s: seconds for the headers to arrive (408).
    :param body_timeout_s: seconds for the body to arrive (408).
    :param write_timeout_s: seconds that a reader may leave a full buffer unread; then the
        connection is cut and the work stopped.
    :param keep_alive_s: seconds that a connection stays open without a request.
    :param request_timeout_s: seconds for a request, waiting included (408); a request may ask
        for less.
    :param heartbeat_s: seconds for which a stream may be silent, while a long prompt is read for
        instance; then a comment is sent. 0: none is.
    :param drain_timeout_s: seconds that running requests get when the server stops.
    :param unknown_fields: what to do about fields that an API does not know.
    :param cors_origins: origins whose pages may use the server; ``*``: all. None by default.
    :param allowed_hosts: further names that the server is reached by. A server on the loopback
        address without keys answers only to loopback names, so that no web page can reach it
        through a name of its own.
    :param log_prompts: write what is asked to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False
    keys: KeyRing = field(default_factory=KeyRing)
    max_running: int | None = None
    max_queued: int = 256
    key_max_running: int | None = None
    key_max_queued: int | None = None
    tokens_per_minute: int | None = None
    key_tokens_per_minute: int | None = None
    max_body_bytes: int = 4 << 20
    max_messages: int = 2048
    max_choices: int = 32
    max_header_bytes: int = 32 << 10
    max_connections: int = 2048
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    request_timeout_s: float | None = 600.0
    heartbeat_s: float = 15.0
    drain_timeout_s: float = 30.0
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low = 0 if each.name in _FROM_ZERO else None
            if value < 0 or (low is None and value == 0):
                least = "at least 0" if low == 0 else "more than 0"
                raise ConfigurationError(f"{each.name} must be {least}, not {value}")
        if self.port > 65535:
            raise ConfigurationError(f"port must be 0 to 65535, not {self.port}")
        if self.unknown_fields not in ("ignore", "refuse"):
            raise ConfigurationError(
                f"unknown_fields must be 'ignore' or 'refuse', not {self.unknown_fields!r}"
            )
        if not (self.local or self.keys.needed or self.insecure):
            raise ConfigurationError(
                f"refusing to listen on {self.host!r} without keys: whoever reaches it could use "
                "it; give API keys (--keys FILE or ENGINEROOM_API_KEYS), listen on 127.0.0.1, or "
                "say --insecure"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own. Nothing is looked up."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
