"""Who may use the server: keys, kept as hashes and compared in constant time.

A key file has a key a line, ``NAME KEY`` or ``NAME sha256:HEX``, and behind it what differs from
the server's own settings: ``priority=5`` (most that its requests may ask for), ``metrics=all`` (it
may read everybody's metrics). ``engineroom new-key`` writes such lines. Keys are long and random,
so a plain SHA-256 keeps them: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from engineroom.config.changes import read_settled
from engineroom.errors import ConfigurationError

__all__ = ["ANONYMOUS", "Identity", "KeyChanges", "KeyRing", "KeySpec", "new_key"]

API_KEYS_VARIABLE: Final = "ENGINEROOM_API_KEYS"
ADMIN_KEYS_VARIABLE: Final = "ENGINEROOM_ADMIN_KEYS"
MIN_CHARS: Final = 16
"""A shorter key could be guessed."""
MAX_KEYS: Final = 10_000
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_PRIORITY = re.compile(r"-?\d{1,3}")
_LINE: Final = (
    "a line is NAME KEY or NAME sha256:HEX, and behind it priority=NUMBER (-100 to 100) and "
    "metrics=all where it is to have them"
)


class KeySpec(NamedTuple):
    """A line of a key file.

    :param key: the key, or ``sha256:HEX``.
    :param max_priority: most that its requests may ask for; ``None``: as the server says.
    :param all_metrics: whether it may read the metrics of all keys.
    """

    name: str
    key: str
    max_priority: int | None = None
    all_metrics: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose key it was.

    :param admin: may use the admin routes, and read the metrics of all keys.
    :param max_priority: most that its requests may ask for; ``None``: as the server says.
    :param all_metrics: may read the metrics of all keys.
    :param digest: by which its key is known.
    """

    name: str
    admin: bool = False
    max_priority: int | None = None
    all_metrics: bool = False
    digest: bytes = field(default=b"", repr=False)


ANONYMOUS: Final = Identity("anonymous", all_metrics=True)


@dataclass(frozen=True, slots=True)
class KeyChanges:
    """What differs between two rings of keys, by name.

    :param revoked: keys that hold no more; of a name that has another key now, too.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    revoked: frozenset[bytes] = frozenset()

    def __str__(self) -> str:
        parts = [
            f"{what}: {', '.join(names)}"
            for what in ("added", "removed", "changed")
            if (names := getattr(self, what))
        ]
        return "; ".join(parts) or "nothing changed"


class KeyRing:
    """The keys of a server. Holds hashes only.

    :param keys: ``(name, key)`` for the API, or whole :class:`KeySpec`.
    :param admin_keys: the same for the admin routes; they serve the API, too.
    :param read_again: reads them anew, where they come from files.
    :raises ConfigurationError: a key is too short, a name is odd or given twice.
    """

    def __init__(
        self,
        keys: Iterable[KeySpec | tuple[str, str]] = (),
        admin_keys: Iterable[KeySpec | tuple[str, str]] = (),
        *,
        read_again: Callable[[], KeyRing] | None = None,
    ) -> None:
        owners: dict[str, Identity] = {}
        for admin, specs in ((False, keys), (True, admin_keys)):
            for spec in specs:
                name, key, max_priority, all_metrics = KeySpec(*spec)
                if not _NAME.fullmatch(name):
                    raise ConfigurationError(
                        f"{name[:64]!r} is no name of a key; use ASCII letters, digits and "
                        ". _ @ -, 64 at most"
                    )
                if name in owners:
                    raise ConfigurationError(f"two keys are called {name!r}; rename one of them")
                if max_priority is not None and not -100 <= max_priority <= 100:
                    raise ConfigurationError(
                        f"the priority of key {name!r} must be -100 to 100, not {max_priority}"
                    )
                owners[name] = Identity(
                    name, admin, max_priority, admin or all_metrics, _digest(name, key)
                )
        if len(owners) > MAX_KEYS:
            raise ConfigurationError(f"{len(owners)} keys are more than {MAX_KEYS}")
        self._owners = owners
        self._read_again = read_again

    @property
    def owners(self) -> Mapping[str, Identity]:
        """Whose keys these are, by name."""
        return self._owners

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._owners)

    @property
    def has_admin(self) -> bool:
        """Whether there is an admin key."""
        return any(identity.admin for identity in self._owners.values())

    @property
    def from_files(self) -> bool:
        """Whether :meth:`reread` has anything to read."""
        return self._read_again is not None

    def find(self, key: str) -> Identity | None:
        """Whose key it is. Takes as long for a wrong key as for a right one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        owner: Identity | None = None
        for identity in self._owners.values():
            if hmac.compare_digest(identity.digest, digest):
                owner = identity
        return owner

    def reread(self) -> KeyRing:
        """The keys as the files have them now, and those of the environment. Blocks.

        :raises ConfigurationError: as :meth:`read`; or a file is being written all the time.
        """
        return self._read_again() if self._read_again is not None else self

    def replace(self, fresh: KeyRing) -> KeyChanges:
        """Have the keys of another ring from now on."""
        before, after = self._owners, dict(fresh.owners)
        self._owners = after
        held = {identity.digest for identity in after.values()}
        return KeyChanges(
            added=tuple(name for name in after if name not in before),
            removed=tuple(name for name in before if name not in after),
            changed=tuple(n for n, owner in after.items() if n in before and owner != before[n]),
            revoked=frozenset(o.digest for o in before.values() if o.digest not in held),
        )

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
        from_environment = (
            _from_variable(API_KEYS_VARIABLE, "key", environ),
            _from_variable(ADMIN_KEYS_VARIABLE, "admin", environ),
        )

        def read() -> KeyRing:
            files = (_from_file(keys), _from_file(admin_keys))
            again = None if keys is None and admin_keys is None else read
            both = ([*a, *b] for a, b in zip(files, from_environment, strict=True))
            return cls(*both, read_again=again)

        return read()


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


def _from_file(path: Path | None) -> list[KeySpec]:
    if path is None:
        return []
    file = path.expanduser()
    try:
        text = read_settled(file, "the key file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"the key file {os.fspath(file)!r} cannot be read: it is no UTF-8 text"
        ) from error
    specs: list[KeySpec] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        spec = _spec(words)
        if spec is None:  # the line is not shown: it holds a secret
            raise ConfigurationError(f"{os.fspath(file)}:{number}: {_LINE}")
        specs.append(spec)
    if not specs:
        raise ConfigurationError(
            f"the key file {os.fspath(file)!r} has no key; `engineroom new-key NAME` makes one"
        )
    return specs


def _spec(words: list[str]) -> KeySpec | None:
    """What a line says; ``None``: it is none."""
    if len(words) < 2:
        return None
    known: dict[str, Any] = {}
    for word in words[2:]:
        name, _, value = word.partition("=")
        if name == "priority" and _PRIORITY.fullmatch(value) and "max_priority" not in known:
            known["max_priority"] = int(value)
        elif word == "metrics=all":
            known["all_metrics"] = True
        else:
            return None
    return KeySpec(words[0], words[1], **known)


def _from_variable(variable: str, prefix: str, environ: Mapping[str, str]) -> list[KeySpec]:
    keys = [key for part in environ.get(variable, "").split(",") if (key := part.strip())]
    return [KeySpec(f"{prefix}-{number}", key) for number, key in enumerate(keys, 1)]
