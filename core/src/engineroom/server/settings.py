"""The settings of a server: where it listens, who may use it, and how much."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from engineroom.errors import ConfigurationError
from engineroom.server.keys import KeyRing
from engineroom.server.proxies import TrustedProxies

__all__ = ["ServerSettings"]


def _setting(default: Any, text: str, **more: Any) -> Any:
    """A field and its meaning.

    :param text: what it means; the help of its flag.
    :param more: ``flag``: whether ``engineroom serve`` has a flag for it; ``metavar``: what stands
        there for the value; ``from_zero``: 0 is allowed, too; ``most``: the largest number.
    """
    known = {"flag": True, "metavar": None, "from_zero": False, "most": None}
    return field(default=default, metadata={"text": text, **known, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Every limit of the server. ``None`` is no limit.

    A field's default, meaning and range are said here and nowhere else: the flags of ``engineroom
    serve`` are made of them.

    :raises ConfigurationError: a value is out of its range, or whoever reaches the server could
        use it without a key.
    """

    host: str = _setting("127.0.0.1", "Listen on this address.", metavar="ADDRESS")
    """One that others can reach needs ``keys`` or ``insecure``."""
    port: int = _setting(8000, "Listen on this port; 0: a free one.", from_zero=True, most=65535)
    uds: str | None = _setting(
        None, "Listen on this unix socket, not on an address.", metavar="PATH"
    )
    """Owner and group may use it. One that is there is replaced where nobody listens on it."""
    tls_cert: str | None = _setting(
        None, "Speak TLS, with this certificate and those that sign it (PEM).", metavar="FILE"
    )
    tls_key: str | None = _setting(
        None, "The certificate's key, if it is not in the same file.", metavar="FILE"
    )
    """The environment's ENGINEROOM_TLS_KEY_PASSWORD opens one that is encrypted."""
    root_path: str | None = _setting(
        None, "Prefix under which a proxy offers the server, as /llm.", metavar="PREFIX"
    )
    """Paths are understood with it and without."""
    forwarded_allow_ips: tuple[str, ...] = _setting(
        (),
        "Believe this proxy who sends a request (X-Forwarded-For): an address, a network, or "
        "'unix' for who comes by --uds; may be repeated.",
        metavar="ADDRESS",
    )
    insecure: bool = _setting(
        False, "Listen for others without keys: whoever reaches it may use it."
    )
    keys: KeyRing = field(default_factory=KeyRing)
    """Who may use the server; an empty ring asks for no key."""
    max_running: int | None = _setting(None, "Answer so many requests at a time; more wait.")
    max_queued: int = _setting(256, "Let so many wait; more are refused.", from_zero=True)
    """429 is what more are told."""
    key_max_running: int | None = _setting(None, "As --max-running, for each key.")
    key_max_queued: int | None = _setting(None, "As --max-queued, for each key.", from_zero=True)
    tokens_per_minute: int | None = _setting(None, "Tokens, read and written, a minute.")
    """Of all requests together."""
    key_tokens_per_minute: int | None = _setting(None, "The same for each key.")
    max_priority: int = _setting(
        0, "Highest priority that a request may ask for.", from_zero=True, most=100
    )
    """What asks for more goes as this much, with a warning. A key's own line may say otherwise."""
    max_body_bytes: int = _setting(4 << 20, "Largest body of a request, in bytes.")
    """413 is what a larger one is told."""
    max_json_values: int = _setting(
        1 << 19, "Values in the JSON of a body; a list or object counts as eight.", flag=False
    )
    """An eighth as many texts and names may be among them. More would take long to read (400)."""
    max_body_total_bytes: int = _setting(
        256 << 20, "Bodies of all requests that are being answered, together, in bytes."
    )
    """Those that would make more are told to come again (503); each caller has a fair share. At
    least twice ``max_body_bytes``."""
    max_messages: int = _setting(2048, "Messages of a conversation.", flag=False)
    max_parts: int = _setting(8192, "Parts of the contents of its messages.", flag=False)
    max_choices: int = _setting(32, "Answers to one HTTP request: prompts times `n`.", flag=False)
    max_header_bytes: int = _setting(32 << 10, "Size of a request's headers (431).", flag=False)
    max_connections: int = _setting(2048, "Connections at one time.")
    """More are closed at once (503)."""
    header_timeout_s: float = _setting(10.0, "Seconds for the headers to arrive (408).", flag=False)
    body_timeout_s: float = _setting(30.0, "Seconds for the body to arrive (408).", flag=False)
    write_timeout_s: float = _setting(
        30.0,
        "Seconds that a reader may leave a full buffer unread; then the connection is cut and the "
        "work stopped.",
        flag=False,
    )
    keep_alive_s: float = _setting(
        75.0, "Seconds that a connection stays open without a request.", flag=False
    )
    request_timeout_s: float | None = _setting(
        600.0, "Give a request so long, waiting included.", metavar="SECONDS"
    )
    """A request may ask for less; 408 is what a late one is told."""
    drain_timeout_s: float = _setting(
        30.0,
        "Give running requests so long when the server stops.",
        from_zero=True,
        metavar="SECONDS",
    )
    heartbeat_s: float = _setting(
        15.0,
        "Send a comment on streams that are silent for so long; 0: never.",
        from_zero=True,
        metavar="SECONDS",
    )
    """A stream is silent while a long prompt is read, for instance."""
    unknown_fields: Literal["ignore", "refuse"] = _setting(
        "ignore", "What to do about fields that an API does not know."
    )
    cors_origins: tuple[str, ...] = _setting(
        (), "Let pages of this origin use the server; may be repeated.", metavar="ORIGIN"
    )
    """``*``: all of them."""
    allowed_hosts: tuple[str, ...] = _setting(
        (), "A further name that the server is reached by; may be repeated.", metavar="NAME"
    )
    """A server on the loopback address without keys answers only to loopback names and these, so
    that no web page can reach it through a name of its own."""
    log_prompts: bool = _setting(False, "Write prompts to the log.")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise ConfigurationError(f"{setting.name} must be a finite number, not {value}")
            from_zero, most = setting.metadata["from_zero"], setting.metadata["most"]
            if value < 0 or (value == 0 and not from_zero):
                least = "at least 0" if from_zero else "more than 0"
                raise ConfigurationError(f"{setting.name} must be {least}, not {value}")
            if most is not None and value > most:
                raise ConfigurationError(f"{setting.name} must be 0 to {most}, not {value}")
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigurationError("tls_key is the key of a certificate; give tls_cert, too")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigurationError(
                f"root_path must begin with a slash and not end with one, not {self.root_path!r}"
            )
        TrustedProxies(self.forwarded_allow_ips)
        if self.unknown_fields not in ("ignore", "refuse"):
            raise ConfigurationError(
                f"unknown_fields must be 'ignore' or 'refuse', not {self.unknown_fields!r}"
            )
        if self.max_body_total_bytes < 2 * self.max_body_bytes:
            raise ConfigurationError(
                f"max_body_total_bytes ({self.max_body_total_bytes}) must be at least twice "
                f"max_body_bytes ({self.max_body_bytes}); set it higher (--max-body-total)"
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
        return self.uds is not None or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own. Nothing is looked up."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
