"""Who may use the server: keys, kept as hashes and compared in constant time.

A key file has a key a line, ``NAME KEY`` or ``NAME sha256:HEX``; ``engineroom new-key`` writes
such lines. Keys are long and random, so a plain SHA-256 keeps them: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engineroom.errors import ConfigurationError

__all__ = ["ANONYMOUS", "Identity", "KeyRing", "new_key"]

API_KEYS_VARIABLE: Final = "ENGINEROOM_API_KEYS"
ADMIN_KEYS_VARIABLE: Final = "ENGINEROOM_ADMIN_KEYS"
MIN_CHARS: Final = 16
"""A shorter key could be guessed."""
MAX_KEYS: Final = 10_000
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose key it was. :param admin: may use the admin routes."""

    name: str
    admin: bool = False


ANONYMOUS: Final = Identity("anonymous")


class KeyRing:
    """The keys of a server. Holds hashes only.

    :param keys: ``(name, key)`` for the API; a key may be ``sha256:HEX``.
    :param admin_keys: the same for the admin routes; they serve the API, too.
    :raises ConfigurationError: a key is too short, a name is odd or given twice.
    """

    def __init__(
        self, keys: Iterable[tuple[str, str]] = (), admin_keys: Iterable[tuple[str, str]] = ()
    ) -> None:
        self._entries: list[tuple[bytes, Identity]] = []
        names: set[str] = set()
        for admin, pairs in ((False, keys), (True, admin_keys)):
            for name, key in pairs:
                if not _NAME.fullmatch(name):
                    raise ConfigurationError(
                        f"{name[:64]!r} is no name of a key; use letters, digits and . _ @ -, "
                        "64 at most"
                    )
                if name in names:
                    raise ConfigurationError(f"two keys are called {name!r}; rename one of them")
                names.add(name)
                self._entries.append((_digest(name, key), Identity(name, admin)))
        if len(self._entries) > MAX_KEYS:
            raise ConfigurationError(f"{len(self._entries)} keys are more than {MAX_KEYS}")

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._entries)

    @property
    def has_admin(self) -> bool:
        """Whether there is an admin key."""
        return any(identity.admin for _, identity in self._entries)

    def find(self, key: str) -> Identity | None:
        """Whose key it is. Takes as long for a wrong key as for a right one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        owner: Identity | None = None
        for known, identity in self._entries:
            if hmac.compare_digest(known, digest):
                owner = identity
        return owner

    @classmethod
    def read(
        cls,
        keys: Path | None = None,
        admin_keys: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> KeyRing:
        """Keys from files, and from ``ENGINEROOM_API_KEYS`` and ``ENGINEROOM_ADMIN_KEYS``.

        :raises ConfigurationError: a file cannot be read, or has mistakes or no key.
        """
        return cls(
            [*_from_file(keys), *_from_variable(API_KEYS_VARIABLE, "key", environ)],
            [*_from_file(admin_keys), *_from_variable(ADMIN_KEYS_VARIABLE, "admin", environ)],
        )


def new_key() -> tuple[str, str]:
    """A fresh key, and what stands for it in a key file."""
    key = f"er-{secrets.token_urlsafe(32)}"
    return key, f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _digest(name: str, key: str) -> bytes:
    if hashed := _HASHED.fullmatch(key):
        return bytes.fromhex(hashed[1])
    if len(key) < MIN_CHARS or key.startswith("sha256:"):
        raise ConfigurationError(
            f"the key {name!r} is shorter than {MIN_CHARS} characters or no sha256:HEX; "
            "`engineroom new-key` makes one"
        )
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _from_file(path: Path | None) -> list[tuple[str, str]]:
    if path is None:
        return []
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigurationError(
            f"the key file {os.fspath(path)!r} cannot be read: {reason}"
        ) from error
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:  # the line is not shown: it holds a secret
            raise ConfigurationError(
                f"{os.fspath(path)}:{number}: a line is NAME KEY or NAME sha256:HEX"
            )
        pairs.append((words[0], words[1]))
    if not pairs:
        raise ConfigurationError(
            f"the key file {os.fspath(path)!r} has no key; `engineroom new-key NAME` makes one"
        )
    return pairs


def _from_variable(variable: str, prefix: str, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    keys = [key for part in environ.get(variable, "").split(",") if (key := part.strip())]
    return [(f"{prefix}-{number}", key) for number, key in enumerate(keys, 1)]
